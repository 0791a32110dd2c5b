"""CDCL: one network for several data sets, with batch normalisation of its own for each.

Wang, Li, Liu, Peng, Tian, Shan: *Cross-Dataset Collaborative Learning for Semantic Segmentation in Autonomous Driving*,
AAAI 2022, arXiv:2103.11351. Convolutions are shared; every data set has its own statistics, scales and shifts (the
dataset-aware block, section 3.1) and its own last layer; a step of training adds up the losses of one pure batch of
every data set (dataset alternation training, section 3.2). No code was released.

B batch, C channels; a *branch* is the batch normalisation, or the head, of one data set.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bowerbird.errors import InputError, UnknownNameError, did_you_mean

# Which data set each layer (by id) works for. A context variable: threads may use one model for different data sets.
_ACTIVE: ContextVar[Mapping[int, str] | None] = ContextVar("bowerbird_domain_active_dataset", default=None)


class _PerDataset(nn.Module):
    """A layer with one branch per data set, chosen by ``active_dataset`` or by name."""

    datasets: tuple[str, ...]

    def _set_datasets(self, datasets: Sequence[str]) -> None:
        names = () if isinstance(datasets, str) else tuple(datasets)
        if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
            raise InputError(f"datasets = {datasets!r}: expected a list of different names, one per data set")
        self.datasets = names

    def position(self, dataset: str) -> int:
        """Number of the branch of a data set. Raises ``UnknownNameError``."""
        try:
            return self.datasets.index(dataset)
        except ValueError:
            raise unknown_dataset(dataset, self.datasets) from None

    def _chosen(self, dataset: str | None) -> int:
        if dataset is None:
            dataset = (_ACTIVE.get() or {}).get(id(self))
        if dataset is None:
            raise InputError(
                f"no data set is active: a {type(self).__name__} must be told whose branch to take. Use `with "
                "active_dataset(model, NAME):`, forward(x, dataset=NAME), or a network for that data set alone "
                f"(export_single); names: {', '.join(self.datasets)}"
            )
        return self.position(dataset)


class DatasetBatchNorm2d(_PerDataset):
    """Batch normalisation with statistics, scale and shift of its own for every data set.

    Branch i is the module ``bns[i]``, an ordinary ``nn.BatchNorm2d``; so ``SyncBatchNorm.convert_sync_batchnorm`` makes
    its statistics those of all processes. All processes must then run the same branch at the same time.

    Args:
        num_features: C.
        datasets: Names of the data sets.
        eps, momentum, affine, track_running_stats: As of ``nn.BatchNorm2d``.

    Raises ``InputError`` without names, or with one twice.
    """

    def __init__(
        self,
        num_features: int,
        datasets: Sequence[str],
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__()
        self._set_datasets(datasets)
        self.num_features = num_features
        self.where = ""  # name of the layer that it replaced, for messages
        self.bns = nn.ModuleList(
            nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats) for _ in self.datasets
        )

    @classmethod
    def from_batchnorm(cls, norm: _BatchNorm, datasets: Sequence[str], *, where: str = "") -> Self:
        """Every branch begins as a copy of ``norm``: its statistics, scale, shift, mode, and its class."""
        layer = cls(norm.num_features, datasets)
        layer.bns = nn.ModuleList(copy.deepcopy(norm) for _ in layer.datasets)
        layer.where, layer.training = where, norm.training
        return layer

    def forward(self, x: Tensor, dataset: str | None = None) -> Tensor:
        """``(B, C, H, W)`` to the same shape.

        Args:
            x: Items of one data set.
            dataset: Its name; by default the one that ``active_dataset`` chose.

        Raises:
            InputError: No data set is active, C is another, or there is one value per channel to take statistics of.
            UnknownNameError: There is no such data set.
        """
        position = self._chosen(dataset)
        norm = self.bns[position]
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise InputError(
                f"layer {self.where or type(self).__name__!r}: expected (batch, {self.num_features}, ...), "
                f"found {tuple(x.shape)}"
            )
        takes_statistics = norm.training and not isinstance(norm, nn.SyncBatchNorm)
        if takes_statistics and x.numel() <= x.shape[1]:
            raise InputError(
                f"layer {self.where or type(self).__name__!r}, data set {self.datasets[position]!r}: batch statistics "
                f"need at least two values per channel; found input {tuple(x.shape)}. Use larger batches or pictures"
            )
        normalised: Tensor = norm(x)
        return normalised

    def extra_repr(self) -> str:
        return f"{self.num_features}, datasets={list(self.datasets)}"


class DatasetHeads(_PerDataset, nn.ModuleList):
    """One last layer per data set, because label spaces differ: ``heads(x)`` is that of the active data set.

    Args:
        heads: Name of the data set -> module. The order of the names is that of the branches.
    """

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__(heads.values())
        self._set_datasets(list(heads))

    def forward(self, x: Any, dataset: str | None = None) -> Any:
        """What the head of ``dataset`` makes of ``x``. Raises as ``DatasetBatchNorm2d.forward``."""
        return self[self._chosen(dataset)](x)


@contextmanager
def active_dataset(model: nn.Module, dataset: str) -> Iterator[None]:
    """Inside, every layer of ``model`` with a branch per data set works for ``dataset``.

    Holds for the calling thread (or asynchronous task) only and ends with the block. Blocks may be nested; the inner
    one counts. What runs the model in threads of its own (``nn.DataParallel``, activation checkpointing on a GPU) does
    not see it.

    Raises:
        UnknownNameError: A layer of the model does not know the data set.
        InputError: The model has no such layer.
    """
    layers = _layers(model)
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no layer with a branch per data set; make them with convert_batchnorm"
        )
    for layer in layers:
        layer.position(dataset)
    token = _ACTIVE.set({**(_ACTIVE.get() or {}), **{id(layer): dataset for layer in layers}})
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def datasets_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the data sets that ``model`` has branches for; empty for a model without such layers.

    Raises ``InputError`` where its layers know different data sets.
    """
    found = {layer.datasets: layer for layer in _layers(model)}
    if len({frozenset(names) for names in found}) > 1:
        raise InputError(f"layers of {type(model).__name__} know different data sets: {', '.join(map(str, found))}")
    return next(iter(found), ())


