"""Files and folders that are either whole or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write ``content`` beside ``path``, flush it to the disk, then rename: readers see the old file or the new one."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        error.filename = str(path)  # nobody asked for the temporary file
        raise
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write does not know its file
        raise


def new_rows(path: Path, shape: tuple[int, int]) -> np.memmap[Any, np.dtype[np.float32]]:
    """A new ``.npy`` file of float32 zeros, mapped for writing.

    Its space is reserved at once: a write to a mapping that finds the disk full kills the process (SIGBUS).

    Raises ``OSError`` where there is no room; no file is left then.
    """
    import numpy as np

    try:
        rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:  # a file system that cannot reserve
            return rows
        path.unlink(missing_ok=True)
        error.filename = str(path)
        raise
    return rows


def write_json(path: str | Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of ``path`` if the block ends without an error.

    A folder that already stands at ``path`` is replaced as a whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        temporary.chmod(0o755)
        if path.exists():  # rename cannot replace a folder that is not empty
            replaced = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.replaced."))
            path.rename(replaced / path.name)
            temporary.rename(path)
            shutil.rmtree(replaced)
        else:
            temporary.rename(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk by an exception of its own; it is not imported here, most writers need none.
        if type(error).__name__ == "SafetensorError" and "I/O error" in str(error):
            raise OSError(errno.EIO, str(error), str(path)) from error
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
