"""Which form a layer has, as plain data; how forms are put into a model, and taken out again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bowerbird.errors import InputError, did_you_mean
from bowerbird_sparsity.block_linear import BlockLinear
from bowerbird_sparsity.layers import ELEMENTWISE, INERT, FeatureLayer, RowsLinear, SparseLinear, SparseMlp

LAYER_FORMATS = ("rows", "blocks", "csr", "bsr", "2:4", "mlp")


@dataclass(frozen=True)
class Form:
    """The form of one layer: plain data, so that a folder can hold it.

    Attributes:
        format: ``dense``, ``rows``, ``blocks``, ``csr``, ``bsr``, ``2:4``, or ``mlp`` for a perceptron whose two layers
            are computed together.
        block: Of ``blocks`` and ``bsr``: (outputs, inputs).
        layers: Of ``mlp``: the forms of its two layers, ``blocks``, ``csr`` or ``bsr``.
    """

    format: str
    block: tuple[int, int] | None = None
    layers: tuple[Form, Form] | None = None

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"format": self.format}
        if self.block is not None:
            values["block"] = list(self.block)
        if self.layers is not None:
            values["layers"] = [layer.to_dict() for layer in self.layers]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Form:
        """Raises ``InputError`` for what ``to_dict`` does not write."""
        try:
            block, layers = values.get("block"), values.get("layers")
            form = cls(
                format=values["format"],
                block=None if block is None else (int(block[0]), int(block[1])),
                layers=None if layers is None else (cls.from_dict(layers[0]), cls.from_dict(layers[1])),
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{values!r} is no form of a layer") from error
        has_block, has_layers = form.block is not None, form.layers is not None
        if (
            form.format not in LAYER_FORMATS
            or has_block != (form.format in ("blocks", "bsr"))
            or has_layers != (form.format == "mlp")
        ):
            raise InputError(f"{values!r} is no form of a layer")
        return form

    def __str__(self) -> str:
        if self.layers is not None:
            return f"{self.layers[0]}, {self.layers[1]}, computed as one"
        return self.format + (" " + "x".join(map(str, self.block)) if self.block else "")


def apply_forms(model: nn.Module, forms: Mapping[str, Form]) -> nn.Module:
    """Put ``forms`` into ``model`` itself, and return it (what takes its place, if it is a single layer).

    Raises:
        InputError: There is no such layer, or its form does not fit it.
    """
    for name, form in forms.items():
        modules = dict(model.named_modules(remove_duplicate=False))
        if name not in modules:
            raise InputError(f"there is no layer {name!r} to export.{did_you_mean(name, modules)}")
        model = _replaced(model, modules[name], in_form(modules[name], form, name))
    return model


def in_form(module: nn.Module, form: Form, name: str = "") -> nn.Module:
    """What computes ``module`` in ``form``. Raises ``InputError`` where the form does not fit."""
    if form.format == "dense":
        return module
    if form.layers is not None:
        parts = mlp_parts(module)
        if parts is None:
            raise InputError(f"layer {name!r} is no perceptron of two linear layers: {type(module).__name__}")
        first, second = (in_form(part, one, name) for part, one in zip((parts[0], parts[2]), form.layers, strict=True))
        if not isinstance(first, FeatureLayer) or not isinstance(second, FeatureLayer):
            raise InputError(f"layer {name!r}: both layers of a perceptron must be blocks, csr or bsr; found {form}")
        return SparseMlp(first, parts[1], second).train(module.training)
    if not isinstance(module, nn.Linear):
        raise InputError(f"layer {name!r} is {type(module).__name__}; only linear layers have a sparse form")
    if form.format == "rows":
        return RowsLinear(module.weight, module.bias).train(module.training)
    if form.format == "2:4":
        return _two_four(module)
    if form.block is not None and (module.out_features % form.block[0] or module.in_features % form.block[1]):
        shape = tuple(module.weight.shape)
        raise InputError(f"layer {name!r}: blocks of {form.block} do not divide its weight of shape {shape}")
    if form.format == "blocks":
        assert form.block is not None
        return BlockLinear.of(module, form.block).train(module.training)
    return SparseLinear.of(module, form.block).train(module.training)


def sparse_forms(model: nn.Module) -> dict[str, Form]:
    """The forms that the layers of an exported model have, by name."""
    found: dict[str, Form] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, SparseMlp):
            found[name] = Form("mlp", layers=(sparse_forms(module.fc1)[""], sparse_forms(module.fc2)[""]))
            inside = (*inside, f"{name}." if name else "")
        elif isinstance(module, BlockLinear):
            found[name] = Form("blocks", module.block)
        elif isinstance(module, RowsLinear):
            found[name] = Form("rows")
        elif isinstance(module, SparseLinear):
            found[name] = _form_of(module.weight)
        elif isinstance(module, nn.Linear) and is_two_four(module.weight):
            found[name] = Form("2:4")
    return found


def dense_copy(model: nn.Module) -> nn.Module:
    """A copy of an exported model with plain dense layers again: the same zeros, the same function."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    for name in sparse_forms(model):
        module = modules[name]
        if isinstance(module, SparseMlp):
            first, second = module.dense_layers()
            pair = nn.Sequential(_linear(*first), module.act, _linear(*second))
            model = _replaced(model, module, pair.train(module.training))
        elif isinstance(module, BlockLinear | RowsLinear | SparseLinear):
            model = _replaced(model, module, _linear(module.dense_weight(), module.bias))
        else:
            assert isinstance(module, nn.Linear)
            model = _replaced(model, module, _linear(module.weight.detach().to_dense(), module.bias))
    return model


def mlp_parts(module: nn.Module) -> tuple[nn.Linear, nn.Module, nn.Linear] | None:
    """First layer, activation and second layer of a perceptron of timm; ``None`` for anything else.

    It must do nothing else: no norm or gate between the layers, an activation of single numbers.
    """
    from timm.layers.mlp import Mlp

    if type(module) is not Mlp:
        return None
    others = (module.drop1, module.norm, module.drop2)
    if not isinstance(module.fc1, nn.Linear) or not isinstance(module.fc2, nn.Linear):
        return None
    if not isinstance(module.act, ELEMENTWISE) or not all(isinstance(other, INERT) for other in others):
        return None
    return module.fc1, module.act, module.fc2


def is_two_four(weight: Tensor) -> bool:
    from torch.sparse import SparseSemiStructuredTensor

    return isinstance(weight, SparseSemiStructuredTensor) or isinstance(weight.data, SparseSemiStructuredTensor)


def _two_four(module: nn.Linear) -> nn.Linear:
    from torch.sparse import to_sparse_semi_structured

    layer = _linear(module.weight.detach(), module.bias)
    layer.weight = nn.Parameter(to_sparse_semi_structured(module.weight.detach()), requires_grad=False)
    return layer.train(module.training)


def _form_of(weight: Tensor) -> Form:
    if weight.layout == torch.sparse_csr:
        return Form("csr")
    p, q = weight.values().shape[1:]
    return Form("bsr", (p, q))


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
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer
