"""UniVIP: two crops that share objects, the objects tied to their scene, and objects matched by optimal transport.

Li, Zhu, Yang, Chen, Cai, Dai, Tan, Zhao, Wang, Wang: UniVIP: A Unified Framework for Self-Supervised Visual
Pre-training, CVPR 2022 (arXiv 2203.06965). Built on BYOL (Grill et al., NeurIPS 2020, arXiv 2006.07733), which is what
remains without its terms.

B batch, K instances (objects) per picture, D width of the vectors that are compared; M rows and N columns of a plan.
Online network f: backbone, projector, predictor. Target network g: moving average of backbone and projector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from bowerbird import dist
from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.errors import InputError
from bowerbird.protocols import BuildContext, Encoder, ItemTransform, LossOutput, Objective
from bowerbird_mim.boxes import ScenePair, filter_proposals, sample_overlapping_scenes
from bowerbird_mim.ema import EMATeacher
from bowerbird_mim.precision import at_least_float32
from bowerbird_mim.proposals import (
    GridProposals,
    ItemProposals,
    ProposalSource,
    RandomProposals,
    SelectiveSearch,
    check_proposals,
)
from bowerbird_mim.schedules import Schedule, cosine_schedule
from bowerbird_mim.transport import broadcastable, check_entropy, sinkhorn
from bowerbird_mim.views import ColorAugmentation, View, resized

__all__ = [
    "TERMS", "GridProposals", "ProposalSource", "RandomProposals", "ScenePair", "SelectiveSearch", "UniVIP",
    "UniVIPConfig", "UniVIPObjective", "UniVIPOutput", "affinity_loss", "byol_head", "cross_reference_weights",
    "filter_proposals", "instance_transport_loss", "sample_overlapping_scenes", "scene_loss", "sinkhorn",
]  # fmt: skip

Term = Literal["scene", "affinity", "instance"]
TERMS: tuple[Term, ...] = ("scene", "affinity", "instance")


# ------------------------------------------------------------------------------------------------ transport


def cross_reference_weights(instances: Tensor, other_scene_mean: Tensor) -> Tensor:
    """Masses ``(..., K)`` of instances: their agreement with the scene of the other network, with sum 1.

    Dot products of the vectors as they are, clipped at 0, divided by their sum; 1 / K where all are 0.

    Args:
        instances: ``(..., K, D)``.
        other_scene_mean: ``(..., D)``, mean of the other network's vectors of both scenes.

    Raises:
        InputError: Shapes that do not fit.
    """
    fits = instances.ndim >= 2 and other_scene_mean.ndim >= 1 and instances.shape[-2] > 0
    if (
        not fits
        or instances.shape[-1] != other_scene_mean.shape[-1]
        or not broadcastable(instances.shape[:-2], other_scene_mean.shape[:-1])
    ):
        raise InputError(
            f"instances {tuple(instances.shape)} and other_scene_mean {tuple(other_scene_mean.shape)} do not fit: "
            "expected (..., K, D) with K of at least 1, and (..., D)"
        )
    agreement = (at_least_float32(instances) * at_least_float32(other_scene_mean)[..., None, :]).sum(dim=-1)
    agreement = agreement.clamp(min=0)
    total = agreement.sum(dim=-1, keepdim=True)
    uniform = torch.full_like(agreement, 1 / agreement.shape[-1])
    return torch.where(total > 0, agreement / torch.where(total > 0, total, 1.0), uniform)


def instance_transport_loss(
    online: Tensor,
    target: Tensor,
    online_scenes: Sequence[Tensor] | Tensor,
    target_scenes: Sequence[Tensor] | Tensor,
    epsilon: float = 0.1,
    iterations: int = 50,
) -> tuple[Tensor, Tensor]:
    """Minus the cosine of instances, weighted by the plan that transports online to target instances.

    Only ``online`` gets a gradient, and only through the cosines: masses and plan are constants.

    Args:
        online, target: ``(..., K, D)``, vectors of the instances.
        online_scenes, target_scenes: Vectors of the two scenes: two tensors ``(..., D)``, or one ``(..., 2, D)``.
        epsilon, iterations: See ``sinkhorn``.

    Returns:
        The loss, a scalar in [-1, 1] (the mean over pictures), and the plan ``(..., K, K)``: rows are online instances.

    Raises:
        InputError: Shapes that do not fit.
    """
    if online.shape != target.shape or online.ndim < 2:
        raise InputError(
            f"online {tuple(online.shape)} and target {tuple(target.shape)} do not fit: expected (..., K, D) twice"
        )
    cosines = cosine_matrix(online, target.detach())
    plan = _transport_plan(cosines, online, target, online_scenes, target_scenes, epsilon, iterations)
    return -(cosines * plan).sum(dim=(-2, -1)).mean(), plan


@torch.compiler.disable  # hundreds of tiny operations: a compiler needs minutes for them and gains nothing
@torch.no_grad()
def _transport_plan(
    cosines: Tensor,
    online: Tensor,
    target: Tensor,
    online_scenes: Sequence[Tensor] | Tensor,
    target_scenes: Sequence[Tensor] | Tensor,
    epsilon: float,
    iterations: int,
) -> Tensor:
    rows = cross_reference_weights(online, _mean_scene("target_scenes", target_scenes, online))
    columns = cross_reference_weights(target, _mean_scene("online_scenes", online_scenes, online))
    return sinkhorn(1 - cosines, rows, columns, epsilon, iterations)


def _mean_scene(name: str, scenes: Sequence[Tensor] | Tensor, instances: Tensor) -> Tensor:
    expected = (*instances.shape[:-2], instances.shape[-1])
    if not isinstance(scenes, Tensor):
        shapes = [tuple(scene.shape) for scene in scenes]
        if not shapes or set(shapes) != {expected}:
            raise InputError(f"{name} have shapes {shapes}; expected {expected} each")
        return torch.stack([at_least_float32(scene) for scene in scenes]).mean(dim=0)
    if scenes.ndim != len(expected) + 1 or (*scenes.shape[:-2], scenes.shape[-1]) != expected:
        raise InputError(
            f"{name} has shape {tuple(scenes.shape)}; expected {(*expected[:-1], 2, expected[-1])}, or two tensors "
            f"{expected}"
        )
    return at_least_float32(scenes).mean(dim=-2)


def cosine_matrix(first: Tensor, second: Tensor) -> Tensor:
    """``(..., M, D)`` and ``(..., N, D)`` to the cosines ``(..., M, N)``, in float32 also under autocast."""
    first, second = (F.normalize(at_least_float32(x), dim=-1) for x in (first, second))
    return (first[..., :, None, :] * second[..., None, :, :]).sum(dim=-1)  # autocast would round a matrix product


# ------------------------------------------------------------------------------------------------ other losses


def scene_loss(pred_1: Tensor, pred_2: Tensor, target_1: Tensor, target_2: Tensor) -> Tensor:
    """BYOL's loss as minus cosines: each online vector ``(B, D)`` predicts the other crop's target; in [-2, 2].

    BYOL's code has 2 - 2 cos per pair: the same minimum, twice the gradient.
    """
    return -(_cosine(pred_1, target_2) + _cosine(pred_2, target_1)).mean()


def affinity_loss(embedding: Tensor, target_1: Tensor, target_2: Tensor) -> Tensor:
    """Minus the cosines of the instances' common vector ``(B, D)`` with both scenes' targets; in [-2, 2]."""
    return -(_cosine(embedding, target_1) + _cosine(embedding, target_2)).mean()


def _cosine(online: Tensor, target: Tensor) -> Tensor:
    if online.shape != target.shape:
        raise InputError(f"vectors have shapes {tuple(online.shape)} and {tuple(target.shape)}; expected equal ones")
    online, target = at_least_float32(online), at_least_float32(target.detach())
    return (F.normalize(online, dim=-1) * F.normalize(target, dim=-1)).sum(dim=-1)


# ------------------------------------------------------------------------------------------------ model


def byol_head(in_dim: int, hidden_dim: int = 4096, out_dim: int = 256) -> nn.Sequential:
    """Projector and predictor of BYOL: linear (without bias), batch norm, ReLU, linear."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, out_dim),
    )


