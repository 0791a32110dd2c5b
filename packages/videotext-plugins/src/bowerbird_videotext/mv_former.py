"""MV-Former: every frame becomes a few entity tokens, and the entities of all frames attend to each other.

Walmer, Kanjirathinkal, Tai, Muzumdar, Tian, Shrivastava: Multi-entity Video Transformers for Fine-Grained Video
Representation Learning, arXiv 2311.10873. The baseline with one token per frame is CARL (Chen et al., CVPR 2022,
arXiv 2203.14957). Numbers are those of the official code (facebookresearch/video_rep_learning).

B clips, T frames, S patches of C channels, E entity tokens of width d, h width of the transformer, P of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird.errors import InputError

DynamicControl = Literal["separate", "first", "average"]
OneHot = Literal["pool", "enc", "none"]
Reduction = Literal["one", "avg", "max", "lin"]
FramePool = Literal["max", "avg", "cls"]

# ------------------------------------------------------------------------------------------------ tokens of a frame


class LearnableSpatialTokenPooling(nn.Module):
    """Entity tokens of a frame by attention of a few queries over its patches: one head, no output projection.

    Args:
        in_channels: C.
        pool_channels: d.
        num_static: Learnt queries, the same for every frame.
        num_dynamic: Queries that a linear map makes of the frame's global features. They follow the static ones.
        dynamic_control: ``separate``: of each frame its own; ``first``: those of a clip's first frame in all its
            frames; ``average``: the mean of a clip's frames in all of them.
        value_passthrough: The values are the patches themselves; the tokens then have C channels.
        normalize_keys: Keys of norm 1.
        disjoint: After the softmax a patch counts only for the entity that attends to it most.
        global_channels: C' of the global features; by default C.
    """

    def __init__(
        self,
        in_channels: int,
        pool_channels: int = 384,
        num_static: int = 3,
        num_dynamic: int = 0,
        dynamic_control: DynamicControl = "separate",
        value_passthrough: bool = False,
        normalize_keys: bool = False,
        disjoint: bool = False,
        *,
        global_channels: int | None = None,
    ) -> None:
        super().__init__()
        if num_static < 0 or num_dynamic < 0 or num_static + num_dynamic < 1:
            raise InputError(f"num_static = {num_static}, num_dynamic = {num_dynamic}: expected at least one query")
        _check_choice("dynamic_control", dynamic_control, ("separate", "first", "average"))
        self.num_static, self.num_dynamic, self.dynamic_control = num_static, num_dynamic, dynamic_control
        self.normalize_keys, self.disjoint = normalize_keys, disjoint
        self.in_channels, self.pool_channels = in_channels, pool_channels
        self.global_channels = global_channels or in_channels
        self.num_tokens = num_static + num_dynamic
        self.out_channels = in_channels if value_passthrough else pool_channels
        if num_static:
            bound = 1 / math.sqrt(pool_channels)  # the queries and their bias start like a linear layer's
            self.queries = nn.Parameter(torch.empty(num_static, pool_channels).uniform_(-bound, bound))
            self.query_bias = nn.Parameter(torch.empty(pool_channels).uniform_(-bound, bound))
        self.key = nn.Linear(in_channels, pool_channels)
        self.value = nn.Identity() if value_passthrough else nn.Linear(in_channels, pool_channels)
        if num_dynamic:
            self.dynamic = nn.Linear(self.global_channels, pool_channels * num_dynamic)

    def forward(
        self, patches: Tensor, global_features: Tensor | None = None, frame_valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``(B, T, E, d)`` and attention ``(B, T, E, S)``.

        Args:
            patches: ``(B, T, S, C)``.
            global_features: ``(B, T, C')``, needed where there are dynamic queries.
            frame_valid: bool ``(B, T)``; only ``first`` and ``average`` read it. ``None``: all frames are real.

        Raises:
            InputError: Shapes that do not fit, or global features that are missing.
        """
        _check_patches(patches, self.in_channels)
        keys, values = self.key(patches), self.value(patches)
        if self.normalize_keys:
            keys = F.normalize(keys, dim=-1)
        queries = self._queries(patches, global_features, frame_valid) / math.sqrt(self.pool_channels)
        attention = (keys @ queries.mT).mT.softmax(dim=-1)  # one product where all frames share the queries
        if self.disjoint:
            owner = attention.argmax(dim=-2, keepdim=True)
            attention = attention * torch.zeros_like(attention).scatter(-2, owner, 1.0)
        return attention @ values, attention

    def _queries(self, patches: Tensor, global_features: Tensor | None, frame_valid: Tensor | None) -> Tensor:
        """``(E, d)``, or ``(B, T, E, d)`` where some of them are dynamic."""
        static = self.queries + self.query_bias if self.num_static else None
        if not self.num_dynamic:
            assert static is not None
            return static
        clips, frames = patches.shape[:2]
        if global_features is None or global_features.shape != (clips, frames, self.global_channels):
            found = "none" if global_features is None else f"shape {tuple(global_features.shape)}"
            raise InputError(
                f"dynamic queries need global_features of shape {(clips, frames, self.global_channels)}; found {found}"
            )
        made = self.dynamic(global_features).unflatten(-1, (self.num_dynamic, self.pool_channels))
        dynamic = self._shared(made, frame_valid).expand(-1, frames, -1, -1)
        return dynamic if static is None else torch.cat([static.expand(clips, frames, -1, -1), dynamic], dim=2)

    def _shared(self, dynamic: Tensor, frame_valid: Tensor | None) -> Tensor:
        """The queries of a clip's frames ``(B, T, n, d)`` as ``dynamic_control`` says; real frames alone count."""
        if self.dynamic_control == "separate":
            return dynamic
        if frame_valid is None:
            return dynamic[:, :1] if self.dynamic_control == "first" else dynamic.mean(dim=1, keepdim=True)
        if self.dynamic_control == "first":
            first = frame_valid.to(torch.uint8).argmax(dim=1)  # the first of the largest
            return dynamic[torch.arange(len(dynamic), device=dynamic.device), first][:, None]
        weights = frame_valid.to(dynamic.dtype)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        return (weights[:, :, None, None] * dynamic).sum(dim=1, keepdim=True)


