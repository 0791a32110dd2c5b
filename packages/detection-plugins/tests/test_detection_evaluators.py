"""Average precision: hand-made cases with known answers, and the same numbers as pycocotools on random ones."""

from __future__ import annotations

import contextlib
import copy
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Change, Oracle, chosen, noisy
from sklearn.metrics import average_precision_score

from bowerbird.data import subset
from bowerbird.errors import InputError
from bowerbird.protocols import EvalContext, Objects
from bowerbird.testing import EvaluatorContract, SimpleEvalContext
from bowerbird_detection.canvases import Canvases
from bowerbird_detection.data_configs import CanvasesConfig, CocoAPConfig, MultiLabelConfig
from bowerbird_detection.evaluators import CocoAP, MultiLabel, average_precisions, presence_precisions, results


def canvases(split: str = "test", **changes: Any) -> Canvases:
    sizes = {"canvas_size": 96, "item_size": (20, 48), "items": (1, 2)}
    return Canvases.build(CanvasesConfig(**{"count": 12, **sizes, **changes}), split)


def measured(data: Canvases, change: Change | None = None, **settings: Any) -> dict[str, float]:
    evaluator = CocoAP.build(CocoAPConfig(dataset="the data", **settings))
    return dict(evaluator.run(SimpleEvalContext(Oracle(data, change), default=data)).summary)


class TestCocoAP(EvaluatorContract):
    name = "detection:coco-ap"
    config = {"dataset": "the data"}

    def make_context(self) -> EvalContext:
        data = canvases(count=4)
        return SimpleEvalContext(Oracle(data, noisy), default=data)


class TestMultiLabel(EvaluatorContract):
    name = "detection:multi-label"
    config = {"dataset": "the data", "per_class": True}

    def make_context(self) -> EvalContext:
        data = canvases(count=4)
        return SimpleEvalContext(Oracle(data, noisy), default=data)


def test_a_detector_that_finds_everything_has_an_ap_of_one_for_all_that_is_annotated() -> None:
    found = measured(canvases())
    assert set(found) == {
        "AP", "AP50", "AP75", "APs", "APm", "AR", "ARs", "ARm", "mask AP", "mask AP50", "mask AP75", "mask APs",
        "mask APm", "mask AR", "mask ARs", "mask ARm", "keypoint AP", "keypoint AP50", "keypoint AP75", "keypoint AR",
    } | ({"keypoint APm", "keypoint ARm"} & set(found))  # fmt: skip
    assert all(value == pytest.approx(1.0) for value in found.values())


def test_what_a_detector_does_not_give_is_not_measured_unless_asked_for() -> None:
    def boxes_only(objects: Objects, _: np.random.Generator) -> Objects:
        return replace(objects, masks=None, keypoints=None)

    assert not [name for name in measured(canvases(), boxes_only) if name.startswith(("mask", "keypoint"))]
    assert measured(canvases(), boxes_only, kinds=("mask",))["mask AP"] == 0
    with pytest.raises(InputError, match="kinds has 'keypoint', and 'the data' has no keypoints"):
        measured(canvases(keypoints=False), kinds=("keypoint",))


def test_finding_nothing_gives_zero() -> None:
    found = measured(canvases(), lambda objects, _: chosen(objects, torch.zeros(0, dtype=torch.int64)))
    assert found["AP"] == found["AP50"] == found["AR"] == 0


def truth_of(boxes: list[list[float]], **more: Any) -> dict[str, Any]:
    """One picture, one class, boxes x y w h."""
    entries = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0} | more
        for i, box in enumerate(boxes)
    ]
    return {
        "images": [{"id": 1, "height": 200, "width": 200}], "annotations": entries,
        "categories": [{"id": 1, "name": "one"}],
    }  # fmt: skip


def entry(box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 1, "bbox": box, "score": score}


def test_one_of_two_found_is_precise_up_to_half_the_recall() -> None:
    scores = average_precisions(truth_of([[0, 0, 40, 40], [100, 100, 40, 40]]), [entry([0, 0, 40, 40], 0.9)])
    assert scores.summary()["AP"] == pytest.approx(51 / 101)  # recalls 0, 0.01, ..., 0.5
    assert scores.summary()["AR"] == pytest.approx(0.5)


