"""Online backfilling: serve and improve while a gallery moves, item by item, from an old encoder to a new one.

Seo, Uzunbas, Han, Cao, Lim: Online Backfilling with No Regret for Large-Scale Image Retrieval (arXiv 2301.03767),
WACV 2025 as "Metric Compatible Training for Online Backfilling in Large-Scale Retrieval". No code was published;
docs/methods/online-backfilling.md lists what the paper leaves open and what was chosen. Here: the transforms and
their losses; the served side is in ``mixed_gallery``, the strategy of an upgrade in ``rank_merge``.

Letters: B batch, N items, D_old / D_new embedding sizes, psi reverse query transform, rho learnable module on the
new embedding. Distance is ``1 - cosine``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from bowerbird.errors import InputError
from bowerbird.gallery.merge import merge_by_distance
from bowerbird.protocols import Transform
from bowerbird.retrieval.index import Hits
from bowerbird_compat.checks import (
    check_above_zero,
    check_integers,
    check_not_negative,
    finite_vectors,
    full_precision,
    integer_labels,
    labels_of,
)
from bowerbird_compat.mixed_gallery import MixedGallery, Progress, backfill

__all__ = [
    "Hits", "MetricCompatibleLoss", "MixedGallery", "Progress", "ReverseQueryTransform", "TopK", "backfill",
    "fit_metric_compatible", "fit_reverse_transform", "merge_by_distance",
]  # fmt: skip


class ReverseQueryTransform(Transform):
    """psi: maps a new query vector into the old space, so that each query is encoded only once.

    A linear layer, plus a two-layer residual branch of width ``hidden`` that starts at zero. Where the sizes agree it
    starts as the identity.

    Args:
        in_dim: D_new.
        out_dim: D_old.
        hidden: Width of the branch; ``None``: linear only.
        source: Fingerprint of the new space, if known.
        target: Fingerprint of the old space, if known.
    """

    def __init__(
        self, in_dim: int, out_dim: int, hidden: int | None = None, *, source: str = "", target: str = ""
    ) -> None:
        super().__init__()
        check_integers(in_dim=in_dim, out_dim=out_dim, hidden=1 if hidden is None else hidden)
        if min(in_dim, out_dim) < 1 or (hidden is not None and hidden < 1):
            raise InputError(f"Sizes must be at least 1; got in_dim={in_dim}, out_dim={out_dim}, hidden={hidden}.")
        self.source, self.target = source, target
        self.linear = _identity_linear(in_dim, out_dim)
        self.branch: nn.Sequential | None = None
        if hidden is not None:
            last = nn.Linear(hidden, out_dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.branch = nn.Sequential(nn.Linear(in_dim, hidden), nn.ReLU(), last)

    def forward(self, vectors: Tensor) -> Tensor:
        """``(B, D_new) -> (B, D_old)``, not normalised, in the precision of the transform.

        Raises ``InputError`` for other sizes.
        """
        if vectors.shape[-1:] != (self.linear.in_features,):
            raise InputError(
                f"Vectors have shape {tuple(vectors.shape)}; this transform maps (batch, {self.linear.in_features}) "
                f"to (batch, {self.linear.out_features})."
            )
        vectors = vectors.to(self.linear.weight.dtype)
        mapped = self.linear(vectors)
        return mapped if self.branch is None else mapped + self.branch(vectors)


def _identity_linear(in_dim: int, out_dim: int) -> nn.Linear:
    linear = nn.Linear(in_dim, out_dim)
    if in_dim == out_dim:
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    return linear


@dataclass(frozen=True)
class TopK:
    """Hard-negative mining: of each system only the ``k`` nearest negatives of a sample stay in its denominator."""

    k: int

    def __post_init__(self) -> None:
        check_integers(k=self.k)
        if self.k < 1:
            raise InputError(f"k is {self.k}; it must be at least 1.")


class MetricCompatibleLoss(nn.Module):
    """Regression to the old query plus contrastive terms that bring both systems' distances to one scale.

    With ``s_ij = exp(-d_ij / temperature)``, same-class ``P`` and other-class ``N``, and the systems *old* (reverse
    query against old vectors, own pair included) and *new* (new against new, own pair excluded), each term is

        mean_i -log( sum_P s / (sum_P s + sum_N s + sum_N s of the other system) )

    The cross-system negatives make the terms metric compatible; without them they are ordinary supervised contrastive
    terms.

    Args:
        temperature: Above 0.
        cross_system_negatives: Whether the other system's negatives are in the denominators.
        include_new_side: Whether the new system has a term and the new vectors get gradients (learnable new embedding).
            Otherwise the new vectors are constants. The old vectors always are.
        mining: ``None`` for all negatives, or ``TopK(k)``.
        weights: Factors of the regression, the old and the new term, each at least 0.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        cross_system_negatives: bool = True,
        include_new_side: bool = False,
        mining: TopK | None = None,
        *,
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        check_above_zero(temperature=temperature)
        if mining is not None and not isinstance(mining, TopK):
            raise InputError(f"mining is {mining!r}; accepted: None or TopK(k).")
        if len(weights) != 3:
            raise InputError(f"weights are {weights}; three numbers of at least 0 are needed.")
        for weight in weights:
            check_not_negative(weight=weight)
        self.temperature, self.mining, self.weights = float(temperature), mining, weights
        self.cross_system_negatives, self.include_new_side = cross_system_negatives, include_new_side

    def forward(self, reverse: Tensor, old: Tensor, new: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """The named scalar terms and their weighted sum.

        Args:
            reverse: ``(B, D_old)``, psi of the new vectors.
            old: ``(B, D_old)`` of the same items.
            new: ``(B, D_new)`` of the same items, after rho if there is one.
            labels: ``(B,)`` integers.

        Returns:
            ``rqt_cos``; ``mcl_old`` (``cl_old`` without cross-system negatives); with the new side ``mcl_new`` or
            ``cl_new``, which is 0 where no sample has a partner of its class; ``total``.

        Raises:
            InputError: Labels are missing, or shapes do not fit.
            TypeError: Labels are not integers.
        """
        if labels is None:
            raise InputError("The contrastive terms need labels. Without labels use fit_reverse_transform(new, old).")
        if reverse.shape != old.shape or reverse.ndim != 2 or new.ndim != 2 or len(new) != len(old) or not len(old):
            raise InputError(
                f"reverse {tuple(reverse.shape)}, old {tuple(old.shape)}, new {tuple(new.shape)} must be (B, D_old), "
                "(B, D_old) and (B, D_new) with B at least 1."
            )
        labels = integer_labels(labels, len(old)).to(old.device)
        # Half precision cannot hold cosines divided by a small temperature.
        with torch.autocast(device_type=reverse.device.type, enabled=False):
            reverse = full_precision(reverse)
            new = (new if self.include_new_side else new.detach()).to(reverse.dtype)
            return self._terms(
                F.normalize(reverse), F.normalize(old.detach().to(reverse.dtype)), F.normalize(new), labels
            )

    def _terms(self, r: Tensor, o: Tensor, n: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """From unit vectors."""
        # exp(-d / t) = exp(cos / t) * exp(-1 / t): the constant is in every sum and cancels.
        old_logits, new_logits = r @ o.T / self.temperature, n @ n.T / self.temperature
        same = labels[:, None] == labels
        old_negatives, new_negatives = self._negatives(old_logits, same), self._negatives(new_logits, same)

        name = "mcl" if self.cross_system_negatives else "cl"
        terms = {"rqt_cos": _cosine_distance(r, o)}
        terms[f"{name}_old"] = self._contrast(old_logits, same, old_negatives, new_negatives)
        if self.include_new_side:
            partner = same & ~torch.eye(len(labels), dtype=torch.bool, device=same.device)
            terms[f"{name}_new"] = self._contrast(new_logits, partner, new_negatives, old_negatives)
        terms["total"] = torch.stack([w * t for w, t in zip(self.weights, terms.values(), strict=False)]).sum()
        return terms

    def _negatives(self, logits: Tensor, same: Tensor) -> Tensor:
        """Logits of the other-class pairs that count, -inf elsewhere: ``(B, B)``."""
        negatives = logits.masked_fill(same, -torch.inf)
        if self.mining is not None and self.mining.k < negatives.shape[1]:
            negatives = negatives.topk(self.mining.k, dim=1).values
        return negatives

    def _contrast(self, logits: Tensor, positive: Tensor, own_negatives: Tensor, other_negatives: Tensor) -> Tensor:
        rows = positive.any(dim=1)
        if not rows.any():
            return logits[:0].sum()
        positives = logits.masked_fill(~positive, -torch.inf)
        blocks = [positives, own_negatives] + ([other_negatives] if self.cross_system_negatives else [])
        everything = torch.cat(blocks, dim=1)
        if not rows.all():
            everything, positives = everything[rows], positives[rows]
        return (everything.logsumexp(dim=1) - positives.logsumexp(dim=1)).mean()


def _cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean ``1 - cos`` of unit rows."""
    return (1 - (a * b).sum(dim=1)).mean()


def fit_reverse_transform(
    new: ArrayLike | Tensor,
    old: ArrayLike | Tensor,
    labels: ArrayLike | Tensor | None = None,
    *,
    hidden: int | None = None,
    loss: MetricCompatibleLoss | None = None,
    steps: int = 600,
    lr: float = 5e-3,
    batch_size: int = 128,
    seed: int = 0,
) -> ReverseQueryTransform:
    """Train psi on the vectors of the same items by both encoders, which stay as they are.

    Args:
        new: ``(N, D_new)``.
        old: ``(N, D_old)``.
        labels: ``(N,)`` integers. Without them psi learns the regression only.
        hidden: Of ``ReverseQueryTransform``.
        loss: With labels; default: ``MetricCompatibleLoss()``. It must not include the new side.
        steps: Of Adam, each with other samples drawn at random.
        lr: Of Adam.
        batch_size: Samples per step.
        seed: Of the initial weights and of the draws; the same seed gives the same transform.

    Raises:
        InputError: (a ``ValueError``) Shapes, values or settings that cannot be used.
    """
    if loss is not None and (loss.include_new_side or labels is None):
        raise InputError(
            "loss needs labels and no new side here; for a learnable new embedding use fit_metric_compatible."
        )
    _, psi = _fit(new, old, labels, loss or MetricCompatibleLoss(), False, hidden, steps, lr, batch_size, seed)
    return psi


def fit_metric_compatible(
    new: ArrayLike | Tensor,
    old: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    *,
    hidden: int | None = None,
    loss: MetricCompatibleLoss | None = None,
    steps: int = 600,
    lr: float = 5e-3,
    batch_size: int = 128,
    seed: int = 0,
) -> tuple[nn.Linear, ReverseQueryTransform]:
    """Train rho on the new embedding, which then is ``rho(new)``, and psi on top of it: ``(rho, psi)``.

    Arguments as in ``fit_reverse_transform``; ``loss`` (default: ``MetricCompatibleLoss(include_new_side=True)``) must
    include the new side.
    """
    loss = loss or MetricCompatibleLoss(include_new_side=True)
    if not loss.include_new_side or labels is None:
        raise InputError("A learnable new embedding needs labels and a loss with include_new_side=True.")
    rho, psi = _fit(new, old, labels, loss, True, hidden, steps, lr, batch_size, seed)
    assert rho is not None
    return rho, psi


@torch.inference_mode(False)
def _fit(
    new: ArrayLike | Tensor,
    old: ArrayLike | Tensor,
    labels: ArrayLike | Tensor | None,
    loss: MetricCompatibleLoss,
    learn_new: bool,
    hidden: int | None,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> tuple[nn.Linear | None, ReverseQueryTransform]:
    source, target = finite_vectors(new, "new"), finite_vectors(old, "old")
    target = target.to(source.device)
    if len(source) != len(target):
        raise InputError(f"{len(source)} new and {len(target)} old vectors; both of the same items are needed.")
    classes = labels_of(labels, len(source))
    check_integers(steps=steps, batch_size=batch_size, seed=seed)
    check_above_zero(lr=lr)
    if steps < 0 or batch_size < 1:
        raise InputError(f"steps={steps}, batch_size={batch_size}; at least 0 and at least 1 are needed.")

    draws = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        psi = ReverseQueryTransform(source.shape[1], target.shape[1], hidden)
        rho = _identity_linear(source.shape[1], source.shape[1]) if learn_new else None
    modules = nn.ModuleList([psi] if rho is None else [psi, rho]).to(source.device)
    optimiser = torch.optim.Adam(modules.parameters(), lr=lr, fused=True)
    with torch.enable_grad():
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < min(batch_size, len(source)):
                order = torch.randperm(len(source), generator=draws)
            chosen, order = order[:batch_size], order[batch_size:]
            x, o = source[chosen], target[chosen]
            n = x if rho is None else rho(x)
            r = psi(n)
            total = (
                _cosine_distance(F.normalize(r), F.normalize(o))
                if classes is None
                else loss(r, o, n, classes[chosen])["total"]
            )
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
    modules.eval()
    return rho, psi
