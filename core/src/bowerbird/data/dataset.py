"""The contract of a data set. Apart from the other contracts because it needs no torch: galleries read them too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bowerbird.retrieval.metrics import Relevance


class Dataset(ABC):
    """Items by position, each with a stable id.

    ``self[i]`` is a dict: ``image`` a ``PIL.Image`` in RGB, ``label`` an int, ``item_id`` a str, ``domain`` an int,
    as far as the record's ``provides`` says so.
    """

    classes: Sequence[str] = ()
    domains: Sequence[str] = ()

    @classmethod
    @abstractmethod
    def build(cls, config: Any, split: str | None) -> Dataset:
        """The items of ``split``. Raises ``UnknownNameError`` for a split that does not exist."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @property
    @abstractmethod
    def item_ids(self) -> Sequence[str]:
        """Stable, unique ids, in order of position."""

    def labels(self) -> Sequence[int]:
        """Class index of every item, without decoding images. Overridden where that is cheap."""
        return [self[i]["label"] for i in range(len(self))]

    def domain_indices(self) -> Sequence[int]:
        """Index of the domain of every item, without decoding images. Overridden where that is cheap."""
        return [self[i]["domain"] for i in range(len(self))]

    def metadata(self) -> Sequence[Mapping[str, Any]] | None:
        """What a gallery keeps beside each item, JSON values, without decoding images; ``None`` for nothing.

        By default the name of its class as ``label``.
        """
        return [{"label": self.classes[label]} for label in self.labels()] if self.classes else None

    def relevance(self, gallery: Dataset) -> Relevance | None:
        """What is right and what is ignored for these items as queries in ``gallery``, whose ids are its positions.

        ``None``: the set has no ground truth of its own, and the same class is right.
        """
        return None