class Projected(nn.Module):
    """A backbone and its projector: what the target network is made of."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))


@dataclass(frozen=True)
class UniVIPOutput:
    """``loss``: scalar; ``parts``: its terms by name; ``plan``: ``(B, K, K)``, online by target instances, or None."""

    loss: Tensor
    parts: Mapping[str, Tensor]
    plan: Tensor | None


class UniVIP(nn.Module):
    """Online and target network, and the sum of the chosen terms.

    - ``scene``: each scene predicts the target of the other (BYOL).
    - ``affinity``: one linear map of all K instances' vectors, in their order, predicts both scenes' targets.
    - ``instance``: each instance predicts its target and, by the transport plan, those of similar instances.

    Without terms, or with no instances, it is BYOL. Scenes and instances are encoded apart, so that each has its own
    batch statistics; the target network normalises by its own batches.

    Args:
        backbone: Pictures ``(B, 3, H, W)`` to features ``(B, F)``.
        projector: ``(B, F)`` to ``(B, D)``.
        predictor: ``(B, D)`` to ``(B, D)``; its last linear layer tells D.
        num_instances: K.
        terms: Some of ``TERMS``.
        momentum: Of the target network at every step.
        epsilon, iterations: Of the transport.

    Raises:
        InputError: An unknown term, K < 0, or an ``epsilon`` or ``iterations`` that ``sinkhorn`` refuses.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
        num_instances: int = 4,
        terms: Sequence[str] = TERMS,
        *,
        momentum: Schedule = 0.99,
        epsilon: float = 0.1,
        iterations: int = 50,
    ) -> None:
        super().__init__()
        if unknown := [term for term in terms if term not in TERMS]:
            raise InputError(f"terms has {unknown}; expected some of {', '.join(TERMS)}")
        if num_instances < 0:
            raise InputError(f"num_instances = {num_instances}: expected 0 or more")
        check_entropy(epsilon, iterations)
        chosen = [term for term in terms if num_instances or term == "scene"]
        self.num_instances, self.terms = num_instances, tuple(chosen or ["scene"])
        self.epsilon, self.iterations = epsilon, iterations
        self.online, self.predictor = Projected(backbone, projector), predictor
        if "affinity" in self.terms:
            dim = _last_width(predictor)
            self.instance_linear = nn.Linear(num_instances * dim, dim)  # of the online side only
        self.target = EMATeacher(self.online, momentum).train()

    def forward(self, scene_1: Tensor, scene_2: Tensor, instances: Tensor | None = None) -> UniVIPOutput:
        """The loss of a batch.

        Args:
            scene_1, scene_2: ``(B, 3, H, W)``.
            instances: ``(B, K, 3, h, w)``; ``None`` where no term compares instances.

        Raises:
            InputError: Instances are missing, or of another number.
        """
        targets: tuple[Tensor, Tensor] = (self.target(scene_1), self.target(scene_2))
        preds: tuple[Tensor, ...] = ()
        if set(self.terms) != {"affinity"}:
            preds = tuple(self.predictor(self.online(scene)) for scene in (scene_1, scene_2))
        parts: dict[str, Tensor] = {}
        plan = None
        if "scene" in self.terms:
            parts["scene"] = scene_loss(preds[0], preds[1], *targets)
        if set(self.terms) - {"scene"}:
            crops = self._checked(instances, len(scene_1))
            shape = (len(scene_1), self.num_instances, -1)
            online = self.predictor(self.online(crops))  # (B * K, D)
            if "affinity" in self.terms:
                parts["affinity"] = affinity_loss(self.instance_linear(online.reshape(len(scene_1), -1)), *targets)
            if "instance" in self.terms:
                target = self.target(crops)
                parts["instance"], plan = instance_transport_loss(
                    online.reshape(shape), target.reshape(shape), preds, targets, self.epsilon, self.iterations
                )
        return UniVIPOutput(loss=torch.stack(list(parts.values())).sum(), parts=parts, plan=plan)

    def _checked(self, instances: Tensor | None, batch: int) -> Tensor:
        """``(B * K, 3, h, w)``."""
        if instances is None or instances.ndim != 5 or instances.shape[:2] != (batch, self.num_instances):
            found = None if instances is None else tuple(instances.shape)
            raise InputError(
                f"instances: found {found}; the terms {', '.join(self.terms)} need ({batch}, {self.num_instances}, 3, "
                "height, width), num_instances crops of every picture"
            )
        return instances.flatten(0, 1)

    def update_target(self, step: int) -> None:
        """Move the target network; call it after the optimiser of step ``step`` has moved."""
        self.target.update(self.online, step)


