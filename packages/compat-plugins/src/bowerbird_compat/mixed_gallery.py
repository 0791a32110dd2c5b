"""A gallery in memory that is half old, half new, and the loop that moves it: the serving side of online backfilling.

Seo et al., "Online Backfilling with No Regret for Large-Scale Image Retrieval" (arXiv 2301.03767). For research and
tests: the durable gallery is ``bowerbird.gallery.Gallery``, and ``bowerbird upgrade`` moves it. No torch here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bowerbird.errors import DataError, InputError, IntegrityError
from bowerbird.files import write_json
from bowerbird.gallery.merge import merge_by_distance
from bowerbird.retrieval.index import Hits, unit_rows


class MixedGallery:
    """A gallery in memory whose items are in the old space or in the new one, each in exactly one.

    The indexes may be of any kind that has ``ids``, ``add``, ``remove`` and ``search``
    (``bowerbird.retrieval.index``); the embedding sizes D_old and D_new may differ. Distance is ``1 - cosine``.

    Raises:
        InputError: (a ``ValueError``) The indexes measure different kinds of distance.
        IntegrityError: An id is in both indexes; they are listed.
    """

    def __init__(self, old_index: Any, new_index: Any) -> None:
        kinds = [getattr(index, "metric", "cosine") for index in (old_index, new_index)]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"The old index measures {kinds[0]} and the new one {kinds[1]}; their distances cannot be merged."
            )
        self.old, self.new = old_index, new_index
        self._refuse(np.intersect1d(old_index.ids, new_index.ids), "in both parts")

    def __len__(self) -> int:
        return len(self.old) + len(self.new)

    @property
    def progress(self) -> float:
        """Share of the items that is in the new space, in [0, 1]; 1 for an empty gallery."""
        return len(self.new) / len(self) if len(self) else 1.0

    def move(self, ids: ArrayLike, new_vectors: ArrayLike) -> None:
        """Give the items ``ids`` (N,) their new vectors (N, D_new). Items that had moved before get these instead.

        Raises ``IntegrityError`` listing the ids that are in neither part; then nothing has moved.
        """
        wanted = np.asarray(ids, np.int64)
        if not wanted.size and not np.size(new_vectors):
            return
        moved = np.isin(wanted, self.new.ids)
        self._refuse(wanted[~moved & ~np.isin(wanted, self.old.ids)], "in neither part")
        vectors = unit_rows(new_vectors, dim=self.new.dim, what="new vectors")
        if wanted.shape != (len(vectors),) or len(np.unique(wanted)) != len(wanted):
            raise InputError(
                f"Different ids with one vector each are needed; got {wanted.shape} ids, {len(vectors)} vectors."
            )
        if moved.any():
            self.new.remove(wanted[moved])
        # In this order an item is for a moment in both parts, never in none; the merge drops the old copy.
        self.new.add(wanted, vectors)
        self.old.remove(wanted)

    def search(self, q_old: ArrayLike, q_new: ArrayLike, k: int) -> Hits:
        """The k nearest of the whole gallery: ``Hits`` ``(Q, k)``, or ``(k,)`` for single queries.

        Args:
            q_old: ``(Q, D_old)`` queries for the old part: of the old encoder (distance rank merge), or the new
                encoder's after a reverse transform.
            q_new: ``(Q, D_new)`` queries of the new encoder.
            k: Results per query. Each part is asked for k: half of them would not be enough.
        """
        old = self.old.search(q_old, k)  # before the new part: an item that moves meanwhile is found twice, not never
        return merge_by_distance(old, self.new.search(q_new, k), k)

    def verify(self, ids: ArrayLike) -> None:
        """Raises ``IntegrityError`` unless each of ``ids`` is in exactly one part."""
        wanted = np.asarray(ids, np.int64)
        in_old, in_new = np.isin(wanted, self.old.ids), np.isin(wanted, self.new.ids)
        self._refuse(wanted[in_old & in_new], "in both parts")
        self._refuse(wanted[~in_old & ~in_new], "in neither part")

    @staticmethod
    def _refuse(ids: NDArray[np.int64], where: str) -> None:
        if len(ids):
            listed = ", ".join(map(str, ids[:20].tolist())) + (", ..." if len(ids) > 20 else "")
            raise IntegrityError(f"{len(ids)} items are {where} of the gallery: {listed}")


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` items have been moved."""

    done: int
    total: int

    @property
    def fraction(self) -> float:
        return self.done / self.total if self.total else 1.0


def backfill(
    worker: Callable[[Sequence[Any]], object],
    order: Sequence[Any],
    *,
    batch_size: int = 256,
    checkpoint: str | Path | None = None,
    on_step: Callable[[Progress], object] | None = None,
) -> Iterator[Progress]:
    """Work through ``order`` in batches; iterate over the result to make it go on, stop iterating to pause.

    Args:
        worker: Called with the next ids; encodes them with the new encoder and moves them. After a crash its last
            batch may come again, so it must be idempotent, as ``MixedGallery.move`` is.
        order: Ids, most urgent first.
        batch_size: Ids per call.
        checkpoint: File that remembers how far this order is, replaced atomically after each batch. With it a later
            call goes on where the last one stopped.
        on_step: Called after each batch.

    Yields:
        ``Progress`` after each batch.

    Raises:
        InputError: ``batch_size`` below 1, ids repeated, or the checkpoint belongs to another order.
        DataError: The checkpoint cannot be read.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1.")
    ids = [item.item() if hasattr(item, "item") else item for item in order]  # entries of arrays and tensors
    if len(set(ids)) != len(ids):
        raise InputError(f"The order names {len(ids) - len(set(ids))} items twice.")
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    done = _read_checkpoint(Path(checkpoint), digest, len(ids)) if checkpoint is not None else 0
    return _backfill(worker, ids, done, batch_size, digest, checkpoint, on_step)


def _backfill(
    worker: Callable[[Sequence[Any]], object],
    ids: list[Any],
    done: int,
    batch_size: int,
    digest: str,
    checkpoint: str | Path | None,
    on_step: Callable[[Progress], object] | None,
) -> Iterator[Progress]:
    while done < len(ids):
        batch = ids[done : done + batch_size]
        worker(batch)
        done += len(batch)
        if checkpoint is not None:
            write_json(checkpoint, {"order": digest, "total": len(ids), "done": done})
        progress = Progress(done, len(ids))
        if on_step is not None:
            on_step(progress)
        yield progress


def _read_checkpoint(path: Path, digest: str, total: int) -> int:
    if not path.exists():
        return 0
    try:
        state = json.loads(path.read_text())
        found, done = state["order"], int(state["done"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"The checkpoint {path} cannot be read ({error}). Delete it to begin again.") from error
    if found != digest or not 0 <= done <= total:
        raise InputError(f"The checkpoint {path} belongs to another order of items. Delete it to begin again.")
    return done
