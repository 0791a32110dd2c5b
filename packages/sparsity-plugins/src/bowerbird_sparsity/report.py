"""What is kept of an encoder's weights, where, and what that saves: ``bowerbird report sparsity``."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bowerbird.encoders import load_encoder
from bowerbird.files import write_atomically, write_json
from bowerbird_sparsity.block_linear import block_shape_of
from bowerbird_sparsity.compression import compress
from bowerbird_sparsity.export import is_two_four_pattern, skipped_layers, zeros_of
from bowerbird_sparsity.folders import sample_batch
from bowerbird_sparsity.speed import SpeedTable, benchmark_sparse

CELLS = 48  # of the picture of one layer, along its longer side


@dataclass(frozen=True)
class LayerReport:
    """One weight.

    Attributes:
        name: Of the parameter.
        shape: Its shape.
        weights, kept: How many numbers there are, and how many are not zero.
        pattern: How the zeros lie: ``16 x 16 blocks``, ``2:4``, ``single weights``, ``rows``, or nothing.
        note: Why it stays dense in every export, where it does.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    pattern: str
    note: str = ""

    @property
    def density(self) -> float:
        return self.kept / self.weights


@dataclass(frozen=True)
class SparsityReport:
    """Of one encoder: its layers, bytes on disk, and (where measured) times.

    ``bytes``: of all its tensors as they are, and ``compressed_bytes`` as a sparse export stores them.
    """

    encoder: str
    layers: tuple[LayerReport, ...]
    parameters: int
    kept: int
    bytes: int
    compressed_bytes: int
    speed: SpeedTable | None
    batch_size: int
    device: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "encoder": self.encoder,
            "parameters": self.parameters,
            "kept": self.kept,
            "bytes": self.bytes,
            "compressed_bytes": self.compressed_bytes,
            "batch_size": self.batch_size,
            "device": self.device,
            "threads": self.threads,
            "speed": None if self.speed is None else self.speed.to_dict(),
            "layers": [
                {
                    "name": one.name,
                    "shape": list(one.shape),
                    "weights": one.weights,
                    "kept": one.kept,
                    "density": one.density,
                    "pattern": one.pattern,
                    "note": one.note,
                }
                for one in self.layers
            ],
        }

    def __str__(self) -> str:
        cells = [("weight", "shape", "kept", "of", "share", "zeros lie in", "")]
        for one in self.layers:
            shape = " x ".join(map(str, one.shape))
            note = f"stays dense: {one.note}" if one.note else ""
            cells.append(
                (one.name, shape, f"{one.kept:,}", f"{one.weights:,}", f"{one.density:.1%}", one.pattern, note)
            )
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        parts = ["\n".join(line.rstrip() for line in lines), ""]
        parts.append(
            f"kept {self.kept:,} of {self.parameters:,} parameters ({self.kept / self.parameters:.1%}); on disk "
            f"{self.bytes:,} bytes, {self.compressed_bytes:,} as a sparse export"
        )
        if self.speed is not None:
            parts += ["", str(self.speed), "", self.verdict()]
        return "\n".join(parts)

    def verdict(self) -> str:
        """One sentence on speed."""
        assert self.speed is not None
        where = f"on {self.device} with {self.threads} threads, at batch {self.batch_size}"
        if self.speed.speedup < 1.03:
            share = 1 / self.speed.speedup
            return f"No speed is to be gained {where}: the sparse forms need {share:.2f} of the dense time."
        return f"{self.speed.speedup:.2f} times as fast as dense {where}."


