"""Smaller dense layers with the same outputs: units that are dead, or that nobody reads, are removed.

Between two linear layers stands a row of hidden units. A unit is *dead* where its row of the first layer is zero: it is
the same number for every input, what the activation makes of its bias. It is *unread* where its column of the second
layer is zero. Both are removed from both layers; what a dead unit added to the second layer goes into the bias of that
layer. The result is a plain smaller model: it runs everywhere, and saves time on every device.

Such rows come from blocks of ``(1, -1)`` (one output unit a block), and now and then from smaller ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bowerbird.errors import InputError
from bowerbird_sparsity.export import linear_layers
from bowerbird_sparsity.forms import mlp_parts
from bowerbird_sparsity.layers import ELEMENTWISE, INERT
from bowerbird_sparsity.timing import largest_difference

TOLERANCE = 1e-5  # of the largest output


@dataclass(frozen=True)
class Shrunk:
    """What was removed from one pair of layers."""

    first: str
    second: str
    units: int
    removed: int


def shrink(model: nn.Module, sample: Any = None) -> nn.Module:
    """A copy of ``model``, in eval mode, without the hidden units that make no difference.

    Looked at are the perceptrons of timm's transformers and linear layers that follow each other in an
    ``nn.Sequential``, with activations of single numbers, batch norms and dropout between them.

    Args:
        model: Finalised. It is not changed. A model without such units comes back as an equal copy.
        sample: What ``model`` is called with (a tuple: its positional arguments). With it the outputs are compared.

    Raises:
        InputError: Masks are still there; the smaller model fails on ``sample`` or its outputs differ, which only a
            model can cause that uses the layers in other ways.
    """
    smaller, _ = shrink_report(model)
    if sample is not None:
        try:
            difference = largest_difference(model, smaller, sample)
            found = f"removing dead units changed the outputs by {difference:.1e} of the largest one"
        except RuntimeError as error:  # sizes that do not fit
            difference, found = float("inf"), f"without its dead units the model does not take the sample ({error})"
        if not difference <= TOLERANCE:
            raise InputError(
                f"{found}: the layers of this model are used in ways that its structure does not show. Export it "
                "without shrinking"
            )
    return smaller


def shrink_report(model: nn.Module) -> tuple[nn.Module, list[Shrunk]]:
    """Like ``shrink`` without a sample, with what was removed, pair by pair."""
    linear_layers(model)  # refuses masks
    smaller = copy.deepcopy(model).eval()
    report: list[Shrunk] = []
    used = _times_used(smaller)
    for names, chain in list(_chains(smaller)):
        first, *between, second = chain
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        if any(used[id(module)] > 1 for module in chain if any(True for _ in module.parameters())):
            continue  # shared with another place, where the units may be needed
        removed = _shrink_pair(first, between, second)
        if removed:
            report.append(Shrunk(names[0], names[1], units=first.out_features + removed, removed=removed))
    return smaller, report


def _chains(model: nn.Module) -> Iterator[tuple[tuple[str, str], list[nn.Module]]]:
    """Names of the two linear layers, and the modules from the first to the second."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        parts = mlp_parts(module)
        if parts is not None:
            yield (f"{prefix}fc1", f"{prefix}fc2"), list(parts)
        elif type(module) is nn.Sequential:
            children = list(module.named_children()) if len(module) == len(list(module.named_children())) else []
            linear = [i for i, (_, child) in enumerate(children) if type(child) is nn.Linear]
            for i, j in pairwise(linear):
                between = [child for _, child in children[i + 1 : j]]
                if all(isinstance(child, (*ELEMENTWISE, *INERT, nn.BatchNorm1d)) for child in between):
                    yield (
                        (f"{prefix}{children[i][0]}", f"{prefix}{children[j][0]}"),
                        [children[i][1], *between, children[j][1]],
                    )


def _times_used(model: nn.Module) -> dict[int, int]:
    used: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        used[id(module)] = used.get(id(module), 0) + 1
    return used


@torch.no_grad()
def _shrink_pair(first: nn.Linear, between: list[nn.Module], second: nn.Linear) -> int:
    """Remove units from both layers and the norms between them; the number of them."""
    dead = ~(first.weight != 0).any(dim=1)
    unread = ~(second.weight != 0).any(dim=0)
    gone = dead | unread
    if not gone.any():
        return 0
    if gone.all():  # a layer without units is no layer: keep one
        gone[0] = False
    if not gone.any():
        return 0
    constant = first.weight.new_zeros(first.out_features) if first.bias is None else first.bias.detach()
    values = constant[None]
    for module in between:
        values = module(values)
    # An unread unit adds nothing, whatever it is: 0 * inf must not spoil the sum.
    addition = torch.where(unread, 0.0, second.weight * values[0]).double()[:, gone].sum(dim=1)
    if addition.any():
        bias = addition if second.bias is None else second.bias.double() + addition
        second.bias = nn.Parameter(bias.to(second.weight.dtype), requires_grad=second.weight.requires_grad)
    keep = ~gone
    first.weight = _sliced(first.weight, keep)
    first.bias = None if first.bias is None else _sliced(first.bias, keep)
    first.out_features = int(keep.sum())
    for module in between:
        if isinstance(module, nn.BatchNorm1d):
            module.num_features = first.out_features
            for name in ("weight", "bias"):
                if getattr(module, name) is not None:
                    setattr(module, name, _sliced(getattr(module, name), keep))
            for name in ("running_mean", "running_var"):
                if getattr(module, name) is not None:
                    setattr(module, name, getattr(module, name)[keep].clone())
    second.weight = nn.Parameter(second.weight[:, keep].clone(), requires_grad=second.weight.requires_grad)
    second.in_features = first.out_features
    return int(gone.sum())


def _sliced(parameter: Tensor, keep: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter[keep].clone(), requires_grad=parameter.requires_grad)
