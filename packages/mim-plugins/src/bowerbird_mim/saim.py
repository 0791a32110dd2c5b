"""Stochastic autoregression: every patch is predicted from the patches that precede it in a random order.

Qi, Yang, Zhu et al.: Exploring Stochastic Autoregressive Image Modeling for Visual Representation, AAAI 2023
(arXiv 2212.01610). Two streams, as in XLNet: the content stream is the encoder, in which a patch sees itself and its
predecessors; the query stream knows where a patch lies and reads the content of its predecessors only. Neither holds a
mask token, and every patch is a target.

B batch, L patches, D width, P numbers per patch (p * p * C). Index 0 of L + 1 tokens is the class token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.errors import InputError
from bowerbird.protocols import BuildContext, Encoder, ItemTransform, LossOutput, Objective
from bowerbird_mim.mae import checked_noise
from bowerbird_mim.patches import normalize_patches, patchify
from bowerbird_mim.timm_weights import fuse_projections
from bowerbird_mim.views import View
from bowerbird_mim.vit import ViTEncoder, initialize, vit_of

__all__ = [
    "SAIMConfig", "SAIMObjective", "SAIMOutput", "StochasticAutoregressiveModel", "TwoStreamBlock", "gaussian_blur",
    "gaussian_kernel", "permutation_attention_masks",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------ order and target


def permutation_attention_masks(noise: Tensor) -> tuple[Tensor, Tensor]:
    """Who may attend whom when patches come by ascending noise: two additive masks ``(B, 1, L + 1, L + 1)``.

    0 where a row (query) may attend a column (key), minus infinity where not, in the dtype of the noise. In the first
    mask, of the content stream, a patch attends itself and its predecessors; in the second, of the query stream, its
    predecessors only. Every row may attend the class token, which attends only itself.

    Args:
        noise: Floating point ``(B, L)``. Patches of equal noise attend each other in the content stream only.

    Raises:
        InputError: Another shape or type.
    """
    if noise.ndim != 2 or not noise.is_floating_point():
        raise InputError(
            f"noise is {noise.dtype} of shape {tuple(noise.shape)}; expected floating point (B, L), a value per patch"
        )
    row, column = noise[:, :, None], noise[:, None, :]
    return _additive(column <= row, noise.dtype), _additive(column < row, noise.dtype)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool ``(B, L, L)`` between patches to the additive mask with the class token in front."""
    batch, length, _ = allowed.shape
    whole = allowed.new_zeros(batch, 1, length + 1, length + 1)
    whole[:, :, :, 0] = True
    whole[:, 0, 1:, 1:] = allowed
    return torch.zeros_like(whole, dtype=dtype).masked_fill_(~whole, -torch.inf)


def gaussian_kernel(size: int, sigma: float, *, dtype: torch.dtype | None = None) -> Tensor:
    """``(size, size)`` weights proportional to exp(-(a^2 + b^2) / (2 sigma^2)) from the centre, with the sum 1.

    Args:
        size: Odd, in pixels.
        sigma: Above 0, in pixels.
        dtype: Of the result; by default torch's own default.

    Raises:
        InputError: Another size or sigma.
    """
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1 or size % 2 == 0:
        raise InputError(f"size = {size}: a blur needs an odd number of pixels, 1 or more")
    if not 0 < sigma < float("inf"):
        raise InputError(f"sigma = {sigma}: a blur needs a standard deviation above 0")
    offsets = torch.arange(size, dtype=torch.float64) - size // 2
    line = torch.exp(-((offsets / sigma) ** 2) / 2)
    kernel = torch.outer(line, line)
    return (kernel / kernel.sum()).to(dtype or torch.get_default_dtype())


