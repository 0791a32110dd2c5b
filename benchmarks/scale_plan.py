"""The plan for a gallery that no single machine holds, by formula; and docs/scale.md, with it and what was measured.

python benchmarks/scale_plan.py           write docs/scale.md and docs/images/scale-growth.svg
python benchmarks/scale_plan.py --check   fail if the committed page differs from what would be written
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "scale.md"
PICTURE = ROOT / "docs" / "images" / "scale-growth.svg"
TEXT = Path(__file__).parent / "scale_page.md"
GB = 10**9


@dataclass(frozen=True)
class Constants:
    """What the formulas take from measurements.

    Attributes:
        catalogue_bytes: Of the catalogue per item.
        index_bytes: Of an approximate index per item beside its vector.
        join_s: Seconds to join the hits of one more list (of k = 10).
        add_per_s: Items that one process adds per second.
        verify_per_s: Items that one process verifies per second.
    """

    catalogue_bytes: float
    index_bytes: float
    join_s: float
    add_per_s: float
    verify_per_s: float


@dataclass(frozen=True)
class Scenario:
    """A gallery and the machines for it.

    Attributes:
        items: N.
        old_dim, new_dim: Widths of the two spaces.
        number_bytes: Of one number of a stored vector (4: float32, 2: float16).
        indexed_bytes: Of one number of an indexed vector (4, or 1 where the index quantises to bytes).
        share: Share of the items that are new, 0 to 1.
        shard_items: Items of one catalogue.
        machine_ram: Bytes of one machine for indexes.
        machine_disk: Bytes of one machine for vectors.
        workers, worker_rate: Encoders at work, and items per second of each.
        item_bytes: Of one item's content (an image).
        host_bits: Network bits per second of one host that reads items.
        task_items: Items per commit.
        k: Results of a query.
        flops, disk_bytes_per_s: Of one core and one disk, for a backfill by transform alone.
    """

    items: int
    old_dim: int
    new_dim: int
    number_bytes: int = 4
    indexed_bytes: int = 4
    share: float = 0.5
    shard_items: int = 10_000_000
    machine_ram: float = 256 * GB
    machine_disk: float = 4000 * GB
    workers: int = 32
    worker_rate: float = 1000.0
    item_bytes: float = 100_000.0
    host_bits: float = 10e9
    task_items: int = 1000
    k: int = 10
    flops: float = 20e9
    disk_bytes_per_s: float = 500e6


def plan(s: Scenario, c: Constants) -> dict[str, float]:
    """Bytes, machines and hours of an upgrade; the formulas of docs/scale.md.

    Raises:
        ValueError: If a number of the scenario is not positive, or the share not in 0..1.
    """
    if not 0 <= s.share <= 1:
        raise ValueError(f"share is {s.share}; it must be in 0..1")
    for name, value in vars(s).items():
        if name != "share" and not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    shards = math.ceil(s.items / s.shard_items)
    per_old = s.old_dim * s.indexed_bytes + c.index_bytes
    per_new = s.new_dim * s.indexed_bytes + c.index_bytes
    index = s.items * ((1 - s.share) * per_old + s.share * per_new)
    moving = s.shard_items * max(per_old, per_new)  # one shard's index at a time is held twice, while it is updated
    old_vectors = s.items * (s.old_dim * s.number_bytes + 8)
    new_vectors = s.items * (s.new_dim * s.number_bytes + 8)
    catalogue = s.items * c.catalogue_bytes
    disk = old_vectors + new_vectors + catalogue + index
    lists = 2 * shards
    encode_s = s.items / (s.workers * s.worker_rate)
    read_s = s.items * s.item_bytes * 8 / s.host_bits
    transform_s = 2 * s.items * s.old_dim * s.new_dim / s.flops
    copy_s = (old_vectors + new_vectors) / s.disk_bytes_per_s
    return {
        "shards": shards,
        "old_vector_bytes": old_vectors,
        "new_vector_bytes": new_vectors,
        "catalogue_bytes": catalogue,
        "disk_bytes_until_finish": disk,
        "index_ram_bytes": index + moving,
        "index_ram_bytes_blue_green": s.items * (per_old + per_new),
        "machines_by_ram": math.ceil((index + moving) / s.machine_ram),
        "machines_by_disk": math.ceil(disk / s.machine_disk),
        "encode_hours": encode_s / 3600,
        "network_host_hours": read_s / 3600,
        "hosts_for_the_network": math.ceil(read_s / encode_s),
        "commits": math.ceil(s.items / s.task_items),
        "commits_per_shard_and_s": s.items / s.task_items / encode_s / shards,
        "transform_core_hours": transform_s / 3600,
        "transform_disk_hours": copy_s / 3600,
        "verify_process_hours": s.items / c.verify_per_s / 3600,
        "fan_in_bytes_per_query": lists * s.k * 12,
        "join_ms_per_query": 1e3 * c.join_s * lists,
    }


def measured_constants(growth: Mapping[str, Any], shards: Mapping[str, Any]) -> Constants:
    """From the results of scale_growth (its largest complete size) and scale_shards."""
    complete = [int(items) for items, steps in growth["growth"].items() if {"add", "index", "verify"} <= steps.keys()]
    items = max(complete)
    steps = growth["growth"][str(items)]
    joins = shards["joining"]
    many = max(joins, key=int)
    return Constants(
        catalogue_bytes=steps["add"]["catalogue_mb"] * 2**20 / items,
        index_bytes=steps["index"]["index_mb"] * 2**20 / items - 4 * growth["dim"],
        join_s=joins[many]["ms"] / 1e3 / joins[many]["lists"],
        add_per_s=steps["add"]["items_per_s"],
        verify_per_s=items / steps["verify"]["wall_s"],
    )


# ------------------------------------------------------------------------------------------------------------ page


def growth_table(growth: Mapping[str, Any]) -> str:
    lines = [
        "| | " + " | ".join(f"{int(items):,} items" for items in growth["growth"]) + " |",
        "|---" * (1 + len(growth["growth"])) + "|",
    ]

    def row(what: str, step: str, show: Any) -> None:
        cells = [show(steps[step], int(items)) if step in steps else "" for items, steps in growth["growth"].items()]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")

    row("add, items/s", "add", lambda s, n: f"{s['items_per_s']:,.0f}")
    row("open, ms", "open", lambda s, n: f"{1e3 * s['open_s']:.1f}")
    row("first search after opening, s", "open", lambda s, n: f"{s['first_search_s']:.2f}")
    for batch in (1, 64):
        for title, step in (("exact", "exact"), ("IVF", "ivf"), ("IVF, half migrated", "merged")):
            row(
                f"search, {title}, batch {batch}, CPU ms", step,
                lambda s, n, batch=batch: f"{s[f'batch_{batch}']['cpu_ms']:.2f}",
            )  # fmt: skip
    row("recall@10 of IVF", "ivf", lambda s, n: f"{s['recall_of_queries']:.3f}")
    row("recall@10, half migrated", "merged", lambda s, n: f"{s['recall_of_queries']:.3f}")
    row("build the IVF index, CPU s", "index", lambda s, n: f"{s['cpu_s']:,.0f}")
    row("begin an upgrade, CPU s (wall)", "begin", lambda s, n: f"{s['cpu_s']:.1f} ({s['wall_s']:.1f})")
    row("backfill, items per CPU second", "half", lambda s, n: f"{n / 2 / s['cpu_s']:,.0f}")
    row("backfill, items/s (wall)", "half", lambda s, n: f"{s['items_per_s']:,.0f}")
    row("verify, CPU s (wall)", "verify", lambda s, n: f"{s['cpu_s']:.1f} ({s['wall_s']:.1f})")
    worst = [f"{max(step['outside_index_mb'] for step in steps.values()):,.0f}" for steps in growth["growth"].values()]
    lines.append("| largest memory outside the index, MB | " + " | ".join(worst) + " |")
    exact = [f"{int(n):,}" for n, steps in growth["growth"].items() if steps.get("half", {}).get("index_mb") == 0]
    if exact:
        lines += [
            "",
            f"The upgrade of {' and '.join(exact)} items was run with exact search: an empty cell was not measured.",
        ]
    return "\n".join(lines)


def shares_table(results: Path) -> str:
    lines = ["| index | share | batch | ratio (CPU) | limit | one search, CPU ms | recall@10 |", "|---" * 7 + "|"]
    for kind in ("exact", "ivf", "hnsw"):
        file = results / f"serve_share_{kind}.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text())["result"]
        for case, values in found.items():
            if isinstance(values, dict):
                share, batch = case.removeprefix("share ").split(", batch ")
                lines.append(
                    f"| {kind}, {found['items']:,} | {share} | {batch} | {values['ratio']:.2f} | "
                    f"{found['limit_ratio']} | {values['reference_ms']:.2f} | {values['recall']:.3f} |"
                )
    return "\n".join(lines)


PAPER = (
    ("float32, IVF", Scenario(items=10**9, old_dim=256, new_dim=256)),
    ("float16 files, byte index", Scenario(items=10**9, old_dim=256, new_dim=256, number_bytes=2, indexed_bytes=1)),
    ("256 to 512 wide, float16 files, byte index",
     Scenario(items=10**9, old_dim=256, new_dim=512, number_bytes=2, indexed_bytes=1)),
)  # fmt: skip
SHOWN = {
    "shards": ("shards `S = N / 1e7`", "{:,.0f}"),
    "old_vector_bytes": ("old vectors `N (d_old b + 8)`", "GB"),
    "new_vector_bytes": ("new vectors `N (d_new b + 8)`", "GB"),
    "catalogue_bytes": ("catalogues `N c`", "GB"),
    "disk_bytes_until_finish": ("disk until `finish`, with the index files", "GB"),
    "index_ram_bytes": ("index memory `N ((1-f) B_old + f B_new)` and one shard", "GB"),
    "index_ram_bytes_blue_green": ("index memory of two whole systems instead", "GB"),
    "machines_by_ram": ("machines of 256 GB, by memory", "{:,.0f}"),
    "machines_by_disk": ("machines of 4 TB, by disk", "{:,.0f}"),
    "encode_hours": ("hours of backfill `N / (G r)`", "{:.1f}"),
    "network_host_hours": ("host-hours at 10 Gbit/s to read the items `8 N s / B`", "{:.0f}"),
    "hosts_for_the_network": ("hosts that keep up with the encoders", "{:,.0f}"),
    "commits": ("commits `N / 1000`", "{:,.0f}"),
    "commits_per_shard_and_s": ("commits per catalogue and second", "{:.2f}"),
    "transform_core_hours": ("core-hours of a lift `2 N d_old d_new / 20 GFLOP/s`", "{:.1f}"),
    "transform_disk_hours": ("hours of one disk (500 MB/s) to read and write them", "{:.1f}"),
    "verify_process_hours": ("process-hours of `verify`", "{:.2f}"),
    "fan_in_bytes_per_query": ("bytes that reach the joining machine per query `2 S k 12`", "{:,.0f}"),
    "join_ms_per_query": ("ms to join them", "{:.1f}"),
}


def paper_table(constants: Constants) -> str:
    plans = [plan(scenario, constants) for _, scenario in PAPER]
    lines = [
        "| 1e9 items, half migrated | " + " | ".join(name for name, _ in PAPER) + " |",
        "|---" * (len(PAPER) + 1) + "|",
    ]
    for key, (title, form) in SHOWN.items():
        cells = [f"{p[key] / GB:,.0f} GB" if form == "GB" else form.format(p[key]) for p in plans]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shards_text(shards: Mapping[str, Any]) -> str:
    own = shards["independence"]
    lines = [
        f"Ten catalogues in one process, tasks of {own['task_items']} items taken in turns: "
        f"{own['among_others_ms']:.2f} CPU ms per task, against {own['alone_ms']:.2f} ms in one alone "
        f"({own['ratio']:.2f}x).",
        "",
        "| shards | lists (old and new) | CPU ms to join | bytes |",
        "|---|---|---|---|",
    ]
    for count, join in shards["joining"].items():
        lines.append(f"| {count} | {join['lists']} | {join['ms']:.2f} | {join['bytes']:,} |")
    return "\n".join(lines)


def page(results: Path = RESULTS) -> str:
    growth = json.loads((results / "scale_growth.json").read_text())
    shards = json.loads((results / "scale_shards.json").read_text())["result"]
    constants = measured_constants(growth["result"], shards)
    parts = {
        "growth": growth_table(growth["result"]),
        "shares": shares_table(results),
        "shards": shards_text(shards),
        "paper": paper_table(constants),
        "machine": f"{growth['machine']['processor']}, {growth['machine']['cores']} cores",
        "dim": str(growth["result"]["dim"]),
        "worst": f"{growth['result']['worst_outside_index_mb']:,.0f}",
        "catalogue": f"{constants.catalogue_bytes:.0f}",
        "index": f"{constants.index_bytes:.0f}",
        "join": f"{1e3 * constants.join_s:.3f}",
    }
    text = TEXT.read_text()
    for name, value in parts.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def draw(growth: Mapping[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "bowerbird", "font.size": 8})
    import matplotlib.pyplot as plt

    sizes = [int(items) for items in growth["growth"]]

    def curve(step: str, value: Any) -> tuple[list[int], list[float]]:
        found = [(n, value(growth["growth"][str(n)][step], n)) for n in sizes if step in growth["growth"][str(n)]]
        return [n for n, _ in found], [y for _, y in found]

    panels: dict[str, dict[str, tuple[list[int], list[float]]]] = {
        "add and backfill, items/s": {
            "add": curve("add", lambda s, n: s["items_per_s"]),
            "backfill": curve("half", lambda s, n: s["items_per_s"]),
        },
        "open, ms": {"open": curve("open", lambda s, n: 1e3 * s["open_s"])},
        "search, batch 1, CPU ms": {
            "exact": curve("exact", lambda s, n: s["batch_1"]["cpu_ms"]),
            "IVF": curve("ivf", lambda s, n: s["batch_1"]["cpu_ms"]),
            "IVF, half migrated": curve("merged", lambda s, n: s["batch_1"]["cpu_ms"]),
        },
        "search, batch 64, CPU ms": {
            "exact": curve("exact", lambda s, n: s["batch_64"]["cpu_ms"]),
            "IVF": curve("ivf", lambda s, n: s["batch_64"]["cpu_ms"]),
            "IVF, half migrated": curve("merged", lambda s, n: s["batch_64"]["cpu_ms"]),
        },
        "verify, CPU s": {"verify": curve("verify", lambda s, n: s["cpu_s"])},
        "memory outside the index, MB": {
            name: curve(step, lambda s, n: max(s["outside_index_mb"], 1))
            for name, step in (("add", "add"), ("index", "index"), ("begin", "begin"), ("backfill", "half"),
                               ("verify", "verify"))
        },
    }  # fmt: skip
    figure, axes = plt.subplots(2, 3, figsize=(9, 5.2), layout="constrained")
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=True):
        for name, (x, y) in curves.items():
            axis.plot(x, y, marker="o", markersize=3, linewidth=1.2, label=name)
        axis.set(title=title, xscale="log", yscale="log", xlabel="items")
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        if PAGE.read_text() != page():
            sys.exit(f"{PAGE} is out of date. Run: python benchmarks/scale_plan.py")
    else:
        PAGE.write_text(page())
        draw(json.loads((RESULTS / "scale_growth.json").read_text())["result"], PICTURE)


if __name__ == "__main__":
    main()
