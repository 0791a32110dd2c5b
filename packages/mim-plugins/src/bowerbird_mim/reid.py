"""Re-identification: a network with part tokens fine-tuned on identities, and the protocol that judges it.

Fine-tuning as in TransReID (He et al., ICCV 2021, arXiv 2102.04378) and PASS (arXiv 2203.03931): features before batch
normalisation are compared (triplet loss, search), features after it are classified. The protocol is that of Market-1501
(Zheng et al., ICCV 2015): a query does not search pictures of its identity from its own camera.

B batch, D width, J parts, F width of the fused feature, C identities, Q queries, N gallery items.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data.dataset import Dataset
from bowerbird.errors import InputError, RecipeError
from bowerbird.objectives.softmax import accuracy, class_count
from bowerbird.protocols import BuildContext, Encoder, EvalContext, Evaluator, LossOutput, Metrics, Objective
from bowerbird.retrieval.configs import Intervals
from bowerbird.retrieval.evaluators import summarise
from bowerbird.retrieval.metrics import PerQuery, RankedList, Relevance, average_precision, cmc
from bowerbird_mim.part_vit import PartViTEncoder, fuse_part_features
from bowerbird_mim.precision import at_least_float32

# ------------------------------------------------------------------------------------------------ triplet loss


def hardest_distances(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance of every item to its farthest item of the same label (itself included) and to its nearest of
    another: two ``(B,)``. Squares are clamped at 1e-12.

    Args:
        features: ``(B, D)``, compared as they are; normalise them first if lengths shall not count.
        labels: int64 ``(B,)``.

    Raises:
        InputError: Shapes that do not fit, or all items have one label.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise InputError(
            f"features {tuple(features.shape)} and labels {tuple(labels.shape)} do not fit: expected (B, D) and (B,)"
        )
    if not torch.compiler.is_compiling() and (labels == labels[:1]).all():
        raise InputError(
            f"all {len(labels)} items have one label: nothing is a negative. Batches need several identities "
            "(train.batch_size above train.items_per_class)"
        )
    features = at_least_float32(features)
    with torch.autocast(features.device.type, enabled=False):
        squares = features.square().sum(dim=1)
        distances = (squares[:, None] + squares - 2 * features @ features.T).clamp_min(1e-12).sqrt()
    same = labels[:, None] == labels
    farthest = distances.masked_fill(~same, -torch.inf).max(dim=1).values
    nearest = distances.masked_fill(same, torch.inf).min(dim=1).values
    return farthest, nearest


def batch_hard_triplet(features: Tensor, labels: Tensor, margin: float | None = None) -> Tensor:
    """Triplet loss of the hardest positive and negative of every item (Hermans et al., arXiv 1703.07737): a scalar.

    With a margin the mean of ``max(0, margin + d_positive - d_negative)``; without one the soft margin, the mean of
    ``log(1 + exp(d_positive - d_negative))``. Arguments and errors as ``hardest_distances``.
    """
    farthest, nearest = hardest_distances(features, labels)
    if margin is None:
        return F.softplus(farthest - nearest).mean()
    return (farthest - nearest + margin).clamp_min(0).mean()


# ------------------------------------------------------------------------------------------------ fine-tuning


class FusionNeck(nn.Module):
    """Fused features before and after batch normalisation; names as in the authors' code (``bottleneck``, ...).

    Args:
        encoder: ``mim:part-vit``, or any encoder of the hook: its embedding then is the one token.
        multi_neck: Every token has its own normalisation before the same fusion; else the fused feature has one.

    Raises:
        InputError: ``multi_neck`` for an encoder whose embedding is not fused.
    """

    def __init__(self, encoder: Encoder, multi_neck: bool = False) -> None:
        super().__init__()
        self.mode = encoder.fusion if isinstance(encoder, PartViTEncoder) else None
        self.num_parts, dim = 0, encoder.embed_dim
        if multi_neck:
            if not isinstance(encoder, PartViTEncoder) or encoder.fusion is None:
                raise InputError(
                    "multi_neck normalises every part token by itself: it needs the encoder mim:part-vit with pooling "
                    "'cat' or 'mean'"
                )
            self.num_parts, dim = encoder.vit.num_parts, encoder.vit.embed_dim
        self.bottleneck = _neck(dim)
        for part in range(1, self.num_parts + 1):
            self.add_module(f"bottleneck_{part}", _neck(dim))

    def forward(self, cls: Tensor, parts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Before and after: two ``(B, F)``, of class token ``(B, D)`` and part tokens ``(B, J, D)``."""
        if self.mode is None:
            return cls, self.bottleneck(cls)
        assert parts is not None
        before = fuse_part_features(cls, parts, self.mode)
        if not self.num_parts:
            return before, self.bottleneck(before)
        necks = [getattr(self, f"bottleneck_{part}") for part in range(1, self.num_parts + 1)]
        normalised = torch.stack([neck(part) for neck, part in zip(necks, parts.unbind(1), strict=True)], dim=1)
        return before, fuse_part_features(self.bottleneck(cls), normalised, self.mode)


