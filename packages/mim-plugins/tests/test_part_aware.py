"""PASS: the authors' numbers, and what holds for every number of parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from bowerbird.errors import InputError
from bowerbird.testing import ObjectiveContract, assert_close, override_contract_test
from bowerbird.testing.training import SimpleBuildContext, TinyEncoder
from bowerbird_mim.distillation import ProjectionHead, SelfDistillationLoss
from bowerbird_mim.part_aware import (
    PartAwareLoss,
    PartAwareNetwork,
    PartMultiCrop,
    PassConfig,
    PassObjective,
    branch_names,
    part_areas,
)
from bowerbird_mim.part_vit import PartViTConfig, PartViTEncoder

ENCODER = {"image_size": (16, 8), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
SMALL = {"out_dim": 12, "head_hidden": 16, "head_bottleneck": 8, "local_size": (8, 4), "local_crops": 2}


def small_encoder(num_parts: int = 3) -> PartViTEncoder:
    config = PartViTConfig(**ENCODER, num_parts=num_parts, pooling="cat" if num_parts else "class")
    return PartViTEncoder.build(config)


class TestContract(ObjectiveContract):
    name = "mim:pass"
    config = SMALL
    image_size = 16

    def make_encoder(self) -> PartViTEncoder:
        return small_encoder()

    @override_contract_test(reason="the goal moves: the loss rises while the centre settles, so both are held")
    def test_training_on_one_batch_lowers_the_loss(self) -> None:
        self.config = {**SMALL, "momentum_teacher": 1.0, "center_momentum": 1.0}
        super().test_training_on_one_batch_lowers_the_loss()


# ------------------------------------------------------------------------------------------------ official numbers


def test_areas(golden) -> None:
    for height, width, area, top, left, high, wide in golden("pass/area_boxes")["rows_H_W_area_top_left_h_w"].tolist():
        assert part_areas(height)[area - 1] == (top, high)
        assert (left, wide) == (0, width)  # areas have the whole width


def test_heads(golden) -> None:
    values = golden("pass/part_heads")
    for name in branch_names(3):
        head = ProjectionHead(
            values["in_dim"], values["out_dim"], values["hidden_dim"], values["bottleneck_dim"], values["nlayers"]
        ).double()
        for ours, theirs in (("mlp", f"mlp_{name}"), ("last_layer", f"last_layer_{name}")):
            prefix = f"sd.{theirs}."
            state = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
            getattr(head, ours).load_state_dict(state)
        assert_close(head(values[f"x.{name}"]), values[f"y_global.{name}"])
        if name != "cls":
            assert_close(head(values[f"x.{name}"]), values[f"y_local.area{name[2:]}.part"])
        else:
            assert_close(head(values["x.cls"]), values["y_local.area2.cls"])


def branches_of(values: dict[str, Any], prefix: str) -> dict[str, torch.Tensor]:
    """The student's rows of every branch, crop by crop; ``prefix`` is "" or "grad."."""
    areas = range(1, values["num_parts"] + 1)
    of_class = [values[f"{prefix}student_local.area{j}.cls"] for j in areas]
    branches = {"cls": torch.cat([values[f"{prefix}student_global.cls"], *of_class])}
    for j in areas:
        parts = [values[f"{prefix}student_global.pt{j}"], values[f"{prefix}student_local.area{j}.part"]]
        branches[f"pt{j}"] = torch.cat(parts)
    return branches


def test_the_loss_its_gradient_and_the_centres_after_it(golden) -> None:
    values = golden("pass/pass_loss")
    loss = PartAwareLoss(
        9,
        values["num_parts"],
        values["student_temp"],
        values["teacher_temp_schedule"].numpy(),
        values["center_momentum"],
    ).double()
    names = branch_names(3)
    for name in names:
        loss.losses[name].center.copy_(values[f"center_before.{name}"])
    student = {name: rows.requires_grad_() for name, rows in branches_of(values, "").items()}
    teacher = {name: values[f"teacher_global.{name}"] for name in names}
    total = loss(student, teacher, values["epoch"])
    total.backward()
    assert_close(total, values["loss"])
    gradients = branches_of(values, "grad.")
    for name in names:
        assert_close(student[name].grad, gradients[name], where=name)
        assert_close(loss.losses[name].center, values[f"center_after.{name}"])


