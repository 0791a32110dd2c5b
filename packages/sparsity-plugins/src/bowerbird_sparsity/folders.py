"""Sparse exports of encoders as folders that ``bowerbird.encoders.load_encoder`` reads like any other.

Beside what every encoder's folder holds, ``encoder.json`` has an entry ``sparse``, and the weights are compressed
(``weights.sparse.safetensors``, see ``compression``):

    {"shrunk": true, "forms": {"trunk.model.blocks.0.mlp": {...}, ...}, "tensors": {...}, "largest_difference": 3e-8}

On disk are the dense model's own weights, bit for bit. Loading restores them, checks their fingerprint, removes dead
units and puts the layers into the forms that were chosen when the export was made. Nothing is measured while loading,
and nothing is executed that comes from the folder.

So the export has the fingerprint of the dense encoder: it *is* that encoder, computed in another order, and its vectors
are those of the dense one to 1e-5 (checked at export; a GPU differs from a CPU by as much). Galleries filled by one are
searched by the other. Where a form changes the numbers (2:4 in half precision), the export is a space of its own with a
relation ``compatible`` to the dense one, and the measured difference is its evidence.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from bowerbird.data.images import Preprocessing
from bowerbird.encoders.bundle import MANIFEST, LoadedEncoder, check_place, load_encoder
from bowerbird.encoders.bundle import WEIGHTS as DENSE_WEIGHTS
from bowerbird.encoders.export import export_encoder
from bowerbird.errors import DataError, InputError
from bowerbird.files import atomic_folder, write_json
from bowerbird.protocols import Encoder
from bowerbird_sparsity.compression import compress, restore
from bowerbird_sparsity.export import Form, apply_forms, check_format, choose_forms, linear_layers, zeros_of
from bowerbird_sparsity.shrink import Shrunk, shrink_report

WEIGHTS = "weights.sparse.safetensors"
AGREEMENT = 1e-5  # of unit vectors: up to here the sparse encoder is the dense one
INEXACT = {"2:4"}  # forms that may compute in lower precision


@dataclass(frozen=True)
class SparseExport:
    """What an export did.

    Attributes:
        folder: Where it is.
        fingerprint: Of its space; that of the dense encoder, unless a form changes the numbers.
        forms: The layers that are not dense any more.
        shrunk: Pairs of layers from which units were removed.
        largest_difference: Between unit vectors of the dense and the sparse encoder.
        bytes, dense_bytes: Of the weights on disk.
    """

    folder: Path
    fingerprint: str
    forms: Mapping[str, Form]
    shrunk: tuple[Shrunk, ...]
    largest_difference: float
    bytes: int
    dense_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "folder": str(self.folder),
            "fingerprint": self.fingerprint,
            "forms": {name: form.to_dict() for name, form in self.forms.items()},
            "removed_units": sum(pair.removed for pair in self.shrunk),
            "largest_difference": self.largest_difference,
            "bytes": self.bytes,
            "dense_bytes": self.dense_bytes,
        }

    def lines(self) -> list[str]:
        """For a person."""
        counts = Counter(str(form) for form in self.forms.values())
        forms = ", ".join(f"{count} x {form}" for form, count in counts.most_common())
        removed = sum(pair.removed for pair in self.shrunk)
        lines = [
            f"{self.folder}: {self.bytes:,} bytes of weights instead of {self.dense_bytes:,}, fingerprint "
            f"{self.fingerprint[:12]}, vectors differ by {self.largest_difference:.0e}",
            f"layers in sparse form: {forms}" if forms else "no layer is faster in a sparse form here: all stay dense",
        ]
        return [*lines, f"removed {removed} hidden units that made no difference"] if removed else lines


def export_sparse_encoder(
    ref: str | Path,
    folder: str | Path,
    *,
    format: str = "auto",
    batch_size: int = 32,
    device: str = "cpu",
    measure: bool = True,
) -> SparseExport:
    """Write the encoder ``ref`` (what ``load_encoder`` accepts) as a sparse export.

    Args:
        ref: A run, an exported folder, or a name with settings. Its weights hold zeros.
        folder: Where to. It must not exist, be empty, or hold an encoder, which is replaced.
        format: See ``export.export_sparse``.
        batch_size: How many pictures go through the encoder at once when it serves: forms are timed at this size.
        device: Where it will serve, and where forms are timed.
        measure: ``False``: choose forms without timing them, see ``export.export_sparse``.

    Raises:
        InputError: An unknown format, no zeros, a place that is in use, or vectors that differ.
    """
    check_format(format)
    folder = Path(folder)
    check_place(folder)
    loaded = load_encoder(ref, device=device, dense=True)
    check_zeros(loaded)
    sample = sample_batch(loaded, batch_size)
    smaller, shrunk = shrink_report(loaded.module)
    forms = choose_forms(smaller, format, sample if measure else None)
    sparse = apply_forms(copy.deepcopy(smaller), forms)
    difference = largest_vector_difference(loaded.module, sparse, sample)
    described: dict[str, Any] = {
        "format": format,
        "shrunk": bool(shrunk),
        "forms": {name: form.to_dict() for name, form in forms.items()},
        "largest_difference": difference,
    }
    fingerprint = loaded.fingerprint
    relations = [dict(relation) for relation in loaded.spec.relations]
    if not difference <= AGREEMENT:
        if not any(form.format in INEXACT for form in forms.values()):
            raise InputError(
                f"the sparse form of {str(ref)!r} gives vectors that differ from the dense ones by {difference:.1e}; "
                f"at most {AGREEMENT:g} is expected. Nothing was written; export with --sparse csr, or report this"
            )
        fingerprint = described["fingerprint"] = _fingerprint_of_forms(loaded.fingerprint, described["forms"])
        evidence = {"method": "sparse export", "largest_difference": difference}
        # A map that was trained with the dense encoder is for vectors of exactly that one.
        relations = [relation for relation in relations if relation["kind"] != "transform"]
        relations.append({"kind": "compatible", "to": loaded.fingerprint, "evidence": evidence})
    with atomic_folder(folder) as temporary:
        inner = temporary / folder.name  # the model card is named after the folder
        export_encoder(ref, inner)
        for file in inner.iterdir():
            file.rename(temporary / file.name)
        inner.rmdir()
        dense_bytes = (temporary / DENSE_WEIGHTS).stat().st_size
        stored, described["tensors"] = compress(load_file(temporary / DENSE_WEIGHTS))
        (temporary / DENSE_WEIGHTS).unlink()
        save_file(stored, temporary / WEIGHTS)
        manifest = json.loads((temporary / MANIFEST).read_text())
        write_json(temporary / MANIFEST, {**manifest, "relations": relations, "sparse": described})
        card = temporary / "README.md"
        card.write_text(card.read_text() + _card(forms, shrunk, device, batch_size))
    return SparseExport(
        folder=folder,
        fingerprint=fingerprint,
        forms=forms,
        shrunk=tuple(shrunk),
        largest_difference=difference,
        bytes=(folder / WEIGHTS).stat().st_size,
        dense_bytes=dense_bytes,
    )


def read_weights(folder: Path, described: Mapping[str, Any]) -> dict[str, Tensor]:
    """The dense weights of a sparse export. Raises ``DataError`` for damaged files."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise DataError(f"encoder {str(folder)!r} has no {WEIGHTS}")
    try:
        stored = load_file(file)
    except (SafetensorError, OSError) as error:
        raise DataError(f"weights {str(file)!r} cannot be read: {error}") from error
    tensors = described.get("tensors") if isinstance(described, Mapping) else None
    if not isinstance(tensors, Mapping):
        raise DataError(f"{str(folder / MANIFEST)!r}: sparse.tensors is missing")
    return restore(stored, tensors, source=str(file))


