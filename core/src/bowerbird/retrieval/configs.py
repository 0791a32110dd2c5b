"""Settings of the indexes and the evaluators. Apart from them, so that they are read without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bowerbird.data.benchmark_configs import (
    FacePairsConfig,
    IjbConfig,
    LandmarksConfig,
    MarketConfig,
    RevisitedFiles,
)

Rate = Annotated[float, Field(ge=0, le=1)]
Rank = Annotated[int, Field(ge=1)]


class ExactConfig(BaseModel):
    """``core:exact`` has no settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FaissConfig(BaseModel):
    """``core:faiss``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Literal["flat", "ivf", "hnsw"] = "flat"
    """flat is exact; ivf for more than about 1e5 vectors; hnsw for galleries that hardly change."""
    nlist: int | None = Field(None, ge=1)
    """Inverted lists of ivf. Default: about the square root of the number of vectors."""
    nprobe: int | None = Field(None, ge=1)
    """Lists searched per query. Default: the least that reaches target_recall."""
    m: int = Field(16, ge=2)
    """Links per node of hnsw."""
    ef_construction: int = Field(80, ge=1)
    """Candidates looked at when a node of hnsw is linked."""
    ef_search: int | None = Field(None, ge=1)
    """Candidates kept while hnsw is searched. Default: the least that reaches target_recall."""
    target_recall: float = Field(0.95, gt=0, le=1)
    """Recall@10 on a sample of stored items, the item itself left out."""
    threads: int = Field(1, ge=1)
    """OpenMP threads of one search."""
    device: Literal["cpu", "gpu", "auto"] = "cpu"
    """auto uses a GPU where FAISS sees one; gpu refuses to work without."""
    seed: int = 0
    """Of the samples for training and measuring."""


class Intervals(BaseModel):
    """What the evaluators have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    level: float = Field(0.95, gt=0, lt=1)
    """Coverage of the bootstrap intervals over queries."""
    samples: int = Field(1000, ge=1)
    """Resamples of the bootstrap."""
    seed: int = 0
    """Of the bootstrap."""


class _OnDataset(Intervals):
    dataset: str
    """Name of a data set, for example emoji:styles."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the data set."""


class KNNConfig(_OnDataset):
    """``core:knn``."""

    train_split: str | None = "train"
    """Items that vote."""
    test_split: str | None = "test"
    """Items that are classified; an item that is in both splits does not vote for itself."""
    k: int = Field(20, ge=1)
    """Neighbours that vote."""
    temperature: float = Field(0.07, gt=0)
    """A neighbour's vote weighs exp(cosine / temperature)."""


class _Ranking(_OnDataset):
    query_split: str | None = None
    """Items that are searched for; none: the whole data set."""
    gallery_split: str | None = None
    """Items that are searched. Where it is the query split, every item searches the others."""
    kind: Literal["ap", "ties", "at_k", "trapezoid", "at_r"] = "ap"
    """Form of average precision."""
    ap_k: int | None = Field(None, ge=1)
    """k of at_k; 100 unless given."""
    ks: tuple[int, ...] = (1, 5, 10)
    """Ranks of R@k."""
    tie: Literal["stable", "pessimistic", "optimistic"] = "stable"
    """Order of equal scores."""


class RetrievalConfig(_Ranking):
    """``core:retrieval``."""

    no_positive: Literal["exclude", "zero", "raise"] = "exclude"
    """What a query without a positive in the gallery counts."""


class UpgradeConfig(_Ranking):
    """``core:upgrade``."""

    old: str
    """The old encoder: a run, an exported folder or a name with settings."""
    star: str | None = None
    """A new encoder trained without the old one: the ceiling."""
    k: int = Field(1, ge=1)
    """For flips, a query is right where a positive is among the first k."""
    eps: float = Field(0.01, ge=0)
    """An average precision that falls by more is an AP flip."""


class LandmarksEvaluation(Intervals, LandmarksConfig):
    """``core:gldv2``."""

    split: Literal["private", "public", "test"] = "private"
    """Queries: those of the private or of the public part of the solution, or both (test)."""
    ap_k: int = Field(100, ge=1)
    """mAP@k."""


class RevisitedEvaluation(Intervals, RevisitedFiles):
    """``core:revisited``."""

    ks: tuple[Rank, ...] = (1, 5, 10)
    """Ranks of mP@k."""


class MarketEvaluation(Intervals, MarketConfig):
    """``core:market-1501``."""

    ks: tuple[Rank, ...] = (1, 5, 10)
    """Ranks of CMC@k."""


class FacePairsEvaluation(Intervals, FacePairsConfig):
    """``core:face-pairs``."""

    folds: int = Field(10, ge=2)
    """Consecutive parts of the list; the threshold of one comes from the others."""
    fars: tuple[Rate, ...] = (1e-3,)
    """False acceptance rates."""
    mirror: bool = True
    """Add the vector of the mirrored image to that of the image."""


class IjbEvaluation(Intervals, IjbConfig):
    """``core:ijb``."""

    old: str | None = None
    """An old encoder to be upgraded from: a run, an exported folder or a name with settings."""
    fars: tuple[Rate, ...] = (1e-4, 1e-5, 1e-6)
    """False acceptance rates of 1:1."""
    fpirs: tuple[Rate, ...] = (0.01, 0.1)
    """False positive identification rates of 1:N."""
    ks: tuple[Rank, ...] = (1, 5, 10)
    """Ranks of 1:N."""
    mirror: bool = True
    """Add the vector of the mirrored face to that of the face."""
    detector_score: bool = True
    """Weigh faces by the score of the face detector."""
