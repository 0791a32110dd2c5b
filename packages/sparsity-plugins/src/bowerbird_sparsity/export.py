"""From zeros to speed: the linear layers of a model in the form that computes fastest here.

    form      what it is                                                        runs on
    rows      dead rows and columns left out, the rest dense                    anywhere
    blocks    dense products of the blocks that are kept (``block_linear``)     anywhere
    csr       a CSR weight, torch's kernels                                     CPU (MKL), CUDA (cuSPARSE)
    bsr       a block-sparse weight, torch's kernels                            CPU (MKL), CUDA (Triton)
    2:4       ``torch.sparse.to_sparse_semi_structured``                        CUDA, compute capability 8.0 and up

Zeros do not make a model faster by themselves, and on a processor few zeros make it slower. So with a sample every
layer is timed in its dense form, too, and keeps it where it is the faster one.

Left dense: convolutions (torch has no sparse ones), and the linear layers inside ``nn.MultiheadAttention`` and
``nn.TransformerEncoderLayer``, which read their weights by themselves; ``skipped_layers`` names them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bowerbird.errors import InputError, did_you_mean
from bowerbird_sparsity.block_linear import block_shape_of
from bowerbird_sparsity.forms import Form, apply_forms, dense_copy, in_form, is_two_four, mlp_parts, sparse_forms
from bowerbird_sparsity.layers import SparseLinear
from bowerbird_sparsity.timing import input_shapes, time_in_turns

FORMATS = ("auto", "rows", "blocks", "csr", "bsr", "2:4")
DENSE = Form("dense")
APART = Form("layer by layer")  # of a perceptron: each of its layers in the form chosen for it
GAIN = 0.97  # a sparse form is kept where it needs at most this share of the dense time: above that, it is noise
# Without a sample nothing can be timed: shares of zeros from which a form was faster than the dense one on one core.
ZEROS_WITHOUT_SAMPLE = {"rows": 0.1, "blocks": 0.8, "csr": 0.9}

TWO_FOUR = (
    "format '2:4' needs a CUDA device of compute capability 8.0 or higher, weights in float16, bfloat16 or float32 "
    "whose rows and columns are multiples of (32, 64) ((32, 32) in float32), and at most 2 non-zero numbers in every 4 "
    "consecutive inputs"
)
ON_PROCESSORS = (torch.float32, torch.float64)  # what torch's sparse kernels take there
TWO_FOUR_MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.float32: (32, 32)}


def export_sparse(model: nn.Module, format: str = "auto", sample: Any = None) -> nn.Module:
    """A copy of ``model``, in eval mode, whose linear layers have sparse forms where that pays. For inference.

    Args:
        model: Finalised: exact zeros in the weights, no masks any more. It is not changed.
        format: One of ``FORMATS``. ``auto`` tries all that apply to a layer, and computes the perceptrons of timm's
            transformers as one (``layers.SparseMlp``).
        sample: What ``model`` is called with (a tuple: its positional arguments). With it, a layer keeps the dense form
            where that is as fast, measured on inputs of the size that it gets from the sample, on the sample's device.
            Without it, a named format is taken for every layer that has zeros and that it fits, and ``auto`` follows
            the share of zeros.

    Raises:
        InputError: An unknown format; masks or parametrisations that are still there; no linear layer; with ``2:4``,
            ``csr`` and ``bsr`` a device, type, shape or pattern that they do not take.
    """
    return apply_forms(copy.deepcopy(model).eval(), choose_forms(model, format, sample))


@dataclass(frozen=True)
class LayerTimes:
    """What was measured of one layer (or perceptron): seconds of every form of it, ``DENSE`` among them."""

    name: str
    seconds: Mapping[Form, float]
    chosen: Form


def choose_forms(
    model: nn.Module, format: str = "auto", sample: Any = None, *, measured: list[LayerTimes] | None = None
) -> dict[str, Form]:
    """The form of every layer that does not stay dense, by name.

    Arguments and errors as in ``export_sparse``. ``measured`` receives the times of every layer that was measured.
    """
    check_format(format)
    measured = [] if measured is None else measured
    layers = linear_layers(model)
    if not layers:
        found = "it is exported already" if sparse_forms(model) else "it has none"
        raise InputError(f"a sparse export changes linear layers, and {type(model).__name__} offers none: {found}")
    if format == "2:4":
        _check_two_four(layers)
    if format in ("csr", "bsr"):
        _check_kernels(layers, format)
    shapes = {} if sample is None else input_shapes(model, sample)
    forms: dict[str, Form] = {}
    for name, layer in layers.items():
        candidates = candidates_for(layer, format)
        if not candidates:
            continue
        if sample is None:
            if format != "auto" or zeros_of(layer.weight) >= ZEROS_WITHOUT_SAMPLE[candidates[0].format]:
                forms[name] = candidates[0]
        elif name in shapes:
            seconds = layer_times(layer, candidates, shapes[name])
            best = min(candidates, key=seconds.__getitem__)
            if seconds[best] <= GAIN * seconds[DENSE]:
                forms[name] = best
            measured.append(LayerTimes(name, seconds, forms.get(name, DENSE)))
    if format in ("auto", "blocks", "csr"):
        _fuse(model, forms, format, None if sample is None else shapes, measured)
    return forms


def candidates_for(layer: nn.Linear, format: str = "auto") -> list[Form]:
    """The forms of ``format`` that fit the zeros of ``layer``; what is likely the fastest comes first."""
    weight = layer.weight.detach()
    zeros = zeros_of(weight)
    if zeros == 0:
        return []
    if format == "2:4":
        return [Form("2:4")]
    kept = weight != 0
    rows, columns = kept.any(dim=1), kept.any(dim=0)
    block = block_shape_of(weight)
    found = {"csr": Form("csr")} if _has_kernels(weight) else {}
    if block is not None:
        found["blocks"] = Form("blocks", block)
        if _has_kernels(weight):
            found["bsr"] = Form("bsr", (min(block), min(block)))
    if not (rows.all() and columns.all()):
        found["rows"] = Form("rows")
    if format != "auto":
        return [found[format]] if format in found else []
    compact = float(rows.float().mean() * columns.float().mean())
    if compact <= 1.1 * (1 - zeros):
        return [found["rows"]]  # all zeros lie in dead rows and columns: no other form leaves out more
    # On a processor torch's own blocks were never the fastest.
    order = ("blocks", "bsr", "csr", "rows") if weight.is_cuda else ("blocks", "csr", "rows")
    forms = [found[name] for name in order if name in found]
    return [*forms, Form("2:4")] if weight.is_cuda and not _why_not_two_four(layer) else forms


@torch.inference_mode()
def layer_times(layer: nn.Module, forms: Sequence[Form], shape: tuple[int, ...]) -> dict[Form, float]:
    """Seconds of the dense layer (or perceptron) and of each form of it, on random input of ``shape``."""
    like = next(layer.parameters())
    x = torch.randn(shape, dtype=like.dtype, device=like.device)
    modules = {DENSE: copy.deepcopy(layer).eval()}
    modules |= {form: in_form(copy.deepcopy(layer).eval(), form, "") for form in forms}
    return time_in_turns({form: partial(module, x) for form, module in modules.items()})


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that an export can change, by name.

    Raises ``InputError`` where a weight is still computed from a mask.
    """
    held = _holders(model)
    layers: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name in held:
            continue
        if parametrize.is_parametrized(module, "weight"):
            raise InputError(
                f"layer {name!r} still computes its weight from a mask: call finalize() of the sparsifier first"
            )
        if not isinstance(module, SparseLinear) and not is_two_four(module.weight):
            layers[name] = module
    return layers


