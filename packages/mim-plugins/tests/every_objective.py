"""A small recipe of every objective, and a process that trains them through the command line.

    python every_objective.py FOLDER

trains every recipe three times by ``bowerbird train``: undisturbed, killed by SIGKILL in the middle, and resumed. Each
command runs in a process of its own, forked from one that has imported everything but computed nothing: importing torch
thirty times would take minutes.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from bowerbird.data import subset
from bowerbird.data.digits import Digits
from bowerbird.hookspecs import hookimpl
from bowerbird.protocols import Dataset
from bowerbird.records import DatasetRecord
from bowerbird.registry import get_registry

VIT = {
    "use": "mim:vit", "image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0
}  # fmt: skip
HEADS = {"out_dim": 12, "head_hidden": 16, "head_bottleneck": 8, "local_size": 8, "local_crops": 2}
PIXELS = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
TOKENIZER = "tokenizer"  # folder of the run that beit and mc-beit name, in the folder of all runs
KILLED_AT = 4

# name -> encoder, objective, more of the training settings
OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "mim:tokenizer": (
        {"use": "mim:dvae", "image_size": 16, "num_tokens": 6, "codebook_dim": 5, "hidden_dim": 4, "num_layers": 2},
        {}, {},
    ),
    "mim:beit": (VIT | {"use": "mim:beit-vit"}, {"tokenizer": TOKENIZER}, {}),
    "mim:dino": (VIT | {"position": "learned", "pooling": "class"}, HEADS, {"clip_norm": 3.0}),
    "mim:emae": (VIT, PIXELS, {}),
    "mim:mae": (VIT, PIXELS, {}),
    "mim:mc-beit": (VIT | {"use": "mim:beit-vit"}, {"tokenizer": TOKENIZER}, {}),
    "mim:mst": (VIT | {"position": "learned", "pooling": "class"}, HEADS, {}),
    "mim:pass": (VIT | {"use": "mim:part-vit"}, HEADS, {}),
    "mim:reid-finetune": (VIT | {"use": "mim:part-vit"}, {}, {"items_per_class": 4}),
    "mim:saim": (VIT, {"blur_size": 3}, {}),
    "mim:univip": (
        VIT | {"pooling": "class"},
        {"hidden_dim": 16, "out_dim": 8, "instance_size": 8, "min_side": 2, "num_instances": 2},
        {},
    ),
}  # fmt: skip


@hookimpl
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    yield DatasetRecord(
        name="few:digits",
        target="every_objective:FewDigits",
        summary="Two hundred digits.",
        provides=("image", "label"),
    )


class FewDigits:
    @classmethod
    def build(cls, config: None, split: str | None) -> Dataset:
        return subset(all_digits(), range(200))


@cache
def all_digits() -> Dataset:
    return Digits.build(None, "test")


BOWERBIRD_API = "1.0"


def recipe(name: str, folder: Path, **train: Any) -> dict[str, Any]:
    """Two epochs of three steps; ``folder`` holds the run of the tokenizer."""
    encoder, objective, more = OBJECTIVES[name]
    if "tokenizer" in objective:
        objective = {**objective, "tokenizer": str(folder / TOKENIZER)}
    settings = {
        "epochs": 2, "batch_size": 60, "lr": 1e-3, "weight_decay": 0.05, "log_every": 1, "checkpoint_every": 3,
        "device": "cpu",
    }  # fmt: skip
    return {
        "name": "small",
        "encoder": encoder,
        "objective": {"use": name, **objective},
        "dataset": {"use": "few:digits"},
        "train": {**settings, **more, **train},
    }


def register() -> None:
    """Make the data set known to this process."""
    if all(status.name != "few" for status in get_registry().plugins):
        get_registry().register_module("few", importlib.import_module("every_objective"))


def made(name: str, folder: Path) -> tuple[Any, Any]:
    """A fresh objective before its first step, and a batch of eight items; the same every time."""
    import torch

    from bowerbird.recipe import resolve_recipe
    from bowerbird.train.data import TrainItems, collate
    from bowerbird.train.loop import build
    from bowerbird.train.run import TrainContext

    resolved = resolve_recipe(recipe(name, folder))
    torch.manual_seed(0)
    encoder = build(resolved.encoder, "encoder").train()
    dataset = build(resolved.dataset, "dataset", None)
    context = TrainContext(dataset, total_steps=10, seed=0, device=torch.device("cpu"))
    objective = build(resolved.objective, "objective", encoder, context).train()
    items = TrainItems(dataset, encoder.preprocessing, augment="none", seed=0, transform=objective.item_transform())
    objective.before_step(0)
    return objective, collate([items[0, i] for i in range(8)])


def run_folder(name: str, kind: str, folder: Path) -> Path:
    if name == "mim:tokenizer" and kind == "undisturbed":
        return folder / TOKENIZER
    return folder / f"{name.removeprefix('mim:')}-{kind}"


class Killer:
    """A plugin that kills its process where step ``KILLED_AT`` is logged, between two checkpoints."""

    BOWERBIRD_API = "1.0"

    @hookimpl
    def bowerbird_step_logged(self, step: int) -> None:
        if step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def in_a_process(arguments: list[str], *, killed: bool) -> int:
    """Exit status of ``bowerbird ARGUMENTS``, negative for a signal."""
    child = os.fork()
    if child == 0:
        from bowerbird.cli import main

        try:
            if killed:
                get_registry().register_module("killer", Killer())
            main(arguments, standalone_mode=False)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def commands(folder: Path) -> Iterator[tuple[list[str], bool]]:
    from bowerbird.recipe import to_toml

    for name in OBJECTIVES:
        file = folder / f"{name.removeprefix('mim:')}.toml"
        file.write_text(to_toml(recipe(name, folder)))
        for kind in ("undisturbed", "killed", "resumed"):
            out = run_folder(name, "undisturbed" if kind == "undisturbed" else "killed", folder)
            more = ["--resume", "auto"] if kind == "resumed" else []
            yield ["train", str(file), "--out", str(out), *more], kind == "killed"


def main(folder: Path) -> None:
    import torch

    import bowerbird_mim.evaluators  # noqa: F401

    torch.set_num_threads(1)
    register()
    all_digits()
    wrong = []
    for arguments, killed in commands(folder):
        status = in_a_process(arguments, killed=killed)
        if status != (-signal.SIGKILL if killed else 0):
            wrong.append(f"bowerbird {' '.join(arguments)}: exit status {status}")
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
