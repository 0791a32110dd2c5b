"""Writes docs/claims.md from ``results/*.json``: ``python benchmarks/claims/table.py [--check]``.

``--check`` writes nothing and fails where the page is not what the results give.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "claims.md"
OLD_ARMS = dict.fromkeys(("old", "first"), "the old model")  # other arms that say nothing are called what they are

HEAD = """\
# Claims: what was reproduced, and what was not

Written by `python benchmarks/claims/table.py` from the committed results; do not edit.

Each method's paper makes claims about signs: this is larger than that. The plan of every run
(`benchmarks/claims/<method>.toml`: arms, data, seeds, expected signs) was committed before the first run. A seed sets
the split, the noise and every initial weight. A claim is **shown** when the 95 % interval (Student's t over the
seeds, paired) of every difference in it lies above 0, **opposite** when one lies below 0, and **not shown**
otherwise. Every arm that was run is listed. These are small worlds of seconds: a claim that is not shown here may
hold at the paper's scale, and the other way round.
"""


def page(results: list[dict[str, Any]]) -> str:
    return "\n".join([HEAD, *overview(results), *(section(result) for result in results)])


def overview(results: list[dict[str, Any]]) -> list[str]:
    """One row per method: the ids of its claims by verdict."""
    verdicts = ("shown", "not shown", "opposite")
    lines = ["| methods | " + " | ".join(verdicts) + " |", "| --- | --- | --- | --- |"]
    for result in results:
        ids = [[claim["id"] for claim in result["claims"] if claim["verdict"] == verdict] for verdict in verdicts]
        cells = " | ".join(f"{len(found)}: {'; '.join(found)}" if found else "0" for found in ids)
        lines.append(f"| `{result['method']}` | {cells} |")
    return [*lines, ""]


def section(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"## `{result['method']}`",
        "",
        f"{result['paper']}. {len(result['seeds'])} seeds. Run: `{result['command']}`"
        f" ({result['seconds']:.0f} s on a busy machine with {result['machine']['cores']} cores; {versions}).",
        "",
        "| claim | expected | measured differences (mean [95 % interval], seeds with this sign) | verdict |",
        "| --- | --- | --- | --- |",
        *(claim_row(claim, len(result["seeds"])) for claim in result["claims"]),
        "",
        "| arm | what it is |",
        "| --- | --- |",
        *(f"| {name} | {about or OLD_ARMS.get(name, '')} |" for name, about in result["arms"].items()),
        "",
        "| value | mean | 95 % interval |",
        "| --- | --- | --- |",
        *(f"| {name} | {s['mean']:.3f} | {s['low']:.3f} to {s['high']:.3f} |" for name, s in result["summary"].items()),
        "",
    ]
    return "\n".join(lines)


def claim_row(claim: dict[str, Any], seeds: int) -> str:
    if "equal" in claim:
        expected, measured = (
            " = ".join(claim["equal"]),
            f"bit-equal in {seeds if claim['verdict'] == 'shown' else 'not all'} seeds",
        )
    elif "close" in claim:
        expected = " = ".join(claim["close"])
        measured = f"largest difference over {seeds} seeds {claim['largest_gap']:.1e}"
    else:
        steps = claim["steps"]
        expected = "; ".join(f"{s['less']} < {s['more']}" for s in steps)
        measured = "; ".join(
            f"{s['mean']:+.3f} [{s['low']:+.3f}, {s['high']:+.3f}], {s['seeds_right']}/{seeds}" for s in steps
        )
    return f"| ({claim['id']}) {claim['text']} | {expected} | {measured} | **{claim['verdict']}** |"


def draw_sampling(values: dict[str, dict[str, float]], out: Path) -> None:
    """AP50 of MIMDet's arms over the share of tokens that is encoded at test, with 95 % intervals."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "bowerbird", "font.size": 8})
    from matplotlib import pyplot

    arms = {"half": "features of the stem", "token": "mask token", "mim": "tokens alone, pre-trained"}
    figure, axes = pyplot.subplots(figsize=(4.5, 2.8), layout="constrained")
    for i, (arm, label) in enumerate(arms.items()):
        points = [(int(name.rpartition("@")[2]), s) for name, s in values.items() if name.startswith(f"{arm}.AP50@")]
        ratios, means = [ratio + 0.6 * (i - 1) for ratio, _ in points], [s["mean"] for _, s in points]
        half_widths = [s["high"] - s["mean"] for _, s in points]
        axes.errorbar(ratios, means, yerr=half_widths, marker="o", markersize=3, capsize=2, label=label)
    axes.set(xlabel="% of the tokens encoded at test (half in training)", ylabel="AP50", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out, metadata={"Date": None})


def main() -> int:
    results = [json.loads(file.read_text()) for file in sorted((HERE / "results").glob("*.json"))]
    text = page(results)
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text() != text:
            print(f"{PAGE} is not what the results give; run python benchmarks/claims/table.py")
            return 1
        return 0
    PAGE.write_text(text)
    for result in results:
        if result["slug"] == "mimdet":
            draw_sampling(result["summary"], PAGE.parent / "images" / "mimdet-ratio.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
