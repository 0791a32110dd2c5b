"""BEiT: name the visual token of every hidden patch, as a frozen image tokenizer would.

Bao, Dong, Piao, Wei: BEiT: BERT Pre-Training of Image Transformers, ICLR 2022 (arXiv 2106.08254). Targets are the most
likely tokens, as in the official code; the paper motivates them by sampling from the tokenizer's posterior.

N batch, L = rows x columns patches, D width, V vocabulary size, M the masked positions of the whole batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from bowerbird import dist
from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing, to_rgb
from bowerbird.errors import InputError
from bowerbird.protocols import BuildContext, Encoder, ItemTransform, LossOutput, Objective, freeze
from bowerbird_mim.beit_vit import BEiTEncoder, RelativePositionBias, relative_position_index, truncated_normal_
from bowerbird_mim.masks import BlockwiseMaskGenerator, RandomMaskGenerator
from bowerbird_mim.precision import at_least_float32
from bowerbird_mim.tokenizer import check_token_grid, load_tokenizer
from bowerbird_mim.views import ColorAugmentation, crop_resized, random_crop_box, resized
from bowerbird_mim.vit import ViTEncoder

__all__ = [
    "BEiTConfig", "BEiTObjective", "BlockwiseMaskGenerator", "MaskedTokenConfig", "MaskedTokenModel",
    "MaskedTokenObjective", "RandomMaskGenerator", "RelativePositionBias", "TokenTargets", "TwoViews",
    "masked_token_loss", "relative_position_index",
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ views


@dataclass(frozen=True, kw_only=True)
class TwoViews:
    """One random crop in two sizes: ``image`` for the encoder, ``tokenizer_image`` for the tokenizer; and a mask.

    Colours are changed first, then the crop is drawn, then mirrored: both pictures show the same.

    Attributes:
        preprocessing: Of the encoder; the crop is resized as it says (bicubic in the paper).
        tokenizer: Of the tokenizer; the crop is resized with Lanczos.
        mask: Called with the item's generator.
        scale: Range of the crop's share of the area; ratios of sides are 3/4 to 4/3.
        color: Colour changes, or ``None``.
    """

    preprocessing: Preprocessing
    tokenizer: Preprocessing
    mask: Callable[[np.random.Generator], Tensor]
    scale: tuple[float, float] = (0.08, 1.0)
    color: ColorAugmentation | None = None

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """Entries ``image (C, S, S)``, ``tokenizer_image (C, S2, S2)`` and ``token_mask (L,)``."""
        picture = to_rgb(item["image"], background=self.preprocessing.background)
        if self.color is not None:
            picture = self.color(picture, generator)
        box = random_crop_box(picture.size, generator, scale=self.scale)
        large = crop_resized(picture, box, self.preprocessing)
        small = picture.resize((self.tokenizer.width, self.tokenizer.height), Image.Resampling.LANCZOS, box=box)
        if generator.random() < 0.5:
            large, small = ImageOps.mirror(large), ImageOps.mirror(small)
        return {
            "image": self.preprocessing(large),
            "tokenizer_image": self.tokenizer(small),
            "token_mask": self.mask(generator).flatten(),
        }


# ------------------------------------------------------------------------------------------------ model and loss


@runtime_checkable
class TokenTargets(Protocol):
    """What a tokenizer must offer to be a teacher; see ``bowerbird_mim.tokenizer.ImageTokenizer``."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def stride(self) -> int: ...

    def logits(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, V, H / stride, W / stride)``."""


class MaskedTokenModel(nn.Module):
    """An encoder with a mask token, and a linear layer from its patch tokens to the vocabulary.

    Args:
        encoder: ``BEiTEncoder``; a plain ``ViTEncoder`` (which has absolute positions) is taken, too.
        vocab_size: V, at least 2.

    Raises:
        InputError: Another encoder or one for fine-tuning, or a vocabulary of fewer than two tokens.
    """

    def __init__(self, encoder: Encoder, vocab_size: int) -> None:
        super().__init__()
        if not isinstance(encoder, BEiTEncoder | ViTEncoder):
            raise InputError(
                "masked token prediction needs an encoder that can hide patches, mim:beit-vit or mim:vit, not "
                f"{type(encoder).__name__}"
            )
        if encoder.pooling == "mean-norm":
            raise InputError('pooling = "mean-norm" is for fine-tuning: here every patch token needs the final norm')
        if vocab_size < 2:
            raise InputError(f"vocab_size = {vocab_size}: expected at least 2 tokens to choose from")
        self.encoder, self.vocab_size = encoder, vocab_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        self.lm_head = nn.Linear(encoder.embed_dim, vocab_size)
        truncated_normal_(self.mask_token)
        truncated_normal_(self.lm_head.weight)
        nn.init.zeros_(self.lm_head.bias)

    def features(self, images: Tensor, mask: Tensor) -> Tensor:
        """``(N, L, D)``: patch tokens after the final norm, of pictures whose masked patches are hidden.

        Args:
            images: ``(N, C, H, W)``.
            mask: bool ``(N, L)``, true at hidden patches.
        """
        rows, columns = self.encoder.check_images(images)
        if mask.shape != (len(images), rows * columns):
            raise InputError(
                f"mask has shape {tuple(mask.shape)}; {len(images)} pictures of {rows} x {columns} patches need "
                f"({len(images)}, {rows * columns})"
            )
        return self.encoder.tokens(images, token_mask=mask.bool(), mask_token=self.mask_token)[:, 1:]

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(N, L, D)`` and logits ``(N, L, V)`` of all patches; see ``features``.

        Raises:
            InputError: Pictures of another size than the encoder's, or a mask of another shape.
        """
        features = self.features(images, mask)
        return features, self.lm_head(features)


