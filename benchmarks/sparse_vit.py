"""A block-sparse vision transformer end to end, against the same model dense, at batch 32 on two cores.

    python benchmarks/sparse_vit.py --output benchmarks/results/sparse_vit.json
    python benchmarks/sparse_vit.py --model vit_tiny_patch16_224 --batch 4 --zeros 0.9 --rounds 3      a look, seconds

The weights are random; in every linear layer of every block (attention and perceptron) this share of the blocks is
zero, drawn at random. `export_sparse(shrink(model), "auto", sample)`, as `bowerbird export --sparse auto` does it,
removes units without any block and chooses the form of every layer by timing it. Dense and sparse then take turns in
one process; the ratio is that of the shortest times.

The C library is told to keep freed memory (`common.KEEP_MEMORY`), for both sides: by default glibc gives every large
block back to the system, which hands out cleared pages again a moment later. `--malloc default` leaves it so, and the
last case was measured that way.

Beside it, what the speed-up consists of: the same model with its perceptrons computed chunk by chunk but dense (what is
gained without any zero), torch's own CSR weights in a plain call, and a profile of both sides: how much of the time
are products of weights, which zeros can shorten, and what is left: attention's softmax, norms, activations, residuals.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bowerbird_sparsity.block_linear import BlockLinear, chunks
from bowerbird_sparsity.export import export_sparse, sparse_forms
from bowerbird_sparsity.layers import RowsLinear, SparseLinear, SparseMlp
from bowerbird_sparsity.shrink import shrink
from bowerbird_sparsity.timing import largest_difference
from common import KEEP_MEMORY, result_with_default_memory, start_again, write_result

LIMIT, LIMIT_ZEROS = 2.0, 0.9
ZEROS = (0.8, 0.9, 0.95)
CASES = [
    *(("vit_small_patch16_224", side, zeros) for side in (32, 16) for zeros in ZEROS),
    ("vit_base_patch16_224", 32, 0.9),
]
# Where time goes in a profile: (kind, words in the names of torch's operations).
KINDS = (
    ("attention", ("scaled_dot_product", "softmax")),
    ("products", ("addmm", "bmm", "aten::mm", "linear", "matmul", "sparse")),
    ("patches", ("conv",)),
    ("activation", ("gelu",)),
    ("norms", ("layer_norm",)),
    ("gathering and transposing", ("index_select", "copy_", "clone", "contiguous")),
)


def block_sparse(name: str, zeros: float, block: int) -> Any:
    """The timm model ``name``; ``zeros`` of the blocks of its transformer blocks' linear layers are zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):
            rows, columns = layer.weight.shape[0] // block, layer.weight.shape[1] // block
            kept = torch.ones(rows * columns, dtype=torch.bool)
            kept[torch.randperm(rows * columns)[: round(zeros * rows * columns)]] = False
            grid = kept.view(rows, columns).repeat_interleave(block, 0).repeat_interleave(block, 1)
            with torch.no_grad():
                layer.weight.mul_(grid)
    return model


class ChunkedMlp(nn.Module):
    """The dense perceptron chunk by chunk, as ``SparseMlp`` does it: what is gained without zeros."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = torch.empty_like(flat)
        for start, end in chunks(flat):
            y[start:end] = self.mlp(flat[start:end])
        return y.view_as(x)


def chunked(model: Any) -> nn.Module:
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.mlp = ChunkedMlp(block.mlp)
    return model


class PlainCsr(nn.Module):
    """``F.linear`` with torch's CSR weight, as a reader of torch's manual would write it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = SparseLinear.of(layer)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


def plain_csr(model: Any) -> nn.Module:
    model = copy.deepcopy(model)
    for parent in list(model.blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, PlainCsr(child))
    return model


