"""Obj2Seq's parts: the published numbers, and what must hold for every input (arXiv:2209.13948)."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from bowerbird.errors import InputError
from bowerbird.testing import assert_close
from bowerbird_detection.obj2seq import (
    DETECTION,
    DeformableEncoder,
    Obj2Seq,
    ObjectDecoder,
    ParallelHead,
    PictureTargets,
    PromptedSetCriterion,
    PromptIndicator,
    SequenceHead,
    SequenceTask,
    asymmetric_loss,
    keypoint_task,
    match_prompted,
    select_prompts,
)
from bowerbird_detection.obj2seq_encoder import ConvPyramid, sine_positions
from bowerbird_detection.obj2seq_head import decode_boxes, decode_keypoints
from bowerbird_detection.obj2seq_layers import ImageFeatures, logit

Golden = Callable[[str], dict[str, Any]]
SHAPES = [(3, 4), (2, 2)]
POSITIONS = 16
FLOAT32 = {"rtol": 1e-5, "atol": 2e-6}


def part(values: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): torch.as_tensor(v) for key, v in values.items() if key.startswith(prefix)}


def shaken(module: nn.Module, by: float = 0.2) -> Any:
    """In float64, with no parameter at a first value that tells nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return module.double()


def all_close(found: Sequence[Tensor], wanted: Sequence[Tensor], where: str = "value") -> None:
    assert len(found) == len(wanted)
    for position, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert_close(one, other, where=f"{where}[{position}]")


def image(pictures: int = 2, width: int = 8) -> ImageFeatures:
    mask = torch.zeros(pictures, POSITIONS, dtype=torch.bool)
    mask[-1, [3, 7, 11, 13, 15]] = True
    ratios = torch.ones(pictures, 2, 2, dtype=torch.float64)
    ratios[-1, :, 0] = torch.tensor([0.75, 0.5])
    return ImageFeatures(torch.randn(pictures, POSITIONS, width).double(), SHAPES, mask, ratios)


def rows_of(count: int, queries: int = 5, width: int = 8) -> dict[str, Tensor]:
    return {
        "features": torch.randn(count, queries, width).double(),
        "reference_points": torch.rand(count, queries, 2).double(),
        "class_vectors": torch.randn(count, width).double(),
        "presence_logits": torch.randn(count).double(),
    }


def head(num_steps: int = 12, **more: Any) -> Any:
    return shaken(SequenceHead(num_steps, 8, 2, 2, 3, **more))


def boxes_of(count: int, generator: torch.Generator | None = None) -> Tensor:
    middle, size = torch.rand(2, count, 2, dtype=torch.float64, generator=generator)
    return torch.cat([0.3 + 0.4 * middle, 0.1 + 0.4 * size], dim=1)


# ------------------------------------------------------------------------------------------------------ golden numbers


@pytest.mark.parametrize("name", ["prompt_indicator", "prompt_indicator_text_init"])
def test_the_indicator_gives_the_authors_logits_losses_and_gradients(golden: Golden, name: str) -> None:
    values = golden(f"obj2seq/{name}")
    weights = part(values, "param/")
    classes, width = len(weights["class_prompts"]), values["features"].shape[2]
    made = PromptIndicator(
        classes, width, values["num_heads"], 2, ffn_dim=32, vectors=torch.zeros_like(weights["class_prompts"])
    )
    made.load_state_dict(weights)
    features = values["features"].requires_grad_()
    found = made(features, values["padding_mask"])
    assert_close(found.logits[-1], values["logits_last"], **FLOAT32)
    chosen = select_prompts(found.logits[-1], values["retained"], values["labels_onehot"] > 0)
    assert_close(chosen, [values["batch_index"], values["class_index"]])
    assert_close(found.vectors[chosen], values["retained_prompts"], **FLOAT32)
    losses = [0.25 * asymmetric_loss(logits, values["labels_onehot"]) for logits in found.logits]
    assert_close(losses[0], values["loss/cls_asl_0"], **FLOAT32)
    assert_close(losses[1], values["loss/cls_asl"], **FLOAT32)
    torch.stack(losses).sum().backward()
    assert_close(features.grad, values["grad_features"], **FLOAT32)
    assert_close(made.class_prompts.grad, values["grad_class_prompts"], **FLOAT32)


@pytest.mark.parametrize("name", ["train", "eval"])
def test_retention_keeps_the_authors_categories(golden: Golden, name: str) -> None:
    values = golden(f"obj2seq/retention_{name}")
    forced = values["force_sample_probs"] if name == "train" else None
    found = select_prompts(
        values["logits"], values["max_classes"], forced, least=values["min_classes"], threshold=values["threshold"]
    )
    assert_close(found, [values["batch_index"], values["class_index"]])


def test_the_asymmetric_loss_and_its_gradient_are_the_authors(golden: Golden) -> None:
    values = golden("obj2seq/asymmetric_loss")
    logits = values["logits"].requires_grad_()
    found = asymmetric_loss(
        logits, values["targets"], values["weights"], gamma_pos=values["gamma_pos"], gamma_neg=values["gamma_neg"],
        clip=values["clip"], eps=values["eps"],
    )  # fmt: skip
    assert_close(found, values["loss"])
    found.backward()
    assert_close(logits.grad, values["grad_logits"])


