"""Losses and softmaxes are computed in float32 at least, whatever the networks run in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x``, half precision as float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
