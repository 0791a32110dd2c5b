"""A vision transformer over clips with divided space-time attention (Bain et al., ICCV 2021, arXiv 2104.00650).

One class token stands for the whole clip. Tokens lie frame by frame: class token, the patches of frame 0, those of
frame 1, and so on. In both attentions the class token attends to every token; a patch attends to the class token and,
in space attention, to the patches of its frame, in time attention to the patches of its place in every frame. Nothing
asks for whole patch grids: any number of tokens per frame will do (kept patches, regions, words).

B batch, T frames, N patches per frame, n tokens per frame, M = 1 + T n, D width, h heads, p patch side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from bowerbird.errors import InputError

TimeInit = Literal["zeros", "official_zeros", "normal"]
Axis = Literal["space", "time", "joint"]
EPS = 1e-6  # of every layer norm


def divided_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    frames: int,
    axis: Axis,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention of a class token and of tokens in groups; one softmax over the joined keys.

    Equal to ordinary attention over all M tokens with a mask of -infinity wherever a token may not look.

    Args:
        query, key, value: ``(B, M, h, d)`` each, M = 1 + frames * n, class token first, then frame by frame.
        frames: T.
        axis: ``space``: groups are the frames; ``time``: groups are the tokens of one place in every frame; ``joint``:
            one group of all.
        key_mask: ``(B, M)``, added to the logits of every query: 0 for real tokens, very negative for padding.

    Returns:
        ``(B, M, h, d)``.

    Raises:
        InputError: The tokens are no whole number of frames, or the mask has another shape.
    """
    batch, length, heads, dim = query.shape
    if frames < 1 or (length - 1) % frames:
        raise InputError(f"{length - 1} tokens besides the class token are no whole number of {frames} frames")
    if key_mask is not None and key_mask.shape != (batch, length):
        raise InputError(f"key_mask has shape {tuple(key_mask.shape)}; expected {(batch, length)}")
    count = (length - 1) // frames  # n
    additive = None if key_mask is None else key_mask.to(query.dtype)

    to_all = None if additive is None else additive[:, None, None]
    if axis == "joint" or count == 0:
        return _attention(query, key, value, to_all)
    # Splits rather than slices: their gradients are joined, not added to zeros.
    (first, others), keys, values = (tokens.split([1, length - 1], dim=1) for tokens in (query, key, value))
    of_all = _attention(first, key, value, to_all)
    if axis == "space":
        shape = (batch * frames, count, heads, dim)  # one attention for every clip and frame
        joined, mask = _by_frame, None if additive is None else _mask_by_frame(additive, frames)
    else:
        # One attention for every clip, place and head: places count as heads, so that no token moves in memory.
        shape = (batch, frames, count * heads, dim)
        joined, mask = _by_place, None if additive is None else _mask_by_place(additive, frames, heads)
    seen = _attention(others.reshape(shape), joined(keys, frames), joined(values, frames), mask)
    return torch.cat([of_all, seen.reshape(batch, length - 1, heads, dim)], dim=1)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Ordinary attention with the heads behind the tokens: ``(B, Lq, h, d)`` and ``(B, Lk, h, d)``."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def _by_frame(tokens: Sequence[Tensor], frames: int) -> Tensor:
    """The class token before the tokens of every frame: ``(B, 1, h, d), (B, T n, h, d)`` to ``(B T, 1 + n, h, d)``."""
    first, others = tokens
    own = others.unflatten(1, (frames, others.shape[1] // frames))
    return torch.cat([first[:, None].expand(-1, frames, -1, -1, -1), own], dim=2).flatten(0, 1)


def _by_place(tokens: Sequence[Tensor], frames: int) -> Tensor:
    """The class token before the tokens of every place: ``(B, 1, h, d), (B, T n, h, d)`` to ``(B, 1 + T, n h, d)``."""
    first, others = tokens
    own = others.unflatten(1, (frames, others.shape[1] // frames))
    return torch.cat([first[:, :, None].expand(-1, -1, own.shape[2], -1, -1), own], dim=1).flatten(2, 3)


def _mask_by_frame(mask: Tensor, frames: int) -> Tensor:
    """``(B, 1 + T n)`` to ``(B T, 1, 1, 1 + n)``."""
    own = mask[:, 1:].unflatten(1, (frames, (mask.shape[1] - 1) // frames))
    return torch.cat([mask[:, :1, None].expand(-1, frames, -1), own], dim=2).flatten(0, 1)[:, None, None]


def _mask_by_place(mask: Tensor, frames: int, heads: int) -> Tensor:
    """``(B, 1 + T n)`` to ``(B, n h, 1, 1 + T)``."""
    own = mask[:, 1:].unflatten(1, (frames, (mask.shape[1] - 1) // frames)).transpose(1, 2)
    joined = torch.cat([mask[:, :1, None].expand(-1, own.shape[1], -1), own], dim=2)
    return joined.repeat_interleave(heads, dim=1)[:, :, None]


class DividedAttention(nn.Module):
    """``divided_attention`` with its projections: one ``Linear(D, 3 D)`` for queries, keys and values, one after."""

    def __init__(self, dim: int, heads: int, axis: Axis) -> None:
        super().__init__()
        self.heads, self.axis = heads, axis
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, frames: int, key_mask: Tensor | None = None) -> Tensor:
        batch, length, dim = x.shape
        query, key, value = self.qkv(x).reshape(batch, length, 3, self.heads, dim // self.heads).unbind(2)
        out = divided_attention(query, key, value, frames=frames, axis=self.axis, key_mask=key_mask)
        return self.proj(out.reshape(batch, length, dim))


class Perceptron(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class SpaceTimeBlock(nn.Module):
    """Time attention, space attention whose residual starts again from the block's input, perceptron.

    u = x + Time(LN3 x);  y = x + Space(LN1 u);  x' = y + MLP(LN2 y). Without time attention u = x: a ViT block.

    Args:
        dim: D, a multiple of ``heads``.
        heads: h.
        mlp_ratio: Hidden width of the perceptron, over D.
        temporal: Whether there is time attention.
        time_init: How time attention starts. ``zeros``: its output projection is zero, so that the block begins as a
            ViT block and still learns; ``official_zeros``: as in the released code, queries, keys and values zero and
            an output weight of ones, which leaves no gradient but round-off; ``normal``: like other layers.
        attention: ``divided``, or ``joint``: the space attention is over all tokens.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        temporal: bool = True,
        time_init: TimeInit = "zeros",
        attention: Literal["divided", "joint"] = "divided",
    ) -> None:
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise InputError(f"width {dim} is no multiple of {heads} heads")
        if time_init not in get_args(TimeInit):
            raise InputError(f"time_init = {time_init!r}: expected one of {', '.join(get_args(TimeInit))}")
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = DividedAttention(dim, heads, "space" if attention == "divided" else "joint")
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Perceptron(dim, int(dim * mlp_ratio))
        self.temporal = temporal
        if temporal:
            self.norm3 = nn.LayerNorm(dim, eps=EPS)
            self.timeattn = DividedAttention(dim, heads, "time")
            with torch.no_grad():
                if time_init == "zeros":
                    self.timeattn.proj.weight.zero_()
                    self.timeattn.proj.bias.zero_()
                elif time_init == "official_zeros":
                    self.timeattn.qkv.weight.zero_()
                    self.timeattn.qkv.bias.zero_()
                    self.timeattn.proj.weight.fill_(1.0)
                    self.timeattn.proj.bias.zero_()

    def forward(self, x: Tensor, frames: int, key_mask: Tensor | None = None) -> Tensor:
        """``x (B, 1 + frames * n, D)``; ``key_mask (B, 1 + frames * n)`` is added to the logits (0 keeps a key)."""
        u = x + self.timeattn(self.norm3(x), frames, key_mask) if self.temporal else x
        y = x + self.attn(self.norm1(u), frames, key_mask)
        return y + self.mlp(self.norm2(y))


class PatchEmbedding(nn.Module):
    """Convolution with kernel and stride p: ``(B, T, C, H, W)`` to ``(B, T, N, D)``, row by row."""

    def __init__(self, patch_size: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, video: Tensor) -> Tensor:
        maps = self.proj(video.flatten(0, 1))
        return maps.flatten(2).transpose(1, 2).unflatten(0, video.shape[:2])


class SpaceTimeTransformer(nn.Module):
    """Clips to one vector each, and to one per patch. Parameters have the names of the released code.

    Args:
        image_size: Side of the square frames in pixels.
        patch_size: p. Divides ``image_size``.
        embed_dim: D, a multiple of ``num_heads``.
        depth: Number of blocks.
        num_heads: h.
        mlp_ratio: Hidden width of a block's perceptron, over D.
        max_frames: Most frames of a clip.
        time_init: See ``SpaceTimeBlock``.
        temporal_attention: Without it patches see their own frame only.
        temporal_embedding: Without it (and without time attention) the order of frames is invisible.
        in_channels: C.
        attention: ``divided``, or ``joint``: every token attends to all of them, at the cost of (T N)^2.

    Raises:
        InputError: Sizes that do not divide each other, or values outside these ranges.
    """

    temporal_embed: nn.Parameter | None
    mask_token: nn.Parameter | None

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        max_frames: int = 4,
        time_init: TimeInit = "zeros",
        temporal_attention: bool = True,
        *,
        temporal_embedding: bool = True,
        in_channels: int = 3,
        attention: Literal["divided", "joint"] = "divided",
    ) -> None:
        super().__init__()
        if attention not in ("divided", "joint"):
            raise InputError(f"attention = {attention!r}: expected divided or joint")
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise InputError(f"image_size = {image_size} is no multiple of patch_size = {patch_size}")
        if max_frames < 1 or depth < 0 or in_channels < 1 or not mlp_ratio > 0:
            raise InputError(
                f"max_frames = {max_frames}, depth = {depth}, in_channels = {in_channels}, mlp_ratio = {mlp_ratio}: "
                "expected 1 or more, 0 or more, 1 or more, and above 0"
            )
        self.image_size, self.patch_size, self.in_channels = image_size, patch_size, in_channels
        self.embed_dim, self.depth, self.num_heads, self.max_frames = embed_dim, depth, num_heads, max_frames
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.num_patches = self.grid[0] * self.grid[1]

        self.patch_embed = PatchEmbedding(patch_size, in_channels, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.num_patches, embed_dim))
        if temporal_embedding:
            self.temporal_embed = nn.Parameter(torch.zeros(1, max_frames, embed_dim))
        else:
            self.register_parameter("temporal_embed", None)
        self.register_parameter("mask_token", None)
        self.blocks = nn.ModuleList(
            SpaceTimeBlock(embed_dim, num_heads, mlp_ratio, temporal_attention, time_init, attention)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=EPS)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def create_mask_token(self) -> nn.Parameter:
        """The learnable vector ``(D,)`` that stands for masked patches; made at the first call.

        It is trained with the encoder but is no part of inference: set ``mask_token`` to ``None`` before exporting.
        """
        if self.mask_token is None:
            token = torch.empty(self.embed_dim, dtype=self.cls_token.dtype, device=self.cls_token.device)
            self.mask_token = nn.Parameter(nn.init.trunc_normal_(token, std=0.02))
        return self.mask_token

    # -------------------------------------------------------------------------------------------- tokens

    def check_video(self, video: Tensor) -> None:
        """Raises ``InputError`` for a wrong shape, and for pixels that are whole numbers."""
        side = self.image_size
        if video.ndim != 5 or video.shape[2:] != (self.in_channels, side, side):
            raise InputError(
                f"video has shape {tuple(video.shape)}; this encoder needs (B, T, {self.in_channels}, {side}, {side})"
            )
        if not video.is_floating_point():
            raise InputError(f"video is {video.dtype}; this encoder needs normalised floating point numbers")
        if not 1 <= video.shape[1] <= self.max_frames:
            raise InputError(f"clips of {video.shape[1]} frames; this encoder takes 1 to {self.max_frames}")

    def embed(self, video: Tensor, *, keep: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Tokens before the first block, positions added: ``(B, 1 + T n, D)``.

        Args:
            video: ``(B, T, C, H, W)``.
            keep: int64 ``(B, T, k)``: row-by-row indices of the patches to encode, in this order; n = k.
            mask: bool ``(B, T, N)``: true where ``mask_token`` takes the place of a patch, before positions.
        """
        self.check_video(video)
        batch, frames = video.shape[:2]
        tokens = self.patch_embed(video)  # (B, T, N, D)
        if mask is not None:
            tokens = self._masked(tokens, mask)
        positions = self.pos_embed[:, None, 1:]
        if self.temporal_embed is not None:
            positions = positions + self.temporal_embed[:, :frames, None]
        tokens = tokens + positions
        if keep is not None:
            tokens = self._kept(tokens, keep)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        return torch.cat([first.to(tokens.dtype), tokens.flatten(1, 2)], dim=1)

    def _masked(self, tokens: Tensor, mask: Tensor) -> Tensor:
        if self.mask_token is None:
            raise InputError("mask was given, but this encoder has no mask token: call create_mask_token() first")
        if mask.shape != tokens.shape[:3] or mask.dtype != torch.bool:
            raise InputError(
                f"mask is {mask.dtype} of shape {tuple(mask.shape)}; expected bool of {tuple(tokens.shape[:3])}"
            )
        return torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)

    def _kept(self, tokens: Tensor, keep: Tensor) -> Tensor:
        if keep.ndim != 3 or keep.shape[:2] != tokens.shape[:2] or keep.shape[2] < 1 or keep.dtype != torch.int64:
            raise InputError(
                f"keep is {keep.dtype} of shape {tuple(keep.shape)}; expected int64 of (B, T, k) = "
                f"({tokens.shape[0]}, {tokens.shape[1]}, 1 to {self.num_patches})"
            )
        # On a GPU looking at the values would wait for it; there gather itself refuses them.
        if keep.device.type == "cpu" and not torch.compiler.is_compiling() and len(keep):
            low, high = int(keep.min()), int(keep.max())
            if low < 0 or high >= self.num_patches:
                raise InputError(f"keep holds patch {low if low < 0 else high}; there are 0 to {self.num_patches - 1}")
        return tokens.gather(2, keep[..., None].expand(-1, -1, -1, tokens.shape[-1]))

    def hidden_states(self, video: Tensor, *, keep: Tensor | None = None, mask: Tensor | None = None) -> list[Tensor]:
        """depth + 1 tensors ``(B, 1 + T n, D)``: the input of every block, and last the output of the last one.

        ``norm(hidden_states(video)[-1])[:, 0]`` is what ``forward`` returns.
        """
        states = [self.embed(video, keep=keep, mask=mask)]
        for block in self.blocks:
            states.append(block(states[-1], video.shape[1]))
        return states

    def block_inputs(self, video: Tensor) -> list[Tensor]:
        """``hidden_states`` without the last: ``(B, 1 + T N, D)`` for every block."""
        return self.hidden_states(video)[:-1]

    def forward(
        self,
        video: Tensor,
        *,
        return_tokens: bool = False,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The class token after the final norm ``(B, D)``; with ``return_tokens`` also the patches ``(B, T, n, D)``.

        Raises:
            InputError: ``video`` is not ``(B, T, C, image_size, image_size)`` with T up to ``max_frames``, or ``keep``
                or ``mask`` do not fit it (see ``embed``).
        """
        tokens = self.embed(video, keep=keep, mask=mask)
        for block in self.blocks:
            tokens = block(tokens, video.shape[1])
        if not return_tokens:
            return self.norm(tokens[:, 0])
        tokens = self.norm(tokens)
        frames = video.shape[1]
        return tokens[:, 0], tokens[:, 1:].unflatten(1, (frames, (tokens.shape[1] - 1) // frames))


def inflate_temporal_embedding(
    weight: Tensor, num_frames: int, mode: Literal["zeros", "interp", "bilinear"] = "zeros"
) -> Tensor:
    """A table of frame positions for another number of frames.

    Args:
        weight: ``(1, T, D)``.
        num_frames: Frames of the result. Fewer than T: the first ones.
        mode: What more frames get. ``zeros``: the new ones are zero; ``interp``: the nearest of before, new frame i
            takes old frame floor(i T / num_frames); ``bilinear``: linear in time, half-pixel centres, clamped ends.

    Returns:
        ``(1, num_frames, D)``.

    Raises:
        InputError: ``weight`` has another rank, ``num_frames`` is below 1, or an unknown mode.
    """
    if weight.ndim != 3 or weight.shape[0] != 1 or weight.shape[1] < 1:
        raise InputError(f"weight has shape {tuple(weight.shape)}; expected (1, T, D)")
    if num_frames < 1:
        raise InputError(f"num_frames = {num_frames}: expected 1 or more")
    if mode not in ("zeros", "interp", "bilinear"):
        raise InputError(f"mode = {mode!r}: expected zeros, interp or bilinear")
    old = weight.shape[1]
    if num_frames <= old:
        return weight[:, :num_frames].clone()
    if mode == "zeros":
        return torch.cat([weight, weight.new_zeros(1, num_frames - old, weight.shape[2])], dim=1)
    rows = torch.arange(num_frames, device=weight.device)
    if mode == "interp":
        return weight[:, rows * old // num_frames]
    wide = torch.promote_types(weight.dtype, torch.float32)  # half precision cannot count to 300
    place = ((rows.to(wide) + 0.5) * old / num_frames - 0.5).clamp(0, old - 1)
    low = place.floor().long()
    high = (low + 1).clamp(max=old - 1)
    share = (place - low).to(weight.dtype)[None, :, None]
    return weight[:, low] * (1 - share) + weight[:, high] * share