def test_a_false_alarm_counts_by_its_rank() -> None:
    truth = truth_of([[0, 0, 40, 40]])
    wrong, right = [100.0, 100.0, 40.0, 40.0], [0.0, 0.0, 40.0, 40.0]
    before = average_precisions(copy.deepcopy(truth), [entry(wrong, 0.9), entry(right, 0.5)]).summary()
    after = average_precisions(copy.deepcopy(truth), [entry(wrong, 0.1), entry(right, 0.5)]).summary()
    assert before["AP"] == pytest.approx(0.5) and after["AP"] == pytest.approx(1.0)


def test_an_overlap_counts_up_to_its_iou() -> None:
    found = average_precisions(truth_of([[0, 0, 40, 40]]), [entry([0, 0, 40, 29], 0.9)]).summary()  # IoU 0.725
    assert found["AP"] == pytest.approx(5 / 10) and found["AP50"] == pytest.approx(1.0) and found["AP75"] == 0


def test_crowds_are_neither_right_nor_wrong() -> None:
    truth = truth_of([[0, 0, 40, 40], [100, 100, 90, 90]])
    truth["annotations"][1]["iscrowd"] = 1
    found = [entry([0, 0, 40, 40], 0.5), entry([110, 110, 20, 20], 0.9), entry([140, 140, 20, 20], 0.8)]
    assert average_precisions(truth, found).summary()["AP"] == pytest.approx(1.0)


def test_only_the_best_detections_count() -> None:
    found = [entry([0, 0, 40, 40], 0.5), entry([100, 100, 40, 40], 0.9)]
    assert average_precisions(truth_of([[0, 0, 40, 40]]), found, max_detections=1).summary()["AP"] == 0


@pytest.mark.parametrize(("kind", "iou_type"), [("box", "bbox"), ("mask", "segm"), ("keypoint", "keypoints")])
def test_numbers_are_those_of_pycocotools(kind: str, iou_type: str) -> None:
    from pycocotools import coco, cocoeval

    data = canvases(count=30, items=(1, 3), canvas_size=(96, 160), item_size=(20, 52))
    truth, found = data.coco(), []
    generator = np.random.default_rng(5)
    for one in truth["annotations"][::7]:
        one["iscrowd"] = 1
    for index in range(len(data)):
        objects = noisy(replace(data.objects(index), scores=torch.ones(len(data.objects(index).boxes))), generator)
        found += [one for name, one in results(objects, index + 1) if name == kind]
    sigmas = [0.1, 0.05, 0.2, 0.08]
    ours = average_precisions(copy.deepcopy(truth), copy.deepcopy(found), kind, keypoint_sigmas=sigmas).summary()
    with contextlib.redirect_stdout(io.StringIO()):
        annotated = coco.COCO()
        annotated.dataset = copy.deepcopy(truth)
        annotated.createIndex()
        theirs = cocoeval.COCOeval(annotated, annotated.loadRes(copy.deepcopy(found)), iou_type)
        theirs.params.kpt_oks_sigmas = np.array(sigmas)
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    if kind == "keypoint":
        names = ["AP", "AP50", "AP75", "APm", "APl", "AR", None, None, "ARm", "ARl"]
    else:
        names = ["AP", "AP50", "AP75", "APs", "APm", "APl", None, None, "AR", "ARs", "ARm", "ARl"]
    expected = {name: value for name, value in zip(names, theirs.stats, strict=True) if name and value > -1}
    assert ours == pytest.approx(expected, abs=1e-9)
    assert 0.05 < ours["AP"] < 0.95


def test_groups_are_means_over_their_classes() -> None:
    data = canvases(count=60, items=(1, 2), tail=30.0, balanced_splits=())
    found = measured(data, noisy, groups_split="train", rare_up_to=4, common_up_to=15, per_class=True, kinds=("box",))
    groups = data.frequency_groups(4, 15)
    for position, name in enumerate(("APr", "APc", "APf")):
        each = [found[f"AP/{data.classes[i]}"] for i in np.flatnonzero(groups == position)]
        assert found[name] == pytest.approx(np.mean(each))
    assert len({round(found[name], 6) for name in ("APr", "APc", "APf")}) == 3


