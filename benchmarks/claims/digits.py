"""The small world of the claims: scikit-learn's 8x8 digits made hard, small networks, metrics.

The digits as they are would be too easy (1-NN on pixels: 0.98): every image is shifted by up to one pixel and gets
noise, drawn once, so that old and new encoders see the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bowerbird.retrieval.metrics import RankedList, Relevance, average_precision, cmc


@dataclass(frozen=True)
class World:
    """Disjoint parts: images float32 ``(n, 64)`` and labels. ``old`` marks the training images the old model had,
    ``gallery_inverted`` the gallery images of inverted contrast."""

    train: Tensor
    train_labels: Tensor
    old: Tensor
    queries: Tensor
    query_labels: Tensor
    gallery: Tensor
    gallery_labels: Tensor
    gallery_inverted: Tensor


def make_world(
    seed: int,
    *,
    noise: float,
    queries: int,
    gallery: int,
    old_share: float = 1.0,
    old_classes: int = 10,
    inverted: float = 0.0,
) -> World:
    """Splits and disturbs the digits.

    Args:
        seed: Of the split, the shifts and the noise.
        noise: Standard deviation; pixels are in 0..1.
        queries, gallery: Sizes; what remains is for training.
        old_share: Share of the training images that the old model sees.
        old_classes: It sees only the first so many classes.
        inverted: Share of all images whose contrast is inverted; the old model sees none of them.
    """
    rng = np.random.default_rng(seed)
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 8, 8) / 16.0
    shifts = rng.integers(-1, 2, size=(len(images), 2))
    images = np.stack([np.roll(image, tuple(shift), axis=(0, 1)) for image, shift in zip(images, shifts, strict=True)])
    images = (images + noise * rng.standard_normal(images.shape)).reshape(len(images), 64)
    x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64)
    order = torch.tensor(rng.permutation(len(x)))
    q, g, t = order[:queries], order[queries : queries + gallery], order[queries + gallery :]
    turned = torch.tensor(rng.random(len(x)) < inverted)
    x[turned] = 1 - x[turned]
    old = (torch.arange(len(t)) < round(old_share * len(t))) & (y[t] < old_classes) & ~turned[t]
    return World(x[t], y[t], old, x[q], y[q], x[g], y[g], turned[g])


def mlp(width: int, embed_dim: int, seed: int) -> nn.Sequential:
    """Two hidden layers of ``width`` and a linear embedding."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs in (64, width):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, embed_dim))


def train(
    encoder: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    classes: int = 10,
    extra: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    before_epoch: Callable[[int], object] | None = None,
) -> tuple[nn.Module, nn.Linear]:
    """Softmax training with Adam; returns encoder and classifier. ``extra(embeddings, labels, positions)`` is added."""
    torch.manual_seed(seed)
    classifier = nn.Linear(encoder(images[:1]).shape[1], classes)

    def loss(chosen: Tensor) -> Tensor:
        embeddings = encoder(images[chosen])
        total = F.cross_entropy(classifier(embeddings), labels[chosen])
        return total if extra is None else total + extra(embeddings, labels[chosen], chosen)

    minimise(
        loss, [encoder, classifier], len(images), epochs=epochs, lr=lr, batch_size=batch_size, before_epoch=before_epoch
    )
    return encoder.eval(), classifier


def minimise(
    loss: Callable[[Tensor], Tensor],
    modules: Sequence[nn.Module],
    count: int,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    before_epoch: Callable[[int], object] | None = None,
) -> None:
    """Adam on ``loss(positions)`` over the parameters of ``modules``; ``count`` items, shuffled in every epoch."""
    optimiser = torch.optim.Adam([p for module in modules for p in module.parameters()], lr=lr)
    for epoch in range(epochs):
        if before_epoch is not None:
            before_epoch(epoch)
        for chosen in torch.randperm(count).split(batch_size):
            total = loss(chosen)
            optimiser.zero_grad()
            total.backward()
            optimiser.step()


@torch.no_grad()
def unit(encoder: nn.Module, images: Tensor) -> np.ndarray:
    return F.normalize(encoder(images)).numpy()


def ranking_metrics(ids: np.ndarray, world: World) -> Mapping[str, np.ndarray]:
    """Per query: average precision and whether the first hit is right. ``ids`` ``(Q, N)``, best first."""
    relevant = Relevance.from_labels(world.query_labels.numpy(), world.gallery_labels.numpy())
    ranked = RankedList(ids)
    return {"ap": average_precision(ranked, relevant).values, "right": cmc(ranked, relevant, 1).values}


def mean_ap(queries: np.ndarray, gallery: np.ndarray, world: World) -> float:
    """mAP of cosine search."""
    ids = np.argsort(-(queries @ gallery.T), axis=1, kind="stable")
    return float(np.mean(ranking_metrics(ids, world)["ap"]))


def settings(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``train`` that a plan fixes."""
    return {key: plan["train"][key] for key in ("epochs", "lr", "batch_size")}
