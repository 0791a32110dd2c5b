"""``detection:detector`` trains every detector; ``detection:acsl`` trains a trained one's classifier once more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from coloured_boxes import TINY, ColouredBoxes
from pydantic import ValidationError

from bowerbird.batch import Batch
from bowerbird.encoders import load_encoder
from bowerbird.errors import DataError, InputError, RecipeError
from bowerbird.hookspecs import hookimpl
from bowerbird.protocols import BuildContext, Detector, Encoder, TrainedRun
from bowerbird.recipe import resolve_recipe
from bowerbird.records import DatasetRecord
from bowerbird.registry import get_registry
from bowerbird.testing import ObjectiveContract, SimpleBuildContext, TinyEncoder
from bowerbird.train.data import collate
from bowerbird.train.loop import train
from bowerbird_detection.acsl_objective import ACSLObjective
from bowerbird_detection.configs import ACSLConfig, DetectionConfig, TorchvisionConfig
from bowerbird_detection.detectors import TorchvisionDetector
from bowerbird_detection.mimdet_config import MIMDetConfig
from bowerbird_detection.mimdet_detector import MIMDetDetector
from bowerbird_detection.objective import DetectionObjective, frequency_columns, pictures_of
from bowerbird_detection.transforms import DetectionTransform

DATA = ColouredBoxes(4)
FIRST = "runs/first"
NEEDS = ("image", "image_size", "boxes", "box_labels")


def detector(**more: Any) -> TorchvisionDetector:
    return TorchvisionDetector.build(TorchvisionConfig(**{**TINY, **more}))


def first_stage(seed: int = 7) -> TrainedRun:
    torch.manual_seed(seed)
    trained = detector(classes=DATA.classes).eval().requires_grad_(False)
    return TrainedRun(path=Path(FIRST), encoder=trained, objective_state={}, classes=DATA.classes, recipe={})


def context(**more: Any) -> SimpleBuildContext:
    values: dict[str, Any] = {"classes": DATA.classes, "dataset": DATA, "runs": {FIRST: first_stage()}}
    return SimpleBuildContext(**{**values, **more})


def batch_of(data: ColouredBoxes, count: int, **augmentation: Any) -> Batch:
    transform = DetectionTransform(DetectionConfig(flip=0.0, **augmentation))
    return collate([transform(data[i], np.random.default_rng(i)) for i in range(count)])


class DetectionContract(ObjectiveContract):
    batch_size = 2
    learning_steps = 12

    def make_encoder(self) -> Encoder:
        return detector()

    def make_context(self) -> BuildContext:
        return context()

    def make_batch(self, *, seed: int = 0) -> Batch:
        return batch_of(ColouredBoxes(2, seed=seed), 2)

    def wrong_batches(self) -> Iterator[tuple[str, Batch]]:
        good = self.make_batch()
        for key in NEEDS:
            yield f"a batch without {key!r}", {other: value for other, value in good.items() if other != key}
        yield "a label that is no class", {**good, "box_labels": [[9] * len(b) for b in good["boxes"]]}
        yield "boxes of one picture too few", {**good, "boxes": good["boxes"][:-1]}
        yield "a picture larger than the batch", {**good, "image_size": good["image_size"] + 1}


class TestDetector(DetectionContract):
    name = "detection:detector"

    def make_encoder(self) -> Encoder:
        return detector(backbone="test_efficientnet")  # test_resnet's residual branches start at 0, without gradient


class TestACSL(DetectionContract):
    name = "detection:acsl"
    config = {"run": FIRST}


# ------------------------------------------------------------------------------------------------------- batches


def test_pictures_are_cut_out_of_the_padded_batch_with_their_objects() -> None:
    batch = batch_of(DATA, 4)
    small = torch.rand(3, 20, 30)
    batch["image"][1] = 0
    batch["image"][1, :, :20, :30] = small
    batch["image_size"][1] = torch.tensor([20, 30])
    batch["masks"][1] = torch.ones(len(batch["boxes"][1]), 20, 30, dtype=torch.bool)
    images, objects = pictures_of(batch)
    assert torch.equal(images[1], small) and images[0].shape == (3, 48, 64)
    for i, found in enumerate(objects):
        truth = DATA.objects(i)
        assert torch.equal(found.boxes, truth.boxes) and torch.equal(found.labels, truth.labels)
        assert torch.equal(found.keypoints, truth.keypoints) and not found.crowd.any()
    assert objects[0].boxes.shape == (0, 4) and objects[0].masks.shape == (0, 48, 64)


def test_a_batch_without_masks_keypoints_and_crowds_is_accepted() -> None:
    batch = {key: value for key, value in batch_of(DATA, 2).items() if key in NEEDS}
    _, objects = pictures_of(batch)
    assert objects[1].masks is objects[1].keypoints is objects[1].crowd is None
    objective = DetectionObjective.build(DetectionConfig(), detector(), context()).train()
    assert objective(batch).total.isfinite()


def test_the_total_is_the_sum_of_the_detectors_losses() -> None:
    objective = DetectionObjective.build(DetectionConfig(), detector(detector="mask-rcnn"), context()).train()
    output = objective(batch_of(DATA, 4))
    assert set(output.parts) == {
        "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"
    }  # fmt: skip
    torch.testing.assert_close(output.total, torch.stack(list(output.parts.values())).sum())
    assert output.stats["objects"] == sum(len(DATA.objects(i).boxes) for i in range(4))


def test_a_detector_may_bring_its_own_groups_of_parameters() -> None:
    class Grouped(TorchvisionDetector):
        def parameter_groups(self) -> list[dict[str, Any]]:
            return [{"params": list(self.parameters()), "lr_scale": 0.5}]

    made = Grouped.build(TorchvisionConfig(**TINY))
    groups = DetectionObjective.build(DetectionConfig(), made, context()).parameter_groups()
    assert [group["lr_scale"] for group in groups] == [0.5]


def test_other_encoders_and_data_without_classes_or_boxes_are_refused() -> None:
    with pytest.raises(RecipeError, match="trains detectors such as detection:torchvision, not a TinyEncoder"):
        DetectionObjective.build(DetectionConfig(), TinyEncoder(), context())
    with pytest.raises(RecipeError, match="it names no classes, so there is nothing to detect"):
        DetectionObjective.build(DetectionConfig(), detector(), context(classes=()))
    objective = DetectionObjective.build(DetectionConfig(), detector(), context())
    item = {key: value for key, value in DATA[1].items() if key != "boxes"}
    with pytest.raises(InputError, match="items have no boxes"):
        objective.item_transform()(item, np.random.default_rng(0))


def test_a_recipe_whose_data_has_no_boxes_is_refused_before_anything_is_built() -> None:
    recipe = {
        "name": "r", "encoder": {"use": "detection:torchvision"}, "objective": {"use": "detection:detector"},
        "dataset": {"use": "core:digits"},
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"detection:detector.*Missing: .*boxes"):
        resolve_recipe(recipe)


# ----------------------------------------------------------------------------------------------- the second stage


def second_stage(class_loss: str = "acsl", **more: Any) -> ACSLObjective:
    torch.manual_seed(0)
    return ACSLObjective.build(ACSLConfig(run=FIRST, class_loss=class_loss, **more), detector(), context())  # type: ignore[arg-type]


@pytest.mark.parametrize("class_loss", ["acsl", "sigmoid", "softmax"])
def test_the_second_stage_starts_from_the_first_and_moves_the_classifier_only(class_loss: str) -> None:
    objective = second_stage(class_loss).train()
    start = {name: value.clone() for name, value in objective.encoder.state_dict().items()}
    first = first_stage().encoder.state_dict()
    assert start.keys() == first.keys() and all(torch.equal(start[name], first[name]) for name in first)
    optimizer = torch.optim.SGD(objective.parameter_groups(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        objective(batch_of(DATA, 4)).total.backward()
        optimizer.step()
    moved = {name for name, value in objective.encoder.state_dict().items() if not torch.equal(value, start[name])}
    classifier = "model.roi_heads.box_predictor.cls_score"
    assert moved == {f"{classifier}.weight", f"{classifier}.bias"}
    assert objective.encoder.class_loss == class_loss


def test_the_loss_of_the_second_stage_is_that_of_the_classes_alone() -> None:
    output = second_stage()(batch_of(DATA, 4))
    assert set(output.parts) == {"loss_classifier"} and torch.equal(output.total, output.parts["loss_classifier"])


def test_the_groups_are_those_of_the_training_pictures() -> None:
    # Pictures with red, green, blue: at least two, at least one, one.
    counts = DATA.image_counts().tolist()
    assert counts[2] == 1
    columns = frequency_columns(context(), rare_up_to=1, common_up_to=counts[0] - 1)
    assert columns.tolist() == [-1, 2, 0 if counts[1] <= 1 else 1, 0]
    heads = second_stage(rare_up_to=1, common_up_to=counts[0] - 1, background_fractions=(0.0, 0.0, 1.0))
    assert heads.encoder.model.roi_heads.class_frequency.tolist() == columns.tolist()
    assert heads.encoder.model.roi_heads.background_fractions == (0.0, 0.0, 1.0)


def test_a_detector_with_acsl_from_the_start_gets_the_groups_too() -> None:
    objective = DetectionObjective.build(DetectionConfig(), detector(class_loss="acsl"), context())
    assert objective.encoder.model.roi_heads.class_frequency.tolist() == frequency_columns(context()).tolist()  # type: ignore[attr-defined]


def test_the_second_stage_takes_other_detectors_with_the_heads_of_r_cnn() -> None:
    settings = {
        "image_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 3, "decoder_dim": 16, "decoder_depth": 1,
        "decoder_heads": 4, "shorter_side": 64, "longer_side": 96, "proposals_train": 30, "rois": 16,
        **dict.fromkeys(("fpn_width", "head_width", "mask_width"), 8),
    }  # fmt: skip
    trained, made = (MIMDetDetector.build(MIMDetConfig(**settings)) for _ in range(2))  # type: ignore[arg-type]
    trained.open(DATA.classes)
    run = TrainedRun(path=Path(FIRST), encoder=trained, objective_state={}, classes=DATA.classes, recipe={})
    objective = ACSLObjective.build(ACSLConfig(run=FIRST), made, context(runs={FIRST: run})).train()
    objective(batch_of(DATA, 4)).total.backward()
    learned = [name for name, parameter in objective.named_parameters() if parameter.grad is not None]
    assert learned == [f"encoder.model.roi_heads.box_predictor.cls_score.{kind}" for kind in ("weight", "bias")]
    assert made.stored_config({})["class_loss"] == "acsl"


def test_a_second_stage_that_does_not_fit_the_first_is_refused() -> None:
    config = ACSLConfig(run=FIRST)
    with pytest.raises(RecipeError, match="no run in 'elsewhere'"):
        ACSLObjective.build(ACSLConfig(run="elsewhere"), detector(), context())
    with pytest.raises(RecipeError, match="both stages need the same classes"):
        ACSLObjective.build(config, detector(), context(classes=("red", "blue", "green")))
    with pytest.raises(DataError, match=r"weights 'runs/first' do not fit TorchvisionDetector"):
        ACSLObjective.build(config, detector(head_width=16), context())
    with pytest.raises(RecipeError, match="trains the box head of an R-CNN"):
        ACSLObjective.build(config, detector(detector="retinanet"), context())
    with pytest.raises(RecipeError, match="there is no training data to count in"):
        ACSLObjective.build(config, detector(), context(dataset=None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rare_up_to": 20, "common_up_to": 10}, "rare_up_to = 20 is above common_up_to = 10"),
        ({"background_fractions": (0.1, 0.2, 1.2)}, "expected shares from 0 to 1"),
        ({"score_threshold": 1.0}, "less than 1"),
        ({"class_loss": "focal"}, "softmax"),
    ],
)
def test_settings_of_the_second_stage_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ACSLConfig(run=FIRST, **settings)


@hookimpl
def bowerbird_datasets() -> Iterator[DatasetRecord]:
    yield DatasetRecord(
        name="boxes:coloured",
        target="coloured_boxes:ColouredBoxes",
        summary="Rectangles.",
        provides=("image", "boxes", "box_labels", "masks", "keypoints", "crowd", "item_id"),
    )


def plugin_of_boxes() -> ModuleType:
    module: Any = ModuleType("boxes")
    module.BOWERBIRD_API, module.bowerbird_datasets = "1.0", bowerbird_datasets
    return module


def test_both_stages_run_from_recipes_and_what_is_exported_detects(tmp_path: Path) -> None:
    registry = get_registry()
    registry.register_module("boxes", plugin_of_boxes())
    try:
        encoder = {"use": "detection:torchvision", **TINY, "score_threshold": 0.0}
        common = {"encoder": encoder, "dataset": {"use": "boxes:coloured"}, "train": {"epochs": 1, "batch_size": 2}}
        train(resolve_recipe({"name": "one", "objective": {"use": "detection:detector"}, **common}), tmp_path / "one")
        objective = {"use": "detection:acsl", "run": str(tmp_path / "one")}
        train(resolve_recipe({"name": "two", "objective": objective, **common}), tmp_path / "two")
    finally:
        registry.unregister("boxes")
    first, second = (load_encoder(tmp_path / name, device="cpu").module for name in ("one", "two"))
    assert isinstance(first, TorchvisionDetector) and isinstance(second, TorchvisionDetector)
    assert isinstance(second, Detector) and second.classes == tuple(DATA.classes)
    assert (first.class_loss, second.class_loss) == ("softmax", "acsl")
    assert all(len(found.boxes) for found in second.detect(DATA.pictures()))
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(first({"image": image}).pooled, second({"image": image}).pooled)