def unknown_dataset(name: object, known: Iterable[str], where: str = "") -> UnknownNameError:
    """The error for a data set that a model does not know."""
    names = list(known)
    return UnknownNameError(
        f"{where}there is no data set {name!r}; there are {', '.join(names) or 'none'}.{did_you_mean(str(name), names)}"
    )


def convert_batchnorm(model: nn.Module, datasets: Sequence[str]) -> nn.Module:
    """A copy of ``model`` whose batch normalisations have a branch per data set, all equal to the present one.

    Batch normalisation of one and three dimensions is converted as well. ``model`` itself is left as it is.

    Raises:
        InputError: The model has no batch normalisation, or has branches already.
    """
    if _layers(model, DatasetBatchNorm2d):
        raise InputError(f"{type(model).__name__} has a batch normalisation per data set already")
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise InputError(f"{type(model).__name__} has no batch normalisation, so there is nothing to make per data set")
    return _replaced(
        copy.deepcopy(model),
        lambda module, name: (
            DatasetBatchNorm2d.from_batchnorm(module, datasets, where=name) if isinstance(module, _BatchNorm) else None
        ),
    )


def export_single(model: nn.Module, dataset: str, *, fold: bool = False) -> nn.Module:
    """A copy of ``model`` for one data set: plain batch normalisation and head, the size of an ordinary network.

    Args:
        model: With branches.
        dataset: Whose branches to keep.
        fold: Also put batch normalisation into the convolution right before it, where ``torch.fx`` can follow the
            forward pass of the module that holds both. The copy is then in eval mode and no longer for training.

    Raises:
        UnknownNameError: There is no such data set.
        InputError: The model has no branches, or there is nothing to fold.
    """
    layers = _layers(model)
    if not layers:
        raise InputError(f"{type(model).__name__} has no branches per data set; it is for a single one already")
    for layer in layers:
        layer.position(dataset)

    def branch(module: nn.Module, _name: str) -> nn.Module | None:
        if isinstance(module, DatasetBatchNorm2d):
            return module.bns[module.position(dataset)]
        return module[module.position(dataset)] if isinstance(module, DatasetHeads) else None

    single = _replaced(copy.deepcopy(model), branch)
    return _folded(single.eval()) if fold else single


