"""Where objects may be in a picture: boxes of a data set, of a grid, at random, by selective search, or from a file.

Selective search takes seconds per picture; boxes can be found once and kept:

    python -m bowerbird_mim.proposals "core:image-folder?root=photos" boxes.npz --split train

A box is (left, top, right, bottom) in pixels of the picture.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor
from torch.utils import data

from bowerbird.data.dataset import Dataset
from bowerbird.errors import DataError, InputError, MissingExtraError, did_you_mean
from bowerbird.files import write_atomically
from bowerbird_mim.boxes import check_boxes, filter_proposals, random_boxes


class ProposalSource(Protocol):
    """Finds boxes in pictures; the same picture gives the same boxes."""

    def boxes(self, image: Image.Image) -> Tensor:
        """float32 ``(M, 4)``, the best first."""
        ...


@dataclass(frozen=True)
class GridProposals:
    """Windows of 1/n of the picture's sides, half a window apart, for each n of ``divisions``."""

    divisions: tuple[int, ...] = (2, 3)

    def boxes(self, image: Image.Image) -> Tensor:
        width, height = image.size
        found = []
        for n in self.divisions:
            w, h = width / n, height / n
            found += [
                (x, y, x + w, y + h)
                for y in np.linspace(0, height - h, 2 * n - 1)
                for x in np.linspace(0, width - w, 2 * n - 1)
            ]
        corners = torch.tensor(found, dtype=torch.float32)
        return torch.minimum(corners, corners.new_tensor([width, height, width, height]))  # sums may round up


@dataclass(frozen=True)
class RandomProposals:
    """``count`` random boxes, drawn by the picture's pixels and ``seed``; limits as in ``random_boxes``."""

    count: int = 32
    min_side: int = 64
    max_aspect: float = 3.0
    max_iou: float = 0.5
    seed: int = 0

    def boxes(self, image: Image.Image) -> Tensor:
        rng = np.random.default_rng([self.seed, zlib.crc32(image.tobytes())])
        found = random_boxes((0, 0, *image.size), self.count, rng, self.min_side, self.max_aspect, self.max_iou)
        return torch.from_numpy(found.astype(np.float32))


@dataclass(frozen=True)
class SelectiveSearch:
    """Selective search of OpenCV's contributed modules; needs ``pip install 'bowerbird-mim[proposals]'``.

    Uijlings, van de Sande, Gevers, Smeulders: Selective Search for Object Recognition, IJCV 2013.

    Attributes:
        quality: Slower, more boxes.
        max_side: Larger pictures are shrunk to this longer side before they are searched.
    """

    quality: bool = False
    max_side: int = 500

    def __post_init__(self) -> None:
        _selective_search()  # says at once what is missing

    def boxes(self, image: Image.Image) -> Tensor:
        shrunk = image.convert("RGB")
        shrunk.thumbnail((self.max_side, self.max_side))
        search = _selective_search()
        search.setBaseImage(np.ascontiguousarray(np.asarray(shrunk)[:, :, ::-1]))  # blue, green, red
        (search.switchToSelectiveSearchQuality if self.quality else search.switchToSelectiveSearchFast)()
        left, top, width, height = np.asarray(search.process(), np.float64).reshape(-1, 4).T
        x, y = image.width / shrunk.width, image.height / shrunk.height
        found = np.stack([left * x, top * y, (left + width) * x, (top + height) * y], axis=1)
        found = np.minimum(found, [image.width, image.height, image.width, image.height])
        return torch.from_numpy(found.astype(np.float32))


def _selective_search() -> Any:
    try:
        import cv2

        return cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    except (ImportError, AttributeError) as error:  # the plain OpenCV package has no ximgproc
        raise MissingExtraError(
            "selective search needs OpenCV with its contributed modules: pip install 'bowerbird-mim[proposals]' "
            "(remove opencv-python first if it is installed; both packages have one folder)"
        ) from error


# ------------------------------------------------------------------------------------------------ boxes of items

SOURCES = ("boxes", "grid", "random", "selective-search")


def check_proposals(name: str) -> None:
    """Raises ``InputError`` where ``name`` is neither one of ``SOURCES`` nor a file of stored boxes."""
    if name not in SOURCES and not name.endswith(".npz"):
        raise InputError(
            f"proposals = {name!r}: expected one of {', '.join(SOURCES)}, or an .npz file that "
            f"`python -m bowerbird_mim.proposals` has written.{did_you_mean(name, SOURCES)}"
        )


