"""Universal backward-compatible training: golden numbers, what must hold for any numbers, and the real loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_upgrade
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close

from bowerbird.batch import Batch
from bowerbird.encoders import load_encoder
from bowerbird.errors import RecipeError
from bowerbird.protocols import BuildContext, TrainedRun
from bowerbird.registry import get_registry
from bowerbird.retrieval.metrics import RankedList, Relevance, average_precision
from bowerbird.testing import ObjectiveContract, SimpleBuildContext, TinyEncoder
from bowerbird_compat.heads import MarginSoftmax
from bowerbird_compat.unibct import PrototypeLoss, PrototypeRefresh, refine_prototypes, transition_matrix
from bowerbird_compat.unibct_objective import UniBCTConfig, UniBCTObjective, advbct, mixbct

TIGHT = {"rtol": 1e-9, "atol": 1e-10}
SEEDS = st.integers(0, 2**31 - 1)
invariant = settings(max_examples=25, deadline=None)
raw = {"normalize_output": False}


def random(*shape: int, seed: int, grad: bool = False) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.requires_grad_(grad)


def labelled(seed: int, size: int = 14) -> tuple[Tensor, Tensor, Tensor]:
    """Old and new vectors of samples of three classes, each of which has some."""
    drawn = torch.randint(3, (size,), generator=torch.Generator().manual_seed(seed))
    drawn[:3] = torch.arange(3)
    return random(size, 5, seed=seed), random(size, 7, seed=seed + 1), drawn


# --------------------------------------------------------------------------------------------------- golden numbers


@pytest.mark.parametrize("case", ["prototype_refinement_mild", "prototype_refinement_unit"])
@pytest.mark.parametrize(("edges", "suffix"), [("row", "row"), ("column", "col")])
def test_refined_prototypes_are_those_of_the_public_code_for_either_axis(golden, case, edges, suffix):
    g = golden(f"unibct/{case}")
    lam, tau = float(g["lam"]), float(g["temperature"])
    made = refine_prototypes(
        g["old_features"], g["new_features"], g["labels"], lam=lam, temperature=tau, edges=edges, normalize_output=False
    )
    assert_close(made.weight, g[f"prototypes_{suffix}"], **TIGHT)
    assert torch.equal(made.counts, g["labels"].bincount())
    for c in range(len(made.counts)):
        members = g["labels"] == c
        matrix = transition_matrix(g["new_features"][members], tau, edges=edges)
        assert_close(matrix, g[f"class{c}__{suffix}__transition"], **TIGHT)
        assert_close(made.sample_weight[members], g[f"class{c}__{suffix}__propagation"].mean(dim=0), **TIGHT)
        assert_close(made.weight[c], g[f"class{c}__{suffix}__refined"].mean(dim=0), **TIGHT)


def test_losses_and_gradients_are_those_of_the_public_code(golden):
    g = golden("unibct/prototype_losses")
    labels = g["labels"]
    feat, w_new = g["feat_new"].requires_grad_(), g["W_new"].requires_grad_()
    head = MarginSoftmax("arcface_monotone", float(g["scale"]), float(g["margin"]))
    new = F.cross_entropy(head(feat, w_new, labels), labels)
    plain = PrototypeLoss(g["prototypes_unit"])(feat, labels)
    (new + plain).backward()
    assert_close(new, g["loss_new"], **TIGHT)
    assert_close(plain, g["loss_proto_plain"], **TIGHT)
    assert_close(new + plain, g["loss_total_plain"], **TIGHT)
    assert_close(feat.grad, g["grad_feat_plain"], **TIGHT)
    assert_close(w_new.grad, g["grad_W_plain"], **TIGHT)

    feat = g["feat_new"].detach().clone().requires_grad_()
    margin = MarginSoftmax("arcface", float(g["proto_scale"]), float(g["proto_margin"]))
    known = torch.arange(int(g["num_known_classes"]))
    loss = PrototypeLoss(g["prototypes"], margin=margin, known_classes=known)(feat, labels)
    loss.backward()
    assert_close(loss, g["loss_proto_margin"], **TIGHT)
    assert_close(feat.grad, g["grad_feat_margin"], **TIGHT)


# ------------------------------------------------------------------------------------------------------- invariants


@invariant
@given(seed=SEEDS, lam=st.floats(0, 0.99), tau=st.floats(0.01, 10))
def test_prototypes_are_convex_combinations_of_old_vectors(seed, lam, tau):
    old, new, labels = labelled(seed)
    made = refine_prototypes(old, new, labels, lam=lam, temperature=tau, **raw)
    assert (made.sample_weight > 0).all()
    for c in range(3):
        of_class = labels == c
        share = made.sample_weight[of_class]
        assert_close(share.sum(), torch.tensor(1.0, dtype=torch.float64), **TIGHT)
        assert_close(made.weight[c], share @ F.normalize(old[of_class]), **TIGHT)
    assert (made.weight.norm(dim=1) <= 1 + 1e-12).all()
    unit = refine_prototypes(old, new, labels, lam=lam, temperature=tau)
    assert_close(unit.weight, F.normalize(made.weight), **TIGHT)


@invariant
@given(seed=SEEDS)
def test_without_propagation_with_uniform_edges_or_with_column_edges_they_are_plain_means(seed):
    old, new, labels = labelled(seed)
    means = torch.stack([F.normalize(old[labels == c]).mean(dim=0) for c in range(3)])
    assert_close(refine_prototypes(old, new, labels, lam=0.0, **raw).weight, means, **TIGHT)
    assert_close(refine_prototypes(old, new, labels, edges="column", **raw).weight, means, **TIGHT)
    flat = refine_prototypes(old, new, labels, temperature=1e9, **raw).weight
    assert_close(flat, means, rtol=0, atol=1e-7)


@invariant
@given(seed=SEEDS)
def test_the_order_of_samples_means_nothing(seed):
    old, new, labels = labelled(seed)
    shuffle = torch.randperm(len(old), generator=torch.Generator().manual_seed(seed))
    one = refine_prototypes(old, new, labels)
    other = refine_prototypes(old[shuffle], new[shuffle], labels[shuffle])
    assert_close(one.weight, other.weight, **TIGHT)
    assert_close(one.sample_weight[shuffle], other.sample_weight, **TIGHT)


@invariant
@given(seed=SEEDS, lam=st.floats(0, 0.99))
def test_one_sample_is_its_prototype_and_two_are_averaged(seed, lam):
    old, new = random(3, 5, seed=seed), random(3, 7, seed=seed + 1)
    made = refine_prototypes(old, new, torch.tensor([0, 1, 1]), lam=lam, **raw)
    unit = F.normalize(old)
    assert_close(made.weight[0], unit[0], **TIGHT)
    assert_close(made.weight[1], (unit[1] + unit[2]) / 2, **TIGHT)


@invariant
@given(seed=SEEDS)
def test_equal_old_vectors_give_that_vector_and_rotations_act_as_they_should(seed):
    old, new, labels = labelled(seed)
    same = random(1, 5, seed=seed).expand(14, 5)
    assert_close(refine_prototypes(same, new, labels).weight, F.normalize(same[:3]), **TIGHT)
    turn_old, turn_new = (torch.linalg.qr(random(n, n, seed=seed + n)).Q for n in (5, 7))
    made = refine_prototypes(old, new, labels).weight
    assert_close(refine_prototypes(old @ turn_old, new, labels).weight, made @ turn_old, **TIGHT)
    assert_close(refine_prototypes(old, new @ turn_new, labels).weight, made, rtol=1e-7, atol=1e-8)


@invariant
@given(seed=SEEDS, lam=st.floats(0, 0.95), normalize=st.booleans())
def test_the_iteration_ends_at_the_closed_form(seed, lam, normalize):
    old, new, labels = labelled(seed)
    options = {"lam": lam, "temperature": 0.2, "normalize_inputs": normalize}
    closed = refine_prototypes(old, new, labels, **options)
    iterated = refine_prototypes(old, new, labels, solver="iterate", max_iter=2000, tol=1e-12, **options)
    assert_close(iterated.sample_weight, closed.sample_weight, rtol=1e-9, atol=1e-11)
    assert_close(iterated.weight, closed.weight, rtol=1e-8, atol=1e-9)


def test_an_iteration_that_stops_early_says_so():
    old, new, labels = labelled(0)
    with pytest.warns(UserWarning, match="2 steps left an error"):
        refine_prototypes(old, new, labels, solver="iterate", max_iter=2)


@invariant
@given(seed=SEEDS)
def test_an_outlier_in_new_space_counts_less_than_its_share(seed):
    new = torch.zeros(8, 7, dtype=torch.float64)
    new[:, 0] = 1
    new += 0.1 * random(8, 7, seed=seed)
    new[3] = -new[3]
    made = refine_prototypes(random(8, 5, seed=seed), new, torch.zeros(8, dtype=torch.int64))
    assert made.sample_weight[3] < 0.5 / 8


def test_no_gradient_flows_into_prototypes_and_their_type_is_that_of_the_old_vectors():
    old, new, labels = labelled(0)
    made = refine_prototypes(old.float().requires_grad_(), new.requires_grad_(), labels)
    assert not made.weight.requires_grad
    assert made.weight.dtype == made.sample_weight.dtype == torch.float32
    loss = PrototypeLoss(made, scale=16.0)
    assert list(loss.parameters()) == []
    assert len(loss.state_dict()) > 0
    feat = random(14, 5, seed=3).float().requires_grad_()
    loss(feat, labels).backward()
    assert feat.grad.abs().sum() > 0


def test_prototypes_change_at_refreshes_only_and_a_refresh_with_the_same_weights_changes_nothing():
    old, _, labels = labelled(0)
    old = old.float()
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 7), nn.Dropout(0.5))
    inputs = torch.randn(14, 4)
    loss = PrototypeLoss(refine_prototypes(old, old, labels, lam=0.0))
    refresh = PrototypeRefresh(
        loss, encoder, lambda: zip(inputs.split(5), labels.split(5), strict=True), old, epochs=(1, 3, 4)
    )
    first = loss.prototypes.clone()
    assert not refresh.on_epoch_start(0)
    assert torch.equal(loss.prototypes, first)
    assert refresh.on_epoch_start(1)
    expected = refine_prototypes(old, encoder[0](inputs), labels).weight
    assert_close(loss.prototypes, expected)
    assert encoder.training
    second = loss.prototypes.clone()
    assert not torch.equal(first, second)
    assert not refresh.on_epoch_start(2)
    assert refresh.on_epoch_start(3)
    assert torch.equal(loss.prototypes, second)
    with torch.no_grad():
        encoder[0].weight.mul_(-1).add_(0.5)
    assert refresh.on_epoch_start(4)
    assert not torch.equal(loss.prototypes, second)


def test_without_weight_loss_and_gradients_are_those_of_plain_training_bit_for_bit():
    old, new, labels = labelled(0)
    outcomes = []
    for extra in (None, PrototypeLoss(refine_prototypes(old, new, labels), weight=0.0)):
        feat, w = random(14, 5, seed=3, grad=True), random(3, 5, seed=4, grad=True)
        loss = F.cross_entropy(F.linear(feat, w), labels)
        if extra is not None:
            loss = loss + extra(feat, labels)
        loss.backward()
        outcomes.append((loss.detach(), feat.grad, w.grad))
    for plain, with_term in zip(*outcomes, strict=True):
        assert torch.equal(plain, with_term)


# ------------------------------------------------------------------------------------------------------------ errors


def test_inputs_and_settings_that_do_not_fit_are_refused():
    old, new, labels = labelled(0)
    for setting, match in (
        ({"lam": 1.0}, r"lam is 1\.0; it must be in \[0, 1\)"),
        ({"lam": -0.1}, "lam is"),
        ({"lam": math.nan}, "lam is"),
        ({"temperature": 0.0}, "temperature is"),
        ({"solver": "cg"}, "accepted: closed, iterate"),
        ({"edges": "both"}, "accepted: row, column"),
        ({"on_missing": "zero"}, "accepted: raise, skip"),
        ({"max_iter": 0}, "max_iter is 0"),
        ({"num_classes": 2}, r"Labels are in 0\.\.2; they must be in 0\.\.1"),
        ({"num_classes": 6}, "3 of 6 classes have no sample: 3, 4, 5"),
    ):
        with pytest.raises(ValueError, match=match):
            refine_prototypes(old, new, labels, **setting)
    with pytest.raises(ValueError, match="the same N samples"):
        refine_prototypes(old, new[:-1], labels)
    with pytest.raises(ValueError, match="1 of 3 classes have no sample: 1"):
        refine_prototypes(old[:2], new[:2], torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="no samples"):
        refine_prototypes(old[:0], new[:0], labels[:0])
    with pytest.raises(TypeError, match="integers"):
        refine_prototypes(old, new, labels.double())
    for what in ("Old", "New"):
        bad = (old if what == "Old" else new).clone()
        bad[4, 2] = math.inf
        with pytest.raises(ValueError, match=f"{what} vectors: row 4 is not finite"):
            refine_prototypes(bad if what == "Old" else old, bad if what == "New" else new, labels)


def test_classes_without_samples_are_left_out_on_request_and_replaced_only_by_the_same_classes():
    old, new = random(4, 5, seed=0), random(4, 5, seed=1)
    made = refine_prototypes(old, new, torch.tensor([0, 2, 2, 0]), num_classes=4, on_missing="skip")
    assert made.classes.tolist() == [0, 2]
    loss = PrototypeLoss(made, scale=4.0)
    feat = random(3, 5, seed=2)
    expected = F.cross_entropy(4 * F.normalize(feat[:2]) @ made.weight.T, torch.tensor([1, 0]))
    assert_close(loss(feat, torch.tensor([2, 0, 3])), expected)
    with pytest.raises(ValueError, match="cannot replace"):
        loss.set_prototypes(refine_prototypes(old, new, torch.tensor([0, 1, 1, 0])))
    with pytest.raises(ValueError, match="cannot replace"):
        loss.set_prototypes(torch.ones(2, 6))
    with pytest.raises(ValueError, match="No known class"):
        PrototypeLoss(made, known_classes=torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="epochs is"):
        PrototypeRefresh(loss, nn.Identity(), list, old, epochs=(-1,))


# --------------------------------------------------------------------------------------------------- the objective

CLASSES = ("class-0", "class-1", "class-2")


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.randn(12, 3, 8, 8, generator=generator), "label": torch.arange(12) % 3}


def context(**changes: Any) -> SimpleBuildContext:
    torch.manual_seed(1)
    old = TrainedRun(
        path=Path("old"), encoder=TinyEncoder(5), objective_state={}, classes=("class-2", "x", "class-0"), recipe={}
    )
    return SimpleBuildContext(**{"classes": CLASSES, "runs": {"old": old}, "batches": [batch(8), batch(9)]} | changes)


def build(given: BuildContext, **settings: Any) -> UniBCTObjective:
    torch.manual_seed(0)
    return UniBCTObjective.build(UniBCTConfig(old_run="old", measure=False, **settings), TinyEncoder(8), given)


class TestContract(ObjectiveContract):
    name = "compat:unibct"
    config = {"old_run": "old", "measure": False, "refresh_epochs": [0], "classifier": "arcface"}

    def make_context(self) -> BuildContext:
        return context()


def test_prototypes_take_part_from_the_first_refresh_on_and_are_refined_by_the_encoder_of_that_time():
    given = context()
    objective = build(given, refresh_epochs=[2], prototype_weight=3.0, prototype_scale=8.0, lam=0.8).train()
    objective.on_epoch_start(1)
    out = objective(batch(0))
    assert out.parts["prototype"] == 0
    assert_close(out.total, out.parts["new"])
    objective.on_epoch_start(2)
    passes = [batch(8), batch(9)]
    old = torch.cat([given.load_run("old").encoder(b).pooled for b in passes])
    new = torch.cat([objective.encoder(b).pooled for b in passes])
    rows = refine_prototypes(old, new, torch.cat([b["label"] for b in passes]), lam=0.8).weight
    assert_close(objective.prototypes.prototypes, rows)
    embeddings = objective.encoder(batch(0)).pooled
    expected = F.cross_entropy(8 * F.normalize(embeddings[:, :5]) @ rows.T, batch(0)["label"])
    assert_close(objective(batch(0)).parts["prototype"], 3 * expected)
    assert not any("old_encoder" in name or name.startswith("_") for name in objective.state_dict())


@pytest.mark.parametrize(("steps", "expected"), [(35, {10, 20}), (14, {4, 8}), (3, {1, 2}), (1, {0, 1})])
def test_by_default_prototypes_are_refined_after_two_and_four_sevenths_of_all_steps(steps, expected):
    objective = build(context(total_steps=steps))
    refined = []
    objective._refresh.refresh = lambda: refined.append(step)
    for step in range(steps):
        objective.before_step(step)
        assert (objective(batch(0)).parts["prototype"] > 0) == (step >= min(expected))
    assert set(refined) == {step for step in expected if step < steps}
    assert UniBCTConfig().refresh_epochs is None
    assert UniBCTConfig(**mixbct()).refresh_epochs == [10, 20]


def test_a_resumed_run_goes_on_with_the_prototype_loss():
    objective = build(context(total_steps=35))
    objective.before_step(30)
    assert objective(batch(0)).parts["prototype"] > 0


def test_known_only_leaves_the_other_classes_out():
    objective = build(context(), known_only=True, refresh_epochs=[0], prototype_margin=0.3, prototype_scale=30.0)
    assert objective.prototypes.influence.old_labels(torch.arange(3)).tolist() == [0, -1, 1]
    assert objective(batch(0)).parts["prototype"] > 0


def test_recipes_that_ask_for_the_impossible_are_refused():
    with pytest.raises(RecipeError, match=r"set objective\.old_run"):
        UniBCTObjective.build(UniBCTConfig(), TinyEncoder(8), context())
    with pytest.raises(RecipeError, match="no classes"):
        build(context(classes=()))
    with pytest.raises(RecipeError, match="known_only = false"):
        build(context(classes=("a", "b", "c")), known_only=True)
    with pytest.raises(ValidationError, match="not both"):
        UniBCTConfig(old_run="a", old_encoder="b")
    with pytest.raises(ValidationError, match="counted from 0"):
        UniBCTConfig(refresh_epochs=[-1])
    assert UniBCTConfig(**mixbct()).prototype_scale == 1.0
    assert UniBCTConfig(**advbct()).known_only


@pytest.fixture
def small() -> Iterator[None]:
    get_registry().register_module("small", small_upgrade)
    yield
    get_registry().unregister("small")


def test_a_trained_encoder_searches_an_old_gallery_with_classes_the_old_model_never_saw(small, tmp_path):
    old_run = small_upgrade.run(tmp_path / "old", 'use = "core:softmax"', split="old")
    objective = f'use = "compat:unibct"\nold_run = "{old_run}"\nrefresh_epochs = [3, 6]'
    out = small_upgrade.run(tmp_path / "unibct", objective, split="all", seed=2)
    free = small_upgrade.run(tmp_path / "free", 'use = "core:softmax"', split="all", seed=1)
    old, new, other = (load_encoder(path, device="cpu") for path in (old_run, out, free))
    data = small_upgrade.Patterns.build(None, "all")
    images, labels = [data[i]["image"] for i in range(len(data))], np.array(data.labels())
    o, n, f = (encoder.encode(images) for encoder in (old, new, other))
    relevant = Relevance.from_labels(labels, labels, exclude_self=True)

    def mean_ap(queries: np.ndarray) -> float:
        return float(average_precision(RankedList.from_scores(queries @ o.T), relevant))

    assert mean_ap(n) > mean_ap(f) + 0.1, "a free encoder cannot search the old gallery"
    (relation,) = new.spec.relations
    assert (relation["kind"], relation["to"]) == ("compatible", old.fingerprint)
    assert relation["evidence"]["method"] == "compat:unibct"
    assert relation["evidence"]["map_new_old"] == pytest.approx(mean_ap(n), abs=1e-3)
