"""DINO: a student learns to give small and large crops of a picture the outputs that its own moving average gives.

Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin: Emerging Properties in Self-Supervised Vision Transformers,
ICCV 2021 (arXiv 2104.14294). Numbers are those of the official code (facebookresearch/dino, Apache-2.0).

B batch, n crops per picture of which the first two are global, D encoder width, K outputs of the head.
Rows of n crops lie crop by crop: all pictures' crop 0, all pictures' crop 1, ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.errors import RecipeError
from bowerbird.protocols import BuildContext, Encoder, ItemTransform, LossOutput, Objective
from bowerbird_mim.crops import MultiCrop
from bowerbird_mim.distillation import (
    GLOBAL_VIEWS,
    ProjectionHead,
    SelfDistillationLoss,
    check_views,
    clip_gradients_per_tensor,
    crop_major,
    cross_view_terms,
    teacher_targets,
)
from bowerbird_mim.ema import EMATeacher
from bowerbird_mim.neighbours import knn_classify, knn_votes
from bowerbird_mim.schedules import Schedule, cosine_schedule, linear_then_constant
from bowerbird_mim.views import ColorAugmentation

__all__ = [
    "DINOConfig", "DINOObjective", "DINOOutput", "EMATeacher", "MultiCrop", "ProjectionHead", "SelfDistillation",
    "SelfDistillationLoss", "clip_gradients_per_tensor", "cosine_schedule", "crop_major", "cross_view_terms",
    "knn_classify", "knn_votes", "linear_then_constant", "teacher_targets",
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ model


class BackboneAndHead(nn.Module):
    """The network that student and teacher share."""

    def __init__(self, backbone: Encoder, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *groups: Tensor) -> Tensor:
        """Logits ``(N, K)`` of groups of pictures, each group of one size: ``(N_i, C, H_i, W_i)``."""
        return self.head(torch.cat([self.backbone({"image": images}).pooled for images in groups]))


@dataclass(frozen=True)
class DINOOutput:
    """``loss``: scalar; ``student``: ``(n * B, K)`` and ``teacher``: ``(2 * B, K)`` logits, crop by crop."""

    loss: Tensor
    student: Tensor
    teacher: Tensor


class SelfDistillation(nn.Module):
    """Student, teacher and loss.

    Args:
        encoder: The student's backbone; ``Features.pooled`` goes into the head. It must take both sizes of crops.
        head: The student's head. The teacher is a copy of both, without stochastic depth and dropout.
        loss: Its centre follows the teacher's outputs.
        momentum_schedule: Of the teacher, at every optimiser step.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: ProjectionHead,
        loss: SelfDistillationLoss,
        momentum_schedule: Schedule = 0.996,
    ) -> None:
        super().__init__()
        self.student = BackboneAndHead(encoder, head)
        self.teacher = EMATeacher(self.student, momentum_schedule)
        without_dropout(self.teacher)
        self.loss = loss

    def forward(self, global_views: Tensor, local_views: Tensor | None = None) -> DINOOutput:
        """The loss of a batch.

        Args:
            global_views: ``(B, 2, C, H, W)``.
            local_views: ``(B, n - 2, C, h, w)``, or none.

        Raises:
            InputError: Shapes that do not fit.
        """
        groups = self.groups(global_views, local_views)
        teacher = self.teacher(groups[0])
        student = self.student(*groups)
        return DINOOutput(loss=self.loss(student, teacher), student=student, teacher=teacher)

    @property
    def teacher_network(self) -> BackboneAndHead:
        assert isinstance(self.teacher.module, BackboneAndHead)
        return self.teacher.module

    @staticmethod
    def groups(global_views: Tensor, local_views: Tensor | None) -> list[Tensor]:
        """The crops of every size, crop by crop. Raises ``InputError`` for shapes that do not fit."""
        check_views(global_views, "global_views", count=GLOBAL_VIEWS)
        if local_views is None:
            return [crop_major(global_views)]
        check_views(local_views, "local_views", batch=len(global_views))
        return [crop_major(global_views), crop_major(local_views)]


