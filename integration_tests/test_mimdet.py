"""From a masked autoencoder to a detector: bowerbird-mim trains, bowerbird-detection takes encoder and decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bowerbird.errors import DataError
from bowerbird.recipe import load_recipe
from bowerbird.train.checkpoint import latest_checkpoint, load_checkpoint
from bowerbird.train.loop import train
from bowerbird_detection.mimdet_config import MIMDetConfig
from bowerbird_detection.mimdet_detector import MIMDetDetector

RECIPES = Path(__file__).parents[1] / "recipes"
SHORT = ["dataset.count=16", "train.epochs=1", "train.warmup=0", "train.workers=0", "train.device=cpu"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "canvases-mae"
    recipe = load_recipe(RECIPES / "canvases-mae.toml", overrides=[*SHORT, "train.batch_size=16"])
    assert train(recipe, run).finished
    return run


def test_the_small_recipe_starts_from_the_autoencoders_run_and_detects(pretrained: Path, tmp_path: Path) -> None:
    settings = [*SHORT, f"encoder.init={pretrained}", "train.batch_size=8", "evaluate.0.settings.count=4"]
    result = train(load_recipe(RECIPES / "canvases-mimdet.toml", overrides=settings), tmp_path / "run")
    assert result.finished
    assert 0 <= result.metrics["detection:coco-ap/AP"] <= 1


def test_encoder_and_decoder_are_those_of_the_run(pretrained: Path) -> None:
    settings = dict(load_recipe(RECIPES / "canvases-mimdet.toml").encoder.settings)
    made = MIMDetDetector.build(MIMDetConfig(**settings, init=str(pretrained)))
    checkpoint = latest_checkpoint(pretrained / "checkpoints")
    assert checkpoint is not None
    theirs, own = load_checkpoint(checkpoint).objective, made.backbone.state_dict()
    for part in ("encoder.blocks.3.mlp.fc2.weight", "encoder.norm.bias", "decoder.decoder_blocks.0.attn.qkv.weight"):
        assert torch.equal(own[part], theirs[f"model.{part}"]), part
    assert made.loaded is not None
    assert all("patch_embed" in name or "conv_feat_proj" in name for name in made.loaded.fresh)
    with pytest.raises(DataError, match=r"set encoder\.decoder_heads = 4"):
        MIMDetDetector.build(MIMDetConfig(**{**settings, "decoder_heads": 8}, init=str(pretrained)))