def _neck(dim: int) -> nn.BatchNorm1d:
    """Batch normalisation whose shift is never trained: the classifier behind it has no bias either."""
    neck = nn.BatchNorm1d(dim)
    neck.bias.requires_grad_(False)
    return neck


class FinetuneConfig(BaseModel):
    """Settings of ``mim:reid-finetune``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    multi_neck: bool = Field(default=False, description="Normalise every token by itself before the fusion.")
    margin: float | None = Field(
        default=None, ge=0, description="Of the triplet loss; without it the soft margin of the paper."
    )
    classification_weight: float = Field(default=1.0, ge=0, description="Of the cross-entropy over identities.")
    triplet_weight: float = Field(default=1.0, ge=0, description="Of the batch-hard triplet loss.")


class FinetuneObjective(Objective):
    """``mim:reid-finetune``: cross-entropy after batch normalisation, batch-hard triplet before it.

    The exported encoder is the fine-tuned one: features before the normalisation are searched. Batches need several
    items of an identity: ``train.items_per_class``.
    """

    def __init__(self, encoder: Encoder, num_classes: int, config: FinetuneConfig) -> None:
        super().__init__()
        self.encoder, self.config = encoder, config
        self.neck = FusionNeck(encoder, config.multi_neck)
        self.classifier = nn.Linear(encoder.embed_dim, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    @classmethod
    def build(cls, config: FinetuneConfig, encoder: Encoder, context: BuildContext) -> Self:
        if not config.classification_weight and not config.triplet_weight:
            raise RecipeError("mim:reid-finetune: both weights are 0, nothing would be learned")
        return cls(encoder, class_count(context, "mim:reid-finetune"), config)

    def forward(self, batch: Batch) -> LossOutput:
        images, labels = batch["image"], batch["label"]
        if isinstance(self.encoder, PartViTEncoder) and self.encoder.fusion is not None:
            before, after = self.neck(*self.encoder.vit(images))
        else:
            before, after = self.neck(self.encoder(batch).pooled)
        logits = self.classifier(after)
        classification = F.cross_entropy(logits.float(), labels)
        triplet = batch_hard_triplet(before, labels, self.config.margin)
        total = self.config.classification_weight * classification + self.config.triplet_weight * triplet
        parts = {"classification": classification, "triplet": triplet}
        return LossOutput(total=total, parts=parts, stats={"accuracy": accuracy(logits, labels)})


# ------------------------------------------------------------------------------------------------ protocol


def evaluate_reid(
    query: ArrayLike,
    gallery: ArrayLike,
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    query_cams: ArrayLike,
    gallery_cams: ArrayLike,
    max_rank: int = 50,
) -> tuple[NDArray[np.float64], float]:
    """CMC and mAP by the protocol of Market-1501, single query, without re-ranking.

    Features are brought to unit length and ranked by squared Euclidean distance; equal distances keep the order of the
    gallery. For each query the gallery items of its identity *and* its camera are left out. Queries without a right
    item are not counted.

    Args:
        query, gallery: ``(Q, D)`` and ``(N, D)``.
        query_ids, gallery_ids: Identities: integers, ``(Q,)`` and ``(N,)``; -1 in the gallery marks distractors.
        query_cams, gallery_cams: Cameras: integers, likewise.
        max_rank: Ranks of the CMC; at most N are given.

    Returns:
        ``cmc`` ``(min(max_rank, N),)``: entry r - 1 is the share of queries with a right item among the first r; and
        the mean of the average precisions, in [0, 1].

    Raises:
        InputError: No query has a right item in the gallery, shapes that do not fit, a feature of length 0.
    """
    if max_rank < 1:
        raise InputError(f"max_rank = {max_rank}: expected at least 1")
    queries, items = _unit_rows(query, "query"), _unit_rows(gallery, "gallery")
    if queries.shape[1] != items.shape[1]:
        raise InputError(f"query has {queries.shape[1]} columns, gallery {items.shape[1]}: they must be equal")
    ids = {"query_ids": query_ids, "query_cams": query_cams, "gallery_ids": gallery_ids, "gallery_cams": gallery_cams}
    known = {name: np.asarray(value) for name, value in ids.items()}
    for name, array in known.items():
        expected = len(queries) if name.startswith("query") else len(items)
        if array.shape != (expected,):
            raise InputError(f"{name} has shape {array.shape}; expected ({expected},), one per row of the features")
    squares = (queries**2).sum(axis=1)[:, None] + (items**2).sum(axis=1)
    ranked = RankedList.from_distances(squares - 2 * queries @ items.T)
    relevance = Relevance.from_labels(
        known["query_ids"], known["gallery_ids"], query_cams=known["query_cams"], gallery_cams=known["gallery_cams"]
    )
    at = cmc(ranked, relevance, range(1, min(max_rank, len(items)) + 1))
    return at.mean(), float(average_precision(ranked, relevance))


def _unit_rows(features: ArrayLike, name: str) -> NDArray[np.floating[Any]]:
    if isinstance(features, Tensor):
        features = at_least_float32(features.detach()).cpu()
    rows = np.asarray(features)
    if rows.dtype == np.float16:  # squares above 65,504 would be infinite
        rows = rows.astype(np.float32)
    if rows.ndim != 2 or not len(rows):
        raise InputError(f"{name} has shape {rows.shape}; expected (number of items, D), at least one item")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and norms.all()):
        row = int(np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))[0])
        raise InputError(f"row {row} of {name} has length {norms[row, 0]}: it cannot be brought to unit length")
    return rows / norms


class ReidConfig(Intervals):
    """Settings of ``mim:reid``."""

    dataset: str
    """Name of a data set with identities and cameras, for example mim:composite-people."""
    query_split: str | None = "query"
    """Pictures that are searched for."""
    gallery_split: str | None = "gallery"
    """Pictures that are searched."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the data set."""
    ks: tuple[int, ...] = (1, 5, 10)
    """Ranks of CMC@k."""


