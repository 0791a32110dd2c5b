"""The arms of univip.toml: pre-training on canvases of several items, then what single items are."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from pretraining_arms import (
    Pretrained,
    Values,
    World,
    dataset,
    features_of,
    measure,
    pictures,
    pretrain,
    register,
    untrained,
)
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data import subset
from bowerbird.data.images import Preprocessing
from bowerbird.hookspecs import hookimpl
from bowerbird.protocols import Dataset, Encoder, Features
from bowerbird.records import EncoderRecord
from bowerbird_mim.data.canvases import Canvases, CanvasesConfig
from bowerbird_mim.univip import (
    TERMS,
    SceneViews,
    UniVIPObjective,
    instance_transport_loss,
    sample_overlapping_scenes,
)

BOWERBIRD_API = "1.0"
PLUGIN = "univip-claims"


class ConvEncoder(Encoder):
    """Four convolutions of stride 2 with batch norm and ReLU, global mean: D = 64, pictures of 48 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.preprocessing = 64, Preprocessing(size=48)
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 32), (32, 64), (64, 64), (64, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    @classmethod
    def build(cls, config: None) -> Self:
        return cls()

    def forward(self, batch: Batch) -> Features:
        return Features(pooled=self.layers(batch["image"]).mean(dim=(2, 3)))


@hookimpl
def bowerbird_encoders() -> Iterator[EncoderRecord]:
    yield EncoderRecord(name=f"{PLUGIN}:conv", target=f"{__name__}:ConvEncoder", summary="Four convolutions.")


class Kept(Dataset):
    """Items of another data set, made once: a canvas takes longer than its views."""

    def __init__(self, items: Dataset) -> None:
        self.items, self.classes, self.ids = [items[i] for i in range(len(items))], items.classes, items.item_ids

    @classmethod
    def build(cls, config: Any, split: str | None) -> Self:
        raise TypeError("made from another data set")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    @property
    def item_ids(self) -> Sequence[str]:
        return self.ids


def run(plan: Mapping[str, Any], seed: int) -> Values:
    """``<arm>.<metric>``: see the plan. The seed sets the canvases, every first weight and every crop."""
    register(PLUGIN, sys.modules[__name__])
    world, held_out = make_worlds(seed, **plan["canvases"])
    values: Values = {"chance": 1 / plan["recipe"]["objective"]["num_instances"]}
    for arm in plan["arms"]:
        made = (untrained if arm.get("random") else pretrain)(plan["recipe"], world.unlabelled, seed, arm.get("set"))
        found = measure(made.encoder, world, seed=seed, kind="pooled", finetune_steps=0)
        found |= {"mAP": mean_average_precision(made.encoder, world)} | matching(made, held_out, seed)
        values |= {f"{arm['name']}.{key}": value for key, value in found.items()}
    return values


def make_worlds(seed: int, *, train: int, labelled: int, test: int, **settings: Any) -> tuple[World, Dataset]:
    """Canvases of ``train`` training items, single items cut out of others for the probe, held-out canvases.

    Args:
        labelled, test: Number of canvases whose items have labels, and are classified.
        settings: Of ``mim:canvases``.
    """
    generator = np.random.default_rng(seed)

    def canvases(split: str, count: int, **more: Any) -> Dataset:
        """``count`` canvases, or five items each of them; companions come from six times as many items."""
        source = dataset("core:fashion-mnist", split)
        chosen = subset(source, generator.permutation(len(source))[: 6 * count])
        made = Canvases(chosen, CanvasesConfig(seed=seed, **settings, **more))
        return Kept(subset(made, range(5 * count if more else count)))

    return World(
        unlabelled=canvases("train", train),
        train=canvases("train", labelled, part="items"),
        test=canvases("test", test, part="items"),
    ), canvases("test", 300)


def mean_average_precision(encoder: Encoder, world: World) -> float:
    """Test items as queries among the labelled ones, by cosine; the same class is right."""
    features = [F.normalize(torch.from_numpy(features_of(encoder, pictures(encoder, part), "pooled")), dim=1)
                for part in (world.test, world.train)]  # fmt: skip
    labels = [np.asarray(part.labels()) for part in (world.test, world.train)]
    order = (features[0] @ features[1].T).argsort(dim=1, descending=True).numpy()
    right = labels[1][order] == labels[0][:, None]
    precision = right.cumsum(axis=1) / np.arange(1, right.shape[1] + 1)
    return float(((precision * right).sum(axis=1) / right.sum(axis=1)).mean())


@torch.no_grad()
def matching(made: Pretrained, canvases: Dataset, seed: int) -> Values:
    """How often the plan sends most of an online instance to the same instance, shuffled on the target side.

    ``matching``: both networks see the same view, as in training; ``matching views``: each has its own random view.
    """
    objective = made.objective.eval()
    assert isinstance(objective, UniVIPObjective) and made.encoder.preprocessing is not None
    model, config = objective.model, objective.views.config.model_copy(update={"terms": TERMS})
    views, count = SceneViews(made.encoder.preprocessing, config), config.num_instances
    assert views.proposals is not None
    drawn = []
    for i in range(len(canvases)):
        item, rng = canvases[i], np.random.default_rng([seed, i])
        image = item["image"]
        boxes, scale = views.proposals(item), config.crop_scale
        pair = sample_overlapping_scenes(image.size, boxes, count, config.tries, rng, scale=scale, **views.limits)
        seen = zip(views.scenes, (pair.crop1, pair.crop2), strict=True)
        scenes = np.stack([view.of_box(image, crop, rng) for view, crop in seen])
        cut = [np.stack([views.instances.of_box(image, tuple(box), rng) for box in pair.boxes.tolist()]) for _ in "12"]
        drawn.append((scenes, *cut))
    scenes, first, second = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
    order = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(i)) for i in range(len(drawn))])

    def online(images: Tensor) -> Tensor:
        return model.predictor(model.online(images.flatten(0, 1))).unflatten(0, images.shape[:2])

    def target(images: Tensor) -> Tensor:
        return model.target(images.flatten(0, 1)).unflatten(0, images.shape[:2])

    values = {}
    for name, other in (("matching", first), ("matching views", second)):
        shuffled = other.gather(1, order[..., None, None, None].expand_as(other))
        _, plan = instance_transport_loss(online(first), target(shuffled), online(scenes), target(scenes))
        values[name] = float((order.gather(1, plan.argmax(dim=2)) == torch.arange(count)).float().mean())
    return values
