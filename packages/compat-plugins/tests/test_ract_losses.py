"""The parts of regression-alleviating compatible training: golden numbers, and what must hold for any numbers."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from bowerbird.retrieval.index import ExactIndex
from bowerbird_compat import ract
from bowerbird_compat.ract import (
    BackfillState,
    ClassLevelCompatibleLoss,
    CompatibleContrastiveLoss,
    CompatibleTripletLoss,
    backfill_order,
)

TIGHT = {"rtol": 1e-9, "atol": 1e-10}
SEEDS = st.integers(0, 2**31 - 1)
invariant = settings(max_examples=25, deadline=None)


def random(*shape: int, seed: int, grad: bool = False) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.requires_grad_(grad)


def some_labels(size: int, seed: int, classes: int = 3) -> Tensor:
    """At least two different ones."""
    drawn = torch.randint(classes, (size,), generator=torch.Generator().manual_seed(seed))
    drawn[:2] = torch.tensor([0, 1])
    return drawn


def losses(**settings: bool) -> list[CompatibleContrastiveLoss | CompatibleTripletLoss]:
    return [
        CompatibleContrastiveLoss(0.1, topk=None, reduction="none", **settings),
        CompatibleContrastiveLoss(0.1, topk=2, reduction="none", **settings),
        CompatibleTripletLoss(0.8, topk=2, reduction="none", **settings),
    ]


# --------------------------------------------------------------------------------------------------- golden numbers


@pytest.mark.parametrize("case", ["pairwise_losses_tau001_all", "pairwise_losses_tau005_top3"])
@pytest.mark.parametrize("form", ["contra", "contra_ract", "triplet", "triplet_ract"])
@pytest.mark.parametrize("keys", ["gathered", "local"])
def test_pairwise_losses_and_gradients_are_those_of_opencompatible(golden, case, form, keys):
    g = golden(f"ract/{case}")
    settings = {"new_to_new": "ract" in form, "gather": keys == "gathered", "weight": float(g["loss_weight"])}
    if form.startswith("contra"):
        module = CompatibleContrastiveLoss(float(g["temperature"]), int(g["topk_neg"]), **settings)
    else:
        module = CompatibleTripletLoss(float(g["triplet_margin"]), int(g["triplet_topk_neg"]), **settings)
    new, old = g["feat_new"].requires_grad_(), g["feat_old"].requires_grad_()
    loss = module(new, old, g["labels"])
    loss.backward()
    assert_close(loss, g[f"{form}__{keys}__loss"], **TIGHT)
    assert_close(new.grad, g[f"{form}__{keys}__grad_feat_new"], **TIGHT)
    assert old.grad is None


@pytest.mark.parametrize("form", ["bct", "bct_ract"])
def test_class_level_losses_and_gradients_are_those_of_opencompatible(golden, form):
    g = golden("ract/class_level_losses")
    new, w_new = g["feat_new"].requires_grad_(), g["W_new"].requires_grad_()
    term = ClassLevelCompatibleLoss(g["W_old"], new_to_new=form == "bct_ract")(new, g["labels"], w_new)
    base = F.cross_entropy(F.linear(new, w_new), g["labels"])
    (base + term).backward()
    assert_close(term, g[f"{form}__comp_loss"], **TIGHT)
    assert_close(base + term, g[f"{form}__total"], **TIGHT)
    assert_close(new.grad, g[f"{form}__grad_feat"], **TIGHT)
    assert_close(w_new.grad, g[f"{form}__grad_W_new"], **TIGHT)


@pytest.mark.parametrize("strategy", ["entropy", "least_confidence", "margin"])
def test_orders_are_those_of_the_reference(golden, strategy):
    g = golden("ract/backfill_order")
    order = backfill_order(g["gallery_old"], g["class_centers"], strategy, float(g["temperature"]))
    assert torch.equal(order, g[f"order_{strategy}"])


# ------------------------------------------------------------------------------------------------------- invariants


@invariant
@given(seed=SEEDS, topk=st.sampled_from([None, 1, 3, 50]))
def test_new_negatives_never_lower_the_loss_and_raise_it_where_there_are_any(seed, topk):
    new, old, labels = random(7, 5, seed=seed), random(7, 5, seed=seed + 1), some_labels(7, seed)
    baseline = CompatibleContrastiveLoss(0.5, topk, new_to_new=False, reduction="none")(new, old, labels)
    with_new = CompatibleContrastiveLoss(0.5, topk, reduction="none")(new, old, labels)
    assert (with_new > baseline).all()


@pytest.mark.parametrize("module", [CompatibleContrastiveLoss(), CompatibleTripletLoss()])
@pytest.mark.parametrize("size", [0, 1, 5])
def test_a_batch_without_negatives_costs_nothing_and_is_reported_once(module, size):
    module._warned = False
    new, labels = random(size, 4, seed=0, grad=True), torch.full((size,), 2)
    with pytest.warns(UserWarning, match="no two different labels"):
        loss = module(new, random(size, 4, seed=1), labels)
    loss.backward()
    assert loss == 0
    assert torch.equal(new.grad, torch.zeros_like(new))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(new, random(size, 4, seed=1), labels)


@invariant
@given(seed=SEEDS, new_to_new=st.booleans())
def test_lengths_mean_nothing_and_gradients_are_tangential(seed, new_to_new):
    old, labels = random(7, 5, seed=seed + 1), some_labels(7, seed)
    factors = random(2, 7, 1, seed=seed + 2).exp()
    for module in losses(new_to_new=new_to_new):
        new = random(7, 5, seed=seed, grad=True)
        loss = module(new, old, labels)
        loss.sum().backward()
        assert_close(module(new * factors[0], old * factors[1], labels), loss, **TIGHT)
        assert_close((new.grad * new.detach()).sum(dim=1), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-9)


@invariant
@given(seed=SEEDS, new_to_new=st.booleans())
def test_the_order_of_the_batch_and_the_names_of_classes_mean_nothing(seed, new_to_new):
    new, old, labels = random(7, 5, seed=seed), random(7, 5, seed=seed + 1), some_labels(7, seed)
    shuffle = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    renamed = torch.tensor([40, 7, 11])[labels]
    for module in losses(new_to_new=new_to_new):
        each = module(new, old, labels)
        assert_close(module(new[shuffle], old[shuffle], labels[shuffle]), each[shuffle], **TIGHT)
        assert torch.equal(module(new, old, renamed), each)


@invariant
@given(seed=SEEDS, new_to_new=st.booleans())
def test_a_further_sample_of_the_same_class_leaves_a_term_alone(seed, new_to_new):
    new, old, labels = random(8, 5, seed=seed), random(8, 5, seed=seed + 1), some_labels(8, seed)
    same = labels[:7] == labels[7]
    for module in losses(new_to_new=new_to_new):
        before, after = module(new[:7], old[:7], labels[:7]), module(new, old, labels)[:7]
        assert_close(after[same], before[same], **TIGHT)


@invariant
@given(seed=SEEDS)
def test_with_the_old_encoder_as_the_new_one_every_negative_counts_twice(seed):
    vectors, labels = random(7, 5, seed=seed), some_labels(7, seed)
    cosine = F.normalize(vectors) @ F.normalize(vectors).T / 0.2
    negatives = cosine.exp().masked_fill(labels.unsqueeze(1) == labels, 0).sum(dim=1)
    expected = -torch.log(math.exp(5) / (math.exp(5) + 2 * negatives))
    each = CompatibleContrastiveLoss(0.2, None, reduction="none")(vectors, vectors, labels)
    assert_close(each, expected, **TIGHT)


@invariant
@given(seed=SEEDS)
def test_a_temperature_near_zero_gives_the_hardest_violation(seed):
    new, old, labels = random(7, 5, seed=seed), random(7, 5, seed=seed + 1), some_labels(7, seed)
    u, o = F.normalize(new), F.normalize(old)
    both = torch.stack([u @ o.T, u @ u.T]).masked_fill(labels.unsqueeze(1) == labels, -math.inf)
    violation = (both.amax(dim=(0, 2)) - (u * o).sum(dim=1)).clamp(min=0)
    tau = 1e-7
    assert_close(tau * CompatibleContrastiveLoss(tau, reduction="none")(new, old, labels), violation, rtol=0, atol=1e-5)


@invariant
@given(seed=SEEDS, topk=st.integers(7, 40))
def test_as_many_hard_negatives_as_there_are_negatives_are_all_of_them(seed, topk):
    new, old, labels = random(7, 5, seed=seed), random(7, 5, seed=seed + 1), some_labels(7, seed)
    every = CompatibleContrastiveLoss(0.1, None)(new, old, labels)
    for module in (CompatibleContrastiveLoss(0.1, topk), CompatibleContrastiveLoss(0.1, 0)):
        assert_close(module(new, old, labels), every, **TIGHT)
    most = int((labels.unsqueeze(1) != labels).sum(dim=1).max())
    assert_close(CompatibleContrastiveLoss(0.1, most)(new, old, labels), every, **TIGHT)
    triplets = [CompatibleTripletLoss(0.8, k)(new, old, labels) for k in (None, -1, topk)]
    assert_close(triplets[0], triplets[1], **TIGHT)
    assert_close(triplets[0], triplets[2], **TIGHT)


@pytest.mark.parametrize("new_to_new", [True, False])
def test_detached_keys_change_gradients_only_and_only_where_new_vectors_are_keys(new_to_new):
    old, labels = random(7, 5, seed=1), some_labels(7, 2)
    for make in (CompatibleContrastiveLoss, CompatibleTripletLoss):
        outcomes = []
        for detach in (False, True):
            new = random(7, 5, seed=0, grad=True)
            loss = make(new_to_new=new_to_new, detach_keys=detach)(new, old, labels)
            loss.backward()
            outcomes.append((loss.detach(), new.grad))
        assert torch.equal(outcomes[0][0], outcomes[1][0])
        assert torch.allclose(outcomes[0][1], outcomes[1][1]) is not new_to_new


def test_the_weight_is_a_factor_and_half_precision_is_computed_in_single():
    new, old, labels = random(7, 5, seed=0).float(), random(7, 5, seed=1).float(), some_labels(7, 2)
    one = CompatibleContrastiveLoss()(new, old, labels)
    assert_close(CompatibleContrastiveLoss(weight=0.3)(new, old, labels), 0.3 * one)
    assert CompatibleContrastiveLoss(weight=0.0)(new, old, labels) == 0
    half = CompatibleContrastiveLoss()(new.bfloat16(), old.bfloat16(), labels)
    assert_close(half, CompatibleContrastiveLoss()(new.bfloat16().float(), old.bfloat16().float(), labels))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(CompatibleContrastiveLoss()(new, old, labels), one)


def test_a_distance_of_zero_has_a_finite_gradient():
    new = random(6, 5, seed=0)
    moving = new.clone().requires_grad_()
    CompatibleTripletLoss(topk=None)(moving, new, some_labels(6, 1)).backward()
    assert torch.isfinite(moving.grad).all()


def test_the_class_level_form_trains_the_new_classifier_and_never_the_old_one():
    old, w_new = random(4, 5, seed=0), random(4, 5, seed=1, grad=True)
    module = ClassLevelCompatibleLoss(old, weight=2.0)
    labels = some_labels(6, 3)
    loss = module(random(6, 5, seed=2), labels, w_new)
    loss.backward()
    assert w_new.grad.abs().sum() > 0
    assert list(module.parameters()) == []
    assert "old_classifier" in module.state_dict()
    baseline = ClassLevelCompatibleLoss(old, new_to_new=False)(random(6, 5, seed=2), labels)
    assert loss / 2 > baseline
    assert_close(baseline, F.cross_entropy(random(6, 5, seed=2) @ old.T, labels), **TIGHT)


# ------------------------------------------------------------------------------------------------ several processes

HALF = """
import sys, torch
from bowerbird_compat.ract import CompatibleContrastiveLoss
folder, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
given = torch.load(f"{folder}/batch.pt", weights_only=True)
for detach in (True, False):
    new, old, labels = (part[4 * rank : 4 * rank + 4].clone() for part in given)
    new.requires_grad_()
    loss = CompatibleContrastiveLoss(0.1, topk=3, gather=True, detach_keys=detach)(new, old, labels)
    loss.backward()
    torch.save({"loss": loss.detach(), "grad": new.grad}, f"{folder}/{rank}-{detach}.pt")