def targets_in(values: dict[str, Any], rows: Sequence[int], with_points: bool) -> list[dict[str, Tensor]]:
    """The objects of ``rows``; keypoints are stored for the rows that have them, one after the other."""
    counts = values["target_counts"].tolist()
    boxes = values["target_boxes"].split(counts)
    if not with_points:
        return [{"boxes": boxes[row]} for row in rows]
    points = values["target_keypoints"].split([counts[row] for row in rows])
    return [{"boxes": boxes[row], "keypoints": found} for row, found in zip(rows, points, strict=True)]


@pytest.mark.parametrize("name", ["detection", "pose"])
def test_matching_losses_and_gradients_are_the_authors(golden: Golden, name: str) -> None:
    values = golden(f"obj2seq/criterion_{name}")
    posed = name == "pose"
    targets = targets_in(values, range(len(values["target_counts"])), posed)
    names = ["pred_logits", "pred_boxes", *(["pred_keypoints"] if posed else [])]
    inputs = [values[key].requires_grad_() for key in names]
    arguments: list[Any] = [*inputs[:2], targets, *inputs[2:]]
    sums = {"num_boxes": values["num_boxes"], "num_points": values["num_points"]}
    triples = {
        (row, query, found)
        for row, (queries, objects) in enumerate(match_prompted(*arguments, **sums))
        for query, found in zip(queries.tolist(), objects.tolist(), strict=True)
    }
    assert triples == set(zip(*(values[f"match_{key}"].tolist() for key in ("prompt", "query", "target")), strict=True))
    losses = PromptedSetCriterion()(*arguments, **sums)
    assert_close(losses, {key: values[key] for key in losses})
    total = torch.stack(list(losses.values())).sum()
    assert_close(total, values["total"])
    total.backward()
    for key, tensor in zip(names, inputs, strict=True):
        assert_close(tensor.grad, values[f"grad_{key}"], where=key)


@pytest.mark.parametrize("name", ["detection", "init_state", "hybrid_tasks"])
def test_the_sequence_head_gives_the_authors_outputs_losses_and_gradients(golden: Golden, name: str) -> None:
    values = golden(f"obj2seq/sequence_head_{name}")
    weights = part(values, "param/")
    width, steps = values["features"].shape[2], values["num_steps"]
    shapes = [tuple(shape) for shape in values["spatial_shapes"].tolist()]
    made = SequenceHead(steps, width, values["num_heads"], len(shapes), values["num_points"], combine=values["combine"])
    made.load_state_dict(weights)
    keys = ("object_features", "features", "class_vector", "prompt_logits")
    inputs = {key: values[key].requires_grad_() for key in keys}
    rows, classes = values["batch_index"], values["class_index"]
    tasks = [keypoint_task(17) if steps == 38 and category == 0 else DETECTION for category in classes.tolist()]
    logits, sequence = made(
        inputs["object_features"],
        values["reference_points"],
        ImageFeatures(inputs["features"], shapes, values["padding_mask"]),
        inputs["class_vector"],
        inputs["prompt_logits"][rows, classes],
        batch_index=rows,
        steps=[task.num_steps for task in tasks],
    )
    losses: dict[str, Tensor] = {}
    counts = values["target_counts"]
    for task in dict.fromkeys(tasks):
        mine = [row for row, other in enumerate(tasks) if other == task]
        found = task.decode(sequence[mine][..., : task.num_steps], values["reference_points"][mine])
        kept = part(values, f"out/{task.name}/")
        assert_close(kept["batch_index"], rows[mine])
        assert_close(kept["class_index"], classes[mine])
        assert_close(logits[mine], kept["pred_logits"], **FLOAT32)
        for key in found:
            assert_close(found[key], kept[f"pred_{key}"], where=key, **FLOAT32)
        points = found.get("keypoints")
        terms = PromptedSetCriterion()(
            logits[mine], found["boxes"], targets_in(values, mine, points is not None), points,
            num_boxes=float(counts.sum()), num_points=34.0,
        )  # fmt: skip
        losses = {key: losses.get(key, 0.0) + value for key, value in terms.items()}
    assert_close(losses, {key: values[f"loss/{key}"] for key in losses}, rtol=2e-5)
    torch.stack(list(losses.values())).sum().backward()
    for key in keys:
        wanted = values[f"grad_{key}"]
        if wanted.numel():
            assert_close(inputs[key].grad, wanted, where=key, rtol=2e-4, atol=2e-5)
        else:
            assert inputs[key].grad is None


