"""Views of data sets: some of the items, or only the images. Nothing is copied or decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self, overload

from PIL import Image

from bowerbird.data.dataset import Dataset
from bowerbird.errors import InputError


class Subset(Dataset):
    """The items of ``dataset`` at ``indices``, in that order. Ids, labels and classes stay those of the whole."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = [int(i) for i in indices]
        self.classes = dataset.classes
        self.domains = dataset.domains
        for i in self.indices:
            if not 0 <= i < len(dataset):
                raise InputError(f"subset: position {i} does not exist; the data set has {len(dataset)} items.")

    @classmethod
    def build(cls, config: Any, split: str | None) -> Self:
        raise TypeError("A subset is made from a data set: bowerbird.data.subset(dataset, indices).")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[self.indices[index]]

    @property
    def item_ids(self) -> Sequence[str]:
        ids = self.dataset.item_ids
        return [ids[i] for i in self.indices]

    def labels(self) -> Sequence[int]:
        labels = self.dataset.labels()
        return [int(labels[i]) for i in self.indices]

    def domain_indices(self) -> Sequence[int]:
        domains = self.dataset.domain_indices()
        return [int(domains[i]) for i in self.indices]

    def metadata(self) -> Sequence[Mapping[str, Any]] | None:
        known = self.dataset.metadata()
        return None if known is None else [known[i] for i in self.indices]


class Mirrored(Dataset):
    """The same items with their images mirrored left to right."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.classes = dataset.classes
        self.domains = dataset.domains

    @classmethod
    def build(cls, config: Any, split: str | None) -> Self:
        raise TypeError("Mirrored is made from a data set: bowerbird.data.views.Mirrored(dataset).")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        return {**item, "image": item["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)}

    @property
    def item_ids(self) -> Sequence[str]:
        return self.dataset.item_ids

    def labels(self) -> Sequence[int]:
        return self.dataset.labels()

    def domain_indices(self) -> Sequence[int]:
        return self.dataset.domain_indices()

    def metadata(self) -> Sequence[Mapping[str, Any]] | None:
        return self.dataset.metadata()


def subset(dataset: Dataset, indices: Sequence[int]) -> Subset:
    """The items of ``dataset`` at ``indices``. Raises ``InputError`` for positions that do not exist."""
    return Subset(dataset, indices)


def unwrapped(dataset: Dataset) -> tuple[Dataset, list[int]]:
    """The data set that ``dataset`` is a subset of (itself, if it is none), and the positions that belong to it."""
    if not isinstance(dataset, Subset):
        return dataset, list(range(len(dataset)))
    whole, positions = unwrapped(dataset.dataset)
    return whole, [positions[i] for i in dataset.indices]


class _Images(Sequence[Any]):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        item = self.dataset[index]
        return item["image"] if "image" in item else item["video"]


def images_of(dataset: Dataset) -> Sequence[Any]:
    """The images of ``dataset``, or the paths of its videos, as a lazy sequence for what decodes batches."""
    return _Images(dataset)