def _last_width(module: nn.Module) -> int:
    widths = [part.out_features for part in module.modules() if isinstance(part, nn.Linear)]
    if not widths:
        raise InputError(f"predictor ({type(module).__name__}) has no linear layer that tells the width of its output")
    return widths[-1]


# ------------------------------------------------------------------------------------------------ views

Range = Annotated[tuple[float, float], Field(strict=False)]


class UniVIPConfig(BaseModel):
    """Settings of ``mim:univip``. ``terms = []`` is BYOL on any two crops."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    terms: Annotated[tuple[Term, ...], Field(strict=False)] = Field(
        default=TERMS, description="Of the loss: scene, affinity (scene and its instances), instance. None: BYOL."
    )
    proposals: str = Field(
        default="random",
        description="Where objects may be: random, grid, boxes (the items' own), selective-search, or an .npz file "
        "written by `python -m bowerbird_mim.proposals`.",
    )
    num_instances: int = Field(default=4, ge=0, description="Boxes that both crops of a picture share.")
    instance_size: int = Field(default=96, ge=1, description="Side of an instance's crop in pixels.")
    min_side: int = Field(default=64, ge=1, description="Smallest side of a box in pixels of the picture.")
    max_aspect: float = Field(default=3.0, ge=1, description="Largest ratio of a box's sides.")
    max_iou: float = Field(default=0.5, gt=0, le=1, description="Boxes of a picture overlap less than this.")
    tries: int = Field(default=20, ge=1, description="Pairs of crops that are tried for one with enough boxes.")
    crop_scale: Range = Field(default=(0.08, 1.0), description="Range of a crop's share of the picture.")
    hidden_dim: int = Field(default=4096, ge=1, description="Hidden width of projector and predictor.")
    out_dim: int = Field(default=256, ge=1, description="Width of the vectors that are compared.")
    momentum: float = Field(default=0.99, ge=0, le=1, description="Of the target network; grows to 1 by a cosine.")
    epsilon: float = Field(default=0.1, gt=0, description="Entropy of the transport.")
    iterations: int = Field(default=50, ge=1, description="Sinkhorn iterations.")
    jitter: Annotated[tuple[float, float, float, float], Field(strict=False)] = Field(
        default=(0.4, 0.4, 0.2, 0.1), description="Largest change of brightness, contrast, saturation, hue."
    )
    jitter_prob: float = Field(default=0.8, ge=0, le=1)
    grey_prob: float = Field(default=0.2, ge=0, le=1)
    blur_prob: Range = Field(default=(1.0, 0.1), description="Of the first crop (and instances), of the second.")
    blur_radius: Range = Field(default=(0.1, 2.0), description="Range of the blur's radius in pixels.")
    solarize_prob: Range = Field(default=(0.0, 0.2), description="Of the first crop (and instances), of the second.")
    flip_prob: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _proposals_are_known(self) -> Self:
        try:
            check_proposals(self.proposals)
        except InputError as error:
            raise ValueError(str(error)) from error
        return self

    def colors(self) -> tuple[ColorAugmentation, ColorAugmentation]:
        """Of the first and of the second crop."""
        first, second = (
            ColorAugmentation(
                jitter=self.jitter,
                jitter_prob=self.jitter_prob,
                grey_prob=self.grey_prob,
                blur_prob=blur,
                blur_radius=self.blur_radius,
                solarize_prob=solarize,
            )
            for blur, solarize in zip(self.blur_prob, self.solarize_prob, strict=True)
        )
        return first, second


def byol() -> dict[str, Any]:
    """BYOL: two free crops, no instances."""
    return {"terms": []}


class SceneViews:
    """Entries ``scene_views`` ``(2, 3, H, W)`` and, where a term needs them, ``instance_views`` ``(K, 3, h, w)``.

    Instances are cut out of the picture itself and augmented as the first scene.
    """

    def __init__(self, preprocessing: Preprocessing, config: UniVIPConfig) -> None:
        self.config = config
        self.overlapping = bool(config.terms) and config.num_instances > 0
        self.with_instances = self.overlapping and set(config.terms) != {"scene"}
        limits: Any = {name: getattr(config, name) for name in ("min_side", "max_aspect", "max_iou")}
        self.limits = limits
        self.proposals = ItemProposals(config.proposals, **limits) if self.overlapping else None
        self.scenes = [
            View(preprocessing=preprocessing, scale=config.crop_scale, flip_prob=config.flip_prob, color=color)
            for color in config.colors()
        ]
        small = resized(preprocessing, config.instance_size)
        self.instances = View(preprocessing=small, flip_prob=config.flip_prob, color=config.colors()[0])

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        image = item["image"]
        if self.proposals is None:
            return {"scene_views": np.stack([view(image, generator) for view in self.scenes])}
        pair = sample_overlapping_scenes(
            image.size,
            self.proposals(item),
            self.config.num_instances,
            self.config.tries,
            generator,
            scale=self.config.crop_scale,
            **self.limits,
        )
        crops = zip(self.scenes, (pair.crop1, pair.crop2), strict=True)
        views = {"scene_views": np.stack([view.of_box(image, crop, generator) for view, crop in crops])}
        if self.with_instances:
            cut = [self.instances.of_box(image, tuple(box), generator) for box in pair.boxes.tolist()]
            views["instance_views"] = np.stack(cut)
        return views


# ------------------------------------------------------------------------------------------------ objective


class Pooled(nn.Module):
    """An encoder of the hook as a backbone: pictures to ``Features.pooled``."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder({"image": images}).pooled


