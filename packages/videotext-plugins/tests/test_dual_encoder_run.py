"""From a data set to a run, its export, and vectors of videos, pictures and sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bowerbird.encoders import load_encoder
from bowerbird.errors import RecipeError
from bowerbird.recipe import resolve_recipe
from bowerbird.train.loop import train
from bowerbird_videotext.data_configs import MovingConfig, digits
from bowerbird_videotext.moving import Moving


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of eight videos of digits that move."""
    root = str(tmp_path_factory.mktemp("moving"))
    return {**digits(), "root": root, "counts": {"train": 8, "val": 1, "test": 1}, "size": 16, "sprite_size": [6, 8]}


def recipe(videos: dict[str, Any], objective: dict[str, Any], **encoder: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "encoder": {
            "use": "videotext:dual-encoder", "image_size": 16, "patch_size": 8, "frames": 3, "embed_dim": 8,
            "depth": 1, "num_heads": 2, "text_dim": 8, "text_depth": 1, "text_heads": 2, "max_tokens": 20,
            "projection_dim": 6, **encoder,
        },
        "objective": objective,
        "dataset": {"use": "videotext:moving", "split": "train", **videos},
        "train": {"epochs": 2, "batch_size": 4, "device": "cpu"},
    }  # fmt: skip


@pytest.mark.parametrize("objective", [{"use": "videotext:frozen"}, {"use": "videotext:mac", "unmasked_end": 0.5}])
def test_a_run_gives_an_encoder_of_videos_pictures_and_sentences(
    videos: dict[str, Any], objective: dict[str, Any], tmp_path: Path
) -> None:
    result = train(resolve_recipe(recipe(videos, objective)), tmp_path / "run")
    assert result.finished and result.steps == 4
    loaded = load_encoder(tmp_path / "run", device="cpu")
    dataset = Moving.build(MovingConfig(**videos), "train")
    clips = loaded.encode([dataset.video(i) for i in range(3)])
    texts = loaded.encode_texts([dataset.captions(i)[0] for i in range(3)])
    for vectors in (clips, texts):
        assert vectors.shape == (3, 6)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(loaded.encode_dataset(dataset)[:3], clips)


def test_a_run_of_more_frames_starts_from_one_of_fewer(videos: dict[str, Any], tmp_path: Path) -> None:
    objective = {"use": "videotext:frozen"}
    train(resolve_recipe(recipe(videos, objective, frames=1)), tmp_path / "one")
    second = recipe(videos, objective, frames=3, weights=str(tmp_path / "one"))
    train(resolve_recipe(second), tmp_path / "three")
    config = load_encoder(tmp_path / "three").spec.config
    assert config["frames"] == 3 and "weights" not in config and config["vocabulary"] > 6


def test_an_objective_of_videos_refuses_an_encoder_of_pictures(videos: dict[str, Any], tmp_path: Path) -> None:
    wrong = recipe(videos, {"use": "videotext:frozen"})
    wrong["encoder"] = {"use": "core:perceptron", "image_size": 16}
    with pytest.raises(RecipeError):
        train(resolve_recipe(wrong), tmp_path / "run")
