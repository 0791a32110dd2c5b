"""What a run tells: ``metrics.jsonl``, ``timing.json``, the event hooks, and a progress bar."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from bowerbird.files import write_json
from bowerbird.registry import get_registry

T = TypeVar("T")


class Timing:
    """How long the loop has run and how much of it was spent waiting for data. Apart from the log of the losses, which
    is the same for every run of a recipe.
    """

    def __init__(self) -> None:
        self.steps, self.waited, self.started = 0, 0.0, time.monotonic()

    def waiting_for(self, groups: Iterable[T]) -> Iterator[T]:
        """``groups``, one per step; the time until each is there counts as waiting."""
        iterator = iter(groups)
        while True:
            asked = time.monotonic()
            try:
                group = next(iterator)
            except StopIteration:
                return
            finally:
                self.waited += time.monotonic() - asked
            self.steps += 1
            yield group

    @property
    def share(self) -> float:
        """Waiting for data, over the whole time."""
        return self.waited / max(time.monotonic() - self.started, 1e-9)

    def to_dict(self) -> dict[str, float]:
        seconds = time.monotonic() - self.started
        return {
            "steps": self.steps,
            "seconds": round(seconds, 3),
            "data_wait_seconds": round(self.waited, 3),
            "data_wait_share": round(self.waited / max(seconds, 1e-9), 4),
        }


class RunLog:
    """Appends one JSON line per logged step, calls the event hooks and draws a bar.

    Args:
        run_dir: Folder of the run.
        total_steps: For the bar.
        first_step: Lines of later steps, written before an interruption, are dropped.
        timing: Of this process; written to ``timing.json`` at the end.
        show: Whether to draw a bar (on standard error).
    """

    def __init__(self, run_dir: Path, *, total_steps: int, first_step: int, timing: Timing, show: bool) -> None:
        self.run_dir, self.timing = run_dir, timing
        self.total_steps, self.first_step = total_steps, first_step
        self._bar = _make_bar() if show else None
        self._task: Any = None

    def __enter__(self) -> Self:
        path = self.run_dir / "metrics.jsonl"
        kept = []
        if self.first_step and path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= self.first_step]
        path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a")
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                "training", total=self.total_steps, completed=self.first_step, note="", rate="-"
            )
            self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        write_json(self.run_dir / "timing.json", self.timing.to_dict())
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int) -> None:
        """``step`` optimiser steps are done."""
        if self._bar is not None:
            rate = (step - self.first_step) / max(time.monotonic() - self._started, 1e-9)
            self._bar.update(self._task, completed=step, rate=f"{rate:.1f} steps/s")

    def values(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        get_registry().hook.bowerbird_step_logged(run_dir=str(self.run_dir), step=step, values=dict(values))
        if self._bar is not None:
            waits = f", {self.timing.share:.0%} waiting for data" if self.timing.share >= 0.05 else ""
            self._bar.update(self._task, note=f"loss {values['loss']:.4f}{waits}")


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # half a line, cut by the interruption
        return 2**63


def _make_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
