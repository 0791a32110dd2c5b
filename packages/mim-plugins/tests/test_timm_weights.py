"""Weights of timm's vision transformers: read, trained on, written, and read by timm again, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from bowerbird.cli import main
from bowerbird.encoders import load_encoder
from bowerbird.errors import DataError, InputError
from bowerbird_mim.timm_weights import load_vit_weights
from bowerbird_mim.vit import ViTConfig, ViTEncoder

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
OURS: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "position": "learned"
}  # fmt: skip
RECIPE = """
name = "digits"
[encoder]
use = "mim:vit"
image_size = 16
patch_size = 4
embed_dim = 24
depth = 2
num_heads = 3
position = "learned"
{more}
[objective]
use = "mim:mae"
decoder_dim = 8
decoder_depth = 1
decoder_heads = 2
[dataset]
use = "core:digits"
split = "train"
[train]
epochs = 1
batch_size = 512
lr = 1e-3
device = "cpu"
"""


def timm_vit(**changes: Any) -> Any:
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, "num_classes": 7, **changes})
    with torch.no_grad():  # no parameter keeps a first value that tells nothing
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of timm's weights, with a classifier of seven classes."""
    file = tmp_path_factory.mktemp("timm") / "vit.safetensors"
    save_file(timm_vit().state_dict(), file)
    return file


def images(size: int = 16) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def bowerbird(*arguments: Any) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@torch.no_grad()
def pooled(encoder: Any) -> torch.Tensor:
    return encoder.eval()({"image": images()}).pooled


# ------------------------------------------------------------------------------------------------ the round trip


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_timm_to_us_to_timm_is_bit_equal(kept: Path, tmp_path: Path, pooling: str) -> None:
    encoder = ViTEncoder.build(ViTConfig(**OURS, pooling=pooling, weights=str(kept)))
    original = timm_vit()
    with torch.no_grad():
        tokens = original.forward_features(images())
    expected = tokens[:, 0] if pooling == "class" else tokens[:, 1:].mean(dim=1)
    assert torch.equal(pooled(encoder), expected)

    settings = "&".join(f"{key}={value}" for key, value in OURS.items())
    bowerbird(
        "export", f"mim:vit?{settings}&pooling={pooling}&weights={kept}", "--to", tmp_path / "out", "--format", "timm"
    )
    file = tmp_path / "out" / "model.safetensors"
    arguments = json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]
    model = timm.create_model("vit_tiny_patch16_224", **arguments, num_classes=0, checkpoint_path=str(file)).eval()
    assert torch.equal(model(images()), expected)
    assert torch.equal(model.forward_features(images()), tokens)
    by_folder = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(by_folder(images()), expected)
    for name, weight in load_file(file).items():
        assert torch.equal(weight, original.state_dict()[name]), name


