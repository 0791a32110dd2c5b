"""mc-BEiT: several visual tokens may be right for a hidden patch, and similar patches share their choices.

Li, Ge, Yi, Hu, Shan, Duan: mc-BEiT: Multi-choice Discretization for Image BERT Pre-training, ECCV 2022 (arXiv
2203.15371). Encoder, mask token and head are those of ``bowerbird_mim.beit``; target, loss and masks differ.

N batch, L patches, V vocabulary size, D width, M the masked positions of the whole batch.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bowerbird.batch import Batch
from bowerbird.errors import InputError
from bowerbird.protocols import BuildContext, Encoder, ItemTransform, LossOutput
from bowerbird_mim.beit import (
    MaskedTokenConfig,
    MaskedTokenModel,
    MaskedTokenObjective,
    TokenTargets,
    load_parts,
    share_of_masked,
)
from bowerbird_mim.precision import at_least_float32

__all__ = [
    "McBEiTConfig",
    "McBEiTObjective",
    "mean_perplexity",
    "multi_choice_loss",
    "patch_similarity",
    "refine_choices",
    "soft_choices",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------ targets and loss


def soft_choices(logits: Tensor, temperature: float) -> Tensor:
    """The tokenizer's distribution over tokens, softened: ``(N, V, rows, columns)`` to ``(N, L, V)``, row by row.

    Args:
        logits: Of the tokenizer, of pictures without masks.
        temperature: tau, above 0; 4 in the paper, towards 0 the most likely token alone.

    Raises:
        InputError: Not four dimensions, or a temperature that is not above 0.
    """
    _check_temperature("temperature", temperature)
    if logits.ndim != 4:
        raise InputError(f"logits have shape {tuple(logits.shape)}; expected (N, V, rows, columns)")
    return (at_least_float32(logits) / temperature).softmax(dim=1).flatten(2).transpose(1, 2)


def patch_similarity(features: Tensor, temperature: float = 1.0) -> Tensor:
    """W ``(N, L, L)``: softmax over j of the cosine of patches i and j of a picture, over ``temperature``.

    Every row sums to 1. Cosines lie in [-1, 1]: at temperature 1 the largest weight is at most e^2 times the smallest.

    Raises:
        InputError: Not three dimensions, or a temperature that is not above 0.
    """
    _check_temperature("similarity_temperature", temperature)
    if features.ndim != 3:
        raise InputError(f"features have shape {tuple(features.shape)}; expected (N, L, D)")
    directions = F.normalize(at_least_float32(features), dim=-1)
    return (directions @ directions.transpose(1, 2) / temperature).softmax(dim=-1)


def refine_choices(
    choices: Tensor,
    features: Tensor,
    refine_weight: float = 0.2,
    similarity_temperature: float = 1.0,
    detach_similarity: bool = False,
) -> Tensor:
    """Choices mixed with those of similar patches of the same picture: ``(N, L, V)``, rows sum to 1.

    omega W q + (1 - omega) q, with W of ``patch_similarity`` over all patches, masked ones and the patch itself
    included. In full precision also under autocast.

    Args:
        choices: q ``(N, L, V)``, rows sum to 1.
        features: ``(N, L, D)``: tokens after the final norm, before the head.
        refine_weight: omega, in [0, 1], on the *refined* term as in the official code (0.2). The weight of the
            tokenizer's own choice is 1 - omega.
        similarity_temperature: tau_s, above 0.
        detach_similarity: Treat W as given. By default, as in the official code, gradients flow through it.

    Raises:
        InputError: A value outside its range, or shapes that differ.
    """
    if not 0 <= refine_weight <= 1:
        raise InputError(f"refine_weight = {refine_weight}: expected a share from 0 to 1")
    _check_temperature("similarity_temperature", similarity_temperature)
    if choices.ndim != 3 or features.ndim != 3 or choices.shape[:2] != features.shape[:2]:
        raise InputError(
            f"choices {tuple(choices.shape)} and features {tuple(features.shape)} do not fit: expected (N, L, V) and "
            "(N, L, D)"
        )
    with torch.autocast(choices.device.type, enabled=False):
        choices = at_least_float32(choices)
        weights = patch_similarity(features.detach() if detach_similarity else features, similarity_temperature)
        return torch.lerp(choices, weights.to(choices.dtype) @ choices, refine_weight)


def multi_choice_loss(logits: Tensor, choices: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy with soft targets: summed over the vocabulary, mean over the masked positions; a scalar.

    Args:
        logits: ``(N, L, V)`` of the model.
        choices: ``(N, L, V)``, rows sum to 1.
        mask: bool ``(N, L)``, true at masked positions.

    Raises:
        InputError: Shapes that differ, or no masked position.
    """
    if logits.ndim != 3 or logits.shape != choices.shape or mask.shape != logits.shape[:2]:
        raise InputError(
            f"logits {tuple(logits.shape)}, choices {tuple(choices.shape)} and mask {tuple(mask.shape)} do not fit: "
            "expected (N, L, V), (N, L, V) and (N, L)"
        )
    chosen = mask.bool()
    return _soft_cross_entropy(logits[chosen], choices[chosen])


