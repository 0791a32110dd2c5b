"""Adaptive class suppression loss (arXiv 2104.00885): the published code's numbers, and what the equations imply."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from coloured_boxes import TINY, ColouredBoxes
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from bowerbird.errors import InputError, RecipeError, UnknownNameError
from bowerbird.testing import assert_close
from bowerbird_detection.acsl import (
    ACSLBoxHead,
    adaptive_class_suppression_loss,
    freeze_all_but,
    initialize_classifier,
    sigmoid_classification_loss,
    suppression_weights,
)
from bowerbird_detection.configs import TorchvisionConfig
from bowerbird_detection.detectors import TorchvisionDetector

Golden = Callable[[str], dict[str, Any]]
GROUPS = ("rare", "common", "frequent")


def random_case(seed: int, rows: int, classes: int, foreground: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """float64 logits ``(rows, classes + 1)``, labels, and groups with -1 for the background."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes + 1, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(1, classes + 1, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) >= foreground] = 0
    groups = torch.randint(0, 3, (classes + 1,), generator=generator)
    groups[0] = -1
    return logits, labels, groups


cases = st.builds(
    random_case, st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 12), st.sampled_from([0.3, 0.8])
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.one_hot(labels, logits.shape[1]).to(logits.dtype)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, one_hot(logits, labels), reduction="none")


# ------------------------------------------------------------------------------------------- published numbers


@pytest.mark.parametrize("name", ["loss_foreground_only", "loss_low_threshold", "loss_mixed_batch"])
def test_weights_loss_and_gradient_are_those_of_the_published_code(golden: Golden, name: str) -> None:
    g = golden(f"acsl/{name}")
    logits = g["logits"].requires_grad_()
    arguments: dict[str, Any] = {
        "score_threshold": g["score_threshold"],
        "class_frequency": g["class_group"],
        "background_fractions": [g[f"bg_fraction_{group}"] for group in GROUPS],
        "drawn_rows": [g[f"bg_rows_suppressing_{group}"] for group in GROUPS],
    }
    assert torch.equal(suppression_weights(logits, g["labels"], **arguments), g["weight_mask"].bool())
    loss = adaptive_class_suppression_loss(logits, g["labels"], **arguments)
    loss.backward()
    assert_close(loss.item(), g["loss"], atol=1e-6)
    assert_close(logits.grad, g["grad_logits"], atol=1e-7)


@pytest.mark.parametrize("name", ["loss_low_threshold", "loss_mixed_batch"])
def test_as_many_background_rows_are_drawn_as_in_the_published_code(golden: Golden, name: str) -> None:
    g = golden(f"acsl/{name}")
    weights = suppression_weights(
        g["logits"], g["labels"], score_threshold=g["score_threshold"], class_frequency=g["class_group"]
    )
    background = g["labels"] == 0
    for group, word in enumerate(GROUPS):
        columns = g["class_group"] == group
        assert int(weights[background][:, columns].any(dim=1).sum()) == len(g[f"bg_rows_suppressing_{word}"])


# --------------------------------------------------------------------------------------------------- invariants


@settings(max_examples=25, deadline=None)
@given(case=cases, seed=st.integers(0, 99))
def test_the_gradient_is_weight_times_probability_minus_target_over_the_number_of_rows(
    case: tuple[Tensor, Tensor, Tensor], seed: int
) -> None:
    logits, labels, groups = case
    logits = logits.requires_grad_()
    weights = suppression_weights(logits, labels, class_frequency=groups, generator=seeded(seed))
    adaptive_class_suppression_loss(logits, labels, class_frequency=groups, generator=seeded(seed)).backward()
    target = one_hot(logits, labels)
    expected = weights * (logits.detach().sigmoid() - target) / len(logits)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-9, atol=1e-15)
    assert ((logits.grad > 0) <= (target == 0)).all()  # only the target is raised
    assert torch.equal((logits.grad < 0), target.bool())


