"""What a run tells: ``metrics.jsonl``, the event hooks, and a progress bar."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bowerbird.registry import get_registry


class RunLog:
    """Appends one JSON line per logged step, calls the event hooks and draws a bar.

    Args:
        run_dir: Folder of the run.
        total_steps: For the bar.
        first_step: Lines of later steps, written before an interruption, are dropped.
        show: Whether to draw a bar (on standard error).
    """

    def __init__(self, run_dir: Path, *, total_steps: int, first_step: int, show: bool) -> None:
        self.run_dir = run_dir
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
            self._bar.update(self._task, note=f"loss {values['loss']:.4f}")


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
