"""A process that fills a gallery and upgrades it, and goes on where an earlier one was killed: run it until it ends.

    python gallery_killed.py FOLDER

Prints the id of every batch that was acknowledged. Every vector is a hash of the item's id.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gallery_world import NEW, OLD, encode, vectors

from bowerbird.gallery import Gallery

BATCHES = [[f"item-{batch:02d}-{i:02d}" for i in range(40)] for batch in range(12)]
DELETED = [batch[0] for batch in BATCHES]


def main(path: Path) -> None:
    if not path.exists():
        Gallery.create(path, OLD).close()
    with Gallery.open(path) as gallery:
        _ingest(gallery)
        _upgrade(gallery)
    print("done", flush=True)


def _ingest(gallery: Gallery) -> None:
    if gallery.store.history():
        return  # the ingest was over
    for number, names in enumerate(BATCHES):
        if names[1] not in gallery:
            gallery.add(names, vectors(names, OLD), uris=[f"/{name}" for name in names])
            print(f"added {number}", flush=True)
    present = [name for name in DELETED if name in gallery]
    if present:
        gallery.delete(present)
        print("deleted", flush=True)


def _upgrade(gallery: Gallery) -> None:
    if gallery.snapshot().serving == NEW.fingerprint:
        return
    if gallery.store.upgrade_state() is None:
        gallery.store.begin_upgrade(NEW, strategy="test", order_name="core:random", task_items=32)
    late = "late"
    if late not in gallery:
        gallery.add([late], vectors([late], NEW), space=NEW.fingerprint)
    while (task := gallery.store.lease_task("worker", 0.0)) is not None:  # a dead worker's lease has run out already
        gallery.store.commit_task(task, task.nums, encode(task.items, NEW))
        print(f"migrated {task.items[0].num}", flush=True)
    gallery.store.finish_upgrade(verified=gallery.verify().ok)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
