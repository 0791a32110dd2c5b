"""``videotext:dense``: what an encoder's embeddings of single frames say about the phases of actions.

T frames of a video, P width of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bowerbird.data.videos import read_frames, video_info
from bowerbird.errors import InputError
from bowerbird.protocols import Dataset, Encoder, EvalContext, Evaluator, Metrics
from bowerbird_videotext.dense_evaluation import (
    labelled,
    linear_classifier,
    pair_taus,
    phase_classifier,
    phase_progression,
    retrieval_shares,
)
from bowerbird_videotext.mv_former_config import DenseConfig
from bowerbird_videotext.mv_former_views import prepared
from bowerbird_videotext.phases import frame_labels
from bowerbird_videotext.video_set import video_text_set


@dataclass(frozen=True)
class _Videos:
    """Of every video its embeddings ``(T, P)`` and phases ``(T,)``, frames without a phase left out, and its class."""

    embeddings: Sequence[NDArray[np.float32]]
    phases: Sequence[NDArray[np.int64]]
    classes: NDArray[np.int64]

    def of(self, action: int) -> _Videos:
        chosen = np.flatnonzero(self.classes == action).tolist()
        return _Videos([self.embeddings[i] for i in chosen], [self.phases[i] for i in chosen], self.classes[chosen])


class DenseEvaluation(Evaluator):
    """Every action (class of the videos) by itself; a number is the mean over actions.

    ``accuracy`` (percent of the frames whose phase a linear classifier finds), ``progression`` (R^2), ``tau``
    (Kendall's, -1 to 1), ``AP@K`` (percent of the K nearest frames of other videos that are of the same phase);
    ``actions`` and ``videos`` count. Videos that lack a phase have no progression; ``without_progression`` counts them.
    Per query, that is per video of ``split``: ``accuracy``, ``tau`` (mean over the other videos) and ``AP@K``.

    An encoder with ``embed_frames`` embeds the frames of a video together. Others embed every frame as a picture, or as
    a video of one frame.
    """

    def __init__(self, config: DenseConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: DenseConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """Raises ``InputError`` for data sets whose frames have no phases, and actions that cannot be measured."""
        c = self.config
        measured = self._videos(context, c.split)
        fits = {"classification", "progression"} & set(c.measures)
        fitted = self._videos(context, c.train_split) if fits else None
        actions = np.unique(measured.classes).tolist()
        values: dict[str, list[float]] = {}
        per_query: dict[str, NDArray[np.float64]] = {}
        left_out = 0
        for action in actions:
            rows = np.flatnonzero(measured.classes == action)
            test = measured.of(action)
            try:
                found = self._compared(test)
                if fitted is not None:
                    train = fitted.of(action)
                    if "classification" in c.measures:
                        found["accuracy"] = self._accuracy(train, test)
                    if "progression" in c.measures:
                        score, lacking = progression(train, test)
                        values.setdefault("progression", []).append(score)
                        left_out += lacking
            except InputError as error:
                raise InputError(f"videotext:dense, {c.dataset!r}, action {action}: {error}") from error
            for name, shares in found.items():
                values.setdefault(name, []).append(float(np.nanmean(shares)) if np.isfinite(shares).any() else np.nan)
                per_query.setdefault(name, np.full(len(measured.phases), np.nan))[rows] = shares
        summary = {name: float(np.mean(of_actions)) for name, of_actions in values.items()}
        counts = {"actions": float(len(actions)), "videos": float(len(measured.phases))}
        if "progression" in c.measures:
            counts["without_progression"] = float(left_out)
        return Metrics({**summary, **counts}, per_query)

    def _compared(self, test: _Videos) -> dict[str, NDArray[np.float64]]:
        """What needs no training, of every video."""
        c, found = self.config, {}
        if "tau" in c.measures:
            taus = pair_taus(test.embeddings, stride=c.stride)
            known = np.isfinite(taus)
            found["tau"] = np.where(
                known.any(axis=1), np.where(known, taus, 0).sum(axis=1) / known.sum(axis=1).clip(1), np.nan
            )
        if "retrieval" in c.measures:
            shares = retrieval_shares(test.embeddings, test.phases, c.ks, stride=c.stride)
            found |= {f"AP@{k}": 100 * values for k, values in shares.items()}
        return found

    def _accuracy(self, train: _Videos, test: _Videos) -> NDArray[np.float64]:
        c = self.config
        if c.classifier == "sgd":
            classify = linear_classifier(
                train.embeddings, train.phases, epochs=c.epochs, lr=c.lr, weight_decay=c.weight_decay,
                batch_videos=c.batch_videos, seed=c.seed,
            )  # fmt: skip
        else:
            classify = phase_classifier(train.embeddings, train.phases, c=c.c)
        right = [classify(x) == y for x, y in zip(test.embeddings, test.phases, strict=True)]
        return np.array([100 * one.mean() for one in right])

    def _videos(self, context: EvalContext, split: str) -> _Videos:
        c = self.config
        dataset: Dataset = context.dataset(c.dataset, split=split, **c.settings)
        videos, positions = video_text_set(dataset, "videotext:dense")
        labels = videos.labels() if videos.classes else [0] * len(videos)
        embeddings, phases = [], []
        for position in positions:
            of_frames = frame_labels(videos, position, "videotext:dense")
            source = videos.video(position)
            length = video_info(source).frames
            if len(of_frames) != length:
                raise InputError(
                    f"{videos.where(position)}: {source!r} has {length} frames, and phases of {len(of_frames)}"
                )
            embeddings.append(embed_frames(context.encoder, source, chunk=c.chunk))
            phases.append(of_frames)
        embeddings, phases = labelled(embeddings, phases, split)
        return _Videos(embeddings, phases, np.asarray([labels[i] for i in positions], np.int64))


def progression(train: _Videos, test: _Videos) -> tuple[float, int]:
    """R^2 of the progression in the videos that have all phases, and how many of both splits do not."""
    phases = 1 + max(int(one.max()) for one in train.phases)

    def whole(videos: _Videos) -> tuple[list[NDArray[np.float32]], list[NDArray[np.int64]]]:
        chosen = [i for i, one in enumerate(videos.phases) if set(range(phases - 1)) <= set(one.tolist())]
        return [videos.embeddings[i] for i in chosen], [videos.phases[i] for i in chosen]

    fitted, measured = whole(train), whole(test)
    lacking = len(train.phases) + len(test.phases) - len(fitted[0]) - len(measured[0])
    return phase_progression(*fitted, *measured, phases=phases).validation, lacking


def embed_frames(encoder: Encoder, source: Any, *, chunk: int = 40) -> NDArray[np.float32]:
    """``(T, P)``, of norm 1: every frame of a video. At most ``chunk`` frames are decoded at once.

    Raises:
        InputError: The encoder takes no pictures.
        DataError: The video cannot be read.
    """
    if encoder.preprocessing is None:
        raise InputError(f"a {type(encoder).__name__} does not say how frames are prepared; choose one that does")
    parameter = next(encoder.parameters(), torch.empty(0))
    together = getattr(encoder, "embed_frames", None)
    was_training = encoder.training
    encoder.eval()
    try:
        if together is not None:
            found: Tensor = together(_parts(encoder, source, chunk, parameter.device))
        else:
            found = torch.cat([_alone(encoder, part) for part in _parts(encoder, source, chunk, parameter.device)])
    finally:
        encoder.train(was_training)
    return found.float().cpu().numpy()


def _parts(encoder: Encoder, source: Any, chunk: int, device: torch.device) -> Iterator[Tensor]:
    assert encoder.preprocessing is not None
    length = video_info(source).frames
    for first in range(0, length, chunk):
        frames = read_frames(source, np.arange(first, min(first + chunk, length)))
        yield torch.from_numpy(prepared(frames, encoder.preprocessing)).to(device)


@torch.inference_mode()
def _alone(encoder: Encoder, frames: Tensor) -> Tensor:
    batch = {"image": frames} if encoder.frames is None else {"video": frames[:, None]}
    return F.normalize(encoder(batch).pooled, dim=-1)
