"""MIMDet as a detector: built from settings, started from pre-trained weights, trained, kept, loaded again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from bowerbird.encoders import load_encoder, save_encoder
from bowerbird.encoders.configs import TimmConfig
from bowerbird.encoders.timm_encoder import TimmEncoder
from bowerbird.errors import DataError, RecipeError
from bowerbird.hookspecs import hookimpl
from bowerbird.protocols import Detector, Objects
from bowerbird.records import ObjectiveRecord
from bowerbird.registry import get_registry
from bowerbird.testing import EncoderContract, override_contract_test
from bowerbird.train.checkpoint import Progress, save_checkpoint
from bowerbird_detection.mimdet import load_mae_checkpoint, resize_positions
from bowerbird_detection.mimdet_config import MIMDetConfig
from bowerbird_detection.mimdet_detector import MIMDetDetector

TINY: dict[str, Any] = {
    "image_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 3, "decoder_dim": 16, "decoder_depth": 1,
    "decoder_heads": 4, "fpn_width": 8, "head_width": 16, "mask_width": 8, "box_convs": 1, "rpn_convs": 1,
    "shorter_side": 64, "longer_side": 96, "proposals_train": 30, "proposals_test": 20, "rois": 16,
    "score_threshold": 0.0,
}  # fmt: skip
CLASSES = ("cat", "dog")


def detector(**changes: Any) -> MIMDetDetector:
    torch.manual_seed(0)
    made = MIMDetDetector.build(MIMDetConfig(**{**TINY, **changes}))
    if not made.classes:
        made.open(CLASSES)
    return made


def pictures() -> tuple[list[Tensor], list[Objects]]:
    """Two pictures of other sizes, with three objects and none."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 64, 90, generator=generator), torch.rand(3, 50, 64, generator=generator)]
    boxes = torch.tensor([[2.0, 3.0, 30.0, 40.0], [40.0, 10.0, 80.0, 60.0], [5.0, 5.0, 25.0, 25.0]])
    masks = torch.zeros(3, 64, 90, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    nothing = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), masks=torch.zeros(0, 50, 64).bool())
    return images, [Objects(boxes, torch.tensor([0, 1, 1]), masks=masks), nothing]


