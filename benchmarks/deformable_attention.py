"""Deformable attention beside that of transformers' Deformable DETR: python benchmarks/deformable_attention.py

Both sides compute the weighted sum over levels and points, without projections, from the same values, locations and
weights (four levels of a picture of 400 x 672 pixels, 8 heads of 32 channels, 4 points), and must give the same
numbers. The queries are all positions, as in the encoder, or 300, as in the decoder. Measured are a forward pass
without gradient, and one with the gradients of all three inputs. The sides take turns on one thread; the ratio is that
of the shortest processor times. Needs transformers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from bowerbird_detection.deformable_attention import deformable_attention
from common import shortest, write_result

LIMIT = 1.2
SHAPES = [(50, 84), (25, 42), (13, 21), (7, 11)]
HEADS, WIDTH, POINTS, DECODER_QUERIES = 8, 32, 4, 300
Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(queries: int) -> Inputs:
    """Values, locations around the queries' places, and weights that sum to 1."""
    generator = torch.Generator().manual_seed(0)
    positions = sum(rows * columns for rows, columns in SHAPES)
    grids = [torch.cartesian_prod(*[(torch.arange(side) + 0.5) / side for side in shape]).flip(1) for shape in SHAPES]
    places = torch.cat(grids)[torch.linspace(0, positions - 1, queries).long()]
    offsets = 0.05 * torch.randn(queries, HEADS, len(SHAPES), POINTS, 2, generator=generator)
    weights = torch.randn(1, queries, HEADS, len(SHAPES) * POINTS, generator=generator).softmax(dim=-1)
    return (
        torch.randn(1, positions, HEADS, WIDTH, generator=generator).requires_grad_(),
        (places[:, None, None, None] + offsets)[None].requires_grad_(),
        weights.unflatten(3, (len(SHAPES), POINTS)).detach().requires_grad_(),
    )


def ours(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return deformable_attention(value, SHAPES, locations, weights)


THEIRS = MultiScaleDeformableAttention()


def theirs(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    out: Tensor = THEIRS(value, torch.tensor(SHAPES), SHAPES, None, locations, weights, 64)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases: dict[str, Any] = {}
    for name, queries in (("encoder", sum(rows * columns for rows, columns in SHAPES)), ("decoder", DECODER_QUERIES)):
        given = inputs(queries)
        torch.testing.assert_close(ours(*given), theirs(*given), rtol=1e-4, atol=1e-5)
        for kind, make in (("forward", forward), ("forward and backward", with_gradients)):
            seconds = shortest({"ours": make(ours, given), "theirs": make(theirs, given)}, options.rounds)
            cases[f"{name}, {queries} queries, {kind}"] = {
                "ratio": round(seconds["ours"] / seconds["theirs"], 3),
                "ms": round(1e3 * seconds["ours"], 2),
                "reference_ms": round(1e3 * seconds["theirs"], 2),
            }
    result = {"limit_ratio": LIMIT, "transformers": version("transformers"), **cases}
    write_result("deformable_attention", result, out=options.output)


def forward(side: Callable[..., Tensor], given: Inputs) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: side(*given))


def with_gradients(side: Callable[..., Tensor], given: Inputs) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(side(*given).square().sum(), given)


if __name__ == "__main__":
    main()