def alternation_step(
    model: nn.Module,
    batches: Mapping[str, Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, float] | None = None,
    accumulate: bool = True,
    *,
    strict: bool = True,
) -> dict[str, float]:
    """One step of dataset alternation training: one optimiser step on ``sum_i w_i L_i`` over one batch per data set.

    Args:
        model: With a branch per data set; or without, for joint training with everything shared.
        batches: Name of the data set -> its batch, whatever ``loss_fn`` reads.
        loss_fn: ``loss_fn(model, batch)`` runs the model on a batch, whose data set is active, and returns the scalar
            loss. With several processes ``model`` is wrapped with ``find_unused_parameters=True``.
        optimizer: Of the model's parameters; its gradients are cleared first.
        weights: ``w_i``, at least 0; 1 for data sets that are not named.
        accumulate: Backward pass after every forward pass, so that one graph is in memory at a time; else one backward
            pass of the sum. The gradients are the same.
        strict: A data set of the model without a batch is an error.

    Returns:
        Name of the data set -> its loss ``L_i``, without weight.

    Raises:
        UnknownNameError: A batch or weight of a data set that does not exist.
        InputError: No batch, one missing under ``strict``, a weight below 0, a loss that is no finite scalar. The
            optimiser has not moved then.
    """
    known = datasets_of(model)
    for name in batches:
        if known and name not in known:
            raise unknown_dataset(name, known, "batches: ")
    missing = [name for name in known if name not in batches]
    if not batches or (strict and missing):
        raise InputError(
            f"batches: a step needs a batch of every data set; missing: {', '.join(missing) or 'all'}. "
            "With strict=False those that are there are enough, as long as there is one"
        )
    factors = _checked_weights(weights or {}, batches, known)
    optimizer.zero_grad(set_to_none=True)
    losses: dict[str, Tensor] = {}
    total: Any = 0.0
    for position, (name, batch) in enumerate(batches.items()):
        with active_dataset(model, name) if known else nullcontext():
            waits = accumulate and isinstance(model, DistributedDataParallel) and position + 1 < len(batches)
            with model.no_sync() if waits else nullcontext():  # type: ignore[operator]
                loss = loss_fn(model, batch)
                if not isinstance(loss, Tensor) or loss.ndim:
                    found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                    raise InputError(f"loss_fn must return a scalar tensor; of data set {name!r} it returned {found}")
                if accumulate:
                    (factors[name] * loss).backward()
                else:
                    total = total + factors[name] * loss
        losses[name] = loss.detach()
    if not accumulate:
        total.backward()
    values = {name: float(loss) for name, loss in losses.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise InputError(f"the loss of data set {name!r} is {value}; the optimiser was not moved")
    optimizer.step()
    return values


def statistics_distances(model: nn.Module, *inputs: Any) -> dict[str, float]:
    """How far the statistics of a batch are from those of every data set. An addition of ours, not of the paper.

    The model runs once per data set, in eval mode. At every batch normalisation the mean and variance of its input
    (over batch and positions) are compared with the running ones of the branch by the divergence of two normal
    distributions, ``KL(N(batch) || N(running))``; the mean over channels, then over layers, is the distance.

    Args:
        model: With branches that have running statistics.
        inputs: What the model is called with: items of one data set, the more the better.

    Returns:
        Name of the data set -> its distance, 0 for equal statistics.

    Raises:
        InputError: The model has no batch normalisation per data set with running statistics.
    """
    layers = [layer for layer in _layers(model, DatasetBatchNorm2d) if layer.bns[0].track_running_stats]
    if not layers:
        raise InputError(f"{type(model).__name__} has no running statistics per data set to compare with")
    found: dict[str, list[Tensor]] = {name: [] for name in datasets_of(model)}

    def compare(layer: DatasetBatchNorm2d, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        position = layer._chosen(keywords.get("dataset", arguments[1] if len(arguments) > 1 else None))
        norm: Any = layer.bns[position]
        x = arguments[0].detach().transpose(0, 1).flatten(1).double()
        mean, variance = x.mean(dim=1), x.var(dim=1, correction=0) + norm.eps
        expected = norm.running_var.double() + norm.eps
        gap = (mean - norm.running_mean.double()).square()
        divergence = 0.5 * ((expected / variance).log() + (variance + gap) / expected - 1)
        found[layer.datasets[position]].append(divergence.mean())

    training = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_pre_hook(compare, with_kwargs=True) for layer in layers]
    try:
        model.eval()
        with torch.no_grad():
            for name in found:
                with active_dataset(model, name):
                    model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return {name: float(torch.stack(values).mean()) for name, values in found.items()}


def nearest_dataset(model: nn.Module, *inputs: Any) -> str:
    """The data set whose statistics are nearest to those of a batch of unknown origin; see ``statistics_distances``."""
    distances = statistics_distances(model, *inputs)
    return min(distances, key=distances.__getitem__)


# ------------------------------------------------------------------------------------------------------- helpers


def _layers(model: nn.Module, kind: type[Any] = _PerDataset) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def _checked_weights(
    weights: Mapping[str, float], batches: Mapping[str, Any], known: Sequence[str]
) -> dict[str, float]:
    accepted = [*dict.fromkeys([*known, *batches])]
    for name, weight in weights.items():
        if name not in accepted:
            raise unknown_dataset(name, accepted, "weights: ")
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"weights[{name!r}] = {weight}: expected a number of at least 0")
    return {name: float(weights.get(name, 1.0)) for name in batches}


