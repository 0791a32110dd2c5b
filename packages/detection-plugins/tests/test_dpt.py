from __future__ import annotations

import re

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from bowerbird.encoders import load_encoder, save_encoder
from bowerbird.errors import DataError, InputError
from bowerbird.protocols import Objects
from bowerbird.testing import EncoderContract
from bowerbird_detection.configs import TorchvisionConfig
from bowerbird_detection.depatch import DeformablePatchEmbed
from bowerbird_detection.detectors import TorchvisionDetector
from bowerbird_detection.dpt import DPT, DPTConfig, medium, small, tiny

SMALL = {
    "image_size": 32, "dims": [8, 12, 16], "depths": [1, 1, 2], "heads": [1, 2, 2], "mlp_ratios": [2.0, 2.0, 2.0],
    "sr_ratios": [4, 2, 1],
}  # fmt: skip


def network(**changes: object) -> DPT:
    return DPT.build(DPTConfig(**{**SMALL, **changes})).eval()


def deformed(encoder: DPT) -> DPT:
    """At first the branch that predicts boxes has no effect, and no gradient reaches its convolution."""
    for part in encoder.modules():
        if isinstance(part, DeformablePatchEmbed):
            torch.nn.init.normal_(part.offset_predictor.weight, std=0.1)
    return encoder


class TestContract(EncoderContract):
    name = "detection:dpt"
    config = {**SMALL}

    def build(self, seed: int = 0) -> DPT:
        return deformed(super().build(seed))


class TestContractWithoutClassToken(TestContract):
    config = {**SMALL, "image_size": [16, 48], "class_token": False, "sr_ratios": [4, 2, 1], "drop_path": 0.1}


class TestContractOfFixedPatches(EncoderContract):
    name = "detection:dpt"
    config = {**SMALL, "patches": "fixed"}


class TestContractOfFrozenBoxes(EncoderContract):
    name = "detection:dpt"
    config = {**SMALL, "patches": "frozen"}


@pytest.mark.parametrize(("size", "millions"), [(tiny, 15.152942), (small, 26.409518), (medium, 46.131758)])
def test_the_published_networks_have_the_published_numbers_of_parameters(size, millions):
    with torch.device("meta"):
        encoder = DPT(**DPTConfig(**size()).architecture())
    classifier = 1000 * encoder.embed_dim + 1000
    assert sum(parameter.numel() for parameter in encoder.parameters()) + classifier == round(millions * 1e6)


def test_deformable_patches_cost_what_the_complexity_says():
    count = {
        patches: sum(parameter.numel() for parameter in network(patches=patches).parameters())
        for patches in ("fixed", "frozen", "deformable")
    }
    extra = 0
    for inputs, width in ((8, 12), (12, 16)):  # another convolution, 9 points for 4 pixels, a norm, 4 offsets, 2 sizes
        extra += (4 * inputs * width + width) + (9 - 4) * inputs * width + 2 * width + 4 * width + 2
    assert count["deformable"] == count["frozen"] == count["fixed"] + extra


def test_maps_of_a_rectangle_have_the_widths_and_strides_of_the_stages():
    encoder = deformed(network())
    maps = encoder.feature_maps(torch.randn(2, 3, 48, 80))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 12, 20), (2, 12, 6, 10), (2, 16, 3, 5)]
    assert encoder.strides == (4, 8, 16)


def test_boxes_follow_the_picture_not_its_side():
    encoder = deformed(network())
    picture = torch.randn(1, 3, 32, 48)
    turned = encoder.feature_maps(picture.transpose(2, 3))
    assert turned[-1].shape[2:] == (3, 2)
    assert all(m.isfinite().all() for m in turned)


def test_positions_of_another_size_are_the_table_resized_bilinearly():
    encoder = network(class_token=False)
    stage = encoder.stages[0]
    assert stage.grid == (8, 8)
    with torch.no_grad():  # a code that grows from left to right
        stage.positions.copy_(torch.arange(8.0).repeat(8)[None, :, None].expand_as(stage.positions))
    resized = stage._positions((8, 16))[0, :, 0].view(8, 16)
    assert torch.allclose(resized[0, 1:-1], torch.arange(0.25, 7, 0.5), atol=1e-6)
    assert torch.equal(stage._positions((8, 8)), stage.positions)


def test_a_backbone_without_class_token_gives_the_same_maps_and_has_no_idle_parameter_but_the_norm():
    encoder = deformed(network())
    x = torch.randn(1, 3, 32, 64)
    before = encoder.feature_maps(x)
    assert encoder.without_class_token() is encoder
    after = encoder.feature_maps(x)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    sum(m.square().sum() for m in after).backward()
    idle = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    assert idle == {"norm.weight", "norm.bias"}
    assert encoder({"image": x}).pooled.shape == (1, 16)


