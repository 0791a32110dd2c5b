"""How good an encoder is with labels: nearest neighbours, a linear probe, fine-tuning; the official protocols.

``mim:knn`` is that of DINO (arXiv 2104.14294), ``mim:linear-probe`` those of MAE (arXiv 2111.06377) and DINO,
``mim:finetune`` that of MAE and BEiT (arXiv 2106.08254). Their settings are presets; see docs/pretraining.md.

N training items, M test items, C classes, D width of the features.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, model_validator
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from timm.layers.drop import DropPath
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data import images_of, subset
from bowerbird.data.images import Preprocessing, decode_batches
from bowerbird.errors import InputError
from bowerbird.protocols import Dataset, Encoder, EvalContext, Evaluator, Metrics
from bowerbird.retrieval.configs import Intervals
from bowerbird.retrieval.evaluators import common_labels, summarise
from bowerbird.retrieval.metrics import PerQuery
from bowerbird.train.data import BatchReader, TrainItems, epoch_batches
from bowerbird_mim.beit_vit import BEiTEncoder
from bowerbird_mim.features import FeatureKind, frozen_features, run_blocks, transformer_of
from bowerbird_mim.neighbours import nearest, votes_of
from bowerbird_mim.optim import LARS, layer_decay_groups, warmup_cosine
from bowerbird_mim.views import View

Scale = Annotated[tuple[float, float], Field(strict=False)]


# ------------------------------------------------------------------------------------------------------- the task


class LabelledConfig(Intervals):
    """What the three protocols share."""

    dataset: str
    """Name of a data set with labels, for example core:image-folder."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the data set."""
    train_split: str | None = "train"
    """Items whose labels are used."""
    test_split: str | None = "test"
    """Items that are classified."""
    train_items: int | None = Field(None, ge=1)
    """Use the labels of so many training items only, drawn by the seed."""
    crop_pct: float | None = Field(None, gt=0, le=1)
    """Test pictures: shorter side to size / crop_pct, then the centre (DINO: 0.875). None: as the encoder does."""
    chunk: int = Field(256, ge=1)
    """Pictures that go through the encoder at once. Of fine-tuning: larger batches are accumulated from such parts."""
    seed: int = Field(0, ge=0)
    """Of the chosen items, the order, augmentation, first weights, and the bootstrap."""


