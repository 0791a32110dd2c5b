"""One transformer for words and frames: ViT blocks, token rolling along time, no parameter of its own for time.

Wang et al.: All in One: Exploring Unified Video-Language Pre-training, CVPR 2023 (arXiv 2203.07303).

B batch, T frames, N patches of a frame, L words, D width, P width of the projections.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from bowerbird.errors import InputError
from bowerbird_videotext.space_time import PatchEmbedding
from bowerbird_videotext.text import check_pieces
from bowerbird_videotext.token_roll import roll_in_place


@dataclass(frozen=True)
class UnifiedOutput:
    """What ``UnifiedVideoTextTransformer`` makes of a pair, of texts alone, or of videos alone.

    Attributes:
        text: ``(B, L, D)`` words; of texts alone ``(B, L, P)``, projected. ``None`` of videos alone.
        video: ``(B, 1 + N, D)`` the class token and the patches, mean over the frames; of videos alone
            ``(B, 1 + N, P)``, projected. ``None`` of texts alone.
        pooled: ``(B, D)``, tanh of a linear layer of ``first``: what heads read.
        first: ``(B, D)``: the first word ([CLS]) where there are words, else the frames' class token; not projected.
    """

    text: Tensor | None
    video: Tensor | None
    pooled: Tensor
    first: Tensor


class TextEmbeddings(nn.Module):
    """Word + position + segment (always the first), layer norm, dropout: ``(B, L)`` to ``(B, L, D)``. BERT's names."""

    def __init__(self, vocab_size: int, dim: int, max_length: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.vocab_size, self.max_length = vocab_size, max_length
        self.word_embeddings = nn.Embedding(vocab_size, dim)
        self.position_embeddings = nn.Embedding(max_length, dim)
        self.token_type_embeddings = nn.Embedding(2, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        for table in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Raises ``InputError`` for another shape, too long texts, and (on the CPU) words outside the vocabulary."""
        check_pieces(input_ids, None, vocab_size=self.vocab_size, max_length=self.max_length)
        places = self.position_embeddings.weight[: input_ids.shape[1]]
        words = self.word_embeddings(input_ids) + places + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(words))


class UnifiedVideoTextTransformer(nn.Module):
    """Every frame makes a sequence with the words of the caption; blocks see one frame at a time.

    Of a pair, tokens of the frames are rolled along time before every block (``temporal_token_roll``), so that frames
    learn of each other; words are copied for every frame, differ after the first block, and are averaged at the end,
    like the frames. Texts and videos alone go through the same blocks without rolling and have projections of their own
    for contrastive use. Of texts alone the T copies would be equal: one is computed.

    Args:
        vocab_size: Rows of the table of words; ``None``: no such table, words come embedded (``encode``).
        image_size: Side of the square frames in pixels.
        patch_size: Side of a patch; divides ``image_size``.
        embed_dim: D, a multiple of ``num_heads``.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of a block's perceptron, over D.
        num_frames: Most frames of a clip.
        max_text_length: Most tokens of a text.
        roll_divisor: About 2/divisor of a frame's tokens move; ``None``: no rolling.
        temporal_embedding: A learned vector per frame, zero at first, added to its patches.
        shuffle_patches: In joint forward passes give the patches of every frame a random order, a new one every time,
            as the released code does, so that other patches roll; by default they stand row by row.
        projection_dim: P.
        dropout: Of embeddings, and of what attention and perceptrons add.
        drop_path: Largest rate of stochastic depth; it grows linearly from 0 over the blocks.

    Raises:
        InputError: Sizes that do not divide each other, or values outside these ranges.
    """

    def __init__(
        self,
        *,
        vocab_size: int | None = 30522,
        image_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_frames: int = 3,
        max_text_length: int = 40,
        roll_divisor: int | None = 8,
        temporal_embedding: bool = True,
        shuffle_patches: bool = False,
        projection_dim: int = 512,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise InputError(f"image_size = {image_size} is no multiple of patch_size = {patch_size}")
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise InputError(f"embed_dim = {embed_dim} is no multiple of num_heads = {num_heads}")
        counts = {
            "vocab_size": vocab_size, "num_frames": num_frames, "max_text_length": max_text_length,
            "projection_dim": projection_dim,
        }  # fmt: skip
        for name, value in counts.items():
            if value is not None and value < 1:
                raise InputError(f"{name} = {value}: expected 1 or more")
        if depth < 0 or not mlp_ratio > 0 or not 0 <= dropout < 1 or not 0 <= drop_path < 1:
            raise InputError(
                f"depth = {depth}, mlp_ratio = {mlp_ratio}, dropout = {dropout}, drop_path = {drop_path}: expected 0 "
                "or more, above 0, and twice 0 to below 1"
            )
        if roll_divisor is not None and roll_divisor < 2:
            raise InputError(f"roll_divisor = {roll_divisor}: expected 2 or more, or None for no rolling")
        self.image_size, self.patch_size, self.embed_dim, self.num_frames = (
            image_size,
            patch_size,
            embed_dim,
            num_frames,
        )
        self.roll_divisor, self.shuffle_patches, self.projection_dim = roll_divisor, shuffle_patches, projection_dim
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.num_patches = self.grid[0] * self.grid[1]

        self.text_embeddings = (
            None if vocab_size is None else TextEmbeddings(vocab_size, embed_dim, max_text_length, dropout)
        )
        self.token_type = nn.Embedding(2, embed_dim)  # 0: of words, 1: of frames
        self.patch_embed = PatchEmbedding(patch_size, 3, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, embed_dim))
        if temporal_embedding:
            self.temporal_embed = nn.Parameter(torch.zeros(1, num_frames, embed_dim))
        else:
            self.register_parameter("temporal_embed", None)
        self.embed_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias=True,
                proj_drop=dropout,
                drop_path=drop_path * i / max(1, depth - 1),
                norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.pooler = nn.Linear(embed_dim, embed_dim)
        self.txt_proj = nn.Linear(embed_dim, projection_dim)
        self.vid_proj = nn.Linear(embed_dim, projection_dim)

        nn.init.normal_(self.token_type.weight, std=0.02)
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        for module in (*self.blocks.modules(), self.pooler, self.txt_proj, self.vid_proj):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)  # fits every width; the authors start from a trained ViT
                nn.init.zeros_(module.bias)

    # -------------------------------------------------------------------------------------------- embeddings

    def embed_text(self, text_ids: Tensor) -> Tensor:
        """``(B, L)`` to ``(B, L, D)``, without the vector that says that these are words. Raises ``InputError``."""
        if self.text_embeddings is None:
            raise InputError("this transformer has no table of words: give it words that are embedded (encode)")
        return self.text_embeddings(text_ids)

    def patch_order(self, video: Tensor) -> Tensor | None:
        """A random ``order`` of ``embed_video`` with ``shuffle_patches``, else ``None``."""
        if not self.shuffle_patches:
            return None
        return torch.rand((*video.shape[:2], self.num_patches), device=video.device).argsort(dim=2)

    def embed_video(self, video: Tensor, order: Tensor | None = None) -> Tensor:
        """``(B, T, 3, H, W)`` to ``(B, T, 1 + N, D)``, without the vector that says that these are frames.

        Args:
            video: T is at most ``num_frames``.
            order: int64 ``(B, T, N)``: which patch stands at every place, by default row by row. Positions belong to
                the patches and move with them.

        Raises:
            InputError: A video of another shape, or an order that does not fit.
        """
        side = self.image_size
        if video.ndim != 5 or video.shape[2:] != (3, side, side):
            raise InputError(f"video has shape {tuple(video.shape)}; this encoder needs (B, T, 3, {side}, {side})")
        batch, frames = video.shape[:2]
        if not 1 <= frames <= self.num_frames:
            raise InputError(f"clips of {frames} frames; this encoder takes 1 to {self.num_frames}")
        patches = self.patch_embed(video) + self.pos_embed[:, None, 1:]  # (B, T, N, D)
        if self.temporal_embed is not None:
            patches = patches + self.temporal_embed[:, :frames, None]
        if order is not None:
            if order.shape != patches.shape[:3]:
                raise InputError(f"order has shape {tuple(order.shape)}; expected {tuple(patches.shape[:3])}")
            patches = patches.gather(2, order[..., None].expand_as(patches))
        first = (self.cls_token + self.pos_embed[:, :1])[None].expand(batch, frames, -1, -1)
        return self.embed_dropout(torch.cat([first.to(patches.dtype), patches], dim=2))

    # -------------------------------------------------------------------------------------------- passes

    def encode(
        self,
        words: Tensor | None = None,
        text_mask: Tensor | None = None,
        frames: Tensor | None = None,
        frame_mask: Tensor | None = None,
    ) -> UnifiedOutput:
        """Modality vectors, blocks, last norm, mean over the frames: from what ``embed_text`` and ``embed_video`` give.

        Args:
            words: ``(B, L, D)``.
            text_mask: ``(B, L)``, 1 where a word is real; ``None``: all are.
            frames: ``(B, T, 1 + N, D)``.
            frame_mask: ``(B, T, 1 + N)``, 1 where a patch is no padding; ``None``: none is.

        Raises:
            InputError: Neither words nor frames, or shapes that do not fit.
        """
        if words is None and frames is None:
            raise InputError("neither video nor text: give one of them, or both")
        self._check(words, text_mask, frames, frame_mask)
        if words is not None:
            words = words + self.token_type.weight[0]
        if frames is not None:
            frames = frames + self.token_type.weight[1]
        if words is not None and frames is not None:
            return self._joint(words, text_mask, frames, frame_mask)
        if words is not None:
            text = self.norm(self._blocks(words, text_mask))
            return UnifiedOutput(self.txt_proj(text), None, self._pooled(text[:, 0]), text[:, 0])
        assert frames is not None
        mask = None if frame_mask is None else frame_mask.flatten(0, 1)
        tokens = self.norm(self._blocks(frames.flatten(0, 1), mask))
        tokens = tokens.unflatten(0, frames.shape[:2]).mean(dim=1)
        return UnifiedOutput(None, self.vid_proj(tokens), self._pooled(tokens[:, 0]), tokens[:, 0])

    def _check(
        self, words: Tensor | None, text_mask: Tensor | None, frames: Tensor | None, frame_mask: Tensor | None
    ) -> None:
        for name, tokens, mask, dims in (("text", words, text_mask, 3), ("frame", frames, frame_mask, 4)):
            if tokens is None:
                continue
            if tokens.ndim != dims or tokens.shape[-1] != self.embed_dim:
                raise InputError(f"{name} tokens of shape {tuple(tokens.shape)}: expected {dims} axes, D last")
            if mask is not None and mask.shape != tokens.shape[:-1]:
                raise InputError(f"{name}_mask {tuple(mask.shape)} does not fit tokens {tuple(tokens.shape)}")
        if words is not None and frames is not None and len(words) != len(frames):
            raise InputError(f"{len(words)} texts and {len(frames)} videos: a pair has one of each")

    def _joint(
        self, words: Tensor, text_mask: Tensor | None, frames: Tensor, frame_mask: Tensor | None
    ) -> UnifiedOutput:
        batch, count, patches, _ = frames.shape
        length = words.shape[1]
        copies = words[:, None].expand(-1, count, -1, -1).flatten(0, 1)
        tokens = torch.cat([copies, frames.flatten(0, 1)], dim=1)
        mask = None
        if text_mask is not None or frame_mask is not None:
            real_words = words.new_ones(batch, length) if text_mask is None else text_mask
            real_patches = words.new_ones(batch, count, patches) if frame_mask is None else frame_mask
            mask = torch.cat([real_words.bool()[:, None].expand(-1, count, -1), real_patches.bool()], dim=2)
            mask = mask.flatten(0, 1)
        tokens = self.norm(self._blocks(tokens, mask, frames=count, length=length))
        tokens = tokens.unflatten(0, (batch, count)).mean(dim=1)
        return UnifiedOutput(tokens[:, :length], tokens[:, length:], self._pooled(tokens[:, 0]), tokens[:, 0])

    def _blocks(self, tokens: Tensor, mask: Tensor | None, *, frames: int = 1, length: int = 0) -> Tensor:
        """All blocks on ``(B T, S, D)``. With more than one frame, tokens behind the first ``length`` are rolled, and
        ``tokens`` themselves are changed."""
        attended = None if mask is None else mask.bool()[:, None, None]  # (B T, 1, 1, S)
        for block in self.blocks:
            if frames > 1 and self.roll_divisor is not None:
                tokens = roll_in_place(tokens, frames, self.roll_divisor, first=length)
            tokens = block(tokens, attn_mask=attended)
        return tokens

    def _pooled(self, first: Tensor) -> Tensor:
        return torch.tanh(self.pooler(first))

    def forward(
        self, video: Tensor | None = None, text_ids: Tensor | None = None, text_mask: Tensor | None = None
    ) -> UnifiedOutput:
        """A pair, texts alone, or videos alone; see ``UnifiedOutput``.

        Args:
            video: ``(B, T, 3, H, W)``, T at most ``num_frames``.
            text_ids: ``(B, L)``, [CLS] first, L at most ``max_text_length``.
            text_mask: ``(B, L)``, 1 where a word is real; ``None``: all are. Padding changes no other row.

        Raises:
            InputError: Neither video nor text, or shapes that do not fit.
        """
        words = None if text_ids is None else self.embed_text(text_ids)
        return self.run(video, words, text_mask)

    def run(
        self, video: Tensor | None = None, words: Tensor | None = None, text_mask: Tensor | None = None
    ) -> UnifiedOutput:
        """``forward`` with words ``(B, L, D)`` that are embedded already."""
        if words is None:
            text_mask = None
        if video is None:
            return self.encode(words, text_mask)
        # Of videos alone nothing is rolled, and the order of patches would change nothing but the order of rows.
        order = None if words is None else self.patch_order(video)
        return self.encode(words, text_mask, self.embed_video(video, order))