# ------------------------------------------------------------------------------------------------------- prompts


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3), classes=st.integers(1, 7), k=st.integers(1, 8), seed=st.integers(0, 999),
    forced=st.booleans(),
)  # fmt: skip
def test_the_most_probable_categories_are_kept_and_forced_ones_come_first(
    batch: int, classes: int, k: int, seed: int, forced: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator)
    there = torch.rand(batch, classes, generator=generator) < 0.4 if forced else None
    pictures, categories = select_prompts(logits, k, there)
    for picture in range(batch):
        mine = categories[pictures == picture]
        assert mine.tolist() == sorted(set(mine.tolist()))
        assert len(mine) == min(k, classes)  # K' = K keeps everything
        rest = [category for category in range(classes) if category not in mine.tolist()]
        worth = logits[picture].sigmoid()
        if there is not None:
            worth = worth.maximum(there[picture].float())
        assert all(worth[category] <= worth[mine].min() for category in rest)


def test_a_threshold_keeps_between_the_least_and_the_most() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, -1.0, -2.0], [-1.0, -2.0, -3.0, -4.0, -5.0]])
    pictures, categories = select_prompts(logits, 2, least=1, threshold=0.5)
    assert pictures.tolist() == [0, 0, 1] and categories.tolist() == [0, 1, 0]
    pictures, categories = select_prompts(logits, 4, allowed=logits > -3.5)
    assert pictures.tolist() == [0, 0, 0, 0, 1, 1, 1] and categories.tolist() == [0, 1, 2, 3, 0, 1, 2]


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_forced_categories_come_before_others_whose_probability_is_rounded_to_1(kind: torch.dtype) -> None:
    forced = torch.tensor([[False, False, True]])
    if kind != torch.bool:
        forced = forced * 2.0 - 1
    assert select_prompts(torch.tensor([[30.0, 40.0, -5.0]]), 1, forced)[1].tolist() == [2]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision_are_ranked_and_summed_in_float32(kind: torch.dtype) -> None:
    assert select_prompts(torch.tensor([[9.0, 12.0, 10.0]], dtype=kind), 1)[1].tolist() == [1]
    logits, targets = (3 * torch.randn(16, 80)).to(kind), torch.rand(16, 80) < 0.3
    assert_close(asymmetric_loss(logits, targets), asymmetric_loss(logits.float(), targets))


def test_without_focusing_the_asymmetric_loss_is_cross_entropy_summed_over_categories() -> None:
    logits, targets = torch.randn(3, 5).double(), (torch.rand(3, 5) < 0.5).double()
    expected = functional.binary_cross_entropy_with_logits(logits, targets) * 5
    assert_close(asymmetric_loss(logits, targets, gamma_neg=0.0), expected)
    weights = torch.rand(3, 5).double()
    expected = functional.binary_cross_entropy_with_logits(logits, targets, weights) * 15 / weights.sum() * 5
    assert_close(asymmetric_loss(logits, targets, weights, gamma_neg=0.0), expected)
    assert float(asymmetric_loss(logits, targets, torch.zeros(3, 5))) == 0.0


def test_prompts_do_not_see_each_other() -> None:
    made = shaken(PromptIndicator(6, 8, 2, 2, 16, vectors=torch.randn(6, 5)))
    pictures = image()
    whole = made(pictures.tokens, pictures.padding_mask)
    some = torch.tensor([1, 4])
    alone = made(pictures.tokens, pictures.padding_mask, some)
    assert_close(alone.vectors, whole.vectors[:, some])
    all_close(alone.logits, [logits[:, some] for logits in whole.logits])
    assert made.classifier_label[0] is made.classifier_label[1]


def test_a_fresh_indicator_gives_every_category_about_the_prior_probability() -> None:
    made = PromptIndicator(4, 8, 2, 1, 16)
    nn.init.zeros_(made.classifier_label[0].feature_linear[1].weight)
    nn.init.zeros_(made.classifier_label[0].feature_linear[1].bias)
    torch.testing.assert_close(made(torch.randn(2, 5, 8)).logits[0].sigmoid(), torch.full((2, 4), 0.1))


# ----------------------------------------------------------------------------------------------------------- head


def test_a_fresh_head_gives_its_reference_points_with_a_small_size_whatever_the_picture() -> None:
    for made in (SequenceHead(12, 8, 2, 2, 3).double(), ParallelHead(12, 8).double()):
        given_rows = rows_of(2)
        _, sequence = made(image=image(), **given_rows)
        boxes = decode_boxes(sequence, given_rows["reference_points"])["boxes"]
        assert_close(boxes[..., :2], given_rows["reference_points"])
        assert_close(boxes[..., 2:], torch.full((2, 5, 2), -2.0).double().sigmoid())
        points = decode_keypoints(sequence, given_rows["reference_points"])["keypoints"]
        assert_close(points, boxes[..., None, :2].expand(2, 5, 4, 2))


def test_queries_are_independent() -> None:
    made, pictures, given_rows = head(), image(), rows_of(2)
    order = torch.tensor([3, 0, 4, 2, 1])
    turned = {
        key: value[:, order] if key in ("features", "reference_points") else value for key, value in given_rows.items()
    }
    for found, other in zip(made(image=pictures, **given_rows), made(image=pictures, **turned), strict=True):
        assert_close(other, found[:, order])


