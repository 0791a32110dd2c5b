"""The arms of mv-former.toml: embeddings of the frames of videotext:phases, with labels and without."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird.data.fashion_mnist import FashionMnist
from bowerbird.data.videos import read_frames
from bowerbird_videotext.dense_evaluation import frame_retrieval_ap, phase_classification
from bowerbird_videotext.mv_former import (
    LateFusionVideoTransformer,
    LearnableSpatialTokenPooling,
    MultiEntityVideoTransformer,
    ProjectionHead,
)
from bowerbird_videotext.mv_former_config import PhasesConfig, ViewsConfig
from bowerbird_videotext.mv_former_views import two_view_steps
from bowerbird_videotext.phases import PHASES, Phases
from bowerbird_videotext.scl import sequence_contrastive_loss

Values = dict[str, float]
PARTS = {"fit": "train", "test": "test"}


def run(plan: Mapping[str, Any], seed: int) -> Values:
    """``<arm>.accuracy`` of all arms, the same with ``+ 0.03``, and ``<arm>.AP@5`` of those without labels."""
    with tempfile.TemporaryDirectory(prefix="bowerbird-claim-") as folder:
        config = PhasesConfig(root=Path(folder), seed=seed, **plan["videos"])
        sets = {part: Phases.build(config, split) for part, split in PARTS.items()}
        frames = {part: _stacked(_frames, one) for part, one in sets.items()}
        labels = {part: _stacked(Phases.frame_labels, one) for part, one in sets.items()}
    network, accuracy = backbone(seed=seed, size=config.size, sides=config.sprite_size, **plan["backbone"])
    features = mixed(network, frames, seed=seed, **plan["features"])
    values: Values = {"backbone.accuracy": accuracy}
    for arm in plan["arms"]:
        torch.manual_seed(seed)
        model = transformer(features["fit"].shape[-1], arm, plan["network"])
        train = without_labels if arm.get("loss") == "sequence" else with_labels
        settings = {**plan[arm.get("loss", "labels")], **arm.get("set", {})}
        found = train(model, features, labels, seed=seed, **settings)
        values |= {f"{arm['name']}.{key}": value for key, value in found.items()}
        values[f"{arm['name']}.accuracy + 0.03"] = found["accuracy"] + 0.03
    return values


def _stacked(of: Callable[[Phases, int], np.ndarray], dataset: Phases) -> Tensor:
    return torch.from_numpy(np.stack([of(dataset, i) for i in range(len(dataset))]))


def _frames(dataset: Phases, index: int) -> np.ndarray:
    return read_frames(dataset.video(index), np.arange(dataset.config.frames))


# ------------------------------------------------------------------------------------------------ features of frames


def convolutions() -> nn.Sequential:
    """Maps of 64 channels at an eighth of the side."""
    widths = (3, 32, 64, 64)
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        parts += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*parts)


def backbone(
    *, seed: int, size: int, sides: tuple[int, int], items: int, epochs: int, batch_size: int, lr: float
) -> tuple[nn.Module, float]:
    """A network that tells the ten classes of Fashion-MNIST, and its accuracy on test pictures.

    It sees a picture as videos show it: on black, of a sprite's size, anywhere.
    """
    torch.manual_seed(seed)
    generator = np.random.default_rng([seed, 1])
    network, head = convolutions(), nn.Linear(64, 10)
    parameters = [*network.parameters(), *head.parameters()]
    train, test = (FashionMnist.build(None, split) for split in ("train", "test"))
    steps = epochs * (items // batch_size)
    optimizer = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def canvases(dataset: FashionMnist, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        pictures = torch.from_numpy(dataset.images[chosen]).float()[:, None]
        side = int(generator.integers(sides[0], sides[1] + 1))
        small = F.interpolate(pictures, size=(side, side), mode="bilinear", antialias=True)
        canvas = torch.zeros(len(chosen), 1, size, size)
        left, top = generator.integers(size - side + 1, size=(2, len(chosen)))
        for i, (x, y) in enumerate(zip(left.tolist(), top.tolist(), strict=True)):
            canvas[i, :, y : y + side, x : x + side] = small[i]
        labels = torch.tensor(np.asarray(dataset.labels())[chosen])
        return normalized(canvas.expand(-1, 3, -1, -1)), labels

    for _ in range(epochs):
        order = generator.permutation(len(train))[:items]
        for start in range(0, items - batch_size + 1, batch_size):
            pictures, labels = canvases(train, order[start : start + batch_size])
            loss = F.cross_entropy(head(network(pictures).mean(dim=(2, 3))), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.inference_mode():
        pictures, labels = canvases(test, np.arange(1000))
        accuracy = (head(network(pictures).mean(dim=(2, 3))).argmax(dim=1) == labels).double().mean()
    return network, float(accuracy)


def normalized(pictures: Tensor) -> Tensor:
    """Grey values of 0..255 around 0."""
    return (pictures / 255 - 0.1) / 0.3


@torch.inference_mode()
def mixed(
    network: nn.Module, frames: Mapping[str, Tensor], *, seed: int, channels: int, coordinate_scale: float
) -> dict[str, Tensor]:
    """``(videos, T, S, channels)`` of frames ``(videos, T, H, W, 3)``.

    As in a ViT, a patch says where it is: its standardised map and its coordinates go through one fixed random layer.
    """
    maps = {}
    for part, videos in frames.items():
        found = [network(normalized(one.permute(0, 3, 1, 2).float())).flatten(2).transpose(1, 2) for one in videos]
        maps[part] = torch.stack(found)
    mean, std = maps["fit"].mean(dim=(0, 1, 2)), maps["fit"].std(dim=(0, 1, 2)).clamp(min=1e-6)
    side = int(maps["fit"].shape[2] ** 0.5)
    line = torch.linspace(-1, 1, side)
    where = coordinate_scale * torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1).view(-1, 2)
    torch.manual_seed(seed + 1)
    layer = nn.Linear(maps["fit"].shape[-1] + 2, channels)
    return {
        part: F.relu(layer(torch.cat([(one - mean) / std, where.expand(*one.shape[:2], -1, -1)], dim=-1))).clone()
        for part, one in maps.items()
    }


# ------------------------------------------------------------------------------------------------ arms


def transformer(channels: int, arm: Mapping[str, Any], settings: Mapping[str, Any]) -> MultiEntityVideoTransformer:
    rest = {key: value for key, value in settings.items() if key != "pool_channels"}
    if "pool" in arm:
        return LateFusionVideoTransformer(arm["pool"], channels, **rest)
    pooling = LearnableSpatialTokenPooling(channels, settings["pool_channels"], arm["entities"])
    return MultiEntityVideoTransformer(pooling, entity_one_hot="pool", reduction="one", **rest)


def with_labels(
    model: MultiEntityVideoTransformer,
    features: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    *,
    seed: int,
    steps: int,
    clips: int,
    lr: float,
) -> Values:
    """Cross-entropy of the state of every frame; ``accuracy`` on the frames of other videos."""
    generator = np.random.default_rng([seed, 2])
    head = nn.Linear(model.embedding_dim, len(PHASES))
    optimizer, schedule = _optimizer([*model.parameters(), *head.parameters()], lr, steps)
    model.train()
    for _ in range(steps):
        chosen = generator.permutation(len(features["fit"]))[:clips]
        logits = head(model(features["fit"][chosen]))
        loss = F.cross_entropy(logits.flatten(0, 1), labels["fit"][chosen].flatten())
        _step(loss, model, optimizer, schedule)
    model.eval()
    with torch.inference_mode():
        found = torch.cat([head(model(part)).argmax(dim=-1) for part in features["test"].split(10)])
    return {"accuracy": float((found == labels["test"]).double().mean())}


def without_labels(
    model: MultiEntityVideoTransformer,
    features: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    *,
    seed: int,
    steps: int,
    clips: int,
    lr: float,
    frames: int,
    variance: float,
) -> Values:
    """Sequence contrastive loss; ``accuracy`` of a classifier on the frozen embeddings, and ``AP@5``."""
    generator = np.random.default_rng([seed, 3])
    head = ProjectionHead(model.embedding_dim)
    optimizer, schedule = _optimizer([*model.parameters(), *head.parameters()], lr, steps)
    views, length = ViewsConfig(region_of="frames"), features["fit"].shape[1]
    model.train()
    for _ in range(steps):
        chosen = generator.permutation(len(features["fit"]))[:clips].tolist()
        drawn = [two_view_steps(length, frames, generator, views) for _ in chosen]
        times = torch.from_numpy(np.stack([one for one, _ in drawn]))
        valid = torch.from_numpy(np.stack([one for _, one in drawn]))
        shown = torch.stack([features["fit"][i][time] for i, time in zip(chosen, times, strict=True)])
        z = F.normalize(head(model(shown.flatten(0, 1), valid.flatten(0, 1))), dim=-1).unflatten(0, (-1, 2))
        lengths = torch.full((clips, 2), length)
        _step(sequence_contrastive_loss(z, times, lengths, valid, variance=variance), model, optimizer, schedule)
    model.eval()
    with torch.inference_mode():
        embeddings = {
            part: [F.normalize(model(one[None])[0], dim=-1).numpy() for one in videos]
            for part, videos in features.items()
        }
    phases = {part: list(one.numpy()) for part, one in labels.items()}
    accuracy = phase_classification(embeddings["fit"], phases["fit"], embeddings["test"], phases["test"])
    return {"accuracy": accuracy.validation, "AP@5": frame_retrieval_ap(embeddings["test"], phases["test"], (5,))[5]}


def _optimizer(parameters: list[nn.Parameter], lr: float, steps: int) -> tuple[Any, Any]:
    optimizer = torch.optim.Adam(parameters, lr, weight_decay=1e-5)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))


def _step(loss: Tensor, model: nn.Module, optimizer: Any, schedule: Any) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()
    schedule.step()