def _soft_cross_entropy(logits: Tensor, choices: Tensor) -> Tensor:
    """Of ``(M, V)`` and ``(M, V)``."""
    if not torch.compiler.is_compiling() and not len(logits):
        raise InputError("mask has no masked position: there is nothing to predict")
    return -(choices * at_least_float32(logits).log_softmax(dim=-1)).sum(dim=-1).mean()


def mean_perplexity(choices: Tensor) -> Tensor:
    """exp of the entropy, averaged over all rows of ``(..., V)``: 1 for single choices, V for uniform ones."""
    return torch.special.entr(choices).sum(dim=-1).exp().mean()


def _check_temperature(name: str, value: float) -> None:
    if not value > 0:
        raise InputError(f"{name} = {value}: expected a temperature above 0")


# ------------------------------------------------------------------------------------------------ objective


class McBEiTConfig(MaskedTokenConfig):
    """Settings of ``mim:mc-beit``."""

    mask: Literal["random", "block"] = Field(default="random", description="Single patches, or rectangles.")
    color_jitter: float = Field(
        default=0.0, ge=0, le=1, description="Largest change of brightness, contrast and saturation."
    )
    temperature: float = Field(
        default=4.0, gt=0, description="Softens the tokenizer's choices; match it to the scale of its logits."
    )
    warmup_temperature: float | None = Field(
        default=None, gt=0, description="Temperature of the first epoch; by default temperature."
    )
    warmup_epochs: int = Field(default=30, ge=0, description="Epochs from warmup_temperature to temperature, linearly.")
    refine_weight: float = Field(
        default=0.2, ge=0, le=1, description="Share of the choices of similar patches in the target."
    )
    similarity_temperature: float = Field(default=1.0, gt=0, description="Of the softmax over similar patches.")
    detach_similarity: bool = Field(
        default=False, description="No gradient through the similarity of patches; the official code lets it flow."
    )


class McBEiTObjective(MaskedTokenObjective):
    """``mim:mc-beit``. What is exported is what ``mim:beit`` exports.

    Args:
        tokenizer: Frozen from now on.
        temperature: tau of the soft choices after the warm-up.
        model: The network that is trained.
        warmup_temperature: tau of the first epoch; ``None``: ``temperature``.
        warmup_epochs: Epochs over which tau goes linearly from one to the other.
        refine_weight, similarity_temperature, detach_similarity: See ``refine_choices``.
        views: What makes the entries of a batch.

    Raises:
        InputError: The tokenizer does not fit the model, or a value is outside its range.
    """

    def __init__(
        self,
        tokenizer: TokenTargets,
        temperature: float = 4.0,
        *,
        model: MaskedTokenModel,
        warmup_temperature: float | None = None,
        warmup_epochs: int = 30,
        refine_weight: float = 0.2,
        similarity_temperature: float = 1.0,
        detach_similarity: bool = False,
        views: ItemTransform | None = None,
    ) -> None:
        super().__init__(tokenizer, model=model, views=views)
        for name, value in (("temperature", temperature), ("similarity_temperature", similarity_temperature)):
            _check_temperature(name, value)
        if not 0 <= refine_weight <= 1:
            raise InputError(f"refine_weight = {refine_weight}: expected a share from 0 to 1")
        if warmup_epochs < 0:
            raise InputError(f"warmup_epochs = {warmup_epochs}: expected 0 or more")
        first = temperature if warmup_temperature is None else warmup_temperature
        _check_temperature("warmup_temperature", first)
        self.final_temperature, self.first_temperature, self.warmup_epochs = temperature, first, warmup_epochs
        self.refine_weight, self.similarity_temperature = refine_weight, similarity_temperature
        self.detach_similarity = detach_similarity
        self.on_epoch_start(0)

    @classmethod
    def build(cls, config: McBEiTConfig, encoder: Encoder, context: BuildContext) -> Self:
        tokenizer, model, views = load_parts(config, encoder, context, mask=config.mask, jitter=config.color_jitter)
        return cls(
            tokenizer,
            config.temperature,
            model=model,
            warmup_temperature=config.warmup_temperature,
            warmup_epochs=config.warmup_epochs,
            refine_weight=config.refine_weight,
            similarity_temperature=config.similarity_temperature,
            detach_similarity=config.detach_similarity,
            views=views,
        )

    def on_epoch_start(self, epoch: int) -> None:
        done = min(1.0, epoch / max(1, self.warmup_epochs - 1)) if self.warmup_epochs else 1.0
        self.temperature = self.first_temperature + done * (self.final_temperature - self.first_temperature)

    def forward(self, batch: Batch) -> LossOutput:
        mask = batch["token_mask"]
        with torch.no_grad():
            choices = soft_choices(self.tokenizer_logits(batch["tokenizer_image"]), self.temperature)
        features = self.model.features(batch["image"], mask)
        refined = refine_choices(
            choices, features, self.refine_weight, self.similarity_temperature, self.detach_similarity
        )[mask]
        logits = self.model.lm_head(features[mask])
        with torch.no_grad():
            # The most likely token is the same at every temperature.
            accuracy = (logits.argmax(dim=-1) == choices[mask].argmax(dim=-1)).float().mean()
            softness = mean_perplexity(choices[:4])  # of a few pictures: it costs a pass over all choices
        return LossOutput(
            total=_soft_cross_entropy(logits, refined) * share_of_masked(mask),
            stats={"masked_accuracy": accuracy, "choice_perplexity": softness},
        )
