"""Re-identification: the authors' numbers, fine-tuning, and the protocol with cameras."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bowerbird.batch import Batch
from bowerbird.errors import InputError, RecipeError
from bowerbird.testing import EvaluatorContract, ObjectiveContract, assert_close
from bowerbird.testing.datasets import SyntheticDataset
from bowerbird.testing.evaluators import SimpleEvalContext
from bowerbird.testing.training import SimpleBuildContext, TinyEncoder
from bowerbird_mim.part_vit import PartViTConfig, PartViTEncoder
from bowerbird_mim.reid import (
    FinetuneConfig,
    FinetuneObjective,
    FusionNeck,
    ReidConfig,
    ReidEvaluation,
    batch_hard_triplet,
    evaluate_reid,
    hardest_distances,
)

SMALL = {"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}


def part_encoder(pooling: str = "cat", num_parts: int = 3, embed_dim: int = 16) -> PartViTEncoder:
    config = PartViTConfig(**SMALL | {"embed_dim": embed_dim}, pooling=pooling, num_parts=num_parts)
    return PartViTEncoder.build(config)


class TestObjective(ObjectiveContract):
    name = "mim:reid-finetune"

    def wrong_batches(self) -> Iterator[tuple[str, Batch]]:
        yield from super().wrong_batches()
        good = self.make_batch()
        yield "a batch of one identity", {**good, "label": torch.zeros_like(good["label"])}


class TestObjectiveOnParts(TestObjective):
    config = {"multi_neck": True}

    def make_encoder(self) -> PartViTEncoder:
        return part_encoder()


class TestEvaluator(EvaluatorContract):
    name = "mim:reid"
    config = {"dataset": "synthetic", "samples": 20}


# ------------------------------------------------------------------------------------------------ official numbers


def test_triplet_loss(golden) -> None:
    values = golden("pass/batch_hard_triplet")
    for kind, margin in (("soft", None), ("margin0.3", 0.3)):
        for scale in ("raw", "norm"):
            features = values["features"].clone().requires_grad_()
            used = torch.nn.functional.normalize(features) if scale == "norm" else features
            farthest, nearest = hardest_distances(used, values["labels"])
            loss = batch_hard_triplet(used, values["labels"], margin)
            loss.backward()
            assert_close(farthest, values[f"dist_ap.{kind}.{scale}"])
            assert_close(nearest, values[f"dist_an.{kind}.{scale}"])
            assert_close(loss, values[f"loss.{kind}.{scale}"])
            assert_close(features.grad, values[f"grad.{kind}.{scale}"])


@pytest.mark.parametrize("mode", ["cat", "mean"])
@pytest.mark.parametrize("kind", ["multi", "single"])
def test_features_before_and_after_normalisation(golden, mode: str, kind: str) -> None:
    values = golden("pass/feature_fusion")
    neck = FusionNeck(part_encoder(mode, embed_dim=6), kind == "multi").double().eval()
    prefix = f"sd.{mode}.{kind}."
    neck.load_state_dict({k.removeprefix(prefix): torch.as_tensor(v) for k, v in values.items() if prefix in k})
    parts = torch.stack([values[f"feat.pt{j}"] for j in (1, 2, 3)], dim=1)
    before, after = neck(values["feat.cls"], parts)
    assert_close(before, values[f"out.{mode}.{kind}.before"])
    assert_close(after, values[f"out.{mode}.{kind}.after"])


def test_cmc_and_map(golden) -> None:
    values = golden("pass/reid_eval")
    names = ("query", "gallery")
    found, mean = evaluate_reid(
        *(values[f"{name}_features"] for name in names),
        *(values[f"{name}_ids"] for name in names),
        *(values[f"{name}_cams"] for name in names),
        max_rank=values["max_rank"],
    )
    assert_close(found, values["cmc"], rtol=1e-6, atol=1e-6)
    assert math.isclose(mean, values["mAP"], rel_tol=1e-9)


# ------------------------------------------------------------------------------------------------ invariants


def test_equal_features_cost_log_two() -> None:
    loss = batch_hard_triplet(torch.full((6, 4), 0.3), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert math.isclose(float(loss), math.log(2), rel_tol=1e-3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), classes=st.integers(2, 4))
def test_the_hardest_distances_are_those_of_a_double_loop(seed: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (9 - classes,), generator=generator)])
    farthest, nearest = hardest_distances(features, labels)
    for i in range(9):
        distances = (features - features[i]).norm(dim=1)
        assert math.isclose(float(farthest[i]), max(1e-6, float(distances[labels == labels[i]].max())), rel_tol=1e-6)
        assert math.isclose(float(nearest[i]), float(distances[labels != labels[i]].min()), rel_tol=1e-6)


def by_hand(
    query: Any, gallery: Any, q_ids: Any, g_ids: Any, q_cams: Any, g_cams: Any
) -> tuple[list[int], list[float]]:
    """Rank of the first right item, and average precision, of every query that has one: in plain loops."""
    firsts, precisions = [], []
    for vector, identity, camera in zip(query, q_ids, q_cams, strict=True):
        vector = vector / np.linalg.norm(vector)
        others = [
            (float(((row / np.linalg.norm(row) - vector) ** 2).sum()), j)
            for j, row in enumerate(gallery)
            if not (g_ids[j] == identity and g_cams[j] == camera)
        ]
        right = [rank for rank, (_, j) in enumerate(sorted(others), start=1) if g_ids[j] == identity]
        if right:
            firsts.append(right[0])
            precisions.append(sum(found / rank for found, rank in enumerate(right, start=1)) / len(right))
    return firsts, precisions


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), cameras=st.integers(2, 4))
def test_the_protocol_is_that_of_plain_loops(seed: int, cameras: int) -> None:
    rng = np.random.default_rng(seed)
    query, gallery = rng.normal(size=(6, 3)), rng.normal(size=(20, 3))
    ids, cams = (rng.integers(4, size=6), rng.integers(4, size=20)), [rng.integers(cameras, size=n) for n in (6, 20)]
    firsts, precisions = by_hand(query, gallery, *ids, *cams)
    found, mean = evaluate_reid(query, gallery, *ids, *cams, max_rank=100)
    assert found.shape == (20,)
    assert np.allclose(found, [np.mean([first <= k for first in firsts]) for k in range(1, 21)])
    assert math.isclose(mean, float(np.mean(precisions)), rel_tol=1e-9)
    assert (np.diff(found) >= 0).all()


def test_a_perfect_ranking_gives_one_and_the_length_of_features_does_not_matter() -> None:
    ids = np.arange(5)
    vectors = np.eye(5)
    scaled = vectors * np.arange(1, 6)[:, None]
    for gallery in (vectors, scaled):
        found, mean = evaluate_reid(vectors, gallery, ids, ids, np.zeros(5, int), np.ones(5, int), max_rank=3)
        assert mean == 1.0 and found.tolist() == [1.0, 1.0, 1.0]


# ------------------------------------------------------------------------------------------------ fine-tuning


def identities(encoder: Any, **config: Any) -> FinetuneObjective:
    return FinetuneObjective.build(FinetuneConfig(**config), encoder, SimpleBuildContext())


def test_the_loss_is_cross_entropy_behind_and_triplet_before_normalisation() -> None:
    objective = identities(part_encoder(), triplet_weight=0.5).train()
    batch = {"image": torch.randn(6, 3, 8, 8), "label": torch.tensor([0, 0, 1, 1, 2, 2])}
    output = objective(batch)
    before = objective.encoder(batch).pooled
    # batch statistics, written out: biased variance, eps 1e-5, scale 1 and shift 0 at the start
    after = (before - before.mean(0)) / (before.var(0, unbiased=False) + 1e-5).sqrt()
    logits = after @ objective.classifier.weight.T
    expected = -logits.log_softmax(1)[torch.arange(6), batch["label"]].mean()
    assert_close(output.parts["classification"], expected, rtol=1e-4, atol=1e-5)
    assert_close(output.total, expected + 0.5 * batch_hard_triplet(before, batch["label"]), rtol=1e-4, atol=1e-5)


def test_the_exported_encoder_is_searched_by_features_before_normalisation() -> None:
    encoder = part_encoder("mean")
    objective = identities(encoder, multi_neck=True)
    assert objective.exported_encoder() is encoder
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert not any("bottleneck" in name and name.endswith("bias") for name in trained)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="multi_neck"):
        identities(TinyEncoder(), multi_neck=True)
    with pytest.raises(InputError, match="multi_neck"):
        identities(part_encoder("class"), multi_neck=True)
    with pytest.raises(RecipeError, match="both weights are 0"):
        identities(TinyEncoder(), classification_weight=0.0, triplet_weight=0.0)


# ------------------------------------------------------------------------------------------------ evaluator, refusals


class Seen(SyntheticDataset):
    """Colours seen by two cameras."""

    def metadata(self) -> Sequence[Any] | None:
        return None


def test_the_evaluator_leaves_out_the_querys_camera() -> None:
    queries, gallery = Seen(12, seed=1), Seen(24, seed=2)
    context = SimpleEvalContext(datasets={"colours/query": queries, "colours/gallery": gallery})
    metrics = ReidEvaluation.build(ReidConfig(dataset="colours", ks=(1, 3), samples=10)).run(context)
    vectors = [context.embed(queries), context.embed(gallery)]
    ids = [np.array(dataset.labels()) for dataset in (queries, gallery)]
    found, mean = evaluate_reid(*vectors, *ids, np.arange(12) % 2, np.arange(24) % 2, max_rank=3)
    assert math.isclose(metrics.summary["mAP"], mean, rel_tol=1e-9)
    assert math.isclose(metrics.summary["CMC@3"], found[2], rel_tol=1e-9)
    assert metrics.per_query["mAP"].shape == (12,)


def test_long_features_in_half_precision_are_ranked_as_in_full() -> None:
    rng = np.random.default_rng(0)
    query, gallery = (torch.from_numpy(600 * rng.normal(size=(n, 64))).half() for n in (5, 12))
    labels = np.arange(5) % 3, np.arange(12) % 3, np.zeros(5, int), np.ones(12, int)
    full = evaluate_reid(query.double(), gallery.double(), *labels)
    for half in ((query, gallery), (query.numpy(), gallery.numpy())):
        found, mean = evaluate_reid(*half, *labels)
        assert (found == full[0]).all() and math.isclose(mean, full[1], rel_tol=1e-9)


def test_what_cannot_be_measured_is_refused() -> None:
    rows, ones = np.eye(3), np.ones(3, int)
    with pytest.raises(ValueError, match="none of the 3 queries has a positive"):
        evaluate_reid(rows, rows, ones, ones, ones, ones)  # everything was seen by the query's own camera
    with pytest.raises(InputError, match=r"gallery_cams has shape \(2,\); expected \(3,\)"):
        evaluate_reid(rows, rows, ones, ones, ones, ones[:2])
    with pytest.raises(InputError, match="row 1 of query has length 0"):
        evaluate_reid(rows * [[1], [0], [1]], rows, ones, ones, ones, ones * 2)
    with pytest.raises(InputError, match="query has 3 columns, gallery 2"):
        evaluate_reid(rows, rows[:, :2] + 1, ones, ones, ones, ones * 2)
    with pytest.raises(InputError, match="max_rank = 0"):
        evaluate_reid(rows, rows, ones, ones, ones, ones * 2, max_rank=0)
    with pytest.raises(InputError, match="all 3 items have one label"):
        batch_hard_triplet(torch.randn(3, 2), torch.ones(3, dtype=torch.int64))
    with pytest.raises(InputError, match="do not fit"):
        batch_hard_triplet(torch.randn(3, 2), torch.ones(2, dtype=torch.int64))