def best_times(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The shortest time of each in seconds; they alternate, and take turns in being first."""
    names = list(calls)
    best = dict.fromkeys(names, float("inf"))
    for turn in range(rounds):
        for name in names if turn % 2 else reversed(names):
            start = time.perf_counter()
            calls[name]()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def shares(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Milliseconds by kind of operation, of one pass."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        model(x)
    found = dict.fromkeys([*(kind for kind, _ in KINDS), "rest"], 0.0)
    for event in recorded.key_averages():
        kind = next((kind for kind, words in KINDS if any(word in event.key for word in words)), "rest")
        found[kind] += event.self_cpu_time_total / 1e3
    return {kind: round(value, 1) for kind, value in found.items()}


def forms_of(model: nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}
    for form in sparse_forms(model).values():
        counts[str(form)] = counts.get(str(form), 0) + 1
    for layer in model.modules():
        inside = isinstance(layer, BlockLinear | RowsLinear | SparseLinear | SparseMlp)
        if isinstance(layer, nn.Linear) and not inside:
            counts["dense"] = counts.get("dense", 0) + 1
    return counts


@torch.inference_mode()
def compare(name: str, zeros: float, block: int, x: Tensor, rounds: int, format: str) -> dict[str, Any]:
    dense = block_sparse(name, zeros, block)
    sparse = export_sparse(shrink(dense), format, x)
    difference = largest_difference(dense, sparse, x)
    if difference > 1e-4:
        raise SystemExit(f"{name}, {zeros:.0%} zeros: the outputs differ by {difference:.1e}: not the same model")
    models = {"dense": dense, "sparse": sparse, "dense, in chunks": chunked(dense), "plain csr": plain_csr(dense)}
    times = best_times({key: partial(model, x) for key, model in models.items()}, rounds)
    return {
        "ms": round(1e3 * times["sparse"], 1),
        "reference_ms": round(1e3 * times["dense"], 1),
        "speed": round(times["dense"] / times["sparse"], 3),
        "speed_of_dense_in_chunks": round(times["dense"] / times["dense, in chunks"], 3),
        "speed_of_plain_csr": round(times["dense"] / times["plain csr"], 3),
        "forms": forms_of(sparse),
        "largest_difference": difference,
        "profile_ms": {"dense": shares(dense, x), "sparse": shares(sparse, x)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="of timm; default: ViT-Small, and ViT-Base at 90 %% zeros")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--zeros", type=float, action="append", help="default: 0.8 0.9 0.95")
    parser.add_argument("--block", type=int, action="append", help="side of a block; default: 16 32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--format", default="auto", help="auto, blocks, csr or bsr")
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep", help="see above")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    start_again(KEEP_MEMORY if options.malloc == "keep" else {})
    torch.set_num_threads(options.threads)
    x = torch.randn(options.batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    cases: dict[str, Any] = {}
    chosen = options.model or options.zeros or options.block
    plan = CASES
    if chosen:
        names, sides = options.model or ["vit_small_patch16_224"], options.block or [16, 32]
        plan = [(name, side, zeros) for name in names for side in sides for zeros in options.zeros or ZEROS]
    for name, side, zeros in plan:
        case = f"{name}, {zeros:.0%} zeros, blocks of {side} x {side}"
        cases[case] = {
            "zeros": zeros,
            "limit": LIMIT if zeros == LIMIT_ZEROS else None,
            **compare(name, zeros, side, x, options.rounds, options.format),
        }
        print(case, cases[case], flush=True)
    if not chosen:
        asked = ["--block", "32", "--zeros", "0.9", "--rounds", str(options.rounds), "--threads", str(options.threads)]
        found = result_with_default_memory(__file__, *asked)["cases"]
        cases |= {f"{case}, memory given back": {**values, "limit": None} for case, values in found.items()}
    write_result(
        "sparse_vit",
        {"limit_speed": LIMIT, "limit_zeros": LIMIT_ZEROS, "batch": options.batch, "threads": options.threads,
         "cases": cases},
        out=options.output,
    )  # fmt: skip


if __name__ == "__main__":
    main()
