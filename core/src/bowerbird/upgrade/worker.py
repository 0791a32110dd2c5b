"""One of several workers: a process that opens the gallery, loads the encoder and works until all is done.

Nothing but the gallery is shared, and what a worker was doing is known there as a lease. What it tells the process that
started it is for people: how far it is, and how it ended.

    python -m bowerbird.upgrade.worker      a job as one JSON line on standard input, events as JSON lines on output
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bowerbird.errors import BowerbirdError

if TYPE_CHECKING:
    from bowerbird.upgrade.run import RunReport
    from bowerbird.upgrade.state import UpgradeStatus

Event = dict[str, Any]
INTERRUPTED = 130  # exit code of a command that Ctrl-C ended
CRASHED = 1


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know, as plain data.

    Attributes:
        gallery: Path or URL.
        upgrade: Number of the upgrade; a worker works on no other.
        loader: Import string of a function ``(settings, gallery, space, index)`` that returns the ``ItemEncoder`` of
            the new space; ``gallery`` is open, ``index`` is the number of the worker on its machine.
        settings: Plain data for it.
        rate, stop_at_items, stop_at_share, store_patience: See ``bowerbird.upgrade.run.run``; ``rate`` is of all
            workers together.
    """

    gallery: str
    upgrade: int
    loader: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rate: float | None = None
    stop_at_items: int | None = None
    stop_at_share: float | None = None
    store_patience: float = 300.0

    def for_one_of(self, workers: int) -> Job:
        """The same job with this worker's part of the rate."""
        return self if self.rate is None else replace(self, rate=self.rate / workers)


def work(job: Job, index: int, tell: Callable[[Event], None], stop: Callable[[], bool] | None = None) -> None:
    """Do a job in this process. Never raises but for Ctrl-C: how it ended is the last event.

    Events: ``{"event": "encoded", "count"}`` after a batch, ``{"event": "committed", "status"}`` after a task, and one
    of ``{"event": "ended", "report"}`` and ``{"event": "failed", "error", "exit_code"}`` at the end.
    """
    ending_told(lambda: _work(job, index, tell, stop), tell)


def ending_told(do: Callable[[], dict[str, Any]], tell: Callable[[Event], None]) -> None:
    """Call ``do`` and tell how it ended; never raises but for Ctrl-C. ``kind``: the name of a ``BowerbirdError``."""
    try:
        report = do()
    except BowerbirdError as exc:
        tell({"event": "failed", "error": str(exc), "exit_code": exc.exit_code, "kind": type(exc).__name__})
    except Exception as exc:
        if os.environ.get("BOWERBIRD_DEBUG"):
            traceback.print_exc()
        tell({"event": "failed", "error": f"{type(exc).__name__}: {exc}", "exit_code": CRASHED})
    else:
        tell({"event": "ended", "report": report})


def _work(job: Job, index: int, tell: Callable[[Event], None], stop: Callable[[], bool] | None) -> dict[str, Any]:
    from bowerbird.gallery.open import open_gallery
    from bowerbird.registry import import_string
    from bowerbird.upgrade.run import run

    with open_gallery(job.gallery) as gallery:
        state = gallery.store.upgrade_state()
        if state is None or state.id != job.upgrade:
            return {"reason": "ended", "encoded": 0, "failed": 0, "seconds": 0.0}
        if state.state == "paused":
            return {"reason": "paused", "encoded": 0, "failed": 0, "seconds": 0.0}
        space = gallery.snapshot().spaces[state.new]
        encoder = import_string(job.loader)(dict(job.settings), gallery, space, index)
        report = run(
            gallery, encoder, upgrade=job.upgrade, rate=job.rate, stop_at_items=job.stop_at_items,
            stop_at_share=job.stop_at_share, store_patience=job.store_patience, progress=progress_told(tell), stop=stop,
        )  # fmt: skip
    return summary(report)


def progress_told(tell: Callable[[Event], None]) -> Callable[[int, UpgradeStatus], None]:
    """The ``progress`` of a ``run``, as the events ``encoded`` and ``committed``."""
    in_hand = 0

    def progress(count: int, now: UpgradeStatus) -> None:
        nonlocal in_hand
        if count:
            in_hand += count
            tell({"event": "encoded", "count": count})
        else:
            # Without the list of failures, which may be long: it is read once, at the end.
            tell({"event": "committed", "count": in_hand, "status": asdict(replace(now, failures=()))})
            in_hand = 0

    return progress


def summary(report: RunReport) -> dict[str, Any]:
    """What the last event says of a ``run``."""
    return {name: getattr(report, name) for name in ("reason", "encoded", "failed", "seconds")}


def main() -> int:
    """The worker process of ``--engine local``."""

    def do(line: dict[str, Any], tell: Callable[[Event], None], stop: Callable[[], bool]) -> None:
        os.environ.setdefault("LOCAL_RANK", str(line["index"]))  # with it a worker takes a GPU of its own
        work(Job(**line["job"]), int(line["index"]), tell, stop)

    return converse(do)


def converse(do: Callable[[dict[str, Any], Callable[[Event], None], Callable[[], bool]], None]) -> int:
    """The whole life of a worker process: ``do(what the first line of input says, tell, stop)``; returns its exit code.

    It ends when it is done, on SIGINT and SIGTERM (the task in hand is given back), and when its input is closed: then
    the process that started it is gone, and nobody would see what this one does. ``stop`` says so.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: whoever starts a command with `&` has it ignored
        signal.signal(number, _interrupt)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # for people
    # Libraries print what they like; standard output is for events alone.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    alone = threading.Event()
    code = 0

    def tell(event: Event) -> None:
        nonlocal code
        code = event.get("exit_code", code)
        try:
            events.write(json.dumps(event) + "\n")
            events.flush()
        except BrokenPipeError:
            alone.set()

    def wait_for_the_end_of_input() -> None:
        while os.read(0, 1024):
            pass
        alone.set()

    try:
        tell({"event": "ready"})  # from here on an interrupt is answered
        line = _first_line()
        threading.Thread(target=wait_for_the_end_of_input, daemon=True).start()
        do(line, tell, alone.is_set)
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _first_line() -> dict[str, Any]:
    data = b""
    while not data.endswith(b"\n"):  # not through a buffer, which would hold a lock while a thread waits for the rest
        piece = os.read(0, 1)
        if not piece:
            raise KeyboardInterrupt
        data += piece
    return json.loads(data)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
