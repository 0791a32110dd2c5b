"""Vectors of many items into one file, continued where an earlier start was interrupted.

While it works there is ``OUT.part.npy`` (the rows so far) beside ``OUT.part.json`` (how many, of which encoder and
items); at the end they become ``OUT`` in one step. The kind of file follows from its name:

    .npy           float32 (N, D), and the ids, one a line, in OUT with the ending .ids.txt
    .safetensors   the tensor ``vectors``; ids as a JSON list in the metadata
    .parquet       columns ``id`` and ``vector``
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from bowerbird.data.images import OnError
from bowerbird.encoders.bundle import LoadedEncoder
from bowerbird.errors import DataError, InputError, MissingExtraError, did_you_mean
from bowerbird.files import new_rows, write_atomically, write_json

KINDS = (".npy", ".safetensors", ".parquet")
SAVE_EVERY = 1024  # items


@dataclass(frozen=True)
class Embedded:
    """``count`` rows in ``path``; ``resumed_at``: how many an earlier start had done; ``skipped``: id -> reason."""

    path: Path
    count: int
    resumed_at: int
    skipped: dict[str, str]


def embed_to_file(
    encoder: LoadedEncoder,
    ids: Sequence[str],
    items: Sequence[Any],
    out: str | Path,
    *,
    batch_size: int = 64,
    skip_errors: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Embedded:
    """Encode ``items`` and write their unit vectors and ``ids`` to ``out``.

    Args:
        encoder: The encoder.
        ids: N stable ids without line breaks.
        items: N pictures (or texts); ``items[i]`` may be lazy.
        out: File to write; its ending decides the kind.
        batch_size: Pictures (or frames of videos) or texts per forward pass.
        skip_errors: Leave out items that cannot be read, and say why in the result, instead of raising.
        progress: Called with the number of items done, first with those of an earlier start.

    Raises:
        InputError: The ending is unknown, or an id is not usable.
        DataError: An item cannot be read. What is done is kept; the same call continues.
    """
    out = Path(out)
    _check_request(out, ids, items)
    out.parent.mkdir(parents=True, exist_ok=True)
    part, note = Path(f"{out}.part.npy"), Path(f"{out}.part.json")
    asked = {"fingerprint": encoder.fingerprint, "items": len(ids), "ids": _digest(ids), "dim": encoder.dim}
    done, skipped = _resume_point(part, note, asked)
    resumed_at = done
    if not done:
        rows = new_rows(part, (len(ids), encoder.dim))
    else:
        rows = np.lib.format.open_memmap(part, mode="r+")
    if progress is not None and done:
        progress(done)

    failed: dict[int, DataError] = {}

    def keep_error(position: int, error: DataError) -> None:
        failed[position] = error

    def save() -> None:
        rows.flush()
        write_json(note, {**asked, "done": done, "skipped": skipped})

    start, saved = done, done
    try:
        remaining = _Tail(items, start)
        on_error: OnError = keep_error if skip_errors else "raise"
        for indices, vectors in encoder.encode_batches(remaining, batch_size=batch_size, on_error=on_error):
            rows[start + indices] = vectors
            now = start + int(indices[-1]) + 1
            if progress is not None:
                progress(now - done)
            done = now
            if done - saved >= SAVE_EVERY:
                skipped |= {ids[start + i]: str(e) for i, e in failed.items() if start + i < done}
                save()
                saved = done
    except BaseException:
        skipped |= {ids[start + i]: str(e) for i, e in failed.items() if start + i < done}
        save()
        raise
    skipped |= {ids[start + i]: str(error) for i, error in failed.items()}
    if progress is not None and done < len(ids):
        progress(len(ids) - done)
    kept = [i for i, name in enumerate(ids) if name not in skipped]
    done = len(ids)
    save()
    final: NDArray[np.float32] = rows if len(kept) == len(ids) else rows[kept]
    _write(out, [ids[i] for i in kept], final)
    part.unlink()
    note.unlink(missing_ok=True)
    return Embedded(path=out, count=len(kept), resumed_at=resumed_at, skipped=skipped)


class _Tail(Sequence[Any]):
    """``items[start:]`` without reading them."""

    def __init__(self, items: Sequence[Any], start: int) -> None:
        self.items, self.start = items, start

    def __len__(self) -> int:
        return len(self.items) - self.start

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.items[self.start + i] for i in range(*index.indices(len(self)))]
        return self.items[self.start + index]


def _check_request(out: Path, ids: Sequence[str], items: Sequence[Any]) -> None:
    if out.suffix not in KINDS:
        raise InputError(
            f"{str(out)!r}: the ending {out.suffix!r} is unknown.{did_you_mean(out.suffix, KINDS)} "
            f"Accepted: {', '.join(KINDS)}"
        )
    if out.suffix == ".parquet":
        _pyarrow()
    if len(ids) != len(items):
        raise InputError(f"{len(ids)} ids for {len(items)} items")
    if len(set(ids)) != len(ids):
        twice = next(name for name in ids if list(ids).count(name) > 1)
        raise InputError(f"id {twice!r} is given more than once")
    broken = [name for name in ids if "\n" in name or "\r" in name]
    if broken:
        raise InputError(f"id {broken[0]!r} holds a line break")


def _resume_point(part: Path, note: Path, asked: dict[str, Any]) -> tuple[int, dict[str, str]]:
    """How many rows an earlier start with the same encoder and items has done, and what it skipped."""
    try:
        found = json.loads(note.read_text())
        shape = np.load(part, mmap_mode="r").shape
    except (OSError, ValueError):
        return 0, {}
    if any(found.get(key) != value for key, value in asked.items()) or shape != (asked["items"], asked["dim"]):
        return 0, {}
    return int(found["done"]), dict(found["skipped"])


def _digest(ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def _write(out: Path, ids: Sequence[str], vectors: NDArray[np.float32]) -> None:
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        if out.suffix == ".npy":
            with temporary.open("wb") as file:
                np.save(file, vectors)
        elif out.suffix == ".safetensors":
            from safetensors.numpy import save_file

            save_file({"vectors": np.ascontiguousarray(vectors)}, temporary, metadata={"ids": json.dumps(list(ids))})
        else:
            pa, parquet = _pyarrow()
            flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
            parquet.write_table(pa.table({"id": pa.array(list(ids)), "vector": column}), temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if out.suffix == ".npy":
            write_atomically(out.with_suffix(".ids.txt"), "".join(f"{name}\n" for name in ids))
        temporary.replace(out)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{out} cannot be written; is the disk full? ({error}) The vectors are kept beside it: the same call "
            "writes them without encoding again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _pyarrow() -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("a .parquet file needs pyarrow: pip install 'bowerbird-core[tables]'") from error
    return pyarrow, parquet
