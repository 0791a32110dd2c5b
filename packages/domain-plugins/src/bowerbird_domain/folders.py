"""``domain:folders``: one's own pictures in folders DOMAIN/CLASS, as PACS, Office-Home and DomainNet have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bowerbird.data.configs import ImageFolderConfig
from bowerbird.data.dataset import Dataset
from bowerbird.data.image_folder import ImageFolder
from bowerbird.errors import DataError
from bowerbird_domain.configs import FoldersConfig
from bowerbird_domain.domains import leave_out

_SHOWN = 5  # names in an error message


class DomainFolders(Dataset):
    """One item per image file, sorted by id; the id is the path below ``root``: ``sketch/dog/001.png``.

    ``domain`` and ``label`` are positions in ``domains`` and ``classes``, the sorted names of the folders. Files are
    opened when an item is read.
    """

    def __init__(self, files: ImageFolder, positions: Sequence[int]) -> None:
        self._files, self._positions = files, list(positions)
        self._ids = [files.item_ids[i] for i in self._positions]
        parts = [item.split("/") for item in self._ids]
        self.domains = tuple(sorted({part[0] for part in parts}))
        self.classes = tuple(sorted({part[1] for part in parts}))
        self._domains = [self.domains.index(part[0]) for part in parts]
        self._labels = [self.classes.index(part[1]) for part in parts]

    @classmethod
    def build(cls, config: FoldersConfig, split: str | None = None) -> Dataset:
        """The items of ``split``: ``train``, ``validation``, ``test`` (the domains in ``unseen``), by default all.

        Raises:
            DataError: There is no such folder; fewer than two domains; an image outside of DOMAIN/CLASS folders; a
                domain of one image; domains with different classes (unless ``classes = "common"``); an empty split.
            UnknownNameError: A split or a domain in ``unseen`` that does not exist.
            InputError: ``unseen`` leaves nothing to train on, or nothing to test on.
        """
        files = ImageFolder.build(ImageFolderConfig(root=config.root, layout="flat", max_pixels=config.max_pixels))
        parts = [item.split("/") for item in files.item_ids]
        for item, part in zip(files.item_ids, parts, strict=True):
            if len(part) < 3:
                raise DataError(
                    f"domain:folders: {item} lies in no class folder of a domain below {files.root}; an image is at "
                    "DOMAIN/CLASS/FILE"
                )
        found = {domain: {p[1] for p in parts if p[0] == domain} for domain in sorted({p[0] for p in parts})}
        if len(found) < 2:
            raise DataError(
                f"domain:folders: {files.root} has one domain, {', '.join(found)}; at least two are needed. Images in "
                "CLASS/FILE are read by core:image-folder"
            )
        for domain, images in Counter(p[0] for p in parts).items():
            if images < 2:
                raise DataError(
                    f"domain:folders: the domain {domain!r} in {files.root} has one image; a domain needs at least 2. "
                    "Add some, or move the folder away"
                )
        kept = set.intersection(*found.values())
        if config.classes == "equal":
            _check_equal(found, files)
        elif not kept:
            raise DataError(f"domain:folders: no class is in every domain of {files.root} ({', '.join(found)})")
        whole = cls(files, [i for i, part in enumerate(parts) if part[1] in kept])
        return leave_out(
            whole, split, config.unseen, validation_fraction=config.validation_fraction, name="domain:folders"
        )

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": self._files[self._positions[index]]["image"],
            "label": self._labels[index],
            "item_id": self._ids[index],
            "domain": self._domains[index],
        }

    @property
    def item_ids(self) -> Sequence[str]:
        return self._ids

    def labels(self) -> Sequence[int]:
        return self._labels

    def domain_indices(self) -> Sequence[int]:
        return self._domains

    def metadata(self) -> list[dict[str, str]]:
        """``label`` and ``domain`` of every item, by name."""
        return [{"domain": item.split("/")[0], "label": item.split("/")[1]} for item in self._ids]


def _check_equal(found: Mapping[str, set[str]], files: ImageFolder) -> None:
    """Raise ``DataError`` where a domain lacks a class that another one has."""
    every = set.union(*found.values())
    lacking = {domain: sorted(every - classes) for domain, classes in found.items() if classes != every}
    if lacking:
        texts = [
            f"{domain!r} lacks {', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' * (len(names) > _SHOWN)}"
            for domain, names in lacking.items()
        ]
        raise DataError(
            f"domain:folders: the domains in {files.root} have different classes: {'; '.join(texts)}. Accepted: the "
            'same class folders, none empty, in every domain; or classes = "common" to use the classes that all have'
        )