def test_lvis_leaves_out_what_was_not_verified() -> None:
    truth = truth_of([[0, 0, 40, 40]])
    truth["categories"] = [{"id": i, "name": str(i), "frequency": "f"} for i in (1, 2, 3)]
    truth["images"] = [
        {"id": 1, "height": 200, "width": 200, "neg_category_ids": [2], "not_exhaustive_category_ids": [1]},
        {"id": 2, "height": 200, "width": 200, "neg_category_ids": [], "not_exhaustive_category_ids": []},
    ]
    for label in (2, 3):  # their truth is in the second picture, where both are found
        truth["annotations"].append(
            {"id": label, "image_id": 2, "category_id": label, "bbox": [0, 0, 40, 40], "area": 1600, "iscrowd": 0}
        )
    right = [{"image_id": 2, "category_id": label, "bbox": [0, 0, 40, 40], "score": 0.5} for label in (2, 3)]
    wrong = [
        {"image_id": 1, "category_id": label, "bbox": [100, 100, 40, 40], "score": 0.9 + label / 100}
        for label in (1, 2, 3)
    ]
    found = [entry([0, 0, 40, 40], 0.8), *right, *wrong]
    for one in truth["annotations"]:
        one["ignore"] = 0
    plain = average_precisions(copy.deepcopy(truth), copy.deepcopy(found)).by_class()
    lvis = average_precisions(copy.deepcopy(truth), copy.deepcopy(found), lvis=True).by_class()
    assert plain.tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert lvis.tolist() == pytest.approx([1.0, 0.5, 1.0])  # 1: not exhaustive; 2: verified absent; 3: not verified


def test_judging_as_lvis_does_needs_its_annotations() -> None:
    with pytest.raises(InputError, match="lvis = true needs annotations as LVIS has them"):
        measured(canvases(), lvis=True)


def test_pictures_of_a_subset_are_judged_alone() -> None:
    data = canvases(count=6)
    context = SimpleEvalContext(Oracle(data), default=subset(data, [4, 1]))
    assert CocoAP.build(CocoAPConfig(dataset="x")).run(context).summary["AP"] == pytest.approx(1.0)


def test_classes_are_matched_by_name() -> None:
    data = canvases()
    oracle = Oracle(data, lambda objects, _: replace(objects, labels=10 - objects.labels))
    oracle.classes = ("other", *reversed(data.classes))
    run = CocoAP.build(CocoAPConfig(dataset="x")).run
    assert run(SimpleEvalContext(oracle, default=data)).summary["AP"] == pytest.approx(1.0)
    oracle.classes = data.classes[:8]
    with pytest.raises(InputError, match="does not know 2 of the 10 classes of the data, such as '8'"):
        run(SimpleEvalContext(oracle, default=data))


def test_other_encoders_and_data_are_refused() -> None:
    with pytest.raises(InputError, match="detection:coco-ap measures detectors"):
        CocoAP.build(CocoAPConfig(dataset="x")).run(SimpleEvalContext(default=canvases()))
    data = canvases()
    with pytest.raises(InputError, match="detection:multi-label needs a data set whose pictures have annotated"):
        MultiLabel.build(MultiLabelConfig(dataset="x")).run(
            SimpleEvalContext(Oracle(data), default=data.sources[0].items)
        )


def test_a_detector_works_in_eval_mode_and_gets_its_mode_back() -> None:
    data = canvases(count=2)
    oracle = Oracle(data)
    context = SimpleEvalContext(oracle, default=data)
    oracle.train()
    CocoAP.build(CocoAPConfig(dataset="x")).run(context)
    assert oracle.training and not any(oracle.modes)


def test_multi_label_ranks_pictures_by_presence_or_by_the_best_score() -> None:
    data = canvases(count=20, items=(1, 3), item_size=(20, 40))
    every = MultiLabel.build(MultiLabelConfig(dataset="x", per_class=True))
    exact = every.run(SimpleEvalContext(Oracle(data), default=data)).summary
    assert exact["mAP"] == pytest.approx(1.0) and len(exact) == 11

    def sure(objects: Objects, _: np.random.Generator) -> Objects:
        presence = torch.zeros(10)
        presence[objects.labels] = 0.9
        return replace(chosen(objects, torch.zeros(0, dtype=torch.int64)), presence=presence)

    assert every.run(SimpleEvalContext(Oracle(data, sure), default=data)).summary["mAP"] == pytest.approx(1.0)


def test_average_precision_of_classes_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    scores = generator.random((50, 6)).astype(np.float32)
    present = generator.random((50, 6)) < 0.3
    present[:, 4] = False
    values = presence_precisions(scores, present)
    assert np.isnan(values[4])
    for label in (0, 1, 2, 3, 5):
        assert values[label] == pytest.approx(average_precision_score(present[:, label], scores[:, label]), abs=1e-6)