def test_a_recipe_begins_with_weights_of_timm_and_its_run_is_exported_to_timm(kept: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(more=f'weights = "{kept}"'))
    bowerbird("train", recipe, "--out", tmp_path / "run", "--set", "train.lr=1e-12")
    weights = load_file(tmp_path / "run" / "encoder" / "weights.safetensors")
    for name, weight in load_file(kept).items():  # the step is too small to be seen
        if not name.startswith("head."):
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-9)

    bowerbird("train", recipe, "--out", tmp_path / "run2")
    trained = load_encoder(tmp_path / "run2", device="cpu").module
    assert not torch.equal(trained.cls_token, load_file(kept)["cls_token"])
    bowerbird("export", tmp_path / "run2", "--to", tmp_path / "out", "--format", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(model(images()), pooled(trained))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert 'timm.create_model("local-dir:out", pretrained=True)' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("made", ["timm folder", "exported folder", "run"])
def test_weights_may_be_a_folder_of_timm_or_ours(made: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(more=""))
    bowerbird("train", recipe, "--out", tmp_path / "run")
    folder = tmp_path / "run"
    if made != "run":
        folder = tmp_path / "out"
        bowerbird(
            "export", tmp_path / "run", "--to", folder, "--format", made.split()[0].replace("exported", "bowerbird")
        )
    encoder = ViTEncoder.build(ViTConfig(**OURS, weights=str(folder)))
    assert torch.equal(pooled(encoder), pooled(load_encoder(tmp_path / "run", device="cpu").module))


def test_rectangles_and_fixed_positions_survive_the_round_trip(tmp_path: Path) -> None:
    settings = {**OURS, "image_size": [8, 16], "position": "sincos", "mlp_ratio": 2.0}
    values = "&".join(f"{key}={value}" for key, value in settings.items())
    bowerbird("export", f"mim:vit?{values}", "--to", tmp_path / "out", "--format", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    pictures = torch.randn(2, 3, 8, 16)
    encoder = load_encoder(f"mim:vit?{values}", device="cpu").module
    with torch.no_grad():
        assert torch.equal(model(pictures), encoder({"image": pictures}).pooled)


def test_weights_with_a_wrapper_and_a_decoder_of_mae_are_read(tmp_path: Path) -> None:
    state = {f"module.{name}": weight for name, weight in timm_vit(num_classes=0).state_dict().items()}
    state |= {"module.mask_token": torch.zeros(1, 1, 8), "module.decoder_embed.weight": torch.zeros(8, 24)}
    torch.save({"model": state}, tmp_path / "mae.pth")
    encoder = ViTEncoder.build(ViTConfig(**OURS, weights=str(tmp_path / "mae.pth")))
    assert torch.equal(encoder.cls_token, state["module.cls_token"])


def test_separate_projections_are_joined(kept: Path, tmp_path: Path) -> None:
    state = {name: weight for name, weight in load_file(kept).items() if ".qkv." not in name}
    for name, weight in load_file(kept).items():
        if ".qkv." in name:
            for part, piece in zip("qkv", weight.chunk(3), strict=True):
                state[name.replace("qkv", part)] = piece.clone()
    save_file(state, tmp_path / "saim.safetensors")
    whole = ViTEncoder.build(ViTConfig(**OURS, weights=str(kept)))
    joined = ViTEncoder.build(ViTConfig(**OURS, weights=str(tmp_path / "saim.safetensors")))
    assert torch.equal(pooled(joined), pooled(whole))


# ------------------------------------------------------------------------------------------------ positions


def test_positions_of_another_size_are_resampled_only_if_asked(kept: Path) -> None:
    larger = {**OURS, "image_size": 24}
    with pytest.raises(
        DataError, match=r"4 x 4 patches, the encoder has 6 x 6.*image_size = 16.*resize_positions = true"
    ):
        ViTEncoder.build(ViTConfig(**larger, weights=str(kept)))
    encoder = ViTEncoder.build(ViTConfig(**larger, weights=str(kept), resize_positions=True))
    in_timm = timm_vit()
    in_timm.set_input_size((24, 24))
    with torch.no_grad():
        tokens = in_timm.forward_features(images(24))
        assert torch.equal(encoder.eval().tokens(images(24)), tokens)
    assert encoder.stored_config({"weights": "x", "resize_positions": True, "depth": 2}) == {"depth": 2}


def test_a_table_that_is_no_square_cannot_be_resampled(kept: Path) -> None:
    state = load_file(kept)
    state["pos_embed"] = torch.zeros(1, 13, 24)
    file = kept.with_name("odd.safetensors")
    save_file(state, file)
    with pytest.raises(DataError, match=r"\(1, 13, 24\) is none of a class token and a square grid"):
        ViTEncoder.build(ViTConfig(**OURS, weights=str(file), resize_positions=True))


# ------------------------------------------------------------------------------------------------ refusals


def test_what_differs_is_listed(kept: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        ViTEncoder.build(ViTConfig(image_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, weights=str(kept)))
    for text in ("patch_size 4 (encoder: 8)", "embed_dim 24 (encoder: 48)", "depth 2 (encoder: 3)", str(kept)):
        assert text in str(caught.value)
    with pytest.raises(DataError, match=r"mlp_ratio 4 \(encoder: 2\)"):
        ViTEncoder.build(ViTConfig(**OURS, mlp_ratio=2.0, weights=str(kept)))


@pytest.mark.parametrize(
    ("changes", "listed"),
    [
        ({"init_values": 1e-5}, "blocks.*.ls1.gamma"),
        ({"qk_norm": True}, "blocks.*.attn.q_norm.weight"),
        ({"reg_tokens": 2}, "reg_token"),
        ({"class_token": False, "global_pool": "avg"}, "only the encoder has: cls_token"),
        ({"global_pool": "avg"}, "fc_norm.weight"),
    ],
)
def test_a_vit_with_extras_is_refused(changes: dict, listed: str, tmp_path: Path) -> None:
    save_file(timm_vit(**changes).state_dict(), tmp_path / "other.safetensors")
    encoder = ViTEncoder(**OURS)
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    with pytest.raises(DataError, match="another architecture") as caught:
        load_vit_weights(encoder, tmp_path / "other.safetensors")
    assert listed in str(caught.value)
    assert all(torch.equal(weight, before[name]) for name, weight in encoder.state_dict().items())


def test_another_network_is_refused_and_so_is_a_folder_without_weights(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(DataError, match=r"no vision transformer of timm .* it has conv1"):
        load_vit_weights(ViTEncoder(**OURS), tmp_path / "resnet.pth")
    with pytest.raises(DataError, match="the folder has none of model"):
        load_vit_weights(ViTEncoder(**OURS), tmp_path)
    with pytest.raises(DataError, match="no such file"):
        load_vit_weights(ViTEncoder(**OURS), tmp_path / "nothing.pth")


def test_another_number_of_heads_is_seen_where_timm_says_it(tmp_path: Path) -> None:
    values = "&".join(f"{key}={value}" for key, value in OURS.items())
    bowerbird("export", f"mim:vit?{values}", "--to", tmp_path / "out", "--format", "timm")
    with pytest.raises(DataError, match=r"num_heads 3 \(encoder: 4\)"):
        ViTEncoder.build(ViTConfig(**{**OURS, "num_heads": 4}, weights=str(tmp_path / "out")))


def test_an_encoder_that_timm_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layer_norm_eps"):
        ViTEncoder(**OURS, layer_norm_eps=1e-5).timm_form()
    more = ViTEncoder(**OURS)
    more.part_token = torch.nn.Parameter(torch.zeros(1, 1, 24))
    with pytest.raises(InputError, match="parameters that only the encoder has: part_token"):
        more.timm_form()