@dataclass(frozen=True)
class Task:
    """Items of two splits with labels 0 to C - 1 (-1: a class that no training item has), and how to prepare them."""

    train: Dataset
    test: Dataset
    train_labels: Tensor  # int64 (N,)
    test_labels: Tensor  # int64 (M,)
    classes: int
    preprocessing: Preprocessing
    test_preprocessing: Preprocessing
    device: torch.device
    chunk: int

    @classmethod
    def of(cls, context: EvalContext, c: LabelledConfig) -> Self:
        """Raises ``InputError`` for encoders without pictures, and splits without a common class."""
        prepared = context.encoder.preprocessing
        if prepared is None:
            raise InputError(f"{type(context.encoder).__name__} takes no pictures; these protocols classify pictures")
        train = context.dataset(c.dataset, split=c.train_split, **c.settings)
        test = context.dataset(c.dataset, split=c.test_split, **c.settings)
        train_labels, test_labels = common_labels(train, test)
        if c.train_items is not None:
            if c.train_items > len(train):
                raise InputError(f"train_items = {c.train_items}: the split {c.train_split!r} has {len(train)} items")
            chosen = np.random.default_rng(c.seed).permutation(len(train))[: c.train_items]
            train, train_labels = subset(train, chosen.tolist()), train_labels[chosen]
        names, known = np.unique(train_labels, return_inverse=True)
        if not np.isin(test_labels, names).any():
            raise InputError(f"splits {c.train_split!r} and {c.test_split!r} of {c.dataset} have no class in common")
        position = np.clip(np.searchsorted(names, test_labels), 0, len(names) - 1)
        test_prepared = prepared
        if c.crop_pct is not None:
            test_prepared = Preprocessing.from_dict(prepared.to_dict() | {"resize": "crop", "crop_pct": c.crop_pct})
        return cls(
            train=train,
            test=test,
            train_labels=torch.from_numpy(known.astype(np.int64)),
            test_labels=torch.from_numpy(np.where(names[position] == test_labels, position, -1).astype(np.int64)),
            classes=len(names),
            preprocessing=prepared,
            test_preprocessing=test_prepared,
            device=next(context.encoder.parameters()).device,
            chunk=c.chunk,
        )

    def pictures(self, dataset: Dataset) -> Iterator[Tensor]:
        """``(B, 3, H, W)`` in order of position, without augmentation."""
        for _, images in decode_batches(images_of(dataset), self.test_preprocessing, batch_size=self.chunk):
            yield torch.from_numpy(images).to(self.device)

    def apply(self, function: Callable[[Tensor], Tensor], dataset: Dataset) -> Tensor:
        """``function`` of all pictures, joined, without gradients."""
        with torch.no_grad():
            return torch.cat([function(images) for images in self.pictures(dataset)])

    def outcomes(self, scores: Tensor) -> dict[str, PerQuery]:
        """``top1`` and, with more than five classes, ``top5`` of every test item, from scores ``(M, C)``."""
        order = scores.argsort(dim=1, descending=True, stable=True).cpu()
        right = order == self.test_labels[:, None]
        everything = np.ones(len(right), bool)
        ranks = (1, 5) if self.classes > 5 else (1,)
        return {f"top{k}": PerQuery(right[:, :k].any(dim=1).double().numpy(), everything) for k in ranks}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators of Python, numpy and torch start at ``seed`` inside, and are afterwards as before."""
    python, array = random.getstate(), np.random.get_state()  # noqa: NPY002  timm draws from the global ones
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)  # noqa: NPY002


# ------------------------------------------------------------------------------------------------------ neighbours


class KNNConfig(LabelledConfig):
    """Settings of ``mim:knn``."""

    features: FeatureKind = "pooled"
    """pooled: the encoder's embedding; class: the class token (DINO); mean: of the patch tokens."""
    ks: tuple[Annotated[int, Field(ge=1)], ...] = Field((10, 20), min_length=1)
    """Numbers of neighbours that vote."""
    temperature: float = Field(0.07, gt=0)
    """A neighbour's vote weighs exp(cosine / temperature)."""


