"""The contracts of what records point to. Read next to ``bowerbird.batch`` (the keys of a batch).

Shapes: B batch, N tokens, D embedding width, C classes, Q queries, k results.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data.dataset import Dataset

if TYPE_CHECKING:
    import numpy as np

    from bowerbird.data.images import Preprocessing

# (item of the data set, random generator of this item in this epoch) -> entries of the batch, before collation.
ItemTransform = Callable[[dict[str, Any], "np.random.Generator"], dict[str, Any]]


@dataclass(frozen=True)
class Features:
    """What an encoder returns.

    Attributes:
        pooled: ``(B, D)``, one embedding per item, not normalised.
        tokens: ``(B, N, D')`` patch or word tokens, or ``None``.
        grid: ``(rows, columns)`` of the tokens, or ``None``.
        mask: ``(B, N)``, ``True`` where a token is real, or ``None``.
    """

    pooled: Tensor
    tokens: Tensor | None = None
    grid: tuple[int, int] | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class TimmForm:
    """A model of the timm library that computes an encoder's ``Features.pooled``.

    Attributes:
        architecture: The first argument of ``timm.create_model``.
        arguments: Its other arguments but ``num_classes``; plain data.
        state: The weights, under timm's names.
        num_classes: Width of the classifier that serves as the encoder's projection; 0: there is none.
    """

    architecture: str
    arguments: Mapping[str, Any]
    state: Mapping[str, Tensor]
    num_classes: int = 0


@dataclass(frozen=True)
class LossOutput:
    """``total``: the scalar to differentiate; ``parts``: its named scalar terms; ``stats``: other scalars to log."""

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    stats: Mapping[str, float | Tensor] = field(default_factory=dict)


class Encoder(nn.Module):
    """Turns a batch into features. ``embed_dim`` is D of ``Features.pooled``.

    ``preprocessing`` says how an image file, or every frame of a video, becomes the ``image`` or ``video`` key;
    ``None`` for encoders that take neither. ``frames``: T of the ``video`` key, of encoders that take videos (an image
    is a video of one frame); ``None`` for the others.

    An encoder with ``tokenize(texts) -> {"input_ids", "attention_mask"}`` takes texts: from a batch with ``text``
    alone ``forward`` gives their features, in the same space as those of its images or videos if it takes these too.
    """

    embed_dim: int
    preprocessing: Preprocessing | None = None
    frames: int | None = None

    @classmethod
    def build(cls, config: Any) -> Self:
        """The encoder that ``config`` (an instance of the record's config model) describes, weights included."""
        raise NotImplementedError(f"{cls.__name__}.build")

    def forward(self, batch: Batch) -> Features:
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def frozen_trunk(self, batch: Batch) -> Tensor | None:
        """``(B, F)`` output of the part that is never trained, or ``None`` if every part is trained.

        Where it returns a tensor, ``forward`` must accept a batch whose ``frozen_features`` hold that tensor in the
        place of ``image`` and give the same features. The training loop may then run the trunk once per item.
        """
        return None

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings to keep beside exported weights: what builds the same modules without fetching first weights.

        ``config`` is what the encoder was built with, as plain data. By default it is kept as it is.
        """
        return dict(config)

    def timm_form(self) -> TimmForm | None:
        """This encoder as a timm model, for ``bowerbird export --format timm``; ``None`` where timm has none like it.

        May raise ``InputError`` that says why a setting of the encoder has no counterpart in timm.
        """
        return None


@dataclass(frozen=True)
class Objects:
    """The objects of one picture of H x W pixels: R annotated or found ones.

    Attributes:
        boxes: float32 ``(R, 4)``, x1 y1 x2 y2 in pixels, x1 <= x2 and y1 <= y2.
        labels: int64 ``(R,)``, class index in 0..C-1 (no class stands for the background).
        scores: float32 ``(R,)`` in 0..1, falling; ``None`` for annotations.
        masks: bool ``(R, H, W)``, or ``None``.
        keypoints: float32 ``(R, K, 3)``, x and y in pixels and visibility (0: not annotated, 1: hidden, 2: visible), or
            ``None``.
        crowd: bool ``(R,)``, boxes around groups that are neither right nor wrong; ``None``: none is.
        presence: float32 ``(C,)`` in 0..1, how sure it is that the picture has a class; ``None`` for annotations and
            detectors that do not say.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None
    masks: Tensor | None = None
    keypoints: Tensor | None = None
    crowd: Tensor | None = None
    presence: Tensor | None = None


class Detector(Encoder):
    """An encoder that also finds objects. ``classes`` are their names, known once ``open`` was called.

    Pictures are float32 ``(3, h, w)`` in 0..1, RGB, each of its own size: a detector resizes, normalises and pads.
    As an encoder it embeds pictures as every other.
    """

    classes: Sequence[str] = ()

    def open(self, classes: Sequence[str]) -> None:
        """Make what depends on the classes. Raises ``RecipeError`` where there are other classes already."""
        raise NotImplementedError(f"{type(self).__name__}.open")

    def losses(self, images: Sequence[Tensor], objects: Sequence[Objects]) -> Mapping[str, Tensor]:
        """Named scalars whose sum is minimised. In training mode."""
        raise NotImplementedError(f"{type(self).__name__}.losses")

    def detect(self, images: Sequence[Tensor]) -> list[Objects]:
        """The objects of every picture, in its own pixels, best first, on the CPU. In eval mode, without gradients."""
        raise NotImplementedError(f"{type(self).__name__}.detect")

    def parameter_groups(self) -> list[dict[str, Any]] | None:
        """Groups for the optimiser, as ``Objective.parameter_groups``; ``None`` leaves them to the objective."""
        return None


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, loaded: frozen encoder in eval mode, the state of its objective, the names of its classes, and
    the fingerprint of its space."""

    path: Path
    encoder: Encoder
    objective_state: Mapping[str, Tensor]
    classes: Sequence[str]
    recipe: Mapping[str, Any]
    fingerprint: str = ""


class BuildContext(ABC):
    """What an objective may ask for while it is built."""

    classes: Sequence[str]  # names of the classes of the training split; empty where there are no labels
    total_steps: int
    seed: int
    dataset: Dataset | None = None  # the training split, to count in; None where a context has no data

    @abstractmethod
    def load_run(self, path: str | Path) -> TrainedRun:
        """A finished run, given its folder. Raises ``RecipeError`` where there is none."""

    @abstractmethod
    def eval_batches(self, encoder: Encoder, keys: Sequence[str] = ("image", "label")) -> Iterator[Batch]:
        """One ordered pass over the training split with ``encoder``'s evaluation transform, without augmentation."""


class Objective(nn.Module):
    """The unit that is trained and that DDP wraps: encoder, heads, teacher and loss of one method."""

    encoder: Encoder

    @classmethod
    def build(cls, config: Any, encoder: Encoder, context: BuildContext) -> Self:
        raise NotImplementedError(f"{cls.__name__}.build")

    def forward(self, batch: Batch) -> LossOutput:
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser. A group may set ``lr_scale`` (default 1) and ``weight_decay`` (default: recipe's).

        By default every trainable parameter, vectors and scalars without weight decay.
        """
        trainable = [p for p in self.parameters() if p.requires_grad]
        matrices = [p for p in trainable if p.ndim > 1]
        vectors = [p for p in trainable if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def item_transform(self) -> ItemTransform | None:
        """What makes the entries of a batch from one item of the training split: views, crops, masks, noise.

        It takes the place of the encoder's preprocessing and of the recipe's ``dataset.augment``. It runs in the worker
        processes that read the data (so it can be pickled and holds no part of the model) and draws everything random
        from the generator that it gets: batches then depend neither on the number of processes nor on interruptions.
        ``None``, the default: one view, prepared as the encoder says.
        """
        return None

    def before_step(self, step: int) -> None:
        """Called before the forward pass of optimiser step ``step`` (counted from 0)."""

    def before_update(self, step: int) -> None:
        """Called when the gradients are there, before the recipe's clipping and before the optimiser moves."""

    def after_step(self, step: int) -> None:
        """Called after the optimiser has moved: moving averages, queues."""

    def on_epoch_start(self, epoch: int) -> None:
        """Called at the start of epoch ``epoch`` (counted from 0)."""

    def exported_encoder(self) -> Encoder:
        """What is kept of the run. By default the encoder that was trained."""
        return self.encoder

    def relations(self) -> list[dict[str, Any]]:
        """Relations of the exported encoder's space that training made, stored beside the encoder.

        Each has ``kind``, ``to`` (a fingerprint) and ``evidence`` (what was measured, plain data). ``compatible``: its
        queries may search the space ``to`` as they are. ``transform``: they reach it through a map that was trained
        together with the encoder, whose ``steps`` (of ``bowerbird.gallery.transform``) come with it. Asked after
        training.
        """
        return []


class Modifier(ABC):
    """Changes a module while it trains (noise in features, sparsity)."""

    @abstractmethod
    def attach(self, module: nn.Module, total_steps: int) -> None: ...

    def before_step(self, step: int) -> None:
        """Called before the forward pass of optimiser step ``step``."""

    def after_step(self, step: int) -> None:
        """Called after the optimiser has moved."""

    def finalize(self, module: nn.Module) -> nn.Module:
        """The module without the modifier's machinery."""
        return module

    def report(self) -> Mapping[str, float]:
        return {}


@dataclass(frozen=True)
class Metrics:
    """``summary``: named means; ``per_query``: name -> one value per query (NaN where a query is not valid)."""

    summary: Mapping[str, float]
    per_query: Mapping[str, Any] = field(default_factory=dict)


class EvalContext(ABC):
    """What an evaluator may ask for."""

    encoder: Encoder

    @abstractmethod
    def embed(self, dataset: Dataset, encoder: Encoder | None = None) -> Any:
        """float32 ``(len(dataset), D)`` numpy array of unit vectors, in order of position."""

    @abstractmethod
    def dataset(self, use: str, *, split: str | None = None, **config: Any) -> Dataset:
        """A data set by name."""


class Evaluator(ABC):
    """A protocol: measures an encoder and keeps the values of single queries."""

    @classmethod
    @abstractmethod
    def build(cls, config: Any) -> Self: ...

    @abstractmethod
    def run(self, context: EvalContext) -> Metrics: ...


class Transform(nn.Module):
    """Maps vectors of the space ``source`` to the space ``target`` (fingerprints); the other direction is refused."""

    source: str
    target: str

    def forward(self, vectors: Tensor) -> Tensor:  # (B, D_source) -> (B, D_target)
        raise NotImplementedError(f"{type(self).__name__}.forward")


def freeze(module: nn.Module) -> nn.Module:
    """Eval mode and no gradient, for teachers and old encoders."""
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


__all__ = [
    "Batch", "BuildContext", "Dataset", "Detector", "Encoder", "EvalContext", "Evaluator", "Features", "ItemTransform",
    "LossOutput", "Metrics", "Modifier", "Objective", "Objects", "TimmForm", "TrainedRun", "Transform", "freeze",
]  # fmt: skip