def gaussian_blur(images: Tensor, size: int, sigma: float) -> Tensor:
    """Every channel of floating point ``(B, C, H, W)`` convolved with ``gaussian_kernel``; zeros around the picture.

    Raises:
        InputError: Pictures of another shape or of whole numbers, or what ``gaussian_kernel`` refuses.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise InputError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; expected (B, C, H, W) of floating point"
        )
    kernel = gaussian_kernel(size, sigma, dtype=images.dtype).to(images.device)
    return _convolved(images, kernel.repeat(images.shape[1], 1, 1, 1))


def _convolved(images: Tensor, weight: Tensor) -> Tensor:
    """``(B, C, H, W)``, every channel with its own kernel of ``(C, 1, size, size)``."""
    return F.conv2d(images, weight, padding=weight.shape[-1] // 2, groups=len(weight))


class GaussianBlur(nn.Module):
    """``gaussian_blur`` with a kernel that is kept beside the weights: official checkpoints bring theirs."""

    weight: Tensor  # (C, 1, size, size)

    def __init__(self, channels: int, size: int, sigma: float) -> None:
        super().__init__()
        self.register_buffer("weight", gaussian_kernel(size, sigma).repeat(channels, 1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape."""
        return _convolved(images, self.weight.to(images.dtype))


# ------------------------------------------------------------------------------------------------ model


