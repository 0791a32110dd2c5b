"""The tables and pictures of the benchmark: ``results.json``, ``results.md``, ``index.html``, ``tradeoff-*.svg``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bowerbird.benchmark.scenarios import SCENARIOS
from bowerbird.files import write_atomically, write_json
from bowerbird.retrieval.compatibility import advbct_scores

# 97.5 % quantiles of Student's t by degrees of freedom; beyond them the normal one is near enough.
_T = (0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
COLUMNS = ("old/old", "new/old", "new/new", "P_comp", "P_up", "area", "gain", "max NFR")
EXPLAIN = """\
mAP of queries by the first model on a gallery by the second; **new/old** is what users get when the upgrade begins (for
rank merge that is the old system), **new/new** when it is finished. **P_comp** and **P_up** (AdvBCT): sigmoids of the
update gain and of the loss against a freely trained new model; 0.5 is no change. **area**: mean mAP over a backfill in
random order. **gain**: the share of the upgrade's gain that the backfill has on average, 0.5 for a straight line; none
where the new model is not better beyond the spread of the seeds.
**max NFR**: the largest share of queries during the backfill that the old system answered right at rank 1 and that are
wrong now."""


def write_report(out: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Summarise the cells and write everything; returns the result with ``summary``."""
    result = {**result, "summary": summarise(result["cells"])}
    write_json(out / "results.json", result)
    pictures = {}
    for dataset in result["summary"]:
        text = tradeoff(
            result["summary"][dataset],
            title=f"{dataset}: mean over {len(compared(result['summary'][dataset]))} scenarios",
        )
        if text:
            write_atomically(out / f"tradeoff-{dataset}.svg", text)
            pictures[dataset] = text
    write_atomically(out / "results.md", markdown(result))
    write_atomically(out / "index.html", page(result, pictures))
    return result


