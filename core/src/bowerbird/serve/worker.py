"""The process in which a service encodes: it begins upgrades, moves items, and makes plans.

    python -m bowerbird.serve.worker      a task as one JSON line on standard input, events as JSON lines on output

It has a low priority and one thread, because people wait for searches and nobody waits for it. It
shares nothing with the service but the gallery, so that either may die: the service starts another one, and a process
whose service is gone sees the end of its input and ends (see ``bowerbird.upgrade.worker.converse``).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from bowerbird.errors import BowerbirdError, SpaceError, UpgradeError
from bowerbird.upgrade.worker import Event, converse, ending_told, progress_told, summary

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.upgrade.encoding import ItemEncoder
    from bowerbird.upgrade.plan_record import Plan

BATCH = 16  # pictures per call of the encoder: an end, a pause and the rate are looked at between two
NICE_AWAITED = 10  # while somebody waits: a plan, the beginning of an upgrade
TASK_SECONDS = 5.0  # of work in one task at most, where the rate is limited
LOOK_SECONDS = 0.2
PLAN_FILE = "plan/latest.json"  # where `bowerbird upgrade plan` keeps it, too
LEVEL_FILE = "serve/level.json"
PLAN_NOTE = "serve/plan.json"
Tell = Callable[[Event], None]
Stop = Callable[[], bool]


def step_back(nice: int) -> None:
    """Lower the priority of this process to ``nice``.

    Not ``SCHED_IDLE``: on a busy machine such a process gets so little that a commit, which holds the gallery's write
    lock, could take longer than an upload waits for it.
    """
    os.nice(max(0, nice - os.nice(0)))
    if hasattr(os, "sched_setscheduler"):
        with contextlib.suppress(OSError):  # a container that forbids it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def main() -> int:
    tasks: dict[str, Callable[..., dict[str, Any]]] = {"move": move, "plan": plan}

    def do(line: dict[str, Any], tell: Tell, stop: Stop) -> None:
        task = tasks[line.pop("task")]
        ending_told(lambda: task(tell=tell, stop=stop, **line), tell)

    return converse(do)


def move(
    *,
    gallery: str,
    ref: str,
    device: str,
    upgrade: int | None,
    begin: dict[str, Any],
    rate: float | None,
    watch_every: float | None,
    max_nfr: float | None,
    nice: int,
    tell: Tell,
    stop: Stop,
) -> dict[str, Any]:
    """Work on the upgrade of this number until it is complete; begin it first where there is none.

    Events besides those of ``bowerbird.upgrade.worker``: ``{"event": "begun", "upgrade"}``.

    Args:
        begin: Settings that differ from those of the last plan for this encoder, or from the usual ones.
        nice: Priority with which items are moved.
    """
    step_back(nice if upgrade is not None else min(nice, NICE_AWAITED))
    from bowerbird.cli.upgrade_parts import encoder_of
    from bowerbird.gallery.open import open_gallery
    from bowerbird.upgrade.run import run

    with open_gallery(gallery) as opened:
        state = opened.store.upgrade_state()
        if upgrade is not None and (state is None or state.id != upgrade):
            return {"reason": "ended", "encoded": 0, "failed": 0, "seconds": 0.0}
        space = None if state is None else opened.snapshot().spaces[state.new]
        with _ended_with_service(stop):
            new = encoder_of(ref, BATCH, device, space)
            begins = upgrade is None
            upgrade = upgrade or _begin(opened, new, device, begin, rate)
        if begins:
            tell({"event": "begun", "upgrade": upgrade})
        step_back(nice)
        if opened.storage.read_file(f"watch/{upgrade}.npz") is None:  # begun by a command that watches nothing
            watch_every = max_nfr = None
        _note_level(opened, upgrade)
        report = run(
            opened, new, upgrade=upgrade, rate=rate, watch_every=watch_every, max_nfr=max_nfr,
            progress=progress_told(tell), stop=stop,
        )  # fmt: skip
    return summary(report)


@contextlib.contextmanager
def _ended_with_service(stop: Stop) -> Iterator[None]:
    """Where nothing else looks whether the service is still there: end at once, which the gallery survives anywhere."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            if stop():
                os._exit(1)

    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _begin(gallery: Gallery, new: ItemEncoder, device: str, asked: dict[str, Any], rate: float | None) -> int:
    from bowerbird.upgrade.start import TASK_ITEMS
    from bowerbird.upgrade.upgrade import Upgrade

    settings = {**_planned(gallery, new, asked.get("strategy")), **asked}
    if rate is not None:
        usual = max(4, min(TASK_ITEMS, -(-len(gallery) // 50)))
        settings["task_items"] = min(usual, max(1, round(rate * TASK_SECONDS)))
    begun = Upgrade(gallery, new, old=_old_encoder(gallery, device)).join(watch=len(gallery) > 0, **settings)
    return begun.id


def _planned(gallery: Gallery, new: ItemEncoder, strategy: str | None) -> dict[str, Any]:
    """What the last plan recommends, where it is for these two spaces, and for this strategy if one was asked for."""
    from bowerbird.cli.upgrade_parts import latest_plan
    from bowerbird.upgrade.saved_plan import load_plan
    from bowerbird.upgrade.strategies import load_strategy

    for path in latest_plan(gallery):
        try:
            saved = load_plan(path)
        except BowerbirdError:  # there is none, or it recommends no strategy
            continue
        same = (saved.old, saved.new) == (gallery.snapshot().write_space.fingerprint, new.space.fingerprint)
        if same and (strategy is None or load_strategy(strategy)[0] == saved.strategy):
            return saved.begin_settings()
    return {}


def _old_encoder(gallery: Gallery, device: str) -> ItemEncoder | None:
    """The one that filled the gallery, to see that it still is; ``None`` where it cannot be had: then nobody can."""
    from bowerbird.cli.upgrade_parts import encoder_of

    space = gallery.snapshot().write_space
    if space.lifted or space.encoder.startswith("black-box:"):
        return None
    try:
        return encoder_of(space.encoder, BATCH, device, space)
    except SpaceError:
        raise  # another encoder is in its place
    except BowerbirdError:
        return None


def _note_level(gallery: Gallery, upgrade: int) -> None:
    """Keep the old system's quality on the watched queries, once: with many items it takes seconds, which the service
    has no time for."""
    from bowerbird.upgrade.watch import level_before

    content = gallery.storage.read_file(LEVEL_FILE)
    if content and json.loads(content)["upgrade"] == upgrade:
        return
    try:
        level: float | None = level_before(gallery)
    except UpgradeError:  # no queries are watched, or they have no labels
        level = None
    gallery.storage.write_file(LEVEL_FILE, json.dumps({"upgrade": upgrade, "level": level}).encode())


def plan(*, gallery: str, candidate: str, ref: str, device: str, label_key: str | None, sample: int,
         nice: int, tell: Tell, stop: Stop) -> dict[str, Any]:  # fmt: skip
    """Make a plan and save it with the gallery, where ``bowerbird upgrade plan`` would.

    Events: ``{"event": "step", "what", "done", "total"}``.
    """
    step_back(min(nice, NICE_AWAITED))
    from bowerbird.cli.upgrade_parts import encoder_of, latest_plan
    from bowerbird.gallery.open import open_gallery
    from bowerbird.upgrade.plan import plan as make_plan

    with open_gallery(gallery) as opened, _ended_with_service(stop):
        tell({"event": "step", "what": "loading the encoders", "done": 0, "total": 0})
        new = encoder_of(ref, BATCH, device)
        old = _old_encoder(opened, device)

        def progress(what: str, done: int, total: int) -> None:
            tell({"event": "step", "what": what, "done": done, "total": total})

        # The page draws what `watch` measures over this forecast: both are of one metric.
        made = make_plan(
            opened, new, old_encoder=old, label_key=label_key, metric="map@100", sample=sample, progress=progress
        )
        note = {
            "candidate": candidate, "old": made.old["fingerprint"], "new": made.new["fingerprint"],
            "created_at": made.created_at, "bands": _bands(made),
        }  # fmt: skip
        opened.storage.write_file(PLAN_NOTE, json.dumps(note).encode())
        for path in latest_plan(opened):
            made.save(path)
        if not latest_plan(opened):  # a gallery without a folder
            opened.storage.write_file(PLAN_FILE, json.dumps(made.to_dict()).encode())
    return {"reason": made.recommendation.decision}


def _bands(made: Plan) -> list[list[list[float]] | None]:
    """Of every curve of the plan the 95 % intervals of its quality: ``[low, high]``, each of one value per share."""
    from bowerbird.retrieval.intervals import bootstrap_interval

    bands: list[list[list[float]] | None] = []
    for curve in made.curves:
        if curve.unavailable or curve.values is None:
            bands.append(None)
            continue
        found = [bootstrap_interval(row, samples=500, seed=made.seed) for row in curve.values]
        bands.append([[one.low for one in found], [one.high for one in found]])
    return bands


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # all is closed and told; taking libraries apart at the lowest priority would take seconds
