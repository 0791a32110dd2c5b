"""The vision transformer of BEiT: no position table but one relative position bias, and layer scale; timm's blocks.

Bao, Dong, Piao, Wei: BEiT: BERT Pre-Training of Image Transformers, ICLR 2022 (arXiv 2106.08254). Parameters have the
names of the official pre-training checkpoint; with a bias table per block, those of timm's ``beit_*`` models.

B batch, C channels, H x W pixels, L = rows x columns patches, D width, h heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import Field
from timm.models.beit import Block, gen_relative_position_index
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.encoders.weights import load_strictly, read_weights
from bowerbird.errors import InputError
from bowerbird.protocols import Encoder, Features, TimmForm
from bowerbird_mim.patches import patch_grid
from bowerbird_mim.vit import ImageSize, PatchEmbedding, PatchViTConfig, image_sides
from bowerbird_mim.vit import large as vit_large

BiasKind = Literal["shared", "per-block"]
Pooling = Literal["mean", "mean-norm", "class"]

INIT_STD = 0.02


# ------------------------------------------------------------------------------------------------ relative positions


def relative_position_index(window: tuple[int, int]) -> Tensor:
    """Which row of a bias table belongs to which pair of tokens: int64 ``(L + 1, L + 1)``, the class token first.

    Entry (a, b) of two patches is (r_a - r_b + rows - 1)(2 columns - 1) + (c_a - c_b + columns - 1), a being the query.
    The last three rows of the table are: class to patch, patch to class, class to class (BEiT, section 3).

    Args:
        window: (rows, columns) of the patches, each at least 1.

    Raises:
        InputError: The window is empty.
    """
    rows, columns = _checked_window(window)
    return gen_relative_position_index((rows, columns))


def _checked_window(window: tuple[int, int]) -> tuple[int, int]:
    if len(window) != 2 or min(window) < 1:
        raise InputError(f"window = {tuple(window)}: expected (rows, columns), each at least 1")
    return int(window[0]), int(window[1])


class RelativePositionBias(nn.Module):
    """A learned number per head and offset, added to the attention logits; zero at the start.

    ``relative_position_bias_table`` is ``((2 rows - 1)(2 columns - 1) + 3, h)``.

    Args:
        window: (rows, columns) of the patches.
        num_heads: h.

    Raises:
        InputError: The window is empty or there is no head.
    """

    relative_position_index: Tensor

    def __init__(self, window: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        rows, columns = _checked_window(window)
        if num_heads < 1:
            raise InputError(f"num_heads = {num_heads}: expected at least 1")
        self.window = (rows, columns)
        table = torch.zeros((2 * rows - 1) * (2 * columns - 1) + 3, num_heads)
        self.relative_position_bias_table = nn.Parameter(table)
        self.register_buffer("relative_position_index", relative_position_index(self.window), persistent=False)

    def forward(self) -> Tensor:
        """``(h, L + 1, L + 1)``: the bias of query a (row) and key b (column)."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).contiguous()


# ------------------------------------------------------------------------------------------------ encoder


