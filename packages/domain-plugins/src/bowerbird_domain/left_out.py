"""``domain:left-out``: any data set whose items have a domain, with domains left out of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bowerbird.data.dataset import Dataset
from bowerbird.data.uris import open_dataset, parse_dataset
from bowerbird.errors import InputError, UnknownNameError, did_you_mean
from bowerbird.records import DatasetRecord
from bowerbird.registry import get_registry
from bowerbird_domain.configs import LeftOutConfig
from bowerbird_domain.domains import leave_out


class LeftOut(Dataset):
    """The items of another data set; their classes are the source's, or what their metadata hold under ``label``."""

    def __init__(self, source: Dataset, label: str | None = None) -> None:
        self.source, self.label = source, label
        self.classes, self.domains = source.classes, source.domains
        self._labels = source.labels()
        if label is not None:
            known = source.metadata() or [{}]
            if label not in known[0]:
                raise UnknownNameError(
                    f"domain:left-out: label = {label!r}: the items' metadata have {', '.join(known[0]) or 'no keys'}."
                    f"{did_you_mean(label, known[0])}"
                )
            values = [str(of_item[label]) for of_item in known]
            self.classes = tuple(sorted(set(values)))
            position = {value: i for i, value in enumerate(self.classes)}
            self._labels = [position[value] for value in values]

    @classmethod
    def build(cls, config: LeftOutConfig, split: str | None = None) -> Dataset:
        """The items of ``split``: ``train``, ``validation``, ``test`` (the domains in ``unseen``), by default all.

        Raises:
            InputError: The items of the source have no domain; ``unseen`` leaves nothing to train on, or nothing to
                test on.
            UnknownNameError: Another data set, split, domain, or key of the metadata.
            DataError: The split is empty.
        """
        record = get_registry().get("dataset", parse_dataset(config.source)[0])
        assert isinstance(record, DatasetRecord)
        if "domain" not in record.provides:
            raise InputError(f"domain:left-out: the items of {record.name} have no domain (a style, a camera, a place)")
        source, _ = open_dataset(config.source, config.source_split)
        return leave_out(
            cls(source, config.label),
            split,
            config.unseen,
            validation_fraction=config.validation_fraction,
            name="domain:left-out",
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.source[index], "label": self._labels[index]}

    @property
    def item_ids(self) -> Sequence[str]:
        return self.source.item_ids

    def labels(self) -> Sequence[int]:
        return self._labels

    def domain_indices(self) -> Sequence[int]:
        return self.source.domain_indices()

    def metadata(self) -> Sequence[Mapping[str, Any]] | None:
        return self.source.metadata()