@pytest.mark.parametrize("step", [0, 1, 3, 7])
def test_a_step_has_no_effect_on_earlier_numbers(step: int) -> None:
    made, pictures, given_rows = head(), image(), rows_of(2)
    _, before = made(image=pictures, **given_rows)
    with torch.no_grad():
        made.pos_emb.weight[step] += 1.0
    _, after = made(image=pictures, **given_rows)
    assert_close(after[..., :step], before[..., :step])
    assert not torch.isclose(after[..., step:], before[..., step:]).all(dim=(0, 1)).any()
    with torch.no_grad():
        made.pos_emb.weight[step] -= 1.0
        made.output_embeds[step].layers[0].weight += 1.0
    _, after = made(image=pictures, **given_rows)
    changed = ~torch.isclose(after, before).all(dim=1).all(dim=0)
    assert not changed[:step].any() and changed[step]
    # Only the numbers of the centre change where later steps look.
    assert changed[step + 1 :].all() if step < 2 else not changed[step + 1 :].any()


def test_fewer_steps_are_the_beginning_of_more() -> None:
    made, pictures, given_rows = head(38), image(), rows_of(2)
    short = shaken(SequenceHead(4, 8, 2, 2, 3))
    state = {key: value for key, value in made.state_dict().items() if key in short.state_dict()}
    state["pos_emb.weight"] = state["pos_emb.weight"][:4]
    short.load_state_dict(state)
    assert_close(short(image=pictures, **given_rows)[1], made(image=pictures, **given_rows)[1][..., :4])


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.sampled_from([4, 6, 12]), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_rows_of_other_tasks_do_not_change_a_rows_numbers(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    made, pictures, given_rows = head(), image(), rows_of(len(lengths))
    index = torch.randint(0, 2, (len(lengths),))
    logits, sequence = made(image=pictures, steps=lengths, batch_index=index, **given_rows)
    assert sequence.shape == (len(lengths), 5, max(lengths))
    for row, length in enumerate(lengths):
        alone = {key: value[row : row + 1] for key, value in given_rows.items()}
        expected = made(image=pictures, batch_index=index[row : row + 1], steps=[length], **alone)
        assert_close(logits[row : row + 1], expected[0])
        assert_close(sequence[row : row + 1, :, :length], expected[1])
        assert not sequence[row, :, length:].any()


def test_the_parallel_head_leaves_out_the_numbers_that_a_row_does_not_need() -> None:
    made, given_rows = shaken(ParallelHead(12, 8)), rows_of(3)
    _, sequence = made(image=image(3), steps=[4, 12, 6], **given_rows)
    _, whole = made(image=image(3), **given_rows)
    assert_close(sequence[1], whole[1])
    assert_close(sequence[0, :, :4], whole[0, :, :4])
    assert not sequence[0, :, 4:].any() and not sequence[2, :, 6:].any()


def test_gradients_pass_through_cached_keys_but_not_from_step_to_step() -> None:
    made, pictures, given_rows = head(), image(), rows_of(2)
    given_rows["features"].requires_grad_()
    _, sequence = made(image=pictures, **given_rows)
    (gradient,) = torch.autograd.grad(sequence[..., 5].sum(), given_rows["features"], retain_graph=True)
    assert gradient.any()  # by the key and value of the first step
    with torch.no_grad():
        made.self_attn.qkv.weight[8:] = 0  # keys and values no longer depend on the features
    _, sequence = made(image=pictures, **given_rows)
    (gradient,) = torch.autograd.grad(sequence[..., 5].sum(), given_rows["features"])
    assert not gradient.any()


def test_the_combined_probability_is_the_product_and_reaches_the_presence() -> None:
    made, given_rows = head(), rows_of(3)
    given_rows["presence_logits"].requires_grad_()
    combined, _ = made(image=image(3), **given_rows)
    made.combine = "none"
    alone, _ = made(image=image(3), **given_rows)
    presence = given_rows["presence_logits"].sigmoid()[:, None]
    assert_close(combined.sigmoid(), alone.sigmoid() * presence)
    assert (combined.sigmoid() <= torch.minimum(alone.sigmoid(), presence.expand(3, 5)) + 1e-12).all()
    (gradient,) = torch.autograd.grad(combined.sum(), given_rows["presence_logits"])
    assert gradient.all()


def test_the_logit_of_a_vanishing_probability_is_clamped() -> None:
    found = logit(torch.tensor([0.0, 1e-9, 0.5, 1.0], dtype=torch.float64))
    assert_close(found, torch.tensor([1e-5, 1e-5, 1.0, 1e5], dtype=torch.float64).log(), atol=1e-8)


def test_a_refining_head_starts_from_its_boxes() -> None:
    made = SequenceHead(6, 8, 2, 2, 3, refines=True, combine="none").double()
    reference = boxes_of(10).reshape(2, 5, 4)
    given_rows = {**rows_of(2), "reference_points": reference}
    _, sequence = made(image=image(), **given_rows)
    assert_close(decode_keypoints(sequence, reference)["boxes"], reference)


# ------------------------------------------------------------------------------------------------------- criterion


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=4), posed=st.booleans(), seed=st.integers(0, 999))
def test_the_order_of_objects_does_not_matter_and_rows_are_matched_by_themselves(
    counts: list[int], posed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, queries = len(counts), 4
    logits = torch.randn(rows, queries, dtype=torch.float64, generator=generator)
    boxes = boxes_of(rows * queries, generator).reshape(rows, queries, 4)
    points = torch.rand(rows, queries, 3, 2, dtype=torch.float64, generator=generator) if posed else None
    targets = []
    for count in counts:
        target = {"boxes": boxes_of(count, generator)}
        if posed:
            target["keypoints"] = torch.rand(count, 3, 3, dtype=torch.float64, generator=generator) - 0.1
        targets.append(target)
    criterion = PromptedSetCriterion()
    losses = criterion(logits, boxes, targets, points)
    orders = [torch.randperm(count, generator=generator) for count in counts]
    turned = [{key: value[order] for key, value in t.items()} for t, order in zip(targets, orders, strict=True)]
    assert_close(criterion(logits, boxes, turned, points), losses, rtol=1e-7)
    sums = {"num_boxes": 3.0, "num_points": 2.0}
    for row, (queries_found, objects) in enumerate(match_prompted(logits, boxes, targets, points, **sums)):
        assert len(queries_found) == min(queries, counts[row]) == len(set(objects.tolist()))
        alone = match_prompted(
            logits[row : row + 1], boxes[row : row + 1], targets[row : row + 1],
            None if points is None else points[row : row + 1], **sums,
        )  # fmt: skip
        assert_close((queries_found, objects), alone[0])


def test_the_matching_is_the_cheapest_of_all_assignments() -> None:
    from itertools import permutations

    logits, boxes, true = torch.randn(1, 4).double(), boxes_of(4)[None], boxes_of(3)
    p = logits[0].sigmoid()
    focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
    from torchvision.ops import box_convert, generalized_box_iou

    overlap = generalized_box_iou(box_convert(boxes[0], "cxcywh", "xyxy"), box_convert(true, "cxcywh", "xyxy"))
    cost = 2 * focal[:, None] + 5 * torch.cdist(boxes[0], true, p=1) - 2 * overlap
    best = min(permutations(range(4), 3), key=lambda chosen: float(sum(cost[q, t] for t, q in enumerate(chosen))))
    ((queries, objects),) = match_prompted(logits, boxes, [{"boxes": true}])
    assert dict(zip(objects.tolist(), queries.tolist(), strict=True)) == dict(enumerate(best))


def test_perfect_predictions_have_no_box_or_keypoint_loss() -> None:
    true = boxes_of(3)
    points = torch.rand(3, 4, 3).double()
    points[..., 2] = 2
    predicted = torch.cat([true, boxes_of(2)])[None, [4, 2, 0, 3, 1]]
    guessed = torch.cat([points[..., :2], torch.rand(2, 4, 2).double()])[None, [4, 2, 0, 3, 1]]
    found = PromptedSetCriterion()(
        torch.zeros(1, 5).double(), predicted, [{"boxes": true, "keypoints": points}], guessed
    )
    for name in ("loss_bbox", "loss_giou", "loss_kps_l1", "loss_oks"):
        assert float(found[name]) == pytest.approx(0.0, abs=1e-12)
    assert found["loss_ce"] > 0


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_predictions_of_half_precision_are_matched_and_compared_in_float32(kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.tensor([[20.0, -20.0, 1.0, 0.0], [-1.0, 0.0, 3.0, -30.0]]).to(kind)
    boxes = boxes_of(8, generator).reshape(2, 4, 4).to(kind)
    points = torch.rand(2, 4, 3, 2, generator=generator).to(kind)
    targets = [
        {"boxes": boxes_of(count, generator), "keypoints": torch.rand(count, 3, 3, generator=generator)}
        for count in (2, 5)
    ]
    found, wanted = (
        match_prompted(logits, boxes, targets, points),
        match_prompted(logits.float(), boxes.float(), targets, points.float()),
    )
    for one, other in zip(found, wanted, strict=True):
        all_close(one, other)
    criterion = PromptedSetCriterion()
    assert_close(
        criterion(logits, boxes, targets, points), criterion(logits.float(), boxes.float(), targets, points.float())
    )


def test_without_rows_there_are_no_matches_and_the_losses_are_zero() -> None:
    for logits, points in ((torch.zeros(0, 3), torch.zeros(0, 3, 2, 2)), (torch.zeros(0, 3, 5), None)):
        assert match_prompted(logits, torch.zeros(0, 3, 4), [], points) == []
        losses = PromptedSetCriterion()(logits, torch.zeros(0, 3, 4), [], points)
        assert all(float(value) == 0 for value in losses.values())


def test_a_batch_without_objects_has_finite_losses_and_gradients() -> None:
    logits, boxes = torch.randn(2, 3, requires_grad=True), torch.rand(2, 3, 4, requires_grad=True)
    points = torch.rand(2, 3, 2, 2, requires_grad=True)
    nothing = {"boxes": torch.zeros(0, 4), "keypoints": torch.zeros(0, 2, 3)}
    losses = PromptedSetCriterion()(logits, boxes, [nothing, nothing], points)
    torch.stack(list(losses.values())).sum().backward()
    assert all(not value.detach() for name, value in losses.items() if name != "loss_ce")
    assert logits.grad is not None and logits.grad.all() and boxes.grad is not None and not boxes.grad.any()


def test_points_that_are_not_annotated_or_outside_do_not_count() -> None:
    true = boxes_of(1)
    points = torch.tensor([[[0.5, 0.5, 2], [0.2, 0.2, 0], [1.2, 0.5, 2]]]).double()
    guess = torch.rand(1, 1, 3, 2).double()
    other = guess.clone()
    other[..., 1:, :] = 0.9
    target = [{"boxes": true, "keypoints": points}]
    criterion = PromptedSetCriterion()
    found = criterion(torch.zeros(1, 1).double(), true[None], target, guess)
    assert_close(criterion(torch.zeros(1, 1).double(), true[None], target, other), found)
    assert_close(found["loss_kps_l1"], 40 * (guess[0, 0, 0] - 0.5).abs().sum())


def test_the_two_forms_of_the_keypoint_similarity_differ_by_the_width_of_a_point() -> None:
    true = torch.tensor([[0.5, 0.5, 0.4, 0.2]], dtype=torch.float64)
    points = torch.tensor([[[0.5, 0.5, 2.0]]], dtype=torch.float64)
    guess = torch.tensor([[[[0.52, 0.51]]]], dtype=torch.float64)
    squared, area, sigma = 0.02**2 + 0.01**2, 0.4 * 0.2, 0.03
    for variant, width in (("official", sigma), ("coco", (2 * sigma) ** 2)):
        criterion = PromptedSetCriterion(oks_variant=variant, sigmas=[sigma])
        found = criterion(torch.zeros(1, 1).double(), true[None], [{"boxes": true, "keypoints": points}], guess)
        expected = 5 * (1 - torch.exp(torch.tensor(-squared / (2 * area * width)).double()))
        assert_close(found["loss_oks"], expected, rtol=1e-6)


def test_queries_for_any_category_are_matched_by_the_logit_of_the_objects_category() -> None:
    boxes, labels = boxes_of(3), torch.tensor([1, 0, 1])
    logits = torch.full((1, 4, 2), -3.0).double()
    logits[0, 2, 1] = logits[0, 0, 0] = logits[0, 1, 1] = 3.0
    same = boxes[:1].expand(1, 4, 4)
    target = [{"boxes": boxes[:1].expand(3, 4), "labels": labels}]
    ((queries, objects),) = match_prompted(logits, same, target)
    assert {int(q): int(labels[t]) for q, t in zip(queries, objects, strict=True)} == {0: 0, 1: 1, 2: 1}
    one_class = PromptedSetCriterion()(logits[..., 1], same, [{"boxes": target[0]["boxes"][labels == 1]}], num_boxes=3)
    joint = PromptedSetCriterion()(logits, same, target)
    rest = PromptedSetCriterion()(logits[..., 0], same, [{"boxes": target[0]["boxes"][labels == 0]}], num_boxes=3)
    assert_close(joint["loss_ce"], one_class["loss_ce"] + rest["loss_ce"])


# --------------------------------------------------------------------------------------------------------- network


def network(classes: int = 4, *, layers: int = 1, extra: int = 0, **more: Any) -> Obj2Seq:
    torch.manual_seed(5)
    encoder = DeformableEncoder(
        ConvPyramid((8, 8), 2), 8, num_layers=layers, num_heads=2, num_points=2, ffn_dim=16, extra_levels=extra
    )
    made: Obj2Seq = shaken(
        Obj2Seq(
            encoder, classes, num_queries=3, prompt_blocks=2, decoder_layers=2, num_heads=2, num_points=2, ffn_dim=16,
            **more,
        )
    )  # fmt: skip
    return made.eval()


def pictures_of(count: int = 2, height: int = 12, width: int = 16) -> Tensor:
    return torch.randn(count, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def by_key(output: Any) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    keys = zip(output.batch_index.tolist(), output.class_index.tolist(), strict=True)
    return {
        key: (logits, boxes) for key, logits, boxes in zip(keys, output.last.logits, output.last.boxes, strict=True)
    }


MIXED = (keypoint_task(2), DETECTION, keypoint_task(4, "four"), DETECTION)


@pytest.mark.parametrize(
    "more", [{}, {"tasks": MIXED}, {"refine": True}, {"prompting": "every", "combine": "none"}, {"head": "parallel"}]
)
def test_what_is_found_of_a_category_does_not_depend_on_the_other_prompts(more: dict[str, Any]) -> None:
    made = network(**more)
    whole = by_key(made(pictures_of()))
    assert set(whole) == {(picture, category) for picture in range(2) for category in range(4)}
    some = by_key(made(pictures_of(), prompts=[[2], [3, 0, 1]]))
    assert set(some) == {(0, 2), (1, 0), (1, 1), (1, 3)}
    for key, found in some.items():
        all_close(found, whole[key], where=str(key))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_network_of_half_precision_finds_about_the_same_in_padded_pictures(kind: torch.dtype) -> None:
    made = network(tasks=MIXED)
    mask = torch.zeros(2, 12, 16, dtype=torch.bool)
    mask[1, 9:] = mask[1, :, 11:] = True
    wanted = made(pictures_of(), mask)
    found = made.to(kind)(pictures_of().to(kind), mask)
    torch.testing.assert_close(found.last.boxes.double(), wanted.last.boxes, rtol=0, atol=0.1)


@pytest.mark.parametrize("more", [{"extra": 1}, {"refine": True}, {"prompting": "none", "combine": "none"}])
def test_features_under_the_padding_change_nothing(more: dict[str, Any]) -> None:
    made = network(**more)
    padded = torch.zeros(1, 3, 16, 20, dtype=torch.float64)
    padded[:, :, :12, :12] = pictures_of(1, 12, 12)
    mask = torch.ones(1, 16, 20, dtype=torch.bool)
    mask[:, :12, :12] = False
    found = made.encoder(padded, mask)
    noise = torch.where(found.padding_mask[..., None], torch.randn_like(found.tokens) * 1e3, found.tokens)
    changed = ImageFeatures(noise, found.spatial_shapes, found.padding_mask, found.valid_ratios)
    outputs = [_decoded(made, features) for features in (found, changed)]
    all_close(outputs[1], outputs[0])


def _decoded(made: Obj2Seq, features: ImageFeatures) -> list[Tensor]:
    """Everything after the image encoder."""
    made = copy.deepcopy(made)
    made.encoder.forward = lambda images, mask: features
    output = made(torch.zeros(1, 3, 1, 1))
    presence = [] if output.presence is None else list(output.presence.logits)
    return [output.last.logits, output.last.boxes, *presence]


def test_a_padded_picture_is_seen_like_the_picture_itself() -> None:
    """With one level whose cells are the pixels, so that convolutions see no edge."""

    class Pixels(nn.Module):
        channels = (3,)

        def forward(self, pixels: Tensor) -> OrderedDict[str, Tensor]:
            return OrderedDict({"0": pixels})

    torch.manual_seed(6)
    made = DeformableEncoder(Pixels(), 8, num_layers=2, num_heads=2, num_points=2, ffn_dim=16, extra_levels=0)
    made.input_proj[0][1] = nn.Identity()  # its statistics are those of the whole map
    shaken(made, 0.1)
    picture = torch.randn(1, 3, 5, 6, dtype=torch.float64)
    padded = functional.pad(picture, (0, 4, 0, 3), value=9.0)
    mask = torch.ones(1, 8, 10, dtype=torch.bool)
    mask[:, :5, :6] = False
    inside = ~mask.flatten()
    assert_close(made(padded, mask).tokens[:, inside], made(picture).tokens, rtol=1e-6, atol=1e-6)


def test_positions_are_encoded_rows_first_from_0_to_2_pi_over_what_is_no_padding() -> None:
    mask = torch.zeros(1, 3, 5, dtype=torch.bool)
    mask[:, 2:] = True
    found = sine_positions(mask, 8).reshape(3, 5, 8)
    y = torch.tensor([0.5, 1.5]) / 2 * 2 * torch.pi
    torch.testing.assert_close(found[:2, 0, 0], y.sin(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:2, 0, 1], y.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:2, 0, 2], (y / 10_000**0.5).sin(), atol=1e-5, rtol=0)
    x = (torch.arange(5) + 0.5) / 5 * 2 * torch.pi
    torch.testing.assert_close(found[0, :, 4], x.sin(), atol=1e-5, rtol=0)


def test_training_gives_every_layer_and_keeps_the_categories_that_are_there() -> None:
    made = network(retained=2).train()
    present = torch.tensor([[False, False, True, True], [True, False, False, False]])
    output = made(pictures_of(), forced=present)
    assert len(output.layers) == 2 and len(made.eval()(pictures_of()).layers) == 1
    kept = set(by_key(output))
    assert {(0, 2), (0, 3), (1, 0)} <= kept and len(kept) == 4


@pytest.mark.parametrize(
    "more",
    [
        {"tasks": keypoint_task(2)},
        {"tasks": MIXED[1:2] * 4},
        {"prompting": "none", "combine": "none"},
        {"refine": True},
    ],
)
def test_losses_are_sums_over_layers_and_reach_every_parameter(more: dict[str, Any]) -> None:
    made = network(**more).train()
    points = torch.rand(3, 2, 3).double()
    targets = [
        PictureTargets(boxes_of(3), torch.tensor([0, 2, 2]), torch.tensor([True, False, True, True]), points),
        PictureTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.bool),
                       torch.zeros(0, 2, 3)),
    ]  # fmt: skip
    output = made(pictures_of(), forced=torch.stack([target.present for target in targets]))
    losses = made.losses(output, targets, PromptedSetCriterion())
    names = {"loss_ce", "loss_bbox", "loss_giou"}
    names |= {"loss_kps_l1", "loss_oks"} if "tasks" in more and more["tasks"] == keypoint_task(2) else set()
    names |= set() if more.get("prompting") else {"cls_asl"}
    assert set(losses) == names
    single = [
        made.losses(
            type(output)(output.image, output.batch_index, output.class_index, None, (layer,)), targets,
            PromptedSetCriterion(),
        )
        for layer in output.layers
    ]  # fmt: skip
    for name in names - {"cls_asl"}:
        assert_close(losses[name], single[0][name] + single[1][name])
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, p in made.named_parameters() if p.grad is None] == []


