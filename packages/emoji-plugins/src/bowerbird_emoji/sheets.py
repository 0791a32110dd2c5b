"""The concept table and the picture sheets in this package's ``data`` folder. See ``tools/build_sheets.py``."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bowerbird.errors import DataError

_DATA = files("bowerbird_emoji") / "data"


@dataclass(frozen=True)
class Concept:
    """One thing that every style has drawn.

    Attributes:
        name: For example ``red-apple``.
        category: One of ``activities animals food objects people smileys symbols travel``.
        part: ``seen`` or ``unseen``.
        role: Among the seen: ``old`` (in old-train), ``validation`` or ``-``.
        tile: Position in the sheets.
    """

    name: str
    category: str
    part: str
    role: str
    tile: int


@cache
def concepts() -> tuple[Concept, ...]:
    """The 896 concepts by name. Reads a text file of 30 kB, no picture."""
    lines = (_DATA / "concepts.tsv").read_text("utf-8").splitlines()[1:]
    rows = (line.split("\t") for line in lines)
    return tuple(Concept(name, category, part, role, i) for i, (name, category, part, role) in enumerate(rows))


@cache
def sources() -> dict[str, Any]:
    """Where the pictures come from: npm package, version and licence per style, and the checksums of the sheets."""
    return json.loads((_DATA / "sheets.json").read_text("utf-8"))


@cache
def tiles(style: str) -> NDArray[np.uint8]:
    """uint8 ``(896, 64, 64, 3)``, read-only, 11 MB, decoded once per process, when a style is first used.

    Raises ``DataError`` where the sheet does not have the recorded checksum.
    """
    record = sources()
    data = (_DATA / f"{style}.webp").read_bytes()
    found, expected = hashlib.sha256(data).hexdigest(), record["styles"][style]["sheet_sha256"]
    if found != expected:
        raise DataError(
            f"The sheet {style}.webp in {_DATA} is damaged: SHA-256 {found}, expected {expected}. "
            "Install bowerbird-emoji again."
        )
    side, columns = record["pixels"], record["columns"]
    with Image.open(io.BytesIO(data)) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    rows = len(pixels) // side
    cut = pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)
    cut = np.ascontiguousarray(cut[: len(concepts())])
    cut.flags.writeable = False
    return cut
