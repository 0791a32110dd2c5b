"""``Showing``: an upgrade as clients see it: how far it is, what was measured, and what was forecast."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from bowerbird.errors import UpgradeError
from bowerbird.serve.backfill import Job
from bowerbird.serve.describe import space_info
from bowerbird.serve.planning import last_plan
from bowerbird.serve.problems import scrubbed
from bowerbird.serve.schemas import CurvePoint, FailedItem, PlanView, UpgradeView, WorkerView
from bowerbird.serve.worker import LEVEL_FILE
from bowerbird.upgrade.watch import history, level_before

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.serve.settings import ServeSettings
    from bowerbird.upgrade.state import UpgradeStatus

SHOWN_FAILURES = 100
NO_WORKER = WorkerView(state="none", rate=None, seconds_left=None, moved=0, error=None)


class Showing:
    """Reads a gallery. Its methods block, and may be called by several threads."""

    def __init__(self, settings: ServeSettings, gallery: Gallery) -> None:
        self.settings, self.gallery = settings, gallery
        self._levels: dict[int, float | None] = {}  # upgrade -> quality of the old system, which is computed once

    def upgrade(self, job: Job | None) -> UpgradeView:
        """The upgrade under way, or what became of the last one. Without the worker."""
        from bowerbird.upgrade.state import status

        try:
            now = status(self.gallery)
        except UpgradeError:
            return self._no_upgrade()
        snapshot = self.gallery.snapshot()
        spaces, curve, failed = snapshot.spaces, history(self.gallery, now.id), now.failures
        return UpgradeView(
            state="complete" if now.complete else "paused" if now.state == "paused" else "running",
            id=now.id,
            strategy=now.strategy,
            order=now.order,
            merger=now.merger,
            old=space_info(spaces[now.old["fingerprint"]], now.old_items),
            new=space_info(spaces[now.new["fingerprint"]], now.new_items),
            items=now.items,
            new_items=now.new_items,
            old_vectors=snapshot.rows_of(now.old["fingerprint"]).count,
            share=now.share,
            failures=[
                FailedItem(id=item, attempts=attempts, error=scrubbed(error))
                for item, attempts, error in failed[:SHOWN_FAILURES]
            ],
            failed=len(failed),
            worker=NO_WORKER,
            level_before=self._level(now.id, ours=job is not None and job.upgrade == now.id),
            curve=[_point(entry) for entry in curve],
            plan=self.plan(now),
            last=None,
            stopped_by=_stopped_by(now, curve, job),
        )

    def _no_upgrade(self) -> UpgradeView:
        ended = self.gallery.store.history()
        last = ended[-1] if ended else None
        items = self.gallery.snapshot().live
        return UpgradeView(
            state="none", id=None, strategy=None, order=None, merger=None, old=None, new=None, items=items,
            new_items=0, old_vectors=0, share=1.0, failures=[], failed=0, worker=NO_WORKER,
            level_before=self._level(last["id"], ours=True) if last else None,
            curve=[_point(entry) for entry in history(self.gallery, last["id"])] if last else [],
            plan=self.plan(),
            last=last["state"].replace("-", " ") if last else None,
            stopped_by=None,
        )  # fmt: skip

    def _level(self, upgrade: int, *, ours: bool) -> float | None:
        """Of the upgrade of this service what its worker noted; of another one it is computed here, once."""
        noted = self._noted_level(upgrade)
        if ours or noted is not None or upgrade in self._levels:
            return noted if noted is not None else self._levels.get(upgrade)
        try:
            self._levels[upgrade] = level_before(self.gallery)
        except UpgradeError:  # no queries are watched, or they have no labels
            self._levels[upgrade] = None
        return self._levels[upgrade]

    def _noted_level(self, upgrade: int) -> float | None:
        try:
            note = json.loads(self.gallery.storage.read_file(LEVEL_FILE) or b"{}")
            return float(note["level"]) if note.get("upgrade") == upgrade and note["level"] is not None else None
        except (ValueError, KeyError, TypeError):  # of another version
            return None

    def plan(self, now: UpgradeStatus | None = None) -> PlanView | None:
        """The last plan, where it is about what is served now; after an upgrade also the one that led here."""
        if now is not None:
            return last_plan(self.gallery, self.settings, (now.old["fingerprint"], now.new["fingerprint"]))
        ended = self.gallery.store.history()
        found = last_plan(self.gallery, self.settings, (self.gallery.snapshot().serving, None))
        if found is None and ended:
            found = last_plan(self.gallery, self.settings, (ended[-1]["old"], ended[-1]["new"]))
        return found


def _stopped_by(now: UpgradeStatus, curve: list[dict[str, Any]], job: Job | None) -> str | None:
    if now.state != "paused" or not curve or not curve[-1]["stopped"]:
        return None
    if job is not None and curve[-1]["time"] < job.resumed_at:  # settled; somebody has paused it since
        return None
    return f"{curve[-1]['nfr']:.2%} negative flips, more than the {curve[-1]['max_nfr']:.2%} that are accepted"


def _point(entry: dict[str, Any]) -> CurvePoint:
    return CurvePoint(**{name: entry[name] for name in CurvePoint.model_fields})