@settings(max_examples=25, deadline=None)
@given(case=cases, seed=st.integers(0, 99))
def test_the_loss_is_the_weighted_sum_of_cross_entropies_and_not_negative(
    case: tuple[Tensor, Tensor, Tensor], seed: int
) -> None:
    logits, labels, groups = case
    arguments: dict[str, Any] = {"class_frequency": groups, "score_threshold": 0.4}
    weights = suppression_weights(logits, labels, generator=seeded(seed), **arguments)
    expected = weights * cross_entropy(logits, labels)
    for reduction, wanted in (("none", expected), ("sum", expected.sum()), ("mean", expected.sum() / len(logits))):
        found = adaptive_class_suppression_loss(
            logits, labels, generator=seeded(seed), reduction=reduction, **arguments
        )
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        assert (found >= 0).all()


@settings(max_examples=25, deadline=None)
@given(case=cases, threshold=st.floats(0.01, 0.99))
def test_a_foreground_row_counts_at_its_class_and_where_its_probability_reaches_the_threshold(
    case: tuple[Tensor, Tensor, Tensor], threshold: float
) -> None:
    logits, labels, groups = case
    weights = suppression_weights(logits, labels, class_frequency=groups, score_threshold=threshold)
    probabilities = logits.sigmoid()
    for i in (labels > 0).nonzero()[:, 0].tolist():
        for j in range(logits.shape[1]):
            assert bool(weights[i, j]) == (j == labels[i] or bool(probabilities[i, j] >= threshold))


@settings(max_examples=25, deadline=None)
@given(
    background=st.integers(0, 260),
    foreground=st.integers(0, 5),
    fractions=st.tuples(*[st.sampled_from([0.0, 0.01, 0.1, 0.25, 1.0])] * 3),
    seed=st.integers(0, 99),
)
def test_of_n0_background_rows_the_whole_part_of_fraction_times_n0_suppress_a_group(
    background: int, foreground: int, fractions: tuple[float, float, float], seed: int
) -> None:
    count = background + foreground
    labels = (torch.randperm(count, generator=seeded(seed)) >= background).long()
    logits = torch.full((count, 7), -9.0)
    groups = torch.tensor([-1, 0, 0, 1, 1, 2, 2])
    weights = suppression_weights(
        logits, labels, class_frequency=groups, background_fractions=fractions, generator=seeded(seed)
    )
    rows = weights[labels == 0]
    assert rows[:, 0].all()
    for group, fraction in enumerate(fractions):
        columns = rows[:, groups == group]
        assert torch.equal(columns[:, 0], columns[:, 1])  # a drawn row suppresses every class of the group
        assert int(columns[:, 0].sum()) == int(fraction * background)


def test_fewer_than_a_hundred_background_rows_suppress_no_rare_class_and_fewer_than_ten_no_common_one() -> None:
    groups = torch.tensor([-1, 0, 1, 2])
    for count, drawn in ((9, [0, 0, 9]), (10, [0, 1, 10]), (99, [0, 9, 99]), (100, [1, 10, 100])):
        weights = suppression_weights(
            torch.zeros(count, 4), torch.zeros(count, dtype=torch.long), class_frequency=groups
        )
        assert weights[:, 1:].sum(dim=0).tolist() == drawn


def test_the_three_draws_are_independent() -> None:
    labels, groups = torch.zeros(200, dtype=torch.long), torch.tensor([-1, 0, 1, 2])
    subsets = 0
    for seed in range(50):
        drawn = suppression_weights(
            torch.zeros(200, 4),
            labels,
            class_frequency=groups,
            background_fractions=(0.05, 0.1, 0.1),
            generator=seeded(seed),
        )
        subsets += bool((drawn[:, 1] <= drawn[:, 2]).all())
        assert not torch.equal(drawn[:, 2], drawn[:, 3])
    assert subsets < 5


