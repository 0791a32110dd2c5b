"""``VideoTextSet``: the contract of data sets of videos with captions. Opening an item decodes nothing.

R boxes of one frame.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.data.dataset import Dataset
from bowerbird.data.views import unwrapped
from bowerbird.errors import InputError

Choice = tuple[list[str], int]  # options, and the position of the right one
Question = tuple[str, str, str]  # question, answer, kind


class VideoTextSet(Dataset):
    """Videos with captions. A subclass gives ``video``, ``captions`` and ``item_ids``; the rest follows from them.

    An item has ``video`` (path or address of a video, which ``bowerbird.data.videos`` reads), ``text`` (its caption, or
    a list where it has several; no such entry where it has none), ``item_id``, ``where`` (which row of which file it
    is, for messages) and, where there are ``classes``, ``label``.
    """

    @abstractmethod
    def video(self, index: int) -> str:
        """Path or address of video ``index``, with a moment ``#t=start,end`` where the item is a part of one."""

    @abstractmethod
    def captions(self, index: int) -> list[str]:
        """All captions of video ``index``; empty where it has none."""

    def where(self, index: int) -> str:
        """Where item ``index`` is said to exist, such as ``'train.csv', row 7``. For messages."""
        return f"item {self.item_ids[index]!r}"

    def multiple_choice(self, index: int) -> Choice | None:
        """Captions of which one is right, and the position of that one; ``None`` where the set has no such task."""
        return None

    def question(self, index: int) -> list[Question]:
        """Questions about video ``index`` with their answers and their kinds; empty where the set has none."""
        return []

    def boxes(self, index: int) -> NDArray[np.float32] | None:
        """``(frames of the file, R, 4)``, x1 y1 x2 y2 in pixels; ``None`` where none are known."""
        return None

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"position {index} of {len(self)}")
        item: dict[str, Any] = {
            "video": self.video(index),
            "item_id": self.item_ids[index],
            "where": self.where(index),
        }
        captions = self.captions(index)
        if captions:
            item["text"] = captions[0] if len(captions) == 1 else captions
        if self.classes:
            item["label"] = int(self.labels()[index])
        return item

    def labels(self) -> Sequence[int]:
        """Class of every video. Overridden where there are ``classes``; raises ``InputError`` where there are none."""
        raise InputError(f"{type(self).__name__}: these videos have captions and no classes; take a method for texts")

    def metadata(self) -> Sequence[Mapping[str, Any]] | None:
        """``text`` of every video: its captions, a list."""
        return [{"text": self.captions(i)} for i in range(len(self))]


def video_text_set(dataset: Dataset, asked_by: str) -> tuple[VideoTextSet, list[int]]:
    """The set of videos and captions that ``dataset`` is or is a subset of, and the positions that belong to it.

    Raises:
        InputError: It is another kind of data set; ``asked_by`` names who needs videos with captions.
    """
    whole, positions = unwrapped(dataset)
    if isinstance(whole, VideoTextSet):
        return whole, positions
    raise InputError(
        f"{asked_by} needs a data set of videos with captions, such as videotext:moving or videotext:table; "
        f"{type(whole).__name__} is none"
    )


def captions_of(dataset: Dataset) -> list[str]:
    """All captions of ``dataset`` in order of position, for example to learn a vocabulary from.

    Raises ``InputError`` where it is no set of videos with captions, or has no caption at all.
    """
    videos, positions = video_text_set(dataset, "the vocabulary of captions")
    captions = [caption for position in positions for caption in videos.captions(position)]
    if not captions:
        raise InputError(f"{type(videos).__name__}: none of its {len(positions)} videos has a caption")
    return captions
