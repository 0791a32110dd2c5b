"""Small video files for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bowerbird.data.videos import write_video


def video(path: Path, frames: int = 6, *, side: int = 16, rate: float = 2) -> Path:
    """A video whose frames become brighter: frame i is grey, of value 30 i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = (30 * np.arange(frames)).astype(np.uint8)
    write_video(path, np.broadcast_to(grey[:, None, None, None], (frames, side, side, 3)), rate)
    return path


def truncated(path: Path) -> Path:
    """A video of which the second half is missing."""
    content = video(path, 40).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path
