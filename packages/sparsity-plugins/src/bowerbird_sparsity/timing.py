"""Calling a model with its sample, and timing calls beside each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SECONDS = 0.25  # of timing per call, about
LEAST_TURNS = 5  # however long they take: on a busy machine the shortest of a few is no measure


def call(model: nn.Module, sample: Any) -> Any:
    """``model(sample)``; a tuple is its positional arguments."""
    return model(*sample) if isinstance(sample, tuple) else model(sample)


@torch.inference_mode()
def input_shapes(model: nn.Module, sample: Any) -> dict[str, tuple[int, ...]]:
    """The shape of the first input of every layer that ``model(sample)`` calls, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, module in model.named_modules():

        def remember(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            if args and isinstance(args[0], Tensor):
                shapes.setdefault(name, tuple(args[0].shape))

        handles.append(module.register_forward_pre_hook(remember))
    was_training = model.training
    try:
        call(model.eval(), sample)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return shapes


@torch.inference_mode()
def time_in_turns(calls: Mapping[Any, Callable[[], Any]], *, seconds: float | None = None) -> dict[Any, float]:
    """The shortest time of every call in seconds. They take turns, so that a busy moment of the machine meets all."""
    for one in calls.values():
        one()
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + (SECONDS if seconds is None else seconds) * len(calls)
    for turn in range(100):
        if turn >= LEAST_TURNS and time.perf_counter() > end:
            break
        for name, one in calls.items():
            _synchronize()
            start = time.perf_counter()
            one()
            _synchronize()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


@torch.inference_mode()
def largest_difference(one: nn.Module, other: nn.Module, sample: Any) -> float:
    """Of the outputs, over the largest output; infinite where their shapes differ. Both are called in eval mode."""
    modes = one.training, other.training
    try:
        first, second = (list(_tensors(call(module.eval(), sample))) for module in (one, other))
    finally:
        one.train(modes[0])
        other.train(modes[1])
    if [t.shape for t in first] != [t.shape for t in second]:
        return float("inf")
    scale = max((float(t.abs().max()) for t in first if t.numel()), default=0.0) or 1.0
    return (
        max((float((a - b).abs().max()) for a, b in zip(first, second, strict=True) if a.numel()), default=0.0) / scale
    )


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors of an output, whatever holds them."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif hasattr(output, "__dataclass_fields__"):
        for name in output.__dataclass_fields__:
            yield from _tensors(getattr(output, name))


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