def test_the_same_generator_draws_the_same_rows_and_moves_no_other() -> None:
    logits, labels, groups = random_case(0, 300, 6, foreground=0.1)
    before = torch.get_rng_state()
    first = suppression_weights(logits, labels, class_frequency=groups, generator=seeded(5))
    assert torch.equal(first, suppression_weights(logits, labels, class_frequency=groups, generator=seeded(5)))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, suppression_weights(logits, labels, class_frequency=groups, generator=seeded(6)))


def test_above_all_scores_only_the_target_of_a_foreground_row_has_a_gradient() -> None:
    logits, labels, groups = random_case(1, 20, 6, foreground=1.0)
    logits = logits.requires_grad_()
    adaptive_class_suppression_loss(logits, labels, class_frequency=groups, score_threshold=1 - 1e-12).backward()
    assert torch.equal(logits.grad != 0, one_hot(logits, labels).bool())


def test_below_all_scores_foreground_rows_have_the_whole_cross_entropy() -> None:
    logits, labels, _ = random_case(2, 20, 6, foreground=1.0)
    found = adaptive_class_suppression_loss(logits, labels, score_threshold=1e-12)
    torch.testing.assert_close(found, cross_entropy(logits, labels).sum() / 20)
    torch.testing.assert_close(found, sigmoid_classification_loss(logits, labels))


def test_where_all_classes_are_frequent_background_rows_have_the_whole_cross_entropy() -> None:
    logits, labels, _ = random_case(3, 30, 6, foreground=0.5)
    for frequency in (None, torch.full((7,), 2)):
        entries = adaptive_class_suppression_loss(logits, labels, class_frequency=frequency, reduction="none")
        torch.testing.assert_close(entries[labels == 0], cross_entropy(logits, labels)[labels == 0])


def test_one_fraction_holds_for_all_classes() -> None:
    labels = torch.zeros(40, dtype=torch.long)
    weights = suppression_weights(torch.zeros(40, 5), labels, background_fractions=0.25)
    assert weights[:, 1:].sum(dim=0).tolist() == [10] * 4


def test_a_class_that_no_row_confuses_and_no_drawn_row_suppresses_has_no_gradient() -> None:
    logits, labels, groups = random_case(4, 50, 6)
    groups[3] = 0
    logits[:, 3] = -2.0
    labels[labels == 3] = 4
    logits = logits.requires_grad_()
    adaptive_class_suppression_loss(logits, labels, class_frequency=groups).backward()
    assert int((labels == 0).sum()) < 100 and not logits.grad[:, 3].any()


@settings(max_examples=15, deadline=None)
@given(case=cases, seed=st.integers(0, 99))
def test_the_order_of_the_rows_does_not_matter(case: tuple[Tensor, Tensor, Tensor], seed: int) -> None:
    logits, labels, groups = case
    rows = (labels == 0).nonzero()[:, 0]
    drawn = [rows[: len(rows) // 3], rows[len(rows) // 2 :], rows]
    order = torch.randperm(len(labels), generator=seeded(seed))
    place = order.argsort()
    first = adaptive_class_suppression_loss(logits, labels, class_frequency=groups, drawn_rows=drawn, reduction="none")
    second = adaptive_class_suppression_loss(
        logits[order], labels[order], class_frequency=groups, drawn_rows=[place[d] for d in drawn], reduction="none"
    )
    torch.testing.assert_close(second, first[order], rtol=1e-12, atol=0.0)


def test_foreground_rows_are_independent_and_a_doubled_batch_of_them_has_the_same_loss() -> None:
    logits, labels, groups = random_case(5, 12, 6, foreground=1.0)
    entries = adaptive_class_suppression_loss(logits, labels, class_frequency=groups, reduction="none")
    for i in range(12):
        alone = adaptive_class_suppression_loss(logits[i : i + 1], labels[i : i + 1], class_frequency=groups)
        torch.testing.assert_close(alone, entries[i].sum())
    torch.testing.assert_close(
        adaptive_class_suppression_loss(logits.repeat(2, 1), labels.repeat(2), class_frequency=groups),
        adaptive_class_suppression_loss(logits, labels, class_frequency=groups),
    )


@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("column", [0, 2])
def test_a_logit_that_crosses_the_threshold_switches_on_minus_log_of_one_minus_the_threshold(
    threshold: float, column: int
) -> None:
    logits, labels, _ = random_case(6, 8, 4, foreground=1.0)
    labels[:] = 1
    at = log(threshold / (1 - threshold))

    def loss(z: float) -> float:
        moved = logits.clone()
        moved[3, column] = z
        return float(adaptive_class_suppression_loss(moved, labels, score_threshold=threshold))

    assert loss(at + 1e-9) - loss(at - 1e-9) == pytest.approx(-log(1 - threshold) / 8, rel=1e-6)


def test_a_perfect_row_costs_nothing_and_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[-1e4, 1e4, -1e4], [1e4, -1e4, -1e4]], requires_grad=True)
    loss = adaptive_class_suppression_loss(logits, torch.tensor([1, 0]))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()
    wrong = adaptive_class_suppression_loss(-logits, torch.tensor([1, 0]))
    assert wrong.isfinite() and wrong.item() == pytest.approx(3e4)


