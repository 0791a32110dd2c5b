"""Devices and process groups. One process is the ordinary case: every function works without a group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from bowerbird.errors import InputError


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is the GPU of this process where there is one, else the CPU. Raises ``InputError``."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device(f"cuda:{local_rank() % torch.cuda.device_count()}")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} is unknown; accepted: auto, cpu, cuda, cuda:0, mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r}: PyTorch finds no GPU on this machine; use cpu or auto")
    return device


def rank() -> int:
    return distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    return distributed.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


def is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The process group that ``torchrun`` announced by its environment variables; nothing where it did not.

    A group that the caller has already opened is used and left open.
    """
    if is_distributed() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    _join_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def barrier() -> None:
    if is_distributed():
        distributed.barrier()


def gathered(values: Tensor) -> Tensor:
    """``values (B, ...)`` of all W processes by rank, ``(W B, ...)``; themselves where there is one process.

    With gradient: a process gets the sum of those that all processes have for its part. So a loss of the joined values,
    which is the same in every process, has the gradient of the joint batch.
    """
    if not is_distributed():
        return values
    joined: Tensor = _Gather.apply(values)
    return joined


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.size = len(values)
        parts = [torch.empty_like(values) for _ in range(world_size())]
        distributed.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total[rank() * ctx.size :][: ctx.size]


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is set in any process."""
    if not is_distributed():
        return flag
    value = torch.tensor(float(flag), device="cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return bool(value.item())


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes; the tensor itself where there is one."""
    if not is_distributed():
        return value
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total / world_size()


@contextmanager
def plain_data_group(*, threads: int) -> Iterator[None]:
    """A group of the processes that torchrun started, for ``from_main`` and ``from_all``, and ``threads`` for each.

    A process may wait in it for the others as long as a backfill takes.
    """
    _join_group("gloo", timeout=timedelta(days=30))
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's own default, for training
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _join_group(backend: str, *, timeout: timedelta | None = None) -> None:
    """``init_process_group`` by the variables that torchrun sets, also in processes that it started again.

    Its store keeps the addresses of the processes of an attempt that it has ended; one of the next
    attempt that read them would call a process that is gone. So the keys of each attempt have a name of their own.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(iter(rendezvous("env://")))
    if timeout is not None:
        store.set_timeout(timeout)
    attempt = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    distributed.init_process_group(backend, store=attempt, rank=rank, world_size=world, timeout=timeout)


def from_main(value: Any) -> Any:
    """The value that rank 0 gave, in every process."""
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


def from_all(value: Any) -> list[Any]:
    """The values of all processes by rank, in every process."""
    box: list[Any] = [None] * world_size()
    distributed.all_gather_object(box, value)
    return box