def masked_token_loss(logits_masked: Tensor, ids_masked: Tensor) -> Tensor:
    """Mean cross-entropy over the masked positions of the batch, at least in float32: a scalar.

    Args:
        logits_masked: ``(M, V)``.
        ids_masked: Integers ``(M,)``, the tokenizer's ids there.

    Raises:
        InputError: Shapes that do not fit, no masked position, or ids that are no integers from 0 to V - 1.
    """
    if logits_masked.ndim != 2 or ids_masked.shape != logits_masked.shape[:1]:
        raise InputError(
            f"logits_masked {tuple(logits_masked.shape)} and ids_masked {tuple(ids_masked.shape)} do not fit: expected "
            "(M, V) and (M,)"
        )
    if not torch.compiler.is_compiling() and not len(ids_masked):
        raise InputError("no masked position: there is nothing to predict")
    if ids_masked.is_floating_point():
        raise InputError(f"ids_masked are of type {ids_masked.dtype}; expected integers")
    # Not on a GPU, where reading the range would wait for the device and the kernel refuses what it does not leave out.
    if not torch.compiler.is_compiling() and not ids_masked.is_cuda:
        low, high = int(ids_masked.min()), int(ids_masked.max())
        if low < 0 or high >= logits_masked.shape[1]:  # cross_entropy would leave -100 out
            raise InputError(f"ids_masked from {low} to {high}; expected 0 to {logits_masked.shape[1] - 1}")
    return F.cross_entropy(at_least_float32(logits_masked), ids_masked.long())


# ------------------------------------------------------------------------------------------------ objective


class MaskedTokenConfig(BaseModel):
    """What methods that predict the tokens of a frozen tokenizer share."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tokenizer: str = Field(description="Folder of a run of mim:tokenizer, or of an exported tokenizer.")
    vocab_size: int | None = Field(default=None, ge=2, description="Refuse a tokenizer with another vocabulary.")
    tokenizer_size: int | Annotated[tuple[int, int], Field(strict=False)] | None = Field(
        default=None,
        description="Side (or [height, width]) of the tokenizer's pictures in pixels; by default what gives its "
        "grid of tokens the encoder's grid of patches.",
    )
    num_mask_patches: int | None = Field(
        default=None, ge=1, description="Block masks: patches to hide; by default 38 % of them (75 of 196)."
    )
    min_block: int | None = Field(
        default=None, ge=1, description="Block masks: smallest rectangle; by default 8 % of the patches (16 of 196)."
    )
    max_block: int | None = Field(default=None, ge=1, description="Block masks: largest rectangle in patches.")
    min_aspect: float = Field(default=0.3, gt=0, le=1, description="Block masks: smallest ratio of height to width.")
    mask_ratio: float = Field(default=0.75, gt=0, lt=1, description="Random masks: share of the patches to hide.")
    crop_scale: Annotated[tuple[float, float], Field(strict=False)] = Field(
        default=(0.08, 1.0), description="Range of the random crop's share of the picture."
    )

    def mask_generator(self, grid: tuple[int, int], kind: Literal["block", "random"]) -> Callable[[Any], Tensor]:
        """Raises ``InputError`` for settings that hide nothing in this grid."""
        if kind == "random":
            return RandomMaskGenerator(grid, self.mask_ratio)
        patches = grid[0] * grid[1]
        wanted = self.num_mask_patches or max(1, round(patches * 75 / 196))
        smallest = self.min_block or max(1, min(wanted, round(patches * 16 / 196)))
        generator = BlockwiseMaskGenerator(grid, wanted, smallest, self.max_block, self.min_aspect)
        if not any(generator(random.Random(seed)).any() for seed in range(20)):
            raise InputError(
                f"no rectangle of {smallest} to {self.max_block or wanted} patches fits a grid of {grid[0]} x {grid[1]}"
            )
        return generator


class MaskedTokenObjective(Objective):
    """Encoder, head, frozen tokenizer and views of the methods that predict visual tokens.

    Args:
        tokenizer: In eval mode and without gradients from now on; kept in checkpoints, not in the exported encoder.
        model: The network that is trained.
        views: What makes the entries of a batch (``TwoViews``); ``None`` where batches come ready.

    Raises:
        InputError: The tokenizer lacks ``logits``, ``vocab_size`` or ``stride``, or has another vocabulary.
    """

    def __init__(self, tokenizer: TokenTargets, *, model: MaskedTokenModel, views: ItemTransform | None = None) -> None:
        super().__init__()
        if not isinstance(tokenizer, TokenTargets):
            raise InputError(
                f"{type(tokenizer).__name__} is no image tokenizer: it needs logits(images), vocab_size and stride"
            )
        if tokenizer.vocab_size != model.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model predicts {model.vocab_size}: vocab_size "
                "must be the same"
            )
        self.model, self.views = model, views
        self.tokenizer: Any = freeze(tokenizer) if isinstance(tokenizer, nn.Module) else tokenizer

    @property
    def encoder(self) -> Encoder:  # type: ignore[override]
        return self.model.encoder

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if isinstance(self.tokenizer, nn.Module):
            self.tokenizer.eval()
        return self

    def item_transform(self) -> ItemTransform | None:
        return self.views

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Vectors, biases, the class token and positions without weight decay; bias tables and mask token with it."""
        decays: list[nn.Parameter] = []
        still: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                alone = parameter.ndim <= 1 or name.endswith(("cls_token", "pos_embed"))
                (still if alone else decays).append(parameter)
        return [{"params": decays}, {"params": still, "weight_decay": 0.0}]

    def tokenizer_logits(self, images: Tensor) -> Tensor:
        """``(N, V, rows, columns)`` of the tokenizer in full precision, without gradient.

        Raises:
            InputError: The tokens do not lie as the patches do, or the vocabulary is another; both shapes are named.
        """
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            logits = at_least_float32(self.tokenizer.logits(images))
        wanted = (len(images), self.model.vocab_size, *self.model.encoder.grid)
        if logits.shape != wanted:
            raise InputError(
                f"the tokenizer's logits have shape {tuple(logits.shape)} (items, tokens, rows, columns); the patches "
                f"and the vocabulary need {wanted}"
            )
        return logits


