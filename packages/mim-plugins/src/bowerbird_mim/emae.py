"""MAE that uses the whole picture in every step: K complementary visible sets, and predictions that must agree.

Li, Zhu, Chen et al.: Efficient Masked Autoencoders with Self-Consistency, arXiv 2302.14431. No code was released; what
of this is known from the abstract and what is not is told in docs/methods/emae.md.

Every patch is visible in one of the K parts and predicted from the K - 1 others. The parts of a picture pass encoder
and decoder as one batch, so patches are embedded, targets made and the optimiser moved once instead of K times.

N pictures, K parts, L patches, V = L / K patches per part, D width, P numbers per patch (p * p * C).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bowerbird import dist
from bowerbird.batch import Batch
from bowerbird.errors import InputError
from bowerbird.protocols import BuildContext, Encoder, ItemTransform, LossOutput, Objective
from bowerbird_mim.mae import MaskedAutoencoder, PixelConfig, checked_noise, noisy_view
from bowerbird_mim.patches import normalize_patches, patchify
from bowerbird_mim.precision import at_least_float32
from bowerbird_mim.vit import ViTEncoder, vit_of

Reduction = Literal["overlap_mean", "all_mean"]

# ------------------------------------------------------------------------------------------------ parts and losses


@dataclass(frozen=True)
class Partition:
    """The parts of every picture: disjoint, of equal size, together all patches.

    Attributes:
        ids_visible: int64 ``(N, K, V)``: the patches of each part, by ascending noise.
        mask: ``(N, K, L)``, 0 at the patches of the part, 1 at all others, in the dtype of the noise.
    """

    ids_visible: Tensor
    mask: Tensor


def partition_patches(noise: Tensor, num_parts: int) -> Partition:
    """Part k holds the patches of rank k V to (k + 1) V - 1 of a picture's noise; V = L / K.

    Args:
        noise: ``(N, L)``, uniform in [0, 1).
        num_parts: K, at least 2, a divisor of L. The mask ratio is 1 - 1 / K.

    Raises:
        InputError: A wrong shape or number of parts.
    """
    if noise.ndim != 2:
        raise InputError(f"noise has shape {tuple(noise.shape)}; expected (N, L), one value per patch")
    batch, length = noise.shape
    # 1 / (1 - mask_ratio) is a float, and for most ratios not even a whole one
    if isinstance(num_parts, float) or num_parts < 2 or num_parts > length or length % num_parts:
        raise InputError(
            f"num_parts = {num_parts} does not divide {length} patches; accepted: "
            f"{', '.join(str(k) for k in range(2, length + 1) if length % k == 0)}"
        )
    ids_visible = noise.argsort(dim=1).reshape(batch, num_parts, length // num_parts)
    mask = noise.new_ones(batch, num_parts, length).scatter_(2, ids_visible, 0)
    return Partition(ids_visible=ids_visible, mask=mask)


def check_reduction(reduction: str) -> None:
    if reduction not in ("overlap_mean", "all_mean"):
        raise InputError(f"reduction = {reduction!r}; accepted: overlap_mean, all_mean")


def self_consistency_loss(pred: Tensor, mask: Tensor, reduction: Reduction = "overlap_mean") -> Tensor:
    """How much predictions of different parts differ where both parts had to invent a patch: a scalar.

    For a pair of parts, |sg(x_i) - x_j| + |x_i - sg(x_j)|, averaged over the P numbers of a patch (sg: stop-gradient).
    Its value is 2 |x_i - x_j|; each prediction is pulled towards the other one, held constant, with gradient 1.

    Args:
        pred: ``(N, K, L, P)``.
        mask: ``(N, K, L)``, 1 where the patch is masked in the part; the overlap of a pair is where both are 1.
        reduction: ``overlap_mean``: the mean over all overlaps of all pairs, 0 where there is none (K = 2), so its
            scale does not depend on K. ``all_mean``: the mean over all patches of all pairs, overlap or not; it is
            (K - 2) / K times the other one for equal parts.

    Raises:
        InputError: Shapes that do not fit, fewer than two parts, an unknown reduction.
    """
    if pred.ndim != 4 or mask.shape != pred.shape[:3] or pred.shape[1] < 2:
        raise InputError(
            f"pred {tuple(pred.shape)} and mask {tuple(mask.shape)} do not fit: expected (N, K, L, P) and (N, K, L) "
            "with at least two parts K"
        )
    check_reduction(reduction)
    pred = at_least_float32(pred)
    weights = mask.to(pred.dtype)
    parts = pred.unbind(1)
    total, overlap = weights.new_zeros(()), weights.new_zeros(())
    for i, j in combinations(range(len(parts)), 2):
        both = weights[:, i] * weights[:, j]  # (N, L)
        total = total + ((parts[i] - parts[j]).abs().mean(dim=-1) * both).sum()
        overlap = overlap + both.sum()
    # Held constant in turn, the two terms have the gradient of one and the value of two.
    total = total + total.detach()
    if reduction == "all_mean":
        batch, count, length = mask.shape
        return total / (batch * length * count * (count - 1) / 2)
    return total / overlap.clamp(min=1)


# ------------------------------------------------------------------------------------------------ model


@dataclass(frozen=True)
class EMAEOutput:
    """Losses and predictions of one partition.

    Attributes:
        loss: Scalar, ``loss_reconstruction + weight * loss_consistency``.
        loss_reconstruction: Scalar: the mean of the K losses of MAE.
        loss_consistency: Scalar, see ``self_consistency_loss``.
        pred: ``(N, K, L, P)``, what every part predicts for every patch; ``None`` if only losses were asked for.
        mask: ``(N, K, L)``, 1 where the patch was masked in the part.
        target: ``(N, L, P)``, what was to be predicted.
    """

    loss: Tensor
    loss_reconstruction: Tensor
    loss_consistency: Tensor
    pred: Tensor | None
    mask: Tensor
    target: Tensor


class EfficientMaskedAutoencoder(nn.Module):
    """A masked autoencoder on K complementary parts of every picture.

    Args:
        mae: Encoder, decoder and kind of target.
        num_parts: K, at least 2; divides the number of patches.
        consistency_weight: lambda of ``loss = reconstruction + lambda * consistency``. A large value from the first
            step on makes training collapse: ``EMAEObjective`` schedules it.
        consistency_reduction: See ``self_consistency_loss``.

    Raises:
        InputError: ``num_parts`` does not divide the patches, a negative weight, an unknown reduction.
    """

    def __init__(
        self,
        mae: MaskedAutoencoder,
        num_parts: int = 4,
        consistency_weight: float = 1.0,
        consistency_reduction: Reduction = "overlap_mean",
    ) -> None:
        super().__init__()
        partition_patches(torch.zeros(1, mae.encoder.grid[0] * mae.encoder.grid[1]), num_parts)
        check_reduction(consistency_reduction)
        if not consistency_weight >= 0:
            raise InputError(f"consistency_weight = {consistency_weight}: expected a number of at least 0")
        self.mae, self.num_parts = mae, num_parts
        self.consistency_weight, self.consistency_reduction = consistency_weight, consistency_reduction

    def forward(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        *,
        consistency_weight: float | Tensor | None = None,
        with_pred: bool = True,
    ) -> EMAEOutput:
        """Both losses of one partition.

        Args:
            images: ``(N, C, H, W)`` of the encoder's size.
            noise: ``(N, L)`` that decides the parts; drawn from torch's generator if it is not given.
            consistency_weight: Takes the place of the model's own; a number or a scalar tensor.
            with_pred: Return predictions for all patches, too. The losses need those of masked ones and cost less.

        Raises:
            InputError: Pictures of another size than the encoder's, or a noise of another shape.
        """
        encoder, parts = self.mae.encoder, self.num_parts
        partition = partition_patches(checked_noise(encoder, images, noise), parts)
        visible = partition.ids_visible  # (N, K, V)

        # With patches in the order of the noise, a part is a slice, and what it masks are the other slices.
        tokens = encoder.embed(images, ids_keep=visible.flatten(1))
        first = tokens[:, None, :1].expand(-1, parts, -1, -1)
        tokens = torch.cat([first, tokens[:, 1:].unflatten(1, visible.shape[1:])], dim=2)  # (N, K, 1 + V, D)
        latent = encoder.encode(tokens.flatten(0, 1)).unflatten(0, visible.shape[:2])

        target = at_least_float32(patchify(images, encoder.patch_size))
        if self.mae.norm_pix_loss:
            target = normalize_patches(target)
        slices = _chosen(target, visible.flatten(1)).unflatten(1, visible.shape[1:])  # (N, K, V, P)

        # One part after the other: what a CPU works on stays near it, and a GPU has enough to do with one part.
        preds, guesses = [], []
        for k in range(parts):
            masked = torch.cat([visible[:, :k], visible[:, k + 1 :]], dim=1).flatten(1)  # (N, L - V)
            pred = self.mae.decoder.predict(latent[:, k], visible[:, k], masked, masked_only=not with_pred)
            guesses.append(pred[:, -masked.shape[1] :].to(target.dtype).unflatten(1, (parts - 1, -1)))
            if with_pred:
                preds.append(_chosen(pred, torch.cat([visible[:, k], masked], dim=1).argsort(dim=1)))
        reconstruction, consistency = self._losses(guesses, slices)
        weight = self.consistency_weight if consistency_weight is None else consistency_weight
        return EMAEOutput(
            loss=reconstruction + weight * consistency,
            loss_reconstruction=reconstruction,
            loss_consistency=consistency,
            pred=torch.stack(preds, dim=1) if with_pred else None,
            mask=partition.mask,
            target=target,
        )

    def _losses(self, guesses: list[Tensor], slices: Tensor) -> tuple[Tensor, Tensor]:
        """``masked_reconstruction_loss`` and ``self_consistency_loss`` over slices of equal size, without masks.

        ``guesses``: of every part, the ``(N, K - 1, V, P)`` predictions for the other parts; ``slices``: what they
        should be, ``(N, K, V, P)``.
        """
        parts = self.num_parts
        reconstruction = consistency = slices.new_zeros(())
        for b in range(parts):  # the patches that part b sees and all others predict
            of_b = [guesses[k][:, b - (b > k)] for k in range(parts) if k != b]
            for guess in of_b:
                reconstruction = reconstruction + F.mse_loss(guess, slices[:, b])
            for one, other in combinations(of_b, 2):
                consistency = consistency + (one - other).abs().mean()
        if parts == 2:  # no overlap: zero, with a gradient of zero
            consistency = reconstruction * 0
        pairs = parts * (parts - 1) * (parts - 2) / 2
        share = (parts - 2) / parts if self.consistency_reduction == "all_mean" else 1.0
        consistency = consistency * (share / max(1.0, pairs))
        return reconstruction / (parts * (parts - 1)), consistency + consistency.detach()


def _chosen(rows: Tensor, ids: Tensor) -> Tensor:
    """``rows[n, ids[n]]``: ``(N, L, P)`` and ``(N, M)`` to ``(N, M, P)``."""
    return rows.gather(1, ids[..., None].expand(-1, -1, rows.shape[-1]))


@torch.no_grad()
def prediction_inconsistency(
    model: MaskedAutoencoder | EfficientMaskedAutoencoder,
    images: Tensor,
    num_parts: int = 4,
    generator: torch.Generator | None = None,
) -> float:
    """How far two visible sets of one picture lead to different predictions: the mean of |x_i - x_j| over the overlaps.

    One fresh partition of every picture; all pairs of parts; predictions in the space of the targets. Constant
    predictions are perfectly consistent: report the reconstruction loss beside it, and compare models of equal loss.
    With two parts there is no overlap and the value is 0.

    Args:
        model: A masked autoencoder, or EMAE's (whose own number of parts does not matter here). Its mode is kept.
        images: ``(N, C, H, W)``.
        num_parts: K of the partition.
        generator: Draws the partition, on the CPU; torch's own by default.

    Raises:
        InputError: Pictures of another size than the encoder's, or parts that do not divide the patches.
    """
    mae = model.mae if isinstance(model, EfficientMaskedAutoencoder) else model
    rows, columns = mae.encoder.grid
    noise = torch.rand(len(images), rows * columns, generator=generator).to(images.device)
    was_training = mae.training
    mae.eval()
    try:
        output = EfficientMaskedAutoencoder(mae, num_parts)(images, noise, with_pred=False)
    finally:
        mae.train(was_training)
    return float(output.loss_consistency) / 2


# ------------------------------------------------------------------------------------------------ objective


class EMAEConfig(PixelConfig):
    """Settings of ``mim:emae``."""

    num_parts: int = Field(
        default=4, ge=2, description="K: parts of a picture; divides the patches. The mask ratio is 1 - 1 / K."
    )
    consistency_weight: float = Field(default=1.0, ge=0, description="lambda, the weight that the warm-up ends at.")
    consistency_start: float = Field(
        default=0.0, ge=0, le=1, description="Share of the training before which the weight is 0."
    )
    consistency_ramp: float = Field(
        default=0.5, ge=0, le=1, description="Share of the training over which the weight grows from 0 to lambda."
    )
    collapse_guard: bool = Field(
        default=True, description="Weight 0 while predictions are hardly better than the mean picture."
    )
    collapse_margin: float = Field(
        default=0.05, gt=0, lt=1, description="How much better they must be, as a share of the mean picture's error."
    )
    consistency_reduction: Reduction = Field(
        default="overlap_mean", description="Mean over the overlaps, or over all patches."
    )


class CollapseGuard(nn.Module):
    """Tells whether predictions are better than the best that ignores what is visible: the mean picture.

    A model whose parts must agree can give up looking at them: predictions that depend only on the place agree
    perfectly. Their error is at least that of the mean target of each place. ``open`` is 1 while the running
    reconstruction loss is below ``(1 - margin)`` times the running error of the mean picture, else 0.

    Args:
        shape: (L, P).
        margin: In (0, 1).
    """

    SLOW, FAST = 0.99, 0.9  # moving averages: of the mean picture, and of the two errors

    mean: Tensor
    errors: Tensor
    steps: Tensor
    open: Tensor

    def __init__(self, shape: tuple[int, int], margin: float) -> None:
        super().__init__()
        self.margin = margin
        self.register_buffer("mean", torch.zeros(shape))  # not yet divided by 1 - SLOW^steps
        self.register_buffer("errors", torch.zeros(2))  # of the model and of the mean picture
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("open", torch.zeros(()))
        self._seen: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def observe(self, target: Tensor, loss: Tensor) -> None:
        """Take in one forward pass: targets ``(N, L, P)`` and their reconstruction loss."""
        picture = self.mean / (1 - self.SLOW**self.steps).clamp(min=1 - self.SLOW)  # before it saw this batch
        error = F.mse_loss(picture.expand_as(target), target)
        self._seen.append((target.mean(dim=0), torch.stack([loss.detach().to(error.dtype), error])))

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages by what was observed since the last call, in all processes."""
        if not self._seen:
            return
        means, errors = (torch.stack(values).mean(dim=0) for values in zip(*self._seen, strict=True))
        self._seen.clear()
        self.mean.lerp_(dist.mean_over_processes(means).to(self.mean), 1 - self.SLOW)
        first = (self.steps == 0).to(self.errors)  # begin with the first values, not with zeros
        self.errors.lerp_(dist.mean_over_processes(errors).to(self.errors), torch.clamp(first, min=1 - self.FAST))
        self.steps.add_(1)
        self.open.copy_(self.errors[0] < (1 - self.margin) * self.errors[1])


