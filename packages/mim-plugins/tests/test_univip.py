"""UniVIP: the official numbers where there are any, and what holds for every input."""

from __future__ import annotations

import copy
import pickle
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch import nn

from bowerbird.errors import InputError
from bowerbird.testing import ObjectiveContract, SimpleBuildContext, assert_close
from bowerbird_mim.schedules import cosine_schedule
from bowerbird_mim.univip import (
    SceneViews,
    UniVIP,
    UniVIPConfig,
    UniVIPObjective,
    affinity_loss,
    byol_head,
    cross_reference_weights,
    instance_transport_loss,
    scene_loss,
    sinkhorn,
)
from bowerbird_mim.vit import ViTConfig, ViTEncoder

SMALL = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}
HEADS = {"hidden_dim": 16, "out_dim": 8}
CROPS = {"instance_size": 8, "min_side": 4, "crop_scale": (0.3, 1.0)}


class TestContract(ObjectiveContract):
    name = "mim:univip"
    config = {**HEADS, **CROPS, "num_instances": 2}
    image_size = 24
    batch_size = 8
    learning_rate = 0.003
    learning_steps = 16

    def make_encoder(self) -> ViTEncoder:
        return ViTEncoder.build(ViTConfig(**SMALL))


class TestBYOL(TestContract):
    config = {**HEADS, "terms": []}


# ------------------------------------------------------------------------------------------------ official numbers


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.1, 50), (0.05, 200), (0.5, 10)])
def test_plans_are_those_of_ota(golden, epsilon: float, iterations: int) -> None:
    values = golden("univip/sinkhorn")
    plan = sinkhorn(values["cost"], values["mu"], values["nu"], epsilon, iterations)
    name = f"eps{epsilon:g}_iter{iterations}"
    assert_close(plan, values[f"plan_{name}"])
    assert_close((plan * values["cost"]).sum(dim=(1, 2)), values[f"transport_cost_{name}"])


def test_the_transport_of_instances_and_its_gradient(golden) -> None:
    values = golden("univip/instance_ot_loss")
    online, target = values["online_instances"].requires_grad_(), values["target_instances"].requires_grad_()
    scenes = {name: values[name].requires_grad_() for name in values if "_scene_" in name}
    online_scenes = (scenes["online_scene_1"], scenes["online_scene_2"])
    target_scenes = (scenes["target_scene_1"], scenes["target_scene_2"])
    loss, plan = instance_transport_loss(
        online, target, online_scenes, target_scenes, values["eps"], values["max_iter"]
    )
    loss.backward()
    assert_close(loss, values["loss_instance"])
    assert_close(plan, values["plan"])
    assert_close(online.grad, values["grad_online_instances"])
    assert target.grad is None and not plan.requires_grad
    assert all(scene.grad is None for scene in scenes.values())  # masses are constants
    assert_close(cross_reference_weights(online, sum(target_scenes) / 2), values["b"])
    assert_close(cross_reference_weights(target, sum(online_scenes) / 2), values["a"])
    raw = sinkhorn(values["cost"], values["b_raw"], values["a_raw"], values["eps"], values["max_iter"])
    assert_close(raw, values["plan_unnormalised_marginals"])
    stacked = [torch.stack(pair, dim=-2) for pair in (online_scenes, target_scenes)]
    again, _ = instance_transport_loss(online, target, *stacked, values["eps"], values["max_iter"])
    assert_close(again, values["loss_instance"])


def test_scenes_and_their_instances(golden) -> None:
    values = golden("univip/scene_and_affinity_loss")
    preds = [values[name].requires_grad_() for name in ("pred_1", "pred_2")]
    instances = values["instances"].requires_grad_()
    targets = values["target_1"].requires_grad_(), values["target_2"].requires_grad_()
    embedding = F.linear(instances.flatten(1), values["linear_weight"], values["linear_bias"])
    scene, affinity = scene_loss(*preds, *targets), affinity_loss(embedding, *targets)
    (scene + affinity).backward()
    assert_close(embedding, values["instance_embedding"])
    assert_close(scene, values["loss_scene"])
    assert_close(affinity, values["loss_scene_instance"])
    assert_close(preds[0].grad, values["grad_pred_1"])
    assert_close(preds[1].grad, values["grad_pred_2"])
    assert_close(instances.grad, values["grad_instances"])
    assert targets[0].grad is None and targets[1].grad is None


