"""Small real video files of noise, with captions, questions and boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bowerbird.data.videos import write_video
from bowerbird_videotext.video_set import Question, VideoTextSet


class NoiseClips(VideoTextSet):
    """Videos of 32 x 32 pixels in four squares of one colour each; the n-th has n + 2 frames."""

    def __init__(self, folder: Path, count: int = 3) -> None:
        self.folder, self.count = folder, count
        for i in range(count):
            if not self.path(i).exists():
                self.write(i, i)

    @classmethod
    def build(cls, config: Any, split: str | None) -> NoiseClips:
        raise NotImplementedError

    def path(self, index: int) -> Path:
        return self.folder / f"{index}.mp4"

    def write(self, index: int, seed: int) -> None:
        pixels = np.random.default_rng(seed).integers(0, 255, (index + 2, 2, 2, 3), np.uint8)
        write_video(self.path(index), pixels.repeat(16, 1).repeat(16, 2))

    def __len__(self) -> int:
        return self.count

    @property
    def item_ids(self) -> list[str]:
        return [f"clip-{i}" for i in range(self.count)]

    def video(self, index: int) -> str:
        return str(self.path(index))

    def captions(self, index: int) -> list[str]:
        return [f"noise number {index}", f"squares number {index}"]

    def question(self, index: int) -> list[Question]:
        return [("which number is it?", f"number {index}", "what"), ("is it noise?", "yes", "is")]

    def boxes(self, index: int) -> np.ndarray:
        return np.tile(np.array([[0, 0, 16, 16], [8, 8, 32, 32]], np.float32), (index + 2, 1, 1))