def test_the_background_may_be_the_last_column() -> None:
    logits, labels, groups = random_case(7, 40, 5)
    moved = torch.where(labels == 0, 5, labels - 1)
    first = adaptive_class_suppression_loss(logits, labels, class_frequency=groups, generator=seeded())
    for index in (5, -1):
        second = adaptive_class_suppression_loss(
            logits.roll(-1, dims=1), moved, class_frequency=groups.roll(-1), background_index=index, generator=seeded()
        )
        torch.testing.assert_close(first, second)


def test_without_boxes_the_loss_is_zero_and_connected_to_the_logits() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = adaptive_class_suppression_loss(logits, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, 5)


def test_half_precision_is_computed_in_float32() -> None:
    logits, labels, _ = random_case(8, 64, 300)
    half = logits.to(torch.bfloat16)
    loss = adaptive_class_suppression_loss(half, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, adaptive_class_suppression_loss(half.float(), labels), rtol=0.0, atol=0.0)


def test_the_gradient_agrees_with_finite_differences() -> None:
    logits, labels, groups = random_case(9, 6, 4)
    rows = (labels == 0).nonzero()[:, 0]
    torch.autograd.gradcheck(
        lambda z: adaptive_class_suppression_loss(z, labels, class_frequency=groups, drawn_rows=[rows[:1], rows, rows]),
        logits.requires_grad_(),
    )


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 4])}, "labels have 4; expected 0 to 3"),
        ({"labels": torch.tensor([-1, 0])}, "labels have -1; expected 0 to 3"),
        ({"labels": torch.tensor([0.0, 1.0])}, "expected whole numbers"),
        ({"labels": torch.tensor([0])}, r"logits \(2, 4\) and labels \(1,\)"),
        ({"score_threshold": 0.0}, "score_threshold = 0.0: expected a probability above 0 and below 1"),
        ({"score_threshold": 1.0}, "score_threshold = 1.0"),
        ({"score_threshold": float("nan")}, "score_threshold = nan"),
        ({"class_frequency": torch.tensor([-1, 0, 3, 2])}, r"class_frequency\[2\] = 3: expected 0 \(rare\)"),
        ({"class_frequency": torch.tensor([0, 0, -1, 2])}, r"class_frequency\[2\] = -1"),
        ({"class_frequency": torch.tensor([0, 1, 2])}, r"class_frequency \(3,\): expected \(4,\)"),
        ({"background_fractions": (0.1, 0.2)}, "background_fractions has 2 values"),
        ({"background_fractions": (0.1, 1.5, 1.0)}, "background_fractions: 1.5 for common classes"),
        ({"background_fractions": -0.1}, "background_fractions: -0.1"),
        ({"background_index": 4}, "background_index = 4: there are 4 columns"),
        ({"drawn_rows": [torch.tensor([0])]}, "drawn_rows has 1 entries"),
        ({"drawn_rows": [torch.tensor([1])] * 3}, "rows that are not of the background"),
        ({"drawn_rows": [torch.tensor([1000])] * 3}, "or none of the"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 4), "labels": torch.tensor([0, 1]), **changes}
    for function in (suppression_weights, adaptive_class_suppression_loss):
        with pytest.raises(InputError, match=message):
            function(**arguments)
    with pytest.raises(InputError, match="reduction = 'max'"):
        adaptive_class_suppression_loss(torch.zeros(1, 2), torch.tensor([0]), reduction="max")  # type: ignore[arg-type]


