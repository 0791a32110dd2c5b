"""How long the small recipes wait for data: ``python benchmarks/mim_data_wait.py [recipes/fashion-mae.toml ...]``.

Trains each recipe on the 10,000 test pictures of Fashion-MNIST for one epoch (156 steps) by the loop of ``bowerbird
train``, and reads its ``timing.json``. The share means something on a machine with a free core for the worker process
only. Beside it stand processor times, which others on the machine do not change: to read one batch, and of the loop per
step. While the first is below the second, one worker keeps up.

    python benchmarks/mim_data_wait.py --output benchmarks/results/mim_data_wait.json
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import torch

from bowerbird.recipe import load_recipe
from bowerbird.train.data import TrainItems, collate
from bowerbird.train.loop import build, train
from bowerbird.train.run import TrainContext
from common import write_result

ROOT = Path(__file__).parents[1]
LIMIT = 0.05
READ = 10  # batches


def measured(file: Path, folder: Path, tokenizer: Path, workers: int | None) -> dict[str, Any]:
    changes = ["train.epochs=1", "train.warmup=0", "evaluate=[]", "train.device=cpu", "train.checkpoint_every=100000"]
    if 'use = "mim:composite-people"' not in file.read_text():  # it has 3,000 pictures and no split of this name
        changes.append("dataset.split=test")
    if workers is not None:
        changes.append(f"train.workers={workers}")
    if "tokenizer =" in file.read_text():
        changes.append(f"objective.tokenizer={tokenizer}")
    recipe = load_recipe(file, changes)
    before = resource.getrusage(resource.RUSAGE_SELF)
    train(recipe, folder)
    after = resource.getrusage(resource.RUSAGE_SELF)
    timing = json.loads((folder / "timing.json").read_text())
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    encoder = build(recipe.encoder, "encoder")
    dataset = build(recipe.dataset, "dataset", recipe.dataset.split)
    context = TrainContext(dataset, total_steps=100, seed=0, device=torch.device("cpu"))
    transform = build(recipe.objective, "objective", encoder, context).item_transform()
    items = TrainItems(dataset, encoder.preprocessing, augment="none", seed=0, transform=transform)
    size, start = recipe.train.batch_size, time.process_time()
    for batch in range(READ):
        collate([items[0, batch * size + i] for i in range(size)])
    return {
        "workers": recipe.train.workers,
        "steps": timing["steps"],
        "wait_share": timing["data_wait_share"],
        "read_cpu_ms": round(1000 * (time.process_time() - start) / READ, 2),
        "step_cpu_ms": round(1000 * seconds / timing["steps"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipes",
        nargs="*",
        type=Path,
        help="default: every recipes/fashion-*.toml of mim-plugins without labels; rows "
        "of other recipes in --output are kept",
    )
    parser.add_argument("--workers", type=int, help="default: those of the recipe")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    every = sorted(
        file
        for file in ROOT.glob("recipes/fashion-*.toml")
        if tomllib.loads(file.read_text())["objective"]["use"].startswith("mim:") and "finetune" not in file.stem
    )
    files = options.recipes or every
    found: dict[str, Any] = {}
    if options.recipes and options.output is not None and options.output.exists():
        found = json.loads(options.output.read_text())["result"]["recipes"]  # the others stay as they were measured
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder, "fashion-tokenizer")
        if any("tokenizer =" in file.read_text() for file in files):
            train(
                load_recipe(ROOT / "recipes" / "fashion-tokenizer.toml", ["dataset.split=test", "evaluate=[]"]),
                tokenizer,
            )
        for file in files:
            found[file.stem] = measured(file, Path(folder, f"run-{file.stem}"), tokenizer, options.workers)
            print(file.stem, found[file.stem], flush=True)
    within = all(value["wait_share"] <= LIMIT for value in found.values())
    write_result("mim_data_wait", {"limit_share": LIMIT, "within_limit": within, "recipes": found}, out=options.output)


if __name__ == "__main__":
    main()