def test_the_class_token_reads_the_patches():
    encoder = deformed(network())
    image = torch.randn(1, 3, 32, 32, requires_grad=True)
    features = encoder({"image": image})
    assert features.grid == (2, 2)
    assert features.tokens.shape == (1, 4, 16)
    (gradient,) = torch.autograd.grad(features.pooled.square().sum() + features.pooled[0, 0], image)
    assert gradient.abs().sum(dim=1).count_nonzero() > 900  # of 1024 pixels


def test_a_picture_moved_by_one_pixel_moves_what_deformed_patches_read():
    """Frozen boxes read whole patches wherever the object is; learned ones are a function of the picture."""
    embed = deformed(network()).stages[1].embed
    x = torch.randn(1, 8, 8, 8)
    assert not torch.allclose(embed.boxes(x), embed.boxes(x.roll(1, dims=3)))


def test_an_export_loads_with_the_same_embeddings(tmp_path):
    encoder = deformed(network())
    config = DPTConfig(**SMALL).model_dump(mode="json")
    save_encoder(encoder, tmp_path / "dpt", use="detection:dpt", config=config)
    loaded = load_encoder(tmp_path / "dpt", device="cpu").module
    batch = {"image": torch.randn(2, 3, 32, 32)}
    assert torch.equal(loaded(batch).pooled, encoder(batch).pooled)


def published_names(encoder: DPT) -> dict[str, torch.Tensor]:
    """The state as the published code names it, with what follows from the size of the picture and a classifier."""
    named = {}
    for name, value in encoder.state_dict().items():
        found = re.match(r"stages\.(\d)\.(embed|positions|blocks)(.*)", name)
        kinds = {"embed": "patch_embed", "positions": "pos_embed", "blocks": "block"}
        named[f"{kinds[found[2]]}{int(found[1]) + 1}{found[3]}" if found else name] = value
    named["patch_embed2.box_coder.anchor"] = torch.zeros(16, 2)
    named["patch_embed2.value_spatial_shapes"] = torch.zeros(1, 2, dtype=torch.long)
    named["head.weight"] = torch.zeros(5, 16)
    return named


def test_weights_of_the_published_code_are_read_by_their_names(tmp_path):
    encoder = deformed(network())
    state = published_names(encoder)
    assert {"pos_embed3", "block3.1.attn.kv.weight", "patch_embed2.output_proj.weight"} <= state.keys()
    save_file(state, tmp_path / "dpt.safetensors")
    read = network(weights=str(tmp_path / "dpt.safetensors"))
    batch = {"image": torch.randn(1, 3, 32, 32)}
    assert torch.equal(read(batch).pooled, encoder(batch).pooled)
    with pytest.raises(DataError, match=r"stages\.2\.blocks\.1"):
        network(weights=str(tmp_path / "dpt.safetensors"), depths=[1, 1, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 40}, "multiples of 16"),
        ({"heads": [1, 2]}, "heads has 2"),
        ({"heads": [1, 5, 2]}, "12 cannot be shared by 5"),
        ({"sr_ratios": [4, 2, 2]}, "class_token"),
        ({"sr_ratios": [16, 2, 1]}, "sr_ratio = 16"),
        ({"depths": [1, 0, 1]}, "above 0"),
        ({"points_per_side": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        DPTConfig(**{**SMALL, **changes})


def test_pictures_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="multiples of 16"):
        network().feature_maps(torch.zeros(1, 3, 40, 32))


# ------------------------------------------------------------------------------------------- in a detector


def test_it_is_a_backbone_of_torchvisions_detectors_for_pictures_of_any_shape(tmp_path):
    four = {
        "image_size": 64, "dims": [8, 8, 12, 16], "depths": [1, 1, 1, 1], "heads": [1, 2, 2, 2],
        "mlp_ratios": [2.0] * 4, "sr_ratios": [4, 2, 1, 1],
    }  # fmt: skip
    encoder = deformed(DPT.build(DPTConfig(**four)))
    stored = encoder.stored_config(DPTConfig(**four).model_dump(mode="json"))
    save_encoder(encoder, tmp_path / "dpt", use="detection:dpt", config=stored)
    config = TorchvisionConfig(
        backbone=str(tmp_path / "dpt"), shorter_side=64, longer_side=128, fpn_width=8, head_width=16,
        proposals_train=20, proposals_test=20, rois=8,
    )  # fmt: skip
    detector = TorchvisionDetector.build(config)
    detector.open(["cat", "dog"])
    kept = detector.model.backbone.body.encoder
    assert torch.equal(kept.stages[1].embed.output_proj.weight, encoder.stages[1].embed.output_proj.weight)
    images = [torch.rand(3, 64, 90), torch.rand(3, 100, 50)]
    objects = [Objects(torch.tensor([[4.0, 5.0, 40.0, 50.0]]), torch.tensor([1])) for _ in images]
    sum(detector.train().losses(images, objects).values()).backward()
    idle = {name for name, p in kept.named_parameters() if p.requires_grad and p.grad is None}
    assert not idle
    assert kept.stages[3].embed.offset_predictor.weight.grad.any()
    found = detector.eval().detect(images)
    assert [one.boxes.shape[1] for one in found] == [4, 4]
