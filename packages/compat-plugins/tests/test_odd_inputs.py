"""Every loss at the edges of its inputs: one sample, one class, double and half precision, huge and tiny vectors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from bowerbird_compat.bct import InfluenceLoss, MarginSoftmax, build_prototypes
from bowerbird_compat.bict import ForwardCompatibleLoss, fit_forward_transform
from bowerbird_compat.bt2 import BasisTransformHead, BT2Loss, FeatureCache, compare
from bowerbird_compat.online_backfilling import (
    MetricCompatibleLoss,
    ReverseQueryTransform,
    TopK,
    fit_metric_compatible,
    fit_reverse_transform,
)
from bowerbird_compat.ract import (
    BackfillState,
    ClassLevelCompatibleLoss,
    CompatibleContrastiveLoss,
    CompatibleTripletLoss,
    DistillationLoss,
    FocalDistillationLoss,
    backfill_order,
)
from bowerbird_compat.unibct import PrototypeLoss, PrototypeRefresh, refine_prototypes

CLASSES, SIZE = 5, 7


def rows(seed: int = 3) -> Tensor:
    return torch.randn(CLASSES, SIZE, generator=torch.Generator().manual_seed(seed))


def bt2(new: Tensor, old: Tensor, labels: Tensor) -> Tensor:
    torch.manual_seed(0)
    with torch.autocast("cpu", enabled=False):
        head = BasisTransformHead(SIZE, 4, SIZE, 3, num_classes=CLASSES).to(new.dtype)
    out = head(new)
    return BT2Loss(rows().to(new.dtype))(out, labels, old, torch.ones(len(new), 4, dtype=new.dtype))["total"]


LOSSES = {
    "influence": lambda n, o, y: InfluenceLoss(rows())(n, y),
    "influence, some classes": lambda n, o, y: InfluenceLoss(rows(), {1: 0, 4: 2})(n, y),
    "influence, padded": lambda n, o, y: InfluenceLoss(torch.cat([rows(), rows(4)], 1), normalize=True, scale=64.0)(
        n, y
    ),
    **{
        f"margin {kind}": lambda n, o, y, kind=kind: InfluenceLoss(rows(), margin=MarginSoftmax(kind, 64.0, 0.5))(n, y)
        for kind in ("none", "cosface", "arcface", "arcface_monotone")
    },
    "contrastive": lambda n, o, y: CompatibleContrastiveLoss()(n, o, y),
    "contrastive, all": lambda n, o, y: CompatibleContrastiveLoss(0.01, None)(n, o, y),
    "triplet": lambda n, o, y: CompatibleTripletLoss()(n, o, y),
    "class level": lambda n, o, y: ClassLevelCompatibleLoss(rows())(n, y, rows(5)),
    "distillation": lambda n, o, y: DistillationLoss(rows())(n, o),
    "focal distillation": lambda n, o, y: FocalDistillationLoss()(n, o, y, n @ rows().to(n.dtype).T),
    "prototype": lambda n, o, y: PrototypeLoss(rows(), 16.0, known_classes=torch.tensor([0, 3]))(n, y),
    "forward": lambda n, o, y: ForwardCompatibleLoss(disc="both", temperature=0.01)(n, o, y, rows()),
    "metric compatible": lambda n, o, y: MetricCompatibleLoss(0.01, True, True, TopK(3))(n, o, n, y)["total"],
    "bt2": bt2,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_losses_and_gradients_are_finite_in_the_precision_of_the_embeddings(name, dtype, batch, scale):
    generator = torch.Generator().manual_seed(batch)
    new, old = (scale * torch.randn(batch, SIZE, generator=generator, dtype=dtype) for _ in range(2))
    new.requires_grad_()
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a batch without negatives says so
        loss = LOSSES[name](new, old, labels)
    assert loss.ndim == 0
    assert loss.dtype == dtype
    assert torch.isfinite(loss)
    assert loss >= 0
    loss.backward()
    assert torch.isfinite(new.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_agree_in_both_precisions(name):
    new, old = torch.randn(6, SIZE), torch.randn(6, SIZE)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    single, double = LOSSES[name](new, old, labels), LOSSES[name](new.double(), old.double(), labels)
    torch.testing.assert_close(single.double(), double, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_old_vectors_and_labels_may_come_from_inference_mode(name):
    new = torch.randn(6, SIZE, requires_grad=True)
    with torch.inference_mode():
        old, labels = torch.randn(6, SIZE), torch.tensor([0, 1, 2, 3, 4, 0])
    LOSSES[name](new, old, labels).backward()
    assert torch.isfinite(new.grad).all()


@pytest.mark.parametrize("fit", [fit_forward_transform, fit_reverse_transform, fit_metric_compatible])
def test_transforms_are_fitted_alike_in_and_out_of_inference_mode(fit):
    first, second, labels = torch.randn(12, 5), torch.randn(12, 4), torch.arange(12) % 3
    outside = fit(first, second, labels, steps=3)
    with torch.inference_mode(), torch.no_grad():
        inside = fit(first, second, labels, steps=3)
    for a, b in zip(*[made if isinstance(made, tuple) else (made,) for made in (outside, inside)], strict=True):
        assert torch.equal(a(first), b(first))


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_batch_does_not_matter(name):
    new, old = torch.randn(8, SIZE, dtype=torch.float64), torch.randn(8, SIZE, dtype=torch.float64)
    labels, order = torch.arange(8) % 4, torch.randperm(8)
    torch.testing.assert_close(LOSSES[name](new, old, labels), LOSSES[name](new[order], old[order], labels[order]))


@pytest.mark.parametrize("name", LOSSES)
def test_labels_that_are_no_integers_are_refused(name):
    if name == "distillation":
        return
    with pytest.raises(TypeError, match="integers"):
        LOSSES[name](torch.randn(3, SIZE), torch.randn(3, SIZE), torch.tensor([0.0, 1.0, 2.0]))


def test_ready_cosines_and_labels_give_the_logits_of_embeddings_and_rows():
    embeddings, weight, labels = torch.randn(4, SIZE), rows(), torch.tensor([0, 4, 2, 2])
    head = MarginSoftmax("arcface", 30.0, 0.3)
    cosine = torch.nn.functional.cosine_similarity(embeddings[:, None], weight[None], dim=2)
    torch.testing.assert_close(head(cosine, labels), head(embeddings, weight, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prototypes_of_single_samples_and_of_identical_ones(dtype):
    old, new = torch.randn(4, 3, dtype=dtype), torch.ones(4, 6, dtype=dtype)
    made = refine_prototypes(old, new, torch.tensor([0, 1, 1, 1]))
    unit = torch.nn.functional.normalize(old)
    torch.testing.assert_close(made.weight[0], unit[0])
    torch.testing.assert_close(made.weight[1], torch.nn.functional.normalize(unit[1:].mean(0), dim=0))
    assert made.weight.dtype == dtype


def test_arrays_pairs_and_plain_loaders_are_taken_like_tensors_and_batches():
    vectors, labels = np.random.default_rng(0).normal(size=(6, SIZE)), np.array([0, 0, 0, 1, 1, 1])
    order = backfill_order(vectors, rows())
    assert torch.equal(order, backfill_order(torch.from_numpy(vectors), rows()))
    state = BackfillState(order.numpy(), 2)
    old, new = torch.zeros(6, 3), torch.ones(6, 3)
    assert state.vectors(old, new).any(dim=1).nonzero().flatten().tolist() == sorted(order[:2].tolist())

    cache = FeatureCache.build(lambda inputs: inputs, [(vectors[:4], ["a", "b", "c", "d"]), (vectors[4:], ["e", "f"])])
    expected = torch.nn.functional.normalize(torch.from_numpy(vectors))
    torch.testing.assert_close(cache.get(["f", "a"]), expected[[5, 0]])

    loss = PrototypeLoss(torch.ones(2, SIZE))
    refresh = PrototypeRefresh(loss, torch.as_tensor, [(vectors, labels)], torch.from_numpy(vectors).float())
    assert refresh.on_epoch_start(10)
    refined = refine_prototypes(torch.from_numpy(vectors), torch.from_numpy(vectors), torch.from_numpy(labels))
    torch.testing.assert_close(loss.prototypes, refined.weight.float())


def test_a_random_order_refuses_what_the_other_orders_refuse():
    vectors = torch.randn(4, 3)
    vectors[2, 0] = torch.nan
    for strategy in ("random", "entropy"):
        with pytest.raises(ValueError, match="row 2"):
            backfill_order(vectors, rows()[:, :3], strategy)
        with pytest.raises(ValueError, match="temperature is 0"):
            backfill_order(vectors[:2], rows()[:, :3], strategy, 0.0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_give_a_loss_that_is_computed_in_single_precision(name, dtype):
    generator = torch.Generator().manual_seed(4)
    new, old = (torch.randn(6, SIZE, generator=generator).to(dtype) for _ in range(2))
    new.requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    loss = LOSSES[name](new, old, labels)
    single = LOSSES[name](new.detach().float(), old.float(), labels)
    if name == "bt2":  # its head is made in the precision of the input, and rounds its own weights
        torch.testing.assert_close(loss.float(), single, rtol=2e-2, atol=2e-2)
    else:
        torch.testing.assert_close(loss, single)
    loss.backward()
    assert torch.isfinite(new.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_round_the_logits(name):
    new, old, labels = torch.randn(6, SIZE), torch.randn(6, SIZE), torch.tensor([0, 1, 2, 3, 4, 0])
    plain = LOSSES[name](new, old, labels)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(LOSSES[name](new, old, labels), plain)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_labels_of_any_integer_type_are_taken(name, dtype):
    new, old, labels = torch.randn(5, SIZE), torch.randn(5, SIZE), torch.tensor([0, 4, 2, 2, 1])
    torch.testing.assert_close(LOSSES[name](new, old, labels.to(dtype)), LOSSES[name](new, old, labels))
    torch.testing.assert_close(LOSSES[name](new, old, labels.to(dtype).numpy()), LOSSES[name](new, old, labels))


@pytest.mark.parametrize("name", ["class level", "focal distillation", "forward", "bt2"])
@pytest.mark.parametrize("shift", [-1, 1])
def test_labels_without_a_row_in_a_classifier_that_needs_them_all_are_refused(name, shift):
    new, old, labels = torch.randn(5, SIZE), torch.randn(5, SIZE), torch.arange(5) + shift
    with pytest.raises(ValueError, match=rf"Labels are in {shift}..{4 + shift}; 5 classes"):
        LOSSES[name](new, old, labels)


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_batch_costs_nothing_or_is_refused_but_never_makes_a_loss_that_is_no_number(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            loss = LOSSES[name](torch.randn(0, SIZE), torch.randn(0, SIZE), torch.arange(0))
        except ValueError as error:
            assert "empty" in str(error) or "B at least 1" in str(error)
        else:
            assert loss == 0


def test_tiny_vectors_have_the_cosine_of_their_direction():
    new, old, labels = torch.randn(5, SIZE), torch.randn(5, SIZE), torch.arange(5)
    for align in ("cosine", "mse"):
        lift = ForwardCompatibleLoss(align)
        torch.testing.assert_close(lift(1e-9 * new, 1e-9 * old, labels), lift(new, old, labels))
    torch.testing.assert_close(
        LOSSES["metric compatible"](1e-9 * new, 1e-9 * old, labels), LOSSES["metric compatible"](new, old, labels)
    )
    head = BasisTransformHead(SIZE, 4, SIZE, 3, num_classes=CLASSES)
    loss, out = BT2Loss(rows()), head(new)
    expected = loss(out, labels, old, torch.ones(5, 4))["old"]
    torch.testing.assert_close(loss(out, labels, 1e-9 * old, torch.ones(5, 4))["old"], expected)


def test_prototypes_of_bt2_have_the_size_of_old_vectors():
    out = BasisTransformHead(SIZE, 4, SIZE, 3)(torch.randn(2, SIZE))
    with pytest.raises(ValueError, match=f"prototypes have size {SIZE - 1}.*old_dim is {SIZE}"):
        BT2Loss(rows()[:, :-1])(out, torch.tensor([0, 1]), torch.randn(2, SIZE), torch.randn(2, 4))


def test_prototypes_are_refused_later_for_what_they_are_refused_at_first():
    loss = PrototypeLoss(rows())
    before = loss.prototypes.clone()
    for broken, message in ((rows() * torch.nan, "not finite"), (rows() * torch.tensor([[1.0]] * 4 + [[0.0]]), "zero")):
        with pytest.raises(ValueError, match=message):
            PrototypeLoss(broken)
        with pytest.raises(ValueError, match=message):
            loss.set_prototypes(broken)
    assert torch.equal(loss.prototypes, before)


def test_known_classes_are_class_indices_in_a_tensor_or_a_list():
    new, labels = torch.randn(5, SIZE), torch.arange(5)
    expected = PrototypeLoss(rows(), known_classes=torch.tensor([3, 0]))(new, labels)
    torch.testing.assert_close(PrototypeLoss(rows(), known_classes=[0, 3])(new, labels), expected)
    for wrong in (torch.tensor([True, False, False, True, False]), [], torch.tensor([0.0])):
        with pytest.raises(ValueError, match="class indices"):
            PrototypeLoss(rows(), known_classes=wrong)


def test_refinement_of_vectors_that_are_whole_numbers_is_refused_not_rounded():
    with pytest.raises(ValueError, match="floating-point"):
        refine_prototypes(torch.eye(4).long(), torch.eye(4), torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("value", ["0.1", None, float("nan"), float("inf")])
def test_settings_that_are_no_numbers_are_named(value):
    with pytest.raises(ValueError, match="temperature is"):
        CompatibleContrastiveLoss(temperature=value)
    with pytest.raises(ValueError, match="weight is"):
        InfluenceLoss(rows(), weight=value)
    assert CompatibleContrastiveLoss(temperature=np.array(0.5)).temperature == 0.5


def test_a_reverse_transform_names_the_sizes_it_maps():
    with pytest.raises(ValueError, match=r"\(2, 5\); this transform maps \(batch, 6\) to \(batch, 3\)"):
        ReverseQueryTransform(6, 3)(torch.randn(2, 5))


def test_distances_of_vectors_of_two_precisions_and_of_arrays():
    query, gallery = torch.randn(2, 6), torch.randn(3, 4).double()
    expected = 1 - query[:, :4].double() @ gallery.T
    torch.testing.assert_close(compare(query, gallery, gallery_version="old"), expected)
    torch.testing.assert_close(compare(query.numpy(), gallery.numpy(), gallery_version="old"), expected)


def test_a_cache_is_looked_up_by_the_values_of_its_ids():
    vectors = torch.randn(3, 2)
    for ids in ([5, 7, 9], np.array([5, 7, 9]), torch.tensor([5, 7, 9])):
        cache = FeatureCache(vectors, ids)
        for asked in ([9, 5], np.array([9, 5]), torch.tensor([9, 5])):
            assert torch.equal(cache.get(asked), vectors[[2, 0]])


def test_a_gallery_without_items_has_an_order_and_is_done():
    state = BackfillState([])
    state.advance(3)
    assert state.fraction == 1
    assert state.vectors(torch.ones(0, 2), torch.ones(0, 2)).shape == (0, 2)


@pytest.mark.parametrize("value", [1.5, float("nan"), "3", True])
@pytest.mark.parametrize(
    "make",
    [
        lambda v: TopK(v),
        lambda v: CompatibleContrastiveLoss(topk=v),
        lambda v: BasisTransformHead(9, 5, v, 2),
        lambda v: ReverseQueryTransform(v, 3),
        lambda v: refine_prototypes(rows(), rows(), torch.arange(CLASSES), num_classes=v),
        lambda v: BackfillState(torch.arange(4), v),
        lambda v: InfluenceLoss(rows(), {v: 0}),
        lambda v: fit_forward_transform(rows(), rows(), steps=v),
        lambda v: fit_reverse_transform(rows(), rows(), batch_size=v),
    ],
)
def test_numbers_of_things_are_integers(make, value):
    with pytest.raises(ValueError, match=r"is .*; it must be an integer"):
        make(value)


def test_integers_may_come_as_entries_of_arrays_and_tensors():
    assert CompatibleContrastiveLoss(topk=np.int64(3)).topk == 3
    assert CompatibleContrastiveLoss(topk=torch.tensor(3)).topk == 3
    assert InfluenceLoss(rows(), {np.int64(7): torch.tensor(2)}).old_labels(torch.tensor([7, 0])).tolist() == [2, -1]


@pytest.mark.parametrize("fit", [fit_forward_transform, fit_reverse_transform])
def test_names_of_classes_are_no_labels(fit):
    with pytest.raises(TypeError, match="integers"):
        fit(torch.randn(3, 4), torch.randn(3, 4), ["a", "b", "c"], steps=1)
    fit(torch.randn(3, 4), torch.randn(3, 4), [0, 1, 0], steps=1)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": torch.ones(2, 3)}, "has no 'label'; it has 'image'"),
        ((torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([0, 1])), "pairs"),
        (torch.ones(2, 3), "pairs"),
    ],
)
def test_batches_without_labels_are_named(batch, message):
    with pytest.raises(ValueError, match=message):
        build_prototypes(torch.as_tensor, [batch], 2)
    with pytest.raises(ValueError, match=message):
        PrototypeRefresh(PrototypeLoss(rows()), torch.as_tensor, [batch], rows()).refresh()


def test_an_encoder_that_changes_its_size_is_refused():
    with pytest.raises(ValueError, match="size 3 and then 2"):
        build_prototypes(torch.as_tensor, [(torch.ones(1, 3), np.array([0])), (torch.ones(1, 2), np.array([1]))], 2)
