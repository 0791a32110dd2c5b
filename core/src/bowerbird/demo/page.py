"""Draws ``index.html`` from the numbers of the demo."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bowerbird.files import write_atomically
from bowerbird.report import Series, line_chart, render_page

ARMS = {  # key -> (name, colour, marker, what it needs)
    "switch": ("switch at once", "red", "X", "nothing; any vector database"),
    "rank_merge": ("rank merge", "blue", "o", "both encoders at query time"),
    "zscore": ("rank merge, one scale", "purple", "D", "both encoders at query time"),
    "compatible": ("compatible model (BCT)", "green", "s", "training the new encoder for the old one"),
}


def quality_chart(result: Mapping[str, Any]) -> str:
    """SVG: mAP over the share re-encoded, for each way to serve."""
    levels = result["levels"]
    return line_chart(
        [Series(name, _percent(result["shares"]), result["curves"][key]["map"], color, marker)
         for key, (name, color, marker, _) in ARMS.items()],
        xlabel="share of the gallery re-encoded (%)",
        ylabel=f"mAP@{result['gallery']['depth']}",
        title="Search quality",
        levels={"old model": levels["old_old"]["map"], "new model": levels["new_new"]["map"]},
        ylim=(0, None),
        ident="quality",
    )  # fmt: skip


def flips_chart(result: Mapping[str, Any]) -> str:
    """SVG: negative flips against the old system over the share re-encoded."""
    return line_chart(
        [Series(name, _percent(result["shares"]), _percent(result["curves"][key]["nfr"]), color, marker)
         for key, (name, color, marker, _) in ARMS.items()],
        xlabel="share of the gallery re-encoded (%)",
        ylabel="queries that turned wrong (%)",
        title="Negative flips",
        ylim=(0, None),
        ident="flips",
    )  # fmt: skip


def verdict(result: Mapping[str, Any]) -> str:
    """One sentence per finding, from the numbers."""
    curves, levels, shares = result["curves"], result["levels"], result["shares"]
    served = {key: curves[key] for key in ("rank_merge", "zscore", "compatible")}
    best = max(served, key=lambda key: served[key]["area"])
    calmest = min(served, key=lambda key: max(served[key]["nfr"]))
    findings = [
        f"Of those that serve through the upgrade, {ARMS[best][0]} has the largest area under the curve and "
        f"{ARMS[calmest][0]} the fewest negative flips at its worst moment."
    ]
    low = min(range(len(shares)), key=lambda step: curves["rank_merge"]["map"][step])
    dip = levels["old_old"]["map"] - curves["rank_merge"]["map"][low]
    if dip > 0.005:
        findings.append(
            f"Rank merge falls {100 * dip:.1f} points below the old model when {shares[low]:.0%} is re-encoded: the "
            "distances of the two models are not on one scale. Brought to one scale (`--merger zscore`) it "
            f"never falls below {100 * min(curves['zscore']['map']):.1f} %. `bowerbird upgrade plan` forecasts both "
            "before anything is moved."
        )
    loss = levels["new_new"]["map"] - levels["bct_bct"]["map"]
    side = "below" if loss > 0 else "above"
    findings.append(f"The compatible model ends {100 * abs(loss):.1f} points {side} the freely trained one.")
    return " ".join([*findings, "One seed; docs/claims.md has averages over seeds."])


def write_page(
    path: Path,
    result: Mapping[str, Any],
    *,
    wall: Sequence[Mapping[str, Any]],
    wall_rule: str,
    thumbs: Mapping[str, str],
) -> None:
    half, quality = len(result["shares"]) // 2, quality_chart(result)
    rows = [
        {
            "name": name[0].upper() + name[1:], "needs": needs, "start": curve["map"][0], "half": curve["map"][half],
            "end": curve["map"][-1], "area": curve["area"], "max_nfr": max(curve["nfr"]),
        }
        for key, (name, _, _, needs) in ARMS.items() for curve in [result["curves"][key]]
    ]  # fmt: skip
    data = {"steps": result["shares"], "wall": list(wall), "thumbs": dict(thumbs)}
    html = render_page(
        "demo.html.j2",
        {
            **result,
            "table": rows,
            "wall": wall,
            "wall_rule": wall_rule,
            "steps": result["shares"],
            "identical_at_end": result["different_at_end"] == 0,
            "quality_chart": quality,
            "flips_chart": flips_chart(result),
            "verdict": verdict(result),
            "pct": lambda value: f"{100 * value:.1f} %",
            "data_json": json.dumps(data).replace("</", "<\\/"),
        },
    )
    write_atomically(path, html)
    write_atomically(path.parent / "quality.svg", quality)


def _percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]
