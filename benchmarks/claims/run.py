"""Reproduces the claims of a method at small scale: ``python benchmarks/claims/run.py bct [online-backfilling ...]``.

Reads the plan ``<slug>.toml``, runs its arms for every seed (``run(plan, seed)`` of ``<slug>_arms.py``, dashes as
underscores, or a function of the table below), and writes ``results/<slug>.json``: every value of every
seed, means with 95 % intervals, the verdicts, versions and the command. ``table.py`` turns the results into
docs/claims.md.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import arms  # noqa: E402
import serving_arms  # noqa: E402
import training_arms  # noqa: E402

from bowerbird.files import write_json  # noqa: E402
from common import machine, versions  # noqa: E402

RUNS = {
    "bct": arms.bct,
    "online-backfilling": arms.online_backfilling,
    "ract": training_arms.ract,
    "unibct": training_arms.unibct,
    "bict": training_arms.bict,
    "bt2": training_arms.bt2,
    "adapters": serving_arms.adapters,
    "orders": serving_arms.orders,
    "mergers": serving_arms.mergers,
}


def arms_of(slug: str) -> Callable[[Mapping[str, Any], int], Mapping[str, float]]:
    if slug in RUNS:
        return RUNS[slug]
    return importlib.import_module(f"{slug.replace('-', '_')}_arms").run  # only the method that is asked for


def known_slugs() -> list[str]:
    plans = (file.stem for file in HERE.glob("*.toml"))
    return sorted(slug for slug in plans if slug in RUNS or (HERE / f"{slug.replace('-', '_')}_arms.py").is_file())


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean and 95 % interval over the seeds (Student's t)."""
    mean, n = float(values.mean()), len(values)
    half = float(student.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("inf")
    return {"mean": mean, "low": mean - half, "high": mean + half}


def judge(claim: Mapping[str, Any], values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The claim with its steps and its verdict, by the rules written in the plan."""
    result = {"id": claim["id"], "text": claim["text"]}
    if "equal" in claim:
        first, *rest = (values[name] for name in claim["equal"])
        same = all(np.array_equal(first, other) for other in rest)
        return result | {"verdict": "shown" if same else "opposite", "equal": claim["equal"]}
    if "close" in claim:
        first, *rest = (values[name] for name in claim["close"])
        gap = max(float(np.abs(first - other).max()) for other in rest)
        verdict = "shown" if gap <= claim["tolerance"] else "opposite"
        return result | {"verdict": verdict, "close": claim["close"], "largest_gap": gap}
    if "order_each" in claim:
        first, *rest = claim["order_each"]
        pairs = [(first, other) for other in rest]
    else:
        pairs = list(zip(claim["order"], claim["order"][1:], strict=False))
    steps = []
    for less, more in pairs:
        difference = values[more] - values[less]
        right = int((difference > 0).sum())
        steps.append({"less": less, "more": more, "seeds_right": right, **interval(difference)})
    verdict = "shown" if all(s["low"] > 0 for s in steps) else "not shown"
    if any(s["high"] < 0 for s in steps):
        verdict = "opposite"
    return result | {"verdict": verdict, "steps": steps}


def run(slug: str) -> dict[str, Any]:
    text = (HERE / f"{slug}.toml").read_bytes()
    plan = tomllib.loads(text.decode())
    digest = hashlib.sha256(text).hexdigest()
    kept = HERE / "results" / "unfinished" / f"{slug}.json"  # seeds that an interrupted run has done
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    if done.get("plan_sha256") != digest:
        done = {"plan_sha256": digest, "seconds": {}, "rows": {}}
    for seed in plan["seeds"]:
        if str(seed) in done["rows"]:
            continue
        start = time.time()
        done["rows"][str(seed)] = arms_of(slug)(plan, seed)
        done["seconds"][str(seed)] = time.time() - start
        kept.parent.mkdir(exist_ok=True, parents=True)
        write_json(kept, done)
        print(f"{slug}: seed {seed} done, {done['seconds'][str(seed)]:.0f} s", flush=True)
    rows = [done["rows"][str(seed)] for seed in plan["seeds"]]
    values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {
        "slug": slug,
        "method": plan["method"],
        "paper": plan["paper"],
        "command": plan["command"],
        "plan_sha256": digest,
        "seconds": round(sum(done["seconds"].values()), 1),
        "versions": versions(),
        "machine": machine(),
        "seeds": plan["seeds"],
        "arms": {arm["name"]: arm.get("about", "") for arm in plan["arms"]},
        "values": {name: array.tolist() for name, array in values.items()},
        "summary": {name: interval(array) for name, array in values.items()},
        "claims": [judge(claim, values) for claim in plan["claims"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slug", nargs="+", choices=known_slugs())
    torch.set_num_threads(1)  # the same numbers on every machine with the same libraries
    for slug in parser.parse_args().slug:
        result = run(slug)
        (HERE / "results").mkdir(exist_ok=True)
        write_json(HERE / "results" / f"{slug}.json", result)
        (HERE / "results" / "unfinished" / f"{slug}.json").unlink()
        for claim in result["claims"]:
            print(f"{claim['verdict']:9}  {claim['id']}: {claim['text']}")


if __name__ == "__main__":
    main()
