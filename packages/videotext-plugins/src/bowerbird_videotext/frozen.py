"""``videotext:frozen``: contrastive training of a dual encoder on pairs of videos and captions.

Bain et al., "Frozen in Time", ICCV 2021, arXiv 2104.00650. Every video of a batch that is not a caption's own is its
negative, and the other way round. The baseline of MCQ, MILES and MAC.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field

from bowerbird.batch import Batch
from bowerbird.errors import InputError
from bowerbird.protocols import BuildContext, Encoder, ItemTransform, LossOutput, Objective
from bowerbird_videotext.contrastive import ContrastiveConfig, opened, pair_accuracy, pair_entries, pair_similarities
from bowerbird_videotext.dual_encoder import DualEncoder
from bowerbird_videotext.losses import max_margin_loss, symmetric_info_nce
from bowerbird_videotext.transforms import ClipTransform


class FrozenConfig(ContrastiveConfig):
    """Settings of ``videotext:frozen``."""

    loss: Literal["info-nce", "max-margin"] = Field(
        default="info-nce", description="Cross-entropy over the batch, or a margin between pairs and others."
    )
    margin: float = Field(default=0.2, gt=0, description="Of loss = 'max-margin'.")


class FrozenObjective(Objective):
    """Symmetric cross-entropy of cosines over the pairs of a batch, or a max-margin loss.

    Args:
        encoder: With its tokenizer.
        temperature: Of the cross-entropy.
        loss: ``info-nce`` or ``max-margin``.
        margin: Of ``max-margin``.
        views: What makes clips in the processes that read the data; ``None`` where only tensors come.
    """

    encoder: DualEncoder

    def __init__(
        self,
        encoder: DualEncoder,
        *,
        temperature: float = 0.05,
        loss: Literal["info-nce", "max-margin"] = "info-nce",
        margin: float = 0.2,
        views: ItemTransform | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0 or not margin > 0:
            raise InputError(f"temperature = {temperature} and margin = {margin}: expected above 0")
        if loss not in ("info-nce", "max-margin"):
            raise InputError(f"loss = {loss!r}: expected info-nce or max-margin")
        self.encoder = encoder
        self.temperature, self.loss, self.margin, self.views = temperature, loss, margin, views

    @classmethod
    def build(cls, config: FrozenConfig, encoder: Encoder, context: BuildContext) -> Self:
        """Raises ``RecipeError`` for another encoder, and where there are no captions to make a vocabulary of."""
        dual = opened(encoder, context, "videotext:frozen")
        return cls(
            dual,
            temperature=config.temperature,
            loss=config.loss,
            margin=config.margin,
            views=ClipTransform(dual.preprocessing, dual.frames, config.clips),
        )

    def item_transform(self) -> ItemTransform | None:
        return self.views

    def forward(self, batch: Batch) -> LossOutput:
        """Reads ``video (B, T, 3, H, W)`` (or ``image``) and ``text``."""
        video, text = pair_entries(batch)
        similarity = pair_similarities(self.encoder.encode_text(text), self.encoder.encode_video(video))
        if self.loss == "info-nce":
            total = symmetric_info_nce(similarity, self.temperature)
        else:
            total = max_margin_loss(similarity, self.margin)
        return LossOutput(total=total, stats={"batch_accuracy": pair_accuracy(similarity)})
