"""Encoders of worker processes for the tests: loaded by import string, without torch, with the faults that a test asks
for.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from upgrade_world import new_encoder, number_of

from bowerbird.gallery import Gallery, Space
from bowerbird.upgrade import ItemEncoder
from bowerbird.upgrade.worker import Job

HERE = str(Path(__file__).parent)


def job(gallery: Gallery, *, rate: float | None = None, stop_at_share: float | None = None,
        stop_at_items: int | None = None, store_patience: float = 300.0, **faults: Any) -> Job:  # fmt: skip
    """A job on the upgrade under way; see ``load`` for the faults."""
    state = gallery.store.upgrade_state()
    assert state is not None
    return Job(
        str(gallery.path), state.id, "workers_world:load", faults, rate=rate, stop_at_share=stop_at_share,
        stop_at_items=stop_at_items, store_patience=store_patience,
    )  # fmt: skip


def load(settings: dict[str, Any], gallery: Gallery, space: Space, index: int) -> ItemEncoder:
    """The new encoder of the world.

    Settings: ``delay`` seconds per item; ``batch`` items per call; ``die_on`` the number of an item on which the
    process kills itself, the first time only where ``once`` names a file; ``wrong`` raises a bug's error.
    """
    encoder = new_encoder()
    once = settings.get("once")

    def encode(items: Sequence[Any]) -> np.ndarray:
        print("a library that writes to standard output")
        time.sleep(settings.get("delay", 0.0) * len(items))
        if settings.get("die_on") in [number_of(item.id) for item in items] and not (once and Path(once).exists()):
            if once:
                Path(once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if settings.get("wrong"):
            raise ZeroDivisionError("a bug in the encoder")
        return encoder(items)

    return ItemEncoder(encode, space=space, batch_size=settings.get("batch", 64))