def skipped_layers(model: nn.Module) -> dict[str, str]:
    """Layers that have zeros but stay dense in every export, and why."""
    held = _holders(model)
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if zeros_of(module.weight):
                reasons[name] = "torch has no sparse convolution"
        elif isinstance(module, nn.Linear) and name in held:
            if zeros_of(module.weight):
                reasons[name] = f"{held[name]} reads the weight by itself"
        elif isinstance(module, nn.MultiheadAttention):
            for part in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                weight = getattr(module, part)
                if weight is not None and zeros_of(weight):
                    reasons[f"{name}.{part}"] = "MultiheadAttention reads the weight by itself"
    return reasons


def zeros_of(weight: Tensor) -> float:
    """Share of zeros."""
    return 1 - int(weight.detach().count_nonzero()) / max(1, weight.numel())


def check_format(format: str) -> None:
    if format not in FORMATS:
        raise InputError(
            f"sparse format {format!r} is unknown.{did_you_mean(str(format), FORMATS)} Accepted: {', '.join(FORMATS)}"
        )


def is_two_four_pattern(weight: Tensor) -> bool:
    """Whether every 4 consecutive inputs of ``weight`` ``(O, I)`` hold at most 2 non-zero numbers."""
    if weight.shape[1] % 4:
        return False
    return int((weight.detach() != 0).view(weight.shape[0], -1, 4).sum(dim=2).max()) <= 2