class FramePooling(nn.Module):
    """One token per frame: the largest or the mean of its patches in every channel, or its global features."""

    num_tokens = 1

    def __init__(self, channels: int, pool: FramePool = "max") -> None:
        super().__init__()
        _check_choice("pool", pool, ("max", "avg", "cls"))
        self.out_channels, self.pool = channels, pool

    def forward(
        self, patches: Tensor, global_features: Tensor | None = None, frame_valid: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Tokens ``(B, T, 1, C)``. Raises ``InputError`` for shapes that do not fit."""
        if self.pool == "cls":
            if global_features is None or global_features.shape[-1] != self.out_channels:
                raise InputError(f"pool = 'cls' needs global_features of {self.out_channels} channels")
            return global_features[:, :, None], None
        _check_patches(patches, self.out_channels)
        pooled = patches.amax(dim=2, keepdim=True) if self.pool == "max" else patches.mean(dim=2, keepdim=True)
        return pooled, None


class FixedWidthTokens(nn.Module):
    """The paper's fixed-width baseline: E tokens cut from one linear map of the frame's global features.

    It is as wide as ``LearnableSpatialTokenPooling`` but pools nothing in space.
    """

    def __init__(self, global_channels: int, pool_channels: int = 384, num_tokens: int = 3) -> None:
        super().__init__()
        self.num_tokens, self.out_channels, self.global_channels = num_tokens, pool_channels, global_channels
        self.linear = nn.Linear(global_channels, pool_channels * num_tokens)

    def forward(
        self, patches: Tensor, global_features: Tensor | None = None, frame_valid: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Tokens ``(B, T, E, d)``. Raises ``InputError`` where the global features are missing."""
        if global_features is None or global_features.shape[-1] != self.global_channels:
            raise InputError(f"fixed-width tokens need global_features of {self.global_channels} channels")
        return self.linear(global_features).unflatten(-1, (self.num_tokens, self.out_channels)), None


# ------------------------------------------------------------------------------------------------ time


def temporal_position_table(
    frames: int,
    dim: int,
    train_frames: int | None = None,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(frames, dim)``: the sine (even channels i) or cosine (odd) of ``position / 10000^(i / dim)``.

    Every channel has a frequency of its own. Positions are 0, 1, ..., or, where ``frames`` is not ``train_frames``,
    ``frames`` equal steps from 0 to ``train_frames - 1``.
    """
    if frames < 1 or dim < 1:
        raise InputError(f"a position table of {frames} frames and {dim} channels: expected at least 1 of each")
    positions = torch.arange(frames, dtype=torch.float64)
    if train_frames is not None and frames != train_frames:
        positions = torch.linspace(0, train_frames - 1, frames, dtype=torch.float64)
    channels = torch.arange(dim, dtype=torch.float64)
    angles = positions[:, None] / 10000 ** (channels / dim)
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos()).to(device=device, dtype=dtype)


class MultiEntityVideoTransformer(nn.Module):
    """Embeddings of frames from their patches.

    Tokens of every frame (``pooling``), one perceptron for all of them, temporal positions, a transformer over the E*T
    tokens of a clip (all frames of entity 0, then of entity 1, ...), E tokens to one per frame, a linear layer.

    Args:
        pooling: Module with ``num_tokens`` (E), ``out_channels`` (d) and
            ``forward(patches, global_features, frame_valid) -> (tokens (B, T, E, d), attention)``.
        hidden: h.
        layers, heads, ffn: Of the transformer: pre-norm, ReLU, no norm at its end.
        embedding_dim: P.
        entity_one_hot: Where a token is told which entity it is: right behind the pooling, before the transformer
            (whose tokens then have E channels less from the perceptron), or nowhere.
        reduction: From E tokens to a frame: entity 0, mean, maximum, or a linear layer over all.
        train_frames: Length of the clips in training; others are given positions from 0 to ``train_frames - 1``, too.
        mlp_widths: Hidden widths of the perceptron, 256 times the paper's "capacity scalar" each.
        dropout: Everywhere.
    """

    def __init__(
        self,
        pooling: nn.Module,
        hidden: int = 256,
        layers: int = 3,
        heads: int = 8,
        ffn: int = 1024,
        embedding_dim: int = 128,
        entity_one_hot: OneHot | None = "pool",
        reduction: Reduction = "one",
        train_frames: int = 80,
        *,
        mlp_widths: Sequence[int] = (512, 512),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        entity_one_hot = entity_one_hot or "none"
        _check_choice("entity_one_hot", entity_one_hot, ("pool", "enc", "none"))
        _check_choice("reduction", reduction, tuple(_REDUCTIONS))
        if hidden % heads:
            raise InputError(f"hidden = {hidden} cannot be divided among {heads} heads")
        self.pooling, self.entity_one_hot, self.reduction = pooling, entity_one_hot, reduction
        self.hidden, self.embedding_dim, self.train_frames = hidden, embedding_dim, train_frames
        if layers < 1:
            raise InputError(f"layers = {layers}: expected 1 or more")
        entities = self.num_tokens = int(pooling.num_tokens)  # type: ignore[arg-type]
        if entity_one_hot == "enc" and hidden <= entities:
            raise InputError(f"hidden = {hidden} leaves no channel beside the one-hot rows of {entities} entities")
        width = int(pooling.out_channels) + entities * (entity_one_hot == "pool")  # type: ignore[arg-type]
        steps: list[nn.Module] = []
        for following in mlp_widths:
            steps += [nn.Dropout(dropout), nn.Linear(width, following), nn.BatchNorm1d(following), nn.ReLU()]
            width = following
        self.mlp = nn.Sequential(*steps)
        self.to_hidden = nn.Linear(width, hidden - entities * (entity_one_hot == "enc"))
        layer = nn.TransformerEncoderLayer(hidden, heads, ffn, dropout, batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)  # deep copies of one layer
        self.reduce = nn.Linear(entities * hidden, hidden) if reduction == "lin" else None
        self.to_embedding = nn.Linear(hidden, embedding_dim)

    def forward(
        self, patches: Tensor, frame_valid: Tensor | None = None, *, global_features: Tensor | None = None
    ) -> Tensor:
        """``(B, T, P)``, not normalised.

        Args:
            patches: ``(B, T, S, C)``.
            frame_valid: ``(B, T)``, true where a frame is real: no other frame is attended to. A clip without any is
                taken as it is.
            global_features: ``(B, T, C')``, where the pooling needs them.

        Raises:
            InputError: Shapes that do not fit.
        """
        if frame_valid is not None:
            if frame_valid.shape != patches.shape[:2]:
                raise InputError(
                    f"frame_valid has the shape {tuple(frame_valid.shape)}; expected {tuple(patches.shape[:2])}"
                )
            frame_valid = frame_valid.bool()
            frame_valid = frame_valid | ~frame_valid.any(dim=1, keepdim=True)  # attention to nothing is no number
        tokens, _ = self.pooling(patches, global_features, frame_valid)
        clips, frames, entities = tokens.shape[:3]
        if self.entity_one_hot == "pool":
            tokens = self._told_apart(tokens)
        rows = self.mlp(tokens.reshape(clips * frames * entities, -1))  # batch norm over all tokens of all frames
        tokens = self.to_hidden(rows).view(clips, frames, entities, -1)
        positions = temporal_position_table(
            frames, tokens.shape[-1], self.train_frames, device=tokens.device, dtype=tokens.dtype
        )
        tokens = tokens + positions[:, None]
        if self.entity_one_hot == "enc":
            tokens = self._told_apart(tokens)
        tokens = tokens.transpose(1, 2).flatten(1, 2)  # entity by entity
        hidden_keys = None if frame_valid is None else ~frame_valid.repeat(1, entities)
        layers = self.transformer.layers
        for layer in layers[:-1]:
            tokens = layer(tokens, src_key_padding_mask=hidden_keys)
        # Where entity 0 alone becomes the embedding, the last layer is not asked about the others.
        tokens = _of_first(layers[-1], tokens, frames * (1 if self.reduction == "one" else entities), hidden_keys)
        tokens = tokens.view(clips, -1, frames, self.hidden)
        if self.reduce is not None:
            return self.to_embedding(self.reduce(tokens.transpose(1, 2).flatten(2)))
        return self.to_embedding(_REDUCTIONS[self.reduction](tokens))

    def _told_apart(self, tokens: Tensor) -> Tensor:
        """``tokens (B, T, E, F)`` with the one-hot row of their entity appended: ``(B, T, E, F + E)``."""
        one_hot = torch.eye(self.num_tokens, dtype=tokens.dtype, device=tokens.device)
        return torch.cat([tokens, one_hot.expand(*tokens.shape[:2], -1, -1)], dim=-1)


class LateFusionVideoTransformer(MultiEntityVideoTransformer):
    """The baseline (CARL): each frame is pooled to one vector before frames see each other; all else is the same.

    Args:
        pool: Maximum or mean of the patches, or the frame's global features (``cls``).
        in_channels: C of the patches; with ``cls`` C' of the global features.
    """

    def __init__(
        self,
        pool: FramePool = "max",
        in_channels: int = 2304,
        hidden: int = 256,
        layers: int = 3,
        heads: int = 8,
        ffn: int = 1024,
        embedding_dim: int = 128,
        train_frames: int = 80,
        *,
        mlp_widths: Sequence[int] = (512, 512),
        dropout: float = 0.1,
    ) -> None:
        super().__init__(
            FramePooling(in_channels, pool), hidden, layers, heads, ffn, embedding_dim, "none", "one", train_frames,
            mlp_widths=mlp_widths, dropout=dropout,
        )  # fmt: skip


class ProjectionHead(nn.Module):
    """Only in training: linear, batch norm over all frames, ReLU, linear. The result is not yet normalised."""

    def __init__(self, dim: int = 128, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or dim
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, embeddings: Tensor) -> Tensor:
        """``(..., P)`` to ``(..., P)``."""
        projected: Tensor = self.layers(embeddings.reshape(-1, embeddings.shape[-1]))
        return projected.view(embeddings.shape)


def _of_first(layer: nn.Module, tokens: Tensor, count: int, hidden_keys: Tensor | None) -> Tensor:
    """What a pre-norm ``layer`` gives for the first ``count`` of ``tokens (B, E T, h)``, which see all of them."""
    if count == tokens.shape[1]:
        return layer(tokens, src_key_padding_mask=hidden_keys)
    parts: Any = layer
    keys = parts.norm1(tokens)
    seen, _ = parts.self_attn(keys[:, :count], keys, keys, key_padding_mask=hidden_keys, need_weights=False)
    tokens = tokens[:, :count] + parts.dropout1(seen)
    hidden = parts.dropout(parts.activation(parts.linear1(parts.norm2(tokens))))
    return tokens + parts.dropout2(parts.linear2(hidden))


# tokens (B, E, T, h) -> (B, T, h)
_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "one": lambda tokens: tokens[:, 0],
    "avg": lambda tokens: tokens.mean(dim=1),
    "max": lambda tokens: tokens.amax(dim=1),
    "lin": lambda tokens: tokens,  # by MultiEntityVideoTransformer.reduce
}


def _check_patches(patches: Tensor, channels: int) -> None:
    if patches.ndim != 4 or patches.shape[-1] != channels or patches.shape[2] == 0:
        raise InputError(
            f"patches have the shape {tuple(patches.shape)}; expected (clips, frames, patches, {channels})"
        )


def _check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise InputError(f"{name} = {value!r}; accepted: {', '.join(accepted)}")
