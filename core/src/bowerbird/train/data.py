"""From a data set to batches: order, augmentation, collation, and the cache of a frozen trunk.

Everything random here is a function of seed, epoch and position of the item: it does not depend on the number of worker
processes, nor on where a run was interrupted. B batch, F width of the frozen trunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils import data

from bowerbird import dist
from bowerbird.batch import Batch
from bowerbird.data import images_of
from bowerbird.data.images import Preprocessing, decode_batches
from bowerbird.data.videos import decode_clips, prepare_clip, read_clip
from bowerbird.errors import DataError, InputError, RecipeError
from bowerbird.files import new_rows
from bowerbird.protocols import Dataset, Encoder, ItemTransform

Position = tuple[int, int]  # epoch and index of an item; indices past the last item go through the items again


def epoch_batches(
    count: int,
    *,
    batch_size: int,
    epoch: int,
    seed: int,
    labels: Sequence[int] | None = None,
    items_per_class: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> list[NDArray[np.int64]]:
    """The batches of one epoch as positions; process ``rank`` gets its equal part of each joined batch.

    The last items that fill no batch are left out (other items every epoch). With ``items_per_class`` a batch is made
    of groups of that many items of one class (the last group of a class may be smaller).

    Raises:
        RecipeError: A batch cannot be divided among the processes.
    """
    generator = np.random.default_rng([seed, epoch])
    if items_per_class is None:
        order = generator.permutation(count)
    else:
        if labels is None:
            raise RecipeError("train.items_per_class needs labels, and the data set has none")
        shuffled = generator.permutation(count)
        by_class = shuffled[np.argsort(np.asarray(labels)[shuffled], kind="stable")]
        classes = np.asarray(labels)[by_class]
        starts = np.flatnonzero(np.r_[True, classes[1:] != classes[:-1]])
        groups = [
            members[start : start + items_per_class]
            for members in np.split(by_class, starts[1:])
            for start in range(0, len(members), items_per_class)
        ]
        order = np.concatenate([groups[i] for i in generator.permutation(len(groups))])
    size = min(batch_size, count)
    if size % world_size:
        raise RecipeError(f"a batch of {size} items cannot be divided among {world_size} processes: change batch_size")
    part = size // world_size
    return [
        order[start + rank * part : start + (rank + 1) * part].astype(np.int64)
        for start in range(0, count - size + 1, size)
    ]


def alternating_batches(
    domains: Sequence[int],
    *,
    batch_size: int,
    epoch: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[NDArray[np.int64]]:
    """Batches of one domain each, the domains taking turns; process ``rank`` gets its equal part of each joined batch.

    An epoch is one pass over the domain with the most batches; the others are gone through again, in a new order, as
    often as it takes. A domain of fewer items than ``batch_size`` makes batches of all of them. An index of the n-th
    pass over a domain is raised by n times the number of all items, so that random numbers drawn for it are new.

    Raises:
        RecipeError: A batch cannot be divided among the processes.
    """
    known = np.asarray(domains)
    members = [np.flatnonzero(known == domain) for domain in np.unique(known)]
    sizes = [min(batch_size, len(positions)) for positions in members]
    rounds = max(len(positions) // size for positions, size in zip(members, sizes, strict=True))
    turns = []
    for turn, (positions, size) in enumerate(zip(members, sizes, strict=True)):
        if size % world_size:
            raise RecipeError(
                f"a batch of {size} items of one domain cannot be divided among {world_size} processes: change "
                "batch_size"
            )
        generator = np.random.default_rng([seed, epoch, turn])
        passes = range(math.ceil(rounds / (len(positions) // size)))
        batches = [
            order[start : start + size] + count * len(known)
            for count in passes
            for order in [generator.permutation(positions)]
            for start in range(0, len(order) - size + 1, size)
        ]
        part = size // world_size
        turns.append([batch[rank * part : (rank + 1) * part].astype(np.int64) for batch in batches[:rounds]])
    return [batch for batches in zip(*turns, strict=True) for batch in batches]


class TrainItems(data.Dataset[dict[str, Any] | None]):
    """Items of a data set as the batch needs them, augmented by epoch and position.

    ``transform`` (``Objective.item_transform``) takes the place of ``preprocessing`` and ``augment``. An item that
    cannot be read raises ``DataError``, or is ``None`` with ``skip_unreadable``. Of a video, ``frames`` frames are
    read, drawn uniformly; without ``frames`` the item keeps its path.
    """

    def __init__(
        self,
        dataset: Dataset,
        preprocessing: Preprocessing | None,
        *,
        augment: str,
        seed: int,
        transform: ItemTransform | None = None,
        skip_unreadable: bool = False,
        frames: int | None = None,
    ) -> None:
        self.dataset, self.preprocessing, self.augment, self.seed = dataset, preprocessing, augment, seed
        self.frames = frames
        self.transform, self.skip_unreadable = transform, skip_unreadable

    def __getitem__(self, position: Position) -> dict[str, Any] | None:
        epoch, index = position
        generator = np.random.default_rng([self.seed, epoch, index])
        index %= len(self.dataset)
        try:
            item = {**self.dataset[index], "index": index}
            if self.transform is not None:
                return self.transform(item, generator)
            if "image" in item and self.preprocessing is not None:
                item["image"] = self.preprocessing(augmented(item["image"], self.augment, generator))
            if isinstance(item.get("video"), str) and self.preprocessing is not None and self.frames is not None:
                item["video"] = prepare_clip(read_clip(item["video"], self.frames), self.preprocessing, self.frames)
        except DataError:
            if self.skip_unreadable:
                return None
            raise
        return item


def augmented(image: Image.Image, kind: str, generator: np.random.Generator) -> Image.Image:
    """``image`` after a random crop and/or flip; ``kind`` is ``none``, ``flip``, ``crop`` or ``crop-flip``.

    The crop has 35 to 100 % of the area and a ratio of sides between 3/4 and 4/3 (log-uniform), as far as it fits.
    """
    if "crop" in kind:
        width, height = image.size
        area = generator.uniform(0.35, 1.0) * width * height
        ratio = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        w = int(np.clip(round(np.sqrt(area * ratio)), 1, width))
        h = int(np.clip(round(np.sqrt(area / ratio)), 1, height))
        left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
        image = image.crop((left, top, left + w, top + h))
    if "flip" in kind and generator.random() < 0.5:
        image = ImageOps.mirror(image)
    return image


SKIPPED = "skipped"  # batch key: how many items of the batch could not be read and were left out


def collate(items: Sequence[Mapping[str, Any] | None], tokenize: Callable[[list[str]], Any] | None = None) -> Batch:
    """A batch of items: numbers and arrays are stacked, the rest becomes a list. Of a ``text`` that is a list of texts
    the first is taken; with ``tokenize`` texts are tokenized.

    Pictures with an ``image_size`` may differ in size: they are padded with zeros at the bottom and the right.
    ``None`` stands for an item that could not be read; their number is the entry ``skipped``.

    Raises:
        DataError: No item of the batch could be read.
    """
    batch: Batch = {}
    readable = [item for item in items if item is not None]
    if not readable:
        raise DataError(f"none of the {len(items)} items of a batch can be read")
    if len(readable) < len(items):
        batch[SKIPPED] = len(items) - len(readable)
    items = readable
    for key in items[0]:
        values = [item[key] for item in items]
        first = values[0]
        if key == "text" and tokenize is not None:
            batch[key] = tokenize([value if isinstance(value, str) else str(value[0]) for value in values])
        elif isinstance(first, bool | int | np.integer):
            batch[key] = torch.tensor(values, dtype=torch.int64)
        elif key == "image" and "image_size" in items[0]:
            batch[key] = padded([torch.as_tensor(value) for value in values])
        elif isinstance(first, np.ndarray | Tensor) and key not in ("boxes", "masks", "keypoints", "crowd"):
            batch[key] = torch.stack([torch.as_tensor(value) for value in values])
        else:
            batch[key] = values
    return batch


def padded(images: Sequence[Tensor]) -> Tensor:
    """``(B, 3, H, W)``: pictures ``(3, h, w)`` at the upper left of the smallest joint size, zeros elsewhere."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch = images[0].new_zeros((len(images), len(images[0]), height, width))
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return batch


