"""The field's own protocols as evaluators: Google Landmarks v2, revisited Oxford and Paris, Market-1501, face pairs and
IJB. Each reads a local copy of its set (``bowerbird.data``).

To compare an old encoder with a new one on the first three, use ``core:upgrade`` with the data set's name: it asks the
set for the same ground truth. ``core:ijb`` takes the old encoder itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bowerbird.data.benchmark_configs import (
    FacePairsConfig,
    IjbConfig,
    LandmarksConfig,
    MarketConfig,
    RevisitedFiles,
)
from bowerbird.data.dataset import Dataset
from bowerbird.data.views import Mirrored
from bowerbird.errors import InputError
from bowerbird.protocols import Encoder, EvalContext, Evaluator, Metrics
from bowerbird.retrieval.evaluators import summarise
from bowerbird.retrieval.index import exact_search
from bowerbird.retrieval.metrics import PerQuery, RankedList, average_precision, cmc, revisited_protocol
from bowerbird.retrieval.verification import (
    combine_galleries,
    fold_accuracy,
    identification_at_fpir,
    pair_scores,
    template_features,
    verification_at_fpr,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydantic import BaseModel

    from bowerbird.data.faces import FacePairs
    from bowerbird.data.ijb import Ijb, Templates
    from bowerbird.data.revisited import Revisited
    from bowerbird.retrieval.configs import (
        FacePairsEvaluation,
        IjbEvaluation,
        LandmarksEvaluation,
        MarketEvaluation,
        RevisitedEvaluation,
    )


class LandmarksBenchmark(Evaluator):
    """mAP@100 of Google Landmarks v2 retrieval (arXiv 2004.01804). ``core:gldv2``."""

    def __init__(self, config: LandmarksEvaluation) -> None:
        self.config = config

    @classmethod
    def build(cls, config: LandmarksEvaluation) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """``mAP@k`` and ``R@k``. Queries search the whole index, of which only the first k ranks are kept."""
        c = self.config
        settings = _of(c, LandmarksConfig)
        queries = context.dataset("core:gldv2", split=c.split, **settings)
        index = context.dataset("core:gldv2", split="index", **settings)
        relevance = queries.relevance(index)
        assert relevance is not None, "splits of queries have answers"
        ranked = RankedList.from_hits(exact_search(context.embed(index), context.embed(queries), c.ap_k))
        values = {f"mAP@{c.ap_k}": average_precision(ranked, relevance, "at_k", c.ap_k)}
        ks = [k for k in (1, 5, 10) if k <= c.ap_k]
        return summarise(values | _columns("R", ks, cmc(ranked, relevance, ks)), c)


class RevisitedBenchmark(Evaluator):
    """mAP and mP@k of revisited Oxford or Paris, all three set-ups (arXiv 1803.11285). ``core:revisited``."""

    def __init__(self, config: RevisitedEvaluation) -> None:
        self.config = config

    @classmethod
    def build(cls, config: RevisitedEvaluation) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """``mAP easy``, ``mP@1 easy`` and so on for ``medium`` and ``hard``."""
        c = self.config
        settings = _of(c, RevisitedFiles)
        queries: Revisited = context.dataset("core:revisited", split="query", **settings)  # type: ignore[assignment]
        gallery = context.dataset("core:revisited", split="gallery", **settings)
        truth = queries.truth
        ranked = RankedList.from_scores(context.embed(queries) @ context.embed(gallery).T)
        values: dict[str, PerQuery] = {}
        for name, result in revisited_protocol(ranked, truth.easy, truth.hard, truth.junk, c.ks).items():
            values[f"mAP {name}"] = result.ap
            values |= {f"{key} {name}": value for key, value in _columns("mP", c.ks, result.precision).items()}
        return summarise(values, c)


class MarketBenchmark(Evaluator):
    """mAP and CMC of Market-1501, single query (Zheng et al., ICCV 2015). ``core:market-1501``."""

    def __init__(self, config: MarketEvaluation) -> None:
        self.config = config

    @classmethod
    def build(cls, config: MarketEvaluation) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """``mAP`` and ``CMC@k`` of queries that another camera has seen."""
        c = self.config
        settings = _of(c, MarketConfig)
        queries = context.dataset("core:market-1501", split="query", **settings)
        gallery = context.dataset("core:market-1501", split="gallery", **settings)
        relevance = queries.relevance(gallery)
        assert relevance is not None, "Market-1501 has its own ground truth"
        ranked = RankedList.from_scores(context.embed(queries) @ context.embed(gallery).T)
        at = cmc(ranked, relevance, c.ks)
        values = {"mAP": average_precision(ranked, relevance)} | _columns("CMC", c.ks, at)
        return summarise(values, c, {"num_valid": float(at.num_valid)})


class FacePairsBenchmark(Evaluator):
    """Accuracy on a verification set such as LFW, threshold from the other folds. ``core:face-pairs``."""

    def __init__(self, config: FacePairsEvaluation) -> None:
        self.config = config

    @classmethod
    def build(cls, config: FacePairsEvaluation) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """``accuracy`` over pairs, and ``TAR@FAR`` where there are pairs of one person and of two."""
        c = self.config
        faces: FacePairs = context.dataset("core:face-pairs", **_of(c, FacePairsConfig))  # type: ignore[assignment]
        vectors = context.embed(faces)
        if c.mirror:
            vectors = vectors + context.embed(Mirrored(faces))
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not norms.all():
            raise InputError(f"the vectors of image {int(norms.argmin())} and of its mirror image cancel out.")
        vectors = vectors / norms
        scores = np.einsum("pd,pd->p", vectors[0::2], vectors[1::2])
        right = fold_accuracy(scores, faces.same, c.folds).astype(np.float64)
        more = _tar(scores, faces.same, c.fars) if faces.same.any() and not faces.same.all() else {}
        return summarise({"accuracy": PerQuery(right, np.ones(len(right), bool))}, c, more)


class IjbBenchmark(Evaluator):
    """1:1 verification and, where its files are there, 1:N identification of IJB-B or IJB-C. ``core:ijb``."""

    def __init__(self, config: IjbEvaluation) -> None:
        self.config = config

    @classmethod
    def build(cls, config: IjbEvaluation) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """``TAR@FAR=...``; for 1:N ``rank-k`` and ``TPIR@FPIR=...``.

        With an ``old`` encoder the same of ``old/old``, and of ``new/old`` where both have one width: the first
        template of a pair, and the galleries, by the old encoder.
        """
        c = self.config
        faces: Ijb = context.dataset("core:ijb", **_of(c, IjbConfig))  # type: ignore[assignment]
        mirrored = Mirrored(faces) if c.mirror else None
        new, ids = self._features(context, faces, mirrored, None)
        tests = {"": (new, new)}
        if c.old is not None:
            from bowerbird.encoders import load_encoder

            old, _ = self._features(context, faces, mirrored, load_encoder(c.old).module)
            tests["old/old "] = (old, old)
            if old.shape == new.shape:
                tests["new/old "] = (new, old)
        pairs = faces.pairs()
        first, second = np.searchsorted(ids, pairs[:, 0]), np.searchsorted(ids, pairs[:, 1])
        groups = faces.identification()
        summary: dict[str, float] = {}
        values: dict[str, PerQuery] = {}
        for name, (query, gallery) in tests.items():
            scores = pair_scores(gallery, query, first, second)
            summary |= {f"{name}{key}": value for key, value in _tar(scores, pairs[:, 2], c.fars).items()}
            if groups is not None:
                rates, hits = self._identify(query, gallery, ids, groups)
                summary |= {f"{name}{key}": value for key, value in rates.items()}
                values[f"{name}rank-1"] = hits
        return summarise(values, c, summary)

    def _features(
        self, context: EvalContext, faces: Ijb, mirrored: Dataset | None, encoder: Encoder | None
    ) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
        return template_features(
            context.embed(faces, encoder),
            faces.templates,
            faces.media,
            flipped=None if mirrored is None else context.embed(mirrored, encoder),
            detector_score=faces.scores.astype(np.float32) if self.config.detector_score else None,
        )

    def _identify(
        self,
        query: NDArray[np.floating],
        gallery: NDArray[np.floating],
        ids: NDArray[np.int64],
        groups: tuple[Templates, Templates, Templates],
    ) -> tuple[dict[str, float], PerQuery]:
        probes = groups[2]
        found = [
            identification_at_fpir(
                query[np.searchsorted(ids, probes.templates)] @ gallery[np.searchsorted(ids, group.templates)].T,
                probes.subjects,
                group.subjects,
                self.config.fpirs,
                self.config.ks,
            )
            for group in groups[:2]
        ]
        both = combine_galleries(found[0], found[1])
        rates = {f"rank-{k}": value for k, value in both.accuracy.items()}
        rates |= {f"TPIR@FPIR={rate:g}": float(t) for rate, t in zip(self.config.fpirs, both.tpir, strict=True)}
        ranks = found[0].ranks + found[1].ranks  # the galleries have different subjects: one of the two is 0
        right = np.where(ranks > 0, ranks == 1, np.nan)
        return rates, PerQuery(right, ranks > 0)


def _of(config: BaseModel, part: type[BaseModel]) -> dict[str, Any]:
    """The settings of the data set among those of the evaluator."""
    return {name: getattr(config, name) for name in part.model_fields}


def _columns(name: str, ks: Any, at: PerQuery) -> dict[str, PerQuery]:
    return {f"{name}@{k}": PerQuery(at.values[:, column], at.valid) for column, k in enumerate(ks)}


def _tar(scores: NDArray[Any], same: NDArray[Any], fars: tuple[float, ...]) -> Mapping[str, float]:
    found = verification_at_fpr(scores, same, fars)
    return {f"TAR@FAR={far:g}": float(rate) for far, rate in zip(fars, found.tpr, strict=True)}
