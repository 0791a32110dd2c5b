"""Accuracy and retrieval across domains, compared with the definition written out by loops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from bowerbird.data import subset
from bowerbird.errors import InputError
from bowerbird.protocols import Dataset, EvalContext
from bowerbird.recipe import build_config
from bowerbird.registry import get_registry
from bowerbird.testing import EvaluatorContract
from bowerbird.testing.datasets import SyntheticDataset
from bowerbird.testing.evaluators import SimpleEvalContext


class Drawn(SyntheticDataset):
    """Items with domains and classes drawn at random, and vectors that say something of both."""

    def __init__(self, count: int, seed: int, domains: int = 3, classes: int = 4) -> None:
        super().__init__(count, classes, seed=seed)
        generator = np.random.default_rng(seed)
        self.domains = [f"d{i}" for i in range(domains)]
        self._labels = generator.integers(classes, size=count).tolist()
        self.of = generator.integers(domains, size=count).tolist()
        anchors = np.random.default_rng(99).standard_normal((classes + domains, 6))
        vectors = anchors[self._labels] + 0.7 * anchors[[classes + d for d in self.of]]
        vectors = vectors + 0.8 * generator.standard_normal((count, 6))
        self.vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def domain_indices(self) -> list[int]:
        return self.of

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "label": self._labels[index], "domain": self.of[index]}


class DrawnContext(SimpleEvalContext):
    def embed(self, dataset: Dataset, encoder: Any = None) -> np.ndarray:
        if isinstance(dataset, Drawn):
            return dataset.vectors
        return dataset.dataset.vectors[dataset.indices]  # type: ignore[attr-defined]


def context() -> EvalContext:
    return DrawnContext(datasets={"x/train": Drawn(60, 0), "x/test": Drawn(45, 1), "x/seen": Drawn(20, 2)})


def run(name: str, where: EvalContext | None = None, **settings: Any) -> Any:
    record = get_registry().get("evaluator", name)
    config = build_config(record, {"dataset": "x", "samples": 50, **settings}, where="test")
    return get_registry().load(record).build(config).run(where or context())


class TestLeaveOneOutContract(EvaluatorContract):
    name = "domain:leave-one-out"
    config: Mapping[str, Any] = {"dataset": "any", "samples": 20, "k": 3}


class TestRetrievalContract(EvaluatorContract):
    name = "domain:retrieval"
    config: Mapping[str, Any] = {"dataset": "any", "samples": 20}


def test_only_items_of_other_domains_vote() -> None:
    train, test = Drawn(60, 0), Drawn(45, 1)
    right = []
    for vector, label, domain in zip(test.vectors, test.labels(), test.of, strict=True):
        cosines = np.where(np.array(train.of) != domain, train.vectors @ vector, -9.0)
        votes = np.zeros(4)
        for i in np.argsort(-cosines, kind="stable")[:5]:
            votes[train.labels()[i]] += np.exp(cosines[i] / 0.1)
        right.append(float(votes.argmax() == label))
    found = run("domain:leave-one-out", k=5, temperature=0.1)
    assert np.array_equal(found.per_query["top1"], right)
    means = [np.mean(np.array(right)[np.array(test.of) == d]) for d in range(3)]
    assert [found.summary[f"top1 d{d}"] for d in range(3)] == pytest.approx(means)
    assert found.summary["worst domain"] == pytest.approx(min(means))
    assert found.summary["mean of domains"] == pytest.approx(np.mean(means))


def test_seen_items_are_classified_by_all_voters() -> None:
    train, seen = Drawn(60, 0), Drawn(20, 2)
    nearest = np.argmax(seen.vectors @ train.vectors.T, axis=1)
    expected = np.mean(np.array(train.labels())[nearest] == np.array(seen.labels()))
    assert run("domain:leave-one-out", k=1, seen_split="seen").summary["seen"] == pytest.approx(expected)


def test_a_query_searches_other_domains_only() -> None:
    train, test = Drawn(60, 0), Drawn(45, 1)
    precisions, first = [], []
    for vector, label, domain in zip(test.vectors, test.labels(), test.of, strict=True):
        others = [i for i in range(60) if train.of[i] != domain]
        order = sorted(others, key=lambda i: -float(train.vectors[i] @ vector))
        hits = np.array([train.labels()[i] == label for i in order])
        precisions.append(np.mean([hits[: r + 1].mean() for r in np.flatnonzero(hits)]))
        first.append(float(hits[0]))
    found = run("domain:retrieval")
    np.testing.assert_allclose(found.per_query["mAP"], precisions, rtol=1e-12)
    np.testing.assert_allclose(found.per_query["R@1"], first)
    assert found.summary["mAP d1"] == pytest.approx(np.mean(np.array(precisions)[np.array(test.of) == 1]))
    assert found.summary["num_valid"] == 45


def test_splits_of_one_domain_are_refused() -> None:
    train, test = Drawn(60, 0), Drawn(45, 1)
    one = subset(train, [i for i in range(60) if train.of[i] == 1])
    where = DrawnContext(datasets={"x/train": one, "x/test": test})
    with pytest.raises(InputError, match=r"every item of the split 'train' of x is of the domain 'd1'"):
        run("domain:leave-one-out", where)
    with pytest.raises(InputError, match=r"every item of the split 'train' of x is of the domain 'd1'"):
        run("domain:retrieval", where)


def test_items_without_a_domain_are_refused() -> None:
    plain = Drawn(20, 0)
    plain.domains = []
    where = DrawnContext(default=plain)
    for name in ("domain:leave-one-out", "domain:retrieval"):
        with pytest.raises(InputError, match="have no domain"):
            run(name, where)
