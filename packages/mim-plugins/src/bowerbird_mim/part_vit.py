"""A vision transformer with part tokens beside the class token, and the features that are made of them.

Zhu, Guo, Yan et al.: PASS: Part-Aware Self-Supervised Pre-Training for Person Re-Identification, ECCV 2022
(arXiv 2203.03931). Sequence of a whole picture: [class, part 1 ... part J, patches]; of a crop of area j:
[class, part j, patches]. Every leading token has a position vector of its own; the table of positions has patches only.

B batch, C channels, H x W pixels, L patches, D width, J parts, P part tokens in a sequence (J or 1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.encoders.weights import load_strictly, read_weights
from bowerbird.errors import InputError
from bowerbird.protocols import Encoder, Features
from bowerbird_mim.patches import patch_grid
from bowerbird_mim.timm_weights import load_vit_weights
from bowerbird_mim.vit import ImageSize, PatchViTConfig, ViTEncoder, resized_positions

FUSIONS = ("cat", "mean")


class PartTokenViT(nn.Module):
    """The network of PASS. Its parameters have the names of the authors' code (``part_token1``, ``part1_pos``, ...).

    Args:
        encoder: Gives its patch convolution, blocks and norm, which are used as they are, and the first values of class
            token and positions. It is not needed afterwards.
        num_parts: J; with 0 it is a plain ViT that returns the class token.
        native_pos_interpolation: Resample the positions even where the grid is the table's own, as the authors'
            pre-training does by an oversight. By default the table is used untouched there.

    Raises:
        InputError: ``num_parts`` is negative, or another encoder.
    """

    def __init__(self, encoder: ViTEncoder, num_parts: int = 3, *, native_pos_interpolation: bool = False) -> None:
        super().__init__()
        if num_parts < 0:
            raise InputError(f"num_parts = {num_parts}: expected 0 or more part tokens")
        if not isinstance(encoder, ViTEncoder):
            raise InputError(f"part tokens are added to a ViTEncoder (mim:vit), not to a {type(encoder).__name__}")
        self.num_parts, self.native_pos_interpolation = num_parts, native_pos_interpolation
        self.embed_dim, self.grid, self.patch_size = encoder.embed_dim, encoder.grid, encoder.patch_size
        self.in_channels = encoder.in_channels
        self.patch_embed, self.blocks, self.norm = encoder.patch_embed, encoder.blocks, encoder.norm
        self.cls_token = nn.Parameter(encoder.cls_token.detach().clone())
        learned, table = encoder.pos_embed.requires_grad, encoder.pos_embed.detach()
        self.cls_pos = nn.Parameter(table[:, :1].clone(), requires_grad=learned)
        self.pos_embed = nn.Parameter(table[:, 1:].clone(), requires_grad=learned)
        for part in range(1, num_parts + 1):
            for name in (f"part_token{part}", f"part{part}_pos"):
                self.register_parameter(name, nn.Parameter(torch.empty_like(self.cls_token)))
                nn.init.trunc_normal_(getattr(self, name), std=0.02)

    def part_tokens(self) -> Tensor:
        """``(J, D)``: every part token with its position."""
        if not self.num_parts:
            return self.cls_token.new_zeros(0, self.embed_dim)
        parts = range(1, self.num_parts + 1)
        return torch.cat([getattr(self, f"part_token{j}") + getattr(self, f"part{j}_pos") for j in parts])[:, 0]

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """``(1, rows * columns, D)`` of the patches."""
        if grid == self.grid and not self.native_pos_interpolation:
            return self.pos_embed
        return resized_positions(self.pos_embed, self.grid, grid)

    def tokens(self, images: Tensor, part: int | Tensor | None = None) -> Tensor:
        """All tokens after the final norm: ``(B, 1 + P + L, D)``. Arguments and errors as ``forward``."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise InputError(
                f"images have shape {tuple(images.shape)}; this network needs (B, {self.in_channels}, H, W)"
            )
        grid = patch_grid(images.shape[2], images.shape[3], self.patch_size)
        patches = self.patch_embed(images) + self.positions(grid)
        batch = len(patches)
        first = (self.cls_token + self.cls_pos).expand(batch, -1, -1)
        parts = self.part_tokens()  # (J, D)
        if part is None:
            parts = parts.expand(batch, -1, -1)
        elif isinstance(part, Tensor):
            self._check_parts(part, batch)
            parts = parts[part][:, None]
        elif isinstance(part, int | np.integer) and 0 <= part < self.num_parts:
            parts = parts[int(part)].expand(batch, 1, -1)
        else:
            raise InputError(f"part = {part!r}: expected None (a whole picture) or {self._accepted()}")
        tokens = torch.cat([first.to(patches.dtype), parts.to(patches.dtype), patches], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward(self, images: Tensor, part: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Class token ``(B, D)`` and part tokens ``(B, P, D)`` after the final norm.

        Args:
            images: ``(B, C, H, W)``, sides divisible by the patch side.
            part: ``None`` for whole pictures: every part token, P = J. 0 to J - 1 for crops of that area: its part
                token alone, P = 1. int64 ``(B,)`` where the pictures are crops of different areas.

        Raises:
            InputError: Another shape, or a part that does not exist.
        """
        tokens = self.tokens(images, part)
        count = self.num_parts if part is None else 1
        return tokens[:, 0], tokens[:, 1 : 1 + count]

    def _check_parts(self, part: Tensor, batch: int) -> None:
        if part.shape != (batch,) or part.dtype != torch.int64:
            raise InputError(
                f"part has shape {tuple(part.shape)} and type {part.dtype}; expected int64 ({batch},), one per picture"
            )
        # On a GPU the index itself is checked by the kernel; reading it here would wait for the device.
        if not torch.compiler.is_compiling() and not part.is_cuda and not ((part >= 0) & (part < self.num_parts)).all():
            raise InputError(f"part holds values from {part.min()} to {part.max()}: expected {self._accepted()}")

    def _accepted(self) -> str:
        return f"a part of 0 to {self.num_parts - 1}" if self.num_parts else "nothing else: there are no part tokens"


def fuse_part_features(cls: Tensor, parts: Tensor, mode: Literal["cat", "mean"] = "cat") -> Tensor:
    """One feature of a class token and its part tokens (PASS, official fine-tuning code).

    With m the mean of the part tokens: ``cat``: [cls ; m], ``(B, 2 D)``; ``mean``: (cls + m) / 2, ``(B, D)``.

    Args:
        cls: ``(B, D)``.
        parts: ``(B, P, D)``, P at least 1.
        mode: ``cat`` or ``mean``.

    Raises:
        InputError: Shapes that do not fit, no part, or another mode.
    """
    if cls.ndim != 2 or parts.ndim != 3 or parts.shape[0] != cls.shape[0] or parts.shape[2] != cls.shape[1]:
        raise InputError(
            f"cls {tuple(cls.shape)} and parts {tuple(parts.shape)} do not fit: expected (B, D) and (B, P, D)"
        )
    if parts.shape[1] == 0:
        raise InputError("parts has no part token: the class token alone is the feature")
    if mode not in FUSIONS:
        raise InputError(f"mode = {mode!r}: expected one of {', '.join(FUSIONS)}")
    mean = parts.mean(dim=1)
    return torch.cat([cls, mean], dim=1) if mode == "cat" else (cls + mean) / 2


# ------------------------------------------------------------------------------------------------ encoder


class PartViTEncoder(Encoder):
    """``mim:part-vit``: ``PartTokenViT`` as an encoder of the hook; its embedding is the fused feature.

    Args:
        vit: The network.
        pooling: ``cat``, ``mean`` (``fuse_part_features``) or ``class`` (the class token alone).
    """

    def __init__(self, vit: PartTokenViT, pooling: Literal["cat", "mean", "class"], preprocessing: Any = None) -> None:
        super().__init__()
        if pooling != "class" and not vit.num_parts:
            raise InputError(f"pooling = {pooling!r} needs part tokens; with num_parts = 0 only 'class' is left")
        self.vit, self.preprocessing = vit, preprocessing
        self.fusion: Literal["cat", "mean"] | None = None if pooling == "class" else pooling
        self.embed_dim = 2 * vit.embed_dim if pooling == "cat" else vit.embed_dim

    @classmethod
    def build(cls, config: PartViTConfig) -> Self:
        """Raises ``DataError`` for weights that do not fit, naming what differs."""
        plain = ViTEncoder(**config.architecture())
        state = read_weights(config.weights) if config.weights is not None else {}
        of_pass = any(key.endswith("cls_pos") for key in state)
        if config.weights is not None and not of_pass:
            load_vit_weights(plain, config.weights)
        vit = PartTokenViT(plain, config.num_parts, native_pos_interpolation=config.native_pos_interpolation)
        if of_pass:
            load_strictly(vit, backbone_state(state), source=str(config.weights))
        return cls(vit, config.pooling, config.preprocessing())

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` without the source of the first weights: the weights lie beside it."""
        return {key: value for key, value in config.items() if key != "weights"}

    def fuse(self, cls: Tensor, parts: Tensor) -> Tensor:
        """``(B, D)`` and ``(B, J, D)`` to ``(B, embed_dim)``."""
        return cls if self.fusion is None else fuse_part_features(cls, parts, self.fusion)

    def forward(self, batch: Batch) -> Features:
        images = batch["image"]
        tokens = self.vit.tokens(images)
        first = 1 + self.vit.num_parts
        pooled = self.fuse(tokens[:, 0], tokens[:, 1:first])
        grid = (images.shape[2] // self.vit.patch_size, images.shape[3] // self.vit.patch_size)
        return Features(pooled=pooled, tokens=tokens[:, first:], grid=grid)


def backbone_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's entries of a PASS checkpoint; prefixes are taken away, the training heads are left out."""
    prefixes = re.compile(r"^(module\.|backbone\.|vit\.)+")
    heads = re.compile(r"(head\.|mlp_|last_layer)")
    named = {prefixes.sub("", key): value for key, value in state.items()}
    return {key: value for key, value in named.items() if not heads.match(key)}


class PartViTConfig(PatchViTConfig):
    """Settings of ``mim:part-vit``."""

    image_size: ImageSize = Field(default=(256, 128), description="[height, width] in pixels, or a square's side.")
    num_parts: int = Field(default=3, ge=0, description="Number of part tokens.")
    pooling: Literal["cat", "mean", "class"] = Field(
        default="cat",
        description="The embedding. cat: class token and mean part token, twice the width; mean: their mean; class: "
        "the class token.",
    )
    init: Literal["xavier", "truncated"] = Field(
        default="truncated", description="First weights: as MAE (better for narrow networks), or as DINO and PASS."
    )
    native_pos_interpolation: bool = Field(
        default=False, description="Resample positions at the native size, too, as the authors' pre-training code does."
    )
    weights: str | None = Field(
        default=None, description="First weights: a file of a timm ViT, or of a PASS network (tensors only)."
    )

    @model_validator(mode="after")
    def _fusion_needs_parts(self) -> Self:
        if not self.num_parts and self.pooling != "class":
            raise ValueError(f"pooling = {self.pooling!r} needs part tokens; with num_parts = 0 set pooling = 'class'")
        return self

    def architecture(self) -> dict[str, Any]:
        """The arguments of the ``ViTEncoder`` whose parts are used."""
        own = {"num_parts", "pooling", "native_pos_interpolation"}
        settings = {name: value for name, value in super().architecture().items() if name not in own}
        return settings | {"position": "learned"}


def part_vit_of(encoder: Encoder, method: str) -> PartViTEncoder:
    """``encoder`` as the network with part tokens that ``method`` needs. Raises ``InputError`` for another."""
    if not isinstance(encoder, PartViTEncoder):
        raise InputError(
            f"{method} trains part tokens and needs the encoder mim:part-vit, not {type(encoder).__name__}"
        )
    return encoder
