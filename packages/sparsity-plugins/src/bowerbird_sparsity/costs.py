"""What keeping a weight costs: parameters, multiplications, or measured time. The budget is a share of the total.

A cost model has ``cost(name, module, weight, block_size)``, and may have ``prepare(model, names)``, which is called
once with the whole model and the names of the layers before the first cost is asked.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bowerbird.errors import InputError, did_you_mean


@runtime_checkable
class CostModel(Protocol):
    """Linear costs: what a masked model costs is the sum of the costs of its kept entries."""

    def cost(self, name: str, module: nn.Module, weight: Tensor, block_size: Sequence[int]) -> Tensor:
        """Cost of the entries of a layer's mask.

        Args:
            name: Of the layer, as in ``model.named_modules()``; projections of attention with the parameter's name.
            module: The layer.
            weight: Its dense weight.
            block_size: Weights of an entry in every dimension of ``weight``.

        Returns:
            One number where all entries cost the same, or a tensor of the mask's shape; positive.
        """
        ...


class ParameterCost:
    """Every weight costs 1."""

    def cost(self, name: str, module: nn.Module, weight: Tensor, block_size: Sequence[int]) -> Tensor:
        return torch.tensor(float(math.prod(block_size)))


class FlopsCost:
    """Multiplications of one item: a weight costs as many as there are places at which its layer is applied.

    Those are the pixels of a convolution's output, the tokens of a linear layer's input (of attention: the queries of
    the projections of queries and outputs, the keys of those of keys and values), and 1 where a linear layer gets one
    vector per item. Until a model was seen it is 1 everywhere.

    Args:
        sample_input: What the model is called with to see the sizes: a tensor, or a batch; one item is enough.
    """

    def __init__(self, sample_input: Any = None) -> None:
        self.sample_input = sample_input
        self.places: Counter[str] = Counter()
        self.packed: dict[str, tuple[int, int, int]] = {}  # one weight for queries, keys, values: places of its thirds

    def prepare(self, model: nn.Module, names: Sequence[str]) -> None:
        """Call ``model`` once, in eval mode, and count. Raises ``InputError`` where there is no sample."""
        if self.sample_input is None:
            raise InputError("FlopsCost needs a sample_input to see the sizes of the layers' outputs; give one batch")
        self.places.clear()
        self.packed.clear()
        layers: dict[str, nn.Module] = {}
        hooks = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                layers[name] = module
                hooks.append(module.register_forward_hook(self._counter(name)))
            elif isinstance(module, nn.MultiheadAttention):
                hooks.append(module.register_forward_hook(self._attention_counter(name), with_kwargs=True))
        modes = {module: module.training for module in model.modules()}
        try:
            model.eval()
            with torch.no_grad():
                model(self.sample_input)
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in modes.items():
                module.training = mode
        unused = [name for name in names if name in layers and not self.places[name]]
        if unused:
            raise InputError(
                f"FlopsCost: the sample never reached layer {unused[0]!r}, so that its cost is not known; name other "
                "layers, or give a sample that reaches it"
            )

    def _counter(self, name: str) -> Any:
        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            convolution = isinstance(module, nn.Conv2d)
            self.places[name] += math.prod(output.shape[-2:]) if convolution else math.prod(output.shape[1:-1])

        return count

    def _attention_counter(self, name: str) -> Any:
        def count(module: nn.MultiheadAttention, inputs: Any, named: Mapping[str, Any], output: Any) -> None:
            given = dict(zip(("query", "key", "value"), inputs, strict=False)) | dict(named)
            axis = 1 if module.batch_first and given["query"].ndim == 3 else 0
            queries, keys, values = (int(given[part].shape[axis]) for part in ("query", "key", "value"))
            start = f"{name}." if name else ""
            self.places[f"{start}out_proj"] += queries
            for part, places in (("q", queries), ("k", keys), ("v", values)):
                self.places[f"{start}{part}_proj_weight"] += places
            before = self.packed.get(f"{start}in_proj_weight", (0, 0, 0))
            self.packed[f"{start}in_proj_weight"] = (before[0] + queries, before[1] + keys, before[2] + values)

        return count

    def cost(self, name: str, module: nn.Module, weight: Tensor, block_size: Sequence[int]) -> Tensor:
        thirds = self.packed.get(name, ())
        if len(set(thirds)) > 1:  # attention to other tokens than its own
            rows = torch.tensor(thirds, dtype=torch.float32).repeat_interleave(len(weight) // 3)
            costs = rows.view(-1, block_size[0]).sum(dim=1, keepdim=True) * block_size[1]
            return costs.expand(-1, weight.shape[1] // block_size[1])
        places = thirds[0] if thirds else self.places[name]
        return torch.tensor(float(math.prod(block_size) * (places or 1)))


class LatencyCost:
    """Measured time: the entries of a layer share what the dense layer takes.

    Args:
        table: Name of a layer -> seconds, or any other unit, of the dense layer.

    Costs are scaled so that a weight costs 1 on average over the sparse layers: the sharpness then means the same as
    with ``ParameterCost``.
    """

    def __init__(self, table: Mapping[str, float]) -> None:
        self.table = dict(table)
        wrong = [name for name, seconds in self.table.items() if not (math.isfinite(seconds) and seconds > 0)]
        if wrong:
            raise InputError(f"LatencyCost: the table says {self.table[wrong[0]]} for {wrong[0]!r}; times are above 0")
        self.scale = 1.0

    def prepare(self, model: nn.Module, names: Sequence[str]) -> None:
        modules = dict(model.named_modules())
        # The name of a layer, or of a projection of attention.
        weights = {name: modules[name].weight if name in modules else model.get_parameter(name) for name in names}
        count = sum(weight.numel() for weight in weights.values())
        self.scale = sum(self._seconds(name) for name in weights) / count

    def cost(self, name: str, module: nn.Module, weight: Tensor, block_size: Sequence[int]) -> Tensor:
        return torch.tensor(self._seconds(name) * math.prod(block_size) / weight.numel() / self.scale)

    def _seconds(self, name: str) -> float:
        """Raises ``InputError`` for a layer that the table does not know."""
        if name not in self.table:
            raise InputError(
                f"LatencyCost: the table has no time for layer {name!r}.{did_you_mean(name, self.table)} It knows "
                f"{', '.join(self.table) or 'none'}; measure the layer, or name other layers"
            )
        return self.table[name]
