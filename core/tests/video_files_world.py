"""Videos for tests, written by FFmpeg's encoders: every frame is of one grey, which tells its position."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

av: Any = pytest.importorskip("av")  # without it what imports this has nothing to test

STEP = 6  # grey levels between frames; lossy encoders keep a plain frame well within half of it


def grey_frames(count: int, *, height: int = 32, width: int = 48) -> NDArray[np.uint8]:
    """``(count, height, width, 3)``: frame ``i`` is ``STEP * i`` grey, its upper left corner white."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (STEP * np.arange(count, dtype=np.uint8))[:, None, None, None]
    frames[:, :8, :8] = 255
    return frames


def positions(frames: NDArray[np.uint8]) -> list[int]:
    """Which frames of ``grey_frames`` these are, from what is seen away from the corner."""
    return [int(level) for level in np.round(frames[:, 12:20, 12:20].mean(axis=(1, 2, 3)) / STEP)]


def write(
    path: Path,
    frames: NDArray[np.uint8],
    *,
    codec: str = "libx264",
    rate: int = 8,
    times: list[int] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """Write ``frames`` with a keyframe every 12. ``times``: time stamps of frames in ``1 / rate`` seconds."""
    with av.open(str(path), "w", options=container or {}) as out:
        stream: Any = out.add_stream(codec, rate=Fraction(rate))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"g": "12", "qmax": "3" if codec == "libx264" else "2"}
        stream.codec_context.thread_count = 1
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def turned(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """``path``, an MP4, with another display matrix: a point (x, y) is shown at (a x + c y, b x + d y)."""
    a, b, c, d = (value * 65536 for value in matrix)
    data = path.read_bytes()
    place = data.index(b"tkhd") + 4 + 4 + 5 * 4 + 2 * 4 + 2 * 4  # version and times, reserved, layer and volume
    assert struct.unpack(">9i", data[place : place + 36])[:5] == (65536, 0, 0, 0, 65536)
    path.write_bytes(data[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[place + 36 :])
    return path


def write_sound(path: Path) -> Path:
    """A file of sound without pictures."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path
