"""``detection:torchvision``: torchvision's detectors behind the contract of ``Detector``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from coloured_boxes import TINY, ColouredBoxes
from pydantic import ValidationError
from torch import Tensor
from torchvision.ops import box_iou

from bowerbird.encoders import load_encoder, save_encoder
from bowerbird.encoders.configs import TimmConfig
from bowerbird.encoders.timm_encoder import TimmEncoder
from bowerbird.errors import InputError, RecipeError
from bowerbird.protocols import Objects
from bowerbird.testing import EncoderContract, override_contract_test
from bowerbird_detection.configs import TorchvisionConfig
from bowerbird_detection.detectors import TorchvisionDetector

KINDS = ["faster-rcnn", "mask-rcnn", "keypoint-rcnn", "retinanet"]
DATA = ColouredBoxes(4)


def detector(
    kind: str = "faster-rcnn", *, classes: Any = DATA.classes, seed: int = 0, **more: Any
) -> TorchvisionDetector:
    torch.manual_seed(seed)
    keypoints = 2 if kind == "keypoint-rcnn" else None
    config = TorchvisionConfig(detector=kind, num_keypoints=keypoints, **{**TINY, **more})
    made = TorchvisionDetector.build(config)
    if classes:
        made.open(classes)
    return made.train()


def losses(model: TorchvisionDetector, images: list[Tensor], objects: list[Objects]) -> dict[str, float]:
    torch.manual_seed(1)  # torchvision samples proposals at random
    with torch.no_grad():
        return {name: float(value) for name, value in model.losses(images, objects).items()}


class TestContract(EncoderContract):
    name = "detection:torchvision"
    config = {**TINY, "classes": ("a", "b")}

    @override_contract_test(reason="the heads learn from losses, not from the embedding of a picture")
    def test_gradients_reach_every_trainable_parameter_and_no_frozen_one(self) -> None:
        model = self.build().train()
        model({"image": torch.randn(2, 3, 32, 32)}).pooled.square().sum().backward()
        body = model.model.backbone.body
        assert all((p.grad is not None) == p.requires_grad for p in body.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_every_detector_learns_with_all_its_parameters_and_from_pictures_without_objects_too(kind: str) -> None:
    model = detector(kind)
    parts = model.losses(DATA.pictures(), [DATA.objects(i) for i in range(4)])
    assert len(DATA.objects(0).boxes) == 0
    assert all(value.ndim == 0 and value.isfinite() for value in parts.values())
    torch.stack(list(parts.values())).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_those_of_the_torchvision_model_with_classes_from_zero(kind: str) -> None:
    model = detector(kind, score_threshold=0.0).eval()
    images = [torch.rand(3, 48, 64), torch.rand(3, 60, 40)]
    first = 0 if kind == "retinanet" else 1
    with torch.no_grad():
        expected = model.model(images)
    for found, wanted, image in zip(model.detect(images), expected, images, strict=True):
        assert len(found.boxes) > 0
        assert torch.equal(found.boxes, wanted["boxes"])
        assert torch.equal(found.scores, wanted["scores"])
        assert (found.scores.diff() <= 0).all()
        assert torch.equal(found.labels, wanted["labels"] - first)
        assert set(found.labels.tolist()) <= {0, 1, 2}
        if kind == "mask-rcnn":
            assert found.masks.dtype == torch.bool and found.masks.shape == (len(found.boxes), *image.shape[1:])
            assert torch.equal(found.masks, wanted["masks"][:, 0] >= 0.5)
        if kind == "keypoint-rcnn":
            assert torch.equal(found.keypoints[..., :2], wanted["keypoints"][..., :2])


def test_a_detector_learns_to_find_coloured_boxes_and_to_name_them() -> None:
    data = ColouredBoxes(3)
    model, objects = detector(), [data.objects(i) for i in range(3)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        torch.stack(list(model.losses(data.pictures(), objects).values())).sum().backward()
        optimizer.step()
    found = model.eval().detect(data.pictures())
    for truth, seen in zip(objects, found, strict=True):
        best = box_iou(truth.boxes, seen.boxes[: len(truth.boxes)]).max(dim=1)
        assert (best.values > 0.5).all()
        assert torch.equal(seen.labels[best.indices], truth.labels)


def test_retinanet_raises_the_score_of_the_class_that_is_there_and_lowers_the_others() -> None:
    for label in range(3):
        model, objects = detector("retinanet"), DATA.objects(1)
        objects = replace(objects, labels=torch.full_like(objects.labels, label))
        model.losses(DATA.pictures()[1:2], [objects])["classification"].backward()
        slope = model.model.head.classification_head.cls_logits.bias.grad.unflatten(0, (-1, 3)).sum(dim=0)
        assert [bool(value < 0) for value in slope] == [c == label for c in range(3)]


def test_boxes_around_crowds_and_boxes_without_area_are_left_out() -> None:
    model = detector("mask-rcnn")
    images, objects = DATA.pictures()[2:3], DATA.objects(2)
    added = replace(
        objects,
        boxes=torch.cat([objects.boxes, torch.tensor([[1.0, 2.0, 60.0, 40.0], [5.0, 5.0, 5.0, 9.0]])]),
        labels=torch.cat([objects.labels, torch.tensor([1, 1])]),
        masks=torch.cat([objects.masks, torch.ones(2, 48, 64, dtype=torch.bool)]),
        crowd=torch.tensor([False] * len(objects.boxes) + [True, False]),
    )
    assert losses(model, images, [added]) == losses(model, images, [objects])


def test_what_is_found_does_not_change_when_a_detector_is_stored_and_read(tmp_path: Path) -> None:
    model = detector("mask-rcnn", score_threshold=0.0).eval()
    config = {**TINY, "detector": "mask-rcnn", "score_threshold": 0.0}
    save_encoder(model, tmp_path / "e", use="detection:torchvision", config=config, classes=DATA.classes)
    loaded = load_encoder(tmp_path / "e", device="cpu").module
    assert isinstance(loaded, TorchvisionDetector) and loaded.classes == tuple(DATA.classes)
    for before, after in zip(model.detect(DATA.pictures()), loaded.detect(DATA.pictures()), strict=True):
        assert torch.equal(before.boxes, after.boxes) and torch.equal(before.masks, after.masks)


def test_a_stored_detector_on_an_exported_encoder_does_not_need_its_folder(tmp_path: Path) -> None:
    encoder = TimmEncoder.build(TimmConfig(model="test_resnet"))
    save_encoder(encoder, tmp_path / "e", use="core:timm", config={"model": "test_resnet"})
    folder = str(tmp_path / "e")
    model = detector(backbone=folder).eval()
    save_encoder(model, tmp_path / "d", use="detection:torchvision", config={**TINY, "backbone": folder})
    (tmp_path / "e").rename(tmp_path / "moved")
    loaded = load_encoder(tmp_path / "d", device="cpu").module
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded({"image": image}).pooled, model({"image": image}).pooled.detach())


def test_an_embedding_is_the_mean_of_the_tokens_of_the_backbone() -> None:
    model = detector().eval()
    features = model({"image": torch.rand(2, 3, 64, 96)})
    assert features.grid == (2, 3) and features.tokens.shape == (2, 6, model.embed_dim)
    torch.testing.assert_close(features.pooled, features.tokens.mean(dim=1))


@pytest.mark.parametrize("kind", ["faster-rcnn", "mask-rcnn"])
def test_detectors_learn_and_detect_under_bf16(kind: str) -> None:
    model = detector(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = model.losses(DATA.pictures(), [DATA.objects(i) for i in range(4)])
        torch.stack([value.float() for value in parts.values()]).sum().backward()
        found = model.eval().detect(DATA.pictures())
    assert all(value.isfinite() for value in parts.values()) and len(found) == 4


# ------------------------------------------------------------------------------------------------------- bad input


def test_labels_outside_the_classes_are_refused() -> None:
    model, objects = detector(), DATA.objects(1)
    for label in (-1, 3):
        wrong = replace(objects, labels=torch.full_like(objects.labels, label))
        with pytest.raises(InputError, match=f"picture 0: label {label} is no class; expected 0 to 2"):
            model.losses(DATA.pictures()[1:2], [wrong])


def test_shapes_that_do_not_fit_are_refused_with_the_number_of_the_picture() -> None:
    model, images = detector("mask-rcnn"), DATA.pictures()
    objects = [DATA.objects(i) for i in range(4)]
    with pytest.raises(InputError, match="picture 1: masks"):
        model.losses(images, [objects[0], replace(objects[1], masks=torch.zeros(1, 5, 5).bool()), *objects[2:]])
    with pytest.raises(InputError, match="picture 0 has no masks"):
        model.losses(images, [replace(objects[0], masks=None), *objects[1:]])
    with pytest.raises(InputError, match="picture 3: boxes"):
        model.losses(images, [*objects[:3], replace(objects[3], boxes=torch.zeros(2, 5))])
    with pytest.raises(InputError, match="4 pictures and the objects of 3"):
        model.losses(images, objects[:3])
    with pytest.raises(InputError, match=r"picture 0 is torch.uint8 .*expected float \(3, height, width\)"):
        model.losses([images[0].to(torch.uint8)], objects[:1])
    with pytest.raises(InputError, match="keypoint-rcnn expects"):
        detector("keypoint-rcnn").losses(images[1:2], [replace(objects[1], keypoints=None)])
    with pytest.raises(InputError, match=r"expected pictures \(batch, 3, height, width\)"):
        model({"image": torch.zeros(3, 32, 32)})


def test_a_detector_without_classes_or_in_the_wrong_mode_says_so() -> None:
    fresh = detector(classes=None)
    with pytest.raises(InputError, match="no classes yet"):
        fresh.losses(DATA.pictures(), [DATA.objects(i) for i in range(4)])
    with pytest.raises(InputError, match="no classes yet"):
        fresh.eval().detect(DATA.pictures())
    opened = detector()
    with pytest.raises(InputError, match="detect needs eval mode"):
        opened.detect(DATA.pictures())
    with pytest.raises(InputError, match="losses need training mode"):
        opened.eval().losses(DATA.pictures(), [DATA.objects(i) for i in range(4)])


def test_a_backbone_whose_strides_torchvision_would_round_is_refused() -> None:
    dpt = {
        "use": "detection:dpt", "image_size": 48, "patch_size": 3, "dims": [8] * 4, "depths": [1] * 4,
        "heads": [1] * 4, "mlp_ratios": [2.0] * 4, "sr_ratios": [2, 2, 1, 1],
    }  # fmt: skip
    with pytest.raises(InputError, match=r"strides \[3, 6, 12, 24\].*powers of 2 only"):
        detector(backbone=dpt)


def test_a_detector_keeps_its_classes() -> None:
    model = detector()
    model.open(list(DATA.classes))
    with pytest.raises(RecipeError, match="the detector has the classes red, green, blue; the data has red, blue"):
        model.open(["red", "blue"])
    with pytest.raises(RecipeError, match="at least one class"):
        detector(classes=None).open([])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"detector": "keypoint-rcnn"}, "num_keypoints"),
        ({"num_keypoints": 3}, "num_keypoints"),
        ({"detector": "retinanet", "class_loss": "acsl"}, "retinanet has its focal loss"),
        ({"shorter_side": 100, "longer_side": 50}, "shorter_side = 100 is above longer_side = 50"),
        ({"anchor_ratios": (0.0,)}, "expected ratios above 0"),
        ({"classes": ("a", "b", "a")}, "a is there twice"),
        ({"weights": "w.pth", "pretrained": True}, "two sources of the first weights"),
        ({"backbone": {"model": "resnet18"}}, "a table needs 'use'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TorchvisionConfig(**settings)
