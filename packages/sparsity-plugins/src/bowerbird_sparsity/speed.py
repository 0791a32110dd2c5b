"""Is it faster? Dense against sparse, layer by layer and end to end, measured side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from bowerbird_sparsity.export import (
    DENSE,
    Form,
    LayerTimes,
    apply_forms,
    choose_forms,
    dense_copy,
    layer_times,
    linear_layers,
    sparse_forms,
    zeros_of,
)
from bowerbird_sparsity.shrink import Shrunk, shrink_report
from bowerbird_sparsity.timing import call, input_shapes, largest_difference, time_in_turns

SECONDS = 1.0  # of timing the whole model, for each side


@dataclass(frozen=True)
class Row:
    """One layer. Times in milliseconds, for the inputs that it gets from the sample.

    Attributes:
        name: Of the layer, or of a perceptron that is computed as one.
        shape: Of its weight; of a perceptron, of its first layer.
        zeros: Share of zeros.
        form: The one that it gets: the fastest.
        dense_ms, ms: In dense form, and in this one.
        others: The forms that were slower, with their times.
    """

    name: str
    shape: tuple[int, ...]
    zeros: float
    form: str
    dense_ms: float
    ms: float
    others: tuple[tuple[str, float], ...] = ()

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.ms


@dataclass(frozen=True)
class SpeedTable:
    """``rows``; the whole model in milliseconds; ``largest_difference`` of the outputs, over the largest output."""

    rows: tuple[Row, ...]
    dense_ms: float
    sparse_ms: float
    largest_difference: float
    shrunk: tuple[Shrunk, ...] = ()

    @property
    def speedup(self) -> float:
        """Of the whole model."""
        return self.dense_ms / self.sparse_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "dense_ms": self.dense_ms,
            "sparse_ms": self.sparse_ms,
            "speedup": self.speedup,
            "largest_difference": self.largest_difference,
            "removed_units": sum(pair.removed for pair in self.shrunk),
            "layers": [
                {
                    "name": row.name,
                    "shape": list(row.shape),
                    "zeros": row.zeros,
                    "form": row.form,
                    "dense_ms": row.dense_ms,
                    "ms": row.ms,
                    "speedup": row.speedup,
                    "others": dict(row.others),
                }
                for row in self.rows
            ],
        }

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        cells = [("layer", "shape", "zeros", "form", "dense ms", "ms", "speed")]
        for row in self.rows:
            shape = " x ".join(map(str, row.shape))
            times = f"{row.dense_ms:.2f}", f"{row.ms:.2f}", f"{row.speedup:.2f}x"
            cells.append((row.name, shape, f"{row.zeros:.1%}", row.form, *times))
        cells.append(
            ("whole model", "", "", "", f"{self.dense_ms:.2f}", f"{self.sparse_ms:.2f}", f"{self.speedup:.2f}x")
        )
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        return "\n".join(line.rstrip() for line in lines)


def benchmark_sparse(model: nn.Module, sample: Any, *, format: str = "auto", seconds: float = SECONDS) -> SpeedTable:
    """Times ``model`` in dense and in sparse form.

    Args:
        model: A finalised dense model with zeros, or one that ``export_sparse`` made. It is not changed.
        sample: What it is called with (a tuple: its positional arguments), of the size that it gets when it serves.
        format: Which forms are tried, see ``export.export_sparse``; of an exported model: its own.
        seconds: Of timing the whole model, for each side; single layers get a quarter of a second a form.

    Raises:
        InputError: See ``export.export_sparse``.
    """
    shrunk: tuple[Shrunk, ...] = ()
    if sparse_forms(model):
        dense, sparse = dense_copy(model), copy.deepcopy(model)
        rows = _rows_of_exported(dense, sparse, sample)
    else:
        dense = model
        smaller, removed = shrink_report(model)
        shrunk = tuple(removed)
        measured: list[LayerTimes] = []
        forms = choose_forms(smaller, format, sample, measured=measured)
        rows = [*_rows(smaller, measured), *_shrunk_rows(model, smaller, {one.name for one in measured}, sample)]
        sparse = apply_forms(smaller, forms)
    was_training = dense.training
    dense.eval()
    sparse.eval()
    try:
        times = time_in_turns(
            {"dense": lambda: call(dense, sample), "sparse": lambda: call(sparse, sample)}, seconds=seconds
        )
        difference = largest_difference(dense, sparse, sample)
    finally:
        dense.train(was_training)
    return SpeedTable(tuple(rows), 1e3 * times["dense"], 1e3 * times["sparse"], difference, shrunk)


def _rows(model: nn.Module, measured: list[LayerTimes]) -> list[Row]:
    modules = dict(model.named_modules())
    return [_row(one.name, modules[one.name], one) for one in measured]


def _row(name: str, module: nn.Module, times: LayerTimes) -> Row:
    weights = [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]
    zeros = sum(zeros_of(w) * w.numel() for w in weights) / sum(w.numel() for w in weights)
    others = ((str(form), 1e3 * s) for form, s in times.seconds.items() if form not in (DENSE, times.chosen))
    return Row(
        name=name,
        shape=tuple(weights[0].shape),
        zeros=zeros,
        form=str(times.chosen),
        dense_ms=1e3 * times.seconds[DENSE],
        ms=1e3 * times.seconds[times.chosen],
        others=tuple(others),
    )


def _shrunk_rows(model: nn.Module, smaller: nn.Module, known: set[str], sample: Any) -> list[Row]:
    """Layers that lost units and are dense now."""
    before, after = linear_layers(model), linear_layers(smaller)
    names = [name for name in before if before[name].weight.shape != after[name].weight.shape and name not in known]
    if not names:
        return []
    shapes, smaller_shapes = input_shapes(model, sample), input_shapes(smaller, sample)
    rows = []
    for name in names:
        dense = layer_times(before[name], [], shapes[name])[DENSE]
        shrunk = Form("shrunk")
        seconds = {DENSE: dense, shrunk: layer_times(after[name], [], smaller_shapes[name])[DENSE]}
        rows.append(_row(name, before[name], LayerTimes(name, seconds, shrunk)))
    return rows


def _rows_of_exported(dense: nn.Module, sparse: nn.Module, sample: Any) -> list[Row]:
    before, after, shapes = dict(dense.named_modules()), dict(sparse.named_modules()), input_shapes(sparse, sample)
    rows = []
    for name, form in sparse_forms(sparse).items():
        if name not in shapes:
            continue
        both = layer_times(before[name], [], shapes[name]) | {form: layer_times(after[name], [], shapes[name])[DENSE]}
        rows.append(_row(name, before[name], LayerTimes(name, both, form)))
    return rows
