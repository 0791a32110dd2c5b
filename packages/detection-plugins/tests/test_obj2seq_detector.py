"""``detection:obj2seq`` as a detector: settings, targets, what is found, export, and training on real canvases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from bowerbird.encoders import load_encoder, save_encoder
from bowerbird.errors import DataError, InputError, RecipeError, UnknownNameError
from bowerbird.protocols import Objects
from bowerbird.testing import EncoderContract, SimpleBuildContext, assert_close, override_contract_test
from bowerbird.train.data import collate
from bowerbird_detection.canvases import Canvases
from bowerbird_detection.configs import DetectionConfig
from bowerbird_detection.data_configs import CanvasesConfig
from bowerbird_detection.obj2seq_config import Obj2SeqConfig
from bowerbird_detection.obj2seq_detector import Obj2SeqDetector
from bowerbird_detection.objective import DetectionObjective

TINY: dict[str, Any] = {
    "stages": [8, 8], "levels": 2, "extra_levels": 1, "embed_dim": 8, "num_heads": 2, "num_points": 2, "ffn_dim": 16,
    "encoder_layers": 1, "prompt_blocks": 1, "decoder_layers": 2, "num_queries": 4, "shorter_side": 16,
    "longer_side": 32, "backbone_lr": 1.0, "points_lr": 1.0,
}  # fmt: skip
CLASSES = ("cup", "jar", "pot")


def detector(**more: Any) -> Obj2SeqDetector:
    torch.manual_seed(1)
    made = Obj2SeqDetector.build(Obj2SeqConfig(**{**TINY, **more}))
    made.open(CLASSES)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(3, height, width, generator=generator) for height, width in sizes or ((16, 16), (24, 16))]


def some_objects(count: int = 2, points: int = 2) -> Objects:
    boxes = torch.tensor([[2.0, 3.0, 10.0, 9.0], [1.0, 1.0, 5.0, 14.0], [8.0, 8.0, 16.0, 16.0]])[:count]
    keypoints = torch.cat([boxes[:, None, :2].expand(-1, points, -1) + 1, torch.full((count, points, 1), 2.0)], dim=2)
    return Objects(boxes=boxes, labels=torch.arange(count) % 3, keypoints=keypoints)


class TestEncoder(EncoderContract):
    name = "detection:obj2seq"
    config = {**TINY, "classes": CLASSES}
    image_size = 16

    @override_contract_test(reason="prompts, decoder and head learn from losses, not from the embedding of a picture")
    def test_gradients_reach_every_trainable_parameter_and_no_frozen_one(self) -> None:
        model = self.build().train()
        model({"image": torch.randn(2, 3, 16, 16)}).pooled.square().sum().backward()
        assert all(p.grad is not None for p in model.network.encoder.parameters())


# ----------------------------------------------------------------------------------------------------------- detect


def test_what_is_found_lies_in_the_picture_best_first_with_the_presence_of_every_class() -> None:
    made = detector(num_keypoints=2, keypoint_classes=["jar"], max_detections=9).eval()
    images = pictures((16, 16), (40, 24), (16, 64))
    for image, found in zip(images, made.detect(images), strict=True):
        height, width = image.shape[1:]
        assert found.scores is not None and found.presence is not None and found.keypoints is not None
        assert (
            found.boxes.shape == (9, 4)
            and found.labels.dtype == torch.int64
            and set(found.labels.tolist()) <= {0, 1, 2}
        )
        assert (found.boxes[:, :2] <= found.boxes[:, 2:]).all() and (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([width, height] * 2)).all()
        assert (found.scores[:-1] >= found.scores[1:]).all() and ((found.scores >= 0) & (found.scores <= 1)).all()
        assert found.presence.shape == (3,) and (found.scores <= found.presence[found.labels] + 1e-6).all()
        assert (found.keypoints[..., 2].any(dim=1) == (found.labels == 1)).all()


def test_pictures_are_found_in_as_they_are_alone_whatever_they_are_padded_with() -> None:
    made = detector(encoder_layers=0, extra_levels=0).eval()
    images = pictures((16, 16), (16, 16))
    together = made.detect(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = made.detect([image])
        assert_close(found.boxes, alone.boxes, rtol=1e-4, atol=1e-3)
        assert_close(found.scores, alone.scores, rtol=1e-4, atol=1e-5)
    assert made.detect([]) == []


@pytest.mark.parametrize("more", [{}, {"prompting": "every"}])
def test_a_subset_of_the_classes_as_prompts_leaves_scores_and_boxes_as_they_are(more: dict[str, Any]) -> None:
    made = detector(max_detections=1000, **more).eval()
    images = pictures()
    for whole, some in zip(made.detect(images), made.detect(images, prompts=["pot", "cup"]), strict=True):
        mine = whole.labels != 1
        assert set(some.labels.tolist()) == {0, 2}
        assert_close(some.labels, whole.labels[mine])
        assert_close(some.boxes, whole.boxes[mine], rtol=1e-5, atol=1e-4)
        assert whole.scores is not None
        assert_close(some.scores, whole.scores[mine], rtol=1e-5, atol=1e-6)
        if whole.presence is None:
            assert more and some.presence is None
        else:
            assert some.presence is not None and some.presence[1] == 0
            assert_close(some.presence[[0, 2]], whole.presence[[0, 2]], rtol=1e-5, atol=1e-6)


def test_scores_below_the_threshold_are_left_out() -> None:
    scores = detector().eval().detect(pictures())[0].scores
    assert scores is not None
    limit = float(scores[3])
    kept = detector(score_threshold=limit).eval().detect(pictures())[0].scores
    assert kept is not None and len(kept) == 4


# ----------------------------------------------------------------------------------------------------------- losses


def test_targets_are_parts_of_the_picture_and_crowds_say_only_that_their_class_is_there() -> None:
    made = detector(num_keypoints=2)
    found = some_objects(3)
    crowd = Objects(found.boxes, found.labels, keypoints=found.keypoints, crowd=torch.tensor([False, False, True]))
    target = made._target(0, torch.zeros(3, 16, 32), crowd)
    assert_close(target.boxes[0], torch.tensor([6 / 32, 6 / 16, 8 / 32, 6 / 16]))
    assert target.labels.tolist() == [0, 1] and target.present.tolist() == [True, True, True]
    assert target.keypoints is not None
    assert_close(target.keypoints[0, 0], torch.tensor([3 / 32, 4 / 16, 2.0]))


@pytest.mark.parametrize(
    "more",
    [
        {"num_keypoints": 2},
        {"num_keypoints": 2, "keypoint_classes": ["pot"], "oks_variant": "coco"},
        {"prompting": "none", "num_keypoints": 2},
        {"prompting": "every", "refine": True, "head": "parallel"},
        {"retained": 1, "train_sides": [16, 24], "num_keypoints": 2, "keypoint_classes": ["pot"]},
    ],
)
def test_losses_are_finite_and_reach_every_trained_parameter(more: dict[str, Any]) -> None:
    made = detector(**more).train()
    nothing = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), keypoints=torch.zeros(0, 2, 3))
    losses = made.losses(pictures(), [some_objects(), nothing])
    total = torch.stack(list(losses.values())).sum()
    assert total.isfinite()
    total.backward()
    assert [name for name, p in made.named_parameters() if p.requires_grad and p.grad is None] == []
    empty = made.losses(pictures(), [nothing, nothing])
    assert torch.stack(list(empty.values())).sum().isfinite()


def test_half_precision_trains_as_well() -> None:
    made = detector(num_keypoints=2, keypoint_classes=["pot"], refine=True).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = made.losses(pictures(), [some_objects(3), some_objects(1)])
    assert all(value.dtype == torch.float32 for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


def test_the_objective_of_all_detectors_trains_it_on_canvases_with_keypoints() -> None:
    canvases = Canvases.build(CanvasesConfig(count=3, canvas_size=(20, 24), items=(1, 1), item_size=(8, 12)), "train")
    torch.manual_seed(0)
    made = Obj2SeqDetector.build(Obj2SeqConfig(**{**TINY, "num_keypoints": 4, "retained": 3}))
    objective = DetectionObjective.build(DetectionConfig(), made, SimpleBuildContext(classes=canvases.classes))
    views = objective.item_transform()
    assert views is not None and made.classes == canvases.classes
    batch = collate([views(canvases[i], np.random.default_rng(i)) for i in range(3)])
    output = objective.train()(batch)
    assert {"cls_asl", "loss_ce", "loss_kps_l1", "loss_oks"} <= set(output.parts)
    output.total.backward()
    assert sum(len(group["params"]) for group in objective.parameter_groups()) == len(list(made.parameters()))


def test_a_few_steps_find_the_objects_of_one_picture() -> None:
    torch.manual_seed(0)
    quick = {"num_keypoints": 1, "embed_dim": 16, "encoder_layers": 0, "decoder_layers": 1, "extra_levels": 0}
    made = Obj2SeqDetector.build(Obj2SeqConfig(**{**TINY, **quick}))
    made.open(CLASSES)
    image = torch.zeros(3, 16, 16)
    image[0, 3:9, 2:10] = 1
    found = some_objects(1, points=1)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    for _ in range(50):
        losses = made.losses([image], [found])
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    (best,) = made.eval().detect([image])
    assert best.labels[0] == 0 and best.scores is not None and best.scores[0] > 0.3
    assert_close(best.boxes[0], found.boxes[0], rtol=0, atol=1.5)
    assert best.keypoints is not None and found.keypoints is not None
    assert_close(best.keypoints[0, :, :2], found.keypoints[0, :, :2], rtol=0, atol=1.5)
    assert best.presence is not None and best.presence[0] > best.presence[1:].max()


def test_learning_rates_and_decay_are_the_papers() -> None:
    made = detector(backbone_lr=0.1, points_lr=0.2)
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    seen = set()
    for group in made.parameter_groups():
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            slow = 0.1 if ".backbone." in name else 0.2 if "reference_points" in name or "offsets" in name else 1.0
            assert group["lr_scale"] == slow, name
            embeds = ("class_prompts", "level_embed", "pos_emb", "position")
            still = parameter.ndim == 1 or any(part in name for part in embeds)
            assert (group.get("weight_decay") == 0.0) == still, name
    assert seen == set(names.values())


# ----------------------------------------------------------------------------------------------------------- export


def test_an_exported_detector_finds_the_same(tmp_path: Path) -> None:
    np.save(tmp_path / "names.npy", np.random.default_rng(0).normal(size=(3, 5)))
    settings = {**TINY, "prompt_vectors": str(tmp_path / "names.npy"), "num_keypoints": 2}
    made = detector(**settings).eval()
    assert made.network.prompt_indicator.class_prompts.shape == (3, 5)
    save_encoder(made, tmp_path / "kept", use="detection:obj2seq", config=settings, classes=CLASSES)
    (tmp_path / "names.npy").unlink()
    again: Any = load_encoder(tmp_path / "kept", device="cpu").module
    assert again.classes == CLASSES
    for found, wanted in zip(again.detect(pictures()), made.detect(pictures()), strict=True):
        assert_close(found.boxes, wanted.boxes, rtol=1e-5)
        assert_close(found.keypoints, wanted.keypoints, rtol=1e-5)
        assert_close(found.presence, wanted.presence, rtol=1e-5)


def test_it_stands_on_any_timm_backbone_with_frozen_statistics() -> None:
    settings = {key: value for key, value in TINY.items() if key != "stages"}
    torch.manual_seed(0)
    made = Obj2SeqDetector.build(
        Obj2SeqConfig(**{**settings, "backbone": "resnet10t", "levels": 3, "shorter_side": 32})
    )
    made.open(CLASSES)
    before = {name: value.clone() for name, value in made.named_buffers()}
    made.train().losses(pictures(), [some_objects(), some_objects(3)])
    assert before and all(torch.equal(value, before[name]) for name, value in made.named_buffers())
    assert len(made.eval().detect(pictures())) == 2
    assert made.stored_config({"backbone": "resnet10t", "pretrained": True}) == {
        "backbone": "resnet10t", "classes": list(CLASSES)
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- bad input


def test_wrong_use_is_refused_with_what_to_do(tmp_path: Path) -> None:
    fresh = Obj2SeqDetector.build(Obj2SeqConfig(**TINY))
    with pytest.raises(InputError, match="no classes yet"):
        fresh.eval().detect(pictures())
    with pytest.raises(RecipeError, match="at least one class"):
        fresh.open(())
    made = detector(num_keypoints=2)
    made.open(CLASSES)
    with pytest.raises(RecipeError, match=r"encoder\.classes"):
        made.open(CLASSES[::-1])
    with pytest.raises(InputError, match="eval"):
        made.detect(pictures())
    with pytest.raises(InputError, match="the objects of 1"):
        made.losses(pictures(), [some_objects()])
    with pytest.raises(InputError, match=r"picture 1: keypoints \(2, 5, 3\)"):
        made.losses(pictures(), [some_objects(), some_objects(points=5)])
    with pytest.raises(InputError, match="picture 0: label 7"):
        made.losses(pictures(), [Objects(torch.rand(1, 4), torch.tensor([7])), some_objects()])
    with pytest.raises(InputError, match="uint8"):
        made.losses([torch.zeros(3, 8, 8, dtype=torch.uint8)], [some_objects()])
    with pytest.raises(InputError, match="train"):
        made.eval().losses(pictures(), [some_objects(), some_objects()])
    with pytest.raises(UnknownNameError, match="Did you mean 'pot'"):
        made.detect(pictures(), prompts=["pto"])
    with pytest.raises(RecipeError, match="keypoint_classes"):
        detector(num_keypoints=2, keypoint_classes=["vase"])
    (tmp_path / "bad.npy").write_text("no numbers")
    with pytest.raises(DataError, match=r"bad\.npy"):
        detector(prompt_vectors=str(tmp_path / "bad.npy"))
    np.save(tmp_path / "two.npy", np.zeros((2, 4)))
    with pytest.raises(DataError, match="each of 3 classes"):
        detector(prompt_vectors=str(tmp_path / "two.npy"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embed_dim": 30}, "multiple of 4"),
        ({"stages": [8], "levels": 2}, "stages"),
        ({"stages": [8, 8], "levels": 2, "pretrained": True}, "take the place"),
        ({"prompting": "none", "combine": "multiple"}, "needs prompting"),
        ({"keypoint_classes": ["a"]}, "needs num_keypoints"),
        ({"num_keypoints": 2, "keypoint_sigmas": [0.1]}, "1 for num_keypoints = 2"),
        ({"shorter_side": 900, "longer_side": 800}, "longer_side"),
        ({"classes": ["a", "a"]}, "there twice"),
        ({"weights": "a.pth", "pretrained": True}, "two sources"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Obj2SeqConfig(**settings)