def test_the_threshold_holds_for_probabilities_in_float32_where_logits_are_of_half_precision() -> None:
    logits = torch.tensor([[0.84375, 0.0, 0.8515625]], dtype=torch.bfloat16)  # 0.6992, the target, 0.7009
    weights = suppression_weights(logits, torch.tensor([1]), score_threshold=0.7)
    assert weights.tolist() == [[False, True, True]]


@pytest.mark.parametrize("fraction", [np.float32(0.25), np.array(0.25), torch.tensor(0.25)])
def test_one_fraction_may_be_of_numpy_or_torch(fraction: Any) -> None:
    weights = suppression_weights(torch.zeros(40, 3), torch.zeros(40, dtype=torch.long), background_fractions=fraction)
    assert weights.sum(dim=0).tolist() == [40, 10, 10]


def test_heads_take_frequency_groups_as_a_list() -> None:
    heads = ACSLBoxHead.of(small_torchvision().roi_heads, class_frequency=[-1, 0, 1, 2])
    assert heads.class_frequency.tolist() == [-1, 0, 1, 2]


# --------------------------------------------------------------------------------------------------- in detectors


def targets_of(data: ColouredBoxes) -> list[dict[str, Tensor]]:
    found = [data.objects(i) for i in range(len(data))]
    return [{"boxes": objects.boxes, "labels": objects.labels + 1} for objects in found]


def small_torchvision(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=48, max_size=64, box_batch_size_per_image=16
    )


def test_any_torchvision_detector_gets_the_loss_by_exchanging_its_heads() -> None:
    data, model = ColouredBoxes(2), small_torchvision()
    names = set(model.state_dict())
    model.roi_heads = ACSLBoxHead.of(model.roi_heads, class_frequency=torch.tensor([-1, 2, 1, 0]))
    assert set(model.state_dict()) == names
    seen: list[Tensor] = []
    model.roi_heads.box_predictor.register_forward_hook(lambda _m, _i, out: seen.append(out[0].detach()))
    sampled: list[Tensor] = []
    choose = model.roi_heads.select_training_samples

    def remember(*arguments: Any) -> Any:
        chosen = choose(*arguments)
        sampled.extend(chosen[2])
        return chosen

    model.roi_heads.select_training_samples = remember
    model.train()
    losses = model(data.pictures(), targets_of(data))
    expected = adaptive_class_suppression_loss(seen[0], torch.cat(sampled), class_frequency=torch.tensor([-1, 2, 1, 0]))
    torch.testing.assert_close(losses["loss_classifier"].detach(), expected)
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}


