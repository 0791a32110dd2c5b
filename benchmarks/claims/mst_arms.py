"""The arms of mst on canvases with one item: where masks fall, whether attention finds the item, dense features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from pretraining_arms import Pretrained, Values, World, dataset, measure, pictures, pretrain, untrained
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from bowerbird.data import subset
from bowerbird.protocols import Dataset
from bowerbird_mim.data.canvases import Canvases, CanvasesConfig
from bowerbird_mim.mst import attention_guided_mask, tokens_and_class_attention
from bowerbird_mim.vit import vit_of

Array = np.ndarray
TRAIN, TEST = 300, 1000  # canvases of the dense probe, and of all measures


def on_object(items: Dataset, grid: tuple[int, int], count: int) -> Array:
    """bool ``(count, L)``: patches of the whole canvas that overlap the item's box."""
    rows, columns = grid
    found = np.zeros((count, rows, columns), bool)
    for i in range(count):
        item = items[i]
        width, height = item["image"].size
        left, top, right, bottom = item["boxes"][0]
        x0, x1 = int(left * columns / width), int(np.ceil(right * columns / width))
        y0, y1 = int(top * rows / height), int(np.ceil(bottom * rows / height))
        found[i, y0:y1, x0:x1] = True
    return found.reshape(count, -1)


@torch.no_grad()
def where(made: Pretrained, world: World, low_fraction: float) -> Values:
    """Of the teacher, on whole test canvases.

    ``auc``: how well its class attention tells patches on the item from others, mean over canvases; ``hidden``: the
    share of the least attended patches (MST's candidates) that overlap the item; ``chance``: of all patches;
    ``dense``: AUC of a logistic regression on patch tokens that tells them apart.
    """
    vit = vit_of(made.encoder, "mst").eval()
    images = pictures(vit, world.test)[:TEST]
    parts = [tokens_and_class_attention(vit, chunk) for chunk in images.split(256)]
    tokens, scores = (torch.cat(list(both)) for both in zip(*parts, strict=True))
    truth = on_object(world.test, vit.grid, TEST)
    hidden = attention_guided_mask(scores, low_fraction, 1.0).numpy()
    few = pictures(vit, world.train)[:TRAIN]
    train_x = vit.tokens(few)[:, 1:].flatten(0, 1).numpy()
    scaler = StandardScaler().fit(train_x)
    probe = LogisticRegression(max_iter=500).fit(
        scaler.transform(train_x), on_object(world.train, vit.grid, TRAIN).ravel()
    )
    dense = probe.decision_function(scaler.transform(tokens[:, 1:].flatten(0, 1).numpy()))
    return {
        "auc": float(np.mean([roc_auc_score(t, s) for t, s in zip(truth, scores.numpy(), strict=True)])),
        "hidden": float(truth[hidden].mean()),
        "chance": float(truth.mean()),
        "dense": float(roc_auc_score(truth.ravel(), dense)),
    }


class BlackCanvases:
    """Items of 28 pixels at random places of black canvases, with a box around what is not black."""

    def __init__(self, source: Dataset, side: int, seed: int) -> None:
        self.source, self.side, self.seed, self.classes = source, side, seed, source.classes

    def __len__(self) -> int:
        return len(self.source)

    @property
    def item_ids(self) -> Sequence[str]:
        return self.source.item_ids

    def labels(self) -> Sequence[int]:
        return self.source.labels()

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.source[index]
        picture = item["image"]
        left, top = np.random.default_rng([self.seed, index]).integers(0, self.side - np.array(picture.size) + 1)
        canvas = Image.new("RGB", (self.side, self.side))
        canvas.paste(picture, (int(left), int(top)))
        bright = np.asarray(picture.convert("L")) > 25
        rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
        box = [left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1]
        return {**item, "image": canvas, "boxes": np.array([box], np.float32)}


def make_world(seed: int, *, train: int, labelled: int, test: int, black: bool, **settings: Any) -> World:
    """Canvases around random items of Fashion-MNIST, drawn by the seed.

    Args:
        black: Black canvases; else ``mim:canvases``, whose settings are ``settings``.
    """
    generator = np.random.default_rng(seed)

    def canvases(split: str, count: int) -> Any:
        source = dataset("core:fashion-mnist", split)
        chosen = subset(source, generator.permutation(len(source))[:count])
        if black:
            return BlackCanvases(chosen, settings["canvas_size"], seed)
        return Canvases(chosen, CanvasesConfig(seed=seed, **settings))

    return World(canvases("train", train), canvases("train", labelled), canvases("test", test))


def run(plan: Mapping[str, Any], seed: int) -> Values:
    worlds = {black: make_world(seed, black=black, **plan["canvases"]) for black in (True, False)}
    values: Values = {"half": 0.5}
    for arm in plan["arms"]:
        world = worlds[not arm.get("textured", False)]
        make = untrained if arm.get("random") else pretrain
        made = make(plan["recipe"], world.unlabelled, seed, arm.get("set"))
        found = measure(made.encoder, world, seed=seed, kind="pooled", finetune_steps=0)
        found |= where(made, world, plan["mechanism"]["low_fraction"])
        values |= {f"{arm['name']}.{key}": value for key, value in found.items()}
    return values
