"""How well an encoder serves a domain that it has not seen: classification and retrieval across domains.

N training or gallery items, Q test items or queries.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import InputError
from bowerbird.protocols import Dataset, EvalContext, Evaluator, Metrics
from bowerbird.retrieval.evaluators import common_labels, knn_votes, summarise
from bowerbird.retrieval.index import exact_search
from bowerbird.retrieval.metrics import PerQuery, RankedList, Relevance, average_precision, cmc
from bowerbird_domain.configs import DomainRetrievalConfig, LeaveOneOutConfig


class LeaveOneOut(Evaluator):
    """Accuracy in every domain of the test items, with labels of other domains only. ``domain:leave-one-out``.

    A test item is classified by its nearest neighbours among the training items of all domains but its own. Where the
    encoder was trained without a domain, and that is the test split, this is its accuracy on the unseen domain; on one
    split with all domains each is left out in turn (for an encoder that was trained elsewhere).
    """

    def __init__(self, config: LeaveOneOutConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: LeaveOneOutConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """``top1`` over all test items, ``top1 DOMAIN``, ``worst domain``, ``mean of domains`` and, with
        ``seen_split``, ``seen``.

        Raises:
            InputError: A domain whose items nobody else can classify, or items without a domain.
        """
        c = self.config
        train = context.dataset(c.dataset, split=c.train_split, **c.settings)
        test = context.dataset(c.dataset, split=c.test_split, **c.settings)
        domains, voters = domains_of(test, c.dataset), domains_of(train, c.dataset)
        right = np.zeros(len(test))
        for domain in np.unique(domains).tolist():
            rows, others = np.flatnonzero(domains == domain), np.flatnonzero(voters != domain)
            if not len(others):
                raise InputError(
                    f"domain:leave-one-out: every item of the split {c.train_split!r} of {c.dataset} is of the domain "
                    f"{domain!r}; its test items need labels of another domain. Take splits with several domains"
                )
            right[rows] = self._right(context, train, others, test, rows)
        values = {"top1": PerQuery(right, np.ones(len(test), bool))}
        values |= by_domain("top1", values["top1"], domains)
        each = [float(value) for name, value in values.items() if name != "top1"]
        more = {"worst domain": min(each), "mean of domains": float(np.mean(each))}
        if c.seen_split is not None:
            seen = context.dataset(c.dataset, split=c.seen_split, **c.settings)
            more["seen"] = float(self._right(context, train, np.arange(len(train)), seen, np.arange(len(seen))).mean())
        return summarise(values, c, more)

    def _right(
        self, context: EvalContext, train: Dataset, voters: NDArray[Any], test: Dataset, rows: NDArray[Any]
    ) -> NDArray[np.float64]:
        """1 where the ``voters`` of ``train`` classify an item in ``rows`` of ``test`` right, else 0."""
        c = self.config
        train_labels, test_labels = common_labels(train, test)
        classes, vote_for = np.unique(train_labels[voters], return_inverse=True)
        hits = exact_search(context.embed(train)[voters], context.embed(test)[rows], c.k)
        votes = knn_votes(hits.ids, 1 - hits.distances, vote_for, len(classes), c.k, c.temperature)
        return (classes[votes.argmax(axis=1)] == test_labels[rows]).astype(np.float64)


class DomainRetrieval(Evaluator):
    """Search across domains: a query finds items of its class in other domains. ``domain:retrieval``."""

    def __init__(self, config: DomainRetrievalConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: DomainRetrievalConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """``mAP`` and ``R@k`` over all queries, and ``mAP DOMAIN`` over the queries of each domain.

        Raises:
            InputError: A domain for whose queries there is no gallery, or no query has a positive; items without a
                domain.
        """
        c = self.config
        queries = context.dataset(c.dataset, split=c.query_split, **c.settings)
        gallery = context.dataset(c.dataset, split=c.gallery_split, **c.settings)
        query_labels, gallery_labels = common_labels(queries, gallery)
        domains, theirs = domains_of(queries, c.dataset), domains_of(gallery, c.dataset)
        query_vectors, gallery_vectors = context.embed(queries), context.embed(gallery)
        found = {name: np.full(len(queries), np.nan) for name in ("mAP", *(f"R@{k}" for k in c.ks))}
        for domain in np.unique(domains).tolist():
            rows, others = np.flatnonzero(domains == domain), np.flatnonzero(theirs != domain)
            if not len(others):
                raise InputError(
                    f"domain:retrieval: every item of the split {c.gallery_split!r} of {c.dataset} is of the domain "
                    f"{domain!r}; its queries need a gallery of another domain. Take splits with several domains"
                )
            ranked = RankedList.from_scores(query_vectors[rows] @ gallery_vectors[others].T)
            relevance = Relevance.from_labels(query_labels[rows], gallery_labels[others])
            found["mAP"][rows] = average_precision(ranked, relevance, no_positive="exclude").values
            at = cmc(ranked, relevance, c.ks, no_positive="exclude").values
            for column, k in enumerate(c.ks):
                found[f"R@{k}"][rows] = at[:, column]
        values = {name: PerQuery(column, ~np.isnan(column)) for name, column in found.items()}
        valid = values["mAP"].num_valid
        return summarise(values | by_domain("mAP", values["mAP"], domains), c, {"num_valid": float(valid)})


def domains_of(dataset: Dataset, name: str) -> NDArray[np.str_]:
    """``(len(dataset),)`` name of every item's domain. Raises ``InputError`` where items have none."""
    if not dataset.domains:
        raise InputError(f"the items of {name!r} have no domain; take a data set that names some, as domain:folders")
    return np.asarray(dataset.domains)[np.asarray(dataset.domain_indices())]


def by_domain(name: str, values: PerQuery, domains: NDArray[np.str_]) -> dict[str, PerQuery]:
    """``"NAME DOMAIN"`` -> the values of that domain's queries; the others are not valid. Left out: domains without."""
    parts = {}
    for domain in np.unique(domains).tolist():
        valid = values.valid & (domains == domain)
        if valid.any():
            parts[f"{name} {domain}"] = PerQuery(np.where(valid, values.values, np.nan), valid)
    return parts
