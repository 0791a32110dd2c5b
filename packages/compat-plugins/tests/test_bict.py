"""``compat:bict``: golden numbers, the forward transform, and the rewrite of stored vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from bowerbird.errors import DataError, InputError, RecipeError, SpaceError
from bowerbird.protocols import BuildContext, TrainedRun
from bowerbird.testing import ObjectiveContract, SimpleBuildContext, TinyEncoder
from bowerbird_compat.bct import BCTConfig, BCTObjective
from bowerbird_compat.bict import (
    ForwardCompatibleLoss,
    ForwardTransform,
    TransformChain,
    VersionedVectors,
    fit_forward_transform,
    upgrade_gallery,
)
from bowerbird_compat.bict_objective import BackwardContrast, BiCTConfig, BiCTObjective
from bowerbird_compat.compatible_losses import CompatibleContrastiveLoss

TIGHT = {"rtol": 1e-9, "atol": 1e-10}
SEEDS = st.integers(0, 2**31 - 1)
invariant = settings(max_examples=25, deadline=None)


def contrast(anchor, target, labels, temperature):
    return CompatibleContrastiveLoss(temperature, topk=None, new_to_new=False)(anchor, target, labels)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(random(*shape, seed=seed)).float()


def rotation(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(size, size, seed=seed)).Q.float()


def made(in_dim: int, out_dim: int, *, seed: int = 0, **options: Any) -> ForwardTransform:
    """With running statistics that are not the first ones."""
    torch.manual_seed(seed)
    transform = ForwardTransform(in_dim, out_dim, **options)
    transform(torch.randn(50, in_dim))
    return transform.eval()


# --------------------------------------------------------------------------------------------------- golden numbers


def test_the_contrastive_backward_loss_at_all_weights_is_that_of_opencompatible(golden):
    g = golden("bict/backward_weight_sweep")
    for i, weight in enumerate(g["lambdas"].tolist()):
        feat = g["feat_new"].clone().requires_grad_()
        base = F.cross_entropy(feat @ g["W_new"].T, g["labels"])
        term = BackwardContrast(weight, float(g["temperature"]))(feat, g["feat_old"], g["labels"])
        (base + term).backward()
        assert_close(base, g["loss_base"], **TIGHT)
        assert_close(term, g["loss_comp_weighted"][i], **TIGHT)
        assert_close(base + term, g["loss_total"][i], **TIGHT)
        assert_close(feat.grad, g["grad_feat"][i], **TIGHT)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_transform_its_losses_and_gradients_are_those_of_the_equations(golden, mode):
    g = golden("bict/forward_transform")
    psi = ForwardTransform(6, 7, hidden=10).double()
    first, norm, _, last = psi.layers
    state = {"W1": first.weight, "b1": first.bias, "W2": last.weight, "b2": last.bias, "bn_weight": norm.weight}
    state |= {"bn_bias": norm.bias, "bn_running_mean": norm.running_mean, "bn_running_var": norm.running_var}
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(g[name])
    assert (norm.eps, norm.momentum) == (float(g["bn_eps"]), float(g["bn_momentum"]))
    psi.train(mode == "train")
    out = psi(g["feat_old"])
    new, labels, weight = g["feat_new"], g["labels"], float(g["lambda_contra"])
    loss = ForwardCompatibleLoss("cosine", "both", float(g["temperature"]), weight)
    total = loss(out, new, labels, g["W_cls_new"])
    total.backward()

    cos = ForwardCompatibleLoss(disc=None)(out, new)
    assert_close(out, g[f"{mode}__upgraded"], **TIGHT)
    assert_close(cos, g[f"{mode}__cos"], **TIGHT)
    assert_close(ForwardCompatibleLoss("mse", None)(out, new), g[f"{mode}__mse_unit"], **TIGHT)
    assert_close(contrast(out, new, labels, float(g["temperature"])), g[f"{mode}__contra"], **TIGHT)
    only = ForwardCompatibleLoss(disc="classifier", weight=2.0)(out, new, labels, g["W_cls_new"])
    assert_close(only - cos, 2 * g[f"{mode}__cls"], **TIGHT)
    assert_close(total, g[f"{mode}__total"], **TIGHT)
    for parameter, name in ((first.weight, "W1"), (last.weight, "W2"), (norm.weight, "bn_weight")):
        assert_close(parameter.grad, g[f"{mode}__grad_{name}"], **TIGHT)
    if mode == "train":
        assert_close(norm.running_mean, g["train__running_mean_after"], **TIGHT)
        assert_close(norm.running_var, g["train__running_var_after"], **TIGHT)


# ------------------------------------------------------------------------------------------------------- the losses


@invariant
@given(SEEDS, st.integers(1, 6), st.integers(1, 8), st.floats(0.1, 50), st.floats(0.1, 50))
def test_alignment_sees_only_directions(seed, batch, dim, ours, theirs):
    a, b = random(batch, dim, seed=seed), random(batch, dim, seed=seed + 1)
    loss = ForwardCompatibleLoss(disc=None)
    assert -1e-12 <= float(loss(a, b)) <= 2 + 1e-12
    assert_close(loss(ours * a, theirs * b), loss(a, b))
    assert_close(loss(ours * a, a), torch.zeros((), dtype=torch.float64))
    assert_close(loss(ours * a, -a), torch.full((), 2.0, dtype=torch.float64))
    assert_close(ForwardCompatibleLoss("mse", None)(ours * a, theirs * b) * dim / 2, loss(a, b))
    assert_close(ForwardCompatibleLoss("mse_raw", None)(a, b), (a - b).square().mean())


@invariant
@given(SEEDS, st.integers(2, 7), st.integers(2, 3), st.floats(0.05, 2))
def test_the_contrast_has_one_positive_and_negatives_of_other_classes(seed, batch, classes, temperature):
    a, t = random(batch, 5, seed=seed), random(batch, 5, seed=seed + 1)
    labels = torch.arange(batch) % classes
    cosine = (F.normalize(a) @ F.normalize(t).T / temperature).exp()
    each = [cosine[i, i] + sum(cosine[i, k] for k in range(batch) if labels[k] != labels[i]) for i in range(batch)]
    expected = -(cosine.diagonal() / torch.stack(each)).log().mean()
    assert_close(contrast(a, t, labels, temperature), expected)


@pytest.mark.parametrize("disc", ["contrastive", "classifier", "both", None])
@pytest.mark.parametrize("align", ["cosine", "mse", "mse_raw"])
def test_no_gradient_reaches_the_new_features_and_the_classifier(align, disc):
    upgraded, new, classifier = (random(4, 3, seed=i).requires_grad_() for i in range(3))
    ForwardCompatibleLoss(align, disc)(upgraded, new, torch.tensor([0, 1, 2, 0]), classifier).backward()
    assert new.grad is None
    assert classifier.grad is None
    assert upgraded.grad.abs().sum() > 0


def test_what_a_loss_needs_and_does_not_get_is_named():
    x, labels = random(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match="needs labels"):
        ForwardCompatibleLoss()(x, x)
    with pytest.raises(ValueError, match="new classifier"):
        ForwardCompatibleLoss(disc="classifier")(x, x, labels)
    with pytest.raises(ValueError, match=r"\(C, 3\)"):
        ForwardCompatibleLoss(disc="both")(x, x, labels, random(5, 4))
    with pytest.raises(ValueError, match="equal"):
        ForwardCompatibleLoss()(x, random(5, 3), labels)
    with pytest.raises(TypeError):
        ForwardCompatibleLoss()(x, x, labels.float())
    for wrong in ({"align": "l2"}, {"disc": "triplet"}, {"temperature": 0.0}, {"weight": -1.0}):
        with pytest.raises(InputError, match=str(next(iter(wrong.values())))):
            ForwardCompatibleLoss(**wrong)
    with pytest.raises(InputError, match="temperature=0"):
        BackwardContrast(1.0, 0.0)


# ---------------------------------------------------------------------------------------------------- the transform


@invariant
@given(
    SEEDS, st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.sampled_from(["batch", "layer", None]),
    st.booleans(),
)  # fmt: skip
def test_a_vector_is_lifted_whatever_else_is_in_the_batch(seed, in_dim, out_dim, depth, norm, residual):
    out_dim = in_dim if residual else out_dim
    psi = made(in_dim, out_dim, seed=seed, hidden=5, depth=depth, norm=norm, residual=residual)
    x = random(7, in_dim, seed=seed).float()
    order = torch.randperm(7)
    whole = psi(x)
    assert whole.shape == (7, out_dim)
    assert_close(psi(x[order]), whole[order])
    assert_close(torch.cat([psi(x[i : i + 1]) for i in range(7)]), whole)
    assert sum(isinstance(m, nn.Linear) for m in psi.modules()) == depth


def test_a_residual_transform_begins_as_the_identity_and_hidden_is_wide_by_default():
    x = unit(5, 6)
    assert torch.equal(ForwardTransform(6, 6, residual=True).eval()(x), x)
    assert ForwardTransform(3, 6).layers[0].out_features == 24


def test_a_saved_transform_is_the_same_transform(tmp_path):
    psi = made(4, 6, hidden=5, depth=3, source="old", target="new")
    psi.save(tmp_path / "psi.safetensors")
    again = ForwardTransform.load(tmp_path / "psi.safetensors")
    x = unit(3, 4)
    assert torch.equal(again(x), psi(x))
    assert (again.source, again.target, again.settings) == ("old", "new", psi.settings)
    (tmp_path / "psi.safetensors").write_bytes(b"not this")
    with pytest.raises(DataError, match=r"psi\.safetensors"):
        ForwardTransform.load(tmp_path / "psi.safetensors")
    with pytest.raises(DataError, match="nothing"):
        ForwardTransform.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_dim": 0}, "in_dim=0"), ({"depth": 0}, "depth=0"), ({"norm": "group"}, "batch, layer, None"),
        ({"residual": True}, "equal sizes"),
    ],
)  # fmt: skip
def test_settings_of_a_transform_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ForwardTransform(**{"in_dim": 3, "out_dim": 4, **options})


# ------------------------------------------------------------------------------------------------------- its training


def test_a_linear_transform_undoes_a_rotation_and_keeps_every_ranking():
    old = unit(300, 6)
    new = old @ rotation(6)
    psi = fit_forward_transform(old, new, depth=1, steps=800, lr=0.02, batch_size=128, weight_decay=0)
    lifted = F.normalize(psi(old))
    assert float(ForwardCompatibleLoss(disc=None)(lifted, new)) < 1e-6
    assert_close(new[:40] @ lifted.T, old[:40] @ old.T, rtol=0, atol=2e-3)


def clusters(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Old vectors that scatter, new vectors that agree, of the same items; labels."""
    labels = torch.arange(240) % 8
    old = F.normalize(random(8, 6, seed=seed)[labels] + 0.4 * random(240, 6, seed=seed + 1))
    new = F.normalize(random(8, 10, seed=seed + 2)[labels] + 0.1 * random(240, 10, seed=seed + 3))
    return old.float(), new.float(), labels


