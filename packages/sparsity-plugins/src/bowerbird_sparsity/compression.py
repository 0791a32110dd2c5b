"""Weights with zeros as fewer bytes, and back again bit for bit.

Of a tensor that is mostly zeros three things are kept: the blocks that are not all zero, one bit per block that says
which they are, and, where there are any, one bit per dropped number that says which zeros are negative (a weight times
a mask of zero keeps its sign). The last one makes the restored tensor equal byte by byte, and so its digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bowerbird.errors import DataError
from bowerbird_sparsity.block_linear import block_shape_of

WORTH_IT = 0.9  # compressed only where it needs at most this share of the bytes
KEYS = ("values", "kept", "negative")


def compress(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors to store, and a plain description of those that were compressed: name -> shape and block."""
    stored: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu()
        parts = _parts(tensor)
        own = {f"{name}.{key}": value for key, value in (parts or {}).items()}
        if parts is None or any(key in state for key in own):
            stored[name] = tensor.clone().contiguous()
            continue
        stored |= own
        described[name] = {"shape": list(tensor.shape), "block": list(parts["values"].shape[1:])}
    return stored, described


def restore(
    stored: Mapping[str, Tensor], described: Mapping[str, Mapping[str, Any]], *, source: str
) -> dict[str, Tensor]:
    """The tensors that ``compress`` got. Raises ``DataError`` for files that do not belong together."""
    state = dict(stored)
    for name, how in described.items():
        try:
            values, kept = state.pop(f"{name}.values"), state.pop(f"{name}.kept")
            negative = state.pop(f"{name}.negative", None)
            shape, block = [int(side) for side in how["shape"]], [int(side) for side in how["block"]]
            state[name] = _whole(values, kept, negative, shape, block)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise DataError(f"weights {source!r}: the compressed tensor {name!r} is damaged ({error})") from error
    return state


def _parts(tensor: Tensor) -> dict[str, Tensor] | None:
    """Values ``(kept blocks, p, q)`` and bits; ``None`` where the whole tensor is about as small."""
    if tensor.ndim < 2 or not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    matrix = tensor.reshape(tensor.shape[0], -1)
    if int(matrix.count_nonzero()) > WORTH_IT * matrix.numel():
        return None
    p, q = block_shape_of(matrix) or (1, 1)
    grid = _grid(matrix, p, q)
    kept = (grid != 0).any(dim=3).any(dim=2)
    dropped = grid[~kept]
    parts = {"values": grid[kept].contiguous(), "kept": _packed(kept)}
    if bool(torch.signbit(dropped).any()):
        parts["negative"] = _packed(torch.signbit(dropped))
    size = sum(part.numel() * part.element_size() for part in parts.values())
    return parts if size <= WORTH_IT * tensor.numel() * tensor.element_size() else None


def _whole(values: Tensor, kept: Tensor, negative: Tensor | None, shape: list[int], block: list[int]) -> Tensor:
    p, q = block
    rows, columns = shape[0], prod(shape[1:])
    if rows % p or columns % q or list(values.shape[1:]) != block:
        raise ValueError(f"blocks of {p} x {q} do not fit")
    which = _unpacked(kept, rows // p * (columns // q)).view(rows // p, columns // q)  # before memory is taken
    grid = values.new_zeros(rows // p, columns // q, p, q)
    grid[which] = values
    if negative is not None:
        signs = _unpacked(negative, int((~which).sum()) * p * q).view(-1, p, q)
        grid[~which] = torch.where(signs, -0.0, 0.0).to(values.dtype)
    return grid.transpose(1, 2).reshape(shape)


def _grid(matrix: Tensor, p: int, q: int) -> Tensor:
    return matrix.view(matrix.shape[0] // p, p, matrix.shape[1] // q, q).transpose(1, 2)


def _packed(bits: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(bits.flatten().numpy()))


def _unpacked(packed: Tensor, count: int) -> Tensor:
    if packed.dtype != torch.uint8 or packed.numel() != -(-count // 8):
        raise ValueError(f"{packed.numel()} bytes of bits for {count} entries")
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool))