class ReidEvaluation(Evaluator):
    """``mim:reid``: mAP and CMC where pictures of the same identity from the query's own camera do not count.

    The data set either has this ground truth itself (``relevance``, as core:market-1501), or its items say the identity
    in ``label`` and the camera in ``domain``.
    """

    def __init__(self, config: ReidConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: ReidConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """``mAP`` and ``CMC@k`` with intervals, and the number of queries that another camera has seen.

        Raises:
            InputError: The data set has no cameras, or no query has a right item from another camera.
        """
        c = self.config
        queries = context.dataset(c.dataset, split=c.query_split, **c.settings)
        gallery = context.dataset(c.dataset, split=c.gallery_split, **c.settings)
        relevance = queries.relevance(gallery)
        if relevance is None:
            relevance = _by_domain(queries, gallery, c.dataset)
        ranked = RankedList.from_scores(context.embed(queries) @ context.embed(gallery).T)
        at = cmc(ranked, relevance, c.ks)
        values = {"mAP": average_precision(ranked, relevance)}
        values |= {f"CMC@{k}": PerQuery(at.values[:, column], at.valid) for column, k in enumerate(c.ks)}
        return summarise(values, c, {"num_valid": float(at.num_valid)})


def _by_domain(queries: Dataset, gallery: Dataset, name: str) -> Relevance:
    if "domain" not in queries[0]:
        raise InputError(f"mim:reid: the items of {name!r} have no domain (camera); core:retrieval needs none")
    cameras = [np.array([dataset[i]["domain"] for i in range(len(dataset))]) for dataset in (queries, gallery)]
    return Relevance.from_labels(
        np.asarray(queries.labels()), np.asarray(gallery.labels()), query_cams=cameras[0], gallery_cams=cameras[1]
    )
