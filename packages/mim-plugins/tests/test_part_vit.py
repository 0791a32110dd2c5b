"""Part tokens: the authors' numbers, and what holds for every network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save_file

from bowerbird.errors import DataError, InputError
from bowerbird.testing import EncoderContract, assert_close
from bowerbird_mim.part_vit import PartTokenViT, PartViTConfig, PartViTEncoder, fuse_part_features
from bowerbird_mim.vit import ViTEncoder

SMALL = {"image_size": (16, 8), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}


class TestContract(EncoderContract):
    name = "mim:part-vit"
    config = SMALL


def small_vit(num_parts: int = 3) -> PartTokenViT:
    return PartTokenViT(ViTEncoder(**SMALL, position="learned"), num_parts).double()


def from_golden(values: dict[str, Any], **settings: Any) -> PartTokenViT:
    plain = ViTEncoder(
        image_size=(values["height"], values["width"]),
        patch_size=values["patch_size"],
        embed_dim=values["embed_dim"],
        depth=values["depth"],
        num_heads=values["num_heads"],
        mlp_ratio=values["mlp_ratio"],
        layer_norm_eps=values["layernorm_eps"],
        position="learned",
    )
    vit = PartTokenViT(plain, 3, **settings).double()
    vit.load_state_dict({name[3:]: value for name, value in values.items() if name.startswith("sd.")}, strict=True)
    return vit


def check_gradients(vit: PartTokenViT, values: dict[str, Any]) -> None:
    wanted = {name[5:] for name in values if name.startswith("grad.")}
    assert wanted >= {name for name, _ in vit.named_parameters()} - {"pos_embed"}
    for name, parameter in vit.named_parameters():
        if name in wanted:
            assert_close(parameter.grad, values[f"grad.{name}"], atol=1e-9, where=name)


def weighted_globals(cls: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """The scalar whose gradient is kept: tokens weigh 1, 2, 3, 4, and squares of the class token are added."""
    weights = torch.arange(1.0, 5.0, dtype=cls.dtype)
    return weights[0] * cls.sum() + (weights[1:] * parts.sum(dim=(0, 2))).sum() + cls.square().sum()


def test_the_network_at_native_size(golden) -> None:
    values = golden("pass/backbone_native_pos")
    vit = from_golden(values)
    cls, parts = vit(values["global_crop"])
    local_cls, local_part = vit(values["local_crop"], 1)
    assert_close(cls, values["out_global.cls"])
    for j in range(3):
        assert_close(parts[:, j], values[f"out_global.pt{j + 1}"])
    assert_close(local_cls, values["out_local.area2.cls"])
    assert_close(local_part[:, 0], values["out_local.area2.part"])
    scalar = weighted_globals(cls, parts) + 2 * local_part.sum()
    assert_close(scalar, values["scalar_for_grad"])
    scalar.backward()
    check_gradients(vit, values)


def test_the_authors_network_that_resamples_positions_always(golden) -> None:
    values = golden("pass/backbone")
    vit = from_golden(values, native_pos_interpolation=True)
    assert_close(vit.positions((4, 2)), values["pos_embed_used_global"])
    assert_close(vit.positions((2, 1)), values["pos_embed_used_local"])
    cls, parts = vit(values["global_crop"])
    scalar = weighted_globals(cls, parts)
    assert_close(cls, values["out_global.cls"])
    for j in range(3):
        assert_close(parts[:, j], values[f"out_global.pt{j + 1}"])
        local_cls, local_part = vit(values["local_crop"], j)
        assert_close(local_cls, values[f"out_local.area{j + 1}.cls"])
        assert_close(local_part[:, 0], values[f"out_local.area{j + 1}.part"])
        scalar = scalar + 0.5 * (j + 1) * local_cls.sum() - (j + 2) * local_part.sum()
    assert_close(scalar, values["scalar_for_grad"])
    scalar.backward()
    check_gradients(vit, values)


def test_crops_of_several_areas_in_one_batch_are_encoded_as_one_by_one() -> None:
    vit = small_vit()
    crops, areas = torch.randn(5, 3, 8, 4, dtype=torch.float64), torch.tensor([2, 0, 1, 0, 2])
    cls, parts = vit(crops, areas)
    for i, area in enumerate(areas.tolist()):
        one_cls, one_part = vit(crops[i : i + 1], area)
        assert_close(cls[i], one_cls[0], atol=1e-12)
        assert_close(parts[i], one_part[0], atol=1e-12)


def test_a_crop_of_an_area_does_not_see_the_other_part_tokens() -> None:
    vit, crop = small_vit(), torch.randn(2, 3, 8, 4, dtype=torch.float64)
    before = vit(crop, 1)
    with torch.no_grad():
        for name in ("part_token1", "part1_pos", "part_token3", "part3_pos"):
            getattr(vit, name).normal_()
    after = vit(crop, 1)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    with torch.no_grad():
        vit.part_token2.normal_()
    assert not torch.equal(vit(crop, 1)[0], before[0])


def test_without_parts_it_is_the_plain_network() -> None:
    plain = ViTEncoder(**SMALL, position="learned", pooling="class").double()
    images = torch.randn(2, 3, 16, 8, dtype=torch.float64)
    expected = plain({"image": images}).pooled
    cls, parts = PartTokenViT(plain, 0)(images)
    assert_close(cls, expected, atol=1e-12)
    assert parts.shape == (2, 0, 16)


@settings(max_examples=15, deadline=None)
@given(parts=st.integers(1, 5), rows=st.integers(1, 5), columns=st.integers(1, 3))
def test_every_number_of_parts_and_every_size_works(parts: int, rows: int, columns: int) -> None:
    vit = small_vit(parts)
    cls, tokens = vit(torch.randn(2, 3, 4 * rows, 4 * columns, dtype=torch.float64))
    assert cls.shape == (2, 16) and tokens.shape == (2, parts, 16)
    assert vit(torch.randn(2, 3, 8, 4, dtype=torch.float64), parts - 1)[1].shape == (2, 1, 16)


# ------------------------------------------------------------------------------------------------ fusion and encoder


@settings(max_examples=20, deadline=None)
@given(parts=st.integers(1, 5), mode=st.sampled_from(["cat", "mean"]), seed=st.integers(0, 99))
def test_fusion_does_not_depend_on_the_order_of_parts(parts: int, mode: str, seed: int) -> None:
    torch.manual_seed(seed)
    cls, tokens = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, parts, 4, dtype=torch.float64)
    fused = fuse_part_features(cls, tokens, mode)
    assert_close(fuse_part_features(cls, tokens[:, torch.randperm(parts)], mode), fused, atol=1e-12)
    assert fused.shape == (3, 8 if mode == "cat" else 4)


def test_the_first_half_of_a_concatenated_feature_is_the_class_token() -> None:
    cls, parts = torch.randn(2, 4), torch.randn(2, 3, 4)
    assert torch.equal(fuse_part_features(cls, parts)[:, :4], cls)


@pytest.mark.parametrize("pooling", ["cat", "mean", "class"])
def test_the_embedding_is_made_of_the_tokens(pooling: str) -> None:
    encoder = PartViTEncoder.build(PartViTConfig(**SMALL, pooling=pooling)).eval()
    images = torch.randn(2, 3, 16, 8)
    cls, parts = encoder.vit(images)
    features = encoder({"image": images})
    expected = cls if pooling == "class" else fuse_part_features(cls, parts, pooling)
    assert torch.equal(features.pooled, expected)
    assert features.pooled.shape == (2, encoder.embed_dim)
    assert features.tokens.shape == (2, 8, 16) and features.grid == (4, 2)


def test_weights_of_a_pass_network_are_read_and_others_are_refused(tmp_path) -> None:
    first, other = (PartViTEncoder.build(PartViTConfig(**SMALL)) for _ in range(2))
    file = tmp_path / "pass.safetensors"
    heads = {"head.last_layer_cls.weight_v": torch.zeros(3, 2), "head.mlp_pt1.0.weight": torch.zeros(2, 2)}
    save_file({f"backbone.{k}": v.clone() for k, v in first.vit.state_dict().items()} | heads, file)
    loaded = PartViTEncoder.build(PartViTConfig(**SMALL, weights=str(file)))
    images = {"image": torch.randn(1, 3, 16, 8)}
    assert torch.equal(loaded(images).pooled, first(images).pooled)
    assert not torch.equal(other(images).pooled, first(images).pooled)
    with pytest.raises(DataError, match=r"do not fit PartTokenViT.*part_token3"):
        PartViTEncoder.build(PartViTConfig(**SMALL, num_parts=2, weights=str(file)))


def test_first_weights_can_be_those_of_a_plain_network(tmp_path) -> None:
    plain = ViTEncoder(**SMALL, position="learned")
    file = tmp_path / "vit.safetensors"
    save_file({name: value.clone() for name, value in plain.state_dict().items()}, file)
    vit = PartViTEncoder.build(PartViTConfig(**SMALL, weights=str(file))).vit
    assert torch.equal(torch.cat([vit.cls_pos, vit.pos_embed], dim=1), plain.pos_embed)
    assert torch.equal(vit.blocks[1].mlp.fc1.weight, plain.blocks[1].mlp.fc1.weight)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("part", [3, -1, 1.0, torch.tensor([0, 3])])
def test_a_part_that_does_not_exist_is_refused(part: Any) -> None:
    with pytest.raises(ValueError, match="part of 0 to 2"):
        small_vit()(torch.zeros(2, 3, 8, 4, dtype=torch.float64), part)


def test_a_part_may_be_a_whole_number_of_numpy() -> None:
    vit, images = small_vit(), torch.randn(2, 3, 8, 4, dtype=torch.float64)
    for part in np.arange(3):
        assert torch.equal(vit(images, part)[1], vit(images, int(part))[1])


def test_what_does_not_fit_is_refused() -> None:
    vit = small_vit()
    with pytest.raises(InputError, match="multiples of patch_size"):
        vit(torch.zeros(1, 3, 9, 8, dtype=torch.float64))
    with pytest.raises(InputError, match=r"needs \(B, 3, H, W\)"):
        vit(torch.zeros(1, 4, 8, 8, dtype=torch.float64))
    with pytest.raises(InputError, match=r"expected int64 \(2,\)"):
        vit(torch.zeros(2, 3, 8, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match="num_parts = -1"):
        small_vit(-1)
    with pytest.raises(InputError, match=r"ViTEncoder \(mim:vit\), not to a Linear"):
        PartTokenViT(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="mode = 'sum'"):
        fuse_part_features(torch.zeros(1, 2), torch.zeros(1, 3, 2), "sum")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no part token"):
        fuse_part_features(torch.zeros(1, 2), torch.zeros(1, 0, 2))
    with pytest.raises(ValidationError, match="set pooling = 'class'"):
        PartViTConfig(**SMALL, num_parts=0)