def test_objects_of_categories_that_are_not_retained_count_only_in_the_number_of_boxes() -> None:
    made = network(retained=1).train()
    shown = torch.tensor([[True, True, False, False]])
    boxes = boxes_of(2)
    both = [PictureTargets(boxes, torch.tensor([0, 1]), shown[0])]
    output = made(pictures_of(1), forced=torch.tensor([[1.0, 0.5, -1.0, -1.0]]))
    assert output.class_index is not None and output.class_index.tolist() == [0]
    one = [PictureTargets(boxes[:1], torch.tensor([0]), shown[0])]
    found = made.losses(output, both, PromptedSetCriterion())
    alone = made.losses(output, one, PromptedSetCriterion())
    assert_close(found["loss_bbox"], alone["loss_bbox"] / 2)


def test_a_task_of_another_kind_brings_its_own_decoding() -> None:
    def sides(sequence: Tensor, reference: Tensor) -> dict[str, Tensor]:
        low, high = sequence[..., :2].sigmoid(), sequence[..., 2:4].sigmoid()
        return {"boxes": torch.cat([(low + high) / 2, (high - low).abs()], dim=-1)}

    made = network(tasks=[SequenceTask("sides", 5, sides), DETECTION, DETECTION, DETECTION])
    output = made(pictures_of())
    assert [part.task.name for part in output.last.tasks] == ["sides", "detection"]
    assert output.last.boxes.shape == (8, 3, 4)


