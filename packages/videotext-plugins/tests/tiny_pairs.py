"""A dual encoder of a few hundred numbers, and captioned pictures in the place of videos."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from bowerbird.batch import Batch
from bowerbird_videotext.dual_encoder import DualEncoder
from bowerbird_videotext.dual_encoder_config import DualEncoderConfig
from bowerbird_videotext.video_set import VideoTextSet

CAPTIONS = [f"a {colour} {noun} {verb}" for colour in ("red", "blue") for noun in ("boot", "shirt") for verb in (
    "moves left", "stays still", "moves up",
)]  # fmt: skip


class Captioned(VideoTextSet):
    """Every item is a picture of noise (a video of one frame) with one of ``CAPTIONS``, and has ``extras``."""

    def __init__(self, captions: list[str] | None = None, **extras: list[Any]) -> None:
        self.texts, self.extras = captions or CAPTIONS, extras

    @classmethod
    def build(cls, config: Any = None, split: str | None = None) -> Captioned:
        return cls()

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def item_ids(self) -> list[str]:
        return [f"clip-{i}" for i in range(len(self))]

    def video(self, index: int) -> str:
        return f"clip-{index}.mp4"

    def captions(self, index: int) -> list[str]:
        return [self.texts[index]]

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = np.random.default_rng(index).integers(0, 256, (12, 12, 3), np.uint8)
        extras = {key: values[index] for key, values in self.extras.items()}
        item = {key: value for key, value in super().__getitem__(index).items() if key != "video"}
        return {**item, "image": Image.fromarray(pixels), **extras}


def tiny_config(**settings: Any) -> DualEncoderConfig:
    return DualEncoderConfig(
        **{
            "image_size": 8, "patch_size": 4, "frames": 2, "embed_dim": 8, "depth": 3, "num_heads": 2,
            "text_dim": 8, "text_depth": 2, "text_heads": 2, "max_tokens": 16, "projection_dim": 6,
            "time_init": "normal", **settings,
        }
    )  # fmt: skip


def tiny_encoder(**settings: Any) -> DualEncoder:
    """Without a tokenizer yet."""
    return DualEncoder.build(tiny_config(**settings))


def tiny_batch(encoder: DualEncoder, count: int = 6, *, seed: int = 0) -> Batch:
    """Random clips with ``CAPTIONS`` in order."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "video": torch.randn(count, 2, 3, 8, 8, generator=generator),
        "text": encoder.tokenize([CAPTIONS[i % len(CAPTIONS)] for i in range(count)]),
    }