def mae_state(
    *, dim: int = 24, depth: int = 2, decoder_depth: int = 3, grid: int = 3, mlp: int = 4
) -> dict[str, Tensor]:
    """Random weights under the names of the official MAE, with its decoder, class token and late blocks."""
    generator = torch.Generator().manual_seed(5)

    def block(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        shapes = {
            "norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
            "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
            "mlp.fc1.weight": (mlp * width, width), "mlp.fc1.bias": (mlp * width,),
            "mlp.fc2.weight": (width, mlp * width), "mlp.fc2.bias": (width,),
        }  # fmt: skip
        return {f"{prefix}.{name}": shape for name, shape in shapes.items()}

    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim), "pos_embed": (1, 1 + grid**2, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16), "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,), "norm.bias": (dim,),
        "decoder_embed.weight": (16, dim), "decoder_embed.bias": (16,), "mask_token": (1, 1, 16),
        "decoder_pos_embed": (1, 1 + grid**2, 16), "decoder_norm.weight": (16,), "decoder_norm.bias": (16,),
        "decoder_pred.weight": (768, 16), "decoder_pred.bias": (768,),
    }  # fmt: skip
    for i in range(depth):
        shapes |= block(f"blocks.{i}", dim)
    for i in range(decoder_depth):
        shapes |= block(f"decoder_blocks.{i}", 16)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` as the files of transformers' ViTMAEForPreTraining name it."""
    made = {}
    for key, value in state.items():
        name = key.replace("decoder_blocks.", "decoder.decoder_layers.")
        if name == key:
            name = key.replace("blocks.", "vit.encoder.layer.")
        if key.startswith(("decoder_embed", "decoder_norm", "decoder_pos", "decoder_pred", "mask_token")):
            name = f"decoder.{key}"
        name = {"pos_embed": "vit.embeddings.position_embeddings", "cls_token": "vit.embeddings.cls_token"}.get(
            name, name
        )
        name = name.replace("patch_embed.proj.", "vit.embeddings.patch_embeddings.projection.")
        name = f"vit.layer{name}" if name.startswith("norm.") else name
        for ours, theirs in (
            ("norm1.", "layernorm_before."), ("norm2.", "layernorm_after."), ("mlp.fc1.", "intermediate.dense."),
            ("mlp.fc2.", "output.dense."), ("attn.proj.", "attention.output.dense."),
        ):  # fmt: skip
            name = name.replace(f".{ours}", f".{theirs}")
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                made[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = third
        else:
            made[name] = value
    return made


# ------------------------------------------------------------------------------------------------------- the detector


class TestContract(EncoderContract):
    name = "detection:mimdet"
    config = {**TINY, "classes": CLASSES}

    @override_contract_test(reason="decoder, pyramid and heads learn from losses, not from the embedding of a picture")
    def test_gradients_reach_every_trainable_parameter_and_no_frozen_one(self) -> None:
        model = self.build().train()
        model({"image": torch.randn(2, 3, 64, 64)}).pooled.square().sum().backward()
        body = model.model.backbone.body
        assert all((p.grad is not None) == p.requires_grad for p in body.encoder.parameters())


def test_it_is_a_detector_that_learns_boxes_and_masks() -> None:
    made = detector().train()
    assert isinstance(made, Detector)
    images, objects = pictures()
    losses = made.losses(images, objects)
    assert set(losses) == {
        "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"
    }  # fmt: skip
    torch.stack(list(losses.values())).sum().backward()
    without = [n for n, p in made.named_parameters() if p.requires_grad and p.grad is None]
    assert without == [], "every parameter is used: nothing for DDP to wait for"
    found = made.eval().detect(images)
    assert [f.masks.shape[1:] for f in found if f.masks is not None] == [(64, 90), (50, 64)]
    assert all(f.scores is not None and bool((f.scores.diff() <= 0).all()) for f in found)
    assert all(set(f.labels.tolist()) <= {0, 1} for f in found)


def test_objects_can_be_found_without_the_stems_own_maps() -> None:
    made = detector(levels=2, detector="faster-rcnn").train()
    images, objects = pictures()
    assert list(made.model.backbone(torch.zeros(1, 3, 64, 64))) == ["c4", "c5", "pool"]
    torch.stack(list(made.losses(images, objects).values())).sum().backward()
    assert [n for n, p in made.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_few_steps_bring_the_losses_down() -> None:
    made = detector(detector="faster-rcnn").train()
    images, objects = pictures()
    optimizer = torch.optim.AdamW(made.parameters(), lr=5e-3)
    totals = []
    for _ in range(25):
        total = torch.stack(list(made.losses(images, objects).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert sum(totals[-5:]) < 0.7 * sum(totals[:5])


def test_the_true_sizes_of_the_pictures_reach_the_sampling() -> None:
    made = detector(train_ratio=0.25).train()
    images, objects = pictures()
    asked: list[Any] = []
    made.backbone.register_forward_pre_hook(lambda _module, inputs: asked.append(inputs[1]))
    made.losses(images, objects)
    assert asked == [[(64, 90), (64, 81)]], "the second was resized to a shorter side of 64"
    # A copy remembers in itself, not in the one it was copied from.
    other = copy.deepcopy(made)
    other.losses([images[1]], [objects[1]])
    assert asked[1:] == [[(64, 81)]]
    made({"image": torch.randn(1, 3, 64, 64)})
    assert made.model.backbone._sizes is None


def test_detection_is_deterministic_with_all_tokens() -> None:
    made = detector().eval()
    images, _ = pictures()
    one, other = made.detect(images), made.detect(images)
    assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(one, other, strict=True))


def test_group_norm_makes_a_picture_independent_of_its_batch() -> None:
    made = detector(norm="group").eval()
    assert not any(isinstance(part, nn.BatchNorm2d) for part in made.modules())
    assert any(isinstance(part, nn.BatchNorm2d) for part in detector(norm="batch").modules())


@torch.no_grad()
def test_as_an_encoder_it_embeds_with_all_tokens() -> None:
    made = detector().eval()
    image = torch.randn(2, 3, 64, 64)
    one, other = made({"image": image}), made({"image": image})
    assert one.pooled.shape == (2, 24) and one.grid == (4, 4)
    assert torch.equal(one.pooled, other.pooled)
    assert one.tokens is not None
    torch.testing.assert_close(one.tokens.mean(dim=1), one.pooled)


def test_an_exported_detector_finds_the_same_objects(tmp_path: Path) -> None:
    made = detector().eval()
    config = MIMDetConfig(**TINY).model_dump(mode="json", exclude_defaults=True)
    save_encoder(
        made, tmp_path / "kept", use="detection:mimdet", config={**config, "init": "somewhere"}, classes=CLASSES
    )
    loaded = load_encoder(tmp_path / "kept", device="cpu")
    assert isinstance(loaded.module, MIMDetDetector)
    assert loaded.module.classes == CLASSES
    images, _ = pictures()
    for one, other in zip(made.detect(images), loaded.module.detect(images), strict=True):
        assert torch.equal(one.boxes, other.boxes) and torch.equal(one.labels, other.labels)
    with pytest.raises(RecipeError, match="has the classes cat, dog"):
        loaded.module.open(["bird"])


def test_parameters_learn_at_three_paces() -> None:
    made = detector(lr_multiplier=4.0)
    scale = {id(p): group["lr_scale"] for group in made.parameter_groups() for p in group["params"]}
    found = {name: scale[id(p)] for name, p in made.named_parameters() if p.requires_grad}
    assert {s for n, s in found.items() if "encoder.patch_embed" in n} == {1.0}
    assert {s for n, s in found.items() if "encoder.blocks" in n} == {0.25}
    assert {s for n, s in found.items() if "decoder" in n or "roi_heads" in n or ".fpn." in n} == {4.0}
    for group in made.parameter_groups():
        assert ("weight_decay" in group) == all(p.ndim <= 1 for p in group["params"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"detector": "retinanet"}, "mask-rcnn, faster-rcnn and keypoint-rcnn"),
        ({"embed_dim": 36, "num_heads": 3}, "multiple of 8"),
        ({"num_heads": 5}, "of num_heads = 5"),
        ({"decoder_heads": 3}, "decoder_heads = 3"),
        ({"image_size": 100}, "stride, 16"),
        ({"image_size": [64, 90]}, "stride, 16"),
        ({"train_ratio": 0.0}, "train_ratio"),
        ({"stem": "patch", "levels": 2}, "levels = 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MIMDetConfig(**{**TINY, **settings})


# ------------------------------------------------------------------------------------------------------ first weights


@pytest.mark.parametrize("form", ["official", "official in a wrapper", "transformers", "objective"])
def test_encoder_and_decoder_of_a_masked_autoencoder_are_taken(tmp_path: Path, form: str) -> None:
    state = mae_state()
    file = tmp_path / ("mae.pth" if "wrapper" in form else "mae.safetensors")
    if form == "official in a wrapper":
        torch.save({"model": state}, file)
    elif form == "objective":
        save_file(
            {
                f"model.{'decoder' if 'decoder' in k or k == 'mask_token' else 'encoder'}.{k}": v
                for k, v in state.items()
            },
            file,
        )
    else:
        save_file(transformers_names(state) if form == "transformers" else state, file)
    made = detector(init=str(file))
    own = made.backbone.state_dict()
    taken = [k for k in state if k.startswith(("blocks.", "norm."))]
    assert all(torch.equal(own[f"encoder.{key}"], state[key]) for key in taken)
    for key in ("decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight", "decoder_norm.bias"):
        assert torch.equal(own[f"decoder.{key}"], state[key]), key
    for part, key in (("encoder", "pos_embed"), ("decoder", "decoder_pos_embed")):
        wanted = resize_positions(state[key], (3, 3), (4, 4))
        torch.testing.assert_close(own[f"{part}.{key}"], wanted)
    assert made.loaded is not None
    assert {"cls_token", "mask_token", "patch_embed.proj.weight", "decoder_pred.bias"} <= set(made.loaded.ignored)
    assert {k for k in made.loaded.ignored if "decoder_blocks" in k} == {
        k for k in state if "blocks.1" in k or "blocks.2" in k
    } - {k for k in state if k.startswith("blocks.")}
    fresh = set(made.loaded.fresh)
    assert all(name in fresh for name in own if "patch_embed" in name or "conv_feat_proj" in name)
    assert fresh | set(made.loaded.loaded) == set(own)


def test_the_mask_token_and_the_patches_are_taken_where_they_are_used() -> None:
    state = mae_state(grid=4)
    made = detector(fill="mask_token", stem="patch")
    load_mae_checkpoint(made.backbone, state)
    assert torch.equal(made.backbone.decoder.mask_token, state["mask_token"])
    assert torch.equal(made.backbone.state_dict()["encoder.patch_embed.proj.weight"], state["patch_embed.proj.weight"])
    assert torch.equal(made.backbone.encoder.pos_embed, state["pos_embed"])
    assert not made.backbone.encoder.pos_embed.requires_grad


def test_a_trained_backbone_is_taken_whole() -> None:
    trained, made = detector().backbone, detector(train_ratio=1.0).backbone
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter))
    report = load_mae_checkpoint(made, trained.state_dict())
    assert report.fresh == report.ignored == ()
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in made.state_dict().items())
    other = detector(fill="mask_token").backbone
    assert set(load_mae_checkpoint(other, trained.state_dict()).fresh) == {"decoder.mask_token"}


def test_a_timm_vit_fills_the_encoder_and_leaves_the_decoder(tmp_path: Path) -> None:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "img_size": 48,
        "patch_size": 16,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 5,
    }
    vit = timm.create_model("vit_tiny_patch16_224", **sizes)
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": sizes}))
    made = detector(init=str(tmp_path))
    own = made.backbone.encoder.state_dict()
    assert all(torch.equal(own[k], v) for k, v in vit.state_dict().items() if k.startswith(("blocks.", "norm.")))
    assert made.loaded is not None and all(name.startswith("encoder.") for name in made.loaded.loaded)
    with pytest.raises(DataError, match=r"set encoder\.num_heads = 3"):
        detector(init=str(tmp_path), num_heads=6)


def _nested(state: dict[str, Tensor]) -> nn.Module:
    """A module whose ``state_dict`` is ``state``."""
    made = nn.Module()
    for name in dict.fromkeys(key.partition(".")[0] for key in state):
        below = {k.partition(".")[2]: v for k, v in state.items() if k.partition(".")[0] == name}
        if "" in below:
            made.register_buffer(name, below[""])
        else:
            made.register_module(name, _nested(below))
    return made


class _Plugin:
    """Stands for the plugin whose objective trained the run; of its settings only ``decoder_heads`` is read."""

    BOWERBIRD_API = "1.0"

    @staticmethod
    @hookimpl
    def bowerbird_objectives() -> Any:
        settings = "bowerbird_detection.mimdet_config:MIMDetConfig"
        yield ObjectiveRecord(
            name="fake:mae", target="x:y", summary="An autoencoder.", needs=("image",), config=settings
        )


def test_a_run_gives_the_decoder_from_its_last_checkpoint(tmp_path: Path) -> None:
    encoder = TimmEncoder.build(TimmConfig(model="test_vit"))
    vit: Any = encoder.trunk.model
    sizes = {
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": vit.blocks[0].attn.num_heads,
        "mlp_ratio": vit.blocks[0].mlp.fc1.out_features / vit.embed_dim,
    }
    run = tmp_path / "run"
    save_encoder(encoder, run / "encoder", use="core:timm", config={"model": "test_vit"})
    decoder = {
        k: v for k, v in mae_state(dim=vit.embed_dim, grid=10, mlp=3).items() if "decoder" in k or k == "mask_token"
    }
    objective = nn.Module()
    objective.register_module("model", _nested({f"decoder.{k}": v for k, v in decoder.items()}))
    parameter = nn.Parameter(torch.zeros(1))
    save_checkpoint(
        run / "checkpoints",
        progress=Progress(step=1),
        objective=objective,
        optimizer=torch.optim.SGD([parameter], lr=1.0),
    )
    recipe = {
        "encoder": {"use": "core:timm", "model": "test_vit"},
        "objective": {"use": "fake:mae", "decoder_heads": 4},
    }
    (run / "recipe.json").write_text(json.dumps(recipe))
    registry = get_registry()
    registry.register_module("fake", _Plugin)
    try:
        started = detector(init=str(run), **sizes)
        assert torch.equal(started.backbone.decoder.decoder_embed.weight, decoder["decoder_embed.weight"])
        own, theirs = started.backbone.encoder.state_dict(), vit.state_dict()
        assert torch.equal(own["blocks.0.mlp.fc1.weight"], theirs["blocks.0.mlp.fc1.weight"])
        with pytest.raises(DataError, match=r"set encoder\.decoder_heads = 4"):
            detector(init=str(run), **{**sizes, "decoder_heads": 2})
    finally:
        registry.unregister("fake")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 32}, r"embed_dim 32 \(ours: 24\)"),
        ({"depth": 3}, r"depth 3 \(ours: 2\)"),
    ],
)
def test_weights_of_another_architecture_are_refused_and_nothing_changes(changes: dict[str, int], message: str) -> None:
    made = detector()
    before = copy.deepcopy(made.backbone.state_dict())
    with pytest.raises(DataError, match=message):
        load_mae_checkpoint(made.backbone, mae_state(**changes))
    assert all(torch.equal(value, before[key]) for key, value in made.backbone.state_dict().items())


def test_weights_with_strange_or_missing_tensors_are_refused() -> None:
    made, state = detector(), mae_state()
    with pytest.raises(DataError, match=r"has not: encoder\.blocks\.0\.ls1\.gamma"):
        load_mae_checkpoint(made.backbone, {**state, "blocks.0.ls1.gamma": torch.ones(24)})
    with pytest.raises(DataError, match=r"lacks: encoder\.norm\.bias"):
        load_mae_checkpoint(made.backbone, {k: v for k, v in state.items() if k != "norm.bias"})
    with pytest.raises(DataError, match="neither of a masked autoencoder nor of a ViT"):
        load_mae_checkpoint(made.backbone, {"conv1.weight": torch.ones(2)})
    with pytest.raises(DataError, match="none of a square grid"):
        load_mae_checkpoint(made.backbone, {**state, "pos_embed": torch.ones(1, 8, 24)})


def test_an_init_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Did you mean 'vit_tiny_patch16_224'"):
        detector(init="vit_tiny_patch16_22")
    with pytest.raises(DataError, match="holds no run"):
        detector(init=str(tmp_path))