class EMAEObjective(Objective):
    """``mim:emae``. The weight of consistency grows from 0 while the guard is open, and returns to 0 when it closes."""

    consistency_weight: Tensor

    def __init__(self, model: EfficientMaskedAutoencoder, config: EMAEConfig, total_steps: int) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.start = round(config.consistency_start * total_steps)
        self.ramp = max(1, round(config.consistency_ramp * total_steps))
        encoder = self.encoder
        shape = (encoder.grid[0] * encoder.grid[1], encoder.patch_size**2 * encoder.in_channels)
        self.guard = CollapseGuard(shape, config.collapse_margin) if config.collapse_guard else None
        self.register_buffer("consistency_weight", torch.zeros(()))

    @property
    def encoder(self) -> ViTEncoder:  # type: ignore[override]  # one owner: a second one would store it twice
        return self.model.mae.encoder

    @classmethod
    def build(cls, config: EMAEConfig, encoder: Encoder, context: BuildContext) -> Self:
        """Raises ``InputError`` for another encoder than mim:vit, or parts that do not divide its patches."""
        mae = config.autoencoder(vit_of(encoder, "mim:emae"))
        model = EfficientMaskedAutoencoder(
            mae, config.num_parts, config.consistency_weight, config.consistency_reduction
        )
        return cls(model, config, context.total_steps)

    def item_transform(self) -> ItemTransform:
        return noisy_view(self.encoder, self.config.crop_scale)

    def forward(self, batch: Batch) -> LossOutput:
        output = self.model(batch["image"], batch["noise"], consistency_weight=self.consistency_weight, with_pred=False)
        stats: dict[str, Tensor] = {"consistency_weight": self.consistency_weight.clone()}
        if self.guard is not None:
            if self.training:
                self.guard.observe(output.target, output.loss_reconstruction)
            stats |= {"mean_picture_error": self.guard.errors[1].clone()}
        parts = {"reconstruction": output.loss_reconstruction, "consistency": output.loss_consistency}
        return LossOutput(total=output.loss, parts=parts, stats=stats)

    def before_step(self, step: int) -> None:
        if self.config.consistency_weight == 0 or step < self.start:
            return
        grown = (self.consistency_weight + self.config.consistency_weight / self.ramp).clamp(
            max=self.config.consistency_weight
        )
        self.consistency_weight.copy_(grown if self.guard is None else grown * self.guard.open)

    def after_step(self, step: int) -> None:
        if self.guard is not None:
            self.guard.update()