def in_sparse_form(loaded: LoadedEncoder, described: Mapping[str, Any]) -> LoadedEncoder:
    """A dense encoder that was just read from a sparse export, in the form that the export describes.

    Raises:
        DataError: The description fits no layers of this encoder.
        InputError: A form that this device does not take (2:4 on a CPU).
    """
    module: Any = loaded.module
    try:
        forms = {name: Form.from_dict(values) for name, values in described["forms"].items()}
        if described["shrunk"]:
            module, _ = shrink_report(module)
    except (KeyError, AttributeError, InputError) as error:
        raise DataError(f"encoder {loaded.name!r}: the entry sparse of {MANIFEST} is damaged: {error}") from error
    if loaded.device.type != "cuda" and any("2:4" in (form.format) for form in forms.values()):
        raise InputError(
            f"encoder {loaded.name!r} was exported in the form 2:4, which runs on CUDA only; this is "
            f"{loaded.device.type!r}. Load its dense form: load_encoder(..., dense=True)"
        )
    module = apply_forms(module, forms)
    fingerprint = described.get("fingerprint", loaded.fingerprint)
    if fingerprint not in (loaded.fingerprint, _fingerprint_of_forms(loaded.fingerprint, described["forms"])):
        raise DataError(f"encoder {loaded.name!r}: sparse.fingerprint of {MANIFEST} is not that of its forms")
    return replace(loaded, module=module, fingerprint=fingerprint)


