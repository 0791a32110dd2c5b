"""The contract of data sets, and a small one made of colours to test other things with."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image

from bowerbird.data.dataset import Dataset
from bowerbird.errors import UnknownNameError
from bowerbird.records import DatasetRecord
from bowerbird.testing.contract import Contract, must_raise

NO_SUCH_SPLIT = "no-such-split"


class SyntheticDataset(Dataset):
    """``num_items`` noisy images of ``num_classes`` colours, 8 pixels wide. Item i has class ``i % num_classes``."""

    def __init__(self, num_items: int = 24, num_classes: int = 3, *, seed: int = 0) -> None:
        self.classes = [f"colour-{c}" for c in range(num_classes)]
        self.domains = ["even", "odd"]
        self._labels = [i % num_classes for i in range(num_items)]
        rng = np.random.default_rng(seed)
        colours = np.random.default_rng(0).integers(40, 216, (num_classes, 1, 1, 3))
        noise = rng.integers(-25, 26, (num_items, 8, 8, 3))
        self._pixels = (colours[self._labels] + noise).astype(np.uint8)
        self._ids = [f"synthetic/{seed}/{i:04d}" for i in range(num_items)]

    @classmethod
    def build(cls, config: Any, split: str | None) -> Self:
        return cls()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": Image.fromarray(self._pixels[index]),
            "label": self._labels[index],
            "item_id": self._ids[index],
            "domain": index % 2,
        }

    @property
    def item_ids(self) -> Sequence[str]:
        return self._ids

    def labels(self) -> Sequence[int]:
        return self._labels


class DatasetContract(Contract):
    """Set ``name``, ``config``, and ``splits`` where the record lists none.

    Attributes:
        splits: Splits to test; by default the record's, or ``None`` (everything) where it lists none.
        disjoint: Pairs of splits that may share no item.
        sample: How many items of each split are looked at, spread evenly.
    """

    kind = "dataset"
    splits: ClassVar[Sequence[str | None]] = ()
    disjoint: ClassVar[Sequence[tuple[str, str]]] = ()
    sample: ClassVar[int] = 8

    @property
    def dataset_record(self) -> DatasetRecord:
        record = self.record
        assert isinstance(record, DatasetRecord)
        return record

    def build(self, split: str | None) -> Dataset:
        return self.target.build(self.make_config(), split)

    def splits_to_read(self) -> Sequence[str | None]:
        return self.splits or self.dataset_record.splits or (None,)

    def positions(self, dataset: Dataset) -> list[int]:
        return sorted({round(i) for i in np.linspace(0, len(dataset) - 1, min(self.sample, len(dataset)))})

    def test_item_ids_are_unique_text_and_the_same_in_every_build(self) -> None:
        """Fix: make ids from what identifies an item (a path, a key), never from its position in a shuffled list."""
        for split in self.splits_to_read():
            first, second = self.build(split), self.build(split)
            ids = list(first.item_ids)
            assert len(first) == len(ids) > 0, f"split {split!r}: {len(first)} items, {len(ids)} ids"
            assert all(isinstance(item_id, str) and item_id for item_id in ids), f"split {split!r}: an id is no text"
            assert len(set(ids)) == len(ids), f"split {split!r}: ids are not unique"
            assert ids == list(second.item_ids), f"split {split!r}: a second build has other ids"

    def test_items_have_the_keys_and_types_of_the_record(self) -> None:
        """Fix: ``image`` is an RGB PIL image, ``label`` a class index, ``item_id`` the id, ``domain`` an index."""
        wanted = set(self.dataset_record.provides) - {"index"}  # the loader numbers items itself
        for split in self.splits_to_read():
            dataset = self.build(split)
            for i in self.positions(dataset):
                item = dataset[i]
                assert not (missing := wanted - item.keys()), f"{split!r}[{i}] lacks {sorted(missing)}"
                if "image" in wanted:
                    image = item["image"]
                    assert isinstance(image, Image.Image) and image.mode == "RGB", f"{split!r}[{i}]: {image!r}"
                if "label" in wanted:
                    assert isinstance(item["label"], int | np.integer), f"{split!r}[{i}]: label {item['label']!r}"
                    assert 0 <= item["label"] < len(dataset.classes), f"{split!r}[{i}]: label {item['label']}"
                if "domain" in wanted:
                    assert 0 <= item["domain"] < len(dataset.domains), f"{split!r}[{i}]: domain {item['domain']}"
                if "item_id" in wanted:
                    assert item["item_id"] == dataset.item_ids[i], f"{split!r}[{i}] has the id of another item"

    def test_domains_agree_with_the_items(self) -> None:
        """Fix: ``domain_indices()`` and ``self[i]['domain']`` must come from one place."""
        if "domain" not in self.dataset_record.provides:
            return
        for split in self.splits_to_read():
            dataset = self.build(split)
            domains = dataset.domain_indices()
            assert len(domains) == len(dataset), f"split {split!r}: {len(domains)} domains for {len(dataset)} items"
            for i in self.positions(dataset):
                assert int(domains[i]) == dataset[i]["domain"], f"{split!r}[{i}]: domain {domains[i]}"

    def test_an_item_is_the_same_whenever_it_is_read(self) -> None:
        """Fix: no augmentation in the data set; that is the recipe's job."""
        for split in self.splits_to_read():
            first, second = self.build(split), self.build(split)
            for i in self.positions(first):
                one, two = first[i], second[i]
                assert one.keys() == two.keys()
                for key in one:
                    same = (
                        one[key].tobytes() == two[key].tobytes()
                        if isinstance(one[key], Image.Image)
                        else np.array_equal(np.asarray(one[key]), np.asarray(two[key]))
                    )
                    assert same, f"{split!r}[{i}][{key!r}] differs between two builds"

    def test_labels_agree_with_the_items(self) -> None:
        """Fix: ``labels()`` and ``self[i]['label']`` must come from one place."""
        if "label" not in self.dataset_record.provides:
            return
        for split in self.splits_to_read():
            dataset = self.build(split)
            labels = dataset.labels()
            assert len(labels) == len(dataset), f"split {split!r}: {len(labels)} labels of {len(dataset)} items"
            for i in self.positions(dataset):
                assert labels[i] == dataset[i]["label"], f"{split!r}[{i}]: labels() says {labels[i]}"

    def test_a_split_that_does_not_exist_is_refused_by_name(self) -> None:
        """Fix: raise ``UnknownNameError`` with the split's name and a suggestion (``did_you_mean``)."""
        try:
            self.build(NO_SUCH_SPLIT)
        except UnknownNameError as exc:
            assert NO_SUCH_SPLIT in str(exc), f"the message does not name the split: {exc}"
            return
        raise AssertionError(f"split {NO_SUCH_SPLIT!r} was accepted")

    def test_a_position_outside_the_data_set_is_refused(self) -> None:
        """Fix: let ``self[len(self)]`` raise IndexError; plain iteration relies on it."""
        dataset = self.build(self.splits_to_read()[0])
        must_raise(lambda: dataset[len(dataset)], f"position {len(dataset)} of {len(dataset)} items")

    def test_it_can_be_sent_to_a_worker_process(self) -> None:
        """Fix: open files lazily and leave handles out of the state; loaders start workers with a copy."""
        dataset = self.build(self.splits_to_read()[0])
        copy = pickle.loads(pickle.dumps(dataset))
        assert list(copy.item_ids) == list(dataset.item_ids)
        assert copy[0].keys() == dataset[0].keys()

    def test_disjoint_splits_share_no_item(self) -> None:
        """Fix: an item that is trained on must not be tested on."""
        for one, other in self.disjoint:
            shared = set(self.build(one).item_ids) & set(self.build(other).item_ids)
            assert not shared, f"splits {one!r} and {other!r} share {len(shared)} items: {sorted(shared)[:3]}"
