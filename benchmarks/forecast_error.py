"""How far ``plan`` is off: its forecast area against the area on the whole gallery and held-out queries.

    python benchmarks/forecast_error.py --out benchmarks/results/forecast_error.json
    python benchmarks/forecast_error.py --features lite0.npz      emoji features made before: arrays ids and vectors

Scenarios: ``core:digits`` (principal components of pixels against ridge regression to the classes) and
``emoji:styles`` (EfficientNet-Lite0 features: 12 principal components against 128 whitened ones; concepts of the
gallery and its queries are unseen, four right answers for a query); the digits with a new encoder that has the old
one in its first dimensions (``core:compatible``); and 3,000 pictures of Fashion-MNIST, encoded as the digits are. The
plan sees a sample, and fits maps on half of it.

Each is planned twice: with one half of the held-out queries, as `--queries` gives them, and without, so that sampled
items are the queries. The curve is measured on held-out queries that no plan saw.

Two sets of a few hundred queries differ by themselves. The curve is therefore also measured on the whole gallery by
the queries that the plan was given, or, where it takes items, by all items: ``sampling`` is the error that a perfect
forecast of that would have (against the curve of the held-out ones), ``estimate`` what the plan adds to it.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bowerbird.gallery import Gallery, Space
from bowerbird.registry import get_registry
from bowerbird.retrieval.index import unit_rows
from bowerbird.upgrade import ItemEncoder, QuerySet
from bowerbird.upgrade.backfill import backfill_plan
from bowerbird.upgrade.forecast import Forecaster, PairedVectors
from bowerbird.upgrade.plan import plan
from bowerbird.upgrade.strategies import load_strategy, transform_direction
from common import write_result

STRATEGIES = ("compat:rank-merge", "compat:adapter", "compat:reverse-transform", "compat:lift")
PROMISE = 0.03
MANY = 2000  # items; of more than that a half of this number are the queries that stand for all


def components(rows: np.ndarray, count: int, *, whiten: bool = False) -> Any:
    mean = rows.mean(axis=0)
    _, spread, directions = np.linalg.svd(rows - mean, full_matrices=False)
    weight = directions[:count].T / (spread[:count] if whiten else 1)
    return lambda x: unit_rows(((x - mean) @ weight).astype(np.float32))


@cache
def digits(_: Path | None) -> tuple[Any, ...]:
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return pixels(loaded.data / 16, loaded.target, [300, 1300])


@cache
def fashion(_: Path | None) -> tuple[Any, ...]:
    from bowerbird.data.fashion_mnist import FashionMnist

    test = FashionMnist.build(None, "test")
    x, labels = test.images.reshape(-1, 28 * 28)[:5000] / 255, np.asarray(test.labels())[:5000]
    return pixels(x, labels, [800, 3800])


def pixels(x: np.ndarray, labels: np.ndarray, ends: list[int]) -> tuple[Any, ...]:
    """Old and new vectors of all pictures, labels, and which are the gallery and the held-out queries."""
    training, items, asked = np.split(np.random.default_rng(0).permutation(len(x)), ends)
    mean, classes = x[training].mean(axis=0), np.eye(10)[labels[training]]
    c = x[training] - mean
    weight = np.linalg.solve(c.T @ c + 10 * np.eye(c.shape[1]), c.T @ (classes - classes.mean(axis=0)))
    return (
        components(x[training[:100]], 5)(x),
        unit_rows(((x - mean) @ weight).astype(np.float32)),
        labels,
        items,
        asked,
    )


@cache
def compatible(_: Path | None) -> tuple[Any, ...]:
    """The digits; the new vectors are the old ones with more dimensions, as a basis transformation makes them."""
    old_rows, new_rows, *rest = digits(None)
    return old_rows, unit_rows(np.concatenate([old_rows, new_rows], axis=1)), *rest


@cache
def emoji(features: Path | None) -> tuple[Any, ...]:
    registry = get_registry()
    build = registry.load(registry.get("dataset", "emoji:styles")).build
    gallery, queries = build(None, "unseen-gallery"), build(None, "unseen-query")
    if features is None:
        from bowerbird.encoders import load_encoder

        encoder, everything = load_encoder("core:efficientnet-lite?model=lite0&image_size=96"), build(None, "all")
        ids, rows = list(everything.item_ids), encoder.encode_dataset(everything)
    else:
        with np.load(features, allow_pickle=False) as saved:
            ids, rows = saved["ids"].tolist(), saved["vectors"]
    at = {name: row for row, name in enumerate(ids)}
    items, asked = (np.array([at[name] for name in part.item_ids]) for part in (gallery, queries))
    seen = np.setdiff1d(np.arange(len(ids)), np.concatenate([items, asked]))
    labels = np.array([name.partition("/")[2] for name in ids])
    rows = np.asarray(rows, np.float64)
    return components(rows[seen], 12)(rows), components(rows[seen], 128, whiten=True)(rows), labels, items, asked


def errors(scenario: Any, sample: int, seed: int, features: Path | None, own_queries: bool) -> dict[str, Any]:
    """One draw: of the sample, of the fits, and of the half of the held-out queries that a plan is given."""
    old_rows, new_rows, labels, items, asked = scenario(features)
    given, asked = (
        np.array_split(np.random.default_rng([seed, 7]).permutation(asked), 2) if own_queries else (None, asked)
    )
    old, new = Space("a" * 64, "old", old_rows.shape[1]), Space("b" * 64, "new", new_rows.shape[1])
    encoder = ItemEncoder(lambda batch: new_rows[[int(item.id) for item in batch]], space=new)
    queries = None
    if given is not None:
        queries = QuerySet([str(labels[i]) for i in given], old=old_rows[given], new=new_rows[given])
    with tempfile.TemporaryDirectory() as folder, Gallery.create(Path(folder) / "g", old) as gallery:
        gallery.add([str(i) for i in items], old_rows[items], metadata=[{"label": str(labels[i])} for i in items])
        if scenario is compatible:
            gallery.register_space(new)
            gallery.relate(new.fingerprint, old.fingerprint, evidence={"declared": "made so"})
        strategies = ("core:compatible",) if scenario is compatible else STRATEGIES
        made = plan(
            gallery, encoder, label_key="label", queries=queries, sample=sample, strategies=strategies, seed=seed
        )
        moved = np.empty(len(items))
        moved[backfill_plan(gallery, "core:random", seed=seed)] = (np.arange(len(items)) + 1) / len(items)

    def on(queries: np.ndarray) -> Forecaster:
        return Forecaster(
            PairedVectors(
                old_rows[items], new_rows[items], old_rows[queries], new_rows[queries], labels[items], labels[queries],
                [str(i) for i in items], [str(i) for i in queries],
            )
        )  # fmt: skip

    everything = (
        items if len(items) < MANY else np.random.default_rng([seed, 8]).choice(items, MANY // 2, replace=False)
    )
    held_out, same = on(asked), on(everything if given is None else given)
    registry, found = get_registry(), {}
    for curve in made.curves:
        if curve.unavailable or not curve.merger:
            continue
        name, strategy = load_strategy(curve.name)
        transform = made.transforms.get(name)
        merger = registry.load(registry.get("retriever", curve.merger, role="merger"))

        def area(whole: Forecaster, strategy: Any = strategy, transform: Any = transform, merger: Any = merger,
                 name: str = name) -> float:  # fmt: skip
            asking = {old.fingerprint: whole.paired.query_old, new.fingerprint: whole.paired.query_new}
            if transform_direction(strategy) == "gallery":
                held, old_part = transform(whole.paired.gallery_old), whole.paired.query_new
            else:
                extra = [] if transform is None else [transform]
                held, old_part = None, strategy.old_part_queries(asking, old, new, *extra)
            return whole.curve(name, old_part, moved, merger=merger, old_part_vectors=held).area

        true, own = area(held_out), area(same)
        found[f"{name} {curve.merger}"] = {
            "forecast": round(curve.area, 4), "interval": [round(curve.area_interval.low, 4),
            round(curve.area_interval.high, 4)], "measured": round(true, 4), "error": round(curve.area - true, 4),
            "estimate": round(curve.area - own, 4), "sampling": round(own - true, 4),
        }  # fmt: skip
    return {
        "items": len(items), "sample": sample, "seed": seed, "queries": made.queries, "held_out": len(asked),
        "curves": found, "refused": {c.name: c.unavailable for c in made.curves if c.unavailable},
    }  # fmt: skip


def summary(draws: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Curve -> mean, spread and largest size of the error over the draws, and the largest of its two parts."""
    found = {}
    for name in sorted({name for draw in draws for name in draw["curves"]}):
        rows = [draw["curves"][name] for draw in draws if name in draw["curves"]]
        e = np.array([row["error"] for row in rows])
        found[name] = {
            "draws": len(e), "mean": round(float(e.mean()), 4),
            "deviation": round(float(e.std(ddof=1)), 4) if len(e) > 1 else None,
            "worst": round(float(abs(e).max()), 4), "within": float((abs(e) <= PROMISE).mean()),
        }  # fmt: skip
        for part in ("estimate", "sampling"):
            found[name][f"worst_{part}"] = max(abs(row[part]) for row in rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--scenario", choices=[name for name, _, _ in SCENARIOS], help="Only this one.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {}
    for name, scenario, sample in SCENARIOS:
        if arguments.scenario not in (None, name):
            continue
        for own in (True, False):
            draws = [errors(scenario, sample, seed, arguments.features, own) for seed in range(arguments.seeds)]
            which = "queries of their own" if own else "sampled items as queries"
            result[f"{name}, {which}"] = {"summary": summary(draws), "draws": draws}
            for curve, row in result[f"{name}, {which}"]["summary"].items():
                print(f"{name}, {which}: {curve} {row}", flush=True)
    write_result(
        "forecast_error", {"metric": "area of mAP", "promise": PROMISE, "scenarios": result}, out=arguments.out
    )


SCENARIOS = (
    ("core:digits", digits, 1000), ("core:digits, compatible", compatible, 500), ("emoji:styles", emoji, 1500),
    ("core:fashion-mnist", fashion, 1500),
)  # fmt: skip

if __name__ == "__main__":
    main()
