"""``core:perceptron``: the encoder of the benchmark and of the digits recipes."""

from __future__ import annotations

import pytest
import torch

from bowerbird.encoders.configs import PerceptronConfig
from bowerbird.encoders.perceptron import Perceptron
from bowerbird.errors import InputError, RecipeError
from bowerbird.recipe import build_config
from bowerbird.registry import get_registry
from bowerbird.testing import EncoderContract


class TestPerceptron(EncoderContract):
    name = "core:perceptron"
    config = {"image_size": 8, "width": 12, "embed_dim": 6}


def test_pictures_and_their_kept_pixels_give_the_same_embedding() -> None:
    encoder = Perceptron(PerceptronConfig(image_size=4, width=5, depth=1, embed_dim=3))
    batch = {"image": torch.rand(6, 3, 4, 4)}
    kept = {"frozen_features": encoder.frozen_trunk(batch)}
    assert kept["frozen_features"].shape == (6, 16)
    assert torch.equal(encoder(batch).pooled, encoder(kept).pooled)


def test_without_hidden_layers_it_is_a_linear_map() -> None:
    encoder = Perceptron(PerceptronConfig(inputs=7, depth=0, embed_dim=2)).eval()
    a, b = torch.rand(2, 5, 7)
    zero = encoder({"frozen_features": torch.zeros(5, 7)}).pooled
    one, other, both = (encoder({"frozen_features": x}).pooled - zero for x in (a, b, a + b))
    assert torch.allclose(one + other, both, atol=1e-6)
    assert sum(isinstance(layer, torch.nn.ReLU) for layer in encoder.modules()) == 0


@pytest.mark.parametrize("settings", [{}, {"image_size": 8, "inputs": 64}, {"inputs": 64, "depht": 1}])
def test_one_kind_of_input_must_be_named(settings: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=r"image_size|depth"):
        build_config(get_registry().get("encoder", "core:perceptron"), settings, where="[encoder]")


def test_vectors_of_another_length_are_refused() -> None:
    encoder = Perceptron(PerceptronConfig(inputs=7))
    with pytest.raises(InputError, match=r"\(batch, 7\).*\(2, 9\)"):
        encoder({"frozen_features": torch.zeros(2, 9)})
