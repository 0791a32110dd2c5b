"""BridgeFormer: answers a question about a clip from the layers of its two encoders, in training only.

Ge, Ge, Liu, Li, Shan, Qie, Luo: *Bridging Video-text Retrieval with Multiple Choice Questions*, CVPR 2022 (arXiv
2201.04850). The question is the caption with a phrase erased; see ``bowerbird_videotext.mcq``.

B batch, T frames, N patches per frame, Lq pieces of the longest question, D width, h heads. Tokens of a clip are its
class token, then the patches frame by frame. Tokens of the bridge are a class token, then pieces 1..Lq-1 of the
question for frame 0, the same for frame 1, and so on: M = 1 + T (Lq - 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from bowerbird.errors import InputError
from bowerbird_videotext.space_time import EPS, DividedAttention, Perceptron

PADDING = -10000.0  # added to the logits of padded pieces


class QuestionAttention(nn.Module):
    """Cross-attention from a question to a clip: its class piece looks at all frames, the others at one at a time."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_question = nn.Linear(dim, dim)
        self.kv_video = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, patches: Tensor, question: Tensor, frames: int) -> Tensor:
        """``patches (B, T N, D)`` without the class token, ``question (B, Lq, D)``; returns ``(B, M, D)``."""
        batch, length, dim = question.shape
        wide = (self.heads, dim // self.heads)
        query = self.q_question(question).unflatten(2, wide)  # (B, Lq, h, d)
        key, value = self.kv_video(patches).unflatten(2, (2, *wide)).unbind(2)  # (B, T N, h, d)
        first = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query[:, :1], key, value)))
        asked = query[:, None, 1:].expand(-1, frames, -1, -1, -1)  # the same pieces in every frame
        per_frame = (frames, patches.shape[1] // frames)
        by_frame = (asked, key.unflatten(1, per_frame), value.unflatten(1, per_frame))  # (B, T, ., h, d)
        others = scaled_dot_product_attention(*(x.flatten(0, 1).transpose(1, 2) for x in by_frame))
        others = others.transpose(1, 2).reshape(batch, frames * (length - 1), *wide)
        return self.proj(torch.cat([first.transpose(1, 2), others], dim=1).flatten(2))


class BridgeBlock(nn.Module):
    """Looks from the question into the clip, then among the pieces of every frame, then a perceptron."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm4 = nn.LayerNorm(dim, eps=EPS)
        self.norm5 = nn.LayerNorm(dim, eps=EPS)
        self.crossattn = QuestionAttention(dim, heads)
        self.norm7 = nn.LayerNorm(dim, eps=EPS)
        self.bridgeattn = DividedAttention(dim, heads, "space")
        self.norm6 = nn.LayerNorm(dim, eps=EPS)
        self.bridge_mlp = Perceptron(dim, int(dim * mlp_ratio))

    def forward(self, bridge: Tensor | None, video: Tensor, question: Tensor, frames: int, key_mask: Tensor) -> Tensor:
        """``bridge (B, M, D)``, ``None`` before the first block; ``key_mask (B, M)`` is added to the logits."""
        seen = self.crossattn(self.norm4(video[:, 1:]), self.norm5(question), frames)
        bridge = seen if bridge is None else seen + bridge
        bridge = bridge + self.bridgeattn(self.norm7(bridge), frames, key_mask)
        return bridge + self.bridge_mlp(self.norm6(bridge))


class BridgeFormer(nn.Module):
    """One block per block of the video encoder. Parameters have the names of the released code (``norm`` is ``norm2``).

    Args:
        embed_dim: D, of both encoders and a multiple of ``num_heads``.
        depth: Number of blocks.
        num_heads: h.
        mlp_ratio: Hidden width of a block's perceptron, over D.

    Raises:
        InputError: Values outside these ranges.
    """

    def __init__(self, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise InputError(f"embed_dim = {embed_dim} is no multiple of num_heads = {num_heads}")
        if depth < 1 or not mlp_ratio > 0:
            raise InputError(f"depth = {depth}, mlp_ratio = {mlp_ratio}: expected 1 or more, and above 0")
        self.embed_dim, self.depth = embed_dim, depth
        self.blocks = nn.ModuleList(BridgeBlock(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=EPS)

    def forward(
        self,
        video_states: Sequence[Tensor],
        question_states: Sequence[Tensor],
        question_mask: Tensor,
        num_frames: int,
    ) -> Tensor:
        """The answer ``(B, D)``: the bridge's class token after the last norm.

        Args:
            video_states: ``(B, 1 + T N, D)`` at the input of every block of the video encoder; further ones are not
                read (``SpaceTimeTransformer.hidden_states`` fits).
            question_states: ``(B, Lq, D)``, the hidden states of the text encoder, its embeddings first. Block l reads
                number l // 2.
            question_mask: ``(B, Lq)``, 1 (or true) for pieces, 0 for padding.
            num_frames: T.

        Raises:
            InputError: Too few states, states that do not fit each other, or tokens that are no whole number of frames.
        """
        self._check(video_states, question_states, question_mask, num_frames)
        padding = (1 - question_mask.to(video_states[0].dtype)) * PADDING
        key_mask = torch.cat([padding[:, :1], padding[:, 1:].repeat(1, num_frames)], dim=1)
        bridge: Tensor | None = None
        for depth, block in enumerate(self.blocks):
            bridge = block(bridge, video_states[depth], question_states[depth // 2], num_frames, key_mask)
        assert bridge is not None  # depth is 1 or more
        return self.norm(bridge[:, 0])

    def _check(self, videos: Sequence[Tensor], questions: Sequence[Tensor], mask: Tensor, frames: int) -> None:
        needed = (self.depth + 1) // 2
        if len(videos) < self.depth or len(questions) < needed:
            raise InputError(
                f"{len(videos)} states of the video and {len(questions)} of the question; a bridge of {self.depth} "
                f"blocks needs {self.depth} and {needed}"
            )
        video, question = videos[0].shape, questions[0].shape
        if any(state.shape != video for state in videos) or len(video) != 3 or video[2] != self.embed_dim:
            raise InputError(f"video states have shape {tuple(video)}; expected (B, 1 + T N, {self.embed_dim}) for all")
        if any(state.shape != question for state in questions) or len(question) != 3 or question[2] != self.embed_dim:
            raise InputError(
                f"question states have shape {tuple(question)}; expected (B, Lq, {self.embed_dim}) for all"
            )
        if video[0] != question[0] or mask.shape != question[:2]:
            raise InputError(
                f"{video[0]} clips, {question[0]} questions and a question_mask of shape {tuple(mask.shape)}; expected "
                f"one question per clip and a mask {tuple(question[:2])}"
            )
        if frames < 1 or video[1] < 2 or (video[1] - 1) % frames:
            raise InputError(f"{video[1] - 1} patches are no whole number of {frames} frames")
