"""How far ``plan`` is off: its forecast area against the area on the whole gallery and held-out queries.

    python benchmarks/forecast_error.py --out benchmarks/results/forecast_error.json
    python benchmarks/forecast_error.py --features lite0.npz      emoji features made before: arrays ids and vectors

Scenarios: ``core:digits`` (principal components of pixels against ridge regression to the classes) and
``emoji:styles`` (EfficientNet-Lite0 features: 12 principal components against 128 whitened ones; concepts of the
gallery and its queries are unseen, four right answers for a query). The plan sees a sample, and fits maps on half.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bowerbird.gallery import Gallery, Space
from bowerbird.registry import get_registry
from bowerbird.retrieval.index import unit_rows
from bowerbird.upgrade import ItemEncoder
from bowerbird.upgrade.forecast import Forecaster, PairedVectors
from bowerbird.upgrade.plan import plan
from bowerbird.upgrade.backfill import backfill_plan
from common import write_result

STRATEGIES = ("compat:rank-merge", "compat:adapter")


def components(rows: np.ndarray, count: int, *, whiten: bool = False) -> Any:
    mean = rows.mean(axis=0)
    _, spread, directions = np.linalg.svd(rows - mean, full_matrices=False)
    weight = directions[:count].T / (spread[:count] if whiten else 1)
    return lambda x: unit_rows(((x - mean) @ weight).astype(np.float32))


def digits(_: Path | None) -> tuple[Any, ...]:
    from sklearn.datasets import load_digits

    loaded = load_digits()
    x, labels = loaded.data / 16, loaded.target
    training, items, asked = np.split(np.random.default_rng(0).permutation(len(x)), [300, 1300])
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


def errors(scenario: Any, sample: int, seed: int, features: Path | None) -> dict[str, Any]:
    old_rows, new_rows, labels, items, asked = scenario(features)
    old, new = Space("a" * 64, "old", old_rows.shape[1]), Space("b" * 64, "new", new_rows.shape[1])
    encoder = ItemEncoder(lambda batch: new_rows[[int(item.id) for item in batch]], space=new)
    with tempfile.TemporaryDirectory() as folder, Gallery.create(Path(folder) / "g", old) as gallery:
        gallery.add([str(i) for i in items], old_rows[items], metadata=[{"label": str(labels[i])} for i in items])
        made = plan(gallery, encoder, label_key="label", sample=sample, strategies=STRATEGIES, seed=seed)
        moved = np.empty(len(items))
        moved[backfill_plan(gallery, "core:random", seed=seed)] = (np.arange(len(items)) + 1) / len(items)
    whole = Forecaster(
        PairedVectors(old_rows[items], new_rows[items], old_rows[asked], new_rows[asked], labels[items], labels[asked])
    )
    registry, found = get_registry(), {}
    for curve in made.curves:
        if curve.unavailable or not curve.merger:
            continue
        queries = whole.paired.query_old
        if curve.name in made.transforms:
            queries = made.transforms[curve.name](whole.paired.query_new)
        merger = registry.load(registry.get("retriever", curve.merger, role="merger"))
        true = whole.curve(curve.name, queries, moved, merger=merger).area
        found[f"{curve.name} {curve.merger}"] = {
            "forecast": round(curve.area, 4), "measured": round(true, 4), "error": round(curve.area - true, 4)
        }  # fmt: skip
    return {
        "items": len(items), "sample": sample, "seed": seed, "queries": made.queries, "held_out": len(asked),
        "curves": found, "refused": {c.name: c.unavailable for c in made.curves if c.unavailable},
        "worst": max(abs(row["error"]) for row in found.values()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {
        name: [errors(scenario, sample, seed, arguments.features) for seed in range(arguments.seeds)]
        for name, scenario, sample in (("core:digits", digits, 1000), ("emoji:styles", emoji, 1500))
    }
    write_result("forecast_error", {"metric": "area of mAP", "scenarios": result}, out=arguments.out)


if __name__ == "__main__":
    main()
