"""Ranking metrics, flips, curves and verification: the definitions as slow loops, invariants, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bowerbird import retrieval as R
from bowerbird.errors import InputError

KINDS = ("ap", "ties", "at_k", "trapezoid", "at_r")
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=25, deadline=None)


def task(seed: int, *, distinct: bool = True, q: int | None = None, n: int | None = None):
    """Random scores and labels; every query has a positive. With ``distinct=False`` most scores are tied."""
    rng = np.random.default_rng(seed)
    q, n = q or int(rng.integers(1, 9)), n or int(rng.integers(2, 30))
    gallery = rng.integers(0, 4, n)
    queries = rng.choice(gallery, q)
    if distinct:
        scores = rng.permuted(np.tile(np.linspace(-1, 1, n), (q, 1)), axis=1)
    else:
        scores = rng.integers(0, 4, (q, n)) / 4
    return scores, queries, gallery


# -------------------------------------------------------------------------------------------- definitions as loops


def excluded(relevance, q: int) -> set[int]:
    return {int(relevance.self_ids[q])} | set(relevance.ignore[q].tolist())


def ranks_of(scores, relevance, q: int, tie: str = "stable") -> tuple[list[int], int]:
    """1-based ranks of the positives after exclusions, and n."""
    out = excluded(relevance, q)
    positives = set(relevance.positives[q].tolist()) - out
    second = {
        "stable": lambda i: 0,
        "pessimistic": lambda i: i in positives,
        "optimistic": lambda i: i not in positives,
    }
    items = [i for i in range(scores.shape[1]) if i not in out]
    items.sort(key=lambda i: (-scores[q, i], second[tie](i), i))
    return [r for r, i in enumerate(items, 1) if i in positives], len(positives)


def ap_by_loops(kind: str, ranks: list[int], n: int, k: int) -> float:
    if kind == "at_k":
        return sum(j / r for j, r in enumerate(ranks, 1) if r <= k) / min(n, k)
    if kind == "at_r":
        return sum(j / r for j, r in enumerate(ranks, 1) if r <= n) / n
    if kind == "trapezoid":
        return sum((1.0 if r == 1 else (j - 1) / (r - 1)) + j / r for j, r in enumerate(ranks, 1)) / 2 / n
    return sum(j / r for j, r in enumerate(ranks, 1)) / n


def ap_ties_by_loops(scores, relevance, q: int) -> float:
    out = excluded(relevance, q)
    positives = set(relevance.positives[q].tolist()) - out
    items = [i for i in range(scores.shape[1]) if i not in out]
    total, recall = 0.0, 0.0
    for threshold in sorted({scores[q, i] for i in items}, reverse=True):
        accepted = [i for i in items if scores[q, i] >= threshold]
        right = len(positives & set(accepted))
        total += (right / len(positives) - recall) * right / len(accepted)
        recall = right / len(positives)
    return total


@few
@given(
    seed=seeds,
    distinct=st.booleans(),
    k=st.integers(1, 12),
    tie=st.sampled_from(["stable", "pessimistic", "optimistic"]),
)
def test_every_metric_equals_its_definition_with_self_matches_junk_and_ties(seed, distinct, k, tie):
    scores, queries, gallery = task(seed, distinct=distinct)
    rng = np.random.default_rng(seed + 1)
    cams = rng.integers(0, 3, len(gallery)), rng.integers(0, 3, len(queries))
    self_ids = rng.integers(-1, len(gallery), len(queries))
    rel = R.Relevance.from_labels(
        queries,
        gallery,
        query_ids=self_ids,
        gallery_ids=np.arange(len(gallery)),
        gallery_cams=cams[0],
        query_cams=cams[1],
    )
    truth = [ranks_of(scores, rel, q, tie) for q in range(len(queries))]
    assume(any(n for _, n in truth))
    ranked = R.RankedList.from_scores(scores)

    def expected(value):
        return [value(ranks, n) if n else math.nan for ranks, n in truth]

    for kind in ("ap", "at_k", "trapezoid", "at_r"):
        ap = R.average_precision(ranked, rel, kind, k if kind == "at_k" else None, tie=tie)
        assert np.allclose(ap.values, expected(lambda r, n, kind=kind: ap_by_loops(kind, r, n, k)), equal_nan=True)
        assert ap.valid.tolist() == [n > 0 for _, n in truth]
    ties = [ap_ties_by_loops(scores, rel, q) if n else math.nan for q, (_, n) in enumerate(truth)]
    assert np.allclose(R.average_precision(ranked, rel, "ap_ties", tie=tie).values, ties, equal_nan=True)
    first = R.cmc(ranked, rel, k, tie=tie)
    assert np.allclose(first.values, expected(lambda r, n: float(any(x <= k for x in r))), equal_nan=True)
    spread = R.cmc(ranked, rel, k, form="all", tie=tie).values
    assert np.allclose(spread, expected(lambda r, n: sum((x - 1 - j < k) / n for j, x in enumerate(r))), equal_nan=True)
    assert np.allclose(
        R.recall_all(ranked, rel, k, tie=tie).values, expected(lambda r, n: sum(x <= k for x in r) / n), equal_nan=True
    )
    assert np.allclose(
        R.precision(ranked, rel, k, tie=tie).values, expected(lambda r, n: sum(x <= k for x in r) / k), equal_nan=True
    )
    assert np.allclose(
        R.revisited_precision(ranked, rel, k, tie=tie).values,
        expected(lambda r, n: sum(x <= min(k, r[-1]) for x in r) / min(k, r[-1])),
        equal_nan=True,
    )


def test_the_pencil_example_positives_at_ranks_2_and_5():
    ranked, rel = R.RankedList(np.arange(6)[None]), R.Relevance([[1, 4]])
    expected = {"ap": 0.45, "ties": 0.45, "trapezoid": 0.2875, "at_r": 0.25}
    assert {k: pytest.approx(R.average_precision(ranked, rel, k).mean()) for k in expected} == expected
    assert R.average_precision(ranked, rel, "at_k", 3).mean() == pytest.approx(0.25)


def test_a_truncated_ranking_counts_its_missing_positives_as_missed():
    ranked, rel = R.RankedList(np.array([[3, 1, -1]])), R.Relevance([[1, 8, 9]])
    assert R.average_precision(ranked, rel).mean() == pytest.approx(0.5 / 3)
    assert R.average_precision(R.RankedList(np.array([[3, 2]])), rel, "trapezoid").mean() == 0
    assert R.recall_all(ranked, rel, 2).mean() == pytest.approx(1 / 3)


def test_a_positive_beyond_a_truncated_ranking_is_missed_at_every_k():
    ranked, rel = R.RankedList([[3, 1], [3, 8]]), R.Relevance([[8], [8]])
    assert R.cmc(ranked, rel, [1, 2, 3, 50]).values.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]


def test_positives_given_twice_or_excluded_do_not_count():
    ranked = R.RankedList(np.arange(5)[None])
    rel = R.Relevance([[2, 2, 0, 1]], ignore=[[1]], self_ids=[0])
    assert R.average_precision(ranked, rel).mean() == 1
    assert R.cmc(ranked, rel, 1).mean() == 1


def test_queries_without_positives_are_left_out_counted_zero_or_refused():
    ranked, rel = R.RankedList(np.array([[0, 1], [0, 1]])), R.Relevance([[0], []])
    assert R.average_precision(ranked, rel).mean() == 1
    assert R.average_precision(ranked, rel).num_valid == 1
    assert R.average_precision(ranked, rel, no_positive="zero").values.tolist() == [1, 0]
    assert R.cmc(ranked, rel, 1, no_positive="zero").mean() == 0.5
    with pytest.raises(InputError, match="1 of 2 queries"):
        R.cmc(ranked, rel, 1, no_positive="raise")
    with pytest.raises(InputError, match="none of the 2 queries"):
        R.cmc(ranked, R.Relevance([[], []]), 1)


def test_relevance_from_labels_knows_distractors_self_matches_and_strings():
    rel = R.Relevance.from_labels([1, -1, 7], [1, -1, 1, 2])
    assert [p.tolist() for p in rel.positives] == [[0, 2], [], []]
    named = R.Relevance.from_labels(
        ["cat", "dog"], ["dog", "cat", "cat"], query_ids=["c/1", "d/9"], gallery_ids=["d/1", "c/2", "c/1"]
    )
    assert named.self_ids.tolist() == [2, -1]  # ids that are words become positions
    assert [p.tolist() for p in named.positives] == [[1, 2], [0]]
    numbered = R.Relevance.from_labels([5], [5, 5], query_ids=[30], gallery_ids=[30, 40])
    assert numbered.self_ids.tolist() == [30]
    assert numbered.positives[0].tolist() == [30, 40]
    with pytest.raises(InputError, match="float"):
        R.Relevance.from_labels(np.array([1.0]), [1])
    with pytest.raises(InputError, match="got 2 and 3"):
        R.Relevance.from_labels([1, 2], [1, 2, 3], exclude_self=True)


def test_positives_may_be_lists_sets_padded_or_ragged_arrays():
    ranked, expected = R.RankedList([[0, 1, 2], [2, 1, 0]], [[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]]), [1.0, 0.5]
    for positives in (
        [[0, 1], [1]],
        ({0, 1}, {1}),
        np.array([[0, 1], [1, -1]]),
        np.array([[0, 1], [1]], dtype=object),
        [np.array([0, 1], np.int32), np.array([1])],
    ):
        assert R.average_precision(ranked, R.Relevance(positives)).values.tolist() == expected


def test_torch_tensors_and_search_hits_are_accepted():
    torch = pytest.importorskip("torch")
    scores, labels = torch.tensor([[0.1, 0.9]]), torch.tensor([3])
    rel = R.Relevance.from_labels(labels, torch.tensor([5, 3]))
    assert R.cmc(R.RankedList.from_scores(scores), rel, 1).mean() == 1
    hits = R.exact_search(np.eye(3, dtype=np.float32), np.eye(3)[:1], 5)
    assert R.RankedList.from_hits(hits).ids.tolist() == [[0, 1, 2, -1, -1]]
    encoder, items = torch.nn.Linear(4, 3), torch.randn(6, 4)  # its output still wants gradients
    labels = torch.arange(6) % 2
    data = R.RetrievalData(R.Relevance.from_labels(labels, labels, exclude_self=True), queries=items)
    assert R.self_test(encoder, data) == R.self_test(lambda x: encoder(x).detach().numpy(), data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: R.RankedList.from_scores([[0.1, np.nan]]), "NaN, first in query 0"),
        (lambda: R.RankedList(np.array([[0, 1]]), np.array([[1.0, np.nan]])), "NaN"),
        (lambda: R.RankedList(np.array([[0, 1]]), np.array([[0.1, 0.2]])), "increase"),
        (lambda: R.RankedList(np.array([[4, 4]])), "id 4 is ranked twice"),
        (lambda: R.RankedList(np.array([[0, 1]]), np.ones((1, 3))), "shape"),
        (lambda: R.Relevance([[0], [1]], ignore=[[0]]), "2 queries, ignore has 1"),
        (lambda: R.cmc(R.RankedList([[0]]), R.Relevance([[0]]), 0), "rank k"),
        (lambda: R.cmc(R.RankedList([[0]]), R.Relevance([[0], [0]]), 1), "1 queries, the relevance 2"),
        (lambda: R.cmc(R.RankedList([[0]]), R.Relevance([[0]]), 1, tie="pesimistic"), "Did you mean 'pessimistic'"),
        (lambda: R.cmc(R.RankedList([[0]]), R.Relevance([[0]]), 1, form="some"), "first or all"),
        (
            lambda: R.average_precision(R.RankedList([[0]]), R.Relevance([[0]]), "trapezoids"),
            "Did you mean 'trapezoid'",
        ),
        (lambda: R.average_precision(R.RankedList([[0]]), R.Relevance([[0]]), "ap", 5), "k belongs to"),
        (lambda: float(R.cmc(R.RankedList([[0]]), R.Relevance([[0]]), (1, 5))), "2 ranks k"),
        (lambda: R.Hits([0.5], [0.1]), "must be integers; got float64"),
        (lambda: R.similarity(np.ones((1, 3)), np.ones((1, 4))), "3 dimensions, the gallery 4"),
        (lambda: R.similarity(np.zeros((1, 3)), np.ones((1, 3))), "zero vector"),
        (lambda: R.similarity(np.ones((1, 3)), np.ones((1, 3)), "cosin"), "Did you mean 'cosine'"),
    ],
)
def test_bad_input_is_refused_with_the_reason(make, message):
    with pytest.raises(InputError, match=message):
        make()


# ------------------------------------------------------------------------------------------------------ invariants


def all_metrics(scores, rel, **switches) -> np.ndarray:
    ranked = R.RankedList.from_scores(scores)
    values = [R.average_precision(ranked, rel, kind, **switches).values for kind in KINDS]
    return np.stack([*values, R.cmc(ranked, rel, 3, **switches).values])


@few
@given(seed=seeds, distinct=st.booleans())
def test_a_strictly_increasing_transform_of_scores_changes_nothing(seed, distinct):
    scores, queries, gallery = task(seed, distinct=distinct)
    rel = R.Relevance.from_labels(queries, gallery)
    assert np.array_equal(all_metrics(scores, rel), all_metrics(np.exp(3 * scores) - 7, rel))


@few
@given(seed=seeds)
def test_the_forms_of_average_precision_agree_where_they_must(seed):
    scores, queries, gallery = task(seed)
    ranked, rel = R.RankedList.from_scores(scores), R.Relevance.from_labels(queries, gallery)
    ap = R.average_precision(ranked, rel).values
    assert np.allclose(R.average_precision(ranked, rel, "ties").values, ap)
    assert np.allclose(R.average_precision(ranked, rel, "at_k", len(gallery)).values, ap)
    assert (R.average_precision(ranked, rel, "trapezoid").values <= ap + 1e-12).all()


@few
@given(seed=seeds)
def test_average_precision_is_one_exactly_if_all_positives_come_first(seed):
    scores, queries, gallery = task(seed)
    ranked, rel = R.RankedList.from_scores(scores), R.Relevance.from_labels(queries, gallery)
    first = [
        sorted(ranks_of(scores, rel, q)[0]) == list(range(1, ranks_of(scores, rel, q)[1] + 1)) for q in range(len(rel))
    ]
    for kind in KINDS:
        assert np.isclose(R.average_precision(ranked, rel, kind).values, 1).tolist() == first


@few
@given(seed=seeds)
def test_a_distractor_below_all_positives_changes_nothing_and_above_all_it_lowers_every_ap(seed):
    scores, queries, gallery = task(seed)
    rel = R.Relevance.from_labels(queries, np.append(gallery, -1))
    below = np.column_stack([scores, np.full(len(scores), -2.0)])
    above = np.column_stack([scores, np.full(len(scores), 2.0)])
    base = all_metrics(scores, R.Relevance.from_labels(queries, gallery))
    assert np.allclose(all_metrics(below, rel), base)
    worse = all_metrics(above, rel)[:5]
    assert (worse[:4] < base[:4]).all()
    assert (worse[4] <= base[4]).all()  # MAP@R may have been 0 before
    assert (worse[4] < base[4])[base[4] > 0].all()


@few
@given(seed=seeds, form=st.sampled_from(["first", "all"]))
def test_cmc_never_falls_with_k_and_ends_at_one(seed, form):
    scores, queries, gallery = task(seed, distinct=False)
    ks = range(1, len(gallery) + 1)
    curve = R.cmc(R.RankedList.from_scores(scores), R.Relevance.from_labels(queries, gallery), ks, form=form).values
    assert (np.diff(curve, axis=1) >= 0).all()
    assert np.allclose(curve[:, -1], 1)


@few
@given(seed=seeds)
def test_stable_lies_between_pessimistic_and_optimistic(seed):
    scores, queries, gallery = task(seed, distinct=False)
    rel = R.Relevance.from_labels(queries, gallery)
    low, mid, high = (all_metrics(scores, rel, tie=t) for t in ("pessimistic", "stable", "optimistic"))
    assert (low <= mid + 1e-12).all()
    assert (mid <= high + 1e-12).all()


@few
@given(seed=seeds)
def test_permuting_the_gallery_changes_nothing_where_scores_are_distinct(seed):
    scores, queries, gallery = task(seed)
    order = np.random.default_rng(seed).permutation(len(gallery))
    before = all_metrics(scores, R.Relevance.from_labels(queries, gallery))
    after = all_metrics(scores[:, order], R.Relevance.from_labels(queries, gallery[order]))
    assert np.allclose(before, after)


# ----------------------------------------------------------------------------------------------------------- flips


@few
@given(a=st.lists(st.booleans(), min_size=1, max_size=40), seed=seeds)
def test_flips_are_the_change_of_accuracy_vanish_against_oneself_and_swap(a, seed):
    b = np.random.default_rng(seed).random(len(a)) < 0.5
    forth, back, same = R.flips(a, b), R.flips(b, a), R.flips(a, a)
    assert forth.pfr - forth.nfr == pytest.approx(np.mean(b) - np.mean(a))
    assert (same.nfr, same.pfr) == (0, 0)
    assert (forth.nfr, forth.pfr) == (back.pfr, back.nfr)
    assert (forth.change == b.astype(int) - np.array(a).astype(int)).all()
    if any(a):
        assert forth.conditional * np.mean(a) == pytest.approx(forth.nfr)
        if not b.all():
            assert forth.relative * np.mean(a) * (1 - np.mean(b)) == pytest.approx(forth.nfr)
        else:
            assert math.isnan(forth.relative)
    else:
        assert math.isnan(forth.conditional)


def test_flips_count_the_queries_valid_in_both_and_refuse_other_queries():
    ref = R.PerQuery(np.array([1.0, np.nan, 1.0]), np.array([True, False, True]))
    new = R.PerQuery(np.array([0.0, 1.0, np.nan]), np.array([True, True, False]))
    assert R.flips(ref, new).nfr == 1
    with pytest.raises(InputError, match="2 and 3 queries"):
        R.flips([1, 0], [1, 0, 1])
    with pytest.raises(InputError, match="ids differ"):
        R.flips([1, 0], [1, 0], query_ids_ref=["a", "b"], query_ids_new=["b", "a"])
    with pytest.raises(InputError, match="0 and 1"):
        R.flips([0.5], [1])
    assert R.flips([1, np.nan, 1], [0, 1, np.nan]).nfr == 1  # NaN: not valid
    one_k = R.cmc(R.RankedList([[0, 1], [1, 0]]), R.Relevance([[0], [0]]), [1])
    assert R.flips(one_k, [0, 0]).nfr == 0.5
    with pytest.raises(InputError, match="no query is valid"):
        R.flips(R.PerQuery(np.array([np.nan]), np.array([False])), [1])


def test_ap_flips_and_churn():
    fell = R.ap_flips([0.5, 0.9, 0.4, 0.3], [0.495, 0.5, 0.2, 0.9])
    assert (fell.share, fell.mean_drop) == (0.5, pytest.approx(0.3))
    assert fell.drops.tolist() == pytest.approx([0, 0.4, 0.2, 0])
    changed = R.churn([[1, 2, 3], [4, 5, -1]], [[3, 2, 9], [5, 4, -1]])
    assert changed.tolist() == pytest.approx([1 / 3, 0])
    assert R.churn([[1, 2]], [[3, 1]], k=1).tolist() == [1]
    with pytest.raises(InputError, match=r"1\.\.2"):
        R.churn([[1, 2]], [[1, 2]], k=3)


# ---------------------------------------------------------------------------------------------------------- curves


@few
@given(seed=seeds, level=st.floats(-1, 1))
def test_a_constant_curve_has_its_level_as_area_and_no_gain(seed, level):
    betas = np.unique(np.concatenate([[0, 1], np.random.default_rng(seed).random(5)]))
    curve = R.Curve(betas, np.full(len(betas), level))
    assert curve.area() == pytest.approx(level)
    assert curve.drawdown() == 0
    assert curve.negative_steps() == 0
    assert math.isnan(curve.beta_at())
    assert curve.relative_gain(level, level + 1) == pytest.approx(0)
    assert curve.relative_gain(level) == 0
    assert math.isnan(curve.relative_gain(level + 1)), "a new model below the old one has no gain to obtain"


@few
@given(seed=seeds)
def test_a_linear_curve_gains_half_and_more_points_on_it_change_no_area(seed):
    rng = np.random.default_rng(seed)
    low, high = rng.random(), 1 + rng.random()
    betas = np.unique(np.concatenate([[0, 1], rng.random(6)]))
    curve = R.Curve(betas, low + (high - low) * betas)
    assert curve.relative_gain(low) == pytest.approx(0.5)
    assert curve.area() == pytest.approx(R.Curve([0, 1], [low, high]).area())
    assert curve.beta_at(0.9) == pytest.approx(0.9)
    assert curve.beta_at(1.0) == 1
    assert curve.regret(low) == 0
    assert curve.gap(high) == pytest.approx(0)


@few
@given(seed=seeds)
def test_drawdown_is_the_deepest_fall_and_beta_at_the_first_crossing(seed):
    rng = np.random.default_rng(seed)
    betas, values = np.linspace(0, 1, 6), rng.random(6)
    values[-1] = values.max() + 0.1
    curve = R.Curve(betas, values)
    assert curve.drawdown() == pytest.approx(max(values[i] - values[j] for j in range(6) for i in range(j + 1)))
    fine = np.linspace(0, 1, 20001)
    reached = np.interp(fine, betas, values) >= values[0] + 0.9 * (values[-1] - values[0])
    assert curve.beta_at(0.9) == pytest.approx(fine[reached][0], abs=1e-4)


@few
@given(seed=seeds)
def test_the_backfill_curve_is_the_metric_of_the_mixed_scores(seed):
    rng = np.random.default_rng(seed)
    n, q = int(rng.integers(2, 20)), 4
    old, new, labels = rng.random((q, n)), rng.random((q, n)), rng.integers(0, 2, n)
    rel = R.Relevance.from_labels(rng.choice(labels, q), labels)
    order, betas = rng.permutation(n), [0, 0.3, 0.55, 1]
    curve = R.backfill_curve(R.BackfillState(old, new), order, betas, lambda ranked: R.average_precision(ranked, rel))
    for beta, value in zip(betas, curve.values, strict=True):
        moved = np.isin(np.arange(n), order[: int(beta * n + 1e-9)])
        mixed = np.where(moved, new, old)
        assert value == pytest.approx(R.average_precision(R.RankedList.from_scores(mixed), rel).mean())


@pytest.mark.parametrize("old_type", [np.float32, np.int64])
def test_new_scores_keep_their_precision_beside_coarser_old_ones(old_type):
    old, new = np.array([[3, 2, 1]], old_type), np.array([[0.25, 0.25 + 1e-12, 0.125]])
    rel = R.Relevance([[1]])
    curve = R.backfill_curve(
        R.BackfillState(old, new), [0, 1, 2], [0, 1], lambda ranked: R.average_precision(ranked, rel)
    )
    assert curve.values.tolist() == [0.5, 1]


def test_a_tenth_of_ten_items_is_one_item_at_every_step():
    assert [R.num_backfilled(i / 10, 10) for i in range(11)] == list(range(11))
    assert [R.num_backfilled(i * 0.1, 10) for i in range(11)] == list(range(11))
    assert 0.29 * 100 < 29
    assert R.num_backfilled(0.29, 100) == 29


@pytest.mark.parametrize("betas", [[0, 0.5], [0.5, 1], [0, 0.5, 0.5, 1], [0, 0.7, 0.3, 1], [1, 0]])
def test_a_grid_that_does_not_rise_from_0_to_1_is_refused(betas):
    with pytest.raises(InputError, match="from 0 to 1"):
        R.Curve(betas, np.ones(len(betas)))


def test_an_order_that_is_no_permutation_is_refused():
    state = R.BackfillState(np.ones((1, 3)), np.ones((1, 3)))
    with pytest.raises(InputError, match="permutation"):
        R.backfill_curve(state, [0, 1, 1], [0, 1], lambda ranked: 0.0)


# ---------------------------------------------------------------------------------------- gains and many upgrades


def world(seed: int, models: int, dim: int = 6):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 15)
    rel = R.Relevance.from_labels(labels[:5], labels, query_ids=np.arange(5), gallery_ids=np.arange(15))
    assume(all(len(p) > 1 for p in rel.positives))
    gallery = [rng.standard_normal((15, dim)) for _ in range(models)]
    return [R.Embeddings(g[:5], g) for g in gallery], rel


@few
@given(seed=seeds)
def test_identical_models_are_never_strictly_compatible_and_forget_nothing(seed):
    (model,), rel = world(seed, 1)
    matrix = R.compatibility_matrix([model] * 3, rel)
    lower = matrix[np.tril_indices(3)]
    assert np.allclose(lower, lower[0])
    assert R.average_compatibility(matrix, strict=True) == 0
    assert R.average_compatibility(matrix, strict=False) == 1
    assert R.forgetting(matrix).tolist() == [0, 0]
    assert R.backward_transfer(matrix) == 0
    assert R.strict_compatibility(model, model, rel).share == 1


@few
@given(seed=seeds, models=st.integers(2, 6))
def test_forgetting_is_the_fall_below_the_best_earlier_model_and_negative_where_the_last_is_best(seed, models):
    c = np.random.default_rng(seed).random((models, models))
    last = models - 1
    expected = [max(c[step, j] for step in range(j, last)) - c[last, j] for j in range(last)]
    assert R.forgetting(c) == pytest.approx(expected)
    assert R.backward_transfer(c) == pytest.approx(np.mean([c[last, j] - c[j, j] for j in range(last)]))
    assert R.forgetting([[0.5, 0], [0.75, 0.5]]).tolist() == [-0.25]


@few
@given(seed=seeds)
def test_the_gain_is_zero_at_the_old_level_and_one_at_the_ceiling(seed):
    old, star = np.sort(np.random.default_rng(seed).random(2))
    assume(star > old)
    assert R.update_gain(old, old, star) == 0
    assert R.update_gain(star, old, star) == 1
    assert R.update_gain([old, star], old, star).tolist() == [0, 1]
    assert math.isnan(R.update_gain(star, star, old))


@few
@given(seed=seeds)
def test_strict_compatibility_is_the_share_of_pairs_by_definition(seed):
    (old, new), rel = world(seed, 2)
    level, cross = R.similarity(old.queries, old.gallery), R.similarity(new.queries, old.gallery)
    outcome = [
        (cross[q, i] >= level[q, i]) if i in rel.positives[q] else (cross[q, i] <= level[q, i])
        for q in range(5)
        for i in range(15)
        if i != rel.self_ids[q]
    ]
    found = R.strict_compatibility(old, new, rel)
    assert found.share == pytest.approx(np.mean(outcome))
    assert np.mean(found.per_query) == pytest.approx(found.share)


def test_a_true_zero_in_the_matrix_counts():
    assert R.average_multimodel_accuracy([[0.0, 9], [0.5, 1.0]]) == 0.5


@few
@given(seed=seeds)
def test_the_report_holds_the_tests_flips_and_gains_of_the_single_functions(seed):
    (old, new, star), rel = world(seed, 3)
    report = R.compatibility_report(old, new, star, data=rel, ks=(1, 2))
    summary = report.summary()
    assert summary["new/old mAP"] == pytest.approx(R.cross_test((new, old), rel))
    assert summary["new/new mAP"] == pytest.approx(R.self_test(new, rel))

    def right(ranked, rel):
        return R.cmc(ranked, rel, 1)

    def as_number(ranked, rel):
        return R.average_precision(ranked, rel).mean()

    assert R.cross_test((new, old), rel, as_number) == R.cross_test((new, old), rel)
    assert np.array_equal(
        R.compatibility_matrix([old, new], rel, as_number), R.compatibility_matrix([old, new], rel), equal_nan=True
    )

    def at_one(ranked, rel):
        return R.cmc(ranked, rel, [1])

    assert R.self_test(new, rel, at_one) == R.compatibility_matrix([new], rel, right)[0, 0]
    start, end = R.measure(new, old, rel, right), R.measure(new, new, rel, right)
    assert summary["new/new vs_start nfr"] == R.flips(start, end).nfr
    assert report.compatible["mAP"] == (summary["new/old mAP"] > summary["old/old mAP"])
    assert np.allclose(
        report.update_gain["mAP"],
        R.update_gain(summary["new/old mAP"], summary["old/old mAP"], summary["star/star mAP"]),
        equal_nan=True,
    )
    assert "new/old" in report.table()


def test_encoders_are_functions_and_models_of_other_widths_have_no_cross_test():
    rng = np.random.default_rng(0)
    items, labels = rng.standard_normal((12, 5)), np.arange(12) % 3
    data = R.RetrievalData(R.Relevance.from_labels(labels, labels, exclude_self=True), queries=items)
    wide, narrow = (lambda x: x @ rng_matrix), (lambda x: x[:, :3])
    rng_matrix = rng.standard_normal((5, 7))
    report = R.compatibility_report(narrow, wide, data=data)
    assert set(report.metrics) == {"old/old", "new/new"}
    assert not report.compatible
    assert report.metrics["old/old"]["mAP"].mean() == pytest.approx(R.self_test(narrow, data))
    with pytest.raises(InputError, match="7 dimensions, the gallery 3"):
        R.cross_test((wide, narrow), data)


# ------------------------------------------------------------------------------------------------------ verification


@few
@given(seed=seeds, distinct=st.booleans())
def test_verification_is_the_largest_rate_that_some_threshold_reaches(seed, distinct):
    rng = np.random.default_rng(seed)
    labels = np.append(rng.integers(0, 2, 40), [0, 1])
    scores = rng.permutation(42) / 42 if distinct else rng.integers(0, 6, 42) / 6
    targets = [0, 0.02, 0.1, 0.5, 1]
    found = R.verification_at_fpr(scores, labels, targets)
    for target, tpr in zip(targets, found.tpr, strict=True):
        points = [
            (np.mean(scores[labels == 0] >= t), np.mean(scores[labels == 1] >= t)) for t in [*np.unique(scores), np.inf]
        ]
        assert tpr == max(t for f, t in points if f <= target)
    assert (np.diff(found.tpr) >= 0).all()
    assert found.tpr[-1] == 1
    assert (found.fpr <= targets).all()


@few
@given(seed=seeds, distinct=st.booleans())
def test_nearest_verification_takes_the_nearest_point_of_the_library_curve(seed, distinct):
    library = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    labels = np.append(rng.integers(0, 2, 30), [0, 1])
    scores = rng.random(32) if distinct else rng.integers(0, 6, 32) / 6
    fpr, tpr, _ = library.roc_curve(labels, scores)
    targets = [1e-4, 0.1, 0.3, 0.8]
    found = R.verification_at_fpr(scores, labels, targets, "nearest")
    for target, at_fpr, at_tpr in zip(targets, found.fpr, found.tpr, strict=True):
        away = np.abs(fpr - target)
        best = np.flatnonzero(away == away.min())[-1]  # of equally near points the larger rates
        assert (at_fpr, at_tpr) == pytest.approx((fpr[best], tpr[best]))


@few
@given(seed=seeds)
def test_a_template_does_not_change_when_an_image_is_repeated_within_its_medium(seed):
    rng = np.random.default_rng(seed)
    faces, weight = rng.standard_normal((10, 4)), rng.random(10) + 0.1
    templates = np.append(rng.integers(0, 3, 9), 5)
    media = np.arange(10)
    base, ids = R.template_features(faces, templates, media, detector_score=weight)
    twice = np.append(np.arange(10), 3)
    again, same_ids = R.template_features(faces[twice], templates[twice], media[twice], detector_score=weight[twice])
    assert np.array_equal(ids, same_ids)
    assert np.allclose(base, again)
    assert np.allclose(np.linalg.norm(base, axis=1), 1)


@few
@given(seed=seeds)
def test_identification_follows_its_definition(seed):
    rng = np.random.default_rng(seed)
    gallery, probes = rng.permutation(8)[:5], np.append(rng.integers(0, 8, 20), [100])
    assume(np.isin(probes, gallery).any())
    scores = rng.permuted(np.tile(np.linspace(0, 1, 5), (21, 1)), axis=1) + rng.random((21, 1))
    targets = [0.01, 0.3, 0.7, 1.0]
    found = R.identification_at_fpir(scores, probes, gallery, targets, ks=[1, 2])
    mated = [p for p in range(21) if probes[p] in gallery]
    others = sorted((max(scores[p]) for p in range(21) if p not in mated), reverse=True)
    top1 = [p for p in mated if gallery[np.argmax(scores[p])] == probes[p]]
    assert found.hits[1] == len(top1)
    for f, threshold, tpir in zip(targets, found.thresholds, found.tpir, strict=True):
        assert threshold == others[max(math.floor(f * len(others)) - 1, 0)]
        assert tpir == pytest.approx(sum(max(scores[p]) > threshold for p in top1) / len(mated))
    both = R.combine_galleries(found, found)
    assert both.accuracy[1] == pytest.approx(2 * len(top1) / 21)
    assert np.allclose(both.tpir, found.tpir)


def test_a_probe_must_score_above_the_threshold_and_not_just_reach_it():
    found = R.identification_at_fpir([[0.5, 0.1], [0.2, 0.6], [0.5, 0.3]], [1, 2, 9], [1, 2], 1.0)
    assert found.thresholds.tolist() == [0.5]
    assert found.tpir.tolist() == [0.5]


def test_verification_refuses_what_it_cannot_measure():
    with pytest.raises(InputError, match="NaN"):
        R.verification_at_fpr([np.nan, 1], [0, 1])
    with pytest.raises(InputError, match="got 2 and 0"):
        R.verification_at_fpr([0.1, 1], [1, 1])
    with pytest.raises(InputError, match=r"rates in 0\.\.1"):
        R.verification_at_fpr([0.1, 1], [0, 1], [2])
    with pytest.raises(InputError, match="at_most or nearest"):
        R.verification_at_fpr([0.1, 1], [0, 1], [0.1], kind="about")
    with pytest.raises(InputError, match="some that do not"):
        R.identification_at_fpir([[0.1, 0.2]], [1], [1, 2])


# --------------------------------------------------------------------------------------------------------- intervals


def test_a_bootstrap_interval_is_seeded_contains_the_mean_and_shrinks_with_the_root_of_the_queries():
    values = np.random.default_rng(0).random(400)
    wide, narrow = R.bootstrap_interval(values[:100]), R.bootstrap_interval(values)
    assert R.bootstrap_interval(values) == narrow
    assert narrow.low < narrow.mean < narrow.high
    # The normal approximation: 2 x 1.96 standard errors.
    assert narrow.high - narrow.low == pytest.approx(3.92 * values.std() / 20, rel=0.1)
    assert 1.6 < (wide.high - wide.low) / (narrow.high - narrow.low) < 2.5


def test_pairing_finds_a_small_steady_difference_that_unpaired_intervals_hide():
    rng = np.random.default_rng(0)
    base = rng.random(200)
    better = base + 0.02 + 0.01 * rng.standard_normal(200)
    difference = R.paired_difference(base, better)
    assert difference.low > 0.01
    assert R.bootstrap_interval(base).high > R.bootstrap_interval(better).low
    half = R.PerQuery(base, np.arange(200) < 100)
    assert R.paired_difference(half, better).mean == pytest.approx((better - base)[:100].mean())
    with pytest.raises(InputError, match="same queries"):
        R.paired_difference(base, better[:-1])


# ------------------------------------------------------------------------------------------------------ odd inputs


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_cosine_does_not_depend_on_the_size_of_vectors_not_even_where_squares_leave_the_range(dtype):
    rng = np.random.default_rng(0)
    queries, gallery = rng.standard_normal((3, 5)).astype(dtype), rng.standard_normal((4, 5)).astype(dtype)
    expected = R.similarity(queries, gallery)
    largest = {np.float16: 1e4, np.float32: 1e37, np.float64: 1e300}[dtype]
    for factor in (dtype(largest), dtype(1 / largest) if dtype != np.float16 else dtype(1e-2)):
        np.testing.assert_allclose(R.similarity(queries * factor, gallery), expected, atol=2e-3)
    assert expected.dtype == (np.float64 if dtype == np.float64 else np.float32)


def test_euclidean_scores_of_long_vectors_keep_their_digits():
    rng = np.random.default_rng(0)
    far = 1000 + rng.standard_normal((6, 8)).astype(np.float32)
    exact = -np.linalg.norm(far[:, None].astype(np.float64) - far[None], axis=2)
    scores = R.similarity(far, far, "l2")
    np.testing.assert_allclose(scores, exact, atol=1e-3)
    assert scores.dtype == np.float32
    with pytest.raises(InputError, match="row 1"):
        R.similarity(np.array([[1.0, 0.0], [np.inf, 0.0]]), far[:, :2])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint64, bool, np.int32])
def test_distances_of_any_type_rank_the_smallest_first(dtype):
    distances = np.array([[3, 0, 1, 2]]).astype(dtype)
    assert R.RankedList.from_distances(distances).ids[0, 0] == 1
    assert (np.diff(R.RankedList.from_distances(distances).scores) <= 0).all()


def test_a_gallery_id_that_pads_rankings_and_a_cut_to_nothing_are_refused():
    scores = np.array([[0.3, 0.2, 0.1]])
    with pytest.raises(InputError, match="-1 is no id"):
        R.RankedList.from_scores(scores, ids=[-1, 0, 1])
    with pytest.raises(InputError, match="-1 is no id"):
        R.Relevance.from_labels([0], [0, 1, 0], query_ids=[7], gallery_ids=[-1, 0, 1])
    for k in (0, -1):
        with pytest.raises(InputError, match="k must be at least 1"):
            R.RankedList.from_scores(scores, k=k)


def test_an_empty_gallery_gives_no_query_anything():
    ranked, relevance = R.RankedList.from_scores(np.zeros((2, 0))), R.Relevance([[1], [2]])
    for metric in (R.cmc, R.precision, R.recall_all, R.revisited_precision):
        assert (metric(ranked, relevance, (1, 3)).values == 0).all()
    for kind in KINDS:
        assert R.average_precision(ranked, relevance, kind).mean() == 0
    state = R.BackfillState(np.zeros((1, 0)), np.zeros((1, 0)))
    assert R.backfill_curve(state, [], (0, 1), lambda ranked: 0.5).area() == 0.5


@pytest.mark.parametrize("k", ["5", None, math.nan, math.inf, 1.5, 0])
def test_a_rank_that_is_no_number_of_items_is_refused_everywhere(k):
    ranked, relevance = R.RankedList.from_scores([[0.2, 0.1]]), R.Relevance([[1]])
    with pytest.raises(InputError, match="a rank k"):
        R.cmc(ranked, relevance, k)
    with pytest.raises(InputError, match="a rank k"):
        R.identification_at_fpir([[0.1, 0.2], [0.3, 0.1]], [0, 5], [0, 1], ks=(k,))
    if k is not None:
        with pytest.raises(InputError, match="a rank k"):
            R.average_precision(ranked, relevance, "at_k", k)
        with pytest.raises(InputError, match=r"k must be|a rank k"):
            R.churn(ranked, ranked, k)


def test_one_rank_or_several_may_be_asked_for():
    vectors = R.Embeddings(np.eye(3), np.eye(3))
    data = R.Relevance.from_labels([0, 1, 0], [0, 1, 0])
    one, several = (R.compatibility_report(vectors, vectors, data=data, ks=ks) for ks in (3, (3,)))
    assert one.table() == several.table()
    assert R.identification_at_fpir([[0.1, 0.2], [0.3, 0.1]], [0, 5], [0, 1], ks=2).hits == {2: 1}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: R.cmc(np.eye(2), R.Relevance([[0], [1]])), "RankedList and a Relevance; got ndarray"),
        (lambda: R.self_test(R.Embeddings(np.eye(2), np.eye(2)), None), "RetrievalData"),
        (lambda: R.cross_test(R.Embeddings(np.eye(2), np.eye(2)), R.Relevance([[0]])), "pair"),
        (
            lambda: R.self_test(R.Embeddings(np.eye(2), np.eye(2)), R.Relevance([[0], [2]])),
            "position 2 of a gallery of 2",
        ),
        (lambda: R.Relevance.from_labels([0, 1], [0, 1], query_cams=[0], gallery_cams=[0, 0]), "cameras have shapes"),
        (lambda: R.Relevance.from_labels([0, 1], [0, 1], query_cams=[0, 1], gallery_cams=[0] * 3), "cameras have"),
        (lambda: R.flips([1, 0], [1, 0], query_ids_ref=[1, 2, 3], query_ids_new=[1, 2, 3]), "2 queries"),
        (lambda: R.flips([1, 0], [1, 0], query_ids_new=[1]), "2 queries"),
        (lambda: R.ap_flips([0.5], [0.4], eps=-0.1), "eps must be"),
        (lambda: R.update_gain([0.1, 0.2], 0.1, [0.3, 0.4, 0.5]), r"\(2,\), \(\), \(3,\)"),
        (lambda: R.advbct_scores([], [], [], []), "no data set"),
        (lambda: R.pair_scores(np.eye(3), np.eye(3), [0, -1], [0, 1]), r"pair_a must be row numbers in 0..2"),
        (lambda: R.pair_scores(np.eye(3), np.eye(3), [0, 1], [0, 3]), r"pair_b must be row numbers in 0..2"),
        (lambda: R.Curve([0, 1], [0.1, math.inf]), "the curve is inf at beta 1"),
        (lambda: R.backfill_curve(R.BackfillState(np.eye(2), np.eye(2)), [0.0, 1.0], metric=len), "permutation"),
        (lambda: R.backfill_curve(R.BackfillState(np.eye(2), np.eye(2)), [0, 1], metric="ap"), "got 'ap'"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_extreme_gains_have_scores_without_overflow():
    scores = R.advbct_scores([-5000.0], [0.0], [0.5], [1.0])
    assert scores.p_comp == 0
    assert scores.p_1 == 0