# ------------------------------------------------------------------------------------------------ loss

sizes = st.tuples(st.integers(0, 999), st.integers(0, 4), st.integers(0, 3), st.integers(1, 3), st.integers(1, 6))


def random_outputs(seed: int, parts: int, crops: int, batch: int, width: int) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(seed)
    views = {name: 2 + crops * (parts if name == "cls" else 1) for name in branch_names(parts)}

    def rows(count: int) -> torch.Tensor:
        return torch.randn(count * batch, width, generator=generator, dtype=torch.float64)

    return {name: rows(count) for name, count in views.items()}, {name: rows(2) for name in views}


@settings(max_examples=25, deadline=None)
@given(sizes)
def test_the_loss_is_the_mean_over_all_terms_of_all_branches(drawn) -> None:
    _, parts, crops, batch, width = drawn
    student, teacher = random_outputs(*drawn)
    loss = PartAwareLoss(width, parts, 0.2, 0.07).double().eval()
    terms = []
    for name in branch_names(parts):
        loss.losses[name].center.normal_()
        targets = ((teacher[name] - loss.losses[name].center) / 0.07).softmax(1).view(2, batch, width)
        views = (student[name] / 0.2).log_softmax(1).view(-1, batch, width)
        for i in range(2):
            terms += [-(targets[i] * view).sum(1).mean() for v, view in enumerate(views) if v != i]
    assert len(terms) == 2 * (2 + parts * crops) - 2 + parts * (2 * (2 + crops) - 2)
    assert_close(loss(student, teacher), sum(terms) / len(terms), atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(sizes)
def test_without_parts_it_is_dino(drawn) -> None:
    seed, _, crops, batch, width = drawn
    student, teacher = random_outputs(seed, 0, crops, batch, width)
    student["cls"] = torch.cat([student["cls"], torch.randn(crops * batch, width, dtype=torch.float64)])
    rows = [student["cls"].clone().requires_grad_() for _ in range(2)]
    ours, plain = PartAwareLoss(width, 0).double(), SelfDistillationLoss(width).double()
    first, second = ours({"cls": rows[0]}, teacher), plain(rows[1], teacher["cls"])
    (first + second).backward()
    assert torch.equal(first, second) and torch.equal(rows[0].grad, rows[1].grad)
    assert torch.equal(ours.losses["cls"].center, plain.center)


@settings(max_examples=20, deadline=None)
@given(sizes.filter(lambda drawn: drawn[1] > 1))
def test_parts_may_change_their_names_together_with_their_centres(drawn) -> None:
    _, parts, _, _, width = drawn
    student, teacher = random_outputs(*drawn)
    first, second = (PartAwareLoss(width, parts).double().eval() for _ in range(2))
    names = branch_names(parts)
    other = dict(zip(names, ["cls", *reversed(names[1:])], strict=True))
    for name in names:
        first.losses[name].center.normal_()
        second.losses[other[name]].center.copy_(first.losses[name].center)
    renamed = [{other[name]: rows for name, rows in outputs.items()} for outputs in (student, teacher)]
    ordered = [{name: outputs[name] for name in names} for outputs in renamed]
    assert_close(first(student, teacher), second(*ordered), atol=1e-10)


# ------------------------------------------------------------------------------------------------ network


def small_objective(num_parts: int = 3, **changes: Any) -> PassObjective:
    return PassObjective.build(PassConfig(**SMALL | changes), small_encoder(num_parts), SimpleBuildContext())


def views(batch: int = 2, parts: int = 3, crops: int = 2) -> dict[str, torch.Tensor]:
    return {
        "global_views": torch.randn(batch, 2, 3, 16, 8),
        "local_views": torch.randn(batch, max(1, parts) * crops, 3, 8, 4),
    }


def test_every_head_sees_the_token_of_its_part_and_the_class_head_sees_all_views() -> None:
    network = small_objective().dino.student.eval()
    large, small = torch.randn(4, 3, 16, 8), torch.randn(12, 3, 8, 4)  # two pictures, two crops of three areas
    outputs = network(large, small)
    cls, parts = network.backbone.vit(large)
    locals_ = [network.backbone.vit(small[4 * j : 4 * j + 4], j) for j in range(3)]
    expected = network.heads["cls"](torch.cat([cls, *(found[0] for found in locals_)]))
    assert_close(outputs["cls"], expected, rtol=1e-5, atol=1e-6)
    for j in range(3):
        expected = network.heads[f"pt{j + 1}"](torch.cat([parts[:, j], locals_[j][1][:, 0]]))
        assert_close(outputs[f"pt{j + 1}"], expected, rtol=1e-5, atol=1e-6)


def test_a_part_learns_from_its_own_terms_only() -> None:
    objective = small_objective().train()
    shares = objective.dino(**views()).shares
    (shares["cls"] + shares["pt2"]).backward(retain_graph=True)
    student = objective.dino.student
    for j in (1, 3):
        assert all(parameter.grad is None for parameter in student.heads[f"pt{j}"].parameters())
    assert student.heads["pt2"].mlp[0].weight.grad.any()
    # The class token attends to every part token, so only what branch 2 alone gives is free of the other heads.
    alone = torch.autograd.grad(shares["pt2"], list(student.heads["pt1"].parameters())[:1], allow_unused=True)
    assert alone == (None,)


def test_token_1_gets_no_gradient_where_nothing_shows_it() -> None:
    network = small_objective().dino.student
    small = torch.randn(12, 3, 8, 4)
    _, part = network.backbone.vit(small[4:], torch.tensor([1] * 4 + [2] * 4))
    part.sum().backward()
    vit = network.backbone.vit
    for name in ("part_token1", "part1_pos"):
        gradient = getattr(vit, name).grad
        assert gradient is None or not gradient.any()
    assert vit.part_token2.grad.any() and vit.part_token3.grad.any()


def step(objective: PassObjective, number: int, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    objective.before_step(number)
    output = objective(batch)
    output.total.backward()
    objective.before_update(number)
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    objective.after_step(number)
    return output


def test_all_last_layers_wait_for_their_epoch_and_the_teacher_follows() -> None:
    objective = small_objective(momentum_teacher=0.5).train()
    heads = objective.dino.student.heads
    before = {name: head.last_layer.weight_v.clone() for name, head in heads.items()}
    first = objective.dino.teacher.module.backbone.vit.part_token2.clone()
    objective.on_epoch_start(0)
    output = step(objective, 0, views())
    assert_close(output.parts["class"] + output.parts["parts"], output.total, rtol=1e-5, atol=1e-6)
    assert {"teacher_entropy", "mean_entropy", "part_mean_entropy"} <= output.stats.keys()
    assert all(torch.equal(head.last_layer.weight_v, before[name]) for name, head in heads.items())
    student = objective.dino.student.backbone.vit.part_token2
    assert_close(objective.dino.teacher.module.backbone.vit.part_token2, (first + student) / 2, rtol=1e-5, atol=1e-7)
    centres = [loss.center for loss in objective.dino.loss.losses.values()]
    assert all(center.any() for center in centres) and not torch.equal(centres[1], centres[2])
    objective.on_epoch_start(1)
    step(objective, 1, views())
    assert not any(torch.equal(head.last_layer.weight_v, before[name]) for name, head in heads.items())


def test_the_exported_encoder_is_the_teachers_backbone() -> None:
    objective = small_objective()
    exported = objective.exported_encoder()
    assert exported is objective.dino.teacher.module.backbone
    assert exported.eval()({"image": torch.randn(2, 3, 16, 8)}).pooled.shape == (2, 32)


def test_it_trains_without_parts_too_and_without_small_crops() -> None:
    output = small_objective(0).train()(views(parts=0))
    assert output.total.isfinite() and output.parts == {}
    output = small_objective(2, local_crops=0).train()({"global_views": torch.randn(2, 2, 3, 16, 8)})
    assert output.total.isfinite()


# ------------------------------------------------------------------------------------------------ crops


@settings(max_examples=30, deadline=None)
@given(height=st.integers(4, 400), parts=st.integers(1, 6), fraction=st.floats(0.3, 1))
def test_areas_have_one_height_lie_inside_and_go_from_top_to_bottom(height: int, parts: int, fraction: float) -> None:
    areas = part_areas(height, parts, fraction)
    assert [high for _, high in areas] == [int(fraction * height)] * parts
    assert all(top >= 0 and top + high <= height for top, high in areas)
    assert areas[0][0] == 0 and [top for top, _ in areas] == sorted(top for top, _ in areas)
    if parts > 1:
        assert areas[-1][0] == int((1 - fraction) * height)


@given(half=st.integers(1, 200))
def test_the_first_and_the_third_half_cover_an_even_height(half: int) -> None:
    first, _, third = part_areas(2 * half)
    assert first == (0, half) and third == (half, half)


def striped() -> Image.Image:
    """Red, green and blue from top to bottom."""
    rows = np.zeros((60, 30, 3), np.uint8)
    for zone in range(3):
        rows[20 * zone : 20 * zone + 20, :, zone] = 255
    return Image.fromarray(rows)


def test_small_crops_lie_in_their_areas_in_order() -> None:
    make = PartMultiCrop((32, 16), (16, 8), 3, 2, fraction=1 / 3, colors=(None, None, None))
    found = make({"image": striped()}, np.random.default_rng(0))
    assert found["global_views"].shape == (2, 3, 32, 16) and found["local_views"].shape == (6, 3, 16, 8)
    assert found["local_views"].mean(axis=(2, 3)).argmax(axis=1).tolist() == [0, 0, 1, 1, 2, 2]
    again = make({"image": striped()}, np.random.default_rng(0))
    assert np.array_equal(found["local_views"], again["local_views"])


def test_large_crops_show_the_whole_height_where_their_ratio_allows() -> None:
    """Of a picture twice as high as wide: with the authors' ratio a crop of full width shows two thirds at most."""
    shares = {}
    for name, ratio in (("authors", (3 / 4, 4 / 3)), ("high", (0.5, 0.5))):
        make = PartMultiCrop((32, 16), (16, 8), global_scale=(0.95, 1), global_ratio=ratio, colors=(None, None, None))
        found = make({"image": striped()}, np.random.default_rng(0))["global_views"]
        means = found.mean(axis=(2, 3))  # every third of the picture has a colour of its own
        shares[name] = (means.max(axis=1) - means.min(axis=1)).min()
    assert shares["high"] < 0.5 < shares["authors"]


def test_without_parts_small_crops_are_of_the_whole() -> None:
    make = PartMultiCrop((32, 16), (16, 8), 0, 9, colors=(None, None, None))
    found = make({"image": striped()}, np.random.default_rng(0))["local_views"]
    assert found.shape == (9, 3, 16, 8)
    assert len(set(found.mean(axis=(2, 3)).argmax(axis=1))) > 1
    assert "local_views" not in PartMultiCrop((32, 16), (16, 8), 3, 0)({"image": striped()}, np.random.default_rng(0))


# ------------------------------------------------------------------------------------------------ refusals


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="num_parts = 0"):
        part_areas(10, 0)
    with pytest.raises(InputError, match="height = 1"):
        part_areas(1)
    with pytest.raises(InputError, match=r"fraction = 1\.5"):
        PartMultiCrop(fraction=1.5)
    with pytest.raises(InputError, match="global_ratio"):
        PartMultiCrop(global_ratio=(0.0, 1.0))
    loss = PartAwareLoss(4, 1)
    rows = torch.zeros(4, 4)
    with pytest.raises(InputError, match=r"student has the branches \['cls'\]"):
        loss({"cls": rows}, {"cls": rows, "pt1": rows})
    with pytest.raises(InputError, match="3 student rows for 4 teacher rows"):
        loss({"cls": rows, "pt1": rows[:3]}, {"cls": rows, "pt1": rows})
    with pytest.raises(InputError, match="cannot be shared among 3 areas"):
        small_objective().dino.student(torch.zeros(4, 3, 16, 8), torch.zeros(4, 3, 8, 4))
    with pytest.raises(InputError, match="global_views have shape"):
        small_objective().dino(torch.zeros(2, 3, 3, 16, 8))
    with pytest.raises(InputError, match="this encoder needs"):
        PartAwareNetwork(small_encoder(), {"cls": ProjectionHead(16, 4)})
    with pytest.raises(InputError, match="needs the encoder mim:part-vit"):
        PassObjective.build(PassConfig(**SMALL), TinyEncoder(), SimpleBuildContext())
    with pytest.raises(InputError, match="multiples of patch_size"):
        small_objective(local_size=(9, 4))
    with pytest.raises(ValidationError, match="area"):
        PassConfig(area=0.0)