def without_dropout(module: nn.Module) -> None:
    """Switch off dropout and stochastic depth below ``module`` for good, in training mode, too.

    A teacher cannot simply be in eval mode: where a network has batch norm, DINO's teacher uses the batch's statistics.
    """
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif hasattr(part, "drop_prob"):  # stochastic depth, of timm and of others
            part.drop_prob = 0.0  # type: ignore[assignment]


# ------------------------------------------------------------------------------------------------ objective

Range = Annotated[tuple[float, float], Field(strict=False)]


class DINOConfig(BaseModel):
    """Settings of ``mim:dino``. Learning rate and weight decay are the recipe's (``train.weight_decay_end``)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    out_dim: int = Field(default=65536, ge=2, description="Outputs of the head.")
    head_hidden: int = Field(default=2048, ge=1, description="Width of the head's perceptron.")
    head_bottleneck: int = Field(default=256, ge=1, description="Width of the unit vector before the last layer.")
    head_layers: int = Field(default=3, ge=1, description="Linear layers of the head's perceptron.")
    norm_last_layer: bool = Field(default=True, description="Keep the rows of the last layer at norm 1.")
    freeze_last_layer: int = Field(default=1, ge=0, description="Epochs in which the last layer stays as it is.")
    momentum_teacher: float = Field(
        default=0.996, ge=0, le=1, description="Of the teacher; grows to 1 along half a cosine."
    )
    student_temp: float = Field(default=0.1, gt=0, description="Temperature of the student.")
    teacher_temp: float = Field(default=0.04, gt=0, description="Temperature of the teacher, after its warm-up.")
    warmup_teacher_temp: float = Field(default=0.04, gt=0, description="Temperature of the teacher at the start.")
    warmup_teacher_temp_epochs: int = Field(
        default=0, ge=0, description="Epochs from the one temperature to the other, in a line."
    )
    center_momentum: float = Field(
        default=0.9, ge=0, le=1, description="Share of the old centre kept by a step; with 1 nothing is centred."
    )
    clip_grad: float | None = Field(
        default=3.0, gt=0, description="Largest norm of the gradient of every single parameter tensor."
    )
    local_size: int = Field(default=96, ge=1, description="Side of small crops in pixels; large ones: the encoder's.")
    local_crops: int = Field(default=8, ge=0, description="Small crops per picture.")
    global_scale: Range = Field(default=(0.4, 1.0), description="Range of a large crop's share of the picture.")
    local_scale: Range = Field(default=(0.05, 0.4), description="Range of a small crop's share of the picture.")
    flip_prob: float = Field(default=0.5, ge=0, le=1, description="How often a crop is mirrored.")
    jitter: Annotated[tuple[float, float, float, float], Field(strict=False)] = Field(
        default=(0.4, 0.4, 0.2, 0.1), description="Largest change of brightness, contrast, saturation, hue."
    )
    jitter_prob: float = Field(default=0.8, ge=0, le=1, description="How often these change.")
    grey_prob: float = Field(default=0.2, ge=0, le=1, description="How often a crop becomes grey.")
    blur_prob: Annotated[tuple[float, float, float], Field(strict=False)] = Field(
        default=(1.0, 0.1, 0.5), description="How often the first, the second large crop, and small crops are blurred."
    )
    blur_radius: Range = Field(default=(0.1, 2.0), description="Range of the blur's radius in pixels.")
    solarize_prob: float = Field(default=0.2, ge=0, le=1, description="How often the second large crop is solarised.")

    def crops(self, encoder: Encoder) -> MultiCrop:
        """Raises ``RecipeError`` for an encoder that says nothing about pictures, or scales that are no shares."""
        if encoder.preprocessing is None:
            raise RecipeError(
                f"the encoder {type(encoder).__name__} does not say how a picture is prepared; views of pictures need "
                "an encoder with preprocessing, such as mim:vit or core:timm"
            )
        colors = [
            ColorAugmentation(
                jitter=self.jitter,
                jitter_prob=self.jitter_prob,
                grey_prob=self.grey_prob,
                blur_prob=blur_prob,
                blur_radius=self.blur_radius,
                solarize_prob=solarize_prob,
            )
            for blur_prob, solarize_prob in zip(self.blur_prob, (0.0, self.solarize_prob, 0.0), strict=True)
        ]
        prepared = encoder.preprocessing
        return MultiCrop(
            (prepared.height, prepared.width),
            self.local_size,
            self.local_crops,
            preprocessing=prepared,
            global_scale=self.global_scale,
            local_scale=self.local_scale,
            flip_prob=self.flip_prob,
            colors=colors,
        )

    def self_distillation(self, encoder: Encoder, context: BuildContext) -> SelfDistillation:
        """Raises ``RecipeError`` for an encoder that does not take the small crops."""
        if self.local_crops:
            check_local_size(encoder, self.local_size)
        temperatures = linear_then_constant(
            self.warmup_teacher_temp, self.teacher_temp, self.warmup_teacher_temp_epochs
        )
        return SelfDistillation(
            encoder,
            ProjectionHead(
                encoder.embed_dim,
                self.out_dim,
                self.head_hidden,
                self.head_bottleneck,
                self.head_layers,
                self.norm_last_layer,
            ),
            SelfDistillationLoss(
                self.out_dim, self.student_temp, temperatures, self.center_momentum, defer_center=True
            ),
            cosine_schedule(self.momentum_teacher, 1.0, context.total_steps),
        )


@torch.no_grad()
def check_local_size(encoder: Encoder, size: int) -> None:
    """Raise ``RecipeError`` where ``encoder`` cannot take square pictures of ``size`` pixels."""
    training, parameter = encoder.training, next(encoder.parameters())
    try:
        encoder.eval()({"image": parameter.new_zeros(1, 3, size, size)})
    except Exception as error:  # whatever a library raises for a size that it does not take
        raise RecipeError(
            f"objective.local_size = {size}: the encoder {type(encoder).__name__} does not take pictures of that size "
            f"({error}). Use a size that it takes, or local_crops = 0"
        ) from error
    finally:
        encoder.train(training)


class DINOObjective(Objective):
    """``mim:dino``. Heads and student are thrown away; the exported encoder is the teacher's backbone."""

    def __init__(self, model: nn.Module, config: DINOConfig) -> None:
        super().__init__()
        self.model, self.config, self.epoch = model, config, 0
        self.crops = config.crops(self.encoder)

    @property
    def dino(self) -> SelfDistillation:
        """Student, teacher and loss: here the whole model."""
        assert isinstance(self.model, SelfDistillation)
        return self.model

    @property
    def encoder(self) -> Encoder:  # type: ignore[override]  # one owner: a second one would store it twice
        return self.dino.student.backbone

    @classmethod
    def build(cls, config: DINOConfig, encoder: Encoder, context: BuildContext) -> Self:
        return cls(config.self_distillation(encoder, context), config)

    def item_transform(self) -> ItemTransform:
        return self.crops

    def on_epoch_start(self, epoch: int) -> None:
        self.epoch = epoch

    def before_step(self, step: int) -> None:
        self.dino.loss.at_step(self.epoch)

    def forward(self, batch: Batch) -> LossOutput:
        output = self.dino(batch["global_views"], batch["local_views"] if self.config.local_crops else None)
        return LossOutput(total=output.loss, stats=self.dino.loss.entropies(output.teacher))

    def before_update(self, step: int) -> None:
        if self.config.clip_grad is not None:
            clip_gradients_per_tensor(self, self.config.clip_grad)
        if self.epoch < self.config.freeze_last_layer:
            for parameter in self.dino.student.head.last_layer.parameters():
                parameter.grad = None

    def after_step(self, step: int) -> None:
        self.dino.loss.update_center()
        self.dino.teacher.update(self.dino.student, step)

    def exported_encoder(self) -> Encoder:
        return self.dino.teacher_network.backbone