class UniVIPObjective(Objective):
    """``mim:univip`` on any encoder of pictures. The online encoder is exported; heads and target are thrown away."""

    def __init__(self, model: UniVIP, config: UniVIPConfig, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model, self.views = model, SceneViews(preprocessing, config)

    @property
    def encoder(self) -> Encoder:  # type: ignore[override]  # one owner: a second one would store it twice
        backbone = self.model.online.backbone
        assert isinstance(backbone, Pooled)
        return backbone.encoder

    @classmethod
    def build(cls, config: UniVIPConfig, encoder: Encoder, context: BuildContext) -> Self:
        preprocessing = encoder.preprocessing
        if preprocessing is None:
            raise InputError(f"mim:univip crops pictures; the encoder {type(encoder).__name__} does not take pictures")
        model = UniVIP(
            Pooled(encoder),
            byol_head(encoder.embed_dim, config.hidden_dim, config.out_dim),
            byol_head(config.out_dim, config.hidden_dim, config.out_dim),
            config.num_instances,
            config.terms,
            momentum=cosine_schedule(config.momentum, 1.0, max(1, context.total_steps)),
            epsilon=config.epsilon,
            iterations=config.iterations,
        )
        objective = cls(model, config, preprocessing)
        if objective.views.with_instances:
            _try_size(encoder, config.instance_size)
        on_gpu = any(parameter.is_cuda for parameter in encoder.parameters())
        if dist.is_distributed() and on_gpu:  # statistics of the joined batch; torch can do it on GPUs only
            objective.model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return objective

    def item_transform(self) -> ItemTransform:
        return self.views

    def forward(self, batch: Batch) -> LossOutput:
        scenes = batch["scene_views"]
        output = self.model(scenes[:, 0], scenes[:, 1], batch["instance_views"] if self.views.with_instances else None)
        stats: dict[str, Tensor] = {}
        if output.plan is not None:
            nearest = output.plan.argmax(dim=-1)
            stats["matching"] = (nearest == torch.arange(nearest.shape[-1], device=nearest.device)).float().mean()
        return LossOutput(total=output.loss, parts=output.parts, stats=stats)

    def after_step(self, step: int) -> None:
        self.model.update_target(step)


def _try_size(encoder: Encoder, side: int) -> None:
    """Raises ``InputError`` where ``encoder`` cannot encode square pictures of ``side``."""
    training, weights = encoder.training, next(encoder.parameters())
    encoder.eval()
    try:
        with torch.no_grad():
            encoder({"image": weights.new_zeros(1, 3, side, side)})
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"instance_size = {side}: the encoder {type(encoder).__name__} cannot encode pictures of {side} x {side} "
            f"pixels ({error})"
        ) from error
    finally:
        encoder.train(training)
