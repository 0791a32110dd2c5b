"""``Planning``: one plan at a time, made by a process of low priority that can be cancelled; and the last plan."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from bowerbird.errors import UpgradeError
from bowerbird.serve.backfill import end_child, error_of, start_child
from bowerbird.serve.problems import scrubbed
from bowerbird.serve.schemas import ForecastLine, PlanJob, PlanView
from bowerbird.serve.worker import PLAN_FILE, PLAN_NOTE
from bowerbird.upgrade.executors import WorkerProcess
from bowerbird.upgrade.worker import CRASHED, Event

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.serve.settings import ServeSettings


class Planning:
    """Makes plans for one service. ``start``, ``look`` and ``cancel`` are called in its event loop.

    Attributes:
        version: Grows with everything that ``job`` would show differently.
    """

    def __init__(self, settings: ServeSettings, gallery: Gallery) -> None:
        self.settings, self.gallery = settings, gallery
        self.version = 0
        self._process: WorkerProcess | None = None
        self._state: Literal["none", "running", "done", "failed"] = "none"
        self._candidate: str | None = None
        self._step: str | None = None
        self._error: str | None = None
        self._last: Event | None = None

    @property
    def running(self) -> bool:
        return self._state == "running"

    def start(self, candidate: str, ref: str, label_key: str | None, sample: int) -> None:
        """Blocks for some milliseconds. Raises ``UpgradeError`` while another plan is being made."""
        if self.running:
            raise UpgradeError(f"a plan for {self._candidate!r} is being made; cancel it first, or wait for it")
        self._last, self._error = None, None
        asked = {"candidate": candidate, "ref": ref, "label_key": label_key, "sample": sample}
        self._process = start_child("plan", self.settings, asked)
        self._candidate = candidate
        self._show("running", "starting")

    async def cancel(self) -> None:
        """Nothing of it is kept; the plan before it stays. Does nothing where none is being made."""
        if self._process is not None:
            process, self._process = self._process, None
            process.process.kill()  # it changes nothing before it is done, and then at once
            await end_child(process)
            self._candidate = None
            self._show("none", None)

    def look(self) -> None:
        """Hear the process. Called a few times a second."""
        if self._process is None:
            return
        events, over = self._process.poll()
        for event in events:
            if event["event"] == "step":
                of = f" {event['done']} of {event['total']}" if event["total"] else ""
                self._show("running", f"{event['what']}{of}")
            elif event["event"] in ("ended", "failed"):
                self._last = event
        if over:
            process, self._process = self._process, None
            last = self._last or {"event": "failed", "error": process.how_it_died(), "exit_code": CRASHED}
            process.kill()  # its pipes
            if last["event"] == "failed":
                self._error = scrubbed(str(error_of(last)))
            self._show("done" if last["event"] == "ended" else "failed", None)

    def _show(self, state: Literal["none", "running", "done", "failed"], step: str | None) -> None:
        self._state, self._step = state, step
        self.version += 1

    def job(self, plan: PlanView | None) -> PlanJob:
        return PlanJob(state=self._state, candidate=self._candidate, step=self._step, error=self._error, plan=plan)


def last_plan(gallery: Gallery, settings: ServeSettings, pair: tuple[str, str | None]) -> PlanView | None:
    """The last plan, where it leads from the first space of ``pair`` to the second (``None``: to any). Blocks."""
    content = gallery.storage.read_file(PLAN_FILE)
    if not content:
        return None
    try:
        saved = json.loads(content)
        if saved["old"]["fingerprint"] != pair[0] or pair[1] not in (None, saved["new"]["fingerprint"]):
            return None
        note = json.loads(gallery.storage.read_file(PLAN_NOTE) or b"{}")
        own = (note.get("new"), note.get("created_at")) == (saved["new"]["fingerprint"], saved["created_at"])
        named = [name for name, ref in settings.candidates.items() if ref == saved["new"]["encoder"]]
        candidate = note["candidate"] if own else next(iter(named), None)
        return _view(saved, candidate, note["bands"] if own else [])
    except (ValueError, KeyError, TypeError):  # of another version: a plan is made again, and hinders nothing
        return None


def _view(saved: dict[str, Any], candidate: str | None, bands: list[Any]) -> PlanView:
    verdict = saved["recommendation"]
    lines = []
    for number, curve in enumerate(saved["curves"]):
        if curve["unavailable"]:
            continue
        band = bands[number] if number < len(bands) else None
        lines.append(
            ForecastLine(
                strategy=curve["name"],
                merger=curve["merger"],
                shares=curve["shares"],
                quality=curve["quality"],
                low=band and band[0],
                high=band and band[1],
                nfr=curve["nfr"],
                recommended=(curve["name"], curve["merger"]) == (verdict["strategy"], verdict["merger"]),
            )
        )
    return PlanView(
        candidate=candidate,
        created_at=saved["created_at"],
        metric=saved["metric"],
        recommendation=verdict["decision"],
        reason=scrubbed(verdict["reason"]),
        old_quality=saved["old_old"] and saved["old_old"]["mean"],
        new_quality=saved["new_new"] and saved["new_new"]["mean"],
        hours=saved["hours"],
        price=saved["price"],
        lines=lines,
    )
