"""Linear layers that multiply only the blocks of a weight that are not zero, by dense products of compact matrices.

A weight ``(O, I)`` in blocks of ``(p, q)`` has R = O/p block rows and C = I/q block columns. Every block row keeps k
blocks. Block rows with the same k form a group of g: their blocks lie side by side as one tensor ``(g, p, k q)``. For n
tokens the group gathers the k blocks of features that each of its rows needs and multiplies, all rows in one batched
dense product: k p q n multiplications a row, whatever is zero is not touched.

Two things make this fast on a processor. A gathered block is a copy of whole runs of memory: q numbers of every token,
or, for low blocks in layers with more outputs than inputs, of n numbers, features first. And tokens go through in
chunks that stay in the cache. (A third one is in ``layers.SparseMlp``.)

N tokens, n tokens of a chunk, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Self

import torch
from torch import Tensor, nn

from bowerbird.errors import InputError

SIDES = (64, 32, 16, 8, 4)
# What a chunk holds: 400 to 600 tokens were best for layers of 384 to 3072 features on cores with 2 MiB of L2.
CHUNK_TOKENS = 512  # for every thread
TALL = 32  # rows of a block from which on it is faster not to transpose, whatever the layer (ViT-Small's and -Base's)
FILL = 1.1  # stored numbers, over non-zero ones, that a block shape may cost


def block_shape_of(weight: Tensor, *, fill: float = FILL) -> tuple[int, int] | None:
    """The largest blocks in which the zeros of ``weight`` ``(O, I)`` lie; ``None`` where they lie in none.

    Sides are powers of two from 4 to 64. A shape counts where the blocks that are not all zero hold at most ``fill``
    numbers for every non-zero one: a few zeros inside kept blocks do no harm.
    """
    kept = weight.detach() != 0
    nonzero = int(kept.sum())
    if nonzero == 0 or nonzero == kept.numel():
        return None
    best: tuple[int, int] | None = None
    for p in SIDES:
        if kept.shape[0] % p:
            continue
        rows = kept.view(-1, p, kept.shape[1]).any(dim=1)
        for q in SIDES:
            if kept.shape[1] % q:
                continue
            stored = int(rows.view(len(rows), -1, q).any(dim=2).sum()) * p * q
            if stored <= fill * nonzero and (best is None or (p * q, p) > (prod(best), best[0])):
                best = (p, q)
    return best


def check_block_shape(weight: Tensor, block: tuple[int, int], name: str) -> None:
    if len(block) != 2 or any(side < 1 for side in block) or weight.shape[0] % block[0] or weight.shape[1] % block[1]:
        raise InputError(
            f"{name}: blocks of {tuple(block)} do not divide its weight of shape {tuple(weight.shape)}; give two "
            "numbers that divide outputs and inputs"
        )


class BlockLinear(nn.Module):
    """What a ``nn.Linear`` computes, from the blocks of its weight that are not zero. For inference.

    Args:
        weight: ``(O, I)``; any zeros.
        bias: ``(O,)``, or ``None``.
        block: (p, q); they divide O and I. Blocks with at least one non-zero number are stored.

    Raises:
        InputError: Blocks that do not divide the weight.
    """

    position: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, block: tuple[int, int]) -> None:
        super().__init__()
        check_block_shape(weight, block, type(self).__name__)
        self.out_features, self.in_features = weight.shape
        self.block = (int(block[0]), int(block[1]))
        p, q = self.block
        weight = weight.detach()
        grid = weight.view(self.out_features // p, p, self.in_features // q, q).transpose(1, 2)  # (R, C, p, q)
        kept = (grid != 0).any(dim=3).any(dim=2)
        counts = kept.sum(dim=1)
        order: list[Tensor] = []
        self.groups: list[tuple[int, int]] = []  # (g, k)
        for k in counts.unique().tolist():
            if k == 0:
                continue
            rows = (counts == k).nonzero()[:, 0]
            columns = kept[rows].nonzero()[:, 1].view(len(rows), k)
            blocks = grid[rows[:, None], columns]  # (g, k, p, q)
            i = len(self.groups)
            values = blocks.transpose(1, 2).reshape(len(rows), p, k * q).contiguous()
            # Parameters as in a dense layer: models ask the first one for their type and device.
            self.register_parameter(f"values_{i}", nn.Parameter(values, requires_grad=False))
            self.register_buffer(f"columns_{i}", columns.flatten())
            self.groups.append((len(rows), k))
            order.append(rows)
        live = torch.cat(order) if order else counts.new_zeros(0)
        # Position of every block row among the computed ones; rows without blocks share one block of zeros at the end.
        position = torch.full_like(counts, len(live))
        position[live] = torch.arange(len(live), device=live.device)
        self.live = len(live)
        self.in_order = self.live == len(position) and bool((live.diff() > 0).all())
        self.register_buffer("position", position)
        self.like = nn.Parameter(weight.new_empty(0), requires_grad=False)  # type and device, also without any block
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Linear, block: tuple[int, int]) -> Self:
        return cls(linear.weight, linear.bias, block)

    def parts(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(g, k, values ``(g, p, k q)``, columns ``(g k,)``) of every group."""
        for i, (g, k) in enumerate(self.groups):
            yield g, k, getattr(self, f"values_{i}"), getattr(self, f"columns_{i}")

    def dense_weight(self) -> Tensor:
        """The weight ``(O, I)`` again."""
        p, q = self.block
        rows = torch.zeros(
            self.live, self.in_features // q, p, q, dtype=self.like.dtype, device=self.like.device
        )  # in the order of the groups
        start = 0
        for g, k, values, columns in self.parts():
            index = torch.arange(start, start + g, device=columns.device)[:, None]
            rows[index, columns.view(g, k)] = values.view(g, p, k, q).transpose(1, 2)
            start += g
        full = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])[self.position]
        return full.transpose(1, 2).reshape(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``. Raises ``InputError`` where a gradient is asked for."""
        flat = tokens_of(x, self.in_features).to(self.like.dtype)
        if is_traced():
            y = self._traced(flat.t()).t()
            return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], self.out_features)
        y = flat.new_empty(len(flat), self.out_features)
        spaces = self.workspaces(flat)
        for start, end in chunks(flat):
            space = spaces[end - start]
            self._multiply(self._gathered(flat[start:end], space), space.tokens_first, tokens_first=True)
            self._write(space, y[start:end])
        return y.view(*x.shape[:-1], self.out_features)

    def to_features(self, x: Tensor, spaces: Workspaces) -> Tensor:
        """Tokens ``(n, I)`` to features ``(O, n)``, bias included. The result may lie in ``spaces``."""
        space = spaces[len(x)]
        self._multiply(self._gathered(x, space), space.features_first, tokens_first=False)
        rows = space.features_first
        rows = rows[: self.live] if self.in_order else rows.index_select(0, self.position)
        y = rows.view(self.out_features, -1)
        return y if self.bias is None else y.add_(self.bias[:, None])

    def from_features(self, x: Tensor, spaces: Workspaces, out: Tensor) -> None:
        """Features ``(I, n)`` to tokens, written into ``out`` ``(n, O)``; bias included."""
        space = spaces[x.shape[1]]
        self._multiply(self._gathered_features(x, space), space.tokens_first, tokens_first=True)
        self._write(space, out)

    def workspaces(self, like: Tensor) -> Workspaces:
        """Memory for the chunks of one forward pass."""
        return Workspaces(self, like)

    def _gathered(self, x: Tensor, space: Workspace) -> Iterator[Tensor]:
        """``(g, k q, n)`` of every group, from tokens ``(n, I)``: what its blocks multiply. Overwritten by the next."""
        if self.block[0] < TALL and self.in_features < self.out_features:
            yield from self._gathered_features(x.t().contiguous(), space)
            return
        q, n = self.block[1], len(x)
        source = x.reshape(-1, q)
        for (g, k, _, _), places in zip(self.parts(), space.places(), strict=True):
            gathered = space.gathered[: n * g * k * q].view(-1, q)
            torch.index_select(source, 0, places, out=gathered)
            yield gathered.view(n, g, k * q).permute(1, 2, 0)

    def _gathered_features(self, x: Tensor, space: Workspace) -> Iterator[Tensor]:
        """The same, from features ``(I, n)``."""
        q, n = self.block[1], x.shape[1]
        source = x.view(-1, q * n)
        for g, k, _, columns in self.parts():
            gathered = space.gathered[: g * k * q * n].view(g * k, q * n)
            torch.index_select(source, 0, columns, out=gathered)
            yield gathered.view(g, k * q, n)

    def _multiply(self, gathered: Iterator[Tensor], out: Tensor, *, tokens_first: bool) -> None:
        """Fill the block rows that keep something, in the order of the groups."""
        start = 0
        for (g, _, values, _), block in zip(self.parts(), gathered, strict=True):
            rows = out[start : start + g]
            if tokens_first:
                torch.bmm(block.transpose(1, 2), values.transpose(1, 2), out=rows)  # (g, n, p)
            else:
                torch.bmm(values, block, out=rows)  # (g, p, n)
            start += g

    def _write(self, space: Workspace, out: Tensor) -> None:
        """The block rows in their order, and the bias, into ``out`` ``(n, O)``."""
        rows = space.tokens_first
        rows = (rows[: self.live] if self.in_order else rows.index_select(0, self.position)).transpose(0, 1)
        blocks = out.view(len(out), len(self.position), self.block[0])  # (n, R, p)
        if self.bias is None:
            blocks.copy_(rows)
        else:
            torch.add(rows, self.bias.view(-1, self.block[0]), out=blocks)

    def _traced(self, features: Tensor) -> Tensor:
        """``(I, n)`` to ``(O, n)`` without the bias, in operations that exporters and compilers follow."""
        p, q = self.block
        source = features.reshape(self.in_features // q, q, -1)
        rows = [
            torch.matmul(values, source.index_select(0, columns).reshape(g, k * q, -1))
            for g, k, values, columns in self.parts()
        ]
        rows.append(torch.zeros_like(features[:1]).expand(p, -1)[None])
        return torch.cat(rows).index_select(0, self.position).reshape(self.out_features, -1)

    def extra_repr(self) -> str:
        kept = sum(g * k for g, k in self.groups)
        p, q = self.block
        total = self.out_features * self.in_features // (p * q)
        return f"{self.in_features} -> {self.out_features}, {kept} of {total} blocks of {p} x {q}"


class Workspace:
    """Memory for one chunk of n tokens: allocated once, used for every chunk of that size."""

    def __init__(self, layer: BlockLinear, n: int, like: Tensor) -> None:
        p, q = layer.block
        self.gathered = like.new_empty(max((g * k for g, k in layer.groups), default=0) * q * n)
        rows = like.new_empty((layer.live + 1) * p * n)
        rows[layer.live * p * n :].zero_()  # the block of rows that keep nothing
        self.tokens_first = rows.view(layer.live + 1, n, p)
        self.features_first = rows.view(layer.live + 1, p, n)
        self._layer, self._n, self._places = layer, n, list[Tensor]()

    def places(self) -> Sequence[Tensor]:
        """int32 ``(n g k,)`` of every group: where its blocks lie among all blocks of q numbers of ``(n, I)``.

        Selecting along the first dimension takes half the time of selecting the columns along the second.
        """
        if not self._places:
            across = self._layer.in_features // self._layer.block[1]
            for _, _, _, columns in self._layer.parts():
                first = torch.arange(0, self._n * across, across, device=columns.device, dtype=torch.int32)
                self._places.append((first[:, None] + columns.int()).flatten())
        return self._places


class Workspaces(dict[int, Workspace]):
    """One for every size of a chunk: there are two sizes at most."""

    def __init__(self, layer: BlockLinear, like: Tensor) -> None:
        super().__init__()
        self.layer, self.like = layer, like

    def __missing__(self, n: int) -> Workspace:
        self[n] = Workspace(self.layer, n, self.like)
        return self[n]


def tokens_of(x: Tensor, in_features: int) -> Tensor:
    """``(..., I)`` as ``(N, I)``. Raises ``InputError`` for another width, and where a gradient is asked for."""
    if x.shape[-1] != in_features:
        raise InputError(f"this layer takes (..., {in_features}); found {tuple(x.shape)}")
    if x.requires_grad and torch.is_grad_enabled() and not is_traced():
        raise InputError(
            "an exported sparse layer is for inference and gives no gradient: use torch.inference_mode(), or train the "
            "dense model and export it again"
        )
    return x.reshape(-1, in_features)


def chunks(tokens: Tensor) -> Iterator[tuple[int, int]]:
    """Parts of ``(N, I)`` of about equal size."""
    most = CHUNK_TOKENS * torch.get_num_threads() if tokens.device.type == "cpu" else 1 << 16
    size = -(-len(tokens) // max(1, -(-len(tokens) // most)))
    for start in range(0, len(tokens), max(1, size)):
        yield start, min(start + size, len(tokens))


def is_traced() -> bool:
    """Whether an exporter or a compiler follows the operations: they want them all, without loops and workspaces."""
    return torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()