torch.distributed.barrier()  # no process may leave while the other still talks to it
torch.distributed.destroy_process_group()
"""


def test_two_processes_together_have_the_loss_and_gradient_of_their_joined_batch(tmp_path):
    torch.save([random(8, 5, seed=0), random(8, 5, seed=1), some_labels(8, 2)], tmp_path / "batch.pt")
    halves = [subprocess.Popen([sys.executable, "-c", HALF, str(tmp_path), str(rank)]) for rank in range(2)]
    assert [half.wait(timeout=120) for half in halves] == [0, 0]
    for detach in (True, False):
        new = random(8, 5, seed=0, grad=True)
        loss = CompatibleContrastiveLoss(0.1, topk=3, detach_keys=detach)(new, random(8, 5, seed=1), some_labels(8, 2))
        loss.backward()
        parts = [torch.load(tmp_path / f"{rank}-{detach}.pt", weights_only=True) for rank in range(2)]
        assert_close(sum(p["loss"] for p in parts) / 2, loss.detach(), **TIGHT)
        assert_close(torch.cat([p["grad"] for p in parts]) / 2, new.grad, **TIGHT)


# ------------------------------------------------------------------------------------------------------- backfilling


def test_equal_probabilities_are_the_most_uncertain_and_a_sure_item_comes_last():
    centers = torch.eye(3, dtype=torch.float64)
    gallery = torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 1, 0], [2, 2, 2], [1, 1, 0]], dtype=torch.float64)
    for strategy in ("entropy", "least_confidence"):
        assert backfill_order(gallery, centers, strategy, 0.1).tolist() == [1, 3, 4, 0, 2]
    # By margin a tie of two classes is as uncertain as a tie of all; equals stay in order of index.
    assert backfill_order(gallery, centers, "margin", 0.1).tolist() == [1, 3, 4, 0, 2]


@invariant
@given(
    seed=SEEDS, size=st.integers(0, 20), strategy=st.sampled_from(["entropy", "least_confidence", "margin", "random"])
)
def test_an_order_is_a_permutation_that_its_seed_repeats(seed, size, strategy):
    gallery, centers = random(size, 4, seed=seed), random(3, 4, seed=seed + 1)
    orders = [backfill_order(gallery, centers, strategy, 0.1, torch.Generator().manual_seed(seed)) for _ in range(2)]
    assert orders[0].dtype == torch.int64
    assert orders[0].sort().values.tolist() == list(range(size))
    assert torch.equal(*orders)


@invariant
@given(seed=SEEDS)
def test_serving_begins_with_the_cross_test_and_ends_with_the_self_test_bit_for_bit(seed):
    old, new, queries = (random(12, 5, seed=seed + i).float() for i in range(3))
    state = BackfillState(backfill_order(old, None, "random", generator=torch.Generator().manual_seed(seed)))

    def served(gallery: Tensor) -> tuple[np.ndarray, np.ndarray]:
        index = ExactIndex()
        index.add(np.arange(12), gallery.numpy())
        hits = index.search(queries.numpy(), 12)
        return hits.ids, hits.distances

    def same(one: Tensor, other: Tensor) -> bool:
        return all(np.array_equal(a, b) for a, b in zip(served(one), served(other), strict=True))

    assert same(state.vectors(old, new), old)
    moved: set[int] = set()
    while state.done < 12:
        before = state.vectors(old, new)
        state.advance(5)
        now = state.vectors(old, new)
        is_new = {i for i in range(12) if torch.equal(now[i], new[i])}
        assert moved < is_new, "parts are nested"
        assert is_new == set(state.order[: state.done].tolist())
        assert all(torch.equal(now[i], before[i]) for i in range(12) if i not in is_new - moved)
        moved = is_new
    assert state.fraction == 1.0
    assert same(state.vectors(old, new), new)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("make", [CompatibleContrastiveLoss, CompatibleTripletLoss])
def test_inputs_that_do_not_fit_are_refused(make):
    new, old, labels = random(4, 5, seed=0), random(4, 5, seed=1), torch.tensor([0, 1, 0, 1])
    with pytest.raises(ValueError, match=r"\(4, 5\) and old ones \(4, 6\).*size of the old one"):
        make()(new, random(4, 6, seed=1), labels)
    for what, pair in (("New", (new, old)), ("Old", (old, new))):
        bad = pair[0].clone()
        bad[2, 1] = math.nan
        with pytest.raises(ValueError, match=f"{what} embeddings: row 2 is not finite"):
            make()(*((bad, pair[1]) if what == "New" else (pair[1], bad)), labels)
    with pytest.raises(TypeError, match="integers"):
        make()(new, old, labels.double())
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        make()(new, old, labels[:3])
    with pytest.raises(ValueError, match="weight is -1"):
        make(weight=-1.0)
    with pytest.raises(ValueError, match="accepted: mean, none"):
        make(reduction="sum")


def test_settings_out_of_range_are_refused():
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature is"):
            CompatibleContrastiveLoss(temperature)
    with pytest.raises(ValueError, match=r"margin is -0\.1"):
        CompatibleTripletLoss(-0.1)
    with pytest.raises(ValueError, match="finite matrix"):
        ClassLevelCompatibleLoss(torch.ones(3))
    module = ClassLevelCompatibleLoss(torch.ones(3, 5, dtype=torch.float64))
    new = random(2, 5, seed=0)
    with pytest.raises(ValueError, match="the same classes"):
        module(new, torch.tensor([0, 1]), torch.ones(4, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"0\.\.3; 3 classes"):
        module(new, torch.tensor([0, 3]), torch.ones(3, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"needs \(batch, 5\)"):
        module(random(2, 4, seed=0), torch.tensor([0, 1]))


def test_orders_and_states_that_make_no_sense_are_refused():
    gallery, centers = random(4, 3, seed=0), random(2, 3, seed=1)
    with pytest.raises(ValueError, match=r"entropyy.*entropy"):
        backfill_order(gallery, centers, "entropyy")
    with pytest.raises(ValueError, match="temperature"):
        backfill_order(gallery, centers, temperature=0.0)
    with pytest.raises(ValueError, match="needs class centres"):
        backfill_order(gallery, None)
    bad = gallery.clone()
    bad[3, 0] = math.nan
    with pytest.raises(ValueError, match="row 3"):
        backfill_order(bad, centers)
    with pytest.raises(ValueError, match="permutation"):
        BackfillState(torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match=r"done is 4; it must be in 0\.\.3"):
        BackfillState(torch.arange(3), 4)
    with pytest.raises(ValueError, match="does not go back"):
        BackfillState(torch.arange(3)).advance(-1)
    with pytest.raises(ValueError, match=r"must both be \(3, D\)"):
        BackfillState(torch.arange(3)).vectors(random(3, 4, seed=0), random(3, 5, seed=0))


def test_the_module_names_what_it_offers():
    assert all(hasattr(ract, name) for name in ract.__all__)


def test_a_miner_of_pytorch_metric_learning_chooses_the_negatives():
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    new, old, labels = random(8, 5, seed=1), random(8, 5, seed=2), torch.arange(8) % 3
    whole = CompatibleContrastiveLoss(0.1, topk=None)(new, old, labels)
    mined = CompatibleContrastiveLoss(0.1, topk=None, miner=miners.BatchEasyHardMiner("all", "all"))
    assert_close(mined(new, old, labels), whole)
    hardest = CompatibleContrastiveLoss(0.1, topk=None, miner=miners.BatchHardMiner())(new, old, labels)
    assert_close(hardest, CompatibleContrastiveLoss(0.1, topk=1)(new, old, labels))
    nearest = CompatibleTripletLoss(topk=1, miner=miners.BatchHardMiner())(new, old, labels)
    assert_close(nearest, CompatibleTripletLoss(topk=1)(new, old, labels))


def test_the_contrastive_loss_is_ntxent_of_pytorch_metric_learning_on_explicit_pairs():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    new, old, labels = random(7, 5, seed=1), random(7, 5, seed=2), torch.arange(7) % 3
    own = torch.arange(7)
    a, n = (labels[:, None] != labels).nonzero(as_tuple=True)
    theirs = losses.NTXentLoss(temperature=0.1)
    contra = theirs(new, labels, (own, own, a, n), old, labels)
    assert_close(CompatibleContrastiveLoss(0.1, topk=None, new_to_new=False)(new, old, labels), contra)
    both, twice = torch.cat([old, new]), torch.cat([labels, labels])
    ract = theirs(new, labels, (own, own, torch.cat([a, a]), torch.cat([n, n + 7])), both, twice)
    assert_close(CompatibleContrastiveLoss(0.1, topk=None)(new, old, labels), ract)
