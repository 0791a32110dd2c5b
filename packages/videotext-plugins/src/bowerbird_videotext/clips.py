"""Lists of clips: what data sets of the user's own videos share.

Everything that is wrong is named by file and row before the first video is used. One bad row ends the reading, or is
left out, with a warning and a list, where ``skip_unreadable`` says so.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from bowerbird.data.images import SUFFIXES, image_size
from bowerbird.data.moments import split_moment
from bowerbird.data.video_files import VIDEO_SUFFIXES
from bowerbird.data.videos import video_info
from bowerbird.errors import DataError, InputError
from bowerbird.files import write_atomically
from bowerbird_videotext.video_set import VideoTextSet

_ENDINGS = {*VIDEO_SUFFIXES, *SUFFIXES}
_SHOWN = 3  # of what was left out, named in the warning


class UnreadableVideoWarning(UserWarning):
    """Some rows of a table or some videos were left out."""


@dataclass(frozen=True)
class Clip:
    """A video, or a moment of one, with what is said of it.

    Attributes:
        item_id: Unique.
        video: Path, with ``#t=start,end`` for a moment.
        captions: Not empty texts.
        where: Which row of which file says so.
        label: Name of its class; ``None`` where there are no classes.
        more: Further entries of the item.
    """

    item_id: str
    video: str
    captions: tuple[str, ...]
    where: str
    label: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Problems:
    """Collects what cannot be used; without ``skip`` the first one is a ``DataError``."""

    skip: bool
    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        """Raises ``DataError`` without ``skip``."""
        if not self.skip:
            raise DataError(
                f"{where}: {reason.rstrip('.')}. Correct it, or set skip_unreadable = true to go on without such rows"
            )
        self.found.append((where, reason))

    def conclude(self, name: str, kept: int, report: Path | None) -> None:
        """Warn of everything that was left out, and write ``report`` (one JSON object a line), if it is asked for.

        Raises:
            DataError: Nothing is left.
            InputError: The folder of ``report`` does not exist.
        """
        if report is not None:
            if report.is_dir() or not report.parent.is_dir():
                raise InputError(f"report = {str(report)!r}: expected a file in a folder that is there")
            lines = (json.dumps({"where": where, "reason": reason}) for where, reason in self.found)
            write_atomically(report, "".join(f"{line}\n" for line in lines))
        shown = "; ".join(f"{where}: {reason}" for where, reason in self.found[:_SHOWN])
        more = "; ..." if len(self.found) > _SHOWN else ""
        if not kept:
            raise DataError(f"{name}: no video can be used{f' ({shown}{more})' if shown else ''}")
        if self.found:
            warnings.warn(
                f"{name}: {len(self.found)} left out, {kept} videos are used: {shown}{more}",
                UnreadableVideoWarning,
                stacklevel=4,
            )


class ClipList(VideoTextSet):
    """Videos with captions that are listed somewhere."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        self.clips = list(clips)
        self._ids = [clip.item_id for clip in self.clips]
        self.classes = tuple(sorted({clip.label for clip in self.clips if clip.label is not None}))
        known = {name: i for i, name in enumerate(self.classes)}
        self._labels = [known[clip.label] for clip in self.clips if clip.label is not None]

    @classmethod
    def build(cls, config: Any, split: str | None) -> Self:
        raise TypeError("A list of clips is made from a table: bowerbird_videotext.video_table.VideoTable.build.")

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def item_ids(self) -> Sequence[str]:
        return self._ids

    def video(self, index: int) -> str:
        return self.clips[index].video

    def captions(self, index: int) -> list[str]:
        return list(self.clips[index].captions)

    def where(self, index: int) -> str:
        return self.clips[index].where

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), **self.clips[index].more}

    def labels(self) -> Sequence[int]:
        return self._labels if self.classes else super().labels()


class VideoFiles:
    """The videos below a folder, found by path, with or without ending, or by name in any folder."""

    def __init__(self, folder: Path) -> None:
        """Raises ``DataError`` where there is no such folder."""
        if not folder.is_dir():
            raise DataError(f"there is no folder of videos {str(folder)!r}")
        self.folder = folder
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, name: str) -> Path | str:
        """The file, or why there is none."""
        exact = self.folder / name
        try:
            if exact.is_file():
                return exact
        except (OSError, ValueError) as error:  # a name that no file can have
            return f"{name!r} is no name of a file ({error})"
        found = self._named(_without_ending(Path(name).name))
        below = [path for path in found if _without_ending(str(path)) == _without_ending(str(exact))]
        if len(below or found) == 1:
            return (below or found)[0]
        if found:
            return f"{name!r} may be {str(found[0])!r} or {str(found[1])!r}: give the path"
        return f"the video {name!r} does not exist in {str(self.folder)!r}"

    def _named(self, name: str) -> list[Path]:
        if self._by_name is None:  # once: a search for each of ten thousand names would take minutes
            self._by_name = {}
            for folder, _, names in os.walk(self.folder, followlinks=True):
                for one in sorted(names):
                    if Path(one).suffix.lower() in _ENDINGS:
                        self._by_name.setdefault(_without_ending(one), []).append(Path(folder, one))
        return self._by_name.get(name, [])


def _without_ending(name: str) -> str:
    """Names of clips may hold dots, so that only an ending that videos have is one."""
    ending = Path(name).suffix
    return name.removesuffix(ending) if ending.lower() in _ENDINGS else name


def joined(clips: Iterable[Clip], problems: Problems) -> list[Clip]:
    """Clips of the same id made one, with the captions of all; an id of two videos or two classes is a problem."""
    known: dict[str, Clip] = {}
    for clip in clips:
        first = known.get(clip.item_id)
        if first is None:
            known[clip.item_id] = clip
        elif (first.video, first.label) != (clip.video, clip.label):
            what = "another video" if first.video != clip.video else f"the class {first.label!r}"
            problems.add(clip.where, f"the id {clip.item_id!r} is there already, for {what}: {first.where}")
        else:
            known[clip.item_id] = replace(first, captions=first.captions + clip.captions)
    return list(known.values())


def usable(
    clips: Sequence[Clip],
    check: Literal["headers", "files"],
    problems: Problems,
    *,
    name: str,
    report: Path | None,
) -> list[Clip]:
    """The clips whose videos can be read, as far as ``check`` looks; the rest is among ``problems``, which end here.

    Raises:
        DataError: A video cannot be read and ``problems`` skips none, or nothing is left.
    """
    if check == "headers":
        with ThreadPoolExecutor(8, thread_name_prefix="bowerbird-headers") as pool:
            reasons = list(pool.map(_unreadable, (clip.video for clip in clips)))
    else:  # the files were found
        reasons = [None] * len(clips)
    for clip, reason in zip(clips, reasons, strict=True):
        if reason is not None:
            problems.add(clip.where, reason)
    kept = [clip for clip, reason in zip(clips, reasons, strict=True) if reason is None]
    problems.conclude(name, len(kept), report)
    return kept


def _unreadable(source: str) -> str | None:
    try:
        path, _ = split_moment(source)
        if Path(path).suffix.lower() in SUFFIXES:
            image_size(path)
        else:
            video_info(source)
    except (DataError, OSError) as error:
        return str(error)
    return None
