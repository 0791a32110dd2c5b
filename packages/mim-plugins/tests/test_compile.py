"""bf16 autocast for every objective, and torch.compile for the simplest one.

Compiling all of them takes minutes: benchmarks/mim_compile.py does it, and docs/pretraining.md has its table.
"""

from __future__ import annotations

from pathlib import Path

import every_objective
import pytest
import torch
from every_objective import OBJECTIVES, TOKENIZER, made, recipe

from bowerbird.recipe import resolve_recipe
from bowerbird.train.loop import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    every_objective.register()
    path = tmp_path_factory.mktemp("runs")
    train(resolve_recipe(recipe("mim:tokenizer", path, epochs=1)), path / TOKENIZER)
    return path


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_in_bf16_gives_the_loss_of_float32_within_its_precision(name: str, folder: Path) -> None:
    losses = []
    for enabled in (False, True):
        objective, batch = made(name, folder)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            total = objective(batch).total
        total.backward()
        assert total.dtype == torch.float32
        losses.append(float(total.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0], "autocast changed nothing"
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients)


def test_a_step_of_mae_compiles_in_one_piece_and_gives_the_same_gradients(folder: Path) -> None:
    found = []
    for compiled in (False, True):
        objective, batch = made("mim:mae", folder)
        run = torch.compile(objective, backend="aot_eager", fullgraph=True) if compiled else objective
        run(batch).total.backward()
        found.append({name: p.grad for name, p in objective.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)
