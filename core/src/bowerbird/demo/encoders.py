"""The three encoders of the demo: the same frozen ImageNet trunk (EfficientNet-Lite0) with three projections.

The settings were chosen on the split ``validation`` of the seen concepts, never on the unseen ones that the demo
measures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bowerbird.encoders import LoadedEncoder, load_encoder
from bowerbird.recipe import Recipe, resolve_recipe
from bowerbird.train.loop import train

ENCODER = {
    "use": "core:efficientnet-lite",
    "model": "lite0",
    "image_size": 96,  # emoji are 64 px: larger costs more than it gains
    "embed_dim": 128,
    "freeze_trunk": True,
}
COSINE = {"use": "core:softmax", "cosine": True, "scale": 16.0}


def recipes(old_run: Path, *, seed: int, epochs: int, new_split: str = "new-train") -> dict[str, Recipe]:
    """Recipes by name, in the order in which they must be trained: BCT reads the old run."""
    bct = {
        "use": "compat:bct",
        "old_run": str(old_run),
        "old_classifier": "prototypes",  # the old model knows 100 of the 448 concepts
        "influence_weight": 10.0,
        "classifier": "cosine",
        "scale": 16.0,
        "measure": False,  # the demo measures it
    }
    objectives: dict[str, tuple[dict[str, Any], str, int]] = {
        "old": (COSINE, "old-train", seed),
        "new": (COSINE, new_split, seed + 1),  # another seed: an honest incompatible pair
        "bct": (bct, new_split, seed + 1),
    }
    return {
        name: resolve_recipe(
            {
                "name": f"demo-{name}",
                "encoder": ENCODER,
                "objective": objective,
                "dataset": {"use": "emoji:styles", "split": split},
                "train": {
                    "epochs": epochs, "batch_size": 128, "lr": 1e-3, "weight_decay": 1e-4, "cache_trunk": True,
                    "seed": run_seed,
                },
            },
            where=f"demo encoder {name!r}",
        )
        for name, (objective, split, run_seed) in objectives.items()
    }  # fmt: skip


def train_encoder(recipe: Recipe, run_dir: Path, *, show: bool) -> LoadedEncoder:
    if not train(recipe, run_dir, show=show).finished:
        raise KeyboardInterrupt  # which training turns into a checkpoint; the demo ends
    return load_encoder(run_dir)


def is_trained(recipe: Recipe, run_dir: Path) -> bool:
    """Whether ``run_dir`` has the encoder of a finished run of exactly this recipe."""
    try:
        same = json.loads((run_dir / "recipe.json").read_text()) == recipe.to_dict()
    except (OSError, ValueError):
        return False
    return same and (run_dir / "encoder" / "encoder.json").is_file()  # written last, as a whole
