"""The folder of uploaded pictures.

Files are named by their content and by the id of their item, ``ab/abcd...-<of the id>.jpg``: nothing of a client gets
into a path, and no two items share a file, so that one is removed with its item and nothing is counted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from bowerbird.errors import BowerbirdError, GalleryLockedError, InputError, StoreUnavailableError
from bowerbird.files import write_atomically
from bowerbird.gallery.open import folder_of, safe_url
from bowerbird.gallery.segments import sync_folder

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.space import Item
    from bowerbird.serve.settings import ServeSettings

log = logging.getLogger("bowerbird.serve")

OWNER = "owner.json"  # in the folder: whose uploads these are; locked by the service that writes them
_NAME = re.compile(r"[0-9a-f]{64}-[0-9a-f]{16}\.[a-z0-9]{1,4}")
_UNFINISHED = re.compile(rf"\.{_NAME.pattern}\.\w+")  # as `write_atomically` names what it has not renamed yet
_SUBFOLDERS = "[0-9a-f][0-9a-f]"

# What a file begins with. Only for its name, which people see; pictures are opened by their content everywhere.
_BEGINNINGS = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"\0\0\0\x0cjP", "jp2"),
    (b"\xff\x4f\xff\x51", "jp2"),
    (b"\0\0\1\0", "ico"),
)

Held = Sequence[tuple[str, Path]]  # ids, and the files that are about to be theirs


class Uploads:
    """The uploaded pictures of one gallery. Thread-safe; its calls block. One service at a time writes them.

    Args:
        owner: The gallery, where the folder is not in the gallery itself.
    """

    def __init__(self, folder: Path, gallery: Gallery, owner: str | None = None) -> None:
        self.folder, self.gallery, self.owner = folder, gallery, owner
        self._lock_file: IO[str] | None = None
        self._held: Counter[str] = Counter()  # names of files that requests are about to commit
        self._lock = threading.Lock()  # over looking whether a file is needed and removing it
        self._durable: set[Path] = set()  # subfolders that are on the disk

    def open(self) -> None:
        """Lock the folder; the kernel frees it with the process.

        Raises:
            InputError: If the folder has the pictures of another gallery, or does not say whose they are.
            GalleryLockedError: If another service writes to it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.folder.parent)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context((self.folder / OWNER).open("a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise GalleryLockedError(
                    f"another service takes uploads into {self.folder} already. Stop it first, or start this one with "
                    "--read-only"
                ) from None
            file.seek(0)
            content = file.read()
            try:
                known = json.loads(content)["gallery"] if content else None
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{self.folder / OWNER} is damaged. Remove it if {self.folder} has the pictures of this gallery"
                ) from None
            if self.owner is not None and known not in (None, self.owner):
                raise InputError(
                    f"{self.folder} has the uploaded pictures of the gallery {known}, not of {self.owner}: choose "
                    f"another folder. If the gallery was moved, remove {self.folder / OWNER}"
                )
            if self.owner is not None and known is None:
                file.write(json.dumps({"gallery": self.owner}))
                file.flush()
            stack.pop_all()
            self._lock_file = file

    def close(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()  # and with it the lock

    def sweep(self) -> None:
        """Remove files that no item names: of a service that was killed, of items that other processes deleted.

        To be called before anything is written. A failure is logged, and leaves them to the next time.
        """
        try:
            removed = self._sweep()
        except (BowerbirdError, OSError) as error:
            log.warning("uploaded pictures that no item names were not removed: %s", error)
        else:
            if removed:
                log.info("removed %d uploaded pictures that no item names", removed)

    def _sweep(self) -> int:
        if not any(self.folder.glob(_SUBFOLDERS)):
            return 0  # without a look at every item
        named = (_name_of(item) for item in self.gallery.items())  # also by an item of another id
        names = (name for name in named if _NAME.fullmatch(name))
        # 8 bytes per name: two names with the same mark keep one file too many, never one too few.
        kept = np.unique(np.fromiter((_mark(name) for name in names), np.uint64))
        removed = 0
        for folder in sorted(self.folder.glob(_SUBFOLDERS)):
            names_here = [file.name for file in folder.iterdir()]
            ours = [name for name in names_here if _NAME.fullmatch(name)]
            needed = np.isin(np.array([_mark(name) for name in ours], np.uint64), kept)
            forgotten = [name for name, is_needed in zip(ours, needed, strict=True) if not is_needed]
            unfinished = [name for name in names_here if _UNFINISHED.fullmatch(name)]
            for name in (*forgotten, *unfinished):  # what else is in this folder is not ours to remove
                (folder / name).unlink(missing_ok=True)
            removed += len(forgotten) + len(unfinished)
        return removed

    # ------------------------------------------------------------------------------------------------- one picture

    def place(self, item_id: str, digest: str, data: bytes) -> Path:
        """Where the picture ``data`` of an item belongs; ``digest`` is its SHA-256."""
        name = f"{digest}-{_of_id(item_id)}.{suffix_of(data)}"
        return self.folder / name[:2] / name

    def file_of(self, item: Item | None) -> Path | None:
        """The uploaded picture of an item, ``None`` where its picture is somebody else's file, or there is none.

        By the name alone: the folder may have been moved, or be reached by another path.
        """
        name = "" if item is None else _name_of(item)
        ours = item is not None and _NAME.fullmatch(name) and name[65:81] == _of_id(item.id)
        return self.folder / name[:2] / name if ours else None

    def is_lost(self, item: Item) -> bool:
        """Whether it had an uploaded picture that is not where the item says."""
        return self.file_of(item) is not None and not Path(str(item.uri)).is_file()

    def write(self, path: Path, data: bytes) -> None:
        """The file, durable when this returns. It is held: nobody removes it until it is released.

        Raises:
            StoreUnavailableError: If it cannot be written: a full disk.
        """
        with self._lock:
            self._held[path.name] += 1
        try:
            path.parent.mkdir(exist_ok=True)
            if path.parent not in self._durable:
                sync_folder(self.folder)
                self._durable.add(path.parent)
            write_atomically(path, data)
            sync_folder(path.parent)
        except OSError as error:
            log.error("an uploaded picture cannot be kept: %s", error)
            raise StoreUnavailableError(
                f"the picture cannot be kept ({error.strerror}); nothing was added. Free some space on the disk of the "
                "uploaded pictures, and send it again"
            ) from error

    def release(self, held: Held) -> None:
        """What was held and is no item's picture is removed."""
        with self._lock:
            self._held.subtract(path.name for _, path in held)
            self._held = +self._held
            # Under the lock: a request that holds, commits and releases after this look would lose its file.
            with contextlib.suppress(BowerbirdError):  # then they stay until the next start
                items = self.gallery.get_many([name for name, _ in held])
                self._remove([path for (_, path), item in zip(held, items, strict=True) if self.file_of(item) != path])

    def remove(self, files: Sequence[Path]) -> None:
        """Remove files that no item names any more, but for those that a request is about to name again."""
        with self._lock:
            self._remove(files)

    def _remove(self, files: Sequence[Path]) -> None:
        for file in files:
            if not self._held[file.name]:
                with contextlib.suppress(OSError):  # the next start tries again
                    file.unlink(missing_ok=True)


def uploads_of(settings: ServeSettings, gallery: Gallery) -> Uploads | None:
    """Where uploaded pictures are kept; ``None`` for a read-only service, and for a gallery without a folder where no
    other was named."""
    folder = folder_of(settings.gallery)
    if settings.read_only:
        return None
    if settings.contents is not None:
        owner = safe_url(settings.gallery) if folder is None else str(folder.resolve())
        return Uploads(settings.contents.expanduser().resolve(), gallery, owner)
    return None if folder is None else Uploads(folder.resolve() / "contents", gallery)


def suffix_of(data: bytes) -> str:
    """The suffix of a picture's file by what it begins with."""
    for beginning, suffix in _BEGINNINGS:
        if data.startswith(beginning):
            return suffix
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return "avif" if data[4:8] == b"ftyp" else "img"


def _name_of(item: Item) -> str:
    return (item.uri or "").rpartition("/")[2]


def _of_id(item_id: str) -> str:
    return hashlib.sha256(item_id.encode()).hexdigest()[:16]


def _mark(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
