"""What fine-tuning and linear probes optimise with: layer-wise learning rates, LARS, the schedule in epochs.

You, Gitman, Ginsburg: Large Batch Training of Convolutional Networks, 2017 (arXiv 1708.03888). The rules of groups and
of LARS are those of MAE's official code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bowerbird.errors import InputError

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
# The tokens and tables of every transformer of this package, and its patch convolution.
_FIRST = re.compile(r"(?:^|\.)(?:(?:cls_token|mask_token|pos_embed|cls_pos|part_token\d+|part\d+_pos)$|patch_embed\.)")
_NO_DECAY = re.compile(r"(?:^|\.)(?:cls_token|pos_embed|cls_pos|part_token\d+|part\d+_pos)$")


def layer_id(name: str, num_blocks: int) -> int:
    """The depth of a parameter: 0 for tokens, positions and patch embedding, i + 1 for block i, else num_blocks + 1.

    A relative position bias that blocks share (``rel_pos_bias``) is of the last depth, as in BEiT's official code.
    """
    found = _BLOCK.search(name)
    if found is not None:
        return int(found.group(1)) + 1
    return 0 if _FIRST.search(name) else num_blocks + 1


def layer_decay_groups(
    module: nn.Module, *, num_blocks: int, layer_decay: float = 0.75, weight_decay: float = 0.05
) -> list[dict[str, Any]]:
    """Groups for an optimiser, one per depth and weight decay, of the trainable parameters.

    Every group has ``lr_scale`` = layer_decay^(num_blocks + 1 - layer_id), by which the caller multiplies the learning
    rate, and ``weight_decay``: 0 for vectors and biases, class token and position tables.

    Raises:
        InputError: ``layer_decay`` outside (0, 1].
    """
    if not 0 < layer_decay <= 1:
        raise InputError(f"layer_decay = {layer_decay}: expected a factor above 0 and at most 1")
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = layer_id(name, num_blocks)
        decays = parameter.ndim > 1 and not _NO_DECAY.search(name)
        group = groups.setdefault(
            (depth, decays),
            {
                "params": [],
                "lr_scale": layer_decay ** (num_blocks + 1 - depth),
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def warmup_cosine(epoch: float, *, lr: float, epochs: float, warmup_epochs: float = 0.0, min_lr: float = 0.0) -> float:
    """The learning rate at a fractional epoch: linear from 0 to ``lr``, then half a cosine to ``min_lr`` (MAE)."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    done = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


class LARS(Optimizer):
    """Momentum SGD whose step of a weight matrix is proportional to the matrix's norm.

    For parameters of more than one dimension d = g + weight_decay w is multiplied by trust_coefficient |w| / |d| (by 1
    where one of the norms is 0); vectors and biases take the plain gradient, without weight decay. The buffer
    accumulates b <- momentum b + d, and w <- w - lr b.

    Raises:
        InputError: A setting below 0, or ``momentum`` of 1 and above.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1 or trust_coefficient <= 0:
            raise InputError(
                f"LARS: lr = {lr}, weight_decay = {weight_decay}, momentum = {momentum}, trust_coefficient = "
                f"{trust_coefficient}: expected 0 or more, 0 or more, 0 to below 1, above 0"
            )
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust_coefficient": trust_coefficient
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                change: Tensor = parameter.grad
                if parameter.ndim > 1:
                    change = change + group["weight_decay"] * parameter
                    size, length = parameter.norm(), change.norm()
                    trust = group["trust_coefficient"] * size / length
                    change = change * torch.where((size > 0) & (length > 0), trust, torch.ones_like(trust))
                buffer = self.state[parameter].get("momentum_buffer")
                if buffer is None:
                    buffer = self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                buffer.mul_(group["momentum"]).add_(change)
                parameter.sub_(group["lr"] * buffer)
        return loss
