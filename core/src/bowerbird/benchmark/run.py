"""Runs the benchmark, cell by cell, in a folder that an interrupted run continues."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from bowerbird.benchmark.methods import select
from bowerbird.benchmark.report import write_report
from bowerbird.benchmark.scenarios import PROFILES, SCENARIOS
from bowerbird.errors import DataError, InputError, UnknownNameError, did_you_mean
from bowerbird.files import write_json

MARKER = "benchmark.json"
QUICK_SCENARIOS = ("extended-data", "open-classes")


def run_benchmark(
    out: str | Path,
    *,
    datasets: Sequence[str] = ("core:digits",),
    scenarios: Sequence[str] | None = None,
    seeds: int | Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    config: str | Path | None = None,
    quick: bool = False,
    cache: str | Path | None = None,
    advance: Callable[[float, str], None] = lambda done, what: None,
) -> dict[str, Any]:
    """Measure every cell that ``out`` does not have yet, and write the tables.

    Args:
        out: Folder: ``cells/`` (one file per data set, scenario and seed), ``results.json``, ``results.md``,
            ``index.html`` and ``tradeoff-*.svg``.
        datasets: ``core:digits``, ``core:fashion-mnist``, ``emoji:styles``.
        scenarios: Names, see ``scenarios.SCENARIOS``; by default all.
        seeds: Their number, counted from 0, or the seeds; by default 5, with ``quick`` 1.
        methods: Methods and strategies by name; by default all that are installed.
        config: A file with more ``[[method]]`` tables, see ``methods.toml``.
        quick: Few epochs, small galleries, two scenarios unless they are given: shows that all runs.
        cache: Where features of emoji are kept.
        advance: Told ``(share done, what comes next)``.

    Returns:
        What ``results.json`` holds.

    Raises:
        UnknownNameError: A data set, scenario or method that there is not.
        InputError: ``out`` is something else's folder, or of a run with other settings (quick or not).
    """
    from bowerbird.benchmark.cell import Cell, run_cell  # torch

    out = Path(out)
    chosen = list(scenarios) if scenarios else list(QUICK_SCENARIOS if quick else SCENARIOS)
    for name in chosen:
        if name not in SCENARIOS:
            raise UnknownNameError(
                f"no scenario {name!r}; there are {', '.join(SCENARIOS)}.{did_you_mean(name, SCENARIOS)}"
            )
    seeds = (1 if quick else 5) if seeds is None else seeds
    numbers = list(range(seeds) if isinstance(seeds, int) else seeds)
    if not numbers:
        raise InputError("the benchmark needs at least one seed")
    selection = select(methods, Path(config) if config else None)
    if not selection.methods and not selection.strategies:
        raise InputError("nothing to measure: " + "; ".join(f"{k}: {v}" for k, v in selection.missing.items()))
    names = list(dict.fromkeys(_short(dataset) for dataset in datasets))
    _claim(out, quick)

    cells = [(dataset, scenario, seed) for dataset in names for scenario in chosen for seed in numbers]
    rows = len(selection.strategies) + sum(len(method.serve) for method in selection.methods)
    for i, (dataset, scenario, seed) in enumerate(cells):
        file = out / "cells" / f"{dataset}-{scenario}-{seed}.json"
        done = _read(file)
        finished = 0

        def step(row: str, i: int = i, where: str = f"{dataset}, {scenario}, seed {seed}") -> None:
            nonlocal finished
            advance((i + finished / max(1, rows)) / len(cells), f"{where}: {row}")
            finished += 1

        advance(i / len(cells), f"{dataset}, {scenario}, seed {seed}")
        profile = PROFILES[dataset].quick() if quick else PROFILES[dataset]
        world, views = _world(dataset, seed, scenario, profile, cache)
        run_cell(
            Cell(world, views, scenario, profile, seed), selection, done,
            save=partial(write_json, file), advance=step,
        )  # fmt: skip
    advance(1.0, "tables")
    kept = [_read(out / "cells" / f"{d}-{s}-{n}.json") for d, s, n in cells]
    wanted = {f"free / {name}" for name in selection.strategies}
    wanted |= {f"{method.name} / {name}" for method in selection.methods for name in method.serve}
    for cell in kept:  # a folder may hold rows of other methods from earlier runs
        cell["rows"] = {name: row for name, row in cell["rows"].items() if name in wanted}
    result = {
        "command": ["bowerbird", *sys.argv[1:]], "quick": quick, "scenarios": chosen, "seeds": numbers,
        "versions": _versions(), "cores": os.cpu_count(), "missing": dict(selection.missing), "cells": kept,
    }  # fmt: skip
    return write_report(out, result)


def _world(dataset: str, seed: int, scenario: str, profile: Any, cache: str | Path | None) -> tuple[Any, Any]:
    from bowerbird.benchmark.worlds import make_world

    settings: dict[str, Any] = {**profile.sizes, "cache": Path(cache) if cache else None}
    trunks = profile.trunks if scenario == "new-architecture" else profile.trunks[:1]
    views = {}
    for trunk in dict.fromkeys(reversed(trunks)):  # the old model's last: it is the world that is kept
        world = make_world(dataset, seed, trunk=trunk, **settings)
        views[trunk] = (world.train, world.queries, world.gallery)
    return world, views


def _short(dataset: str) -> str:
    short = dataset.partition(":")[2] or dataset
    short = {"styles": "emoji"}.get(short, short)
    if short not in PROFILES:
        raise UnknownNameError(
            f"no benchmark of data set {dataset!r}; there are core:digits, core:fashion-mnist and emoji:styles."
            f"{did_you_mean(short, PROFILES)}"
        )
    return short


def _claim(out: Path, quick: bool) -> None:
    """Make the folder, or make sure that it is one of this benchmark with the same kind of run."""
    marker = out / MARKER
    if marker.is_file():
        if json.loads(marker.read_text()).get("quick") != quick:
            raise InputError(
                f"{out} holds a benchmark {'without' if quick else 'with'} --quick. Choose another folder with --out."
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty and holds no benchmark. Choose another folder with --out.")
    (out / "cells").mkdir(parents=True, exist_ok=True)
    write_json(marker, {"benchmark": "upgrade", "quick": quick})


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}). Remove it: its cell is measured again.") from error


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("bowerbird-core", "bowerbird-compat", "bowerbird-emoji", "torch", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
