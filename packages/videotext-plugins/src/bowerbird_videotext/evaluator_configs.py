"""Settings of the evaluators of videos and texts, and of the reranker. Imports pydantic only."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bowerbird.retrieval.configs import Intervals


class DualSoftmaxConfig(BaseModel):
    """``videotext:dual-softmax``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    temperature: float = Field(0.05, gt=0)
    """Divides the similarities: 0.01 to 0.1 for cosines; larger ones change less."""


class _OnVideos(Intervals):
    dataset: str
    """Name of a data set of videos, for example videotext:moving."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the data set."""
    split: str | None = "test"
    """Items that are measured; none: the whole data set."""


class ScoredConfig(_OnVideos):
    """What those have in common that score texts and videos."""

    scores: Literal["embedding", "pair"] = "embedding"
    """embedding: cosines of one vector per video and one per text; pair: the encoder's own score of every pair."""
    batch_size: int = Field(16, ge=1)
    """Videos that are scored at once."""
    text_batch_size: int = Field(256, ge=1)
    """Texts that are encoded, or scored with a batch of videos, at once. Pairs: each batch of texts costs one more pass
    over the videos where the encoder's pair_scores encodes them first."""
    views: int = Field(1, ge=1)
    """Samplings of frames per video; the frames of each are other ones."""
    average: Literal["similarity", "embedding"] = "similarity"
    """What several views are averaged in: similarities, or embeddings before they are brought to length 1."""

    @model_validator(mode="after")
    def _pairs_have_no_embeddings(self) -> Self:
        if self.scores == "pair" and self.average == "embedding" and self.views > 1:
            raise ValueError("scores = 'pair' gives similarities and no embeddings: set average = 'similarity'")
        return self


class VideoRetrievalConfig(ScoredConfig):
    """``videotext:retrieval``."""

    directions: Annotated[tuple[Literal["t2v", "v2t"], ...], Field(min_length=1)] = ("t2v", "v2t")
    """t2v: texts search videos; v2t: videos search texts."""
    captions: Literal["each", "first", "joined"] = "each"
    """Queries of a video with several captions: each of them, only the first, or all as one text."""
    ks: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 5, 10)
    """Ranks of R@k."""
    ties: Literal["official", "optimistic", "average", "pessimistic"] = "official"
    """Place of the right one among equal scores; official: the first for t2v, the middle for v2t."""
    reranker: str | None = None
    """Name of a reranker, such as videotext:dual-softmax: every number is given with it and without."""
    reranker_settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the reranker."""
    rerank_temperature: float | None = Field(None, gt=0)
    """Short for reranker = "videotext:dual-softmax" with this temperature."""

    @model_validator(mode="after")
    def _one_reranker(self) -> Self:
        if self.rerank_temperature is not None and (self.reranker is not None or self.reranker_settings):
            raise ValueError("rerank_temperature is short for a reranker: give it, or reranker and reranker_settings")
        if self.reranker_settings and self.reranker is None:
            raise ValueError("reranker_settings without reranker: name one")
        return self


class MultipleChoiceConfig(ScoredConfig):
    """``videotext:multiple-choice``."""


class QuestionsConfig(_OnVideos):
    """``videotext:qa``."""

    batch_size: int = Field(16, ge=1)
    """Questions that are answered at once."""


class ZeroShotConfig(ScoredConfig):
    """``videotext:zero-shot-actions``."""

    templates: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "{}",
        "a video of {}",
        "a video of a person {}",
        "a clip that shows {}",
    )
    """Prompts of a class; {} is where its name goes."""
    ks: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 5)
    """Numbers of classes among which the right one is looked for."""

    @model_validator(mode="after")
    def _prompts_name_the_class(self) -> Self:
        lacking = [template for template in self.templates if template.count("{}") != 1]
        if lacking:
            raise ValueError(f"templates: {lacking[0]!r} needs one {{}} where the name of the class goes")
        return self
