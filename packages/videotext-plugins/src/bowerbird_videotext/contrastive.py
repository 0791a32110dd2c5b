"""What objectives of pairs share: an encoder with a tokenizer, clips, and one loss over all processes.

B pairs of one process, W processes, P width of the shared space.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from bowerbird import dist
from bowerbird.batch import Batch
from bowerbird.errors import InputError, RecipeError
from bowerbird.protocols import BuildContext, Encoder
from bowerbird_videotext.data_configs import ClipAugmentation
from bowerbird_videotext.dual_encoder import DualEncoder
from bowerbird_videotext.losses import cosine_similarity_matrix
from bowerbird_videotext.video_set import captions_of


class ContrastiveConfig(BaseModel):
    """Settings that all objectives of pairs have."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    temperature: float = Field(default=0.05, gt=0, description="Divides the similarities of the loss.")
    clips: ClipAugmentation = Field(
        default_factory=ClipAugmentation, description="How clips are drawn from videos and augmented."
    )


def opened(encoder: Encoder, context: BuildContext, method: str) -> DualEncoder:
    """``encoder`` with a tokenizer, made of the captions of the training split where it has none.

    Args:
        encoder: A dual encoder.
        context: Of the objective.
        method: Name of the objective, for messages.

    Raises:
        RecipeError: Another encoder, or no data to make a vocabulary of.
    """
    if not isinstance(encoder, DualEncoder):
        raise RecipeError(f"encoder: {method} trains videotext:dual-encoder, not a {type(encoder).__name__}")
    if encoder.tokenizer is None:
        if context.dataset is None:
            raise RecipeError(f"{method}: there are no captions to make a vocabulary of; set encoder.tokenizer")
        encoder.open(captions_of(context.dataset))
    return encoder


def pair_entries(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """``video`` (an ``image`` is a video of one frame) and ``text`` of a batch. Raises ``InputError``."""
    if "text" not in batch or ("video" not in batch and "image" not in batch):
        raise InputError(f"the batch needs video (or image) and text; it has {', '.join(batch) or 'nothing'}")
    return batch["video"] if "video" in batch else batch["image"][:, None], batch["text"]


def pair_similarities(texts: Tensor, videos: Tensor) -> Tensor:
    """Cosines of all texts and all videos of all processes: ``(W B, W B)`` from ``(B, P)`` each.

    The gradient is that of the joint batch: with losses equal in every process, as they are here, the mean of the
    processes' gradients is what one process would have with the whole batch.

    Raises:
        InputError: Not as many texts as videos.
    """
    if len(texts) != len(videos):
        raise InputError(f"{len(texts)} texts and {len(videos)} videos are no pairs")
    return cosine_similarity_matrix(dist.gathered(texts), dist.gathered(videos))


@torch.no_grad()
def pair_accuracy(similarity: Tensor) -> Tensor:
    """Share of texts whose nearest video of the batch is their own."""
    return (similarity.argmax(dim=1) == torch.arange(len(similarity), device=similarity.device)).float().mean()