class TwoStreamBlock(Block):
    """A block whose queries may come from another stream than its keys and values; both pass the same first norm.

    The weights are those of the encoder's blocks: queries, keys and values in one matrix. A state with three
    (``attn.q``, ``attn.k``, ``attn.v``, as the official code has them) can be loaded, too.

    Args:
        dim: D, a multiple of ``heads``.
        heads: Attention heads.
        mlp_ratio: Hidden width of the perceptron, over D.
        eps: Of both layer norms.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, *, eps: float = 1e-6) -> None:
        if dim < 1 or heads < 1 or dim % heads:
            raise InputError(f"dim = {dim} is no multiple of heads = {heads}")
        norm: Any = partial(nn.LayerNorm, eps=eps)
        super().__init__(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=norm)
        initialize(self, "xavier")
        attention: Any = self.attn
        for projection in attention.qkv.weight.detach().chunk(3):  # three layers, each with its own bounds
            nn.init.xavier_uniform_(projection)
        self.register_load_state_dict_pre_hook(_join_projections)

    def forward(self, q: Tensor, kv: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """One step of the stream ``q``.

        Args:
            q: ``(B, N, D)``, the stream that moves on.
            kv: ``(B, M, D)``, the stream that it reads; itself by default.
            mask: Additive, or bool with true where attention is allowed; ``(B, 1, N, M)`` or what broadcasts to it.

        Returns:
            ``(B, N, D)``.
        """
        return two_streams(self, q, kv, mask)


def _join_projections(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    fuse_projections(state, prefix)


def two_streams(block: Any, q: Tensor, kv: Tensor | None, mask: Tensor | None) -> Tensor:
    """``TwoStreamBlock.forward`` with the weights of any timm block, so that the encoder's own can serve, too."""
    content = None if kv is None else block.norm1(kv)
    x = q + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(q), content, mask)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _attend(attention: Any, q: Tensor, kv: Tensor | None, mask: Tensor | None) -> Tensor:
    """Attention of normalised tokens ``(B, N, D)`` to ``kv``, projected."""
    dim = q.shape[-1]

    def heads(x: Tensor) -> Tensor:  # (B, N, D) to (B, h, N, D / h)
        return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    if kv is None:
        queries, keys, values = attention.qkv(q).split(dim, dim=-1)
    else:
        weight, bias = attention.qkv.weight.split((dim, 2 * dim)), attention.qkv.bias.split((dim, 2 * dim))
        queries = F.linear(q, weight[0], bias[0])
        keys, values = F.linear(kv, weight[1], bias[1]).split(dim, dim=-1)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(queries.dtype)
    x = F.scaled_dot_product_attention(heads(queries), heads(keys), heads(values), attn_mask=mask)
    return attention.proj(x.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class SAIMOutput:
    """``loss``: scalar; ``pred``: ``(B, L, P)``, patch by patch as ``patchify`` orders them."""

    loss: Tensor
    pred: Tensor


class StochasticAutoregressiveModel(nn.Module):
    """Encoder with a second stream that predicts every patch from its predecessors.

    Args:
        encoder: The ViT that is kept after training.
        query_depth: Blocks of the query stream; they divide the depth of the encoder. After every
            ``depth / query_depth`` blocks of the encoder one of them reads what the encoder has then.
        share_weights: Use the weights of the encoder's block that has just run for the query stream.
        head: Of the predictions: a perceptron with one hidden layer, as wide as those of the encoder, or one layer.
        blur: Size and sigma of the Gaussian blur of the target in pixels, or ``None``.
        norm_pix_loss: Predict patches normalised to mean 0 and variance 1.
        loss: Squared (``l2``) or absolute (``l1``) error.

    Raises:
        InputError: Another encoder, ``query_depth`` does not divide the depth, or an unknown head, loss or blur.
    """

    def __init__(
        self,
        encoder: ViTEncoder,
        query_depth: int,
        share_weights: bool = False,
        head: Literal["mlp", "linear"] = "mlp",
        blur: tuple[int, float] | None = (9, 1.0),
        norm_pix_loss: bool = True,
        loss: Literal["l2", "l1"] = "l2",
    ) -> None:
        super().__init__()
        vit_of(encoder, "a stochastic autoregressive model")
        if query_depth < 1 or encoder.depth % query_depth:
            raise InputError(f"query_depth = {query_depth} must divide the depth of the encoder, {encoder.depth}")
        if head not in ("mlp", "linear"):
            raise InputError(f"head = {head!r} is unknown; accepted: mlp, linear")
        if loss not in ("l2", "l1"):
            raise InputError(f"loss = {loss!r} is unknown; accepted: l2, l1")
        if blur is not None and (not isinstance(blur, tuple | list) or len(blur) != 2):
            raise InputError(f"blur = {blur!r}: expected (size, sigma), or None for no blur")
        dim, outputs = encoder.embed_dim, encoder.patch_size**2 * encoder.in_channels
        self.encoder, self.query_depth, self.share_weights = encoder, query_depth, share_weights
        self.norm_pix_loss, self.loss = norm_pix_loss, loss
        self.gaussian_blur = None if blur is None else GaussianBlur(encoder.in_channels, *blur)
        self.stride = encoder.depth // query_depth
        self.query_blocks: Any  # a sequence of blocks
        if share_weights:
            self.query_blocks = tuple(encoder.blocks[self.stride - 1 :: self.stride])  # a tuple: they have their owner
        else:
            self.query_blocks = nn.ModuleList(
                TwoStreamBlock(dim, encoder.num_heads, encoder.mlp_ratio, eps=encoder.layer_norm_eps)
                for _ in range(query_depth)
            )
        self.prediction_head = (
            Mlp(dim, int(dim * encoder.mlp_ratio), outputs) if head == "mlp" else nn.Linear(dim, outputs)
        )
        initialize(self.prediction_head, "xavier")

    def forward(self, images: Tensor, noise: Tensor | None = None) -> SAIMOutput:
        """Loss of one order.

        Args:
            images: ``(B, C, H, W)`` of the encoder's size.
            noise: ``(B, L)``: patches come by ascending values; drawn from torch's generator if it is not given.

        Raises:
            InputError: Pictures of another size than the encoder's, or a noise of another shape.
        """
        noise = checked_noise(self.encoder, images, noise)
        pred = self.predict(images, *permutation_attention_masks(noise))
        error = pred - self.target(images)
        return SAIMOutput(loss=error.square().mean() if self.loss == "l2" else error.abs().mean(), pred=pred)

    def predict(self, images: Tensor, content_mask: Tensor, query_mask: Tensor) -> Tensor:
        """``(B, L, P)`` predictions under two masks ``(B, 1, L + 1, L + 1)``."""
        encoder = self.encoder
        content = encoder.embed(images)
        query = encoder.pos_embed.to(content.dtype).expand_as(content)
        for i, block in enumerate(encoder.blocks, start=1):
            content = two_streams(block, content, None, content_mask)
            if i % self.stride == 0:
                query = two_streams(self.query_blocks[i // self.stride - 1], query, content, query_mask)
        pred: Tensor = self.prediction_head(encoder.norm(query[:, 1:]))
        return pred

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """``(B, L, P)``: the patches of the blurred pictures, normalised if the model says so."""
        with torch.autocast(images.device.type, enabled=False):
            pictures = images.to(torch.promote_types(images.dtype, torch.float32))
            if self.gaussian_blur is not None:
                pictures = self.gaussian_blur(pictures)
            patches = patchify(pictures, self.encoder.patch_size)
            return normalize_patches(patches) if self.norm_pix_loss else patches

    def to_encoder(self) -> ViTEncoder:
        """The encoder: a plain ViT with full attention. It shares its weights with this model."""
        return self.encoder


# ------------------------------------------------------------------------------------------------ objective


class SAIMConfig(BaseModel):
    """Settings of ``mim:saim``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    query_depth: int | None = Field(
        default=None, ge=1, description="Blocks of the query stream; a divisor of the encoder's depth, by default all."
    )
    share_weights: bool = Field(default=False, description="The query stream uses the weights of the encoder's blocks.")
    head: Literal["mlp", "linear"] = Field(default="mlp", description="What predicts the pixels.")
    blur_size: int = Field(
        default=9, ge=0, description="Side of the Gaussian kernel that blurs the target, in pixels, odd; 0: no blur."
    )
    blur_sigma: float = Field(default=1.0, gt=0, description="Its standard deviation in pixels.")
    norm_pix_loss: bool = Field(default=True, description="Predict patches normalised to mean 0 and variance 1.")
    loss: Literal["l2", "l1"] = Field(default="l2", description="Squared or absolute error.")
    order: Literal["random", "raster"] = Field(
        default="random", description="A random order for every view, or always row by row (the usual autoregression)."
    )
    crop_scale: Annotated[tuple[float, float], Field(strict=False)] = Field(
        default=(0.2, 1.0), description="Range of the random crop's share of the picture."
    )

    @model_validator(mode="after")
    def _blur_has_a_centre(self) -> Self:
        if self.blur_size and self.blur_size % 2 == 0:
            raise ValueError(f"blur_size = {self.blur_size}: expected an odd number of pixels, or 0 for no blur")
        return self

    def model(self, encoder: ViTEncoder) -> StochasticAutoregressiveModel:
        return StochasticAutoregressiveModel(
            encoder,
            encoder.depth if self.query_depth is None else self.query_depth,
            share_weights=self.share_weights,
            head=self.head,
            blur=(self.blur_size, self.blur_sigma) if self.blur_size else None,
            norm_pix_loss=self.norm_pix_loss,
            loss=self.loss,
        )


@dataclass(frozen=True)
class OrderedView:
    """One random crop and flip, and the order of its patches: entries ``image`` and ``noise``."""

    view: View
    num_patches: int
    order: Literal["random", "raster"]

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        image = self.view(item["image"], generator)
        if self.order == "raster":
            return {"image": image, "noise": np.arange(self.num_patches, dtype=np.float32) / self.num_patches}
        return {"image": image, "noise": generator.random(self.num_patches, np.float32)}


class SAIMObjective(Objective):
    """``mim:saim``. Query blocks and head are thrown away; in the exported encoder all patches attend each other."""

    def __init__(self, model: StochasticAutoregressiveModel, config: SAIMConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    @property
    def encoder(self) -> ViTEncoder:  # type: ignore[override]  # one owner: a second one would store it twice
        return self.model.encoder

    @classmethod
    def build(cls, config: SAIMConfig, encoder: Encoder, context: BuildContext) -> Self:
        return cls(config.model(vit_of(encoder, "mim:saim")), config)

    def item_transform(self) -> ItemTransform:
        encoder = self.model.encoder
        assert encoder.preprocessing is not None
        view = View(preprocessing=encoder.preprocessing, scale=self.config.crop_scale)
        return OrderedView(view, encoder.grid[0] * encoder.grid[1], self.config.order)

    def forward(self, batch: Batch) -> LossOutput:
        return LossOutput(total=self.model(batch["image"], batch["noise"]).loss)
