"""The other sparse layers: compact rows and columns, torch's sparse weights, and a perceptron computed as one.

I inputs, H hidden units, O outputs, N tokens, n tokens of a chunk.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird_sparsity.block_linear import BlockLinear, chunks, is_traced, tokens_of

# Activations that work on every number by itself: they do not care which way a matrix lies.
ELEMENTWISE = (
    nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.ELU,
    nn.SELU, nn.CELU, nn.Mish, nn.Softplus,
)  # fmt: skip
# What does nothing in eval mode.
INERT = (nn.Identity, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)


class RowsLinear(nn.Module):
    """A linear layer without dead rows (outputs that are their bias) and dead columns (inputs that nobody reads)."""

    rows: Tensor | None
    columns: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        kept = weight.detach() != 0
        rows, columns = kept.any(dim=1), kept.any(dim=0)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach()[rows][:, columns].clone(), requires_grad=False)
        self.register_buffer("rows", None if rows.all() else rows.nonzero()[:, 0])
        self.register_buffer("columns", None if columns.all() else columns.nonzero()[:, 0])
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

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
            return F.linear(x, self.weight, self.bias)
        y = F.linear(x, self.weight)
        full = y.new_zeros(*y.shape[:-1], self.out_features).index_copy(-1, self.rows, y)
        return full if self.bias is None else full + self.bias

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"{self.in_features} -> {self.out_features}, {rows} rows and {columns} columns are left"


class SparseLinear(nn.Linear):
    """An ``nn.Linear`` whose ``weight`` is a CSR or BSR tensor. For inference.

    Two things keep torch's sparse weights from serving as they are. A plain ``nn.Linear`` with one can neither be
    copied nor moved, and fails on matrices in inference mode. And on a processor torch's kernel is the slower the more
    tokens it gets at once: they go through in chunks (at 90 % zeros and 3000 tokens, 4 times faster).
    """

    weight: nn.Parameter

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Linear, block: tuple[int, int] | None = None) -> Self:
        """In CSR, or in blocks (BSR)."""
        weight = linear.weight.detach()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse .*")  # a note that they are new in torch
            if block is not None:
                return cls(weight.to_sparse_bsr(block), linear.bias)
            sparse = weight.to_sparse_csr()
            # MKL and cuSPARSE count in 32 bits: otherwise torch would convert the indices at every call.
            indices = sparse.crow_indices().int(), sparse.col_indices().int()
            return cls(torch.sparse_csr_tensor(*indices, sparse.values(), sparse.shape), linear.bias)

    def dense_weight(self) -> Tensor:
        return self.weight.detach().to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``. Raises ``InputError`` where a gradient is asked for."""
        flat = tokens_of(x, self.in_features).to(self.weight.dtype)
        if is_traced():
            return F.linear(x, self.dense_weight(), self.bias)
        y = flat.new_empty(len(flat), self.out_features)
        for start, end in chunks(flat):
            # Three dimensions: two fail in inference mode.
            y[start:end] = F.linear(flat[None, start:end], self.weight, self.bias)[0]
        return y.view(*x.shape[:-1], self.out_features)

    def to_features(self, x: Tensor, spaces: object = None) -> Tensor:
        """Tokens ``(n, I)`` to features ``(O, n)``, bias included."""
        return self._product(x.t().contiguous())

    def from_features(self, x: Tensor, spaces: object, out: Tensor) -> None:
        """Features ``(I, n)`` to tokens, written into ``out`` ``(n, O)``; bias included."""
        out.copy_(self._product(x).t())

    def _product(self, x: Tensor) -> Tensor:  # (I, n) -> (O, n)
        if self.bias is None:
            return torch.sparse.mm(self.weight, x)
        return torch.addmm(self.bias[:, None], self.weight, x)

    def workspaces(self, like: Tensor) -> Any:
        """It needs none."""

    def _with_weight(self, weight: Tensor, bias: Tensor | None) -> SparseLinear:
        return type(self)(weight, bias).train(self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseLinear:
        bias = None if self.bias is None else copy.deepcopy(self.bias, memo)
        return self._with_weight(self.weight.detach().clone(), bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # nn.Module would move the weight by way of .data, which sparse tensors do not have.
        weight = self.weight.detach()
        make = torch.sparse_csr_tensor if weight.layout == torch.sparse_csr else torch.sparse_bsr_tensor
        values = fn(weight.values())
        crow, column = weight.crow_indices().to(values.device), weight.col_indices().to(values.device)
        moved = make(crow, column, values, weight.shape)
        del self.weight
        super()._apply(fn, recurse)
        self.weight = nn.Parameter(moved, requires_grad=False)
        return self


FeatureLayer = BlockLinear | SparseLinear


class SparseMlp(nn.Module):
    """Linear, activation, linear, chunk by chunk: what lies between the two layers never leaves the cache.

    Args:
        fc1: First layer, I to H, in blocks or with a sparse weight.
        act: An activation of single numbers (``ELEMENTWISE``).
        fc2: Second layer, H to O.
    """

    order: Tensor
    fc1: FeatureLayer
    fc2: FeatureLayer

    def __init__(self, fc1: FeatureLayer, act: nn.Module, fc2: FeatureLayer) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = fc1, act, fc2
        order = torch.arange(fc1.out_features)
        if isinstance(fc1, BlockLinear) and isinstance(fc2, BlockLinear) and not fc1.in_order:
            p, q = fc1.block[0], fc2.block[1]
            if p % q == 0:
                # The hidden units may stand in any order: in that in which the first layer makes them, none is moved.
                order = order.view(-1, p)[fc1.position.cpu().argsort(stable=True)].flatten()
                bias = None if fc1.bias is None else fc1.bias[order]
                self.fc1 = BlockLinear(fc1.dense_weight()[order], bias, fc1.block)
                self.fc2 = BlockLinear(fc2.dense_weight()[:, order], fc2.bias, fc2.block)
        self.register_buffer("order", order)

    def dense_layers(self) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Weight and bias of both layers, as they were given."""
        back = self.order.argsort()
        bias = None if self.fc1.bias is None else self.fc1.bias[back]
        return (self.fc1.dense_weight()[back], bias), (self.fc2.dense_weight()[:, back], self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``."""
        if is_traced():
            return self.fc2(self.act(self.fc1(x)))
        flat = tokens_of(x, self.fc1.in_features)
        y = flat.new_empty(len(flat), self.fc2.out_features)
        first, second = self.fc1.workspaces(flat), self.fc2.workspaces(flat)
        for start, end in chunks(flat):
            hidden = self.fc1.to_features(flat[start:end], first)
            self.fc2.from_features(self.act(hidden), second, y[start:end])
        return y.view(*x.shape[:-1], self.fc2.out_features)