def summarise(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Data set -> scenario -> row -> column -> ``{mean, low, high, spread, queries, seeds}``.

    ``low``..``high``: 95 % over the seeds (Student's t); with one seed over the queries (bootstrap). ``spread``:
    standard deviation over the seeds. ``queries``: half the mean width of the bootstrap intervals over the queries.
    """
    grouped: dict[str, dict[str, dict[str, list[Any]]]] = {}
    for cell in cells:
        rows = grouped.setdefault(cell["dataset"], {}).setdefault(cell["scenario"], {})
        for name, row in cell["rows"].items():
            rows.setdefault(name, []).append((cell["levels"], row))
    return {
        dataset: {scenario: {name: _row(found) for name, found in rows.items()} for scenario, rows in parts.items()}
        for dataset, parts in grouped.items()
    }


def _row(found: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    refused = [row["unavailable"] for _, row in found if "unavailable" in row]
    if refused:
        return {"unavailable": refused[0]}
    columns: dict[str, list[tuple[float, float, float]]] = {name: [] for name in COLUMNS if name != "gain"}
    for levels, row in found:
        old, star = levels["old_old"], levels["free_free"]
        scores = advbct_scores([row["start"][0]], [old[0]], [row["end"][0]], [star[0]])
        for name, value in (
            ("old/old", old), ("new/old", row["start"]), ("new/new", row["end"]), ("P_comp", scores.p_comp),
            ("P_up", scores.p_up), ("area", row["area"]), ("max NFR", row["max_nfr"]),
        ):  # fmt: skip
            columns[name].append(tuple(value) if isinstance(value, list) else (value, value, value))
    summary: dict[str, Any] = {name: _summary(np.array(values, np.float64)) for name, values in columns.items()}
    old, end, area = (np.array([value[0] for value in columns[name]]) for name in ("old/old", "new/new", "area"))
    summary["gain"] = _ratio(area - old, end - old)
    for extra in ("average_compatibility", "average_accuracy"):
        if all(extra in row for _, row in found):
            summary[extra] = _summary(np.array([[row[extra]] * 3 for _, row in found], np.float64))
    return summary


def _summary(values: np.ndarray) -> dict[str, Any]:
    """``values`` ``(seeds, 3)``: mean, low and high over the queries."""
    means = values[:, 0]
    mean, n = float(means.mean()), len(means)
    low, high = float(values[:, 1].mean()), float(values[:, 2].mean())
    half = _half(means)
    low_seeds, high_seeds = (mean - half, mean + half) if n > 1 else (low, high)
    spread = float(means.std(ddof=1)) if n > 1 else 0.0
    made = {"mean": mean, "low": low_seeds, "high": high_seeds, "spread": spread, "queries": (high - low) / 2}
    return {**{key: None if np.isnan(value) else round(value, 5) for key, value in made.items()}, "seeds": n}


def _half(values: np.ndarray) -> float:
    """Half the 95 % interval of the mean over the seeds; 0 for one seed."""
    n = len(values)
    return float((_T[n - 1] if n - 1 < len(_T) else 1.96) * values.std(ddof=1) / n**0.5) if n > 1 else 0.0


def _ratio(part: np.ndarray, whole: np.ndarray) -> dict[str, Any]:
    """The ratio of two means over the seeds, and its interval (as of a ratio estimator in survey sampling). The mean of
    the seeds' ratios would be at the mercy of a seed whose ``whole`` is nearly 0."""
    n, room = len(whole), float(whole.mean())
    if room - _half(whole) <= 0:
        return {"mean": None, "low": None, "high": None, "spread": None, "queries": 0.0, "seeds": n}
    ratio = float(part.mean()) / room
    residues = (part - ratio * whole) / room
    half, spread = _half(residues), float(residues.std(ddof=1)) if n > 1 else 0.0
    made = {"mean": ratio, "low": ratio - half, "high": ratio + half, "spread": spread, "queries": 0.0}
    return {**{key: round(value, 5) for key, value in made.items()}, "seeds": n}


def compared(scenarios: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The scenarios that rows are averaged over: those where every row could be measured, or all if there is none."""
    whole = [name for name, rows in scenarios.items() if not any("unavailable" in row for row in rows.values())]
    return whole or list(scenarios)


def standing(scenarios: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Row -> means over the ``compared`` scenarios, and the gain of these means; rows that one of them lacks are left
    out."""
    chosen = [scenarios[name] for name in compared(scenarios)]
    made = {}
    for name in chosen[0]:
        if not all("area" in rows.get(name, {}) for rows in chosen):
            continue
        columns = ("area", "max NFR", "new/new", "old/old")
        mean = {c: float(np.mean([rows[name][c]["mean"] for rows in chosen])) for c in columns}
        # Of the means: the ratio of one scenario is noise where its new model is hardly better than its old one.
        room = mean["new/new"] - mean["old/old"]
        made[name] = mean | {"gain": (mean["area"] - mean["old/old"]) / room if room > 0 else float("nan")}
    return made


def markdown(result: Mapping[str, Any]) -> str:
    lines = ["# Upgrades compared", "", f"`{' '.join(result['command'])}`", "", EXPLAIN, ""]
    lines += _notes(result)
    for dataset, scenarios in result["summary"].items():
        over = ", ".join(compared(scenarios))
        lines += [f"## {dataset}", "", f"Mean over {over}.", "", *standing_table(scenarios), ""]
        for scenario, rows in scenarios.items():
            lines += [f"### {dataset}: {scenario}", "", SCENARIOS[scenario], "", *_table(rows), ""]
    return "\n".join(lines)


def standing_table(scenarios: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Model and way to serve, by area: lines of Markdown."""
    rows = sorted(standing(scenarios).items(), key=lambda item: -item[1]["area"])
    lines = ["| model / served by | area | gain | max NFR | new/new |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, row in rows:
        lines.append(
            f"| {name} | {row['area']:.3f} | {_number(row['gain'], 2)} | {row['max NFR']:.3f} | {row['new/new']:.3f} |"
        )
    return lines


def _notes(result: Mapping[str, Any]) -> list[str]:
    seeds = result["seeds"]
    over = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed; intervals are over queries"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"{over}; {versions}.", ""]
    if result["quick"]:
        lines += [
            "**Quick run: few epochs and small galleries. It shows that everything runs, not what is better.**",
            "",
        ]
    for name, why in result["missing"].items():
        lines += [f"Left out: {name}: {why}", ""]
    return lines


def _table(rows: Mapping[str, Any]) -> list[str]:
    lines = ["| model / served by | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    notes = []
    for name, row in rows.items():
        if "unavailable" in row:
            lines.append(f"| {name} | {row_cells(row)} |")
            notes.append(f"- {name}: not possible here. {row['unavailable']}")
        else:
            lines.append(f"| {name} | {row_cells(row)} |")
            if "average_compatibility" in row:
                compatible, accuracy = row["average_compatibility"]["mean"], row["average_accuracy"]["mean"]
                notes.append(
                    f"- {name}: average compatibility {compatible:.2f}, mean mAP over all pairs {accuracy:.3f}"
                )
    return [*lines, "", *notes] if notes else lines


def row_cells(row: Mapping[str, Any]) -> str:
    """The cells of a row of the table, one per column; empty ones where it could not be measured."""
    if "unavailable" in row:
        return " | ".join(["-"] * len(COLUMNS))
    return " | ".join(_cell(row[column]) for column in COLUMNS)


def _cell(value: Mapping[str, Any]) -> str:
    if value["mean"] is None:
        return "-"
    half = (value["high"] - value["low"]) / 2
    return f"{value['mean']:.3f} ± {half:.3f}" if half > 0 else f"{value['mean']:.3f}"


def _number(value: float, digits: int) -> str:
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def tradeoff(scenarios: Mapping[str, Mapping[str, Any]], *, title: str) -> str:
    """Area against flips, one point per row, as SVG; empty without matplotlib."""
    from bowerbird.report.charts import Point, point_chart

    rows = standing(scenarios)
    points = [
        Point(row_label(name), row["max NFR"], row["area"], "blue" if name.startswith("free") else "red")
        for name, row in rows.items()
        if not name.endswith("no-strategy")
    ]
    try:
        return point_chart(
            points, xlabel="largest share of negative flips during the backfill", ylabel="mean mAP over the backfill",
            title=title, ident="tradeoff",
        )  # fmt: skip
    except ModuleNotFoundError:  # matplotlib comes with the extra [report]; the tables do without
        return ""


def row_label(name: str) -> str:
    """A row's name without what goes without saying."""
    model, _, strategy = name.partition(" / ")
    strategy = strategy.partition(":")[2] or strategy
    return strategy if model == "free" else model if strategy == "compatible" else f"{model}, {strategy}"


def page(result: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The Markdown tables and the pictures as one self-contained page."""
    from html import escape

    body: list[str] = []
    table: list[str] = []
    paragraph: list[str] = []
    for line in [*markdown(result).splitlines(), ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        if table:
            body.append(_html_table(table))
            table = []
        if line and not line.startswith("#"):
            paragraph.append(line)
            continue
        if paragraph:
            text = escape(" ".join(paragraph)).replace("**", "")
            body.append("<p>" + re.sub("`([^`]*)`", r"<code>\1</code>", text) + "</p>")
            paragraph = []
        if line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            body.append(f"<h{level}>{escape(line.lstrip('# '))}</h{level}>")
            if level == 2 and line[3:] in pictures:
                body.append(f"<figure>{pictures[line[3:]]}</figure>")
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
        "td,th{padding:.2rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}"
        "td:first-child,th:first-child{text-align:left}"
    )
    head = f"<meta charset='utf-8'><title>Upgrades compared</title><style>{style}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _html_table(lines: Sequence[str]) -> str:
    from html import escape

    rows = [
        [escape(cell.strip()) for cell in line.strip().strip("|").split("|")] for line in lines if "---" not in line
    ]
    head = "".join(f"<th>{cell}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
