"""Evaluation protocols for an encoder: k-nearest-neighbour classification, retrieval, and the upgrade from an old
encoder.

``run`` returns means with bootstrap intervals (``NAME.low``, ``NAME.high``) and the value of every query. Labels of two
splits are compared by class name where the data set names its classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bowerbird.errors import InputError
from bowerbird.protocols import Dataset, Encoder, EvalContext, Evaluator, Metrics
from bowerbird.retrieval.compatibility import Embeddings, RetrievalData, compatibility_report
from bowerbird.retrieval.index import exact_search
from bowerbird.retrieval.intervals import bootstrap_interval
from bowerbird.retrieval.metrics import PerQuery, RankedList, Relevance, average_precision, cmc

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bowerbird.retrieval.configs import Intervals, KNNConfig, RetrievalConfig, UpgradeConfig


class KNN(Evaluator):
    """Weighted k-NN classification (Wu et al., arXiv 1805.01978; settings of DINO, arXiv 2104.14294). ``core:knn``."""

    def __init__(self, config: KNNConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: KNNConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """``top1`` and, with more than five classes, ``top5``.

        Raises:
            InputError: No training item is left to vote, or no class of the test split is in the training split.
        """
        c = self.config
        train = context.dataset(c.dataset, split=c.train_split, **c.settings)
        test = context.dataset(c.dataset, split=c.test_split, **c.settings)
        train_labels, test_labels = common_labels(train, test)
        classes, vote_for = np.unique(train_labels, return_inverse=True)
        if not np.isin(test_labels, classes).any():
            raise InputError(f"splits {c.train_split!r} and {c.test_split!r} of {c.dataset} have no class in common.")
        hits = exact_search(context.embed(train), context.embed(test), c.k + 1)
        own = Relevance.from_labels(test_labels, train_labels, query_ids=test.item_ids, gallery_ids=train.item_ids)
        votes = knn_votes(hits.ids, 1 - hits.distances, vote_for, len(classes), c.k, c.temperature, own.self_ids)
        order = np.argsort(-votes, axis=1, kind="stable")
        right = classes[order] == test_labels[:, None]
        names = ["top1", "top5"] if len(classes) > 5 else ["top1"]
        outcomes = {name: right[:, : int(name[3:])].any(axis=1).astype(np.float64) for name in names}
        everything = np.ones(len(test), bool)
        return summarise({name: PerQuery(values, everything) for name, values in outcomes.items()}, c)


def knn_votes(
    neighbours: NDArray[np.int64],
    cosines: NDArray[np.floating],
    classes: NDArray[np.int64],
    num_classes: int,
    k: int,
    temperature: float,
    own: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """``(Q, C)`` sums of ``exp(cosine / temperature)`` over the k nearest neighbours, by their class.

    Args:
        neighbours: ``(Q, K)`` positions in ``classes``, nearest first, ``-1`` padded; K = k + 1 where ``own`` is given.
        cosines: ``(Q, K)``.
        classes: ``(N,)`` class index of every training item.
        num_classes: C.
        k: Neighbours that vote.
        temperature: Smaller = the nearest decide.
        own: ``(Q,)`` position of the query itself among the training items, ``-1`` where it is not; it has no vote.
    """
    counts = neighbours >= 0
    if own is not None:
        counts &= neighbours != own[:, None]
    counts &= np.cumsum(counts, axis=1) <= k
    if not counts.any(axis=1).all():
        raise InputError("a test item has no neighbour among the training items; nothing can vote.")
    # The largest cosine of a row is 1 at most; subtracting 1 keeps exp in range and changes no comparison.
    weight = np.where(counts, np.exp((np.where(counts, cosines, 0) - 1) / temperature), 0)
    votes = np.zeros((len(neighbours), num_classes))
    np.add.at(votes, (np.arange(len(neighbours))[:, None], classes[neighbours]), weight)
    return votes


class Retrieval(Evaluator):
    """Ranking metrics of one encoder: queries and gallery from two splits, or every item against the others.

    ``core:retrieval``.
    """

    def __init__(self, config: RetrievalConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: RetrievalConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """``mAP`` and ``R@k``, with the number of valid queries.

        Raises:
            InputError: No query has a positive in the gallery.
        """
        c = self.config
        queries, gallery, relevance = _task(context, c)
        vectors = _embed(context, queries, gallery)
        ranked = RankedList.from_scores(vectors.queries @ vectors.gallery.T)
        switches: dict[str, Any] = {"tie": c.tie, "no_positive": c.no_positive}
        at = cmc(ranked, relevance, c.ks, **switches)
        values = {"mAP": average_precision(ranked, relevance, c.kind, c.ap_k, **switches)}
        values |= {f"R@{k}": PerQuery(at.values[:, column], at.valid) for column, k in enumerate(c.ks)}
        return summarise(values, c, {"num_valid": float(at.num_valid)})


class Upgrade(Evaluator):
    """The upgrade from an old encoder to the evaluated one: self and cross tests, flips, gains. ``core:upgrade``."""

    def __init__(self, config: UpgradeConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: UpgradeConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """The summary of ``compatibility_report`` with intervals, and per query every metric and every flip (-1, 0, 1).

        Where the old encoder has another width there is no cross test (new queries on the old gallery).
        """
        from bowerbird.encoders import load_encoder

        c = self.config
        queries, gallery, relevance = _task(context, c)
        others = {"old": c.old} | ({} if c.star is None else {"star": c.star})
        vectors = {name: _embed(context, queries, gallery, load_encoder(ref).module) for name, ref in others.items()}
        report = compatibility_report(
            vectors["old"],
            _embed(context, queries, gallery),
            vectors.get("star"),
            data=RetrievalData(relevance),
            kind=c.kind,
            ap_k=c.ap_k,
            k=c.k,
            ks=c.ks,
            eps=c.eps,
            tie=c.tie,
        )
        values = {f"{pair} {name}": value for pair, row in report.metrics.items() for name, value in row.items()}
        metrics = summarise(values, c, report.summary())
        changes = {
            f"{name} flip": np.where(counted.valid, counted.change, np.nan) for name, counted in report.flips.items()
        }
        compatible = {f"compatible {name}": float(yes) for name, yes in report.compatible.items()}
        return Metrics({**metrics.summary, **compatible}, {**metrics.per_query, **changes})


def _task(context: EvalContext, c: RetrievalConfig | UpgradeConfig) -> tuple[Dataset, Dataset | None, Relevance]:
    """Queries, gallery (``None``: the queries themselves) and what is right: the set's own truth, or the class."""
    queries = context.dataset(c.dataset, split=c.query_split, **c.settings)
    if c.gallery_split == c.query_split:
        return queries, None, Relevance.from_labels(queries.labels(), queries.labels(), exclude_self=True)
    gallery = context.dataset(c.dataset, split=c.gallery_split, **c.settings)
    own = queries.relevance(gallery)
    if own is not None:
        return queries, gallery, own
    query_labels, gallery_labels = common_labels(queries, gallery)
    relevance = Relevance.from_labels(
        query_labels, gallery_labels, query_ids=queries.item_ids, gallery_ids=gallery.item_ids
    )
    return queries, gallery, relevance


