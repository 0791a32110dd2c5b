"""Which frames stand for a video, with torch's generators, and which frames of a clip are real.

The rule is core's (``bowerbird.data.videos``). B clips, T frames.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bowerbird.data.videos import frame_indices


def sample_frame_indices(
    video_length: int,
    num_frames: int,
    mode: Literal["uniform", "random"] = "uniform",
    generator: torch.Generator | None = None,
    offset: int | None = None,
) -> Tensor:
    """One frame of each of k = min(num_frames, video_length) equal segments: int64 ``(k,)``, rising.

    Args:
        video_length: Frames of the video, at least 1.
        num_frames: Frames that are wanted, at least 1.
        mode: ``uniform``: the middle of every segment; ``random``: any of its frames.
        generator: What ``random`` draws from; torch's own by default.
        offset: Instead of a mode: this many frames after the start of every segment.

    Raises:
        InputError: Values outside these ranges.
    """
    draws = None
    if mode == "random" and offset is None:
        device = "cpu" if generator is None else generator.device
        draws = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator, device=device)))
    return torch.from_numpy(frame_indices(video_length, num_frames, mode=mode, generator=draws, offset=offset))


def real_frames(video: Tensor) -> Tensor:
    """bool ``(B, T)``: up to the last frame of ``video (B, T, 3, H, W)`` that is not all zeros; the first always."""
    shown = video.flatten(2).any(dim=2)
    shown[:, 0] = True
    return shown.flip(1).cummax(dim=1).values.flip(1)
