"""BiCT: lift the stored old vectors into the new space by a small network; no picture is needed.

Su, Zhang, Ge, Xu, Wang, Yuan, Shan: Privacy-Preserving Model Upgrades with Bidirectional Compatible Training in Image
Retrieval, 2022 (arXiv 2204.13919). The new encoder is trained backward compatible first (``bict_objective``); then the
forward transform psi is trained on old and new vectors of the same training items. No code of that part was published:
docs/methods/bict.md says what was chosen. The rewrite of stored vectors is in ``gallery_rewrite``.

Letters: B batch, N items, C classes, D_old / D_new vector sizes, h hidden width.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bowerbird.errors import DataError, InputError
from bowerbird.files import write_atomically
from bowerbird.protocols import Transform
from bowerbird_compat.checks import (
    check_above_zero,
    check_batch,
    check_classes,
    check_integers,
    check_not_negative,
    cosine_distance,
    finite_vectors,
    full_precision,
    integer_labels,
    labels_of,
)
from bowerbird_compat.compatible_losses import CompatibleContrastiveLoss
from bowerbird_compat.gallery_rewrite import TransformChain, UpgradeReport, VersionedVectors, upgrade_gallery

__all__ = [
    "ForwardCompatibleLoss", "ForwardTransform", "TransformChain", "UpgradeReport", "VersionedVectors",
    "fit_forward_transform", "upgrade_gallery",
]  # fmt: skip

MAX_STEPS = 600  # of the default schedule: a million pairs in about a minute on two cores

Norm = Literal["batch", "layer"]
Align = Literal["cosine", "mse", "mse_raw"]
Discriminative = Literal["contrastive", "classifier", "both"]


class ForwardTransform(Transform):
    """psi: maps old vectors towards the new space. The output is not normalised.

    ``depth`` linear layers, with norm and ReLU between them.

    Args:
        in_dim: D_old.
        out_dim: D_new.
        hidden: h; default: 4 times the larger of the two sizes.
        depth: Number of linear layers; 1 is a linear map.
        norm: Of the hidden layers.
        residual: Whether the input is added to the output; sizes must agree. It then starts as the identity.
        source, target: Fingerprints of the old and the new space, if known. ``upgrade_gallery`` refuses others.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden: int | None = None,
        depth: int = 2,
        norm: Norm | None = "batch",
        residual: bool = False,
        *,
        source: str = "",
        target: str = "",
    ) -> None:
        super().__init__()
        check_integers(in_dim=in_dim, out_dim=out_dim, hidden=1 if hidden is None else hidden, depth=depth)
        hidden = 4 * max(in_dim, out_dim) if hidden is None else hidden
        if min(in_dim, out_dim, hidden, depth) < 1:
            raise InputError(f"in_dim={in_dim}, out_dim={out_dim}, hidden={hidden}, depth={depth}; all at least 1.")
        if norm not in (None, *get_args(Norm)):
            raise InputError(f"norm is {norm!r}; accepted: batch, layer, None.")
        if residual and in_dim != out_dim:
            raise InputError(f"residual needs equal sizes; got in_dim={in_dim} and out_dim={out_dim}.")
        self.settings = {
            "in_dim": in_dim, "out_dim": out_dim, "hidden": hidden, "depth": depth, "norm": norm, "residual": residual,
        }  # fmt: skip
        self.in_dim, self.out_dim, self.residual = in_dim, out_dim, residual
        self.source, self.target = source, target
        layers: list[nn.Module] = []
        for i in range(depth - 1):
            layers.append(nn.Linear(in_dim if i == 0 else hidden, hidden))
            if norm is not None:
                layers.append(nn.BatchNorm1d(hidden) if norm == "batch" else nn.LayerNorm(hidden))
            layers.append(nn.ReLU())
        last = nn.Linear(hidden if depth > 1 else in_dim, out_dim)
        if residual:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, vectors: Tensor) -> Tensor:
        """``(B, D_old) -> (B, D_new)``, in the precision of the transform. Raises ``InputError`` for other sizes."""
        if vectors.ndim != 2 or vectors.shape[1] != self.in_dim:
            raise InputError(
                f"Vectors have shape {tuple(vectors.shape)}; this transform lifts (batch, {self.in_dim}) "
                f"to (batch, {self.out_dim})."
            )
        vectors = vectors.to(next(self.parameters()).dtype)
        lifted: Tensor = self.layers(vectors)
        return vectors + lifted if self.residual else lifted

    def save(self, path: str | Path) -> None:
        """Write weights, settings and direction as one safetensors file."""
        about = json.dumps({**self.settings, "source": self.source, "target": self.target})
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_atomically(path, save(state, metadata={"forward_transform": about}))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What ``save`` wrote, in eval mode and frozen. Raises ``DataError`` for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                about: dict[str, Any] = json.loads((file.metadata() or {})["forward_transform"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            made = cls(**about)
            made.to(state["layers.0.weight"].dtype).load_state_dict(state)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{str(path)!r} is no saved forward transform: {error}") from error
        return made.eval().requires_grad_(False)


class ForwardCompatibleLoss(nn.Module):
    """Alignment of lifted with new vectors, and a discriminative term.

    Args:
        align: ``cosine``: mean of ``1 - cos``; ``mse``: mean squared error of the entries of unit vectors;
            ``mse_raw``: of the vectors as they are (ml-fct).
        disc: ``contrastive``: ``CompatibleContrastiveLoss`` of RACT, without new-to-new negatives and with swapped
            roles (the lifted vector is held against new ones); ``classifier``: cross-entropy of the frozen new
            classifier on the lifted vector; ``both``; ``None``: alignment only.
        temperature: Of the contrastive term, above 0.
        weight: Factor of the discriminative term (lambda_f), at least 0; with ``both``, of the contrastive one.
        classifier_weight: With ``both``: factor of the classifier term, at least 0.
    """

    def __init__(
        self,
        align: Align = "cosine",
        disc: Discriminative | None = "contrastive",
        temperature: float = 0.1,
        weight: float = 1.0,
        *,
        classifier_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if align not in get_args(Align):
            raise InputError(f"align is {align!r}; accepted: {', '.join(get_args(Align))}.")
        if disc not in (None, *get_args(Discriminative)):
            raise InputError(f"disc is {disc!r}; accepted: {', '.join(get_args(Discriminative))}, None.")
        check_above_zero(temperature=temperature)
        check_not_negative(weight=weight, classifier_weight=classifier_weight)
        self.align, self.disc, self.temperature = align, disc, float(temperature)
        self.weight, self.classifier_weight = float(weight), float(classifier_weight)
        self.contrast = CompatibleContrastiveLoss(temperature, topk=None, new_to_new=False)

    def forward(
        self, upgraded: Tensor, new: Tensor, labels: Tensor | None = None, classifier: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            upgraded: ``(B, D_new)``, psi of old vectors.
            new: ``(B, D_new)`` of the same items; no gradient reaches it.
            labels: ``(B,)`` integers, needed by a discriminative term.
            classifier: ``(C, D_new)`` weight, needed by ``classifier`` and ``both``; no gradient reaches it.

        Raises:
            InputError: (a ``ValueError``) Something needed is missing, or shapes do not fit.
            TypeError: Labels are not integers.
        """
        if upgraded.shape != new.shape or upgraded.ndim != 2:
            raise InputError(f"upgraded {tuple(upgraded.shape)} and new {tuple(new.shape)} must be equal (B, D_new).")
        check_batch(upgraded)
        upgraded = full_precision(upgraded)
        new = new.detach().to(upgraded.dtype)
        total = self._alignment(upgraded, new)
        if self.disc is None:
            return total
        if labels is None:
            raise InputError(f"disc = {self.disc!r} needs labels; without labels use disc=None.")
        labels = integer_labels(labels, len(new)).to(new.device)
        if self.disc != "classifier":
            total = total + self.weight * self.contrast(upgraded, new, labels)
        if self.disc != "contrastive":
            if classifier is None:
                raise InputError(f"disc = {self.disc!r} needs the weight of the new classifier.")
            classifier = torch.as_tensor(classifier)
            if classifier.ndim != 2 or classifier.shape[1] != new.shape[1]:
                raise InputError(f"classifier has shape {tuple(classifier.shape)}; (C, {new.shape[1]}) is needed.")
            check_classes(labels, len(classifier))
            factor = self.weight if self.disc == "classifier" else self.classifier_weight
            with torch.autocast(device_type=upgraded.device.type, enabled=False):
                logits = F.linear(upgraded, classifier.detach().to(upgraded.dtype))
                total = total + factor * F.cross_entropy(logits, labels)
        return total

    def _alignment(self, upgraded: Tensor, new: Tensor) -> Tensor:
        if self.align == "cosine":
            return cosine_distance(upgraded, new)
        if self.align == "mse":
            upgraded, new = F.normalize(upgraded), F.normalize(new)
        return (upgraded - new).square().mean()


@torch.inference_mode(False)
def fit_forward_transform(
    old: ArrayLike | Tensor,
    new: ArrayLike | Tensor,
    labels: ArrayLike | Tensor | None = None,
    *,
    hidden: int | None = None,
    depth: int = 2,
    norm: Norm | None = "batch",
    residual: bool = False,
    loss: ForwardCompatibleLoss | None = None,
    classifier: Tensor | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 1024,
    lr: float = 5e-4,
    weight_decay: float = 3.05e-5,
    warmup: float = 5 / 80,
    freeze_norm_after: float = 0.5,
    seed: int = 0,
    source: str = "",
    target: str = "",
) -> ForwardTransform:
    """Train psi with Adam on the vectors of the same items by both encoders, which stay as they are.

    The defaults are those of ml-fct, made for large sets; for some thousand vectors take ``steps=400, lr=3e-3``.

    Args:
        old: ``(N, D_old)``, as they are *stored* (normalised, quantised): psi will be given those.
        new: ``(N, D_new)``.
        labels: ``(N,)`` integers; without them psi learns the alignment only.
        hidden, depth, norm, residual, source, target: Of ``ForwardTransform``.
        loss: Default: cosine, with the contrastive term where there are labels.
        classifier: ``(C, D_new)``, for a loss with the classifier term.
        epochs: Passes over the items; default: 80, but at most 600 steps.
        steps: Number of optimiser steps instead.
        batch_size: Vectors per step.
        lr: Highest learning rate; cosine to 0 after the warm-up.
        weight_decay: Of Adam.
        warmup: Part of the steps in which the learning rate rises, in [0, 1).
        freeze_norm_after: Part of the steps after which batch norm uses its running statistics, in [0, 1].
        seed: Of the first weights and of the order.

    Returns:
        psi in eval mode and frozen.

    Raises:
        InputError: (a ``ValueError``) Row counts that differ, labels missing for the loss, values or settings that
            cannot be used.
    """
    x, y = finite_vectors(old, "old"), finite_vectors(new, "new")
    y = y.to(x.device)
    if len(x) != len(y):
        raise InputError(f"{len(x)} old and {len(y)} new vectors; both of the same items are needed, row by row.")
    classes = labels_of(labels, len(x))
    classes = None if classes is None else classes.to(x.device)
    check_integers(
        batch_size=batch_size, seed=seed, epochs=0 if epochs is None else epochs, steps=0 if steps is None else steps
    )
    check_above_zero(lr=lr)
    check_not_negative(weight_decay=weight_decay)
    loss = loss or ForwardCompatibleLoss(disc=None if classes is None else "contrastive")
    if (epochs is not None and epochs < 0) or (steps is not None and steps < 0) or batch_size < 1:
        raise InputError(
            f"epochs={epochs}, steps={steps}, batch_size={batch_size}; batch_size must be at least 1, the others 0."
        )
    if not (0 <= warmup < 1 and 0 <= freeze_norm_after <= 1):
        raise InputError(f"warmup={warmup}, freeze_norm_after={freeze_norm_after}; parts of 1 are needed.")
    if norm == "batch" and min(len(x), batch_size) < 2:
        raise InputError("Batch norm needs at least 2 vectors in a batch. Use norm='layer' or norm=None.")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        psi = ForwardTransform(x.shape[1], y.shape[1], hidden, depth, norm, residual, source=source, target=target)
    psi.to(x.device)
    if classifier is not None:
        classifier = torch.as_tensor(classifier).to(x.device)
    least = 2 if norm == "batch" else 1
    per_epoch = sum(min(batch_size, len(x) - start) >= least for start in range(0, len(x), batch_size))
    if steps is None:
        steps = min(80 * per_epoch, MAX_STEPS) if epochs is None else epochs * per_epoch
    total = steps
    optimiser = torch.optim.Adam(psi.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    rising = round(warmup * total)
    draws = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    with torch.enable_grad():
        for step in range(total):
            if len(order) < least:
                order = torch.randperm(len(x), generator=draws)
            rows, order = order[:batch_size].to(x.device), order[batch_size:]
            psi.train(step < freeze_norm_after * total)
            done = (step - rising) / max(total - rising, 1)
            factor = (step + 1) / rising if step < rising else (1 + math.cos(math.pi * done)) / 2
            for group in optimiser.param_groups:
                group["lr"] = lr * factor
            value = loss(psi(x[rows]), y[rows], None if classes is None else classes[rows], classifier)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
    return psi.eval().requires_grad_(False)
