"""PASS: DINO in which small crops of a body zone are also compared with what a token of that zone says of the whole.

Zhu, Guo, Yan et al.: PASS: Part-Aware Self-Supervised Pre-Training for Person Re-Identification, ECCV 2022
(arXiv 2203.03931). Numbers are those of the official code (CASIA-IVA-Lab/PASS-reID, Apache-2.0), but that positions are
used untouched at the native size (see ``PartTokenViT``). Without parts it is DINO.

B batch, D width, K outputs of a head, J parts, n crops of every part's area. Branches are called ``cls``, ``pt1`` ...
``ptJ``. Rows lie crop by crop, as in DINO: both global views, then the n crops of area 1, of area 2, ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.errors import InputError
from bowerbird.protocols import BuildContext, Encoder, LossOutput
from bowerbird_mim.crops import DINO_COLORS, MultiCrop
from bowerbird_mim.dino import DINOConfig, DINOObjective, Range, without_dropout
from bowerbird_mim.distillation import (
    GLOBAL_VIEWS,
    ProjectionHead,
    SelfDistillationLoss,
    check_views,
    clip_gradients_per_tensor,
    crop_major,
)
from bowerbird_mim.ema import EMATeacher
from bowerbird_mim.part_vit import PartTokenViT, PartViTEncoder, fuse_part_features, part_vit_of
from bowerbird_mim.patches import patch_grid
from bowerbird_mim.reid import batch_hard_triplet, evaluate_reid
from bowerbird_mim.schedules import Schedule, cosine_schedule, linear_then_constant
from bowerbird_mim.views import ColorAugmentation
from bowerbird_mim.vit import ImageSize, image_sides

__all__ = [
    "PartAwareLoss", "PartAwareNetwork", "PartMultiCrop", "PartSelfDistillation", "PartTokenViT", "PassConfig",
    "PassObjective", "PassOutput", "batch_hard_triplet", "evaluate_reid", "fuse_part_features", "part_areas",
]  # fmt: skip


def branch_names(num_parts: int) -> list[str]:
    """``["cls", "pt1", ..., "ptJ"]``."""
    return ["cls", *(f"pt{part}" for part in range(1, num_parts + 1))]


# ------------------------------------------------------------------------------------------------ crops


def part_areas(height: int, num_parts: int = 3, fraction: float = 0.5) -> list[tuple[int, int]]:
    """(top, height) in whole pixels of every part's area of a picture; an area has the whole width.

    Every area is ``int(fraction * height)`` high; tops are spaced evenly from 0 to ``int((1 - fraction) * height)``.
    Three halves are the official areas; other numbers of parts are our generalisation.

    Raises:
        InputError: No part, a fraction outside (0, 1], or a picture so low that an area has no row.
    """
    if num_parts < 1 or not 0 < fraction <= 1:
        raise InputError(
            f"num_parts = {num_parts}, fraction = {fraction}: expected at least one part, 0 < fraction <= 1"
        )
    high = int(fraction * height)
    if high < 1:
        raise InputError(f"height = {height}: {fraction} of it is no whole row of pixels")
    spaces = max(1, num_parts - 1)
    return [(int((1 - fraction) * part / spaces * height), high) for part in range(num_parts)]


class PartMultiCrop(MultiCrop):
    """Two large crops of the picture and n small ones of every part's area, areas from top to bottom.

    Entries ``global_views (2, 3, H, W)`` and ``local_views (J * n, 3, h, w)``; flips come last, so that left and right
    mean nothing.

    Args:
        global_size, local_size: Side in pixels, or (height, width), of the two kinds of crops.
        num_parts: J. With 0 the n small crops are of the whole picture, as in DINO.
        locals_per_part: n; with 0 there is no entry ``local_views``.
        fraction: Height of an area as a share of the picture's (``part_areas``).
        global_ratio: Range of width over height of a large crop in the picture. The default is the authors'; of a
            picture twice as high as wide such a crop shows about half.
        preprocessing, global_scale, local_scale, flip_prob, colors: As in ``MultiCrop``; ``local_scale`` is a share of
            the area.

    Raises:
        InputError: Negative numbers, a fraction outside (0, 1], or scales that are no shares.
    """

    def __init__(
        self,
        global_size: ImageSize = (256, 128),
        local_size: ImageSize = (128, 64),
        num_parts: int = 3,
        locals_per_part: int = 3,
        *,
        fraction: float = 0.5,
        preprocessing: Preprocessing | None = None,
        global_scale: tuple[float, float] = (0.4, 1.0),
        global_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        local_scale: tuple[float, float] = (0.1, 0.8),
        flip_prob: float = 0.5,
        colors: Sequence[ColorAugmentation | None] = DINO_COLORS,
    ) -> None:
        if num_parts < 0 or locals_per_part < 0 or not 0 < fraction <= 1:
            raise InputError(
                f"num_parts = {num_parts}, locals_per_part = {locals_per_part}, fraction = {fraction}: expected 0 or "
                "more parts and crops of each, and 0 < fraction <= 1"
            )
        super().__init__(
            global_size,
            local_size,
            max(1, num_parts) * locals_per_part,
            preprocessing=preprocessing,
            global_scale=global_scale,
            local_scale=local_scale,
            flip_prob=flip_prob,
            colors=colors,
        )
        if not 0 < global_ratio[0] <= global_ratio[1]:
            raise InputError(f"global_ratio = {list(global_ratio)}: expected 0 < low <= high")
        self.global_views = [replace(view, ratio=global_ratio) for view in self.global_views]
        self.num_parts, self.locals_per_part, self.fraction = num_parts, locals_per_part, fraction

    def crops(self, image: Image.Image, generator: np.random.Generator) -> dict[str, NDArray[np.float32]]:
        if not self.num_parts or not self.n_local:
            return super().crops(image, generator)
        views = {"global_views": np.stack([view(image, generator) for view in self.global_views])}
        areas = part_areas(image.height, self.num_parts, self.fraction)
        strips = [image.crop((0, top, image.width, top + height)) for top, height in areas]
        views["local_views"] = np.stack(
            [self.local_view(strip, generator) for strip in strips for _ in range(self.locals_per_part)]
        )
        return views


# ------------------------------------------------------------------------------------------------ loss


class PartAwareLoss(nn.Module):
    """DINO's loss of the class branch over all views, and of every part's branch over its own views.

    A branch with v views has ``2 v - 2`` terms; the loss is the mean over the terms of all branches. With three parts
    and three crops of each, class: 20 terms, every part: 8. Every branch has its own centre
    (``losses.pt1.center``); other arguments as in ``SelfDistillationLoss``.

    Args:
        out_dim: K.
        num_parts: J; with 0 it is DINO's loss.
        student_temp, teacher_temp_schedule, center_momentum, defer_center: As in ``SelfDistillationLoss``.

    Raises:
        InputError: ``num_parts`` is negative, or other values out of range.
    """

    def __init__(
        self,
        out_dim: int,
        num_parts: int = 3,
        student_temp: float = 0.1,
        teacher_temp_schedule: Schedule = 0.04,
        center_momentum: float = 0.9,
        *,
        defer_center: bool = False,
    ) -> None:
        super().__init__()
        if num_parts < 0:
            raise InputError(f"num_parts = {num_parts}: expected 0 or more")
        self.losses = nn.ModuleDict(
            {
                name: SelfDistillationLoss(
                    out_dim, student_temp, teacher_temp_schedule, center_momentum, defer_center=defer_center
                )
                for name in branch_names(num_parts)
            }
        )

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], step: int | None = None) -> Tensor:
        """The mean over all terms: a scalar.

        Args:
            student: Logits of every branch, crop by crop: ``cls`` ``((2 + J n) * B, K)`` of all views, ``ptj``
                ``((2 + n) * B, K)`` of the two global views and the crops of area j.
            teacher: Logits ``(2 * B, K)`` of the global views for every branch.
            step: Where the schedule of the temperature is read; by default as ``at_step`` left it.

        Raises:
            InputError: A branch is missing or unknown, or shapes do not fit.
        """
        return torch.stack(list(self.shares(student, teacher, step).values())).sum()

    def shares(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], step: int | None = None
    ) -> dict[str, Tensor]:
        """What every branch adds to the loss; arguments and errors as ``forward``."""
        for who, outputs in (("student", student), ("teacher", teacher)):
            if outputs.keys() != self.losses.keys():
                raise InputError(f"{who} has the branches {list(outputs)}; expected {list(self.losses)}")
        # The mean of a branch times its number of terms: rows / batch views, of which the same one is left out twice.
        means = {name: loss(student[name], teacher[name], step) for name, loss in self.losses.items()}
        terms = {
            name: GLOBAL_VIEWS * (GLOBAL_VIEWS * len(student[name]) // len(teacher[name])) - GLOBAL_VIEWS
            for name in means
        }
        total = sum(terms.values())
        return {name: mean * (terms[name] / total) for name, mean in means.items()}

    def at_step(self, step: int) -> None:
        """Set the teacher's temperature of ``step``, and forget outputs that no update has used."""
        for loss in self._each():
            loss.at_step(step)

    def update_center(self) -> None:
        """Move every centre towards the mean of the outputs seen since the last update, over all processes."""
        for loss in self._each():
            loss.update_center()

    def entropies(self, teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Signs of collapse of the class branch, and the least entropy of the mean target among the parts."""
        found = {name: loss.entropies(teacher[name]) for name, loss in zip(self.losses, self._each(), strict=True)}
        parts = [values["mean_entropy"] for name, values in found.items() if name != "cls"]
        return found["cls"] | ({"part_mean_entropy": torch.stack(parts).min()} if parts else {})

    def _each(self) -> list[SelfDistillationLoss]:
        return list(self.losses.values())  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ model


class PartAwareNetwork(nn.Module):
    """Backbone and one head for every branch, which student and teacher share.

    Args:
        backbone: The encoder with part tokens.
        heads: ``cls``, ``pt1`` ... ``ptJ``. The class head sees every view; head j sees part token j of global views
            and of the crops of area j.
    """

    def __init__(self, backbone: PartViTEncoder, heads: Mapping[str, ProjectionHead]) -> None:
        super().__init__()
        expected = branch_names(backbone.vit.num_parts)
        if list(heads) != expected:
            raise InputError(f"heads are called {list(heads)}; this encoder needs {expected}")
        self.backbone, self.heads = backbone, nn.ModuleDict(heads)

    def forward(self, large: Tensor, small: Tensor | None = None) -> dict[str, Tensor]:
        """Logits of every branch, as ``PartAwareLoss`` reads them.

        Args:
            large: ``(2 * B, C, H, W)`` whole pictures.
            small: ``(J * n * B, C, h, w)`` crops, area by area; without parts, crops of the whole.

        Raises:
            InputError: The crops cannot be shared among the areas.
        """
        vit = self.backbone.vit
        parts = vit.num_parts
        cls, tokens = vit(large)
        of_class, of_part = [cls], [[tokens[:, part]] for part in range(parts)]
        if small is not None:
            each, rest = divmod(len(small), max(1, parts))
            if rest:
                raise InputError(f"{len(small)} small crops cannot be shared among {parts} areas")
            areas = torch.arange(parts, device=small.device).repeat_interleave(each) if parts else None
            cls, tokens = vit(small, areas)
            of_class.append(cls)
            for part in range(parts):
                of_part[part].append(tokens[part * each : (part + 1) * each, 0])
        inputs = [torch.cat(rows) for rows in (of_class, *of_part)]
        return {name: head(rows) for (name, head), rows in zip(self.heads.items(), inputs, strict=True)}


@dataclass(frozen=True)
class PassOutput:
    """``loss``: scalar; ``shares``: what every branch adds to it; ``teacher``: its logits by branch, ``(2 * B, K)``."""

    loss: Tensor
    shares: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]


class PartSelfDistillation(nn.Module):
    """Student, teacher and loss. The teacher sees the global views only, with all part tokens.

    Args:
        student: Backbone and heads; the teacher is a copy without stochastic depth and dropout.
        loss: Its centres follow the teacher's outputs.
        momentum_schedule: Of the teacher, at every optimiser step.
    """

    def __init__(self, student: PartAwareNetwork, loss: PartAwareLoss, momentum_schedule: Schedule = 0.996) -> None:
        super().__init__()
        self.student, self.loss = student, loss
        self.teacher = EMATeacher(student, momentum_schedule)
        without_dropout(self.teacher)

    @property
    def teacher_network(self) -> PartAwareNetwork:
        assert isinstance(self.teacher.module, PartAwareNetwork)
        return self.teacher.module

    def forward(self, global_views: Tensor, local_views: Tensor | None = None) -> PassOutput:
        """The loss of ``global_views (B, 2, C, H, W)`` and ``local_views (B, J * n, C, h, w)``.

        Raises:
            InputError: Shapes that do not fit.
        """
        check_views(global_views, "global_views", count=GLOBAL_VIEWS)
        large, small = crop_major(global_views), None
        if local_views is not None:
            check_views(local_views, "local_views", batch=len(global_views))
            small = crop_major(local_views)
        teacher = self.teacher(large)
        shares = self.loss.shares(self.student(large, small), teacher)
        return PassOutput(loss=torch.stack(list(shares.values())).sum(), shares=shares, teacher=teacher)


# ------------------------------------------------------------------------------------------------ objective


class PassConfig(DINOConfig):
    """Settings of ``mim:pass``: those of ``mim:dino``, with crops of every part's area. Parts are the encoder's."""

    local_size: ImageSize = Field(  # type: ignore[assignment]
        default=(128, 64), description="[height, width] of small crops in pixels; large ones: the encoder's."
    )
    local_crops: int = Field(default=3, ge=0, description="Small crops of every part's area.")
    local_scale: Range = Field(default=(0.1, 0.8), description="Range of a small crop's share of the area.")
    global_ratio: Range = Field(
        default=(3 / 4, 4 / 3),
        description="Range of width over height of a large crop; for the whole of high pictures: lower.",
    )
    area: float = Field(default=0.5, gt=0, le=1, description="Height of a part's area, as a share of the picture's.")

    @model_validator(mode="before")
    @classmethod
    def _local_size_is_a_pair(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("local_size"), list):
            values = {**values, "local_size": tuple(values["local_size"])}
        return values

    def crops(self, encoder: Encoder) -> PartMultiCrop:
        plain = super().crops(encoder)
        prepared = plain.global_views[0].preprocessing
        return PartMultiCrop(
            (prepared.height, prepared.width),
            self.local_size,
            part_vit_of(encoder, "mim:pass").vit.num_parts,
            self.local_crops,
            fraction=self.area,
            preprocessing=prepared,
            global_scale=self.global_scale,
            global_ratio=self.global_ratio,
            local_scale=self.local_scale,
            flip_prob=self.flip_prob,
            colors=[view.color for view in (*plain.global_views, plain.local_view)],
        )


class PassObjective(DINOObjective):
    """``mim:pass``. Heads and student are thrown away; the exported encoder is the teacher's backbone."""

    config: PassConfig

    @property
    def dino(self) -> PartSelfDistillation:  # type: ignore[override]
        assert isinstance(self.model, PartSelfDistillation)
        return self.model

    @classmethod
    def build(cls, config: PassConfig, encoder: Encoder, context: BuildContext) -> Self:  # type: ignore[override]
        """Raises ``InputError`` for an encoder without part tokens, or small crops that its patches do not divide."""
        backbone = part_vit_of(encoder, "mim:pass")
        if config.local_crops:
            patch_grid(*image_sides(config.local_size), backbone.vit.patch_size)
        parts, width = backbone.vit.num_parts, backbone.vit.embed_dim
        heads = {
            name: ProjectionHead(
                width,
                config.out_dim,
                config.head_hidden,
                config.head_bottleneck,
                config.head_layers,
                config.norm_last_layer,
            )
            for name in branch_names(parts)
        }
        temperatures = linear_then_constant(
            config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_epochs
        )
        loss = PartAwareLoss(
            config.out_dim, parts, config.student_temp, temperatures, config.center_momentum, defer_center=True
        )
        momentum = cosine_schedule(config.momentum_teacher, 1.0, context.total_steps)
        return cls(PartSelfDistillation(PartAwareNetwork(backbone, heads), loss, momentum), config)

    def forward(self, batch: Batch) -> LossOutput:
        output = self.dino(batch["global_views"], batch["local_views"] if self.config.local_crops else None)
        parts = [share for name, share in output.shares.items() if name != "cls"]
        named = {"class": output.shares["cls"], "parts": torch.stack(parts).sum()} if parts else {}
        return LossOutput(total=output.loss, parts=named, stats=self.dino.loss.entropies(output.teacher))

    def before_update(self, step: int) -> None:
        if self.config.clip_grad is not None:
            clip_gradients_per_tensor(self, self.config.clip_grad)
        if self.epoch < self.config.freeze_last_layer:
            for head in self.dino.student.heads.values():
                for parameter in head.last_layer.parameters():  # type: ignore[union-attr]
                    parameter.grad = None