def load_parts(
    config: MaskedTokenConfig,
    encoder: Encoder,
    context: BuildContext,
    *,
    mask: Literal["block", "random"],
    jitter: float,
) -> tuple[TokenTargets, MaskedTokenModel, TwoViews]:
    """Tokenizer, fresh model and views that a config describes.

    Raises:
        InputError: The tokenizer is none, or its grid or vocabulary is not the recipe's: both are named.
    """
    tokenizer = load_tokenizer(config.tokenizer, context)
    if tokenizer.preprocessing is None:
        raise InputError(f"tokenizer = {config.tokenizer!r} takes tensors only; one that takes pictures is needed")
    model = MaskedTokenModel(encoder, tokenizer.vocab_size)
    grid, stride = model.encoder.grid, tokenizer.stride
    size = config.tokenizer_size or (grid[0] * stride, grid[1] * stride)
    height, width = (size, size) if isinstance(size, int) else size
    check_token_grid(tokenizer, (height, width), grid, vocab_size=config.vocab_size)
    assert model.encoder.preprocessing is not None
    views = TwoViews(
        preprocessing=model.encoder.preprocessing,
        tokenizer=resized(tokenizer.preprocessing, (height, width)),
        mask=config.mask_generator(grid, mask),
        scale=config.crop_scale,
        color=ColorAugmentation(jitter=(jitter, jitter, jitter, 0.0), jitter_prob=1.0, grey_prob=0.0)
        if jitter
        else None,
    )
    return tokenizer, model, views


class BEiTConfig(MaskedTokenConfig):
    """Settings of ``mim:beit``."""

    mask: Literal["block", "random"] = Field(default="block", description="Rectangles, or single patches.")
    color_jitter: float = Field(
        default=0.4, ge=0, le=1, description="Largest change of brightness, contrast and saturation."
    )


class BEiTObjective(MaskedTokenObjective):
    """``mim:beit``. Mask token and head are thrown away; the exported encoder sees the whole picture."""

    @classmethod
    def build(cls, config: BEiTConfig, encoder: Encoder, context: BuildContext) -> Self:
        tokenizer, model, views = load_parts(config, encoder, context, mask=config.mask, jitter=config.color_jitter)
        return cls(tokenizer, model=model, views=views)

    def forward(self, batch: Batch) -> LossOutput:
        mask = batch["token_mask"]
        ids = self.tokenizer_logits(batch["tokenizer_image"]).argmax(dim=1).flatten(1)[mask]
        logits = self.model.lm_head(self.model.features(batch["image"], mask)[mask])
        accuracy = (logits.detach().argmax(dim=-1) == ids).float().mean()
        return LossOutput(
            total=masked_token_loss(logits, ids) * share_of_masked(mask), stats={"masked_accuracy": accuracy}
        )


def share_of_masked(mask: Tensor) -> Tensor | float:
    """This process's number of masked positions over the mean of all processes, 1 without others.

    The loss is a mean over the masked positions of the joined batch; block masks do not hide equally many.
    """
    if not dist.is_distributed():
        return 1.0
    count = mask.sum().float()
    return count / dist.mean_over_processes(count)
