"""The folder of a run, what is recorded in it, and how a finished run is read.

recipe.json, recipe.toml   the resolved recipe
environment.json           versions, platform, seed, git state, command
metrics.jsonl              one line per logged step
timing.json                time of the training loop since its last start, and how much of it waited for data
checkpoints/step-*/        the newest checkpoint
encoder/                   the exported encoder, with its classifier where the objective has one
metrics.json, per_query/   results of the evaluators
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bowerbird.batch import Batch
from bowerbird.encoders.bundle import load_encoder, read_classifier
from bowerbird.errors import RecipeError
from bowerbird.files import write_atomically, write_json
from bowerbird.protocols import BuildContext, Dataset, Encoder, TrainedRun
from bowerbird.recipe import Recipe
from bowerbird.registry import get_registry
from bowerbird.train.checkpoint import latest_checkpoint, load_checkpoint
from bowerbird.train.data import CachedTrunk, ordered_batches, to_device

# Settings that do not change what is learned: a run may be resumed with others.
FREE_SETTINGS = ("train.device", "train.workers", "train.log_every", "train.checkpoint_every")


class TrainContext(BuildContext):
    """What an objective may ask for while it is built for a run."""

    def __init__(self, dataset: Dataset, *, total_steps: int, seed: int, device: torch.device) -> None:
        self.dataset: Dataset = dataset
        self.classes = tuple(dataset.classes)
        self.total_steps, self.seed, self.device = total_steps, seed, device
        self.trunk: tuple[Encoder, CachedTrunk] | None = None  # of the encoder that is trained, where it is cached

    def load_run(self, path: str | Path) -> TrainedRun:
        return load_run(path)

    def eval_batches(self, encoder: Encoder, keys: Sequence[str] = ("image", "label")) -> Iterator[Batch]:
        if self.trunk is not None and _same_trunk(encoder, self.trunk[0]) and set(keys) <= {"image", "label", "index"}:
            positions = np.arange(len(self.dataset))
            chunks = [positions[start : start + 256] for start in range(0, len(positions), 256)]
            yield from (to_device(batch, self.device) for batch in self.trunk[1].batches(chunks))
        else:
            yield from ordered_batches(encoder, self.dataset, keys=keys, batch_size=64, device=self.device)


def _same_trunk(first: Encoder, second: Encoder) -> bool:
    """Whether both give the same output of their trunk: the same pictures through the same weights.

    Heads that were trained on one frozen trunk are common in an upgrade; the trunk then runs once for both.
    """
    one, other = getattr(first, "trunk", None), getattr(second, "trunk", None)
    if one is None or other is None or (type(first), type(one)) != (type(second), type(other)):
        return False
    if first.preprocessing != second.preprocessing:
        return False
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k].cpu(), theirs[k].cpu()) for k in ours)


def load_run(path: str | Path) -> TrainedRun:
    """A finished run, or an exported encoder, given its folder.

    Of an exported encoder ``objective_state`` holds only ``classifier.weight`` (where the folder has it) and ``recipe``
    only the encoder's table.

    Raises:
        RecipeError: There is no such folder, or the run is not finished.
    """
    path = Path(path)
    if not path.is_dir():
        raise RecipeError(f"run {str(path)!r}: there is no such folder; expected a finished run or an exported encoder")
    is_run = (path / "recipe.json").is_file()
    checkpoint = latest_checkpoint(path / "checkpoints")
    if is_run and not (path / "encoder" / "encoder.json").is_file():
        done = f"its last checkpoint is {checkpoint.name}" if checkpoint else "it has no checkpoint"
        raise RecipeError(f"run {str(path)!r} is not finished: {done}. Continue it with bowerbird train --resume auto")
    loaded = load_encoder(path, device="cpu")
    if is_run and checkpoint is not None:
        state = load_checkpoint(checkpoint).objective
        own = {key: value for key, value in state.items() if not key.startswith("encoder.")}
        recipe: Mapping[str, Any] = json.loads((path / "recipe.json").read_text())
    else:
        folder = loaded.spec.path
        classifier: Tensor | None = read_classifier(folder) if folder is not None else None
        own = {} if classifier is None else {"classifier.weight": classifier}
        recipe = {"encoder": {"use": loaded.spec.use, **loaded.spec.config}}
    return TrainedRun(path, loaded.module, own, loaded.spec.classes, recipe, loaded.fingerprint)


def start_folder(run_dir: Path, recipe: Recipe, *, resume: bool) -> bool:
    """Create the folder of a run, or check that the one that is there belongs to the same recipe.

    Returns whether it was created.

    Raises:
        RecipeError: The folder is in use and ``resume`` is false, or it is a run of another recipe.
    """
    saved = run_dir / "recipe.json"
    begun = not saved.is_file()
    if not begun:
        if not resume:
            raise RecipeError(
                f"{str(run_dir)!r} already holds a run. Continue it with --resume auto, "
                "or choose another folder with --out"
            )
        differing = _differences(json.loads(saved.read_text()), recipe.to_dict())
        if differing:
            raise RecipeError(
                f"{str(run_dir)!r} holds a run of another recipe; different: {', '.join(differing[:5])}. "
                "Resume with the same recipe, or choose another folder with --out"
            )
    elif run_dir.exists() and any(run_dir.iterdir()):
        raise RecipeError(f"{str(run_dir)!r} is not empty and holds no run; choose another folder with --out")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "environment.json", environment(recipe))
    write_atomically(run_dir / "recipe.toml", recipe.to_toml())
    write_json(saved, recipe.to_dict())
    return begun


def environment(recipe: Recipe) -> dict[str, Any]:
    """Versions, platform, seed and git state, for whoever repeats the run."""
    plugins = {status.distribution for status in get_registry().plugins if status.distribution}
    libraries = ["torch", "torchvision", "timm", "transformers", "pytorch-metric-learning"]
    libraries += ["numpy", "safetensors", "pydantic", "pillow"]
    wanted = ["bowerbird-core", *sorted(plugins), *libraries]
    return {
        "command": sys.argv,
        "seed": recipe.train.seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: version for name in dict.fromkeys(wanted) if (version := _version(name)) is not None},
        "git": git_state(Path.cwd()),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the working tree at ``folder`` and whether it has changes; ``None`` outside a tree or without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(git("status", "--porcelain"))} if commit else None
    except (OSError, subprocess.TimeoutExpired):
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = dict.fromkeys([*old, *new])
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    if old == new or path in FREE_SETTINGS:
        return []
    return [f"{path} ({old!r} there, {new!r} now)"]
