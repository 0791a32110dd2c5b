"""Torch transforms as a gallery keeps them: ``VectorTransform``, numpy only, equal to the module in eval mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bowerbird.errors import InputError
from bowerbird.gallery.transform import Step, VectorTransform
from bowerbird_compat.bict import ForwardTransform
from bowerbird_compat.gallery_rewrite import ComposedTransform
from bowerbird_compat.online_backfilling import ReverseQueryTransform

LAYER_NORM_EPS = 1e-5  # the one that a served layer_norm step has


def to_vector_transform(
    module: nn.Module,
    *,
    source: str = "",
    target: str = "",
    method: str = "",
    evidence: Mapping[str, Any] | None = None,
) -> VectorTransform:
    """``module`` in eval mode, followed by normalisation, without torch.

    Args:
        module: ``ReverseQueryTransform``, ``ForwardTransform``, what ``TransformChain.compose`` returns, or a
            ``Sequential`` of linear layers, batch and layer norms, ReLU, dropout.
        source, target: Fingerprints of the two spaces; default: the module's own.
        method, evidence: Of the ``VectorTransform``.

    Raises:
        InputError: (a ``ValueError``) A layer that has no counterpart, no direction, or weights that are not finite.
    """
    source, target = source or getattr(module, "source", ""), target or getattr(module, "target", "")
    steps = transform_steps(module)
    parameter = next((p for p in module.parameters() if p.ndim == 2), None)
    if parameter is None:
        raise InputError(f"{type(module).__name__} has no linear layer; its widths are not known.")
    dim_in = width = parameter.shape[1]
    for step in steps:
        width = step.width(width)
    return VectorTransform(source, target, dim_in, width, steps, method, dict(evidence or {}))


def transform_steps(module: nn.Module) -> tuple[Step, ...]:
    """The steps of a module in eval mode. Raises ``InputError`` for a layer that has no counterpart."""
    match module:
        case ReverseQueryTransform():
            linear = transform_steps(module.linear)
            return (
                linear if module.branch is None else (Step("sum", branches=(linear, transform_steps(module.branch))),)
            )
        case ForwardTransform():
            layers = transform_steps(module.layers)
            return (Step("sum", branches=((), layers)),) if module.residual else layers
        case ComposedTransform():
            between = (Step("normalize"),) if module.normalize else ()
            return tuple(s for part in module.steps for s in (*transform_steps(part), *between))
        case nn.Sequential():
            return tuple(step for part in module for step in transform_steps(part))
        case nn.Linear():
            return (Step("linear", _array(module.weight), _array(module.bias)),)
        case nn.ReLU():
            return (Step("relu"),)
        case nn.Identity() | nn.Dropout():
            return ()
        case nn.BatchNorm1d() if module.running_mean is not None and module.running_var is not None:
            # In double precision: a small running variance must not cost digits.
            factor = 1 / (module.running_var.double() + module.eps).sqrt()
            shift = -module.running_mean.double() * factor
            if module.affine:
                gain = module.weight.detach().double()
                factor, shift = factor * gain, shift * gain + module.bias.detach().double()
            return (Step("scale", _array(factor), _array(shift)),)
        case nn.LayerNorm() if len(module.normalized_shape) == 1 and module.eps == LAYER_NORM_EPS:
            size = module.normalized_shape[0]
            gain = torch.ones(size) if module.weight is None else module.weight
            shift = torch.zeros(size) if module.bias is None else module.bias
            return (Step("layer_norm", _array(gain), _array(shift)),)
    raise InputError(
        f"{module!r} cannot be served without torch. A served map is made of linear layers, batch norm with running "
        f"statistics, layer norm over one axis with eps {LAYER_NORM_EPS:g}, ReLU, and sums."
    )


def _array(values: Tensor | None) -> np.ndarray | None:
    if values is None:
        return None
    made: np.ndarray = values.detach().cpu().to(torch.float32).numpy().copy()
    return made
