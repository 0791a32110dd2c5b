"""What methods of self-distillation share: the head, the loss with its moving centre, and clipping of gradients.

From DINO (Caron et al., ICCV 2021, arXiv 2104.14294); numbers are those of the official code (facebookresearch/dino,
Apache-2.0).

B batch, n crops per picture of which the first two are global, D encoder width, K outputs of the head.
Rows of n crops lie crop by crop: all pictures' crop 0, all pictures' crop 1, ...
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird import dist
from bowerbird.errors import InputError
from bowerbird_mim.precision import at_least_float32
from bowerbird_mim.schedules import Schedule, as_schedule
from bowerbird_mim.vit import initialize

GLOBAL_VIEWS = 2


# ------------------------------------------------------------------------------------------------ crops as rows


def crop_major(views: Tensor) -> Tensor:
    """``(B, n, ...)`` to ``(n * B, ...)``: all pictures' first crops, then their second crops, ..."""
    return views.transpose(0, 1).flatten(0, 1)


def check_views(views: Tensor, what: str, *, count: int | None = None, batch: int | None = None) -> None:
    """Raise ``InputError`` unless ``views`` are ``(B, n, C, H, W)``, with n = ``count`` and B = ``batch`` if given."""
    shape = tuple(views.shape)
    if views.ndim != 5 or (count is not None and shape[1] != count) or (batch is not None and shape[0] != batch):
        raise InputError(f"{what} have shape {shape}; expected ({batch or 'B'}, {count or 'n'}, C, H, W)")


# ------------------------------------------------------------------------------------------------ head


class WeightNormLinear(nn.Module):
    """A linear map without bias whose row i is ``weight_g[i] * weight_v[i] / |weight_v[i]|``."""

    def __init__(self, in_dim: int, out_dim: int, *, trainable_norm: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=trainable_norm)
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        return F.linear(x, self.weight_v * (self.weight_g / norms))


