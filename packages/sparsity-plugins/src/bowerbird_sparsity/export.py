"""From zeros to speed: the linear layers of a model in the form that computes fastest here.

    form      what it is                                                        runs on
    rows      dead rows and columns left out, the rest dense                    anywhere
    blocks    ``block_linear``: dense products of the blocks that are kept      anywhere
    csr       ``nn.Linear`` with a CSR weight (torch's kernels)                 CPU (MKL), CUDA (cuSPARSE)
    bsr       ``nn.Linear`` with a block-sparse weight                          CPU (MKL), CUDA (Triton)
    2:4       ``nn.Linear`` with ``torch.sparse.to_sparse_semi_structured``     CUDA, compute capability 8.0 and up

Zeros do not make a model faster by themselves, and on a processor few zeros make it slower. So with a sample every layer
is timed in its dense form, too, and keeps it where it is the faster one.

Left dense: convolutions (torch has no sparse ones), and the linear layers inside ``nn.MultiheadAttention`` and
``nn.TransformerEncoderLayer``, which read their weights by themselves; ``skipped_layers`` names them.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bowerbird.errors import InputError, did_you_mean
from bowerbird_sparsity.block_linear import ELEMENTWISE, INERT, BlockLinear, BlockMlp, block_shape_of

FORMATS = ("auto", "rows", "blocks", "csr", "bsr", "2:4")
GAIN = 0.97  # a sparse form is kept where it needs at most this share of the dense time: below that, it is noise
SECONDS = 0.25  # of timing per candidate, about
# Without a sample nothing can be timed: shares of zeros from which a form was faster than the dense one on one core.
ZEROS_WITHOUT_SAMPLE = {"rows": 0.1, "blocks": 0.7, "csr": 0.95}

TWO_FOUR = (
    "format '2:4' needs a CUDA device of compute capability 8.0 or higher, weights in float16, bfloat16 or float32 "
    "whose rows and columns are multiples of (32, 64) ((32, 32) in float32), and at most 2 non-zero numbers in every 4 "
    "consecutive inputs"
)
TWO_FOUR_MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.float32: (32, 32)}


@dataclass(frozen=True)
class Form:
    """The form of one layer: plain data, so that a folder can hold it.

    Attributes:
        format: ``dense``, ``rows``, ``blocks``, ``csr``, ``bsr``, ``2:4``, or ``mlp`` for a perceptron whose two layers
            are computed together.
        block: Of ``blocks`` and ``bsr``: (outputs, inputs). Of ``mlp``: those of its first layer.
        block2: Of ``mlp``: those of its second layer.
    """

    format: str
    block: tuple[int, int] | None = None
    block2: tuple[int, int] | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Form:
        sides = {key: tuple(values[key]) for key in ("block", "block2") if values.get(key) is not None}
        return cls(format=values["format"], **sides)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        return self.format + (" " + "x".join(map(str, self.block)) if self.block else "")


class RowsLinear(nn.Module):
    """A linear layer without its dead rows (outputs that are their bias) and dead columns (inputs that nobody reads)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        kept = weight.detach() != 0
        rows, columns = kept.any(dim=1), kept.any(dim=0)
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight.detach()[rows][:, columns].clone())
        self.register_buffer("rows", None if rows.all() else rows.nonzero()[:, 0])
        self.register_buffer("columns", None if columns.all() else columns.nonzero()[:, 0])
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def dense_weight(self) -> Tensor:
        full = self.weight.new_zeros(self.out_features, self.in_features)
        rows = torch.arange(self.out_features, device=full.device) if self.rows is None else self.rows
        columns = torch.arange(self.in_features, device=full.device) if self.columns is None else self.columns
        full[rows[:, None], columns] = self.weight
        return full

    def forward(self, x: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``."""
        if self.columns is not None:
            x = x.index_select(-1, self.columns)
        if self.rows is None:
            return nn.functional.linear(x, self.weight, self.bias)
        y = nn.functional.linear(x, self.weight)
        full = y.new_zeros(*y.shape[:-1], self.out_features).index_copy(-1, self.rows, y)
        return full if self.bias is None else full + self.bias


# ------------------------------------------------------------------------------------------------ public


def export_sparse(model: nn.Module, format: str = "auto", sample: Any = None) -> nn.Module:
    """A copy of ``model``, in eval mode, whose linear layers have sparse forms where that pays. For inference.

    Args:
        model: Finalised: exact zeros in the weights, no masks any more. It is not changed.
        format: One of ``FORMATS``. ``auto`` tries all that apply to a layer, and computes perceptrons of timm's
            transformers as one (``block_linear.BlockMlp``).
        sample: What ``model`` is called with (a tuple: its positional arguments). With it, a layer keeps the dense form
            where that is as fast, measured on inputs of the size that it gets from the sample, on the sample's device.
            Without it, a named format is taken for every layer that has zeros and that it fits, and ``auto`` follows
            the share of zeros.

    Raises:
        InputError: An unknown format; masks or parametrisations that are still there; no linear layer; with ``2:4`` a
            device, type, shape or pattern that it does not take.
    """
    check_format(format)
    forms = choose_forms(model, format, sample)
    return apply_forms(copy.deepcopy(model).eval(), forms)


def choose_forms(model: nn.Module, format: str = "auto", sample: Any = None) -> dict[str, Form]:
    """The form of every linear layer that does not stay dense, by name; arguments as in ``export_sparse``."""
    check_format(format)
    layers = linear_layers(model)
    if not layers:
        found = "it is exported already" if sparse_forms(model) else "it has none"
        raise InputError(f"a sparse export changes linear layers, and {type(model).__name__} offers none: {found}")
    if format == "2:4":
        _check_two_four(layers)
    shapes = input_shapes(model, sample) if sample is not None else {}
    forms: dict[str, Form] = {}
    for name, layer in layers.items():
        candidates = _candidates(layer, format)
        if sample is None:
            if candidates and (format != "auto" or _pays(layer, candidates[0])):
                forms[name] = candidates[0]
        elif name in shapes:
            best = _fastest(layer, candidates, shapes[name])
            if best is not None:
                forms[name] = best
    if format in ("auto", "blocks"):
        _fuse(model, forms, shapes, measured=sample is not None)
    return forms


def apply_forms(model: nn.Module, forms: Mapping[str, Form]) -> nn.Module:
    """Put ``forms`` into ``model`` itself, and return it. Raises ``InputError`` for a layer that is not there."""
    for name, form in forms.items():
        modules = dict(model.named_modules(remove_duplicate=False))
        module = modules.get(name)
        if module is None:
            raise InputError(f"there is no layer {name!r} to export.{did_you_mean(name, modules)}")
        model = _replaced(model, module, _in_form(name, module, form))
    return model


def sparse_forms(model: nn.Module) -> dict[str, Form]:
    """The forms that the layers of an exported model have, by name."""
    found: dict[str, Form] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, BlockMlp):
            found[name] = Form("mlp", module.fc1.block, module.fc2.block)
            inside = (*inside, f"{name}.")
        elif isinstance(module, BlockLinear):
            found[name] = Form("blocks", module.block)
        elif isinstance(module, RowsLinear):
            found[name] = Form("rows")
        elif isinstance(module, nn.Linear) and (form := _form_of_weight(module.weight)) is not None:
            found[name] = form
    return found


def dense_copy(model: nn.Module) -> nn.Module:
    """A copy of an exported model with plain dense layers again: the same zeros, the same function."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    for name in sparse_forms(model):
        module = modules[name]
        if isinstance(module, BlockMlp):
            weight1, bias1, weight2 = module.dense_weights()
            pair = nn.Sequential(_linear(weight1, bias1), module.act, _linear(weight2, module.fc2.bias))
            model = _replaced(model, module, pair.train(module.training))
        elif isinstance(module, BlockLinear | RowsLinear):
            model = _replaced(model, module, _linear(module.dense_weight(), module.bias))
        else:
            assert isinstance(module, nn.Linear)
            module.weight = nn.Parameter(module.weight.detach().to_dense(), requires_grad=False)
    return model


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that an export can change, by name; the zeros of their weights are exact.

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
        if module.weight.layout == torch.strided and not _is_two_four(module.weight):
            layers[name] = module
    return layers


def skipped_layers(model: nn.Module) -> dict[str, str]:
    """Layers that have zeros but stay dense in every export, and why."""
    held = _holders(model)
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.modules.conv._ConvNd) and isinstance(weight, Tensor) and bool((weight == 0).any()):
            reasons[name] = "torch has no sparse convolution"
        elif isinstance(module, nn.Linear) and name in held:
            reasons[name] = f"{held[name]} reads the weight by itself"
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            reasons[f"{name}.in_proj_weight"] = "MultiheadAttention reads the weight by itself"
    return reasons