def test_refinement_gives_each_layer_the_boxes_of_the_one_before() -> None:
    made = network(refine=True, layers=0)
    heads = made.object_decoder.detect_head
    for later in list(heads)[1:]:
        later.reset_outputs()
    made.train()
    output = made(pictures_of())
    assert_close(output.layers[1].boxes, output.layers[0].boxes)
    assert len(heads) == 2 and heads[0] is not heads[1]


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[0], []], "at least one"), ([], "at least one"), ([[0], [4]], "0 to 3"), ([[-1], [0]], "0 to 3")],
)
def test_prompts_that_do_not_exist_or_are_empty_are_refused(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        network()(pictures_of(), prompts=prompts)


def test_boxes_in_pixels_are_refused() -> None:
    with pytest.raises(InputError, match=r"0\.\.1"):
        match_prompted(torch.zeros(1, 2), torch.rand(1, 2, 4), [{"boxes": torch.tensor([[12.0, 3.0, 4.0, 5.0]])}])


def test_logits_without_rows_of_queries_are_refused() -> None:
    with pytest.raises(InputError, match="pred_logits"):
        match_prompted(torch.zeros(3), torch.rand(1, 3, 4), [{"boxes": torch.rand(1, 4)}])


def test_steps_and_tasks_that_do_not_fit_are_refused() -> None:
    made, pictures, given_rows = head(6), image(), rows_of(2)
    with pytest.raises(InputError, match="num_steps = 6"):
        made(image=pictures, steps=[4, 8], **given_rows)
    with pytest.raises(InputError, match="num_steps = 3"):
        SequenceHead(3, 8, 2)
    with pytest.raises(InputError, match="presence logit"):
        made(image=pictures, **{**given_rows, "presence_logits": None})
    points = torch.rand(1, 2, 4, 2)
    with pytest.raises(InputError, match="12 steps"):
        match_prompted(
            torch.zeros(1, 2),
            torch.rand(1, 2, 4),
            [{"boxes": torch.rand(1, 4), "keypoints": torch.rand(1, 3, 3)}],
            points,
        )
    with pytest.raises(InputError, match="tasks for 4 classes"):
        network(tasks=[DETECTION] * 3)
    with pytest.raises(InputError, match="combine = 'none'"):
        network(prompting="every")
    with pytest.raises(InputError, match="refining heads"):
        ObjectDecoder(ParallelHead(4, 8), 8, num_layers=3, refining_heads=[ParallelHead(4, 8)])


def test_pictures_that_do_not_fit_are_refused() -> None:
    made = network()
    with pytest.raises(InputError, match="pictures"):
        made(torch.zeros(2, 1, 8, 8))
    with pytest.raises(InputError, match="all padding"):
        made(pictures_of(), torch.ones(2, 12, 16, dtype=torch.bool))
    with pytest.raises(InputError, match="3 targets"):
        made.losses(made(pictures_of()), [None] * 3, PromptedSetCriterion())
    with pytest.raises(InputError, match="takes no prompts"):
        network(prompting="none", combine="none")(pictures_of(), prompts=[[0], [1]])
