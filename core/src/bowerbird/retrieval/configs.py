"""Settings of the indexes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ExactConfig(BaseModel):
    """``core:exact`` has no settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FaissConfig(BaseModel):
    """``core:faiss``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