def sparsity_report(
    ref: str | Path, *, batch_size: int = 32, device: str = "cpu", measure: bool = True
) -> tuple[SparsityReport, dict[str, Tensor]]:
    """The report on an encoder, and which of its weights are kept: name -> bool, in the shape of the weight.

    Args:
        ref: What ``load_encoder`` accepts: a run, an exported folder (dense or sparse), a name with settings.
        batch_size: How many pictures go through at once where times are measured.
        device: Where.
        measure: ``False``: no times.
    """
    loaded = load_encoder(ref, device=device, dense=True)
    skipped = skipped_layers(loaded.module)
    layers, masks = [], {}
    for name, parameter in loaded.module.named_parameters():
        if parameter.ndim < 2 or not _is_weight(loaded.module, name):
            continue
        kept = parameter.detach().cpu() != 0
        masks[name] = kept
        note = skipped.get(name, skipped.get(name.rpartition(".")[0], ""))
        count = int(kept.sum())
        layers.append(
            LayerReport(name, tuple(parameter.shape), parameter.numel(), count, pattern_of_zeros(parameter), note)
        )
    sparse = any(layer.kept < layer.weights for layer in layers)
    speed = benchmark_sparse(loaded.module, sample_batch(loaded, batch_size)) if measure and sparse else None
    state = loaded.module.state_dict()
    stored, _ = compress(state)
    parameters = list(loaded.module.parameters())
    report = SparsityReport(
        encoder=loaded.name,
        layers=tuple(layers),
        parameters=sum(parameter.numel() for parameter in parameters),
        kept=sum(int(parameter.detach().count_nonzero()) for parameter in parameters),
        bytes=_bytes(state.values()),
        compressed_bytes=_bytes(stored.values()),
        speed=speed,
        batch_size=batch_size,
        device=device,
        threads=torch.get_num_threads(),
    )
    return report, masks


def write_report(report: SparsityReport, masks: dict[str, Tensor], folder: str | Path) -> None:
    """``sparsity.json``, ``sparsity.txt`` and the picture ``sparsity.svg`` in ``folder``."""
    folder = Path(folder)
    picture = kept_weights_svg(masks)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "sparsity.json", report.to_dict())
    write_atomically(folder / "sparsity.txt", str(report) + "\n")
    write_atomically(folder / "sparsity.svg", picture)


def pattern_of_zeros(weight: Tensor) -> str:
    """How the zeros of a weight lie, in words; empty where there are none."""
    zeros = zeros_of(weight)
    if zeros == 0:
        return ""
    if zeros == 1:
        return "everything"
    matrix = weight.detach().reshape(weight.shape[0], -1)
    kept = matrix != 0
    rows = kept.any(dim=1)
    if int(kept.sum()) == int(rows.sum()) * matrix.shape[1]:
        return "rows"
    block = block_shape_of(matrix)
    if block is not None:
        return f"{block[0]} x {block[1]} blocks"
    return "2:4" if is_two_four_pattern(matrix) and 0.45 < zeros < 0.75 else "single weights"


def kept_weights_svg(masks: dict[str, Tensor], *, columns: int = 6) -> str:
    """A picture of every weight: outputs downwards, inputs to the right, dark where weights are kept."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(masks)
    rows = max(1, -(-len(names) // columns))
    figure = Figure(figsize=(2.1 * columns, 2.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for position, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, position + 1)
        shares = kept_shares(masks[name])
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        label = name.removesuffix(".weight")
        axes.set_title(f"{_shortened(label)}\n{float(masks[name].float().mean()):.1%} kept", fontsize=6.5)
    out = io.StringIO()
    with rc_context({"svg.hashsalt": "sparsity", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def kept_shares(mask: Tensor) -> NDArray[np.float32]:
    """Share of kept weights in a coarse grid over ``(outputs, inputs)``, at most ``CELLS`` along a side."""
    matrix = mask.reshape(mask.shape[0], -1).float()[None, None]
    sides = min(matrix.shape[2], CELLS), min(matrix.shape[3], CELLS)
    return nn.functional.adaptive_avg_pool2d(matrix, sides)[0, 0].numpy()


def _is_weight(model: nn.Module, name: str) -> bool:
    """Whether it multiplies its input: tables of positions and class tokens do not."""
    holder, _, last = name.rpartition(".")
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
    return last.endswith("weight") and isinstance(model.get_submodule(holder), kinds)


def _shortened(name: str) -> str:
    return name if len(name) <= 26 else "..." + name[-23:]


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
