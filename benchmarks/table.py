"""Write docs/benchmarks.md from benchmarks/results/*.json.

python benchmarks/table.py           write it
python benchmarks/table.py --check   fail if the committed page differs
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
Row = tuple[str, str, str, bool | None]  # what, measured, limit, within the limit (None: there is none)

INTRO = """# Benchmarks

Written by `python benchmarks/table.py` from the committed results; do not edit. Every benchmark measures its subject
and the limit that it is held against in turns in one process, so that the ratio can be trusted where absolute times
cannot.
`python benchmarks/run.py` runs them all (about half an hour on an idle machine).
"""


def startup(r: Mapping[str, Any]) -> list[Row]:
    limit, bare = r["limit_s"], r["median_s"]["python -c pass"]
    return [
        (f"`bowerbird {name}`, median of {r['runs']} (bare Python: {1e3 * bare:.0f} ms)", f"{1e3 * seconds:.0f} ms",
         f"{1e3 * limit:.0f} ms", seconds <= limit)
        for name, seconds in r["median_s"].items() if name != "python -c pass"
    ]  # fmt: skip


def ratios(what: str) -> Callable[[Mapping[str, Any]], list[Row]]:
    def rows(r: Mapping[str, Any]) -> list[Row]:
        limit = r.get("limit_ratio")
        return [
            (f"{what}: {case}", f"{v['ratio']:.2f}x ({v['ms']:.2f} ms against {v['reference_ms']:.2f} ms)",
             f"at most {limit}x" if limit else "", v["ratio"] <= limit if limit else None)
            for case, v in r.items() if isinstance(v, dict) and "ratio" in v
        ]  # fmt: skip

    return rows


def add(r: Mapping[str, Any]) -> list[Row]:
    speed = r["speed"]
    what = "`gallery.add` of 1M x 256 vectors, against `numpy.save` with fsync of the same bytes"
    measured = f"{speed:.2f} of its speed, {r['vectors_per_s']:,.0f} vectors/s, memory grows by "
    measured += f"{r['anonymous_memory_growth_mb']:.0f} MB"
    return [(what, measured, f"at least {r['limit_speed']}", speed >= r["limit_speed"])]


def opening(r: Mapping[str, Any]) -> list[Row]:
    seconds, memory = r["open_s"], r["resident_mb"]
    within = seconds <= r["limit_open_s"] and memory <= r["limit_resident_mb"]
    limit = f"{r['limit_open_s']:g} s, {r['limit_resident_mb']:g} MB"
    return [("opening a gallery of 1M x 256", f"{1e3 * seconds:.1f} ms, {memory:.0f} MB resident", limit, within)]


def share(what: str, key: str, limit_key: str) -> Callable[[Mapping[str, Any]], list[Row]]:
    return lambda r: [(what, f"{r[key]:.2f} of it", f"at least {r[limit_key]}", r[key] >= r[limit_key])]


def workers(r: Mapping[str, Any]) -> list[Row]:
    low, high = r["speed_of_two_range"]
    what = f"`upgrade run --workers 2`, against one worker, with an encoder of one thread ({r['encoder']})"
    measured = f"{r['speed_of_two']:.2f}x ({low:.2f} to {high:.2f} over {r['pairs']} pairs); processor time per item "
    measured += f"{r['processor_per_item_two_over_one']:.2f}x"
    return [(what, measured, f"at least {r['limit']}x", r["ok"])]


def passes(r: Mapping[str, Any]) -> list[Row]:
    most = max(v["old_encoder_passes_per_query"] for k, v in r.items() if "reverse-transform" in k)
    what = "passes of the old encoder per query during an upgrade with `reverse-transform`"
    return [(what, f"{most:g}", "0", most == 0)]


def memory(r: Mapping[str, Any]) -> list[Row]:
    most = max(map(int, r["growth"]))
    limit, worst = r["limit_outside_index_mb"], r["worst_outside_index_mb"]
    what = f"memory outside the index, the largest of all steps up to {most:,} items (see [Scale](scale.md))"
    return [(what, f"{worst:,.0f} MB", f"{limit:,} MB", worst <= limit)]


def losses(r: Mapping[str, Any]) -> list[Row]:
    limit = r["limit_ratio"]
    return [
        (f"a training step, against the formula in plain torch: {method}",
         f"{v['ratio']:.2f}x ({v['ours_ms']:.1f} ms against {v['plain_ms']:.1f} ms of processor time)",
         f"at most {limit}x", v["ratio"] <= limit)
        for method, v in r["methods"].items()
    ]  # fmt: skip


def steps(r: Mapping[str, Any]) -> list[Row]:
    limit, memory_limit = r["limit_ratio"], r["limit_memory_ratio"]
    return [
        (f"a pre-training step, against the formula in plain torch: {method}",
         f"{v['ratio']:.2f}x ({v['ours_ms']:.0f} ms of processor time against {v['plain_ms']:.0f} ms); peak memory "
         f"{v['memory_ratio']:.2f}x ({v['ours_mb']:.0f} MiB against {v['plain_mb']:.0f} MiB)",
         f"at most {limit}x; {memory_limit}x", v["ratio"] <= limit and v["memory_ratio"] <= memory_limit)
        for method, v in r["methods"].items()
    ]  # fmt: skip


def parts(r: Mapping[str, Any]) -> list[Row]:
    # The limit was stated for decoders of the encoder's width; the paper's is larger than this encoder.
    limit = r["limit_ratio"]
    return [
        (f"a step of EMAE in four parts against four steps of MAE: {size}",
         f"{v['ratio']:.2f}x ({v['emae_ms']:.0f} ms of processor time against 4 x {v['mae_ms']:.0f} ms)",
         f"at most {limit}x", v["ratio"] <= limit)
        for size, v in r["sizes"].items()
    ]  # fmt: skip


def mask_ratios(r: Mapping[str, Any]) -> list[Row]:
    all_patches = r["mae"][0]["encoder_ms"]
    return [
        (f"MAE with {v['mask_ratio']:.0%} of the patches hidden, ViT-Tiny, {r['batch']} pictures of 224 pixels",
         f"encoder {v['encoder_ms']:.0f} ms ({v['encoder_ms'] / all_patches:.2f}x of all patches), "
         f"step {v['step_ms']:.0f} ms",
         "falls", r["falls"])
        for v in r["mae"] if "step_ms" in v
    ]  # fmt: skip


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"


def waits(r: Mapping[str, Any]) -> list[Row]:
    limit = r["limit_share"]
    return [
        (f"waiting for data, `recipes/{name}.toml`, {_workers(v['workers'])}",
         f"{v['wait_share']:.1%} of the loop (processor time: {v['read_cpu_ms']:.0f} ms to read a batch, "
         f"{v['step_cpu_ms']:.0f} ms for a step)", f"at most {limit:.0%}", v["wait_share"] <= limit)
        for name, v in r["recipes"].items()
    ]  # fmt: skip


def maps(r: Mapping[str, Any]) -> list[Row]:
    # Held against processor time: with others on the machine the clock counts them, too.
    limit = r["limit_s"]
    what = f"fit on {r['pairs']:,} pairs of {r['dim']} cached dimensions, two cores"
    return [
        (f"{what}: {name}", f"{seconds:.0f} s of processor time ({r['seconds'][name]:.0f} s on the clock)",
         f"{limit} s", seconds <= limit)
        for name, seconds in r["cpu_seconds"].items()
    ]  # fmt: skip


def noise(r: Mapping[str, Any]) -> list[Row]:
    case = f"ResNet-18, {r['batch']} pictures of {r['size']} pixels, six points"
    limit, at_evaluation = r["limit_training"], r["limit_evaluation"]
    rows: list[Row] = []
    for name, v in r["training"].items():
        limited = name.startswith("p = 0.5")
        rows.append(
            (f"a training step with `domain:dsu`, against one without: {case}, {name}",
             f"{v['ratio']:.3f}x ({v['ms']:.0f} ms against {v['reference_ms']:.0f} ms of processor time)",
             f"at most {limit}x" if limited else "", v["ratio"] <= limit if limited else None)
        )  # fmt: skip
    v = r["evaluation"]
    measured = f"{v['ratio']:.3f}x ({v['ms']:.0f} ms against {v['reference_ms']:.0f} ms of processor time)"
    what = "a forward pass at evaluation with `domain:dsu` attached, against one without"
    return [*rows, (what, measured, f"at most {at_evaluation}x", v["ratio"] <= at_evaluation)]


def masks(r: Mapping[str, Any]) -> list[Row]:
    what = f"soft top-k of {r['count']:,} weights, forward and backward, against the authors' formula in plain torch"
    time = f"{r['ratio']:.2f}x ({r['ours_s']:.2f} s against {r['plain_s']:.2f} s of processor time)"
    held = f"{r['memory_ratio']:.2f}x ({r['ours_mb']:.0f} MiB against {r['plain_mb']:.0f} MiB)"
    limit, memory_limit = r["limit_ratio"], r["limit_memory_ratio"]
    return [
        (what, time, f"at most {limit}x", r["ratio"] <= limit),
        ("its peak memory", held, f"at most {memory_limit}x", r["memory_ratio"] <= memory_limit),
    ]


def sparse_steps(r: Mapping[str, Any]) -> list[Row]:
    limit = r["limit_ratio"]
    return [
        (f"a training step with `sparsity:spartan`, against the dense step: {r['network']}, {pattern}",
         f"{v['ratio']:.2f}x ({v['ms']:.0f} ms against {v['reference_ms']:.0f} ms of processor time)",
         f"at most {limit}x", v["ratio"] <= limit)
        for pattern, v in r["patterns"].items()
    ]  # fmt: skip


def sparse_models(r: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for case, v in r["cases"].items():
        measured = f"{v['speed']:.2f}x ({v['ms']:.0f} ms against {v['reference_ms']:.0f} ms); "
        measured += f"in chunks without zeros {v['speed_of_dense_in_chunks']:.2f}x, torch's CSR as it is "
        measured += f"{v['speed_of_plain_csr']:.2f}x"
        limit, what = v["limit"], f"a sparse ViT, batch {r['batch']}, {r['threads']} cores, against dense: {case}"
        within = None if limit is None else v["speed"] >= limit
        rows.append((what, measured, "" if limit is None else f"at least {limit:g}x", within))
    return rows


def sampled(r: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for v in r["rows"]:
        what = f"a training step of MIMDet's encoder with {v['sample_ratio']:.0%} of {r['tokens']} tokens, ViT-Small"
        measured = f"{v['encoder_ratio']:.2f}x of all ({v['encoder_ms']:.0f} ms of processor time); of the backbone "
        measured += f"{v['backbone_ratio']:.2f}x ({v['backbone_ms']:.0f} ms)"
        limited = v["sample_ratio"] == 0.5
        within = v["encoder_ratio"] <= r["limit"] if limited else None
        rows.append((what, measured, f"at most {r['limit']}x" if limited else "", within))
    return rows


def suppression(r: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    limit, memory_limit = r["limit_ratio"], r["limit_memory_ratio"]
    for case, v in r["cases"].items():
        what = f"ACSL of {r['boxes']:,} boxes and {r['classes']:,} classes, loss and gradient, against plain sigmoid "
        what += f"cross-entropy: {case}"
        time = f"{v['ratio']:.2f}x ({v['ms']:.1f} ms against {v['plain_ms']:.1f} ms of processor time)"
        held = f"{v['memory_ratio']:.2f}x ({v['mb']:.1f} MiB against {v['plain_mb']:.1f} MiB)"
        rows.append((what, time, f"at most {limit}x", v["ratio"] <= limit))
        rows.append(("its peak memory", held, f"at most {memory_limit:g}x", v["memory_ratio"] <= memory_limit))
    return rows


def detector_throughput(r: Mapping[str, Any]) -> list[Row]:
    limit = r["limit_ratio"]
    return [
        (f"`detection:torchvision`, {kind} on ResNet-18, {r['side']} pixels, batch {r['batch']}, against its "
         "torchvision model called directly",
         f"{v['ratio']:.3f}x the time ({v['pictures_per_s']:.2f} against {v['direct_pictures_per_s']:.2f} pictures/s)",
         f"at most {limit}x", v["ratio"] <= limit)
        for kind, v in r["cases"].items()
    ]  # fmt: skip


def videotext(r: Mapping[str, Any]) -> list[Row]:
    def time(v: Mapping[str, Any]) -> str:
        return f"{v['ratio']:.2f}x ({v['ms']:.0f} ms of processor time against {v['reference_ms']:.0f} ms)"

    step, masked, roll, inference = (r[f"limit_{name}"] for name in ("step", "masked", "roll", "inference"))
    rows: list[Row] = [
        (f"a step on videos and captions, against the formula in plain torch: {case}",
         f"{time(v)}; peak memory {v['mb']:.0f} MiB against {v['reference_mb']:.0f} MiB",
         f"at most {step}x", v["ratio"] <= step)
        for case, v in r.get("steps", {}).items()
    ]  # fmt: skip
    rows += [
        (f"a step of the video encoder on {v['kept_share']:.0%} of the patches, against all of them: {case}",
         time(v), f"at most {masked}x", v["ratio"] <= masked)
        for case, v in r.get("masked", {}).items()
    ]  # fmt: skip
    rows += [
        (f"a step with rolled tokens, against one without: {case}",
         f"{time(v)}, {v['more_parameters']} more parameters", f"at most {roll}x, 0",
         v["ratio"] <= roll and v["more_parameters"] == 0)
        for case, v in r.get("roll", {}).items()
    ]  # fmt: skip
    rows += [
        (f"embedding clips and captions with what was trained, against the dual encoder: {case}",
         f"{time(v)}, vectors {'bit-equal' if v['bit_equal'] else 'differ'}", f"at most {inference}x, bit-equal",
         v["ratio"] <= inference and v["bit_equal"])
        for case, v in r.get("inference", {}).items()
    ]  # fmt: skip
    return rows


def videos(r: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = [
        (f"a video of 32 pixels and 8 frames: {what}", f"{r['moving'][key]:.1f} ms of processor time", "", None)
        for what, key in (("made and written", "write_ms"), ("4 frames read for training", "read_ms"))
        if "moving" in r
    ]
    rows += [
        (f"8 frames of a film of an hour in {height} lines, most memory of the process",
         f"{v['peak_bytes'] / 1e6:.0f} MB ({v['cpu_seconds']:.1f} s of processor time)",
         f"below {r['memory_limit'] / 1e6:.0f} MB", v["peak_bytes"] < r["memory_limit"])
        for height, v in r.get("memory", {}).items()
    ]  # fmt: skip
    return rows + waits({"limit_share": r["wait_limit"], "recipes": r.get("waiting", {})})


def http(r: Mapping[str, Any]) -> list[Row]:
    limits, given = r["limits"], r["settings"]
    rows: list[Row] = []
    if "vector" in r:
        v, what = (
            r["vector"],
            f"by vector over HTTP, {int(given['items']):,} x {given['dim']}, {given['connections']} connections",
        )
        most = limits["vector_p99_to_p50_below"]
        rows += [
            (f"searches {what}: how many a second, against a constant body of the framework and FAISS alone",
             f"{v['ratio']:.2f} of them ({v['ratio_faiss_batched']:.2f} with FAISS in batches of as many)",
             f"at least {limits['vector_ratio_at_least']}", v["ratio"] >= limits["vector_ratio_at_least"]),
            (f"searches {what}: p99 over p50", f"{v['p99_to_p50']:.2f}x, {v['errors']:.0f} errors", f"below {most}x",
             v["p99_to_p50"] < most and not v["errors"]),
        ]  # fmt: skip
    if "image" in r:
        v, least = r["image"], limits["image_ratio_at_least"]
        rows.append(
            (f"searches by picture over HTTP, {given['connections']} connections: how many a second, against the bare "
             "forward pass on ready batches", f"{v['ratio']:.2f} of them, {v['errors']:.0f} errors",
             f"at least {least}", v["ratio"] >= least and not v["errors"])
        )  # fmt: skip
    return rows


def soak(r: Mapping[str, Any]) -> list[Row]:
    limits, asked = r["limits"], sum(v["requests"] for v in r["requests"].values())
    what = f"{r['settings']['minutes']} minutes of `bowerbird serve` with searches, uploads, deletes and an upgrade"
    ratio, slope = r["p99_ratio"], r["mb_per_minute"]
    most, flat = limits["p99_ratio_at_most"], limits["mb_per_minute_below"]
    return [
        (f"{what}: p99 of searches while items are moved, against that before", f"{ratio:.2f}x", f"at most {most}x",
         ratio <= most),
        (f"{what}: errors", f"{r['errors']} of {asked:,} requests", "0", r["errors"] == 0),
        (f"{what}: memory of the service, after its encoders are loaded", f"{slope:+.2f} MB a minute", f"below {flat}",
         slope < flat),
    ]  # fmt: skip


def fuzzed(r: Mapping[str, Any]) -> list[Row]:
    faults = r["faults_in_all"] + len(r["faults_in_the_log"])
    return [
        (f"{r['requests']:,} hostile requests: answers that are no problem of the client's, and bugs in the log",
         f"{faults}; an ordinary client waited {r['slowest_of_them_seconds']} s at most", "0", faults == 0)
    ]  # fmt: skip


def panned(r: Mapping[str, Any]) -> list[Row]:
    return [
        (f"the page's map of {r['points']:,} points, {case}: processor time of a frame while it is dragged",
         f"{v['median_ms']} ms, {v['p95_ms']} ms in 95 %", f"below {r['limit_ms']} ms", v["p95_ms"] < r["limit_ms"])
        for case, v in r.items() if isinstance(v, dict) and "p95_ms" in v
    ]  # fmt: skip


def kept(r: Mapping[str, Any]) -> list[Row]:
    """How often the full test of each promise saw it broken, in how many of what it did."""
    rows: list[Row] = []
    for test in r["promises"]:
        unit = next(unit for unit in ("kills", "rollbacks", "operations", "queries", "items") if unit in test)
        faults = ("different_galleries", "missing_or_doubled", "changed_at_start", "changed_at_end")
        count = sum(test.get(fault, 0) for fault in faults)
        rows.append((f"{test['promise']}: broken", f"{count} times ({test[unit]:,} {unit})", "0", count == 0))
    return rows


def forecasts(r: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for scenario, found in r["scenarios"].items():
        curves = found["summary"].values()
        draws = sum(v["draws"] for v in curves)
        share = sum(v["within"] * v["draws"] for v in curves) / draws
        worst = max(v["worst"] for v in curves)
        rows.append(
            (f"`plan`'s forecast of the area, against held-out queries: {scenario}",
             f"within {r['promise']} in {100 * share:.0f} % of {draws:.0f}; worst {worst:.3f}, of the estimate alone "
             f"{max(v['worst_estimate'] for v in curves):.3f}", f"within {r['promise']}", worst <= r["promise"])
        )  # fmt: skip
    return rows


ROWS: dict[str, Callable[[Mapping[str, Any]], list[Row]]] = {
    "cli_startup": startup,
    "embed": share("`embed` from JPEG files, against the bare forward pass on ready tensors", "ratio", "limit_ratio"),
    "gallery_search": ratios("`gallery.search`, 100k x 256, top-10, against bare FAISS with the BLAS threshold set"),
    "serve_share_exact": ratios("search during an upgrade, exact, against one search of a whole gallery"),
    "serve_share_ivf": ratios("search during an upgrade, IVF, against one search of a whole gallery"),
    "serve_share_hnsw": ratios("search during an upgrade, HNSW, against one search of a whole gallery"),
    "serve_passes": passes,
    "gallery_add": add,
    "gallery_open": opening,
    "gallery_ann": ratios("approximate search (IVF), 100k x 256"),
    "scale_growth": memory,
    "upgrade_run": share("`upgrade run`, against the bare encoder on the same files", "ratio_wall", "limit_ratio"),
    "upgrade_workers": workers,
    "promises": kept,
    "forecast_error": forecasts,
    "compat_losses": losses,
    "mim_steps": steps,
    "mim_emae": parts,
    "mim_mask_ratio": mask_ratios,
    "mim_data_wait": waits,
    "transforms": maps,
    "dsu_step": noise,
    "soft_topk": masks,
    "mimdet_sampling": sampled,
    "spartan_step": sparse_steps,
    "sparse_vit": sparse_models,
    "acsl_loss": suppression,
    "deformable_attention": ratios(
        "deformable attention in plain torch, processor time against transformers' Deformable DETR"
    ),
    "detector_inference": detector_throughput,
    "videotext_steps": videotext,
    "videotext_data": videos,
    "serve_http": http,
    "serve_upgrade": soak,
    "serve_fuzz": fuzzed,
    "serve_map": panned,
}


def page() -> str:
    lines = [INTRO, "| what | measured | limit | within |", "|---|---|---|---|"]
    sources = []
    for name, rows in ROWS.items():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            continue
        whole = json.loads(file.read_text())
        for what, measured, limit, within in rows(whole["result"]):
            verdict = "" if within is None else "yes" if within else "**no**"
            lines.append(f"| {what} | {measured} | {limit} | {verdict} |")
        versions = ", ".join(f"{k} {v}" for k, v in whole["versions"].items())
        machine = whole["machine"]
        sources.append(
            f"- `{whole['command']}` on {machine['processor']}, {machine['cores']} cores, load average "
            f"{machine['load_average']:.1f} ({versions})"
        )
    return "\n".join([*lines, "", "## How", "", *sources, ""])


def draw_mask_ratios(out: Path) -> None:
    """Time of MAE's encoder and step over the share of hidden patches."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "bowerbird", "font.size": 8})
    from matplotlib import pyplot

    rows = json.loads((RESULTS / "mim_mask_ratio.json").read_text())["result"]["mae"]
    figure, axes = pyplot.subplots(figsize=(4.5, 2.8), layout="constrained")
    for key, label in (("step_ms", "whole step (decoder 192 x 4)"), ("encoder_ms", "encoder")):
        points = [(row["mask_ratio"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="share of hidden patches", ylabel="ms of processor time", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        if PAGE.read_text() != page():
            sys.exit(f"{PAGE} is out of date. Run: python benchmarks/table.py")
    else:
        PAGE.write_text(page())
        draw_mask_ratios(PAGE.parent / "images" / "mask-ratio.svg")


if __name__ == "__main__":
    main()
