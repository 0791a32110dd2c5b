"""Does one operation on a stack of upgrades and dies at its N-th step, for every N: one copy of the gallery for each.

    python sequence_killed.py GALLERY FOLDER OPERATION

Dying is ``os._exit`` in a forked child, before the N-th flush or removal of a file and before the N-th commit.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from sequence_world import V2, V3, begin, encode

from bowerbird.gallery import Gallery
from bowerbird.gallery.catalog import Catalog

OPERATIONS = {
    "begin": lambda gallery: begin(gallery, V3),
    "rollback": lambda gallery: gallery.store.rollback(encode_old=lambda items: encode(items, V2)),
    "finish": lambda gallery: gallery.store.finish_upgrade(verified=True),
}


def die_before(step: int) -> None:
    left = [step]

    def count() -> None:
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)

    for name in ("fdatasync", "fsync", "unlink"):
        real = getattr(os, name)

        def counted(*arguments, real=real, **more):
            count()
            return real(*arguments, **more)

        setattr(os, name, counted)
    writing = Catalog.writing

    class Writing:
        def __init__(self, catalog) -> None:
            self.inner = writing(catalog)

        def __enter__(self):
            return self.inner.__enter__()

        def __exit__(self, *exc):
            count()
            return self.inner.__exit__(*exc)

    Catalog.writing = lambda self: Writing(self)


def main(source: Path, folder: Path, operation: str) -> None:
    for step in range(1000):
        path = folder / f"{operation}-{step}"
        shutil.copytree(source, path)
        child = os.fork()
        if not child:
            die_before(step)
            with Gallery.open(path) as gallery:
                OPERATIONS[operation](gallery)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
