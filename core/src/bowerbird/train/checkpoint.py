"""Checkpoints: one folder per kept step with tensors as safetensors and everything else as JSON.

A folder appears whole or not at all. Loading executes no code. With several processes each one's random state is kept.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from bowerbird import dist
from bowerbird.errors import DataError
from bowerbird.files import atomic_folder, write_json

FORMAT = 1
STATE = "state.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is. ``step``: optimiser steps done; ``step_in_epoch``: those of them in epoch ``epoch``."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    finished: bool = False


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    progress: Progress
    objective: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    random_states: list[dict[str, Any]]


def save_checkpoint(
    folder: Path, *, progress: Progress, objective: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Path:
    """Write ``folder/step-<step>`` and remove the older ones. Called by every process; the main one writes."""
    states = _gathered(random_state())
    path = folder / f"step-{progress.step:08d}"
    if dist.is_main():
        tensors, plain = _pack_optimizer(optimizer.state_dict())
        with atomic_folder(path) as temporary:
            save_file(_copied(objective.state_dict()), temporary / "objective.safetensors")
            save_file(tensors, temporary / "optimizer.safetensors")
            write_json(
                temporary / STATE,
                {"format": FORMAT, "progress": vars(progress), "optimizer": plain, "random": states},
            )
        for other in folder.glob("step-*"):
            if other != path:
                shutil.rmtree(other)
    dist.barrier()
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, or ``None``."""
    found = sorted(path for path in folder.glob("step-*") if (path / STATE).is_file())
    return found[-1] if found else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Raises ``DataError`` where a file is damaged or of another format."""
    try:
        state = json.loads((path / STATE).read_text())
        if state.get("format") != FORMAT:
            raise DataError(f"checkpoint {str(path)!r} has format {state.get('format')!r}; this version reads {FORMAT}")
        return Checkpoint(
            path=path,
            progress=Progress(**state["progress"]),
            objective=load_file(path / "objective.safetensors"),
            optimizer=_unpack_optimizer(load_file(path / "optimizer.safetensors"), state["optimizer"]),
            random_states=state["random"],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"checkpoint {str(path)!r} cannot be read: {error}. Remove it to start again") from error


def random_state() -> dict[str, Any]:
    """The state of the global generators of Python, numpy and torch as plain data."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  plugins may use the global one
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda": [bytes(s.tolist()).hex() for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_bytes_tensor(s) for s in state["cuda"]])


def _bytes_tensor(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _gathered(state: dict[str, Any]) -> list[dict[str, Any]]:
    if not dist.is_distributed():
        return [state]
    states: list[Any] = [None] * dist.world_size()
    distributed.all_gather_object(states, state)
    return states


def _copied(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Own copies on the CPU: safetensors refuses tensors that share memory (tied weights)."""
    return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}


def _pack_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, plain = {}, {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.detach().cpu().clone().contiguous()
            else:
                plain[f"{index}.{key}"] = value
    return tensors, {"plain": plain, "param_groups": state["param_groups"]}


def _unpack_optimizer(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *plain["plain"].items()]:
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": plain["param_groups"]}
