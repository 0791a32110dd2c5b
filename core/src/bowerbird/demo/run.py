"""The steps of ``bowerbird demo``, on a real gallery in the output folder.

Everything measured goes to ``demo.json``; ``index.html`` is drawn from it. Q queries, N gallery items, D width of a
space.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.data.images import open_image
from bowerbird.demo.encoders import recipes, train_encoder
from bowerbird.demo.page import ARMS, write_page
from bowerbird.demo.pictures import Query, new_gallery, write_pictures
from bowerbird.demo.setup import MARKER, Clock, check_installed, own_folder
from bowerbird.encoders import LoadedEncoder
from bowerbird.errors import SpaceError
from bowerbird.files import write_json
from bowerbird.gallery import Gallery
from bowerbird.gallery.gallery import SearchResult
from bowerbird.gallery.merge import merge_by_zscore
from bowerbird.report import data_uri
from bowerbird.retrieval.curves import Curve
from bowerbird.retrieval.flips import flips
from bowerbird.retrieval.metrics import RankedList, Relevance, average_precision, cmc
from bowerbird.upgrade import Upgrade

DEPTH = 100  # results per query that count: mAP@100
SHOWN = 5  # results per query on the page
WALL = 8  # queries on the page


@dataclass
class Moment:
    """Results of all queries at one share: ids ``(Q, DEPTH)`` as positions in the gallery, which of them are new."""

    ranked: NDArray[np.int64]
    is_new: NDArray[np.bool_]
    ap: NDArray[np.float64]
    first: NDArray[np.bool_]


Arm = list[Moment]  # one way to serve, measured at every share


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    steps: int = 10,
    epochs: int = 40,
    limit: int | None = None,
    new_split: str = "new-train",
    say: Callable[[str], None] = lambda _: None,
    show: bool = False,
) -> dict[str, Any]:
    """Train three encoders, upgrade two galleries, write ``index.html`` and ``demo.json``; returns the numbers.

    Args:
        out: Folder. An earlier demo there is replaced; anything else is refused.
        steps: Measurements between 0 and 100 %.
        limit: Only so many of the unseen concepts, and
        new_split: what the new encoders are trained on (both for quick tests).
        say: Called with one line per step.
        show: Draw progress bars.

    Raises:
        MissingExtraError: Something that the demo uses is not installed; says what to install.
        GalleryError: ``out`` holds something else.
    """
    out = Path(out)
    check_installed("report", "matplotlib", "jinja2")
    own_folder(out)
    clock = Clock(say)

    with clock.step("pictures", "emoji of unseen concepts written as PNG files, as a user's folder would be"):
        queries, items = write_pictures(out / "images", limit)
    encoders: dict[str, LoadedEncoder] = {}
    what = {
        "old": "100 concepts, 3 styles",
        "new": "448 concepts, 5 styles, another seed",
        "bct": "the same data, compatible with the old encoder",
    }
    for name, recipe in recipes(out / "runs/old", seed=seed, epochs=epochs, new_split=new_split).items():
        with clock.step(f"train {name}", what[name]):
            encoders[name] = train_encoder(recipe, out / "runs" / name, show=show)
    old, new, bct = encoders["old"], encoders["new"], encoders["bct"]

    relevance = _relevance(queries, items)
    vectors = {name: encoder.encode([q.path for q in queries]) for name, encoder in encoders.items()}  # (Q, D) each
    with clock.step("gallery", f"{len(items)} pictures encoded with the old encoder and added"):
        old_vectors = old.encode([item["path"] for item in items])
        gallery = new_gallery(out / "gallery", old, items, old_vectors)
    with gallery:
        before = gallery.search(vectors["old"], DEPTH)
        start = _judge(before, items, relevance)
        refusal = _refusal(gallery, vectors["new"][:1], new)
        with clock.step("rank merge", "the live gallery is re-encoded while it serves; measured at every share"):
            shares, moved, merged, scaled, changed = _rank_merge(
                gallery, old, new, vectors, items, relevance, steps, before
            )
        after = gallery.search(vectors["new"], DEPTH)
        new_vectors = gallery.vectors_of([item["id"] for item in items])
    with clock.step("compatible", "a second gallery moves to the BCT encoder; no query needs the old encoder any more"):
        compatible = _compatible(out / "gallery-bct", old, bct, old_vectors, vectors, items, relevance, shares)
    switched = [
        _judge_scores(vectors["new"] @ np.where(m[:, None], new_vectors, old_vectors).T, m, relevance) for m in moved
    ]
    with clock.step("from scratch", "a gallery built with the new encoder alone: the end that an upgrade must reach"):
        fresh = _from_scratch(out / "fresh", new, items, vectors["new"])
    best = _judge(fresh, items, relevance)

    arms = {"switch": switched, "rank_merge": merged, "zscore": scaled, "compatible": compatible}
    result = {
        "format": 1,
        "command": "bowerbird " + " ".join(sys.argv[1:]) if Path(sys.argv[0]).name == "bowerbird" else "bowerbird demo",
        "date": datetime.now(UTC).date().isoformat(),
        "seed": seed,
        "gallery": {
            "items": len(items), "concepts": len({q.concept for q in queries}), "queries": len(queries),
            "query_style": queries[0].id.split("/")[0], "depth": DEPTH,
        },
        "levels": {
            "old_old": _level(start), "new_new": _level(best), "new_old": _level(switched[0]),
            "bct_old": _level(compatible[0]), "bct_bct": _level(compatible[-1]),
        },
        "shares": shares,
        "curves": {name: _curve(arm, shares, start) for name, arm in arms.items()},
        "changed_at_start": changed,
        "different_at_end": _different(after, fresh),
        "refusal": refusal,
        "timings": clock.steps,
        "environment": _environment(),
        "peak_memory_mb": _peak_memory_mb(),
    }  # fmt: skip
    wall, rule = _wall(queries, items, arms, start, merged[-1])
    thumbs = _thumbs(wall, {q.id: q.path for q in queries} | {str(i["id"]): i["path"] for i in items})
    result["total_seconds"] = round(sum(step["seconds"] for step in clock.steps), 1)
    write_page(out / "index.html", result, wall=wall, wall_rule=rule, thumbs=thumbs)
    write_json(out / MARKER, result)
    return result


def _relevance(queries: Sequence[Query], items: Sequence[Mapping[str, Any]]) -> Relevance:
    return Relevance.from_labels([q.concept for q in queries], [item["concept"] for item in items])


# ------------------------------------------------------------------------------------------------ galleries


def _refusal(gallery: Gallery, query: NDArray[np.float32], new: LoadedEncoder) -> str:
    try:
        gallery.search({new.fingerprint: query}, 1)
    except SpaceError as error:
        return str(error)
    raise AssertionError("the gallery searched old vectors with a query of an unrelated encoder")


def _rank_merge(
    gallery: Gallery,
    old: LoadedEncoder,
    new: LoadedEncoder,
    vectors: Mapping[str, NDArray[np.float32]],
    items: Sequence[Mapping[str, Any]],
    relevance: Relevance,
    steps: int,
    before: SearchResult,
) -> tuple[list[float], list[NDArray[np.bool_]], Arm, Arm, int]:
    """Shares, which items were new at each, the results merged by plain distances and on one scale, and how many
    result lists changed at the start."""
    arm, scaled, shares, moved, changed = Arm(), Arm(), [], [], 0
    queries = {old.fingerprint: vectors["old"], new.fingerprint: vectors["new"]}
    upgrade = Upgrade(gallery, new, old=old)
    upgrade.begin(strategy="rank-merge", task_items=_task_items(items, steps))
    service = upgrade.serve()
    for step in range(steps + 1):
        if step:
            upgrade.run(stop_at_share=step / steps)
        found = service.search(vectors=queries, k=DEPTH)
        if step == 0:
            changed = _different(before, found)
        shares.append(upgrade.status().share)
        moved.append(_moved(gallery, new.fingerprint, items))
        arm.append(_judge(found, items, relevance))
        on_one_scale = gallery.search(queries, DEPTH, merger=merge_by_zscore)  # what `--merger zscore` serves
        scaled.append(_judge(on_one_scale, items, relevance))
    upgrade.finish()
    return shares, moved, arm, scaled, changed


def _compatible(
    path: Path,
    old: LoadedEncoder,
    bct: LoadedEncoder,
    old_vectors: NDArray[np.float32],
    vectors: Mapping[str, NDArray[np.float32]],
    items: Sequence[Mapping[str, Any]],
    relevance: Relevance,
    shares: Sequence[float],
) -> Arm:
    arm = Arm()
    with new_gallery(path, old, items, old_vectors) as gallery:
        gallery.register_space(bct.space())
        gallery.relate(bct.fingerprint, old.fingerprint, evidence={"method": "compat:bct"})
        upgrade = Upgrade(gallery, bct)
        upgrade.begin(strategy="compatible", task_items=_task_items(items, len(shares) - 1))
        service = upgrade.serve()
        for share in shares:
            if share:
                upgrade.run(stop_at_share=share)
            found = service.search(vectors={bct.fingerprint: vectors["bct"]}, k=DEPTH)
            arm.append(_judge(found, items, relevance))
        upgrade.finish()
    return arm


def _task_items(items: Sequence[object], steps: int) -> int:
    """Small tasks, so that a run can stop close to the share that is asked for."""
    return max(1, len(items) // (4 * steps))


def _from_scratch(
    path: Path, new: LoadedEncoder, items: Sequence[Mapping[str, Any]], queries: NDArray[np.float32]
) -> SearchResult:
    with new_gallery(path, new, items, new.encode([item["path"] for item in items])) as gallery:
        found = gallery.search(queries, DEPTH)
    shutil.rmtree(path)
    return found


def _moved(gallery: Gallery, fingerprint: str, items: Sequence[Mapping[str, Any]]) -> NDArray[np.bool_]:
    """``(N,)``: which items have their new vector."""
    nums = np.array([item.num for item in gallery.get_many([i["id"] for i in items]) if item is not None], np.int64)
    part = gallery.snapshot().part_of(fingerprint)
    return part.contains(nums) if part is not None else np.zeros(len(items), bool)


# ---------------------------------------------------------------------------------------------- measuring


def _judge(found: SearchResult, items: Sequence[Mapping[str, Any]], relevance: Relevance) -> Moment:
    position = {item["id"]: index for index, item in enumerate(items)}
    ranked = np.array([[position[name] for name in row] for row in found.ids], np.int64)
    ranks = np.broadcast_to(-np.arange(ranked.shape[1], dtype=np.float64), ranked.shape)
    return _moment(RankedList(ranked, ranks), found.sides[:, : ranked.shape[1]] == 1, relevance)


def _judge_scores(scores: NDArray[np.float32], moved: NDArray[np.bool_], relevance: Relevance) -> Moment:
    ranked = RankedList.from_scores(scores, k=DEPTH)
    return _moment(ranked, moved[ranked.ids], relevance)


def _moment(ranked: RankedList, is_new: NDArray[np.bool_], relevance: Relevance) -> Moment:
    ap = average_precision(ranked, relevance, kind="at_k", k=DEPTH)
    first = cmc(ranked, relevance, ks=[1])
    return Moment(np.asarray(ranked.ids), is_new, ap.values, np.asarray(first.values).reshape(len(ranked)) == 1)


def _level(moment: Moment) -> dict[str, float]:
    return {"map": float(moment.ap.mean()), "recall_at_1": float(moment.first.mean())}


def _curve(arm: Arm, shares: Sequence[float], start: Moment) -> dict[str, Any]:
    """mAP, R@1 and flips against the old system at every share, and the area under the mAP."""
    maps = [float(m.ap.mean()) for m in arm]
    each = [flips(start.first, m.first) for m in arm]
    return {
        "map": maps,
        "recall_at_1": [float(m.first.mean()) for m in arm],
        "nfr": [float(f.nfr) for f in each],
        "pfr": [float(f.pfr) for f in each],
        "area": float(Curve(np.asarray(shares), np.asarray(maps)).area()),
    }


def _different(one: SearchResult, other: SearchResult) -> int:
    """How many queries have another list of results."""
    return sum(a != b for a, b in zip(one.ids, other.ids, strict=True))


# ------------------------------------------------------------------------------------------------ the page


def _wall(
    queries: Sequence[Query], items: Sequence[Mapping[str, Any]], arms: Mapping[str, Arm], start: Moment, end: Moment
) -> tuple[list[dict[str, Any]], str]:
    """Results of a few queries at every share: per arm and share a list of [item id, right, new]."""
    mended = np.flatnonzero(~start.first & end.first)
    broken = np.flatnonzero(start.first & ~end.first)
    kept = np.flatnonzero(start.first & end.first)
    chosen = [*_spread(mended, WALL - 3), *_spread(kept, 2), *_spread(broken, 1)]
    rule = (
        f"evenly spaced in alphabetical order, {WALL - 3} of the {len(mended)} whose first result the new model mends, "
        f"2 of the {len(kept)} that both answer right, 1 of the {len(broken)} that it breaks."
    )
    wall = []
    for q in chosen:
        row: dict[str, Any] = {"query": queries[q].id, "concept": queries[q].concept.replace("-", " ")}
        for name, arm in arms.items():
            row[name] = [
                [
                    [items[i]["id"], items[i]["concept"] == queries[q].concept, bool(is_new)]
                    for i, is_new in zip(m.ranked[q, :SHOWN], m.is_new[q, :SHOWN], strict=True)
                ]
                for m in arm
            ]
        wall.append(row)
    return wall, rule


def _spread(positions: NDArray[np.int64], count: int) -> list[int]:
    """``count`` of ``positions``, evenly spaced."""
    if len(positions) <= count:
        return positions.tolist()
    return positions[(2 * np.arange(count) + 1) * len(positions) // (2 * count)].tolist()


def _thumbs(wall: Sequence[Mapping[str, Any]], paths: Mapping[str, Path]) -> dict[str, str]:
    shown = {row["query"] for row in wall}
    shown |= {hit[0] for row in wall for name in ARMS for m in row[name] for hit in m}
    return {name: data_uri(open_image(paths[name]), side=64) for name in sorted(shown)}


def _environment() -> str:
    names = ("bowerbird-core", "bowerbird-compat", "bowerbird-emoji", "torch", "timm", "numpy")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    return f"Python {platform.python_version()}, {versions}; {os.cpu_count()} cores, {platform.machine()}"


def _peak_memory_mb() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024))
