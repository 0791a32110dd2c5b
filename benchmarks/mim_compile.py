"""Which objectives of mim-plugins compile, and whether, in one piece; and what bf16 does to their loss.

python benchmarks/mim_compile.py --output benchmarks/results/mim_compile.json

One small step of every objective (the recipes of packages/mim-plugins/tests/every_objective.py): in float32, under
bf16 autocast, and compiled (traced by Dynamo and AOTAutograd; ``--backend inductor`` also generates code). Where Dynamo
cannot trace the whole step, the reasons of its graph breaks are kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "packages" / "mim-plugins" / "tests"))

import every_objective  # noqa: E402
from every_objective import OBJECTIVES, TOKENIZER, made, recipe  # noqa: E402

from bowerbird.recipe import resolve_recipe  # noqa: E402
from bowerbird.train.loop import train  # noqa: E402
from common import write_result  # noqa: E402


def step(run: Any, objective: Any, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    total = run(batch).total
    total.backward()
    return float(total.detach()), {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


def measured(name: str, folder: Path, backend: str) -> dict[str, Any]:
    objective, batch = made(name, folder)
    loss, gradients = step(objective, objective, batch)
    objective, batch = made(name, folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, _ = step(objective, objective, batch)
    result: dict[str, Any] = {"loss": loss, "bf16_relative_difference": abs(half - loss) / abs(loss)}
    torch.compiler.reset()
    counters.clear()
    objective, batch = made(name, folder)
    try:
        compiled, found = step(torch.compile(objective, backend=backend), objective, batch)
    except Exception as error:
        return result | {"compiles": False, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    norm = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
    gap = sum(float((found[n] - g).square().sum()) for n, g in gradients.items()) ** 0.5
    reasons = [reason.splitlines()[0] for reason in counters["graph_break"]]
    return result | {
        "compiles": True,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": reasons,
        "loss_relative_difference": abs(compiled - loss) / abs(loss),
        "gradient_relative_difference": gap / norm,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*OBJECTIVES, []])
    parser.add_argument("--backend", default="aot_eager")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    every_objective.register()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        train(resolve_recipe(recipe("mim:tokenizer", Path(folder), epochs=1)), Path(folder) / TOKENIZER)
        for name in options.names or OBJECTIVES:
            found[name] = measured(name, Path(folder), options.backend)
            print(name, found[name], flush=True)
    write_result("mim_compile", {"backend": options.backend, "objectives": found}, out=options.output)


if __name__ == "__main__":
    main()
