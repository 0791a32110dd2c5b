"""Image tokenizers: from a picture to a grid of codes, trained on your own pictures.

``DiscreteVAE`` (Gumbel-softmax, of DALL-E and BEiT; the default) gives logits over codes; ``VQVAE`` picks the nearest
code. Both are encoders of the hook: a trained one is an exported encoder, which ``mim:beit`` and ``mim:mc-beit`` load
by ``load_tokenizer``, and which serves as a bag of codes.

B batch, C channels, S side of a picture, V codes, d width of a code, n stages, h x w cells with h = w = S / 2^n.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.errors import InputError
from bowerbird.protocols import BuildContext, Dataset, Encoder, Features, ItemTransform, LossOutput, Objective, freeze
from bowerbird_mim.codes import (
    Chosen,
    GumbelQuantizer,
    Quantized,
    VectorQuantizer,
    at_least_float32,
    check_finite,
    check_vocabulary,
    code_kl,
    code_mixture,
    count_codes,
    gumbel_noise,
    gumbel_softmax,
    item_noise,
    perplexity,
    usage_kl,
)
from bowerbird_mim.views import random_crop_box

__all__ = [
    "Chosen", "DVAEConfig", "DiscreteVAE", "GumbelQuantizer", "ImageTokenizer", "Quantized", "TokenizerConfig",
    "TokenizerObjective", "TokenizerOutput", "TokenizerTraining", "VQVAE", "VQVAEConfig", "VectorQuantizer",
    "check_token_grid", "code_kl", "gumbel_noise", "gumbel_softmax", "load_tokenizer", "perplexity", "save_tokenizer",
    "temperature_at", "train_tokenizer", "usage_kl",
]  # fmt: skip


@runtime_checkable
class ImageTokenizer(Protocol):
    """What masked image modelling needs of a tokenizer.

    Pictures are prepared as the tokenizer's ``preprocessing`` says, where it has one; any side that ``stride`` divides
    is accepted.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def stride(self) -> int: ...

    def logits(self, images: Tensor) -> Tensor:
        """``(B, C, S, S)`` to ``(B, V, S / stride, S / stride)``."""

    def ids(self, images: Tensor) -> Tensor:
        """Most likely code of every cell, int64 ``(B, h, w)``."""

    def decode(self, ids: Tensor) -> Tensor:
        """Pictures ``(B, C, S, S)`` of codes."""


def load_tokenizer(path_or_run: str | Path, context: BuildContext | None = None) -> Any:
    """A frozen ``ImageTokenizer`` (a ``torch.nn.Module`` in eval mode), with ``preprocessing``.

    Args:
        path_or_run: Folder of a run of ``mim:tokenizer`` or of an exported ``mim:dvae`` or ``mim:vqvae``; or a file of
            weights of DALL-E's encoder, of a VQGAN, or of a dVAE as BEiT's, ``.safetensors`` or tensors only.
        context: Of the objective that is being built; runs are then loaded through it.

    Raises:
        InputError: There is no such thing, or it is no tokenizer.
        DataError: A file of another layout; the message lists what differs.
    """
    if Path(path_or_run).is_file():
        from bowerbird_mim.tokenizer_files import read_tokenizer  # networks of other people's checkpoints

        return freeze(read_tokenizer(path_or_run))
    if context is not None:
        encoder: Encoder = context.load_run(path_or_run).encoder
    else:
        from bowerbird.encoders.bundle import load_encoder

        encoder = load_encoder(path_or_run, device="cpu").module
    if not isinstance(encoder, ImageTokenizer):
        raise InputError(
            f"tokenizer {str(path_or_run)!r} is a {type(encoder).__name__}, which gives no codes; expected a run of "
            "mim:tokenizer, or an exported mim:dvae or mim:vqvae"
        )
    return freeze(encoder)


def check_token_grid(
    tokenizer: ImageTokenizer, size: tuple[int, int], grid: tuple[int, int], *, vocab_size: int | None = None
) -> None:
    """Raise ``InputError`` where pictures of ``size`` (height, width) do not give ``grid`` cells of ``vocab_size``."""
    found = (size[0] / tokenizer.stride, size[1] / tokenizer.stride)
    if found != grid:
        raise InputError(
            f"pictures of {size[0]} x {size[1]} pixels give the tokenizer (stride {tokenizer.stride}) a grid of "
            f"{found[0]:g} x {found[1]:g} codes, but there are {grid[0]} x {grid[1]} patches; it needs pictures of "
            f"{grid[0] * tokenizer.stride} x {grid[1] * tokenizer.stride}"
        )
    if vocab_size is not None and vocab_size != tokenizer.vocab_size:
        raise InputError(f"vocab_size = {vocab_size}, but the tokenizer has {tokenizer.vocab_size} codes")