def test_the_momentum_grows_by_a_cosine(golden) -> None:
    values = golden("univip/momentum_schedule")
    table = cosine_schedule(values["base_momentum"], 1.0, values["total_iters"])
    assert_close(table, values["values"][:-1])  # the last one belongs to a step after the end
    config = UniVIPConfig(**HEADS, **CROPS, momentum=values["base_momentum"])
    context = SimpleBuildContext(total_steps=values["total_iters"])
    objective = UniVIPObjective.build(
        config, ViTEncoder(**SMALL, preprocessing=ViTConfig(**SMALL).preprocessing()), context
    )
    assert_close([objective.model.target.momentum_schedule(step) for step in range(50)], values["values"][:-1])


# ------------------------------------------------------------------------------------------------ transport


def masses(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 0.05
    return values / values.sum(dim=-1, keepdim=True)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 1000), shift=st.floats(-3, 3))
def test_a_plan_has_the_right_sums_and_does_not_see_a_constant(
    rows: int, columns: int, seed: int, shift: float
) -> None:
    cost = 2 * torch.rand(3, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    b, a = masses(3, rows, seed=seed), masses(3, columns, seed=seed + 1)
    plan = sinkhorn(cost, b, a, 0.3, 200)
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(dim=-2), a, rtol=0, atol=2e-8)
    torch.testing.assert_close(plan.sum(dim=-1), b, rtol=0, atol=1e-6)
    torch.testing.assert_close(sinkhorn(cost + shift, b, a, 0.3, 200), plan, rtol=0, atol=1e-9)


def test_row_sums_approach_their_masses() -> None:
    cost, b, a = torch.rand(5, 5, dtype=torch.float64), masses(5), masses(5, seed=1)
    errors = [float((sinkhorn(cost, b, a, 0.05, n).sum(dim=-1) - b).abs().max()) for n in (1, 5, 25, 400)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6


def test_much_entropy_gives_the_product_of_the_masses() -> None:
    cost, b, a = torch.rand(4, 6, dtype=torch.float64), masses(4), masses(6, seed=1)
    torch.testing.assert_close(sinkhorn(cost, b, a, 1e6, 5), torch.outer(b, a), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_little_entropy_gives_the_best_assignment(dtype: torch.dtype) -> None:
    cost = torch.tensor([[1, 2, 9, 9], [2, 6, 9, 9], [9, 9, 1, 4], [9, 9, 3, 9]], dtype=dtype) / 5
    uniform = torch.full((4,), 0.25, dtype=dtype)
    plan = sinkhorn(cost, uniform, uniform, 0.01, 1000)
    totals = {order: float(cost[range(4), order].sum()) for order in permutations(range(4))}
    best = min(totals, key=totals.__getitem__)
    assert best != tuple(cost.argmin(dim=1).tolist())  # what is best for each row alone is not
    assert sorted(totals.values())[1] > totals[best] + 0.1
    wanted = torch.zeros(4, 4, dtype=dtype)
    wanted[range(4), best] = 0.25
    assert plan.isfinite().all()
    torch.testing.assert_close(plan, wanted, rtol=0, atol=2e-3)


def test_single_precision_agrees_with_double_at_small_entropy() -> None:
    cost, b, a = 2 * torch.rand(8, 4, 4, dtype=torch.float64), masses(8, 4), masses(8, 4, seed=1)
    b[0, 1:] = 0  # all the mass on one row
    b[0, 0] = 1
    single = sinkhorn(cost.float(), b.float(), a.float(), 0.02, 100)
    torch.testing.assert_close(single.double(), sinkhorn(cost, b, a, 0.02, 100), rtol=1e-3, atol=1e-5)


def test_equal_orthogonal_instances_are_matched_with_themselves() -> None:
    instances = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0][None, :4]
    scene = instances.sum(dim=1)  # agrees with all of them alike
    loss, plan = instance_transport_loss(3 * instances, instances, [scene, scene], [scene, scene], 0.02, 200)
    torch.testing.assert_close(plan[0], torch.eye(4, dtype=torch.float64) / 4, rtol=0, atol=1e-6)
    assert loss == pytest.approx(-1, abs=1e-6)


def test_the_order_of_instances_does_not_matter_to_the_transport() -> None:
    online, target = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    scenes = [torch.randn(2, 8, dtype=torch.float64) for _ in range(4)]
    loss, plan = instance_transport_loss(online, target, scenes[:2], scenes[2:])
    order = torch.tensor([3, 0, 4, 1, 2])
    by_row, row_plan = instance_transport_loss(online[:, order], target, scenes[:2], scenes[2:])
    by_column, column_plan = instance_transport_loss(online, target[:, order], scenes[:2], scenes[2:])
    assert_close(row_plan, plan[:, order])
    assert_close(column_plan, plan[:, :, order])
    assert_close(by_row, loss)
    assert_close(by_column, loss)
    assert -1 <= loss <= 1


def test_weights_are_dot_products_with_the_other_scene_clipped_and_normalised() -> None:
    instances, scene = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-5.0, 0.0]]), torch.tensor([1.0, 3.0])
    assert_close(cross_reference_weights(instances, scene), [0.4, 0.6, 0.0], rtol=1e-6)
    assert_close(cross_reference_weights(instances, 7 * scene), [0.4, 0.6, 0.0], rtol=1e-6)
    assert_close(cross_reference_weights(-torch.rand(4, 2, 3), torch.ones(4, 3)), torch.full((4, 2), 0.5))
    assert_close(cross_reference_weights(torch.zeros(3, 2), scene), [1 / 3] * 3, rtol=1e-6)