def test_the_heads_with_softmax_are_torchvisions_own() -> None:
    data, results = ColouredBoxes(2), []
    for exchanged in (False, True):
        model = small_torchvision()
        if exchanged:
            model.roi_heads = ACSLBoxHead.of(model.roi_heads, class_loss="softmax")
        torch.manual_seed(1)
        losses = model.train()(data.pictures(), targets_of(data))
        found = model.eval()(data.pictures())
        results.append(({name: value.item() for name, value in losses.items()}, [f["scores"] for f in found]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_the_heads_differ_in_the_class_loss_only() -> None:
    data, losses = ColouredBoxes(2), {}
    for kind in ("softmax", "sigmoid", "acsl"):
        model = small_torchvision()
        model.roi_heads = ACSLBoxHead.of(model.roi_heads, class_loss=kind)
        torch.manual_seed(1)
        losses[kind] = {k: v.item() for k, v in model.train()(data.pictures(), targets_of(data)).items()}
    classifier = [found.pop("loss_classifier") for found in losses.values()]
    assert losses["softmax"] == losses["sigmoid"] == losses["acsl"] and len(set(classifier)) == 3


def test_detections_have_sigmoid_scores_per_class_without_the_background_after_suppression_of_overlaps() -> None:
    heads = ACSLBoxHead(
        None, None, None, 0.5, 0.5, 16, 0.25, None, score_thresh=0.05, nms_thresh=0.5, detections_per_img=3
    )
    proposals = [torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [30.0, 30.0, 90.0, 40.0]])]
    logits = torch.tensor([[9.0, 2.0, 1.0], [9.0, 3.0, -9.0], [9.0, -1.0, -9.0]])  # background, a, b
    boxes, scores, labels = heads.postprocess_detections(logits, torch.zeros(3, 12), proposals, [(50, 60)])
    assert labels[0].tolist() == [1, 2, 1]
    torch.testing.assert_close(scores[0], torch.tensor([3.0, 1.0, -1.0]).sigmoid())
    torch.testing.assert_close(boxes[0], torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 10], [30, 30, 60, 40]]))


def test_the_heads_refuse_what_the_loss_refuses() -> None:
    heads = small_torchvision().roi_heads
    with pytest.raises(InputError, match="class_loss = 'focal'"):
        ACSLBoxHead.of(heads, class_loss="focal")
    with pytest.raises(InputError, match=r"score_threshold = 1\.2"):
        ACSLBoxHead.of(heads, score_threshold=1.2)
    with pytest.raises(InputError, match="background_fractions"):
        ACSLBoxHead.of(heads, background_fractions=(1.0, 2.0, 0.1))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "acsl"])
def test_one_setting_of_the_detector_chooses_the_loss(kind: str) -> None:
    torch.manual_seed(0)
    model = TorchvisionDetector.build(TorchvisionConfig(**TINY, class_loss=kind, classes=("a", "b", "c")))
    assert model.class_loss == kind
    assert model.stored_config({**TINY, "class_loss": kind}).get("class_loss", "softmax") == kind
    data = ColouredBoxes(2)
    loss = model.train().losses(data.pictures(), [data.objects(i) for i in range(2)])["loss_classifier"]
    loss.backward()
    assert loss.isfinite() and model.model.roi_heads.box_predictor.cls_score.weight.grad.any()


def test_a_new_classifier_of_sigmoids_starts_with_a_probability_of_one_percent() -> None:
    layer = nn.Linear(64, 100)
    initialize_classifier(layer)
    assert layer.bias.sigmoid().mean().item() == pytest.approx(0.01, rel=1e-5)
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_retinanet_has_no_box_head() -> None:
    model = TorchvisionDetector.build(TorchvisionConfig(**TINY, detector="retinanet"))
    with pytest.raises(RecipeError, match="retinanet has its focal loss"):
        model.use_class_loss("acsl")


def test_all_but_the_named_parameters_are_frozen() -> None:
    model = small_torchvision()
    kept = freeze_all_but(model, ["roi_heads.box_predictor.cls_score"])
    assert kept == ["roi_heads.box_predictor.cls_score.weight", "roi_heads.box_predictor.cls_score.bias"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == kept
    assert freeze_all_but(model, ["rpn", "roi_heads.box_head.fc6.bias"])[-1] == "roi_heads.box_head.fc6.bias"
    with pytest.raises(UnknownNameError, match=r"Did you mean 'roi_heads\.box_predictor\.cls_score'"):
        freeze_all_but(model, ["roi_heads.box_predictor.cls_scores"])


def test_arrays_are_no_surprise_as_frequency_groups() -> None:
    labels = torch.zeros(10, dtype=torch.long)
    weights = suppression_weights(torch.zeros(10, 3), labels, class_frequency=np.array([-1, 0, 2]))  # type: ignore[arg-type]
    assert weights.sum(dim=0).tolist() == [10, 0, 10]