class ItemProposals:
    """The boxes of a data set's items: the item's own ``boxes``, found in its picture, or read from a file.

    Args:
        name: ``boxes`` (the item's own), ``grid``, ``random``, ``selective-search``, or an ``.npz`` file.
        min_side, max_aspect, max_iou: Limits; what does not meet them is left out (``filter_proposals``).
    """

    def __init__(self, name: str, *, min_side: int = 64, max_aspect: float = 3.0, max_iou: float = 0.5) -> None:
        check_proposals(name)
        self.name, self.limits = name, {"min_side": min_side, "max_aspect": max_aspect, "max_iou": max_iou}
        self.stored = read_boxes(name) if name.endswith(".npz") else {}
        self.source: ProposalSource | None = None
        if name == "grid":
            self.source = GridProposals()
        elif name == "random":
            self.source = RandomProposals(min_side=min_side, max_aspect=max_aspect, max_iou=max_iou)
        elif name == "selective-search":
            self.source = SelectiveSearch()

    def __call__(self, item: Mapping[str, Any]) -> Tensor:
        """``(M', 4)``. Raises ``InputError`` where the items have no boxes, ``DataError`` for boxes that do not fit."""
        found: Any
        if self.source is not None:
            return filter_proposals(self.source.boxes(item["image"]), **self.limits)
        if self.name == "boxes":
            if "boxes" not in item:
                raise InputError(
                    "proposals = 'boxes': the items of this data set have no boxes; name another source "
                    f"({', '.join(SOURCES[1:])}, or an .npz file)"
                )
            found = item["boxes"]
        else:
            found = self.stored.get(item["item_id"])
            if found is None:
                raise DataError(f"{self.name!r} has no boxes of item {item['item_id']!r}")
        try:
            return filter_proposals(check_boxes(found, item["image"].size), **self.limits)
        except InputError as error:
            raise DataError(f"item {item.get('item_id')!r}, proposals = {self.name!r}: {error}") from error


def read_boxes(file: str | Path) -> dict[str, NDArray[np.float32]]:
    """Item id -> float32 ``(M, 4)``, from a file of ``write_boxes``. Raises ``DataError``."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            ids, offsets, boxes = (arrays[name] for name in ("ids", "offsets", "boxes"))
        if boxes.ndim != 2 or boxes.shape[1] != 4 or len(offsets) != len(ids) + 1 or offsets[-1] != len(boxes):
            raise ValueError(f"{len(ids)} ids, {len(offsets)} offsets and boxes of shape {boxes.shape} do not fit")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"boxes cannot be read from {str(file)!r}: {error}. Expected the arrays ids (N), offsets (N + 1) and boxes "
            "(M, 4), as `python -m bowerbird_mim.proposals` writes them"
        ) from error
    return {str(name): boxes[start:end] for name, start, end in zip(ids, offsets[:-1], offsets[1:], strict=True)}


def write_boxes(file: str | Path, boxes: Mapping[str, ArrayLike | Tensor]) -> None:
    """Keep ``boxes`` (item id -> ``(M, 4)``) in an ``.npz`` file; it is there wholly or not at all."""
    arrays = [np.asarray(found, np.float32).reshape(-1, 4) for found in boxes.values()]
    memory = io.BytesIO()
    np.savez_compressed(
        memory,
        ids=np.array(list(boxes), dtype=str),
        offsets=np.cumsum([0, *map(len, arrays)]),
        boxes=np.concatenate([np.empty((0, 4), np.float32), *arrays]),
    )
    write_atomically(file, memory.getvalue())


class BoxesOfItems(data.Dataset[tuple[str, Tensor]]):
    """Id and boxes of every item of a data set, for processes that search side by side."""

    def __init__(self, items: Dataset, find: ItemProposals) -> None:
        self.items, self.find = items, find

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        item = self.items[index]
        return item["item_id"], self.find(item)


@click.command(help="Find boxes in every picture of DATASET (NAME or NAME?key=value) and keep them in FILE (.npz).")
@click.argument("dataset")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--split", help="Which part of the data set.")
@click.option("--source", type=click.Choice(SOURCES[1:]), default="selective-search", show_default=True)
@click.option("--min-side", default=64, show_default=True, help="Smallest side of a box in pixels.")
@click.option("--max-aspect", default=3.0, show_default=True, help="Largest ratio of its sides.")
@click.option("--max-iou", default=0.5, show_default=True, help="Two kept boxes overlap less than this.")
@click.option("--workers", default=0, show_default=True, help="Processes that search; 0: this one.")
def main(
    dataset: str,
    file: Path,
    split: str | None,
    source: str,
    min_side: int,
    max_aspect: float,
    max_iou: float,
    workers: int,
) -> None:
    from bowerbird.data.uris import open_dataset
    from bowerbird.errors import BowerbirdError

    try:
        if file.suffix != ".npz":
            raise InputError(f"FILE = {str(file)!r}: expected a name that ends with .npz")
        find = ItemProposals(source, min_side=min_side, max_aspect=max_aspect, max_iou=max_iou)
        items = BoxesOfItems(open_dataset(dataset, split)[0], find)
        loader = data.DataLoader(items, batch_size=None, num_workers=workers)
        with click.progressbar(loader, length=len(items), label="Boxes") as pairs:
            found = dict(pairs)
        write_boxes(file, found)
    except BowerbirdError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{sum(map(len, found.values()))} boxes of {len(found)} items in {file}")


if __name__ == "__main__":
    main()
