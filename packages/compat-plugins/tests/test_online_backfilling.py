"""Online backfilling: rank merge, mixed gallery, reverse transform, metric-compatible losses, the resumable loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from bowerbird.errors import DataError, IntegrityError
from bowerbird.retrieval.index import ExactIndex
from bowerbird_compat.online_backfilling import (
    MetricCompatibleLoss,
    MixedGallery,
    Progress,
    ReverseQueryTransform,
    TopK,
    backfill,
    fit_metric_compatible,
    fit_reverse_transform,
)

TIGHT = {"rtol": 1e-9, "atol": 1e-10}
SEEDS = st.integers(0, 2**31 - 1)
invariant = settings(max_examples=20, deadline=None)


def index_of(vectors, ids=None) -> ExactIndex:
    index = ExactIndex()
    index.add(np.arange(len(vectors)) if ids is None else ids, vectors)
    return index


def normals(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def system(seed, items=14, queries=5, d_old=4, d_new=6):
    """Old and new gallery vectors, old and new query vectors."""
    rng = np.random.default_rng(seed)
    return (
        normals(rng, items, d_old),
        normals(rng, items, d_new),
        normals(rng, queries, d_old),
        normals(rng, queries, d_new),
    )


def mixed(g_old, g_new, moved):
    gallery = MixedGallery(index_of(g_old), ExactIndex())
    if len(moved):
        gallery.move(moved, g_new[moved])
    return gallery


# --------------------------------------------------------------------------------------------------- golden numbers


@pytest.mark.parametrize("case", ["drm", "rqt"])
def test_merged_rankings_at_every_fraction_are_the_golden_ones(golden, case):
    g = {key: value.numpy() for key, value in golden("online-backfilling/distance_rank_merge").items()}
    psi = ReverseQueryTransform(7, 6).double()
    psi.load_state_dict({"linear.weight": torch.tensor(g["rqt_weight"]), "linear.bias": torch.tensor(g["rqt_bias"])})
    reverse = psi(torch.tensor(g["query_new"])).detach()
    assert_close(reverse, torch.tensor(g["query_reverse"]), **TIGHT)
    q_old = g["query_old"] if case == "drm" else reverse.numpy()
    for row, beta in enumerate(g["betas"]):
        moved = g["order"][: int(np.floor(beta * 12 + 1e-9))]
        hits = mixed(g["gallery_old"], g["gallery_new"], moved).search(q_old, g["query_new"], 12)
        assert np.array_equal(hits.ids, g[f"merged_rank_{case}"][row])
        is_new = np.isin(hits.ids, moved)
        side = g["distance_old"] if case == "drm" else g["distance_reverse"]
        expected = np.where(
            is_new, np.take_along_axis(g["distance_new"], hits.ids, 1), np.take_along_axis(side, hits.ids, 1)
        )
        assert np.allclose(hits.distances, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["frozen", "joint"])
@pytest.mark.parametrize("name", ["mcl", "cl"])
def test_loss_terms_and_gradients_are_the_golden_ones(golden, case, name):
    g = golden("online-backfilling/metric_compatible_losses")
    w, v = g["rqt_weight"].requires_grad_(), g["rho_weight"].requires_grad_()
    new = g["feat_new"] if case == "frozen" else g["feat_new"] @ v.T
    loss = MetricCompatibleLoss(float(g["temperature"]), name == "mcl", include_new_side=case == "joint")
    terms = loss(new @ w.T, g["feat_old"], new, g["labels"])
    expected = {"rqt_cos", f"{name}_old", "total"} | ({f"{name}_new"} if case == "joint" else set())
    assert terms.keys() == expected
    for key in expected - {"total"}:
        assert_close(terms[key], g[f"{case}__{key}"], **TIGHT)
    if name == "mcl":
        assert_close(terms["total"], g[f"{case}__total"], **TIGHT)
        terms["total"].backward()
        assert_close(w.grad, g[f"{case}__grad_W"], **TIGHT)
        if case == "joint":
            assert_close(v.grad, g["joint__grad_V"], **TIGHT)


# ----------------------------------------------------------------------------------------------- merge and gallery


@invariant
@given(seed=SEEDS, k=st.integers(1, 20))
def test_rank_merge_starts_at_the_old_and_ends_at_the_new_ranking_element_for_element(seed, k):
    g_old, g_new, q_old, q_new = system(seed)
    start = mixed(g_old, g_new, []).search(q_old, q_new, k)
    end = mixed(g_old, g_new, np.arange(14)).search(q_old, q_new, k)
    for hits, reference in ((start, index_of(g_old).search(q_old, k)), (end, index_of(g_new).search(q_new, k))):
        assert np.array_equal(hits.ids, reference.ids)
        assert np.array_equal(hits.distances, reference.distances)


@invariant
@given(seed=SEEDS, moved=st.integers(0, 14))
def test_merging_never_reorders_within_a_side_and_the_first_k_are_those_of_the_full_merge(seed, moved):
    g_old, g_new, q_old, q_new = system(seed)
    ids = np.random.default_rng(seed).permutation(14)[:moved]
    gallery = mixed(g_old, g_new, ids)
    full = gallery.search(q_old, q_new, 14)
    for query in range(5):
        for part, reference in ((np.isin(full.ids[query], ids), gallery.new.search(q_new, 14)),):
            assert full.ids[query][part].tolist() == [i for i in reference.ids[query] if i >= 0]
        old = gallery.old.search(q_old, 14).ids[query]
        assert full.ids[query][~np.isin(full.ids[query], ids)].tolist() == [i for i in old if i >= 0]
    for k in (1, 3, 7):
        assert np.array_equal(gallery.search(q_old, q_new, k).ids, full.ids[:, :k])


@invariant
@given(seed=SEEDS, moved=st.integers(0, 14))
def test_with_identical_encoders_every_fraction_gives_the_same_ranking(seed, moved):
    g_old, _, q_old, _ = system(seed)
    ids = np.random.default_rng(seed).permutation(14)[:moved]
    hits = mixed(g_old, g_old, ids).search(q_old, q_old, 14)
    assert np.array_equal(hits.ids, index_of(g_old).search(q_old, 14).ids)


@invariant
@given(seed=SEEDS)
def test_only_the_set_of_moved_items_matters_and_not_their_order(seed):
    g_old, g_new, q_old, q_new = system(seed)
    ids = np.random.default_rng(seed).permutation(14)[:8]
    at_once = mixed(g_old, g_new, ids)
    one_by_one = mixed(g_old, g_new, [])
    for i in ids[::-1]:
        one_by_one.move([i], g_new[[i]])
    for gallery in (at_once, one_by_one):
        gallery.verify(np.arange(14))
        assert gallery.progress == 8 / 14
    a, b = at_once.search(q_old, q_new, 14), one_by_one.search(q_old, q_new, 14)
    assert np.array_equal(a.ids, b.ids)
    assert np.array_equal(a.distances, b.distances)


@invariant
@given(seed=SEEDS, old_scale=st.floats(0.01, 100), new_scale=st.floats(0.01, 100))
def test_positive_factors_on_the_vectors_of_an_encoder_change_nothing(seed, old_scale, new_scale):
    g_old, g_new, q_old, q_new = system(seed)
    plain = mixed(g_old, g_new, np.arange(7)).search(q_old, q_new, 14)
    scaled = mixed(g_old * old_scale, g_new * new_scale, np.arange(7)).search(q_old * old_scale, q_new * new_scale, 14)
    assert np.array_equal(plain.ids, scaled.ids)
    assert np.allclose(plain.distances, scaled.distances, atol=1e-6)


def test_with_perfect_separation_every_fraction_has_an_average_precision_of_one():
    rng = np.random.default_rng(0)
    labels, query_labels = np.repeat(np.arange(3), 5), np.arange(3)
    noise = lambda n, d: 0.05 * rng.standard_normal((n, d)).astype(np.float32)  # noqa: E731
    old_centres, new_centres = np.eye(3, 4, dtype=np.float32), np.eye(3, 6, dtype=np.float32)[::-1]
    g_old, g_new = old_centres[labels] + noise(15, 4), new_centres[labels] + noise(15, 6)
    q_old, q_new = old_centres + noise(3, 4), new_centres + noise(3, 6)
    for moved in range(16):
        hits = mixed(g_old, g_new, rng.permutation(15)[:moved]).search(q_old, q_new, 15)
        assert (labels[hits.ids[:, :5]] == query_labels[:, None]).all(), moved


def test_moving_nothing_changes_nothing():
    g_old, g_new, *_ = system(2)
    gallery = mixed(g_old, g_new, [3])
    gallery.move([], [])
    gallery.move(np.empty(0, np.int64), g_new[:0])
    assert gallery.progress == 1 / 14


def test_a_moved_item_can_be_moved_again_and_then_has_the_later_vector():
    g_old, g_new, q_old, q_new = system(3)
    gallery = mixed(g_old, -g_new, [2, 5])
    gallery.move([5, 7], g_new[[5, 7]])
    gallery.move([2], g_new[[2]])
    expected = mixed(g_old, g_new, [2, 5, 7])
    assert np.array_equal(gallery.search(q_old, q_new, 14).ids, expected.search(q_old, q_new, 14).ids)
    assert len(gallery) == 14


def test_a_single_query_gives_a_single_list():
    g_old, g_new, q_old, q_new = system(4)
    gallery = mixed(g_old, g_new, [1, 2])
    assert np.array_equal(gallery.search(q_old[0], q_new[0], 5).ids, gallery.search(q_old, q_new, 5).ids[0])


def test_the_output_of_a_transform_is_a_query_as_it_comes():
    g_old, g_new, _, q_new = system(4)
    gallery, psi = mixed(g_old, g_new, [1, 2]), ReverseQueryTransform(6, 4)
    reverse = psi(torch.tensor(q_new))
    assert reverse.requires_grad
    assert np.array_equal(gallery.search(reverse, q_new, 5).ids, gallery.search(reverse.detach().numpy(), q_new, 5).ids)


def test_items_in_both_or_neither_part_are_listed_and_nothing_moves():
    g_old, g_new, *_ = system(5)
    with pytest.raises(IntegrityError, match="2 items are in both parts of the gallery: 3, 9"):
        MixedGallery(index_of(g_old), index_of(g_new[:3], ids=[3, 9, 40]))
    gallery = mixed(g_old, g_new, [1])
    with pytest.raises(IntegrityError, match="2 items are in neither part of the gallery: 77, 99"):
        gallery.move([2, 77, 99], g_new[:3])
    with pytest.raises(ValueError, match=r"1 dimensions|6"):
        gallery.move([1, 2], g_new[:2, :3])
    with pytest.raises(ValueError, match="one vector each"):
        gallery.move([2, 2], g_new[:2])
    gallery.verify(np.arange(14))
    assert gallery.progress == 1 / 14
    with pytest.raises(IntegrityError, match="in neither part of the gallery: 14"):
        gallery.verify([13, 14])
    gallery.old.add([1], g_old[[1]])
    with pytest.raises(IntegrityError, match="in both parts of the gallery: 1"):
        gallery.verify(np.arange(14))


def test_indexes_of_different_kinds_of_distance_are_refused():
    class Euclidean(ExactIndex):
        metric = "l2"

    with pytest.raises(ValueError, match="cosine and the new one l2"):
        MixedGallery(ExactIndex(), Euclidean())


# ------------------------------------------------------------------------------------------------- losses, transform


def batch(seed, size=10, d_old=4, d_new=5, classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    make = lambda d: torch.randn(size, d, generator=generator, dtype=dtype)  # noqa: E731
    return make(d_old), make(d_old), make(d_new), torch.randint(classes, (size,), generator=generator)


@invariant
@given(seed=SEEDS, classes=st.integers(1, 5), tau=st.floats(0.02, 2))
def test_other_systems_negatives_only_add_to_the_loss_and_nothing_without_negatives(seed, classes, tau):
    reverse, old, new, labels = batch(seed, classes=classes)
    crossed = MetricCompatibleLoss(tau, True, True)(reverse, old, new, labels)
    single = MetricCompatibleLoss(tau, False, True)(reverse, old, new, labels)
    for side in ("old", "new"):
        if labels.unique().numel() == 1:
            assert_close(crossed[f"mcl_{side}"], single[f"cl_{side}"], rtol=0, atol=1e-12)
        elif crossed[f"mcl_{side}"] != 0:
            assert crossed[f"mcl_{side}"] >= single[f"cl_{side}"]


def test_negatives_of_the_other_system_make_the_loss_strictly_larger():
    reverse, old, new, labels = batch(1)
    crossed = MetricCompatibleLoss(0.5, True, True)(reverse, old, new, labels)
    single = MetricCompatibleLoss(0.5, False, True)(reverse, old, new, labels)
    assert crossed["mcl_old"] > single["cl_old"] + 1e-3
    assert crossed["mcl_new"] > single["cl_new"] + 1e-3


def test_frozen_training_moves_only_the_transform():
    _, old, new, labels = batch(0)
    old.requires_grad_()
    new.requires_grad_()
    psi = ReverseQueryTransform(5, 4).double()
    MetricCompatibleLoss()(psi(new.detach()), old, new, labels)["total"].backward()
    assert old.grad is None and new.grad is None
    assert psi.linear.weight.grad.abs().sum() > 0
    MetricCompatibleLoss(include_new_side=True)(psi(new.detach()), old, new, labels)["total"].backward()
    assert old.grad is None
    assert new.grad.abs().sum() > 0


@invariant
@given(seed=SEEDS)
def test_the_loss_ignores_the_order_of_the_batch_and_the_names_of_classes(seed):
    reverse, old, new, labels = batch(seed)
    loss = MetricCompatibleLoss(include_new_side=True)
    before = loss(reverse, old, new, labels)
    p = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    after = loss(reverse[p], old[p], new[p], torch.tensor([17, 4, 900])[labels][p])
    for key in before:
        assert_close(before[key], after[key], **TIGHT)


@invariant
@given(seed=SEEDS, tau=st.sampled_from([0.1, 0.5]), cross=st.booleans())
def test_terms_are_the_written_out_sums(seed, tau, cross):
    reverse, old, new, labels = batch(seed, size=7)
    s_old = torch.exp(-(1 - F.normalize(reverse) @ F.normalize(old).T) / tau)
    s_new = torch.exp(-(1 - F.normalize(new) @ F.normalize(new).T) / tau)
    same = (labels[:, None] == labels).double()
    partner = same - torch.eye(7, dtype=torch.float64)
    negative = 1 - same

    def term(own, other, positive):
        p = (own * positive).sum(1)
        total = p + (own * negative).sum(1) + cross * (other * negative).sum(1)
        rows = positive.sum(1) > 0
        return -(p / total)[rows].log().mean() if rows.any() else torch.zeros((), dtype=torch.float64)

    terms = MetricCompatibleLoss(tau, cross, True, weights=(2.0, 3.0, 5.0))(reverse, old, new, labels)
    name = "mcl" if cross else "cl"
    assert_close(terms[f"{name}_old"], term(s_old, s_new, same), **TIGHT)
    assert_close(terms[f"{name}_new"], term(s_new, s_old, partner), **TIGHT)
    expected = 2 * terms["rqt_cos"] + 3 * terms[f"{name}_old"] + 5 * terms[f"{name}_new"]
    assert_close(terms["total"], expected, **TIGHT)


def test_mining_keeps_the_nearest_negatives_of_each_system():
    reverse, old, new, labels = batch(2)
    every = MetricCompatibleLoss()(reverse, old, new, labels)["mcl_old"]
    losses = [MetricCompatibleLoss(mining=TopK(k))(reverse, old, new, labels)["mcl_old"] for k in range(1, 11)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(losses))
    assert losses[0] < every
    assert_close(losses[-1], every, **TIGHT)
    cos = F.normalize(reverse) @ F.normalize(old).T
    cos_new = F.normalize(new) @ F.normalize(new).T
    same = labels[:, None] == labels
    hardest = [c.masked_fill(same, -2).amax(1) / 0.1 for c in (cos, cos_new)]
    positive = (cos / 0.1).exp().mul(same).sum(1)
    expected = torch.log((positive + hardest[0].exp() + hardest[1].exp()) / positive).mean()
    assert_close(losses[0], expected, **TIGHT)


def test_a_batch_without_partners_has_no_new_term_and_finite_gradients():
    reverse, old, new, _ = batch(0, size=4)
    new.requires_grad_()
    terms = MetricCompatibleLoss(include_new_side=True)(reverse, old, new, torch.arange(4))
    terms["total"].backward()
    assert terms["mcl_new"] == 0
    assert torch.isfinite(new.grad).all()


def test_small_temperatures_stay_finite():
    reverse, old, new, labels = batch(0, dtype=torch.float32)
    terms = MetricCompatibleLoss(0.001, include_new_side=True)(reverse.requires_grad_(), old, new, labels)
    terms["total"].backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert torch.isfinite(reverse.grad).all()


@pytest.mark.parametrize("hidden", [None, 8])
def test_a_transform_between_equal_sizes_starts_as_the_identity(hidden):
    x = torch.randn(3, 6)
    assert torch.equal(ReverseQueryTransform(6, 6, hidden)(x), x)
    assert ReverseQueryTransform(6, 4, hidden)(x).shape == (3, 4)


@pytest.mark.parametrize("labels", [None, np.arange(20) % 4])
def test_vectors_in_double_precision_are_taken_like_those_in_single(labels):
    rng = np.random.default_rng(2)
    new, old = rng.standard_normal((20, 5)), rng.standard_normal((20, 3))
    psi = fit_reverse_transform(new, old, labels, steps=2)
    reverse = psi(torch.tensor(new))
    assert torch.equal(reverse, psi(torch.tensor(new).float()))
    terms = MetricCompatibleLoss()(reverse, torch.tensor(old), torch.tensor(new), np.arange(20) % 4)
    assert_close(terms["rqt_cos"], 1 - F.cosine_similarity(reverse, torch.tensor(old).float()).mean())


def test_a_linear_relation_between_encoders_is_learnt_and_then_serves_like_rank_merge():
    rng = np.random.default_rng(0)
    a = normals(rng, 5, 5) + 2 * np.eye(5, dtype=np.float32)
    new = normals(rng, 300, 5)
    exact = ReverseQueryTransform(5, 5)
    exact.load_state_dict({"linear.weight": torch.tensor(a), "linear.bias": torch.zeros(5)})
    x = torch.tensor(new)
    labels = torch.zeros(300, dtype=torch.int64)
    assert MetricCompatibleLoss()(exact(x), x @ torch.tensor(a).T, x, labels)["rqt_cos"].abs() < 1e-6
    psi = fit_reverse_transform(new, new @ a.T, steps=400)
    with torch.no_grad():
        assert F.cosine_similarity(psi(x), x @ torch.tensor(a).T).min() > 0.99
    gallery = mixed(new @ a.T, new, np.arange(150))
    with torch.no_grad():
        served = gallery.search(exact(x[:9]).numpy(), new[:9], 300).ids
    assert np.array_equal(served, gallery.search(new[:9] @ a.T, new[:9], 300).ids)


def test_labels_help_and_the_same_seed_gives_the_same_transforms():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 200)
    new = np.eye(4, 6, dtype=np.float32)[labels] + 0.3 * normals(rng, 200, 6)
    old = np.eye(4, 5, dtype=np.float32)[labels] + 0.8 * normals(rng, 200, 5)
    loss = MetricCompatibleLoss(include_new_side=True)
    rho, psi = fit_metric_compatible(new, old, labels, steps=150)
    again_rho, again_psi = fit_metric_compatible(new, old, labels, steps=150)
    assert torch.equal(rho.weight, again_rho.weight)
    assert torch.equal(psi.linear.weight, again_psi.linear.weight)
    x, o, y = torch.tensor(new), torch.tensor(old), torch.tensor(labels)
    start_rho, start_psi = fit_metric_compatible(new, old, labels, steps=0)
    with torch.no_grad():
        before = loss(start_psi(start_rho(x)), o, start_rho(x), y)["total"]
        after = loss(psi(rho(x)), o, rho(x), y)["total"]
        frozen = fit_reverse_transform(new, old, labels, steps=150)
        plain = fit_reverse_transform(new, old, steps=150)
        contrast = [MetricCompatibleLoss()(f(x), o, x, y)["mcl_old"] for f in (frozen, plain)]
    assert after < before
    assert contrast[0] < contrast[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: MetricCompatibleLoss()(x, x, x, None), "need labels"),
        (lambda x: MetricCompatibleLoss(temperature=0.0), "temperature is 0"),
        (lambda x: MetricCompatibleLoss(mining=5), "TopK"),
        (lambda x: MetricCompatibleLoss(weights=(1.0, -1.0, 1.0)), "at least 0"),
        (lambda x: MetricCompatibleLoss()(x, x[:, :2], x, torch.zeros(4, dtype=torch.int64)), r"\(4, 2\)"),
        (lambda x: TopK(0), "k is 0"),
        (lambda x: ReverseQueryTransform(0, 3), "at least 1"),
        (lambda x: fit_reverse_transform(x, x[:3]), "4 new and 3 old"),
        (lambda x: fit_reverse_transform(x * float("nan"), x), "not finite"),
        (lambda x: fit_reverse_transform(x, x, loss=MetricCompatibleLoss()), "needs labels"),
        (
            lambda x: fit_metric_compatible(x, x, torch.zeros(4, dtype=torch.int64), loss=MetricCompatibleLoss()),
            "new_side",
        ),
    ],
)
def test_bad_input_of_the_training_side_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(4, 3))


def test_labels_must_be_integers():
    with pytest.raises(TypeError, match="integers"):
        MetricCompatibleLoss()(*batch(0)[:3], torch.zeros(10))


# ------------------------------------------------------------------------------------------------------ backfilling


def test_backfill_goes_through_the_order_and_ends_at_the_new_system():
    g_old, g_new, q_old, q_new = system(6)
    gallery, seen = mixed(g_old, g_new, []), []
    order = np.random.default_rng(0).permutation(14)
    steps = backfill(lambda ids: gallery.move(ids, g_new[ids]), order, batch_size=4, on_step=seen.append)
    fractions = []
    for progress in steps:
        fractions.append(progress.fraction)
        assert gallery.progress == progress.fraction
        gallery.verify(np.arange(14))
    assert fractions == [4 / 14, 8 / 14, 12 / 14, 1.0]
    assert seen[-1] == Progress(14, 14)
    assert np.array_equal(gallery.search(q_old, q_new, 14).ids, index_of(g_new).search(q_new, 14).ids)


@pytest.mark.parametrize("crash_in_worker_call", range(4))
def test_after_a_crash_a_backfill_goes_on_at_its_checkpoint_and_misses_nothing(tmp_path, crash_in_worker_call):
    order, done, calls = [f"item-{i}" for i in range(10)], [], 0

    def worker(ids):
        nonlocal calls
        calls += 1
        done.extend(ids)
        if calls == crash_in_worker_call + 1:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        list(backfill(worker, order, batch_size=3, checkpoint=tmp_path / "state.json"))
    rest = list(backfill(worker, order, batch_size=3, checkpoint=tmp_path / "state.json"))
    assert rest[-1] == Progress(10, 10)
    assert list(dict.fromkeys(done)) == order
    assert len(done) - len(order) <= 3, "only the batch of the crash may come twice"
    assert list(backfill(worker, order, batch_size=3, checkpoint=tmp_path / "state.json")) == []
    assert [f.name for f in tmp_path.iterdir()] == ["state.json"]


def test_a_paused_backfill_resumes_where_the_consumer_stopped(tmp_path):
    done = []
    for _ in backfill(done.extend, range(10), batch_size=2, checkpoint=tmp_path / "c"):
        if len(done) == 4:
            break
    list(backfill(done.extend, torch.arange(10), batch_size=5, checkpoint=tmp_path / "c"))  # the same order
    assert done == list(range(10))


def test_a_checkpoint_of_another_order_or_a_damaged_one_is_refused_before_anything_is_done(tmp_path):
    def never(ids):
        raise AssertionError(ids)

    list(backfill(lambda ids: None, [1, 2, 3], checkpoint=tmp_path / "c"))
    with pytest.raises(ValueError, match="another order"):
        backfill(never, [3, 2, 1], checkpoint=tmp_path / "c")
    (tmp_path / "c").write_text('{"order": ')
    with pytest.raises(DataError, match="cannot be read"):
        backfill(never, [1, 2, 3], checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match="batch_size is 0"):
        backfill(never, [1], batch_size=0)
    with pytest.raises(ValueError, match="names 1 items twice"):
        backfill(never, [1, 2, 1])