def _has_kernels(weight: Tensor) -> bool:
    """Whether torch multiplies by a CSR or BSR weight of this type here."""
    return weight.is_cuda or weight.dtype in ON_PROCESSORS


def _check_kernels(layers: Mapping[str, nn.Linear], format: str) -> None:
    for name, layer in layers.items():
        if zeros_of(layer.weight) and not _has_kernels(layer.weight):
            kind = str(layer.weight.dtype).removeprefix("torch.")
            raise InputError(
                f"layer {name!r} has weights in {kind}; on a processor format {format!r} takes float32 and float64. "
                "Use 'auto', 'blocks' or 'rows', or export the model in float32"
            )


def _check_two_four(layers: Mapping[str, nn.Linear]) -> None:
    sparse = {name: layer for name, layer in layers.items() if zeros_of(layer.weight)}
    reasons = [f"{name}: {why}" for name, layer in sparse.items() if (why := _why_not_two_four(layer))]
    if reasons or not sparse:
        more = f" and {len(reasons) - 3} more layers" if len(reasons) > 3 else ""
        found = "; ".join(reasons[:3]) or "no layer has zeros"
        raise InputError(f"{TWO_FOUR}. Found: {found}{more}. Elsewhere use 'auto', 'blocks' or 'csr'")


def _why_not_two_four(layer: nn.Linear) -> str:
    weight = layer.weight
    if not weight.is_cuda:
        return f"the weight is on {weight.device.type!r}"
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < (8, 0):
        return f"this GPU has compute capability {capability[0]}.{capability[1]}"
    multiples = TWO_FOUR_MULTIPLES.get(weight.dtype)
    if multiples is None:
        return f"the weight is {weight.dtype}"
    if weight.shape[0] % multiples[0] or weight.shape[1] % multiples[1]:
        return f"its shape {tuple(weight.shape)} is no multiple of {multiples}"
    return "" if is_two_four_pattern(weight) else "more than 2 of 4 consecutive inputs are not zero"


def _fuse(
    model: nn.Module,
    forms: dict[str, Form],
    format: str,
    shapes: Mapping[str, tuple[int, ...]] | None,
    measured: list[LayerTimes],
) -> None:
    """Compute both layers of a perceptron as one where that is faster; without ``shapes``, where both are sparse."""
    for name, module in model.named_modules():
        parts = mlp_parts(module)
        if parts is None:
            continue
        names = tuple(f"{name}.{part}".lstrip(".") for part in ("fc1", "fc2"))
        own = [candidates_for(layer, format) for layer in (parts[0], parts[2])]
        pair = [next((one for one in forms if one.format in ("blocks", "csr")), None) for forms in own]
        if pair[0] is None or pair[1] is None:
            continue
        fused = Form("mlp", layers=(pair[0], pair[1]))
        if shapes is None:
            if not all(full in forms for full in names):
                continue
        elif name not in shapes:
            continue
        else:
            x = torch.randn(shapes[name], dtype=parts[0].weight.dtype, device=parts[0].weight.device)
            chosen = {part: forms[full] for part, full in zip(("fc1", "fc2"), names, strict=True) if full in forms}
            dense = copy.deepcopy(module).eval()
            apart, together = apply_forms(copy.deepcopy(dense), chosen), in_form(copy.deepcopy(dense), fused, name)
            modules = {DENSE: dense, APART: apart, fused: together}
            seconds = time_in_turns({form: partial(one, x) for form, one in modules.items()})
            faster = seconds[fused] <= GAIN * min(seconds[APART], seconds[DENSE])
            measured.append(LayerTimes(name, seconds, fused if faster else APART if chosen else DENSE))
            if not faster:
                continue
        for full in names:
            forms.pop(full, None)
        forms[name] = fused


def _holders(model: nn.Module) -> dict[str, str]:
    """Linear layers whose weight another module reads: name -> kind of that module."""
    held: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            for inner, part in module.named_modules():
                if isinstance(part, nn.Linear):
                    held.setdefault(f"{name}.{inner}" if name else inner, type(module).__name__)
    return held


__all__ = [
    "FORMATS", "Form", "LayerTimes", "apply_forms", "candidates_for", "check_format", "choose_forms", "dense_copy",
    "export_sparse", "is_two_four_pattern", "layer_times", "linear_layers", "skipped_layers", "sparse_forms",
    "zeros_of",
]  # fmt: skip
