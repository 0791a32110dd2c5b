"""``core:market-1501``: pedestrians seen by six cameras.

L. Zheng et al.: Scalable Person Re-identification: A Benchmark, ICCV 2015. Read from a local copy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image

from bowerbird.data.benchmark_configs import MARKET_LAYOUT, MarketConfig
from bowerbird.data.dataset import Dataset
from bowerbird.data.files import BenchmarkImages, check_split, need_folder
from bowerbird.data.images import open_image
from bowerbird.errors import DataError, InputError

if TYPE_CHECKING:
    from bowerbird.retrieval.metrics import Relevance

FOLDERS = {"train": "bounding_box_train", "gallery": "bounding_box_test", "query": "query"}
SPLITS = tuple(FOLDERS)
JUNK, DISTRACTOR = -1, 0
NAME = re.compile(r"(-1|\d{4})_c(\d+)s(\d+)_(\d+)_(\d+)\.jpg")


class Market1501(BenchmarkImages):
    """Boxes in order of their names; ids are ``query/0002_c1s1_000451_03.jpg`` with the folder of the split.

    Classes are identities. Distractors have the identity ``0000``: nobody asks for them, and in a gallery they have no
    ``label``. Junk (identity ``-1``) is left out: the protocol ignores it in every ranking.

    Attributes:
        identities, cameras: int64 ``(N,)``.
    """

    def __init__(self, root: Path, folder: str, names: Sequence[str]) -> None:
        parts = [NAME.fullmatch(name) for name in names]
        self.root = root
        self.identities = np.array([int(part[1]) for part in parts if part], np.int64)
        self.cameras = np.array([int(part[2]) for part in parts if part], np.int64)
        known, labels = np.unique(self.identities, return_inverse=True)
        super().__init__(
            [f"{folder}/{name}" for name in names], labels.tolist(), [f"{identity:04d}" for identity in known]
        )

    @classmethod
    def build(cls, config: MarketConfig, split: str | None = None) -> Self:
        """The boxes of ``split``: ``train`` (default), ``gallery`` or ``query``.

        Raises ``DataError`` for a missing or empty folder and for a file name of another form, and
        ``UnknownNameError`` for another split.
        """
        split = split or "train"
        check_split("core:market-1501", split, SPLITS)
        root = config.root.expanduser()
        folder = need_folder(root / FOLDERS[split], MARKET_LAYOUT)
        names = sorted(entry.name for entry in folder.iterdir() if entry.suffix == ".jpg")
        for name in names:
            if not NAME.fullmatch(name):
                raise DataError(f"{folder / name}: the name has another form. {MARKET_LAYOUT}")
        kept = [name for name in names if not name.startswith(f"{JUNK}_")]
        if not kept:
            raise DataError(f"{folder} has no boxes ({len(names)} of them junk). {MARKET_LAYOUT}")
        return cls(root, FOLDERS[split], kept)

    def path(self, index: int) -> Path:
        return self.root / self._ids[index]

    def image(self, index: int) -> Image.Image:
        return open_image(self.path(index))

    def metadata(self) -> Sequence[Mapping[str, Any]]:
        """``label`` (not for distractors) and ``camera``."""
        return [
            {"camera": int(camera)} | ({} if identity == DISTRACTOR else {"label": f"{identity:04d}"})
            for identity, camera in zip(self.identities, self.cameras, strict=True)
        ]

    def relevance(self, gallery: Dataset) -> Relevance:
        """Same identity; the same identity seen by the same camera is ignored."""
        from bowerbird.retrieval.metrics import Relevance

        if not isinstance(gallery, Market1501):
            raise InputError(f"queries of Market-1501 need a gallery of Market-1501, found {type(gallery).__name__}.")
        return Relevance.from_labels(
            _people(self.identities),
            _people(gallery.identities),
            query_ids=self._ids,
            gallery_ids=gallery.item_ids,
            query_cams=self.cameras,
            gallery_cams=gallery.cameras,
        )


def _people(identities: Any) -> Any:
    return np.where(identities == DISTRACTOR, -1, identities)  # -1: never right, in ``Relevance``