def check_format(format: str) -> None:
    if format not in FORMATS:
        raise InputError(
            f"sparse format {format!r} is unknown.{did_you_mean(str(format), FORMATS)} Accepted: {', '.join(FORMATS)}"
        )


# ------------------------------------------------------------------------------------------------ measuring


def call(model: nn.Module, sample: Any) -> Any:
    return model(*sample) if isinstance(sample, tuple) else model(sample)


@torch.inference_mode()
def input_shapes(model: nn.Module, sample: Any) -> dict[str, tuple[int, ...]]:
    """The shape of the first input of every layer that ``model(sample)`` calls, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, module in model.named_modules():

        def remember(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            if args and isinstance(args[0], Tensor):
                shapes.setdefault(name, tuple(args[0].shape))

        handles.append(module.register_forward_pre_hook(remember))
    was_training = model.training
    try:
        call(model.eval(), sample)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return shapes


@torch.inference_mode()
def time_in_turns(calls: Mapping[str, Callable[[], Any]], *, seconds: float = SECONDS) -> dict[str, float]:
    """The shortest time of every call in seconds. They take turns, so that a busy moment of the machine meets all."""
    for one in calls.values():
        one()
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + seconds * len(calls)
    for turn in range(100):
        if turn >= 3 and time.perf_counter() > end:
            break
        for name, one in calls.items():
            _synchronize()
            start = time.perf_counter()
            one()
            _synchronize()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def layer_times(layer: nn.Linear, forms: list[Form], shape: tuple[int, ...]) -> dict[Form, float]:
    """Seconds of the dense layer and of each form, on random input of ``shape``."""
    x = torch.randn(shape, dtype=layer.weight.dtype, device=layer.weight.device)
    modules: dict[Form, nn.Module] = {Form("dense"): layer}
    modules |= {form: _in_form("the layer", copy.deepcopy(layer), form) for form in forms}
    return time_in_turns({form: (lambda module=module: module(x)) for form, module in modules.items()})  # type: ignore[misc]


def _fastest(layer: nn.Linear, candidates: list[Form], shape: tuple[int, ...]) -> Form | None:
    if not candidates:
        return None
    seconds = layer_times(layer, candidates, shape)
    best = min(candidates, key=lambda form: seconds[form])
    return best if seconds[best] <= GAIN * seconds[Form("dense")] else None


def _pays(layer: nn.Linear, form: Form) -> bool:
    return zeros_of(layer.weight) >= ZEROS_WITHOUT_SAMPLE.get(form.format, 0.0)


# ------------------------------------------------------------------------------------------------ forms


def zeros_of(weight: Tensor) -> float:
    """Share of zeros."""
    return 1 - int(weight.detach().count_nonzero()) / max(1, weight.numel())


def _candidates(layer: nn.Linear, format: str) -> list[Form]:
    """The forms of ``format`` that fit the zeros of ``layer``; what is likely the fastest first."""
    weight = layer.weight.detach()
    zeros = zeros_of(weight)
    if zeros == 0:
        return []
    kept = weight != 0
    whole = not (bool(kept.any(dim=1).all()) and bool(kept.any(dim=0).all()))
    found: dict[str, Form] = {}
    if whole:
        found["rows"] = Form("rows")
    block = block_shape_of(weight) if zeros < 1 else None
    if block is not None:
        found["blocks"] = Form("blocks", block)
        found["bsr"] = Form("bsr", (min(block),) * 2)  # torch's kernels on a processor want square blocks
    found["csr"] = Form("csr")
    if format == "auto":
        if whole and block is not None and _compact_share(kept) <= 1.1 * (1 - zeros):
            return [found["rows"]]  # nothing but dead rows and columns: no other form saves more
        order = ("blocks", "rows", "csr", "bsr") if block is not None else ("rows", "csr")
        forms = [found[name] for name in order if name in found]
        if weight.is_cuda and not _why_not_two_four(layer):
            forms.append(Form("2:4"))
        return forms
    if format == "2:4":
        return [Form("2:4")]
    if format in ("blocks", "bsr") and block is None:
        return []
    return [found[format]] if format in found else []


def _compact_share(kept: Tensor) -> float:
    return float(kept.any(dim=1).float().mean() * kept.any(dim=0).float().mean())


def _in_form(name: str, module: nn.Module, form: Form) -> nn.Module:
    if form.format == "mlp":
        parts = mlp_parts(module)
        if parts is None or form.block is None or form.block2 is None:
            raise InputError(f"layer {name!r} is no perceptron of two linear layers: {type(module).__name__}")
        return BlockMlp(*parts, (form.block, form.block2)).train(module.training)
    if form.format == "dense":
        return module
    if not isinstance(module, nn.Linear):
        raise InputError(f"layer {name!r} is {type(module).__name__}; only linear layers have a sparse form")
    weight = module.weight.detach()
    if form.format == "rows":
        return RowsLinear(weight, module.bias).train(module.training)
    if form.format == "blocks":
        assert form.block is not None
        return BlockLinear.of(module, form.block).train(module.training)
    if form.format == "2:4":
        why = _why_not_two_four(module)
        if why:
            raise InputError(f"{TWO_FOUR}; layer {name!r}: {why}")
        from torch.sparse import to_sparse_semi_structured

        module.weight = nn.Parameter(to_sparse_semi_structured(weight), requires_grad=False)
        return module
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|BSR|invariant).*")  # a note that they are new in torch
        sparse = weight.to_sparse_csr() if form.format == "csr" else weight.to_sparse_bsr(form.block)
    module.weight = nn.Parameter(sparse, requires_grad=False)
    return module


def _form_of_weight(weight: Tensor) -> Form | None:
    if _is_two_four(weight):
        return Form("2:4")
    if weight.layout == torch.sparse_csr:
        return Form("csr")
    if weight.layout == torch.sparse_bsr:
        p, q = weight.values().shape[1:]
        return Form("bsr", (p, q))
    return None


def _is_two_four(weight: Tensor) -> bool:
    from torch.sparse import SparseSemiStructuredTensor

    return isinstance(weight.data if isinstance(weight, nn.Parameter) else weight, SparseSemiStructuredTensor)


def _check_two_four(layers: Mapping[str, nn.Linear]) -> None:
    reasons = {
        name: why for name, layer in layers.items() if zeros_of(layer.weight) and (why := _why_not_two_four(layer))
    }
    if reasons or not any(zeros_of(layer.weight) for layer in layers.values()):
        listed = "; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:4]) or "no layer has zeros"
        more = f" and {len(reasons) - 4} more" if len(reasons) > 4 else ""
        raise InputError(f"{TWO_FOUR}. Found: {listed}{more}. Elsewhere use 'auto', 'blocks' or 'csr'")


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
        return f"shape {tuple(weight.shape)} is no multiple of {multiples}"
    if not is_two_four_pattern(weight):
        return "more than 2 of 4 consecutive inputs are not zero"
    return ""


def is_two_four_pattern(weight: Tensor) -> bool:
    """Whether every 4 consecutive inputs of ``weight`` ``(O, I)`` hold at most 2 non-zero numbers."""
    if weight.shape[1] % 4:
        return False
    return int((weight.detach() != 0).view(weight.shape[0], -1, 4).sum(dim=2).max()) <= 2


def mlp_parts(module: nn.Module) -> tuple[nn.Linear, nn.Module, nn.Linear] | None:
    """First layer, activation and second layer of a perceptron of timm; ``None`` for anything else.

    It must do nothing else: no norm or gate between the layers, an activation of single numbers.
    """
    from timm.layers import Mlp

    if type(module) is not Mlp:
        return None
    others = (module.drop1, module.norm, module.drop2)
    if not isinstance(module.fc1, nn.Linear) or not isinstance(module.fc2, nn.Linear):
        return None
    if not isinstance(module.act, ELEMENTWISE) or not all(isinstance(other, INERT) for other in others):
        return None
    return module.fc1, module.act, module.fc2


def _fuse(model: nn.Module, forms: dict[str, Form], shapes: Mapping[str, tuple[int, ...]], *, measured: bool) -> None:
    """Compute both layers of a perceptron together where they lie in blocks, and where that is faster if measured."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parts = mlp_parts(module)
        if parts is None:
            continue
        blocks = [block_shape_of(layer.weight) for layer in (parts[0], parts[2])]
        if blocks[0] is None or blocks[1] is None:
            continue
        names = tuple(f"{name}.{part}".lstrip(".") for part in ("fc1", "fc2"))
        fused = Form("mlp", blocks[0], blocks[1])
        if measured:
            if name not in shapes:
                continue
            x = torch.randn(shapes[name], dtype=parts[0].weight.dtype, device=parts[0].weight.device)
            apart = apply_forms(
                copy.deepcopy(module).eval(), {n.rpartition(".")[2]: forms[n] for n in names if n in forms}
            )
            together = _in_form(name, copy.deepcopy(module).eval(), fused)
            seconds = time_in_turns({"apart": lambda: apart(x), "together": lambda: together(x)})  # noqa: B023
            if seconds["together"] > GAIN * seconds["apart"]:
                continue
        elif not all(n in forms and forms[n].format == "blocks" for n in names):
            continue
        for n in names:
            forms.pop(n, None)
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


def _replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """``model`` with ``new`` wherever ``old`` stands in it; ``new`` where it is ``old`` itself."""
    if model is old:
        return new
    if new is not old:
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):  # named_children leaves out one that is there twice
                if child is old:
                    setattr(parent, name, new)
    return model


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta").eval()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return layer