def _replaced(model: nn.Module, replacement: Callable[[nn.Module, str], nn.Module | None]) -> nn.Module:
    """``model`` with modules exchanged in place; one that occurs twice is exchanged for one that occurs twice."""
    exchanged: dict[int, nn.Module] = {}
    originals = []  # kept alive, so that an id stays that of its module

    def visit(module: nn.Module, name: str) -> nn.Module:
        if id(module) not in exchanged:
            originals.append(module)
            new = replacement(module, name)
            exchanged[id(module)] = module if new is None else new
            if new is None:
                for child_name, child in module._modules.items():  # named_children leaves out repetitions
                    if child is not None:
                        module._modules[child_name] = visit(child, f"{name}.{child_name}".lstrip("."))
        return exchanged[id(module)]

    return visit(model, "")


class _LayerTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _folded(model: nn.Module) -> nn.Module:
    """``model`` (eval mode) with batch normalisation put into convolutions, in place."""
    names = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    pairs = [
        (conv, norm) for conv, norm in _foldable(model) if names.count(id(conv)) == 1 and names.count(id(norm)) == 1
    ]
    if not pairs:
        raise InputError(
            f"{type(model).__name__}: found no convolution that only a batch normalisation follows; use fold=False"
        )
    fused = {id(conv): fuse_conv_bn_eval(conv, norm) for conv, norm in pairs}
    fused |= {id(norm): nn.Identity() for _, norm in pairs}
    return _replaced(model, lambda module, _: fused.get(id(module)))


def _foldable(module: nn.Module) -> list[tuple[Any, Any]]:
    """Convolutions and the batch normalisations that alone read their results, each called once.

    Looked for in the largest modules whose forward pass can be followed without running it.
    """
    try:
        nodes = list(_LayerTracer().trace(module).nodes)
    except Exception:  # fx raises whatever the forward pass raises when it gets stand-ins for tensors
        return [pair for child in module.children() for pair in _foldable(child)]
    called = [node.target for node in nodes if node.op == "call_module"]
    modules = dict(module.named_modules())
    pairs = []
    for node in nodes:
        before = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        conv, norm = modules[before.target], modules[node.target]
        alone = len(before.users) == 1 and called.count(node.target) == 1 and called.count(before.target) == 1
        if alone and type(conv) in _CONVOLUTIONS and type(norm) in _PLAIN_NORMS and norm.running_var is not None:
            pairs.append((conv, norm))
    return pairs