def check_zeros(loaded: LoadedEncoder) -> None:
    """Raises ``InputError`` for an encoder without zeros in its linear layers."""
    layers = linear_layers(loaded.module)
    if not any(zeros_of(layer.weight) for layer in layers.values()):
        raise InputError(
            f"none of the {len(layers)} linear layers of {loaded.name!r} has zeros in its weights; train with a "
            "modifier such as sparsity:spartan first (`bowerbird show sparsity:spartan`)"
        )


def sample_batch(loaded: LoadedEncoder, size: int) -> dict[str, Any]:
    """A batch of ``size`` random items that the encoder takes. Raises ``InputError`` where it is not known how."""
    if size < 1:
        raise InputError(f"batch size {size}: expected at least 1")
    preprocessing: Preprocessing | None = loaded.module.preprocessing
    generator = torch.Generator().manual_seed(0)
    if preprocessing is not None:
        images = torch.randn(size, 3, preprocessing.height, preprocessing.width, generator=generator)
        return {"image": images.to(loaded.device)}
    tokenize = getattr(loaded.module, "tokenize", None)
    if tokenize is not None:
        tokens = tokenize([f"a photograph of {number} things" for number in range(size)])
        return {"text": {key: value.to(loaded.device) for key, value in tokens.items()}}
    inputs = getattr(loaded.module, "inputs", None)  # core:perceptron on feature vectors
    if isinstance(inputs, int):
        return {"frozen_features": torch.randn(size, inputs, generator=generator).to(loaded.device)}
    raise InputError(f"encoder {loaded.spec.use!r} takes neither pictures nor texts; a sparse export cannot check it")


@torch.inference_mode()
def largest_vector_difference(dense: Encoder, sparse: Any, sample: Mapping[str, Any]) -> float:
    """Between the unit vectors of both, number by number."""
    one, other = (normalize(module(sample).pooled.float(), dim=1) for module in (dense, sparse))
    return float((one - other).abs().max())


def _fingerprint_of_forms(fingerprint: str, forms: Mapping[str, Any]) -> str:
    text = json.dumps({"dense": fingerprint, "forms": forms}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _card(forms: Mapping[str, Form], shrunk: list[Shrunk], device: str, batch_size: int) -> str:
    removed = sum(pair.removed for pair in shrunk)
    rows = "\n".join(f"| `{name}` | {form} |" for name, form in forms.items())
    return f"""
## Sparse export

The weights are stored without their zeros, and these layers are computed in sparse forms (chosen for {device}, batches
of {batch_size}). Loading needs `pip install bowerbird-sparsity`; `load_encoder(..., dense=True)` gives plain layers.
{f"{removed} hidden units that made no difference were removed." if removed else ""}

| layer | form |
|---|---|
{rows}
"""
