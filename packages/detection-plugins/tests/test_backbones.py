"""Maps of several strides from timm models, exported encoders and encoders that give maps themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bowerbird.encoders import save_encoder
from bowerbird.encoders.configs import PerceptronConfig, TimmConfig
from bowerbird.encoders.perceptron import Perceptron
from bowerbird.encoders.timm_encoder import TimmEncoder
from bowerbird.errors import InputError, UnknownNameError
from bowerbird_detection.backbones import pyramid_of

DPT = {
    "use": "detection:dpt", "image_size": 64, "dims": [8, 16], "depths": [1, 1], "heads": [1, 2],
    "mlp_ratios": [2.0, 2.0], "sr_ratios": [2, 1],
}  # fmt: skip


@pytest.mark.parametrize("name", ["resnet10t", "test_convnext", "test_efficientnet", "test_vit"])
def test_every_kind_of_timm_model_gives_four_maps_whose_strides_double(name: str) -> None:
    pyramid = pyramid_of(name).eval()
    with torch.no_grad():
        maps = pyramid(torch.rand(2, 3, 64, 96))
    assert list(maps) == ["0", "1", "2", "3"]
    assert pyramid.strides == (4, 8, 16, 32)
    for found, stride, channels in zip(maps.values(), pyramid.strides, pyramid.channels, strict=True):
        assert found.shape == (2, channels, 64 // stride, 96 // stride)


@pytest.mark.parametrize("name", ["resnet10t", "test_convnext", "test_efficientnet", "test_vit"])
def test_exactly_the_parameters_that_maps_depend_on_are_trainable(name: str) -> None:
    pyramid = pyramid_of(name).train()
    torch.stack([maps.square().sum() for maps in pyramid(torch.rand(2, 3, 64, 64)).values()]).sum().backward()
    unreached = [n for n, p in pyramid.named_parameters() if p.requires_grad != (p.grad is not None)]
    assert not unreached


def test_building_a_pyramid_leaves_the_statistics_of_norms_alone() -> None:
    torch.manual_seed(0)
    pyramid = pyramid_of("resnet10t")
    counters = [value for name, value in pyramid.state_dict().items() if name.endswith("num_batches_tracked")]
    assert counters and not torch.stack(counters).any()


def test_fewer_levels_leave_out_the_finest() -> None:
    assert pyramid_of("resnet10t", levels=3).strides == (8, 16, 32)
    assert pyramid_of("test_vit", levels=2).strides == (16, 32)


def test_frozen_norms_keep_their_statistics_in_training() -> None:
    pyramid = pyramid_of("resnet10t", freeze_norm=True).train()
    before = {name: value.clone() for name, value in pyramid.state_dict().items() if "running" in name}
    pyramid(torch.rand(2, 3, 64, 64))
    after = pyramid.state_dict()
    assert before and all(torch.equal(after[name], value) for name, value in before.items())


def test_an_exported_timm_encoder_is_the_backbone_with_its_weights_and_without_its_projection(tmp_path: Path) -> None:
    config = {"model": "resnet10t", "embed_dim": 8}
    encoder = TimmEncoder.build(TimmConfig(**config))
    save_encoder(encoder, tmp_path / "e", use="core:timm", config=config)
    pyramid = pyramid_of(str(tmp_path / "e")).eval()
    image = torch.rand(1, 3, 64, 64)
    encoder.eval()
    with torch.no_grad():
        last = list(pyramid(image).values())[-1]
        torch.testing.assert_close(last, encoder.trunk.model.forward_features(image))
    assert pyramid.embed_dim == 512
    assert any(parameter.requires_grad for parameter in pyramid.parameters())


def test_an_exported_vit_takes_pictures_of_other_sizes(tmp_path: Path) -> None:
    encoder = TimmEncoder.build(TimmConfig(model="test_vit", image_size=64))
    save_encoder(encoder, tmp_path / "e", use="core:timm", config={"model": "test_vit", "image_size": 64})
    pyramid = pyramid_of(str(tmp_path / "e")).eval()
    encoder.eval()
    with torch.no_grad():
        assert pyramid(torch.rand(1, 3, 96, 32))["2"].shape == (1, 64, 6, 2)
        image = torch.rand(1, 3, 64, 64)
        tokens = encoder({"image": image}).tokens
        torch.testing.assert_close(pyramid.features(image).tokens, tokens)


def test_the_source_builds_the_same_modules_without_the_folder(tmp_path: Path) -> None:
    config = {"model": "test_vit", "embed_dim": 8, "image_size": 64, "resize": "squash"}
    encoder = TimmEncoder.build(TimmConfig(**config))
    save_encoder(encoder, tmp_path / "e", use="core:timm", config=config)
    first = pyramid_of(str(tmp_path / "e"))
    second = pyramid_of(first.source)
    assert first.preprocessing == second.preprocessing == encoder.preprocessing
    assert str(tmp_path) not in str(first.source)
    assert {n: v.shape for n, v in first.state_dict().items()} == {n: v.shape for n, v in second.state_dict().items()}


def test_an_encoder_that_gives_maps_itself_is_taken_as_it_is() -> None:
    pyramid = pyramid_of(DPT, levels=2)
    maps = pyramid(torch.rand(1, 3, 64, 64))
    assert (pyramid.strides, pyramid.channels) == ((4, 8), (8, 16))
    assert [tuple(found.shape) for found in maps.values()] == [(1, 8, 16, 16), (1, 16, 8, 8)]


def test_a_backbone_that_does_not_exist_is_refused_with_a_close_name(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"resnet5o.*Did you mean 'resnet50'"):
        pyramid_of("resnet5o")
    with pytest.raises(InputError, match="there is no such folder"):
        pyramid_of(str(tmp_path / "nothing"))
    with pytest.raises(UnknownNameError, match="core:timn"):
        pyramid_of({"use": "core:timn", "model": "resnet18"})


def test_an_encoder_without_places_is_refused(tmp_path: Path) -> None:
    config = {"image_size": 8}
    encoder = Perceptron.build(PerceptronConfig(**config))
    save_encoder(encoder, tmp_path / "e", use="core:perceptron", config=config)
    with pytest.raises(InputError, match="gives no tokens with their places"):
        pyramid_of(str(tmp_path / "e"))


def test_more_levels_than_there_are_and_weights_of_a_folder_are_refused() -> None:
    with pytest.raises(InputError, match=r"'resnet10t' has 5 levels; 6 were asked for"):
        pyramid_of("resnet10t", levels=6)
    with pytest.raises(InputError, match="weights and pretrained are for the name of a timm model"):
        pyramid_of({"use": "core:timm", "model": "resnet10t"}, pretrained=True)