class KNN(Evaluator):
    """A weighted vote of the nearest training items by cosine, on frozen features."""

    def __init__(self, config: KNNConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: KNNConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """``top1@k`` and, with more than five classes, ``top5@k``.

        Raises:
            InputError: Fewer training items than neighbours, or what ``Task.of`` and ``frozen_features`` refuse.
        """
        c, task = self.config, Task.of(context, self.config)

        def unit(images: Tensor) -> Tensor:
            return F.normalize(frozen_features(context.encoder, images, c.features).float(), dim=1)

        train, test = task.apply(unit, task.train), task.apply(unit, task.test)
        values: dict[str, PerQuery] = {}
        similarity, neighbours = nearest(train, test, max(c.ks))
        labels = task.train_labels.to(task.device)[neighbours]
        for k in c.ks:
            votes = votes_of(similarity[:, :k], labels[:, :k], task.classes, c.temperature)
            values |= {f"{name}@{k}": outcome for name, outcome in task.outcomes(votes).items()}
        return summarise(values, c)


def dino_knn() -> dict[str, Any]:
    """DINO: class token, 256 pixels to a crop of 224, four numbers of neighbours."""
    return {"features": "class", "ks": [10, 20, 100, 200], "crop_pct": 0.875}


# ----------------------------------------------------------------------------------------------------- linear probe


class LinearProbeConfig(LabelledConfig):
    """Settings of ``mim:linear-probe``. The defaults are those of MAE for ViT-B."""

    features: FeatureKind = "class"
    """class: the class token; class-4: of the last four blocks (DINO ViT-S); class-mean: with the patches' mean."""
    batch_norm: bool = True
    """Batch normalisation without parameters before the linear layer."""
    optimizer: Literal["lars", "sgd"] = "lars"
    """lars (MAE, the rate follows every step), or sgd (DINO, the rate follows the epochs); momentum 0.9."""
    base_lr: float = Field(0.1, gt=0)
    """Learning rate for a batch of 256; it grows in proportion to the batch."""
    batch_size: int = Field(16384, ge=2)
    """Items per step; all of them where there are fewer."""
    epochs: int = Field(90, ge=1)
    """Passes over the training items."""
    warmup_epochs: float = Field(10, ge=0)
    """Epochs in which the learning rate grows from 0; half a cosine to 0 follows."""
    weight_decay: float = Field(0.0, ge=0)
    """Of the linear layer's weight."""
    augment: bool = True
    """Random crop and flip. Without it the encoder sees every picture once, which is much faster."""
    crop_scale: Scale = (0.08, 1.0)
    """Range of the random crop's share of the picture."""
    workers: int = Field(0, ge=0)
    """Processes that read and crop pictures."""

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs = {self.warmup_epochs} leaves nothing of epochs = {self.epochs}")
        return self


@dataclass(frozen=True)
class LabelledView:
    """A random view of the item, and its position among the training items."""

    view: Callable[[Any, np.random.Generator], Any]

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        return {"image": self.view(item["image"], generator), "index": item["index"]}


class LinearProbe(Evaluator):
    """A linear layer on frozen features."""

    def __init__(self, config: LinearProbeConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: LinearProbeConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """``top1`` and, with more than five classes, ``top5``.

        Raises:
            InputError: What ``Task.of`` and ``frozen_features`` refuse.
        """
        c, task = self.config, Task.of(context, self.config)

        def features(images: Tensor) -> Tensor:
            return frozen_features(context.encoder, images, c.features).float()

        test = task.apply(features, task.test)
        with seeded(c.seed):
            head = self._head(test.shape[1], task.classes).to(task.device)
            self._fit(head, features, task)
        with torch.no_grad():
            scores = head.eval()(test)
        return summarise(task.outcomes(scores), c)

    def _head(self, width: int, classes: int) -> nn.Sequential:
        linear = nn.Linear(width, classes)
        if self.config.optimizer == "lars":
            nn.init.trunc_normal_(linear.weight, std=0.01)
        else:
            nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        norm = nn.BatchNorm1d(width, affine=False, eps=1e-6) if self.config.batch_norm else nn.Identity()
        return nn.Sequential(norm, linear)

    def _fit(self, head: nn.Sequential, features: Callable[[Tensor], Tensor], task: Task) -> None:
        c = self.config
        size = min(c.batch_size, len(task.train))
        lr = c.base_lr * size / 256
        kind: Any = LARS if c.optimizer == "lars" else torch.optim.SGD
        optimizer = kind(head.parameters(), lr=lr, momentum=0.9, weight_decay=c.weight_decay)
        known = None if c.augment else task.apply(features, task.train)
        labels = task.train_labels.to(task.device)
        view = View(preprocessing=task.preprocessing, scale=c.crop_scale)
        reader = Reader(task, view, seed=c.seed, workers=c.workers)
        for epoch in range(c.epochs):
            batches = epoch_batches(len(task.train), batch_size=size, epoch=epoch, seed=c.seed)
            inputs = self._views(features, reader, epoch, batches) if known is None else (known[b] for b in batches)
            for step, (index, x) in enumerate(zip(batches, inputs, strict=True)):
                now = epoch + (step / len(batches) if c.optimizer == "lars" else 0)
                for group in optimizer.param_groups:
                    group["lr"] = warmup_cosine(now, lr=lr, epochs=c.epochs, warmup_epochs=c.warmup_epochs)
                loss = F.cross_entropy(head(x), labels[torch.from_numpy(index).to(task.device)])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

    def _views(
        self, features: Callable[[Tensor], Tensor], reader: Reader, epoch: int, batches: list[NDArray[np.int64]]
    ) -> Iterator[Tensor]:
        """Features of a fresh view of every item, batch by batch."""
        for parts in reader.epoch(epoch, batches):
            with torch.no_grad():
                found = [features(part["image"].to(reader.task.device)) for part in parts]
            yield torch.cat(found)


class Reader:
    """Batches of random views of the training items, each read in parts of ``task.chunk`` items."""

    def __init__(self, task: Task, view: Callable[[Any, np.random.Generator], Any], *, seed: int, workers: int) -> None:
        self.task = task
        items = TrainItems(task.train, None, augment="none", seed=seed, transform=LabelledView(view))
        self.reader = BatchReader(items, workers=workers)

    def epoch(self, epoch: int, batches: list[NDArray[np.int64]]) -> Iterator[Iterator[Batch]]:
        """For every batch its parts: ``image`` and ``index``, the position in the task's training items."""
        cut = [[b[i : i + self.task.chunk] for i in range(0, len(b), self.task.chunk)] for b in batches]
        read = self.reader.epoch(epoch, [part for parts in cut for part in parts])
        for parts in cut:
            yield islice(read, len(parts))


def dino_linear() -> dict[str, Any]:
    """DINO, ViT-S: class tokens of the last four blocks, SGD, 100 epochs, batch 1024."""
    return {
        "features": "class-4", "batch_norm": False, "optimizer": "sgd", "base_lr": 0.001, "batch_size": 1024,
        "epochs": 100, "warmup_epochs": 0, "crop_pct": 0.875,
    }  # fmt: skip


def dino_base_linear() -> dict[str, Any]:
    """DINO, ViT-B: class token and mean patch token of the last block."""
    return dino_linear() | {"features": "class-mean"}


def saim_linear() -> dict[str, Any]:
    """SAIM: as MAE with batch 2048 and no warm-up."""
    return {"batch_size": 2048, "epochs": 90, "warmup_epochs": 0}


# ------------------------------------------------------------------------------------------------------ fine-tuning


class FinetuneConfig(LabelledConfig):
    """Settings of ``mim:finetune``. The defaults are those of MAE for ViT-B."""

    features: Literal["mean", "class", "pooled"] = "mean"
    """mean: patch tokens of the last block, averaged, then a new layer norm; class: the class token after the norm."""
    base_lr: float = Field(5e-4, gt=0)
    """Learning rate of AdamW for a batch of 256; it grows in proportion to the batch."""
    min_lr: float = Field(1e-6, ge=0)
    """Where half a cosine ends."""
    batch_size: int = Field(1024, ge=1)
    """Items per step; all of them where there are fewer."""
    epochs: int = Field(100, ge=1)
    """Passes over the training items."""
    warmup_epochs: float = Field(5, ge=0)
    """Epochs in which the learning rate grows from 0."""
    layer_decay: float = Field(0.65, gt=0, le=1)
    """A block's learning rate, over that of the block above it; 1 for the same rate everywhere."""
    weight_decay: float = Field(0.05, ge=0)
    """Of matrices; vectors, tokens and positions have none."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Largest rate of stochastic depth; it grows linearly from 0 over the blocks."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of the target that is spread over all classes."""
    mixup: float = Field(0.8, ge=0)
    """Parameter of the Beta distribution of mixup; 0 for none."""
    cutmix: float = Field(1.0, ge=0)
    """The same of cutmix. With both, each takes half of the batches."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment as timm writes it, or nothing."""
    erasing: float = Field(0.25, ge=0, le=1)
    """How often a random rectangle is filled with noise."""
    flip: float = Field(0.5, ge=0, le=1)
    """How often a picture is mirrored."""
    crop_scale: Scale = (0.08, 1.0)
    """Range of the random crop's share of the picture."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward passes."""
    workers: int = Field(0, ge=0)
    """Processes that read and augment pictures."""

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs = {self.warmup_epochs} leaves nothing of epochs = {self.epochs}")
        return self


class Classifier(nn.Module):
    """An encoder and a new linear layer: ``(B, C, H, W)`` to logits ``(B, classes)``."""

    def __init__(self, encoder: Encoder, features: Literal["mean", "class", "pooled"], width: int, classes: int):
        super().__init__()
        self.encoder, self.features = encoder, features
        self.fc_norm = nn.LayerNorm(width, eps=1e-6) if features == "mean" else nn.Identity()
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.fc_norm(raw_features(self.encoder, images, self.features)))


def raw_features(encoder: Encoder, images: Tensor, features: Literal["mean", "class", "pooled"]) -> Tensor:
    """``mean``: of the patch tokens of the last block *before* the final norm; else as ``frozen_features``."""
    if features != "mean":
        return frozen_features(encoder, images, features)
    found, (last,) = run_blocks(encoder, images)
    assert found.tokens is not None
    return last[:, -found.tokens.shape[1] :].mean(dim=1)


@dataclass(frozen=True)
class TimmView:
    """timm's training transform with RandAugment and erasing, drawn from the item's own generator."""

    preprocessing: Preprocessing
    crop_scale: tuple[float, float]
    flip: float
    rand_augment: str | None
    erasing: float

    @cached_property
    def transform(self) -> Any:
        p = self.preprocessing
        return create_transform(
            (3, p.height, p.width),
            is_training=True,
            scale=self.crop_scale,
            hflip=self.flip,
            color_jitter=None,  # type: ignore[arg-type]
            auto_augment=self.rand_augment,
            interpolation=p.interpolation,
            mean=p.mean,
            std=p.std,
            re_prob=self.erasing,
            re_mode="pixel",
        )

    def __call__(self, image: Any, generator: np.random.Generator) -> NDArray[np.float32]:
        with seeded(int(generator.integers(2**32))):
            return self.transform(image).numpy()


class Finetune(Evaluator):
    """All weights of a copy of the encoder are trained with labels; the encoder itself stays as it is."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: FinetuneConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """``top1`` and, with more than five classes, ``top5`` after the last epoch.

        Raises:
            InputError: ``layer_decay`` or ``drop_path`` for a network without transformer blocks, and what ``Task.of``
                and ``run_blocks`` refuse.
        """
        c, task = self.config, Task.of(context, self.config)
        with seeded(c.seed):
            model = self._model(context.encoder, task)
            self._fit(model, task)
        model.eval()
        with torch.autocast(task.device.type, dtype=torch.bfloat16, enabled=c.precision == "bf16"):
            scores = task.apply(model, task.test)
        return summarise(task.outcomes(scores), c)

    def _model(self, encoder: Encoder, task: Task) -> Classifier:
        with torch.no_grad():
            width = raw_features(encoder, next(task.pictures(task.test))[:1], self.config.features).shape[1]
        # BEiT fine-tunes with a bias table of its own in every block.
        encoder = encoder.for_finetuning() if isinstance(encoder, BEiTEncoder) else copy.deepcopy(encoder)
        model = Classifier(encoder, self.config.features, width, task.classes).to(task.device)
        set_drop_path(encoder, self.config.drop_path)
        return model.requires_grad_(True).train()

    def _fit(self, model: Classifier, task: Task) -> None:
        c = self.config
        size = min(c.batch_size, len(task.train))
        part = transformer_of(model.encoder)
        if part is None and c.layer_decay < 1:
            raise InputError(f"layer_decay = {c.layer_decay}: the encoder has no transformer blocks; set it to 1")
        groups = layer_decay_groups(
            model,
            num_blocks=0 if part is None else len(part.blocks),
            layer_decay=c.layer_decay,
            weight_decay=c.weight_decay,
        )
        lr = c.base_lr * size / 256
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999))
        mix = self._mix(task.classes)
        view = TimmView(task.preprocessing, c.crop_scale, c.flip, c.rand_augment, c.erasing)
        reader = Reader(task, view, seed=c.seed, workers=c.workers)
        for epoch in range(c.epochs):
            batches = epoch_batches(len(task.train), batch_size=size, epoch=epoch, seed=c.seed)
            for step, (batch, parts) in enumerate(zip(batches, reader.epoch(epoch, batches), strict=True)):
                now = warmup_cosine(
                    epoch + step / len(batches),
                    lr=lr,
                    epochs=c.epochs,
                    warmup_epochs=c.warmup_epochs,
                    min_lr=min(c.min_lr, lr),
                )
                for group in optimizer.param_groups:
                    group["lr"] = now * group["lr_scale"]
                optimizer.zero_grad(set_to_none=True)
                for part in parts:
                    loss = self._loss(model, part["image"], task.train_labels[part["index"]], mix, task.device)
                    (loss * len(part["image"]) / len(batch)).backward()
                optimizer.step()

    def _mix(self, classes: int) -> Mixup | None:
        c = self.config
        if not c.mixup and not c.cutmix:
            return None
        return Mixup(c.mixup, c.cutmix, label_smoothing=c.label_smoothing, num_classes=classes)

    def _loss(
        self, model: Classifier, images: Tensor, labels: Tensor, mix: Mixup | None, device: torch.device
    ) -> Tensor:
        images, labels = images.to(device), labels.to(device)
        mixed = mix is not None and len(images) > 1
        if mixed:
            if len(images) % 2:  # timm pairs the first with the last; the one in the middle has no partner
                images, labels = images[:-1], labels[:-1]
            images, labels = mix(images, labels)  # type: ignore[misc]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
            logits = model(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=0.0 if mixed else self.config.label_smoothing)


def set_drop_path(encoder: nn.Module, rate: float) -> None:
    """Stochastic depth in the blocks of ``encoder``, from 0 in the first to ``rate`` in the last.

    Raises:
        InputError: A rate above 0 for a network without timm's blocks.
    """
    blocks = getattr(transformer_of(encoder), "blocks", ())
    if rate and not all(hasattr(block, "drop_path1") and hasattr(block, "drop_path2") for block in blocks or [None]):
        raise InputError(f"drop_path = {rate}: {type(encoder).__name__} has no blocks that can be dropped; set it to 0")
    for i, block in enumerate(blocks):
        if hasattr(block, "drop_path1"):
            own = rate * i / max(1, len(blocks) - 1)
            block.drop_path1 = DropPath(own) if own else nn.Identity()
            block.drop_path2 = DropPath(own) if own else nn.Identity()


def mae_large_finetune() -> dict[str, Any]:
    """MAE, ViT-L: 50 epochs."""
    return {"base_lr": 1e-3, "epochs": 50, "layer_decay": 0.75, "drop_path": 0.2}


def mae_huge_finetune() -> dict[str, Any]:
    """MAE, ViT-H: as ViT-L with more stochastic depth."""
    return mae_large_finetune() | {"drop_path": 0.3}


def beit_finetune() -> dict[str, Any]:
    """BEiT and mc-BEiT, ViT-B: 4e-3 at batch 1024, 20 epochs of warm-up."""
    return {"base_lr": 1e-3, "epochs": 100, "warmup_epochs": 20}


def saim_finetune() -> dict[str, Any]:
    """SAIM, ViT-B: the class token, 20 epochs of warm-up."""
    return {"features": "class", "epochs": 100, "warmup_epochs": 20}