@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_training_lifts_old_vectors_to_new_ones_of_items_not_seen(norm):
    old, new, labels = clusters()
    before = old.clone(), new.clone()
    psi = fit_forward_transform(
        old[:160], new[:160], labels[:160], hidden=32, norm=norm, steps=200, lr=3e-3, batch_size=64
    )
    assert torch.equal(old, before[0])
    assert torch.equal(new, before[1])
    cosine = F.cosine_similarity(psi(old[160:]), new[160:])
    assert cosine.mean() > 0.8
    assert not psi.training
    assert not any(p.requires_grad for p in psi.parameters())


def test_training_is_reproducible_and_leaves_global_randomness_and_the_classifier_alone():
    old, new, labels = clusters()
    classifier = random(8, 10).float().requires_grad_()
    kept = classifier.detach().clone()
    options: dict[str, Any] = {"hidden": 8, "epochs": 2, "batch_size": 100, "classifier": classifier}
    state = torch.get_rng_state()
    first, again = (
        fit_forward_transform(old, new, labels, loss=ForwardCompatibleLoss(disc="both"), **options) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    other = fit_forward_transform(old, new, labels, loss=ForwardCompatibleLoss(disc="both"), seed=1, **options)
    assert torch.equal(first(old), again(old))
    assert not torch.equal(first(old), other(old))
    assert torch.equal(classifier, kept)
    assert classifier.grad is None
    # 240 items in batches of 100: three steps an epoch; batch norm counts those before its statistics are frozen
    assert int(first.layers[1].num_batches_tracked) == 3
    assert int(fit_forward_transform(old, new, freeze_norm_after=1.0, **options).layers[1].num_batches_tracked) == 6


def test_what_cannot_be_trained_on_is_refused():
    old, new, labels = clusters()
    with pytest.raises(ValueError, match=r"239 old and 240 new"):
        fit_forward_transform(old[1:], new, labels)
    with pytest.raises(ValueError, match="needs labels"):
        fit_forward_transform(old, new, loss=ForwardCompatibleLoss())
    with pytest.raises(InputError, match="not finite"):
        fit_forward_transform(old * torch.nan, new)
    with pytest.raises(InputError, match="at least 2 vectors"):
        fit_forward_transform(old[:1], new[:1])
    for wrong in ({"lr": 0.0}, {"batch_size": 0}, {"warmup": 1.0}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}( is |=){next(iter(wrong.values()))}"):
            fit_forward_transform(old, new, **wrong)
    assert fit_forward_transform(old.numpy(), new.numpy(), labels.numpy(), steps=1).out_dim == 10


# ------------------------------------------------------------------------------------------------------- the rewrite


def test_a_rewrite_in_chunks_is_a_rewrite_at_once_and_a_second_run_does_nothing():
    vectors, psi = unit(23, 4).numpy(), made(4, 6)
    stores = [VersionedVectors(vectors, "old") for _ in range(3)]
    reports = [
        upgrade_gallery(store, psi, from_version="old", to_version="new", batch_size=size)
        for store, size in zip(stores, (1, 5, 100), strict=True)
    ]
    assert [report.transformed for report in reports] == [23, 23, 23]
    expected = F.normalize(psi(torch.from_numpy(vectors))).detach().numpy()
    for store in stores:
        np.testing.assert_allclose(store.read(range(23)), expected, atol=1e-6)
        assert set(store.versions()) == {"new"}
    once = stores[0].read(range(23))
    report = upgrade_gallery(stores[0], psi, from_version="old", to_version="new")
    assert (report.transformed, report.already, report.skipped) == (0, 23, {})
    assert np.array_equal(stores[0].read(range(23)), once)


class Interrupted(VersionedVectors):
    """Fails at the third write."""

    writes = 0

    def write(self, positions: Any, vectors: Any, version: Any) -> None:
        self.writes += 1
        if self.writes == 3:
            raise OSError("disk full")
        super().write(positions, vectors, version)


def test_an_interrupted_rewrite_goes_on_where_it_stopped():
    vectors, psi = unit(20, 4).numpy(), made(4, 4)
    store = Interrupted(vectors, 1)
    with pytest.raises(OSError, match="disk full"):
        upgrade_gallery(store, psi, from_version=1, to_version=2, batch_size=4)
    assert store.versions().count(2) == 8
    with pytest.raises(InputError, match="8 items already"):
        upgrade_gallery(store, psi, from_version=1, to_version=2, resume=False)
    report = upgrade_gallery(store, psi, from_version=1, to_version=2, batch_size=4)
    assert (report.transformed, report.already) == (12, 8)
    whole = VersionedVectors(vectors, 1)
    upgrade_gallery(whole, psi, from_version=1, to_version=2)
    np.testing.assert_allclose(store.read(range(20)), whole.read(range(20)), atol=1e-6)


def test_items_of_other_versions_are_counted_and_never_lifted():
    store = VersionedVectors(unit(5, 4).numpy(), "v2")
    store.add(unit(3, 9, seed=1).numpy(), "v1")
    store.add(unit(2, 6, seed=2).numpy(), "v3")
    report = upgrade_gallery(store, made(4, 6), from_version="v2", to_version="v3")
    assert (report.transformed, report.already, report.skipped) == (5, 2, {"v1": 3})
    assert np.array_equal(store.read([5, 6, 7]), unit(3, 9, seed=1).numpy())
    assert np.array_equal(store.read([8, 9]), unit(2, 6, seed=2).numpy())


def test_a_dry_run_says_what_would_be_done_and_writes_nothing():
    store, psi = VersionedVectors(unit(40, 4).numpy(), 1), made(4, 6)
    dry = upgrade_gallery(store, psi, from_version=1, to_version=2, dry_run=True)
    assert np.array_equal(store.read(range(40)), unit(40, 4).numpy())
    assert dry == upgrade_gallery(store, psi, from_version=1, to_version=2)


def test_the_identity_leaves_the_gallery_as_it_was():
    store = VersionedVectors(unit(9, 5).numpy(), 1)
    upgrade_gallery(store, ForwardTransform(5, 5, residual=True), from_version=1, to_version=2)
    np.testing.assert_allclose(store.read(range(9)), unit(9, 5).numpy(), atol=1e-7)


def test_a_chain_is_one_upgrade_after_the_other():
    first, second = made(4, 6, source="a", target="b"), made(6, 5, seed=1, source="b", target="c")
    chain = TransformChain([first, second])
    composed = chain.compose(["a", "b", "c"])
    assert (composed.source, composed.target) == ("a", "c")
    step_by_step, at_once = (VersionedVectors(unit(12, 4).numpy(), "a") for _ in range(2))
    upgrade_gallery(step_by_step, first, from_version="a", to_version="b")
    upgrade_gallery(step_by_step, second, from_version="b", to_version="c")
    upgrade_gallery(at_once, composed, from_version="a", to_version="c")
    np.testing.assert_allclose(at_once.read(range(12)), step_by_step.read(range(12)), atol=1e-6)
    with pytest.raises(InputError, match="'a' -> 'c'; there are: 'a' -> 'b', 'b' -> 'c'"):
        chain.compose(["a", "c"])
    with pytest.raises(InputError, match="at least two"):
        chain.compose(["a"])
    numbered = TransformChain({(1, 2): made(4, 6), (2, 3): made(6, 5, seed=1)}).compose([1, 2, 3])
    assert_close(numbered(unit(12, 4)), composed(unit(12, 4)))


def test_the_wrong_direction_is_refused():
    psi, store = made(4, 4, source="old", target="new"), VersionedVectors(unit(3, 4).numpy(), "new")
    with pytest.raises(SpaceError, match=r"from 'old'.*from 'new'"):
        upgrade_gallery(store, psi, from_version="new", to_version="old")
    with pytest.raises(SpaceError, match=r"to 'new'.*to 'newer'"):
        upgrade_gallery(store, psi, from_version="old", to_version="newer")
    with pytest.raises(SpaceError, match="made for 'old' -> 'new'"):
        TransformChain({("new", "old"): psi})
    with pytest.raises(InputError, match="lift twice"):
        upgrade_gallery(store, psi, from_version="new", to_version="new")
    with pytest.raises(InputError, match=r"lifts \(batch, 4\)"):
        upgrade_gallery(VersionedVectors(unit(3, 5).numpy(), "old"), psi, from_version="old", to_version="new")


def test_vectors_that_cannot_be_lifted_stop_the_rewrite_before_they_are_written():
    vectors = unit(6, 4).numpy()
    vectors[4] = np.nan
    store = VersionedVectors(vectors, 1)
    with pytest.raises(DataError, match="item 4"):
        upgrade_gallery(store, made(4, 4), from_version=1, to_version=2, batch_size=2)
    assert store.versions() == (2, 2, 2, 2, 1, 1)


def test_a_gallery_unlike_the_training_vectors_is_reported():
    old, new, _ = clusters()
    psi = fit_forward_transform(old, new, hidden=16, steps=200, lr=3e-3, batch_size=240, freeze_norm_after=1.0)
    report = upgrade_gallery(VersionedVectors(old.numpy(), 1), psi, from_version=1, to_version=2)
    assert report.mean_shift == pytest.approx(0, abs=0.1)
    assert report.variance_ratio == pytest.approx(1, abs=0.1)
    assert report.warnings == ()
    elsewhere = F.normalize(old * 0.1 + unit(1, 6, seed=9))
    report = upgrade_gallery(VersionedVectors(elsewhere.numpy(), 1), psi, from_version=1, to_version=2)
    assert len(report.warnings) == 1
    assert report.variance_ratio is not None
    assert report.variance_ratio < 0.5
    few = upgrade_gallery(VersionedVectors(elsewhere[:9].numpy(), 1), psi, from_version=1, to_version=2)
    assert few.mean_shift is None


# ------------------------------------------------------------------------------------------------------ the objective


class TestContract(ObjectiveContract):
    name = "compat:bict"
    config = {"old_run": "old", "measure": False}

    def make_context(self) -> BuildContext:
        torch.manual_seed(1)
        old = TrainedRun(path=Path("old"), encoder=TinyEncoder(5), objective_state={}, classes=(), recipe={})
        classes = [f"class-{i}" for i in range(self.num_classes)]
        return SimpleBuildContext(classes=classes, runs={"old": old}, batches=[self.make_batch(seed=9)])

    def wrong_batches(self):  # type: ignore[no-untyped-def]
        unread = "a batch without 'index'" if self.config.get("backward") != "contrastive" else ""
        return ((what, batch) for what, batch in super().wrong_batches() if what != unread)


class TestContractOfTheContrastiveForm(TestContract):
    config = {
        "old_run": "old",
        "measure": False,
        "backward": "contrastive",
        "temperature": 0.1,
        "classifier": "cosface",
    }


def objective(build: Callable[..., Any], config: Any) -> Any:
    contract = TestContract()
    torch.manual_seed(0)
    return build(config, contract.make_encoder(), contract.make_context())


def test_the_influence_form_is_bct():
    batch = TestContract().make_batch()
    ours = objective(BiCTObjective.build, BiCTConfig(old_run="old", influence_weight=3.0))
    theirs = objective(BCTObjective.build, BCTConfig(old_run="old", influence_weight=3.0))
    assert torch.equal(ours(batch).total, theirs(batch).total)


@pytest.mark.parametrize("backward", ["influence", "contrastive"])
def test_with_weight_zero_it_is_free_training(backward):
    batch = TestContract().make_batch()
    ours = objective(BiCTObjective.build, BiCTConfig(old_run="old", influence_weight=0.0, backward=backward))
    logits = ours.classifier(ours.encoder(batch).pooled)
    total = ours(batch).total
    assert torch.equal(total, F.cross_entropy(logits, batch["label"]))
    grads = torch.autograd.grad(total, list(ours.parameters()))
    free = torch.autograd.grad(F.cross_entropy(logits, batch["label"]), list(ours.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(grads, free, strict=True))


def test_the_contrastive_form_compares_with_the_old_vector_of_the_same_item():
    contract = TestContract()
    ours = objective(BiCTObjective.build, BiCTConfig(old_run="old", backward="contrastive", influence_weight=2.0))
    batch = contract.make_batch(seed=9)  # the items of the training split, in another order
    order = torch.randperm(12)
    mixed = {key: value[order] for key, value in batch.items()}
    old = contract.make_context().load_run("old").encoder(mixed).pooled
    embeddings = ours.encoder(mixed).pooled
    out = ours(mixed)
    expected = 2 * contrast(embeddings[:, :5], old, mixed["label"], 0.01)
    assert_close(out.parts["contrast"], expected)
    assert_close(out.total, F.cross_entropy(ours.classifier(embeddings), mixed["label"]) + expected)


def test_an_objective_without_an_old_model_or_classes_is_refused():
    with pytest.raises(RecipeError, match=r"compat:bict.*objective\.old_run"):
        objective(BiCTObjective.build, BiCTConfig())
    with pytest.raises(RecipeError, match=r"compat:bict.*no classes"):
        BiCTObjective.build(BiCTConfig(old_run="old"), TinyEncoder(), SimpleBuildContext(classes=()))