class _Order(data.Sampler[list[Position]]):
    """The batches of one epoch as positions; changed between epochs, while no iterator is in use."""

    epoch: int = 0
    batches: Sequence[NDArray[np.int64]] = ()

    def __iter__(self) -> Iterator[list[Position]]:
        return ([(self.epoch, int(index)) for index in batch] for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class BatchReader:
    """Reads, augments and collates the items of one data set, epoch by epoch.

    Worker processes start with the first epoch and live as long as the reader: starting them again for every epoch of a
    small data set would take longer than the epoch. ``items`` goes to them once.

    Args:
        workers: Processes that read; 0 reads in this one, while the network waits.
        tokenize: Of texts.
    """

    def __init__(
        self, items: TrainItems, *, workers: int = 0, tokenize: Callable[[list[str]], Any] | None = None
    ) -> None:
        self._order = _Order()
        self._loader = data.DataLoader(
            items,
            batch_sampler=self._order,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_Collate(tokenize),
            generator=torch.Generator().manual_seed(items.seed),  # its own: it must not move the global one
        )

    def epoch(self, epoch: int, batches: Sequence[NDArray[np.int64]]) -> Iterator[Batch]:
        """``batches`` of positions, read for ``epoch``. One epoch at a time."""
        self._order.epoch, self._order.batches = epoch, batches
        return iter(self._loader)


class _Collate:
    """``collate`` with a tokenizer, in a form that worker processes accept."""

    def __init__(self, tokenize: Callable[[list[str]], Any] | None) -> None:
        self.tokenize = tokenize

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        return collate(items, self.tokenize)


# ------------------------------------------------------------------------------------------------ the frozen trunk


class CachedTrunk:
    """Output of the frozen trunk for every item of a data set, in a file that is mapped into memory."""

    def __init__(self, features: NDArray[np.float32], dataset: Dataset, *, with_labels: bool) -> None:
        self.features = features
        self.item_ids = list(dataset.item_ids)
        self.labels = np.asarray(dataset.labels()) if with_labels else None

    def batches(self, batches: Iterable[NDArray[np.int64]]) -> Iterator[Batch]:
        """Batches with ``frozen_features`` in the place of ``image``."""
        for index in batches:
            batch: Batch = {
                "frozen_features": torch.from_numpy(np.ascontiguousarray(self.features[index])),
                "index": torch.from_numpy(index),
                "item_id": [self.item_ids[i] for i in index],
            }
            if self.labels is not None:
                batch["label"] = torch.from_numpy(self.labels[index].astype(np.int64))
            yield batch


def cache_trunk(
    encoder: Encoder,
    dataset: Dataset,
    file: Path,
    *,
    device: torch.device,
    with_labels: bool,
    batch_size: int = 32,
) -> CachedTrunk:
    """Run the frozen trunk once per item; a finished file of an earlier start of the run is used again.

    Only the main process computes; the others wait and map the same file.

    Raises:
        RecipeError: The encoder has no frozen trunk.
    """
    if dist.is_main() and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part.npy")
        rows: Any = None
        start = 0
        encoder.eval()
        with torch.inference_mode():
            for batch in ordered_batches(encoder, dataset, keys=("image",), batch_size=batch_size, device=device):
                features = encoder.frozen_trunk(batch)
                if features is None:
                    raise RecipeError(
                        f"train.cache_trunk: the encoder {type(encoder).__name__} has no frozen trunk; "
                        "set encoder.freeze_trunk = true, or train.cache_trunk = false"
                    )
                if rows is None:
                    rows = new_rows(part, (len(dataset), features.shape[1]))
                rows[start : start + len(features)] = features.float().cpu().numpy()
                start += len(features)
        rows.flush()
        del rows
        part.replace(file)
    dist.barrier()
    return CachedTrunk(np.load(file, mmap_mode="r"), dataset, with_labels=with_labels)


def ordered_batches(
    encoder: Encoder, dataset: Dataset, *, keys: Sequence[str], batch_size: int, device: torch.device
) -> Iterator[Batch]:
    """One pass in order of position with the encoder's own preparation of pictures and videos, without augmentation.

    ``batch_size`` counts pictures: of videos a batch has as many as have that many frames, one at least.
    """
    labels = np.asarray(dataset.labels()) if "label" in keys else None
    ids = dataset.item_ids

    def extras(index: NDArray[np.int64]) -> Batch:
        batch: Batch = {"index": torch.from_numpy(index).to(device), "item_id": [ids[i] for i in index]}
        if labels is not None:
            batch["label"] = torch.from_numpy(labels[index].astype(np.int64)).to(device)
        return batch

    preprocessing, frames = encoder.preprocessing, encoder.frames
    batch_size = max(1, batch_size // (frames or 1))
    others = set(keys) - {"label", "index", "item_id"}
    if preprocessing is not None and frames is not None and others <= {"video"}:
        for index, clips in decode_clips(images_of(dataset), preprocessing, frames, batch_size=batch_size):
            yield {"video": torch.from_numpy(clips).to(device), **extras(index)}
        return
    if preprocessing is not None and others <= {"image"}:
        for index, images in decode_batches(images_of(dataset), preprocessing, batch_size=batch_size):
            yield {"image": torch.from_numpy(images).to(device), **extras(index)}
        return
    tokenize = getattr(encoder, "tokenize", None)
    items = TrainItems(dataset, preprocessing, augment="none", seed=0, frames=frames)
    for start in range(0, len(dataset), batch_size):
        found = collate([items[0, i] for i in range(start, min(start + batch_size, len(dataset)))], tokenize)
        lacking = [key for key in keys if key not in found]
        if lacking:
            raise InputError(f"the items have no {', '.join(lacking)}; they have {', '.join(sorted(found))}")
        yield to_device(found, device)


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on ``device``; dicts and lists are walked through."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [to_device(item, device) for item in value]
    return value
