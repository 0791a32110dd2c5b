"""The parts of backward-compatible training: against golden numbers, and what must hold for any numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from bowerbird.retrieval.index import ExactIndex
from bowerbird.retrieval.metrics import RankedList, Relevance, average_precision
from bowerbird_compat.bct import InfluenceLoss, MarginSoftmax, build_prototypes, match_dim

TIGHT = {"rtol": 1e-9, "atol": 1e-10}
SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.integers(1, 9)
invariant = settings(max_examples=25, deadline=None)


def random(*shape: int, seed: int, grad: bool = False) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.requires_grad_(grad)


def random_labels(size: int, classes: int, seed: int) -> Tensor:
    return torch.randint(classes, (size,), generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------- golden numbers


@pytest.mark.parametrize("case", ["influence_loss_pad", "influence_loss_truncate"])
def test_influence_loss_and_gradients_are_those_of_openbct(golden, case):
    g = golden(f"bct/{case}")
    feat, w_new, b_new = (g[k].requires_grad_() for k in ("feat", "W_new", "b_new"))
    class_map = dict(zip(g["map_new"].tolist(), g["map_old"].tolist(), strict=True))
    influence = InfluenceLoss(g["W_old"], class_map, weight=float(g["lam"]))
    old = influence(feat, g["labels_new"])
    new = F.cross_entropy(F.linear(feat, w_new, b_new), g["labels_new"])
    (new + old).backward()

    assert_close(old, g["lam"] * g["loss_old"], **TIGHT)
    assert_close(new + old, g["loss_total"], **TIGHT)
    assert influence.last_num_valid == len(g["valid_index"])
    for tensor, name in ((feat, "grad_feat"), (w_new, "grad_W_new"), (b_new, "grad_b_new")):
        assert_close(tensor.grad, g[name], **TIGHT)
    assert_close(F.normalize(match_dim(feat.detach(), g["W_old"].shape[1])), g["embedding_eval"], **TIGHT)
    rows = influence.old_labels(g["labels_new"])
    assert torch.equal((rows >= 0).nonzero().flatten(), g["valid_index"])
    assert torch.equal(rows[rows >= 0], g["labels_old"])


def test_influence_loss_of_a_synthesised_classifier_is_that_of_bt2(golden):
    g = golden("bct/synthesized_classifier_loss")
    z, w_new = g["z"].requires_grad_(), g["W_new"].requires_grad_()
    smoothing = float(g["smoothing"])
    influence = InfluenceLoss(g["prototypes"], weight=float(g["alpha"]), normalize=True, label_smoothing=smoothing)
    old = influence(z, g["labels"])
    new = F.cross_entropy(F.linear(F.normalize(z), w_new), g["labels"], label_smoothing=smoothing)
    (new + old).backward()

    assert_close(old, g["alpha"] * g["loss_old"], **TIGHT)
    assert_close(new + old, g["loss_total"], **TIGHT)
    assert_close(z.grad, g["grad_z"], **TIGHT)
    assert_close(w_new.grad, g["grad_W_new"], **TIGHT)


def test_prototypes_are_those_of_openbct(golden):
    g = golden("bct/pseudo_classifier")
    loader = [(g["old_embeddings"][i : i + 7], g["labels"][i : i + 7]) for i in range(0, 30, 7)]
    made = build_prototypes(nn.Identity(), loader, int(g["num_classes"]), on_missing="zero")
    assert_close(made.weight, g["prototypes"], **TIGHT)
    assert torch.equal(made.counts, torch.bincount(g["labels"], minlength=5))


@pytest.mark.parametrize(
    ("prefix", "kind", "scale", "margin"),
    [
        ("arcface", "arcface", "scale", "margin_arc"),
        ("cosface", "cosface", "scale", "margin_cos"),
        ("arcface_easy", "arcface_monotone", "easy_scale", "easy_margin"),
    ],
)
def test_margin_logits_and_gradients_are_those_of_the_published_code(golden, prefix, kind, scale, margin):
    g = golden("bct/margin_softmax")
    feat = g["feat"].requires_grad_()
    logits = MarginSoftmax(kind, float(g[scale]), float(g[margin]))(feat, g["W"], g["labels"])
    loss = F.cross_entropy(logits, g["labels"])
    loss.backward()
    assert_close(logits, g[f"{prefix}__logits"], **TIGHT)
    assert_close(loss, g[f"{prefix}__loss"], **TIGHT)
    assert_close(feat.grad, g[f"{prefix}__grad_feat"], **TIGHT)


# ------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("case", ["lambda is 0", "no class in common"])
def test_without_influence_loss_and_gradients_equal_plain_training_bit_for_bit(case):
    labels = random_labels(8, 5, 1)
    influence = (
        InfluenceLoss(random(5, 6, seed=2), weight=0.0)
        if case == "lambda is 0"
        else InfluenceLoss(random(5, 6, seed=2), {7: 0, 9: 3})
    )
    results = []
    for extra in (None, influence):
        feat, w = random(8, 6, seed=3, grad=True), random(5, 6, seed=4, grad=True)
        loss = F.cross_entropy(F.linear(feat, w), labels)
        if extra is not None:
            loss = loss + extra(feat, labels)
        loss.backward()
        results.append((loss.detach(), feat.grad, w.grad))
    for plain, with_term in zip(*results, strict=True):
        assert torch.equal(plain, with_term)


def test_the_old_classifier_is_no_parameter_and_survives_an_optimiser_with_weight_decay():
    given_weight = random(4, 6, seed=0)
    before = given_weight.clone()
    influence = InfluenceLoss(given_weight)
    model = nn.Sequential(nn.Linear(3, 6, dtype=torch.float64))
    system = nn.ModuleDict({"model": model, "influence": influence})
    assert list(influence.parameters()) == []
    optimiser = torch.optim.AdamW(system.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(3):
        influence(model(random(5, 3, seed=step)), random_labels(5, 4, step)).backward()
        optimiser.step()
    assert torch.equal(influence.old_classifier, before)
    assert influence.old_classifier.grad is None
    assert "old_classifier" in influence.state_dict()
    given_weight.zero_()
    assert torch.equal(influence.old_classifier, before), "a later change of the given matrix must not reach the loss"


@invariant
@given(seed=SEEDS, d_new=SIZES, d_old=SIZES, old=st.integers(2, 6))
def test_permuting_old_classes_with_their_map_changes_nothing(seed, d_new, d_old, old):
    w_old, labels = random(old, d_old, seed=seed), random_labels(7, 6, seed)
    class_map = {new: (new * 5 + seed) % old for new in range(4)}
    permutation = torch.randperm(old, generator=torch.Generator().manual_seed(seed))
    position = {int(row): place for place, row in enumerate(permutation)}
    outcomes = []
    for weight, mapping in ((w_old, class_map), (w_old[permutation], {n: position[o] for n, o in class_map.items()})):
        feat = random(7, d_new, seed=seed + 1, grad=True)
        loss = InfluenceLoss(weight, mapping)(feat, labels)
        loss.backward()
        outcomes.append((loss.detach(), feat.grad))
    assert_close(*[o[0] for o in outcomes], rtol=1e-12, atol=1e-12)
    assert_close(*[o[1] for o in outcomes], rtol=1e-12, atol=1e-12)


def test_with_the_new_classifier_as_the_old_one_the_gradient_doubles():
    w, labels = random(5, 6, seed=0), random_labels(9, 5, 1)
    feat = random(9, 6, seed=2, grad=True)
    new = F.cross_entropy(F.linear(feat, w), labels)
    (plain,) = torch.autograd.grad(new, feat, retain_graph=True)
    influence = InfluenceLoss(w)(feat, labels)
    (both,) = torch.autograd.grad(new + influence, feat)
    assert_close(influence, new, **TIGHT)
    assert_close(both, 2 * plain, **TIGHT)


@invariant
@given(seed=SEEDS, d_old=SIZES, more=st.integers(1, 5))
def test_entries_beyond_the_old_size_get_exactly_no_gradient(seed, d_old, more):
    feat = random(6, d_old + more, seed=seed, grad=True)
    InfluenceLoss(random(3, d_old, seed=seed + 1))(feat, random_labels(6, 3, seed)).backward()
    assert torch.equal(feat.grad[:, d_old:], torch.zeros(6, more, dtype=torch.float64))


@invariant
@given(seed=SEEDS, d_new=SIZES, more=st.integers(1, 5))
def test_columns_of_the_old_classifier_beyond_the_new_size_have_no_effect(seed, d_new, more):
    w_old, feat, labels = random(3, d_new + more, seed=seed), random(6, d_new, seed=seed + 1), random_labels(6, 3, seed)
    changed = w_old.clone()
    changed[:, d_new:] += 7.0
    assert_close(InfluenceLoss(w_old)(feat, labels), InfluenceLoss(changed)(feat, labels), rtol=0, atol=0)


@invariant
@given(seed=SEEDS, dim=SIZES, classes=st.integers(1, 5))
def test_prototypes_have_norm_at_most_one_and_do_not_depend_on_the_order_of_samples(seed, dim, classes):
    labels = torch.cat([torch.arange(classes), random_labels(20, classes, seed)])
    vectors = random(len(labels), dim, seed=seed)
    made = build_prototypes(nn.Identity(), [(vectors, labels)], classes)
    shuffle = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    other = build_prototypes(
        nn.Identity(), zip(vectors[shuffle].split(3), labels[shuffle].split(3), strict=True), classes
    )
    assert (made.weight.norm(dim=1) <= 1 + 1e-12).all()
    assert_close(made.weight, other.weight, **TIGHT)
    normalised = build_prototypes(nn.Identity(), [(vectors, labels)], classes, normalize=True)
    assert_close(normalised.weight, F.normalize(made.weight), **TIGHT)


def test_the_prototype_of_a_single_sample_is_that_sample():
    vectors = F.normalize(random(3, 4, seed=0))
    made = build_prototypes(nn.Identity(), [(vectors, torch.tensor([2, 0, 1]))], 3)
    assert_close(made.weight[torch.tensor([2, 0, 1])], vectors, **TIGHT)


def test_classes_without_samples_are_listed_or_left_out_but_never_used_silently():
    loader = [(random(3, 4, seed=0), torch.tensor([0, 2, 2]))]
    with pytest.raises(ValueError, match=r"2 of 4 classes have no sample: 1, 3"):
        build_prototypes(nn.Identity(), loader, 4)
    zero = build_prototypes(nn.Identity(), loader, 4, on_missing="zero")
    assert torch.equal(zero.weight[[1, 3]], torch.zeros(2, 4, dtype=torch.float64))
    assert zero.class_map() == {0: 0, 2: 2}
    with pytest.raises(ValueError, match=r"Rows \[1, 3\].*zero"):
        InfluenceLoss(zero.weight)
    skip = build_prototypes(nn.Identity(), loader, 4, on_missing="skip")
    assert skip.weight.shape == (2, 4)
    assert skip.class_map() == {0: 0, 2: 1}
    influence = InfluenceLoss(skip.weight, skip.class_map())
    influence(random(4, 4, seed=1), torch.tensor([0, 1, 2, 3]))
    assert influence.last_num_valid == 2


def test_prototypes_are_made_in_eval_mode_and_the_mode_comes_back_also_after_an_error():
    encoder = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4))
    encoder[1].eval()
    x = torch.randn(6, 4)
    made = build_prototypes(encoder, [(x, torch.zeros(6, dtype=torch.int64))], 1)
    assert_close(made.weight[0], F.normalize(x / math.sqrt(1 + 1e-5)).mean(0), rtol=1e-5, atol=1e-6)
    assert not made.weight.requires_grad
    assert made.weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"Label 3 is outside 0\.\.0"):
        build_prototypes(encoder, [(x, torch.full((6,), 3))], 1)
    assert [encoder.training, encoder[0].training, encoder[1].training] == [True, True, False]


@invariant
@given(seed=SEEDS, kind=st.sampled_from(["cosface", "arcface", "arcface_monotone"]))
def test_a_margin_of_zero_gives_cosines_and_any_margin_moves_only_the_target(seed, kind):
    feat, w, labels = random(6, 5, seed=seed), random(4, 5, seed=seed + 1), random_labels(6, 4, seed)
    cosine = F.normalize(feat) @ F.normalize(w).T
    assert_close(MarginSoftmax(kind, 1.0, 0.0)(feat, w, labels), cosine, **TIGHT)
    assert_close(MarginSoftmax("none", 1.0, 0.4)(feat, w, labels), cosine, **TIGHT)
    others = F.one_hot(labels, 4) == 0
    assert_close(MarginSoftmax(kind, 1.0, 0.4)(feat, w, labels)[others], cosine[others], **TIGHT)


@invariant
@given(seed=SEEDS, kind=st.sampled_from(["cosface", "arcface"]), low=st.floats(0, 1), high=st.floats(0, 1))
def test_the_target_logit_never_rises_with_the_margin(seed, kind, low, high):
    feat, w, labels = random(6, 5, seed=seed), random(4, 5, seed=seed + 1), random_labels(6, 4, seed)
    column = labels.unsqueeze(1)
    angle = torch.arccos((F.normalize(feat) @ F.normalize(w).T).gather(1, column)).squeeze(1)
    room = float(math.pi - angle.max())  # beyond pi - angle the cosine rises again
    small, large = sorted((low * room, high * room))
    target = [MarginSoftmax(kind, 1.0, m)(feat, w, labels).gather(1, column) for m in (small, large)]
    assert (target[1] <= target[0] + 1e-6).all()


@invariant
@given(seed=SEEDS, margin=st.floats(0.01, 1.5), scale=st.floats(0.5, 64))
def test_target_logits_are_the_written_out_margins(seed, margin, scale):
    feat, w, labels = random(6, 5, seed=seed), random(4, 5, seed=seed + 1), random_labels(6, 4, seed)
    for row, label in enumerate(labels):
        c = float(F.cosine_similarity(feat[row], w[label], dim=0))
        angle = math.acos(c)
        monotone = c > math.cos(math.pi - margin)
        expected = {
            "none": c,
            "cosface": c - margin,
            "arcface": math.cos(angle + margin),
            "arcface_monotone": math.cos(angle + margin) if monotone else c - margin * math.sin(math.pi - margin),
        }
        for kind, target in expected.items():
            found = MarginSoftmax(kind, scale, margin)(feat, w, labels)[row, label]
            assert float(found) == pytest.approx(scale * target, rel=1e-6, abs=1e-6), kind


@pytest.mark.parametrize("kind", ["arcface", "arcface_monotone"])
def test_margins_have_finite_gradients_where_embedding_and_class_coincide(kind):
    for dtype in (torch.float32, torch.float64):
        w = torch.eye(3, dtype=dtype)
        feat = torch.stack([w[0], -w[1]]).requires_grad_()
        F.cross_entropy(MarginSoftmax(kind, 30.0, 0.5)(feat, w, torch.tensor([0, 1])), torch.tensor([0, 1])).backward()
        assert torch.isfinite(feat.grad).all()


def test_a_monotone_arcface_never_rewards_a_worse_angle():
    cosine = torch.linspace(-1, 1, 400, dtype=torch.float64).unsqueeze(1)
    target = MarginSoftmax("arcface_monotone", 1.0, 0.5).apply_margin(cosine, torch.zeros(400, dtype=torch.int64))
    assert (target.diff(dim=0) > -1e-6).all()


def ranking(queries: Tensor, gallery: Tensor) -> tuple[np.ndarray, float]:
    """Ids and mAP of new queries in an old gallery, as they are compared after training."""
    index = ExactIndex()
    index.add(np.arange(len(gallery)), gallery.numpy())
    hits = index.search(match_dim(queries, gallery.shape[1]).numpy(), len(gallery))
    relevant = Relevance.from_labels(np.arange(len(queries)) % 3, np.arange(len(gallery)) % 3)
    return hits.ids, float(average_precision(RankedList.from_hits(hits), relevant))


@invariant
@given(seed=SEEDS)
def test_the_old_encoder_as_the_new_one_has_exactly_the_old_quality(seed):
    queries, gallery = random(6, 5, seed=seed).float(), random(9, 5, seed=seed + 1).float()
    new_ids, new_map = ranking(queries.clone(), gallery)
    old_ids, old_map = ranking(queries, gallery)
    assert np.array_equal(new_ids, old_ids)
    assert new_map == old_map


@invariant
@given(seed=SEEDS, factor=st.floats(1e-3, 1e3), d_new=st.integers(4, 9))
def test_the_length_of_new_embeddings_means_nothing_at_inference(seed, factor, d_new):
    queries, gallery = random(6, d_new, seed=seed).float(), random(9, 6, seed=seed + 1).float()
    assert np.array_equal(ranking(queries, gallery)[0], ranking(queries * factor, gallery)[0])


# -------------------------------------------------------------------------------------------------- options, errors


def test_unknown_labels_leave_the_mean_instead_of_being_weighted_with_zero():
    w_old, feat = random(3, 4, seed=0), random(6, 4, seed=1)
    labels = torch.tensor([0, 9, 1, -1, 2, 50])
    known = labels.lt(3) & labels.ge(0)
    expected = F.cross_entropy(feat[known] @ w_old.T, labels[known])
    influence = InfluenceLoss(w_old)
    assert_close(influence(feat, labels), expected, **TIGHT)
    assert influence.last_num_valid == 3
    assert_close(InfluenceLoss(w_old, reduction="sum")(feat, labels), 3 * expected, **TIGHT)
    each = InfluenceLoss(w_old, reduction="none", weight=2.0)(feat, labels)
    assert torch.equal(each[~known], torch.zeros(3, dtype=torch.float64))
    assert_close(each.sum(), 6 * expected, **TIGHT)


def test_a_batch_without_known_labels_costs_nothing_and_can_be_differentiated():
    feat = random(4, 5, seed=0, grad=True)
    influence = InfluenceLoss(random(3, 5, seed=1), {})
    loss = influence(feat, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and influence.last_num_valid == 0
    assert torch.equal(feat.grad, torch.zeros_like(feat))


@invariant
@given(seed=SEEDS, scale=st.floats(0.1, 50), d_new=SIZES, d_old=SIZES)
def test_normalised_influence_is_a_scaled_softmax_of_unit_embeddings_and_ignores_their_length(
    seed, scale, d_new, d_old
):
    w_old, feat, labels = random(4, d_old, seed=seed), random(6, d_new, seed=seed + 1), random_labels(6, 4, seed)
    influence = InfluenceLoss(w_old, normalize=True, scale=scale)
    expected = F.cross_entropy(scale * F.normalize(match_dim(feat, d_old)) @ w_old.T, labels)
    assert_close(influence(feat, labels), expected, **TIGHT)
    assert_close(influence(feat * 37.0, labels), expected, rtol=1e-6, atol=1e-9)
    weighted = InfluenceLoss(w_old, weight=2.5, normalize=True, scale=scale)
    assert_close(weighted(feat, labels), 2.5 * expected, **TIGHT)


def test_an_influence_with_margin_uses_the_margin_logits():
    w_old, feat, labels = random(4, 5, seed=0), random(6, 5, seed=1), random_labels(6, 4, 2)
    margin = MarginSoftmax("cosface", 16.0, 0.2)
    expected = F.cross_entropy(margin(feat, w_old, labels), labels)
    assert_close(InfluenceLoss(w_old, margin=margin)(feat, labels), expected, **TIGHT)


@invariant
@given(seed=SEEDS, size=SIZES, dim=SIZES)
def test_match_dim_keeps_the_first_entries_or_appends_zeros(seed, size, dim):
    x = random(3, size, seed=seed)
    y = match_dim(x, dim)
    shared = min(size, dim)
    assert y.shape == (3, dim)
    assert torch.equal(y[:, :shared], x[:, :shared])
    assert not y[:, shared:].any()
    if size != dim:
        with pytest.raises(ValueError, match=rf"size {size}.*size {dim}"):
            match_dim(x, dim, mode="strict")
    else:
        assert torch.equal(match_dim(x, dim, mode="strict"), x)


@pytest.mark.parametrize("labels", [torch.zeros(3), torch.zeros(3, dtype=torch.bool), [0, 1, 2]])
def test_labels_that_are_not_integers_are_a_type_error(labels):
    with pytest.raises(TypeError, match="integers"):
        InfluenceLoss(random(3, 4, seed=0))(random(3, 4, seed=1), labels)


def test_numpy_arrays_are_accepted_like_tensors():
    w, feat, labels = random(3, 4, seed=0), random(6, 5, seed=1), random_labels(6, 3, 2)
    influence = InfluenceLoss(w.numpy())
    assert torch.equal(influence(feat, labels.numpy()), InfluenceLoss(w)(feat, labels))
    assert torch.equal(match_dim(feat.numpy(), 7), match_dim(feat, 7))
    made = build_prototypes(lambda x: 2 * x, [(feat.numpy(), labels.numpy())], 3, on_missing="zero")
    assert torch.equal(made.weight, build_prototypes(nn.Identity(), [(feat, labels)], 3, on_missing="zero").weight)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_any_integer_type_of_labels_is_accepted(dtype):
    influence, feat = InfluenceLoss(random(3, 4, seed=0)), random(3, 4, seed=1)
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(influence(feat, labels.to(dtype)), influence(feat, labels))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InfluenceLoss(torch.eye(3), {0: 3}), r"0 -> 3.*0\.\.2"),
        (lambda: InfluenceLoss(torch.eye(3), {-1: 0}), "-1 -> 0"),
        (lambda: InfluenceLoss(torch.eye(3), weight=-1.0), "weight is -1"),
        (lambda: InfluenceLoss(torch.eye(3), scale=0.0), "scale is 0"),
        (lambda: InfluenceLoss(torch.eye(3), reduction="max"), "reduction is 'max'"),
        (lambda: InfluenceLoss(torch.full((2, 2), math.nan)), "not finite"),
        (lambda: InfluenceLoss(torch.ones(3)), r"shape \(3,\)"),
        (lambda: InfluenceLoss(torch.eye(3), margin=0.3), r"margin is 0\.3; give MarginSoftmax"),
        (lambda: InfluenceLoss(torch.eye(3))(torch.ones(2, 3), torch.tensor([0])), r"shape \(2,\)"),
        (lambda: MarginSoftmax("arcfase"), "Did you mean 'arcface'"),
        (lambda: MarginSoftmax("arcface", 1.0, 4.0), "at most pi"),
        (lambda: MarginSoftmax("cosface", -1.0), "scale is -1"),
        (lambda: MarginSoftmax()(torch.ones(2, 3), torch.ones(4, 5), torch.tensor([0, 1])), "size 3.*5"),
        (lambda: match_dim(torch.ones(2, 3), 0), "at least 1"),
        (lambda: match_dim(torch.ones(2, 3), 4, mode="pad"), "mode is 'pad'"),
        (lambda: build_prototypes(nn.Identity(), [], 3), "no batch"),
        (lambda: build_prototypes(nn.Identity(), [], 3, on_missing="drop"), "on_missing is 'drop'"),
        (lambda: build_prototypes(lambda x: x * math.nan, [(torch.ones(1, 2), torch.tensor([0]))], 1), "not finite"),
    ],
)
def test_bad_input_says_what_was_found_and_what_is_accepted(make, message):
    with pytest.raises(ValueError, match=message):
        make()
