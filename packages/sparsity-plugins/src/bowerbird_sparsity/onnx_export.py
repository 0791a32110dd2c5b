"""ONNX files of sparse encoders, checked with onnxruntime.

ONNX Runtime ignores zeros: a sparse weight in the file makes it smaller, not faster. What helps is fewer
multiplications in the graph itself: dead units removed, and layers in compact blocks, which are a gather and a batched
product there. Whether that is faster is measured: the file holds the graph that onnxruntime computes faster.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from bowerbird.encoders.bundle import LoadedEncoder, load_encoder
from bowerbird.errors import InputError, MissingExtraError
from bowerbird.files import atomic_folder, write_json
from bowerbird_sparsity.export import GAIN, Form, apply_forms, choose_forms
from bowerbird_sparsity.folders import check_zeros, sample_batch
from bowerbird_sparsity.shrink import shrink_report
from bowerbird_sparsity.timing import time_in_turns

MODEL = "model.onnx"
DESCRIPTION = "preprocessing.json"
AGREEMENT = 1e-4  # of unit vectors: another library adds in another order
OPSET = 18


@dataclass(frozen=True)
class OnnxExport:
    """What an export to ONNX did; times in milliseconds by onnxruntime, for one batch.

    ``sparse_ms`` is ``None`` where no zeros lie in blocks: then there was nothing to compare with.
    """

    folder: Path
    forms: dict[str, Form]
    removed: int
    bytes: int
    dense_ms: float
    sparse_ms: float | None
    largest_difference: float

    @property
    def kept_dense(self) -> bool:
        """Whether the file holds the dense layers because onnxruntime computes them faster."""
        return not self.forms

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **dataclasses.asdict(self),
            "folder": str(self.folder),
            "forms": {name: form.to_dict() for name, form in self.forms.items()},
        }

    def lines(self) -> list[str]:
        """For a person."""
        if self.sparse_ms is None:
            times = f"{self.dense_ms:.1f} ms a batch; no zeros lie in blocks, which alone would save time there"
        else:
            what = f"{len(self.forms)} layers in blocks" if self.forms else "dense layers, which it computes faster"
            times = f"{self.dense_ms:.1f} ms a batch dense, {self.sparse_ms:.1f} ms in blocks; the file holds {what}"
        return [
            f"{self.folder / MODEL}: {self.bytes:,} bytes, checked with onnxruntime, vectors differ by "
            f"{self.largest_difference:.0e}",
            f"onnxruntime: {times}",
        ]


class VectorsOf(nn.Module):
    """An encoder of pictures as a function of one tensor: ``image (B, 3, H, W)`` to unit vectors ``(B, D)``."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> Tensor:
        return normalize(self.encoder({"image": image}).pooled, dim=1)


def export_onnx_encoder(ref: str | Path, folder: str | Path, *, batch_size: int = 32) -> OnnxExport:
    """Write ``model.onnx`` (``image`` to unit ``vector``, any batch size) and how pictures are prepared for it.

    Args:
        ref: What ``load_encoder`` accepts; an encoder of pictures whose weights hold zeros.
        folder: Where to; must not exist, or be empty.
        batch_size: At which times are measured.

    Raises:
        MissingExtraError: The extra ``onnx`` is not installed.
        InputError: An encoder without zeros or pictures, a place that is in use, an encoder that ONNX cannot express,
            or a file whose vectors differ.
    """
    runtime = _runtime()
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{str(folder)!r} already exists and is not empty; choose another place")
    loaded = load_encoder(ref, device="cpu", dense=True)
    check_zeros(loaded)
    if loaded.module.preprocessing is None:
        raise InputError(f"encoder {loaded.spec.use!r} takes no pictures; an ONNX file is made for pictures only")
    image = sample_batch(loaded, batch_size)["image"]
    smaller, shrunk = shrink_report(loaded.module)
    blocks = {k: v for k, v in choose_forms(smaller, "blocks").items() if v.format in ("blocks", "mlp")}
    with torch.inference_mode():
        wanted = VectorsOf(loaded.module)(image).numpy()
    with atomic_folder(folder) as temporary:
        files = {"dense": temporary / MODEL, "blocks": temporary / "blocks.onnx"}
        write_onnx(VectorsOf(smaller), files["dense"], image[:2])
        sessions = {"dense": _session(runtime, files["dense"])}
        if blocks:
            write_onnx(VectorsOf(apply_forms(copy.deepcopy(smaller), blocks)), files["blocks"], image[:2])
            sessions["blocks"] = _session(runtime, files["blocks"])
        feed = {"image": image.numpy()}
        times = time_in_turns({name: lambda one=one: one.run(None, feed) for name, one in sessions.items()})  # type: ignore[misc]
        chosen = "blocks" if times.get("blocks", np.inf) <= GAIN * times["dense"] else "dense"
        difference = max(_difference(sessions[chosen], image.numpy()[:n], wanted[:n]) for n in {1, len(image)})
        if not difference <= AGREEMENT:
            raise InputError(
                f"onnxruntime gives vectors that differ from those of {loaded.name!r} by {difference:.1e}; at most "
                f"{AGREEMENT:g} is expected. Nothing was written"
            )
        if chosen == "blocks":
            files["blocks"].replace(files["dense"])
        files["blocks"].unlink(missing_ok=True)
        write_json(temporary / DESCRIPTION, _description(loaded))
    return OnnxExport(
        folder=folder,
        forms=blocks if chosen == "blocks" else {},
        removed=sum(pair.removed for pair in shrunk),
        bytes=(folder / MODEL).stat().st_size,
        dense_ms=1e3 * times["dense"],
        sparse_ms=1e3 * times["blocks"] if "blocks" in times else None,
        largest_difference=difference,
    )


def write_onnx(model: nn.Module, file: Path, image: Tensor) -> None:
    """``model(image)`` as an ONNX file with a free batch size. Raises ``InputError`` for what ONNX does not have."""
    _runtime()
    before = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter, about its own parts
            torch.onnx.export(
                model.eval(),
                (image,),
                file,
                input_names=["image"],
                output_names=["vector"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"this encoder cannot be written as ONNX: {reason}") from error
    finally:
        logging.getLogger("torch.onnx").setLevel(before)


def _runtime() -> Any:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"an ONNX file needs {name}, which is not installed. Install with: "
                "pip install 'bowerbird-sparsity[onnx]'"
            ) from error
    return module


def _session(runtime: Any, file: Path) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _difference(session: Any, image: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(np.abs(session.run(None, {"image": image})[0] - wanted).max())


def _description(loaded: LoadedEncoder) -> dict[str, Any]:
    assert loaded.module.preprocessing is not None
    return {
        "input": "image: float32 (batch, 3, height, width), prepared as below",
        "output": "vector: float32 (batch, dim), unit length",
        "dim": loaded.dim,
        "preprocessing": loaded.module.preprocessing.to_dict(),
        "fingerprint": loaded.fingerprint,
    }
