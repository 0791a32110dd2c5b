"""How good a tokenizer is: what its codes restore, and how many of them it uses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from bowerbird.errors import InputError
from bowerbird.protocols import EvalContext, Evaluator, Metrics
from bowerbird_mim.codes import count_codes, perplexity
from bowerbird_mim.precision import at_least_float32
from bowerbird_mim.tokenizer import ImageTokenizer


@torch.no_grad()
def tokenizer_quality(tokenizer: Any, batches: Iterable[Tensor]) -> dict[str, float]:
    """How good the codes of pictures are.

    Args:
        tokenizer: An ``ImageTokenizer`` that is a module; put into eval mode while it is measured.
        batches: Iterable of pictures ``(B, C, S, S)``, prepared as the tokenizer needs them.

    Returns:
        ``mse_share``: mean squared error of ``decode(ids(images))`` over the variance of all pixels (1: no better than
        one grey); ``usage``: share of the codes that occur; ``perplexity``: from 1 to V; ``target_perplexity``: mean of
        exp(entropy) of the probabilities of a cell, 1 where the tokenizer is certain.

    Raises:
        InputError: There are no pictures.
    """
    counts = torch.zeros(tokenizer.vocab_size, dtype=torch.float64)
    pixels = total = squares = errors = cells = softness = 0.0
    was_training = tokenizer.training
    tokenizer.eval()
    for images in batches:
        logits = at_least_float32(tokenizer.logits(images))
        ids = logits.argmax(dim=1)
        counts += count_codes(ids, tokenizer.vocab_size).cpu().double()
        softness += float(torch.special.entr(logits.softmax(dim=1)).sum(dim=1).exp().sum())
        cells += ids.numel()
        values = images.double()
        errors += float((tokenizer.decode(ids).double() - values).square().sum())
        pixels, total, squares = (
            pixels + values.numel(),
            total + float(values.sum()),
            squares + float((values**2).sum()),
        )
    tokenizer.train(was_training)
    if not pixels:
        raise InputError("there are no pictures to measure a tokenizer with")
    variance = squares / pixels - (total / pixels) ** 2
    return {
        "mse_share": errors / pixels / max(variance, 1e-12),
        "usage": float((counts > 0).double().mean()),
        "perplexity": float(perplexity(counts)),
        "target_perplexity": softness / cells,
    }


class TokenizerQualityConfig(BaseModel):
    """Settings of ``mim:tokenizer-quality``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dataset: str = Field(description="Pictures to measure with.")
    split: str | None = Field(default=None, description="Which part of the data set.")
    settings: dict[str, Any] = Field(default_factory=dict, description="Of the data set.")
    batch_size: int = Field(default=128, ge=1, description="Pictures at once.")


class TokenizerQuality(Evaluator):
    """``mim:tokenizer-quality``: reconstruction error, used codes and perplexity of a tokenizer on a data set."""

    def __init__(self, config: TokenizerQualityConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: TokenizerQualityConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """Raises ``InputError`` for an encoder that is no tokenizer of pictures."""
        from bowerbird.train.data import ordered_batches

        tokenizer: Any = context.encoder
        if not isinstance(context.encoder, ImageTokenizer):
            raise InputError(f"mim:tokenizer-quality measures tokenizers, not a {type(tokenizer).__name__}")
        c = self.config
        dataset = context.dataset(c.dataset, split=c.split, **c.settings)
        device = next(tokenizer.parameters()).device
        batches = ordered_batches(tokenizer, dataset, keys=("image",), batch_size=c.batch_size, device=device)
        return Metrics(summary=tokenizer_quality(tokenizer, (batch["image"] for batch in batches)))