class ProjectionHead(nn.Module):
    """A perceptron with GELU, a unit bottleneck, and a weight-normalised linear layer: ``(..., D)`` to ``(..., K)``.

    Args:
        in_dim: D.
        out_dim: K.
        hidden: Width of the perceptron.
        bottleneck: Width of the unit vector.
        layers: Linear layers of the perceptron; at least 1.
        norm_last: Keep the rows of the last layer at norm 1; outputs then lie in [-1, 1].
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        norm_last: bool = True,
    ) -> None:
        super().__init__()
        if min(in_dim, out_dim, hidden, bottleneck, layers) < 1:
            raise InputError(
                f"in_dim = {in_dim}, out_dim = {out_dim}, hidden = {hidden}, bottleneck = {bottleneck}, "
                f"layers = {layers}: all must be at least 1"
            )
        widths = [in_dim, *[hidden] * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for width, following in pairwise(widths):
            parts += [nn.Linear(width, following), nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1])
        initialize(self.mlp, "truncated")
        self.last_layer = WeightNormLinear(bottleneck, out_dim, trainable_norm=not norm_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


# ------------------------------------------------------------------------------------------------ loss


def teacher_targets(teacher: Tensor, center: Tensor, temperature: float | Tensor) -> Tensor:
    """softmax((t - c) / temperature) without gradient, in float32 at least: ``(N, K)`` to ``(N, K)``."""
    return ((at_least_float32(teacher.detach()) - center.detach()) / temperature).softmax(dim=-1)


def cross_view_terms(student: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, int]:
    """Cross-entropies of every target view with every other view, added up, and how many there are.

    Each of the ``2 n - 2`` terms is a mean over the batch.

    Args:
        student: ``(n * B, K)`` logits, crop by crop, the two global crops first.
        targets: ``(2 * B, K)`` probabilities of the two global crops.
        temperature: Of the student.

    Raises:
        InputError: The numbers of rows are not n B and 2 B with n >= 2, or the widths differ.
    """
    if student.ndim != 2 or targets.ndim != 2 or student.shape[1] != targets.shape[1]:
        raise InputError(
            f"student outputs {tuple(student.shape)} and teacher outputs {tuple(targets.shape)}: expected (n * B, K) "
            "and (2 * B, K)"
        )
    batch = len(targets) // GLOBAL_VIEWS
    if not batch or len(targets) % GLOBAL_VIEWS or len(student) % batch or len(student) < len(targets):
        raise InputError(
            f"{len(student)} student rows for {len(targets)} teacher rows: the teacher gives 2 per picture, the "
            "student n >= 2 per picture"
        )
    n = len(student) // batch
    log_q = (at_least_float32(student) / temperature).log_softmax(dim=-1).view(n, batch, -1)
    p = targets.view(GLOBAL_VIEWS, batch, -1)
    # sum_{i, v != i} p_i log q_v = (sum_i p_i) (sum_v log q_v) - sum_i p_i log q_i: three products instead of 2 n - 2
    total = (p * log_q[:GLOBAL_VIEWS]).sum() - (p.sum(dim=0) * log_q.sum(dim=0)).sum()
    return total / batch, GLOBAL_VIEWS * (n - 1)


class SelfDistillationLoss(nn.Module):
    """The loss of DINO, with the moving centre of the teacher's outputs in the buffer ``center (1, K)``.

    Args:
        out_dim: K.
        student_temp: Temperature of the student, above 0.
        teacher_temp_schedule: Temperature of the teacher at every step; DINO counts epochs here.
        center_momentum: Share of the old centre that is kept by an update, in [0, 1].
        defer_center: Leave the centre alone until ``update_center`` is called: several forward passes of one
            optimiser step then see the same centre. Otherwise a forward pass in training mode ends with an update.

    Raises:
        InputError: Values outside these ranges.
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        student_temp: float = 0.1,
        teacher_temp_schedule: Schedule = 0.04,
        center_momentum: float = 0.9,
        *,
        defer_center: bool = False,
    ) -> None:
        super().__init__()
        self.schedule = as_schedule(teacher_temp_schedule)
        if out_dim < 1 or not student_temp > 0 or not self.schedule(0) > 0 or not 0 <= center_momentum <= 1:
            raise InputError(
                f"out_dim = {out_dim}, student_temp = {student_temp}, teacher temperature {self.schedule(0)}, "
                f"center_momentum = {center_momentum}: expected a positive number of outputs, positive temperatures "
                "and a momentum from 0 to 1"
            )
        self.student_temp, self.center_momentum, self.defer_center = student_temp, center_momentum, defer_center
        self.register_buffer("center", torch.zeros(1, out_dim))
        # A tensor, so that a compiled step is not compiled again when it moves; float64 keeps the schedule's value.
        self.teacher_temp = torch.tensor(self.schedule(0), dtype=torch.float64)
        self.seen: list[Tensor] = []  # means of the teacher's outputs since the last update

    def at_step(self, step: int) -> None:
        """Set the teacher's temperature of ``step``, and forget outputs that no update has used.

        Raises:
            InputError: The schedule has no temperature above 0 there.
        """
        temperature = self.schedule(step)
        if not temperature > 0:
            raise InputError(f"teacher_temp_schedule is {temperature} at step {step}: expected a temperature above 0")
        self.teacher_temp.fill_(temperature)
        self.seen.clear()

    def targets(self, teacher: Tensor) -> Tensor:
        """The teacher's probabilities, ``(N, K)``, for its logits ``(N, K)``."""
        return teacher_targets(teacher, self.center, self.teacher_temp)

    def forward(self, student: Tensor, teacher: Tensor, step: int | None = None) -> Tensor:
        """The mean over all pairs of a target view and another view: a scalar.

        Args:
            student: ``(n * B, K)`` logits of all crops, crop by crop, the two global crops first.
            teacher: ``(2 * B, K)`` logits of the two global crops.
            step: Where the schedule of the temperature is read; by default as ``at_step`` left it.

        Raises:
            InputError: Shapes that do not fit, or no temperature above 0 at ``step``.
        """
        if teacher.ndim != 2 or teacher.shape[1] != self.center.shape[1]:
            raise InputError(f"teacher outputs {tuple(teacher.shape)}: expected (2 * B, {self.center.shape[1]})")
        if step is not None:
            self.at_step(step)
        total, count = cross_view_terms(student, self.targets(teacher), self.student_temp)
        if self.training:
            self.seen.append(at_least_float32(teacher.detach()).mean(dim=0, keepdim=True))
            if not self.defer_center:
                self.update_center()
        return total / count

    @torch.no_grad()
    def update_center(self) -> None:
        """Move the centre towards the mean of the outputs seen since the last update, over all processes."""
        if self.seen:
            mean = dist.mean_over_processes(torch.stack(self.seen).mean(dim=0))
            self.center.mul_(self.center_momentum).add_(mean, alpha=1 - self.center_momentum)
            self.seen.clear()

    @torch.no_grad()
    def entropies(self, teacher: Tensor) -> dict[str, Tensor]:
        """Signs of collapse, in nats; both lie in [0, ln K].

        ``teacher_entropy`` is the mean entropy of the targets: near ln K all are uniform. ``mean_entropy`` is the
        entropy of their mean: near 0 all name the same output.
        """
        targets = self.targets(teacher)
        mean = targets.mean(dim=0)
        return {
            "teacher_entropy": -torch.special.xlogy(targets, targets).sum(dim=-1).mean(),
            "mean_entropy": -torch.special.xlogy(mean, mean).sum(),
        }


@torch.no_grad()
def clip_gradients_per_tensor(module: nn.Module, max_norm: float) -> Tensor:
    """Scale every parameter's gradient on its own to a norm of at most ``max_norm``; returns the norms before, (P,).

    The factor is ``max_norm / (norm + 1e-6)`` where that is below 1. Parameters without a gradient are left out.
    """
    if not max_norm > 0:
        raise InputError(f"max_norm = {max_norm}: expected a norm above 0")
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    if not gradients:
        return torch.zeros(0)
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, list((max_norm / (norms + 1e-6)).clamp(max=1.0)))
    return norms
