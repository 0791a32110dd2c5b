"""``core:digits``: the 1,797 handwritten digits of scikit-learn, 8 x 8, grey. The smallest real data set there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bowerbird.data.dataset import Dataset
from bowerbird.errors import UnknownNameError, did_you_mean

SPLITS = ("all", "train", "test")
_TEST_EVERY = 5


class Digits(Dataset):
    """Items in scikit-learn's order; ids are ``0000`` to ``1796``. Every fifth is in ``test``, the rest ``train``."""

    classes = tuple(str(digit) for digit in range(10))

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], ids: Sequence[str]) -> None:
        self.images = images
        self._labels = labels
        self._ids = list(ids)

    @classmethod
    def build(cls, config: None = None, split: str | None = None) -> Self:
        """The items of ``split`` (default ``all``). Raises ``UnknownNameError`` for another name."""
        from sklearn.datasets import load_digits

        split = split or "all"
        if split not in SPLITS:
            raise UnknownNameError(
                f"core:digits has no split {split!r}; it has {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}"
            )
        data = load_digits()
        positions = np.arange(len(data.target))
        is_test = positions % _TEST_EVERY == _TEST_EVERY - 1
        keep = positions[{"all": slice(None), "train": ~is_test, "test": is_test}[split]]
        grey = np.rint(data.images[keep] * (255 / 16)).astype(np.uint8)  # 17 levels, 0 to 16
        return cls(grey, data.target[keep].astype(np.int64), [f"{i:04d}" for i in keep])

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = Image.fromarray(self.images[index]).convert("RGB")
        return {"image": image, "label": int(self._labels[index]), "item_id": self._ids[index]}

    @property
    def item_ids(self) -> Sequence[str]:
        return self._ids

    def labels(self) -> Sequence[int]:
        return self._labels.tolist()
