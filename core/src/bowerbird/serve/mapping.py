"""The map of a gallery: its items on a plane, similar ones near each other.

``pca`` projects on the two directions of largest variance; ``umap`` (where umap-learn is installed) keeps neighbours
together and takes minutes where PCA takes seconds. Both are deterministic.

During an upgrade the map shows the space in which most items have a vector, the newer one of equals: the old space,
whose vectors stay until the end, while the backfill goes on. Another space can be asked for.

N items, D width.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import InputError, UnknownNameError
from bowerbird.serve.aside import aside
from bowerbird.serve.schemas import MapView

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.protocol import Snapshot
    from bowerbird.serve.settings import ServeSettings

METHODS = ("pca", "umap")
MOST_POINTS = 50_000
GROUPS = 10  # as many as colours can be told apart
SIDE = 65_535  # positions are whole numbers from 0 to this
BASIS_ROWS = 10_000  # on which the directions of PCA are found
BASIS_NUMBERS = 20_000_000  # fewer rows where vectors are wide: rows x D stays below
UMAP_WIDTH = 50  # PCA brings the vectors to this width first
BLOCK = 8192  # rows in memory at a time
SECONDS = {"pca": 120.0, "umap": 900.0}
KEPT = 4  # layouts


def available() -> list[str]:
    """Methods that this service has."""
    return [name for name in METHODS if name != "umap" or importlib.util.find_spec("umap") is not None]


# ------------------------------------------------------------------------------------- in the process of the service


@dataclass(frozen=True)
class Layout:
    """Where items are. They keep their place as long as the same items are shown.

    Attributes:
        nums: ``(N,)`` item numbers.
        fixed: The fields of the view that follow from them, as JSON.
    """

    nums: NDArray[np.int64]
    fixed: str


class Maps:
    """Makes maps, one at a time, and keeps the last ones."""

    def __init__(self, settings: ServeSettings, gallery: Gallery) -> None:
        self.settings, self.gallery = settings, gallery
        self._kept: OrderedDict[tuple[str, ...], Layout] = OrderedDict()
        self._turn = asyncio.Lock()

    async def view(self, method: str, limit: int, space: str | None = None) -> bytes:
        """A ``MapView`` as JSON.

        Raises:
            InputError: If the method needs what is not installed.
            UnknownNameError: If the gallery does not know the space.
        """
        if method not in available():
            raise InputError(
                f"the service cannot draw {method!r}: it needs umap-learn (pip install 'bowerbird-core[umap]' where "
                f"it runs); here is {', '.join(available())}"
            )
        snapshot, chosen, nums, total = await asyncio.to_thread(self._choose, limit, space)
        key = (method, chosen, hashlib.sha256(nums.tobytes()).hexdigest())
        if key not in self._kept:
            async with self._turn:
                if key not in self._kept:
                    made = await aside(
                        "map",
                        seconds=SECONDS[method],
                        gallery=self.settings.gallery,
                        space=chosen,
                        nums=nums.tolist(),
                        method=method,
                        label_key=self.settings.label_key,
                    )
                    self._kept[key] = await asyncio.to_thread(_layout, made, method, chosen)
                    while len(self._kept) > KEPT:
                        self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return await asyncio.to_thread(_json, self._kept[key], snapshot, total)

    def _choose(self, limit: int, space: str | None) -> tuple[Snapshot, str, NDArray[np.int64], int]:
        snapshot = self.gallery.snapshot()
        if space is None:
            space = best_space(snapshot)
        elif space not in snapshot.spaces:
            raise UnknownNameError(f"this gallery has no space {space!r}; GET /v1/spaces lists them")
        nums = np.sort(snapshot.rows_of(space).nums)
        return snapshot, space, sample(nums, limit), len(nums)


def best_space(snapshot: Snapshot) -> str:
    """Fingerprint of the space in which most live items have a vector; the newest of equals."""
    counts = [snapshot.rows_of(name).count for name in snapshot.stack]
    return snapshot.stack[max(range(len(counts)), key=lambda place: (counts[place], place))]


def sample(nums: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """At most ``limit`` of the numbers, ascending. Which ones depends on each number alone, as far as it can: a gallery
    that changes a little is shown by nearly the same items."""
    if len(nums) <= limit:
        return nums
    mixed = nums.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.sort(nums[np.argpartition(mixed ^ (mixed >> np.uint64(32)), limit - 1)[:limit]])


def _layout(made: dict[str, Any], method: str, space: str) -> Layout:
    nums = np.array(made.pop("nums"), np.int64)
    view = MapView(method=method, space=space, epoch=0, total=0, moved=[], methods=available(), **made)  # type: ignore[arg-type]
    return Layout(nums, view.model_dump_json(exclude={"epoch", "total", "moved"})[:-1])


def _json(layout: Layout, snapshot: Snapshot, total: int) -> bytes:
    """The parts of the view that change with every commit, behind those that do not."""
    inside = layout.nums < snapshot.num_limit
    moved = np.zeros(len(layout.nums), bool)
    moved[inside] = snapshot.new.contains(layout.nums[inside])
    flags = ",".join(np.where(moved, "true", "false").tolist())
    return f'{layout.fixed},"epoch":{snapshot.epoch},"total":{total},"moved":[{flags}]}}'.encode()


# ------------------------------------------------------------------------------------------ in a process of their own


def make_layout(*, gallery: str, space: str, nums: list[int], method: str, label_key: str | None) -> dict[str, Any]:
    """``nums``, ``ids``, ``x``, ``y``, ``group``, ``groups``, ``group_key`` of the items that are still there."""
    from bowerbird.gallery.open import open_gallery

    with open_gallery(gallery, readonly=True) as opened:
        part = opened.snapshot().rows_of(space)
        there = np.intersect1d(np.array(nums, np.int64), part.nums)
        found = opened.storage.items(there.tolist())
        places = place([part.vectors_of(there[at : at + BLOCK]) for at in range(0, len(there), BLOCK)], method)
    items = [found[num] for num in there.tolist()]
    key = telling_key([item.metadata for item in items], label_key)
    group, groups = group_by([item.metadata.get(key) for item in items] if key else [None] * len(items))
    return {
        "nums": there.tolist(),
        "ids": [item.id for item in items],
        "x": places[:, 0].tolist(),
        "y": places[:, 1].tolist(),
        "group": group,
        "groups": groups,
        "group_key": key,
    }


def place(blocks: list[NDArray[np.float32]], method: str) -> NDArray[np.int64]:
    """int64 ``(N, 2)``, 0 to ``SIDE``, from blocks of rows ``(n, D)``. Both axes have one scale."""
    count = sum(map(len, blocks))
    if count == 0:
        return np.empty((0, 2), np.int64)
    if method == "umap" and count > 3:
        import umap

        reduced = principal(blocks, UMAP_WIDTH)
        model = umap.UMAP(n_neighbors=min(15, count - 1), metric="cosine", random_state=0, n_jobs=1)
        plane = np.asarray(model.fit_transform(reduced), np.float64)
    else:
        plane = principal(blocks, 2)
    low, high = plane.min(axis=0), plane.max(axis=0)
    widest = float((high - low).max())
    if widest == 0:
        return np.full((count, 2), SIDE // 2, np.int64)
    scaled = (plane - (low + high) / 2) / widest + 0.5
    return np.rint(np.clip(scaled, 0, 1) * SIDE).astype(np.int64)


def principal(blocks: list[NDArray[np.float32]], width: int) -> NDArray[np.float64]:
    """``(N, width)`` coordinates on the directions of largest variance, found on an even sample of the rows. Their
    signs are fixed by the largest entry of each direction."""
    rows, dim = sum(map(len, blocks)), blocks[0].shape[1]
    wanted = min(rows, BASIS_ROWS, max(100, BASIS_NUMBERS // dim))
    every = np.linspace(0, rows - 1, wanted).astype(np.int64)
    starts = np.cumsum([0, *map(len, blocks)])
    basis = np.concatenate(
        [
            block[every[(every >= at) & (every < at + len(block))] - at]
            for at, block in zip(starts, blocks, strict=False)
        ]
    ).astype(np.float64)
    mean = basis.mean(axis=0)
    basis -= mean
    if wanted >= dim:
        _, vectors = np.linalg.eigh(basis.T @ basis)
        axes = vectors[:, ::-1][:, :width]
    else:  # the same directions from the smaller matrix
        values, vectors = np.linalg.eigh(basis @ basis.T)
        keep = values[::-1][:width] > 1e-12 * max(values[-1], 1e-300)
        axes = basis.T @ vectors[:, ::-1][:, :width][:, keep]
        axes /= np.linalg.norm(axes, axis=0)
    signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    axes = axes * np.where(signs == 0, 1, signs)
    out = np.zeros((rows, width))
    for at, block in zip(starts, blocks, strict=False):
        out[at : at + len(block), : axes.shape[1]] = (block - mean) @ axes
    return out


def telling_key(metadata: Sequence[Mapping[str, Any]], label_key: str | None) -> str | None:
    """The metadata key by which a map is coloured: ``label_key`` where its groups hold at least half of the items, else
    the key whose groups hold most items (of equals the one with more groups), else ``label_key``. With 500 labels of 4
    items each, colours of ten of them would say nothing."""

    def held(key: str) -> tuple[int, int]:
        group, groups = group_by([one.get(key) for one in metadata])
        return (sum(place >= 0 for place in group), len(groups)) if len(groups) > 1 else (0, 0)

    least = max(1, len(metadata) / 2)
    if label_key is not None and held(label_key)[0] >= least:
        return label_key
    best = max(sorted({key for one in metadata for key in one}), key=held, default=None)
    return best if best is not None and held(best)[0] >= least else label_key


def group_by(labels: list[Any]) -> tuple[list[int], list[str]]:
    """Position of each label among the most frequent ones (-1: none of them), and these, the most frequent first."""
    texts = [None if label is None or isinstance(label, list | dict) else str(label) for label in labels]
    many = Counter(text for text in texts if text is not None)
    groups = sorted(many, key=lambda text: (-many[text], text))[:GROUPS]
    places = {text: number for number, text in enumerate(groups)}
    return [-1 if text is None else places.get(text, -1) for text in texts], groups
