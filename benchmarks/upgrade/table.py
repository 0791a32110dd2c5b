"""Writes docs/standing-comparison.md and its picture from ``results/*.json`` of ``bowerbird benchmark upgrade``:

    python benchmarks/upgrade/table.py [--check]

``--check`` writes nothing and fails where page or picture are not what the results give.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bowerbird.benchmark.report import COLUMNS, EXPLAIN, compared, row_cells, row_label, standing, summarise
from bowerbird.benchmark.scenarios import SCENARIOS
from bowerbird.report.charts import Point, point_chart

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
PAGE, PICTURE = DOCS / "standing-comparison.md", DOCS / "images" / "standing-comparison.svg"

HEAD = """\
# The standing comparison: quality during the backfill, and what it breaks

Written by `python benchmarks/upgrade/table.py` from committed results of `bowerbird benchmark upgrade`; do not edit.

A way to upgrade is judged by two numbers at once. The **area** under mAP over the backfill says how good the gallery is
on average while it moves. **Negative flips** say how many users see a right first result turn wrong on the way.
"""


def read() -> dict[str, dict[str, Any]]:
    """Data set -> the whole result; several files of one data set are not allowed."""
    found = {}
    for file in sorted((HERE / "results").glob("*.json")):
        found[file.stem] = json.loads(file.read_text())
    return found


def overall(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Row -> mean over the data sets of its means over the scenarios."""
    per_set = [standing(scenarios) for result in results.values() for scenarios in summarise(result["cells"]).values()]
    names = [name for name in per_set[0] if all(name in rows for rows in per_set)]
    return {
        name: {column: float(np.mean([rows[name][column] for rows in per_set])) for column in per_set[0][name]}
        for name in names
    }


def command(result: dict[str, Any]) -> str:
    """What repeats it, without the folder that it was run in."""
    data_set = {"digits": "core:digits", "fashion-mnist": "core:fashion-mnist", "emoji": "emoji:styles"}
    scenarios = " ".join(f"--scenario {name}" for name in result["scenarios"])
    return (
        f"bowerbird benchmark upgrade --dataset {data_set[result['cells'][0]['dataset']]} {scenarios} "
        f"--seeds {len(result['seeds'])}"
    )


def picture(rows: dict[str, dict[str, float]]) -> str:
    points = [
        Point(row_label(name), row["max NFR"], row["area"], "blue" if name.startswith("free") else "red")
        for name, row in rows.items()
        if not name.endswith("no-strategy")
    ]
    return point_chart(
        points, xlabel="largest share of negative flips during the backfill", ylabel="mean mAP over the backfill",
        title="Free new model (blue) and models trained for the old one (red)", ident="standing",
    )  # fmt: skip


def page(results: dict[str, dict[str, Any]]) -> str:
    rows = sorted(overall(results).items(), key=lambda item: -item[1]["area"])
    lines = [HEAD, "![area against negative flips](images/standing-comparison.svg)", ""]
    lines += ["Mean over these data sets and, in each, over the scenarios in which every row could be measured:", ""]
    for name, result in results.items():
        lines += [f"- {name}: {', '.join(compared(s))}" for s in summarise(result["cells"]).values()]
    lines += ["", "In the picture, upper left is better.", ""]
    lines += ["| model / served by | area | max NFR | at the end (new/new) |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {name} | {row['area']:.3f} | {row['max NFR']:.3f} | {row['new/new']:.3f} |" for name, row in rows]
    lines += ["", EXPLAIN, "", "`free`: the new model was trained without regard to the old one.", ""]
    for name, result in results.items():
        seeds, versions = len(result["seeds"]), ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        lines += [f"## {name}", "", f"`{command(result)}`: {seeds} seeds; {versions}.", ""]
        for scenarios in summarise(result["cells"]).values():
            for scenario, found in scenarios.items():
                lines += [f"### {name}: {scenario}", "", SCENARIOS[scenario], ""]
                lines += ["| model / served by | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
                lines += [f"| {row} | {row_cells(values)} |" for row, values in found.items()]
                lines.append("")
    return "\n".join(lines)


def main() -> int:
    results = read()
    made = {PAGE: page(results), PICTURE: picture(overall(results))}
    if "--check" in sys.argv[1:]:
        stale = [path for path, text in made.items() if not path.is_file() or path.read_text() != text]
        if stale:
            print(f"{stale[0]} is not what the results give; run python benchmarks/upgrade/table.py")
        return int(bool(stale))
    for path, text in made.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