def _embed(
    context: EvalContext, queries: Dataset, gallery: Dataset | None, encoder: Encoder | None = None
) -> Embeddings:
    query_vectors = context.embed(queries, encoder)
    return Embeddings(query_vectors, query_vectors if gallery is None else context.embed(gallery, encoder))


def common_labels(first: Dataset, second: Dataset) -> tuple[NDArray[Any], NDArray[Any]]:
    """The labels of both; where their classes have names and differ, the names, so that labels can be compared."""
    labels = [np.asarray(dataset.labels()) for dataset in (first, second)]
    if list(first.classes) != list(second.classes) and len(first.classes) and len(second.classes):
        labels = [np.asarray(d.classes)[values] for d, values in zip((first, second), labels, strict=True)]
    return labels[0], labels[1]


def summarise(
    values: Mapping[str, PerQuery],
    c: Intervals,
    more: Mapping[str, float] | None = None,
) -> Metrics:
    """Means with their intervals; numbers that are undefined are left out."""
    summary: dict[str, float] = {}
    for name, value in values.items():
        interval = bootstrap_interval(value, level=c.level, samples=c.samples, seed=c.seed)
        summary |= {name: interval.mean, f"{name}.low": interval.low, f"{name}.high": interval.high}
    summary |= {name: value for name, value in (more or {}).items() if math.isfinite(value)}
    return Metrics(summary, {name: value.values for name, value in values.items()})