class BEiTEncoder(Encoder):
    """Patch embedding, class token, pre-norm blocks with layer scale and relative position bias, a layer norm.

    q and v of an attention have learned biases, k has none. Linear layers and the patch convolution start normal(0,
    0.02), cut at one standard deviation; then the last layer of the attention and of the perceptron of block l (counted
    from 1) are divided by sqrt(2 l).

    Args:
        image_size: Side of square pictures, or (height, width), in pixels; other sizes are refused.
        patch_size: p. Divides both sides.
        in_channels: C.
        embed_dim: D, a multiple of ``num_heads``.
        depth: Number of blocks.
        num_heads: h.
        mlp_ratio: Hidden width of a block's perceptron, over D.
        layer_scale: First value of gamma_1 and gamma_2; 0 leaves layer scale out.
        relative_position: One bias ``shared`` by all blocks (pre-training), or one table ``per-block`` (fine-tuning).
        pooling: What ``Features.pooled`` is: ``mean`` of the patch tokens after the final norm; ``mean-norm``, the norm
            of their mean (fine-tuning; the tokens are then not normalised); or the ``class`` token after the norm.
        drop_path: Largest rate of stochastic depth; it grows linearly from 0 over the blocks.
        layer_norm_eps: Of every layer norm.
        preprocessing: How a picture file is prepared; ``None`` where only tensors come.

    Raises:
        InputError: Sizes that do not divide each other.
    """

    def __init__(
        self,
        *,
        image_size: ImageSize = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        layer_scale: float = 0.1,
        relative_position: BiasKind = "shared",
        pooling: Pooling = "mean",
        drop_path: float = 0.0,
        layer_norm_eps: float = 1e-6,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        self.image_size = image_sides(image_size)
        self.grid = patch_grid(*self.image_size, patch_size)
        if embed_dim % num_heads:
            raise InputError(f"embed_dim = {embed_dim} is no multiple of num_heads = {num_heads}")
        self.patch_size, self.in_channels, self.embed_dim = patch_size, in_channels, embed_dim
        self.depth, self.num_heads, self.mlp_ratio = depth, num_heads, mlp_ratio
        self.layer_scale, self.relative_position, self.pooling = layer_scale, relative_position, pooling
        self.drop_path, self.layer_norm_eps, self.preprocessing = drop_path, layer_norm_eps, preprocessing

        norm = partial(nn.LayerNorm, eps=layer_norm_eps)
        self.patch_embed = PatchEmbedding(patch_size, in_channels, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.rel_pos_bias = RelativePositionBias(self.grid, num_heads) if relative_position == "shared" else None
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                qkv_bias=True,
                mlp_ratio=mlp_ratio,
                drop_path=drop_path * i / max(1, depth - 1),
                init_values=layer_scale,
                norm_layer=norm,  # type: ignore[arg-type]
                window_size=self.grid if relative_position == "per-block" else None,
            )
            for i in range(depth)
        )
        self.norm = norm(embed_dim)
        self._initialize()

    def _initialize(self) -> None:
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                truncated_normal_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        truncated_normal_(self.cls_token)
        with torch.no_grad():
            for number, block in enumerate(self.blocks, start=1):
                block.attn.proj.weight /= math.sqrt(2 * number)  # type: ignore[union-attr,operator]
                block.mlp.fc2.weight /= math.sqrt(2 * number)  # type: ignore[union-attr,operator]

    @classmethod
    def build(cls, config: BEiTViTConfig) -> Self:
        """Raises ``DataError`` for weights that do not fit, naming what differs."""
        encoder = cls(**config.architecture(), preprocessing=config.preprocessing())
        if config.weights is not None:
            load_beit_weights(encoder, config.weights)
        return encoder

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` without the source of the first weights: the weights lie beside it."""
        return {key: value for key, value in config.items() if key != "weights"}

    # -------------------------------------------------------------------------------------------- tokens

    def check_images(self, images: Tensor) -> tuple[int, int]:
        """The grid of ``images``. Raises ``InputError`` for a wrong shape or another size than the bias tables'."""
        if images.ndim != 4 or images.shape[1] != self.in_channels or images.shape[2:] != self.image_size:
            raise InputError(
                f"images have shape {tuple(images.shape)}; this encoder needs (B, {self.in_channels}, "
                f"{self.image_size[0]}, {self.image_size[1]}), the size of its relative positions"
            )
        return self.grid

    def tokens(self, images: Tensor, *, token_mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """``(B, 1 + L, D)`` after the final norm (before it with ``pooling = "mean-norm"``), the class token first.

        Args:
            images: ``(B, C, H, W)``.
            token_mask: bool ``(B, L)``, true where ``mask_token`` takes the place of a patch's embedding.
            mask_token: ``(1, 1, D)``.
        """
        self.check_images(images)
        x = self.patch_embed(images)  # (B, L, D)
        if token_mask is not None:
            assert mask_token is not None
            x = torch.where(token_mask[..., None], mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        bias = self.rel_pos_bias()[None] if self.rel_pos_bias is not None else None
        for block in self.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        return x if self.pooling == "mean-norm" else self.norm(x)

    def forward(self, batch: Batch) -> Features:
        tokens = self.tokens(batch["image"])
        patches = tokens[:, 1:]
        pooled = tokens[:, 0] if self.pooling == "class" else patches.mean(dim=1)
        if self.pooling == "mean-norm":
            pooled = self.norm(pooled)
        return Features(pooled=pooled, tokens=patches, grid=self.grid)

    # -------------------------------------------------------------------------------------------- fine-tuning

    def for_finetuning(self) -> BEiTEncoder:
        """A copy that computes the same and whose blocks own a clone of the bias table each, as BEiT fine-tunes."""
        tuned = BEiTEncoder(
            image_size=self.image_size,
            patch_size=self.patch_size,
            in_channels=self.in_channels,
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            layer_scale=self.layer_scale,
            relative_position="per-block",
            pooling=self.pooling,
            drop_path=self.drop_path,
            layer_norm_eps=self.layer_norm_eps,
            preprocessing=self.preprocessing,
        ).to(self.cls_token)
        tuned.load_state_dict(per_block_state(self))
        return tuned.train(self.training)

    def timm_form(self) -> TimmForm:
        """timm's ``beit_base_patch16_224`` with other sizes; a shared bias table is cloned into every block."""
        norm = "fc_norm." if self.pooling == "mean-norm" else "norm."
        return TimmForm(
            architecture="beit_base_patch16_224",
            arguments={
                "img_size": list(self.image_size),
                "patch_size": self.patch_size,
                "in_chans": self.in_channels,
                "embed_dim": self.embed_dim,
                "depth": self.depth,
                "num_heads": self.num_heads,
                "mlp_ratio": self.mlp_ratio,
                "init_values": self.layer_scale or None,
                "global_pool": "token" if self.pooling == "class" else "avg",
                "use_fc_norm": self.pooling == "mean-norm",
            },
            state={re.sub(r"^norm\.", norm, key): value for key, value in per_block_state(self).items()},
        )


def truncated_normal_(tensor: Tensor) -> Tensor:
    """Fill with normal(0, 0.02) cut at +-0.02, as BEiT does."""
    return nn.init.trunc_normal_(tensor, std=INIT_STD, a=-INIT_STD, b=INIT_STD)


class BEiTViTConfig(PatchViTConfig):
    """Settings of ``mim:beit-vit``."""

    layer_scale: float = Field(
        default=0.1, ge=0, description="First value of layer scale: 0.1 (base), 1e-5 (large); 0 leaves it out."
    )
    relative_position: BiasKind = Field(
        default="shared", description="One bias table for all blocks (pre-training), or one per block (fine-tuning)."
    )
    pooling: Pooling = Field(
        default="mean", description="The embedding: mean of normalised tokens, norm of their mean, or the class token."
    )


def large() -> dict[str, Any]:
    """BEiT-Large: layer scale starts at 1e-5."""
    return {**vit_large(), "layer_scale": 1e-5}


# ------------------------------------------------------------------------------------------------ weights of others


def load_beit_weights(encoder: BEiTEncoder, path: str) -> None:
    """Fill ``encoder`` from a file in the layout of timm's ``beit_*``, or of the official checkpoints.

    What belongs to pre-training or to a classifier is left out. A shared table is cloned into every block where the
    encoder has one per block. The final norm may be the file's ``norm`` or ``fc_norm``.

    Raises:
        DataError: The file cannot be read, or is of another architecture; the message lists what differs.
    """
    left_out = ("head.", "lm_head.", "mask_token")
    state = {
        key.replace("fc_norm.", "norm."): value
        for key, value in read_weights(path).items()
        if not key.startswith(left_out) and not key.endswith("relative_position_index")
    }
    if encoder.relative_position == "per-block":
        state = _cloned_into_blocks(state, encoder.depth)
    load_strictly(encoder, state, source=str(path))


def per_block_state(encoder: BEiTEncoder) -> dict[str, Tensor]:
    """The state of the same encoder with ``relative_position = "per-block"``: it computes the same."""
    return _cloned_into_blocks(encoder.state_dict(), encoder.depth)


def _cloned_into_blocks(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """``state`` with a clone of the shared bias table in every block, where there is a shared one."""
    table = "relative_position_bias_table"
    rest = {key: value for key, value in state.items() if key != f"rel_pos_bias.{table}"}
    if len(rest) < len(state):
        shared = state[f"rel_pos_bias.{table}"]
        rest |= {f"blocks.{i}.attn.{table}": shared.clone() for i in range(depth)}
    return rest