def test_a_side_without_agreement_gives_finite_losses_and_gradients() -> None:
    online = torch.randn(2, 4, 6, requires_grad=True)
    scene = torch.randn(2, 6)
    target = torch.zeros(2, 4, 6)
    loss, plan = instance_transport_loss(online, target, (scene, scene), (-scene, -scene))
    loss.backward()
    assert plan.isfinite().all() and online.grad.isfinite().all()
    torch.testing.assert_close(plan.sum(dim=1), torch.full((2, 4), 0.25))


def test_scaling_a_vector_changes_neither_scene_nor_affinity_loss() -> None:
    vectors = [torch.randn(3, 6, dtype=torch.float64) for _ in range(4)]
    for i in range(4):
        scaled = [7.5 * vector if i == k else vector for k, vector in enumerate(vectors)]
        assert_close(scene_loss(*scaled), scene_loss(*vectors))
        assert_close(affinity_loss(*scaled[:3]), affinity_loss(*vectors[:3]))
    assert -2 <= scene_loss(*vectors) <= 2 and -2 <= affinity_loss(*vectors[:3]) <= 2
    assert scene_loss(vectors[0], vectors[1], vectors[1], vectors[0]) == pytest.approx(-2)


def test_bfloat16_autocast_leaves_the_transport_in_single_precision() -> None:
    online, target = torch.randn(2, 4, 64), torch.randn(2, 4, 64)
    scenes = [torch.randn(2, 64) for _ in range(4)]
    loss, plan = instance_transport_loss(online, target, scenes[:2], scenes[2:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, same = instance_transport_loss(online, target, scenes[:2], scenes[2:])
    assert torch.equal(plan, same) and torch.equal(loss, again)


# ------------------------------------------------------------------------------------------------ model


class Means(nn.Module):
    """A backbone for any size: mean colours of a 2 x 2 grid."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(F.adaptive_avg_pool2d(images, 2).flatten(1)))


def make_model(num_instances: int = 3, terms: tuple[str, ...] = ("scene", "affinity", "instance")) -> UniVIP:
    torch.manual_seed(0)
    return UniVIP(Means(), byol_head(10, 16, 8), byol_head(8, 16, 8), num_instances, terms, momentum=0.9).double()


def views(num_instances: int = 3, batch: int = 6) -> tuple[torch.Tensor, ...]:
    shapes = (batch, 3, 8, 8), (batch, 3, 8, 8), (batch, num_instances, 3, 6, 6)
    return tuple(torch.randn(*shape, dtype=torch.float64) for shape in shapes)


def test_the_loss_is_the_sum_of_the_terms_of_the_vectors() -> None:
    model, (scene_1, scene_2, crops) = make_model(), views()
    output = model(scene_1, scene_2, crops)
    by_hand = copy.deepcopy(make_model())

    def online(images: torch.Tensor) -> torch.Tensor:
        return by_hand.predictor(by_hand.online.projector(by_hand.online.backbone(images)))

    def target(images: torch.Tensor) -> torch.Tensor:
        return by_hand.target.module.projector(by_hand.target.module.backbone(images)).detach()

    p1, p2, t1, t2 = online(scene_1), online(scene_2), target(scene_1), target(scene_2)
    o, t = online(crops.reshape(-1, 3, 6, 6)).reshape(6, 3, 8), target(crops.reshape(-1, 3, 6, 6)).reshape(6, 3, 8)
    cosine = F.cosine_similarity
    scene = -(cosine(p1, t2) + cosine(p2, t1)).mean()
    together = by_hand.instance_linear(torch.cat([o[:, 0], o[:, 1], o[:, 2]], dim=1))
    affinity = -(cosine(together, t1) + cosine(together, t2)).mean()
    b = ((o * ((t1 + t2) / 2)[:, None]).sum(-1)).clamp(min=0)
    a = ((t * ((p1 + p2) / 2)[:, None]).sum(-1)).clamp(min=0)
    b, a = (torch.where(m.sum(1, True) > 0, m / m.sum(1, True), torch.full_like(m, 1 / 3)) for m in (b, a))
    cosines = cosine(o[:, :, None], t[:, None], dim=-1)
    plan = sinkhorn(1 - cosines.detach(), b, a)
    assert_close(output.plan, plan, rtol=1e-7, atol=1e-9)
    assert_close(output.parts["scene"], scene)
    assert_close(output.parts["affinity"], affinity)
    assert_close(output.parts["instance"], -(plan * cosines).sum(dim=(1, 2)).mean(), rtol=1e-7)
    assert_close(output.loss, sum(output.parts.values()))


def test_without_terms_or_instances_it_is_byol() -> None:
    scene_1, scene_2, _ = views()
    losses, states = [], []
    for model in (make_model(0), make_model(0, ()), make_model(3, ()), make_model(3, ("scene",))):
        assert not hasattr(model, "instance_linear")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for step in range(3):
            output = model(scene_1, scene_2)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            model.update_target(step)
        losses.append(output.loss)
        states.append(model.state_dict())
        assert output.plan is None and set(output.parts) == {"scene"}
    assert all(torch.equal(losses[0], loss) for loss in losses)
    assert all(torch.equal(states[0][name], state[name]) for state in states for name in states[0])


@pytest.mark.parametrize("terms", [("affinity",), ("instance",), ("scene", "instance"), ("scene", "affinity")])
def test_terms_can_be_chosen(terms: tuple[str, ...]) -> None:
    model = make_model(3, terms)
    output = model(*views())
    output.loss.backward()
    assert tuple(output.parts) == terms
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.target.parameters())
    with pytest.raises(InputError, match=r"instances: found None; .* need \(6, 3, 3, height, width\)"):
        model(*views()[:2])


def test_the_target_follows_the_online_network_and_not_its_batch_statistics() -> None:
    model = make_model()
    before = copy.deepcopy(model.target.module.state_dict())
    for parameter in model.online.parameters():
        parameter.data += 1
    model.update_target(0)
    for name, parameter in model.target.module.named_parameters():
        assert_close(parameter, before[name] + 0.1)
    assert torch.equal(model.target.module.projector[1].running_mean, before["projector.1.running_mean"])
    model(*views())
    assert not torch.equal(model.target.module.projector[1].running_mean, before["projector.1.running_mean"])


def test_affinity_depends_on_the_order_of_instances() -> None:
    model = make_model().eval()
    scene_1, scene_2, crops = views()
    first, second = model(scene_1, scene_2, crops), model(scene_1, scene_2, crops.flip(1))
    assert_close(first.parts["instance"], second.parts["instance"], rtol=1e-7)
    assert (first.parts["affinity"] - second.parts["affinity"]).abs() > 1e-4


# ------------------------------------------------------------------------------------------------ views


def picture(width: int = 40, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def make_views(**changes: object) -> SceneViews:
    return SceneViews(ViTConfig(**SMALL).preprocessing(), UniVIPConfig(**{**HEADS, **CROPS, **changes}))


def test_views_are_drawn_from_the_given_generator() -> None:
    transform = pickle.loads(pickle.dumps(make_views()))
    item = {"image": picture(), "item_id": "a"}
    first, second, third = (transform(item, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first["scene_views"].shape == (2, 3, 16, 16) and first["instance_views"].shape == (4, 3, 8, 8)
    for key in first:
        assert first[key].dtype == np.float32 and np.array_equal(first[key], second[key])
        assert not np.array_equal(first[key], third[key])


def test_instances_are_cut_out_of_the_picture_at_the_boxes_of_the_item() -> None:
    plain = {
        "jitter_prob": 0.0,
        "grey_prob": 0.0,
        "blur_prob": (0.0, 0.0),
        "solarize_prob": (0.0, 0.0),
        "flip_prob": 0.0,
    }
    transform = make_views(proposals="boxes", num_instances=2, crop_scale=(1.0, 1.0), **plain)
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[4:12, 4:12], pixels[20:30, 18:28] = (255, 0, 0), (0, 0, 255)
    item = {"image": Image.fromarray(pixels), "boxes": np.float32([[18, 20, 28, 30], [4, 4, 12, 12]]), "item_id": "a"}
    views = transform(item, np.random.default_rng(0))["instance_views"]
    blue = make_views().instances.preprocessing(Image.new("RGB", (8, 8), (0, 0, 255)))
    red = make_views().instances.preprocessing(Image.new("RGB", (8, 8), (255, 0, 0)))
    for view, colour in zip(views, (blue, red), strict=True):  # in the order of the boxes
        assert np.array_equal(view[:, 2:-2, 2:-2], colour[:, 2:-2, 2:-2])  # resampling sees a pixel beyond the edge


def test_byol_needs_no_proposals() -> None:
    views = make_views(terms=(), proposals="boxes")({"image": picture()}, np.random.default_rng(0))
    assert set(views) == {"scene_views"}


def test_scenes_alone_overlap_and_need_no_instances() -> None:
    views = make_views(terms=("scene",))({"image": picture(), "item_id": "a"}, np.random.default_rng(0))
    assert set(views) == {"scene_views"}


# ------------------------------------------------------------------------------------------------ refusals


def test_what_does_not_fit_is_refused() -> None:
    cost, mass = torch.rand(3, 4), torch.rand(3)
    with pytest.raises(InputError, match=r"epsilon = 0, .*expected epsilon > 0"):
        sinkhorn(cost, mass, torch.rand(4), 0)
    with pytest.raises(InputError, match=r"row_mass has the value -0\.5"):
        sinkhorn(cost, torch.tensor([0.5, 1.0, -0.5]), torch.rand(4))
    with pytest.raises(InputError, match=r"col_mass \(3,\) do not fit"):
        sinkhorn(cost, mass, mass)
    with pytest.raises(InputError, match=r"row_mass \(5, 3\) and col_mass \(4,\) do not fit"):
        sinkhorn(cost.expand(2, 3, 4), mass.expand(5, 3), torch.rand(4))
    with pytest.raises(InputError, match=r"col_mass has the value inf: masses must be finite"):
        sinkhorn(cost, mass, torch.tensor([0.5, 1.0, torch.inf, 1.0]))
    with pytest.raises(InputError, match=r"other_scene_mean \(5, 4\) do not fit"):
        cross_reference_weights(torch.rand(2, 3, 4), torch.rand(5, 4))
    with pytest.raises(InputError, match=r"expected .*K, D"):
        instance_transport_loss(torch.rand(2, 3, 4), torch.rand(2, 4, 4), torch.rand(2, 2, 4), torch.rand(2, 2, 4))
    with pytest.raises(InputError, match="K of at least 1"):
        instance_transport_loss(torch.rand(2, 0, 4), torch.rand(2, 0, 4), torch.rand(2, 2, 4), torch.rand(2, 2, 4))
    with pytest.raises(InputError, match=r"target_scenes have shapes .* expected \(2, 4\) each"):
        scene = torch.rand(2, 4)
        instance_transport_loss(torch.rand(2, 3, 4), torch.rand(2, 3, 4), (scene, scene), (scene, torch.rand(3, 4)))
    with pytest.raises(InputError, match="expected equal ones"):
        scene_loss(torch.rand(2, 4), torch.rand(2, 4), torch.rand(2, 4), torch.rand(1, 4))
    with pytest.raises(InputError, match=r"terms has \['scenes'\]; expected some of scene, affinity, instance"):
        make_model(3, ("scenes",))
    for name, value in (("epsilon", -0.1), ("iterations", 0)):
        with pytest.raises(InputError, match=f"{name} = {value}"):
            UniVIP(nn.Identity(), nn.Identity(), byol_head(2, 2, 2), **{name: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"found \(6, 2, 3, 6, 6\)"):
        make_model()(*views(2))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="Did you mean 'random'"):
        UniVIPConfig(proposals="rand")
    with pytest.raises(ValidationError, match="epsilon"):
        UniVIPConfig(epsilon=0.0)
    encoder = ViTEncoder.build(ViTConfig(**SMALL))
    with pytest.raises(
        InputError, match=r"instance_size = 10: the encoder ViTEncoder cannot encode pictures of 10 x 10"
    ):
        UniVIPObjective.build(UniVIPConfig(**HEADS, instance_size=10), encoder, SimpleBuildContext())
    with pytest.raises(InputError, match="does not take pictures"):
        UniVIPObjective.build(UniVIPConfig(), ViTEncoder(**SMALL), SimpleBuildContext())
