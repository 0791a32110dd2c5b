"""Train on short videos with captions, then search: what the claims of videotext-plugins have in common.

A method's ``<slug>_arms.py`` holds ``run(plan, seed) -> values`` and uses these functions. The simplest is

    def run(plan, seed):
        return measured_arms(plan, seed)

with a plan of this form (keys of an arm's ``set`` are those of ``bowerbird train --set``):

    [recipe]                                    # as in a recipe file; the data set and the seeds are filled in
    encoder = { use = "videotext:dual-encoder", image_size = 32, patch_size = 8, ... }
    objective = { use = "videotext:frozen" }
    train = { epochs = 8, batch_size = 32, lr = 1e-3, warmup = 0.1 }
    [data]                                      # optional; settings of videotext:moving
    counts = { train = 3000, test = 256 }
    [[arms]]
    name = "frozen"
    [[arms]]
    name = "space"
    set = { "encoder.temporal_attention" = false }

The seed sets words, sprites and motions, the first weights, the order of batches and what is drawn in training. Videos
are written as files and decoded by the library once; every arm reads the frames from memory. Everything but the seconds
is a function of plan and seed. Torch runs on one thread (``run.py``).
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bowerbird.data.videos import frame_indices, prepare_clip, read_frames, video_info
from bowerbird.encoders import LoadedEncoder, load_encoder
from bowerbird.recipe import resolve_recipe
from bowerbird.train.loop import train
from bowerbird_videotext import transforms
from bowerbird_videotext.data_configs import MovingConfig
from bowerbird_videotext.losses import cosine_similarity_matrix
from bowerbird_videotext.moving import Actor, Moving, caption
from bowerbird_videotext.video_retrieval import recall_summary, retrieval_ranks

Values = dict[str, float]
DATA: dict[str, Any] = {"counts": {"train": 3000, "val": 1, "test": 256}}


# ------------------------------------------------------------------------------------------------------------ clips


@dataclass(frozen=True)
class Clips:
    """A split in memory.

    Attributes:
        dataset: Where words, boxes and paths are.
        videos: uint8 ``(V, F, H, W, 3)``, every frame of every file as it was decoded.
        captions: Of every video.
    """

    dataset: Moving
    videos: NDArray[np.uint8]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, module: Any, rows: Sequence[int] | slice = slice(None)) -> Tensor:
        """The ``video`` key for an encoder, frames drawn uniformly: float32 ``(B, T, 3, H, W)``."""
        chosen = frame_indices(self.videos.shape[1], module.frames)
        frames = self.videos[rows][:, chosen]
        clips = [
            prepare_clip([Image.fromarray(frame) for frame in clip], module.preprocessing, module.frames)
            for clip in frames
        ]
        return torch.from_numpy(np.stack(clips))


def clips(split: str, seed: int, data: Mapping[str, Any] | None = None) -> Clips:
    """A split of ``videotext:moving``, written where it was not there, decoded once.

    Args:
        split: ``train`` or ``test``; their sprites are different.
        seed: Of words, sprites and motions.
        data: Settings of ``videotext:moving`` over ``DATA``.
    """
    return _clips(split, seed, json.dumps(dict(data or {}), sort_keys=True))


@cache
def _clips(split: str, seed: int, data: str) -> Clips:
    dataset = Moving.build(MovingConfig(**{**DATA, **json.loads(data), "seed": seed}), split)
    paths = [dataset.video(i) for i in range(len(dataset))]
    videos = np.stack([read_frames(path, range(video_info(path).frames)) for path in paths])
    return Clips(dataset, videos, [dataset.captions(i)[0] for i in range(len(dataset))])


@contextmanager
def read_from_memory(kept: Clips) -> Iterator[None]:
    """Within it training takes the frames of ``kept`` from memory: same frames, same draws, nothing decoded."""
    place = {kept.dataset.video(i): i for i in range(len(kept))}

    def read_clip(source: str, frames: int, **how: Any) -> list[Image.Image]:
        video = kept.videos[place[source]]
        return [Image.fromarray(video[i]) for i in frame_indices(len(video), frames, **how)]

    with patch.object(transforms, "read_clip", read_clip):
        yield


# ------------------------------------------------------------------------------------------------------------- arms


@dataclass(frozen=True)
class Trained:
    """``seconds``: processor time of the run; ``log``: what the run wrote, one entry per logged step."""

    loaded: LoadedEncoder
    seconds: float
    log: list[dict[str, Any]]
    folder: Path


Measure = Callable[[str, Trained, Clips], Values]


def measured_arms(plan: Mapping[str, Any], seed: int, measure: Measure | None = None) -> Values:
    """``<arm>.<value>`` of every arm: those of ``retrieval`` and ``motion``, ``seconds``, and those of ``measure``.

    ``measure`` gets the arm's name, its run (whose folder is still there) and the test split.
    """
    data = plan.get("data", {})
    kept, test = clips("train", seed, data), clips("test", seed, data)
    values: Values = {}
    with tempfile.TemporaryDirectory(prefix="bowerbird-claim-") as folder, read_from_memory(kept):
        for arm in plan["arms"]:
            made = trained(plan["recipe"], seed, Path(folder, arm["name"]), arm.get("set", {}), data)
            found = {"seconds": made.seconds, **retrieval(made.loaded, test), **motion(made.loaded, test)}
            if measure is not None:
                found |= measure(arm["name"], made, test)
            values |= {f"{arm['name']}.{key}": value for key, value in found.items()}
    return values


def trained(
    recipe: Mapping[str, Any],
    seed: int,
    folder: Path,
    overrides: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> Trained:
    """``bowerbird train`` on ``videotext:moving`` with ``overrides`` of its settings."""
    complete = copy.deepcopy(dict(recipe))
    complete.setdefault("name", "claim")
    complete["dataset"] = {"use": "videotext:moving", "split": "train", **copy.deepcopy({**DATA, **(data or {})})}
    settings = {"dataset.seed": seed, "train.seed": seed, "train.device": "cpu", **(overrides or {})}
    texts = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    start = time.process_time()
    train(resolve_recipe(complete, "plan", texts), folder)
    seconds = time.process_time() - start
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Trained(load_encoder(folder, device="cpu"), seconds, log, folder)


# ---------------------------------------------------------------------------------------------------------- measures


@torch.no_grad()
def video_vectors(module: Any, test: Clips) -> Tensor:
    """``(V, P)`` of an encoder with ``encode_video``, or of any encoder of videos."""
    rows = [slice(start, start + 64) for start in range(0, len(test), 64)]
    return torch.cat([module({"video": test.batch(module, row)}).pooled for row in rows])


@torch.no_grad()
def text_vectors(module: Any, texts: Sequence[str]) -> Tensor:
    """``(Q, P)``."""
    parts = [texts[start : start + 256] for start in range(0, len(texts), 256)]
    return torch.cat([module({"text": module.tokenize(list(part))}).pooled for part in parts])


def retrieval(loaded: LoadedEncoder, test: Clips) -> Values:
    """Texts search videos: ``R@1``, ``R@5``, ``R@10`` in percent, ``MeanR``; ``chance``, the R@1 of a guess; and
    ``v2t R@1``, videos search texts."""
    similarity = cosine_similarity_matrix(
        text_vectors(loaded.module, test.captions), video_vectors(loaded.module, test)
    )
    owner = torch.arange(len(test))
    found = recall_summary(retrieval_ranks(similarity, owner, "t2v"))
    back = recall_summary(retrieval_ranks(similarity, owner, "v2t"))
    kept = {key: found[key] for key in ("R@1", "R@5", "R@10", "MeanR")}
    return {**kept, "v2t R@1": back["R@1"], "chance": 100 / len(test)}


def motion(loaded: LoadedEncoder, test: Clips) -> Values:
    """``verb``: how often, in percent, a video's caption is nearer than those with another verb for its first sprite;
    ``verb chance``. Nothing without verbs."""
    verbs = test.dataset.verbs
    if len(verbs) < 2:
        return {}
    options = []
    for i in range(len(test)):
        first, *others = test.dataset.actors(i)
        said = [first.verb, *(verb for verb in verbs if verb != first.verb)]
        options += [caption([Actor(first.colour, first.noun, verb), *others]) for verb in said]
    texts = text_vectors(loaded.module, options).unflatten(0, (len(test), len(verbs)))
    scores = torch.cosine_similarity(texts, video_vectors(loaded.module, test)[:, None], dim=-1)
    right = scores[:, 0] > scores[:, 1:].amax(dim=1)
    return {"verb": 100 * float(right.float().mean()), "verb chance": 100 / len(verbs)}
