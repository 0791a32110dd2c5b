"""The arms of miles.toml: retrieval, how near patches are to words, and how well hidden patches are restored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from moving_arms import Clips, Trained, Values, measured_arms, text_vectors
from torch import Tensor
from torch.nn.functional import normalize

from bowerbird.data.videos import frame_indices
from bowerbird.train.checkpoint import latest_checkpoint, load_checkpoint
from bowerbird_videotext.miles import MILESObjective, masked_feature_regression, tube_block_mask

BATCH = 64


def run(plan: Mapping[str, Any], seed: int) -> Values:
    return measured_arms(plan, seed, measures)


def measures(name: str, made: Trained, test: Clips) -> Values:
    return {"aligned": alignment(made.loaded.module, test), **restored(made, test)}


@torch.no_grad()
def alignment(module: Any, test: Clips) -> float:
    """Mean over the sprites of all videos: cosine with their name of the patches on them, less of those off them.

    A patch is on a sprite if its centre is in the sprite's box.
    """
    frames = frame_indices(test.videos.shape[1], module.frames)
    rows, columns = module.video_encoder.grid
    side = test.videos.shape[2] / rows
    x, y = ((torch.arange(count) + 0.5) * side for count in (columns, rows))
    differences: list[float] = []
    for start in range(0, len(test), BATCH):
        chosen = range(start, min(start + BATCH, len(test)))
        _, patches = module.encode_video(test.batch(module, chosen), return_tokens=True)  # (B, T, N, P)
        for clip, index in zip(normalize(patches, dim=-1), chosen, strict=True):
            actors, boxes = test.dataset.actors(index), test.dataset.boxes(index)
            names = normalize(text_vectors(module, [actor.named for actor in actors]), dim=-1)
            for k, vector in enumerate(names):
                on = inside(torch.from_numpy(boxes[frames, k]), x, y)
                cosines = clip @ vector
                if on.any() and not on.all():
                    differences.append(float(cosines[on].mean() - cosines[~on].mean()))
    return sum(differences) / len(differences)


def inside(boxes: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """bool ``(T, N)``: whether the places ``y`` by ``x``, row by row, are in the boxes ``(T, 4)`` of their frames."""
    across = (x >= boxes[:, :1]) & (x < boxes[:, 2:3])
    down = (y >= boxes[:, 1:2]) & (y < boxes[:, 3:])
    return (down[:, :, None] & across[:, None, :]).flatten(1)


@torch.no_grad()
def restored(made: Trained, test: Clips) -> Values:
    """Of runs with masks: the regression on held-out clips, with their targets and with shuffled ones."""
    checkpoint = latest_checkpoint(made.folder / "checkpoints")
    assert checkpoint is not None
    state = load_checkpoint(checkpoint).objective
    if not any(key.startswith("snapshot.") for key in state):
        return {}
    objective = MILESObjective(copy.deepcopy(made.loaded.module))  # type: ignore[arg-type]
    objective.load_state_dict(state)
    objective.eval()
    encoder, generator = objective.encoder, torch.Generator().manual_seed(0)
    video = test.batch(encoder)
    mask = tube_block_mask(len(video), encoder.video_encoder.grid, video.shape[1], 0.25, generator)
    _, patches = encoder.encode_video(video, mask=mask, return_tokens=True)
    targets: Any = objective.snapshot(video, mask)
    order = torch.randperm(len(targets), generator=generator)
    return {
        "masked": float(masked_feature_regression(patches[mask], targets)),
        "shuffled": float(masked_feature_regression(patches[mask], targets[order])),
    }
