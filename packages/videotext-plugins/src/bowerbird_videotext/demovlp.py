"""DemoVLP: videos as regions of few frames, aligned with words in both directions.

Cai et al.: Revitalize Region Feature for Democratizing Video-Language Pre-training of Retrieval, arXiv 2203.07720.

B videos or sentences, T frames, R regions per frame, N = T R regions of a video, L words, F width of region features,
D width of the transformer, P width of the joint space.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, relu
from torch.nn.utils.parametrizations import weight_norm

from bowerbird.errors import InputError
from bowerbird_videotext.space_time import SpaceTimeBlock

MASKED = -100.0  # what is added to the logits of padding
EPS = 1e-8


# ------------------------------------------------------------------------------------------------------- encoder


class RegionEncoder(nn.Module):
    """A transformer over the regions of several frames, one class token for the whole video.

    A region's token is the sum of its projected features, its projected geometry and the position of its frame. There
    is no norm behind the last block, as in the released code.

    Args:
        feature_dim: F.
        embed_dim: D, a multiple of ``num_heads``.
        depth: Number of blocks.
        num_heads: Heads of every attention.
        max_frames: Most frames of a video.
        projection_dim: P.
        temporal_attention: Whether regions of the same row also attend to each other over frames. The released models
            do without.
        mlp_ratio: Hidden width of a block's perceptron, over D.
        geometry_dim: Numbers that describe the place of a region, see ``regions.box_geometry``.

    Raises:
        InputError: A size outside its range.
    """

    def __init__(
        self,
        feature_dim: int,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        max_frames: int = 8,
        projection_dim: int = 256,
        temporal_attention: bool = False,
        *,
        mlp_ratio: float = 4.0,
        geometry_dim: int = 6,
    ) -> None:
        super().__init__()
        sizes = {"feature_dim": feature_dim, "max_frames": max_frames, "projection_dim": projection_dim}
        for name, value in {**sizes, "depth": depth, "geometry_dim": geometry_dim}.items():
            if value < 1:
                raise InputError(f"{name} = {value}: expected 1 or more")
        self.feature_dim, self.geometry_dim, self.max_frames = feature_dim, geometry_dim, max_frames
        self.embed_dim, self.projection_dim = embed_dim, projection_dim
        self.object_embedding = nn.Linear(feature_dim, embed_dim)
        self.pos_embedding = nn.Linear(geometry_dim, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.cls_position = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.temporal_embed = nn.Parameter(torch.zeros(1, max_frames, embed_dim))
        self.blocks = nn.ModuleList(
            SpaceTimeBlock(embed_dim, num_heads, mlp_ratio, temporal_attention) for _ in range(depth)
        )
        self.proj = nn.Linear(embed_dim, projection_dim, bias=False)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.cls_position, std=0.02)

    def forward(self, features: Tensor, geometry: Tensor, valid: Tensor | None = None) -> Tensor:
        """The video and its regions in the joint space, not normalised.

        Args:
            features: ``(B, T, R, F)``, T up to ``max_frames``.
            geometry: ``(B, T, R, geometry_dim)``.
            valid: ``(B, T, R)``, true or 1 where a region is real; ``None``: all are.

        Returns:
            ``(B, 1 + T R, P)``: row 0 is the video, then the regions of frame 0, of frame 1, and so on.

        Raises:
            InputError: Another shape, or too many frames.
        """
        if features.ndim != 4 or features.shape[-1] != self.feature_dim:
            raise InputError(
                f"region features have shape {tuple(features.shape)}; this encoder needs (B, T, R, {self.feature_dim})"
            )
        batch, frames, count = features.shape[:3]
        if geometry.shape != (batch, frames, count, self.geometry_dim):
            raise InputError(
                f"geometry has shape {tuple(geometry.shape)}; expected {(batch, frames, count, self.geometry_dim)}"
            )
        if not 1 <= frames <= self.max_frames:
            raise InputError(f"regions of {frames} frames; this encoder takes 1 to {self.max_frames}")
        tokens = self.object_embedding(features) + self.pos_embedding(geometry)
        tokens = tokens + self.temporal_embed[:, :frames, None]
        first = (self.cls_token + self.cls_position).expand(batch, -1, -1).to(tokens.dtype)
        x = torch.cat([first, tokens.flatten(1, 2)], dim=1)
        mask = None
        if valid is not None:
            if valid.shape != (batch, frames, count):
                raise InputError(f"valid has shape {tuple(valid.shape)}; expected {(batch, frames, count)}")
            mask = torch.cat([x.new_zeros(batch, 1), (valid.flatten(1).to(x.dtype) - 1) * -MASKED], dim=1)
        for block in self.blocks:
            x = block(x, frames, mask)
        return self.proj(x)

    def load_released(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a released DemoVLP region encoder (``ObjectTransformer``), by the names in its file.

        Its final norm and the positions of regions are never used there, and are left out.

        Raises:
            InputError: Names or shapes differ.
        """
        wanted = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
        if "custom_pos_embed" in wanted:
            wanted["cls_position"] = wanted.pop("custom_pos_embed")[:, :1]
        if not self.blocks[0].temporal:  # the released blocks always hold the norm of a time attention
            wanted = {name: tensor for name, tensor in wanted.items() if ".norm3." not in name}
        try:
            self.load_state_dict(wanted)
        except RuntimeError as error:
            raise InputError(f"these weights do not fit this region encoder: {error}") from error


# ----------------------------------------------------------------------------------------- regions against words


def region_word_scores(
    regions: Tensor,
    words: Tensor,
    region_valid: Tensor | None = None,
    word_valid: Tensor | None = None,
    scale: float = 20.0,
    focal: bool = True,
    ignore_padding: bool = False,
) -> Tensor:
    """How well the regions of every video and the words of every sentence find each other, both ways.

    Every word is compared with what it attends to among the regions, every region with what it attends to among the
    words; the mean cosine of each direction is taken, and both are added.

    Args:
        regions: ``(B1, N, P)``.
        words: ``(B2, L, P)``.
        region_valid: ``(B1, N)``, true or 1 where a region is real; ``None``: all are.
        word_valid: ``(B2, L)``, the same of words.
        scale: Of the softmax over what is attended to (lambda of the paper).
        focal: Drop what gets no more than the mean weight, and renormalise. Padding counts in that mean. Where nothing
            is above the mean (all weights equal), all is kept; the released code divides 0 by 0.
        ignore_padding: Leave padded rows out everywhere, also where they ask and where they are counted. The released
            code lets them ask, so that its score depends on how far a sentence was padded.

    Returns:
        ``(B1, B2)``, rows are videos, -2 to 2.

    Raises:
        InputError: Shapes do not fit together, or ``scale`` is negative.
    """
    region_valid = _valid("regions", regions, region_valid)
    word_valid = _valid("words", words, word_valid)
    if regions.shape[-1] != words.shape[-1]:
        raise InputError(f"regions have width {regions.shape[-1]}, words {words.shape[-1]}: expected the same")
    if not scale >= 0:
        raise InputError(f"scale = {scale}: expected 0 or more")
    kind = torch.promote_types(torch.promote_types(regions.dtype, words.dtype), torch.float32)
    with torch.autocast(regions.device.type, enabled=False):  # thresholds and 20-fold softmaxes need float32
        return _scores(regions.to(kind), words.to(kind), region_valid, word_valid, scale, focal, ignore_padding)


def _scores(
    regions: Tensor,
    words: Tensor,
    region_valid: Tensor,
    word_valid: Tensor,
    scale: float,
    focal: bool,
    ignore_padding: bool,
) -> Tensor:
    pairs = relevance(regions, words)

    def one_way(queries: Tensor, context: Tensor, pairs: Tensor, asks: Tensor, there: Tensor) -> Tensor:
        weights = attention_weights(pairs, asks, there, scale=scale, focal=focal, ignore_padding=ignore_padding)
        found = torch.einsum("ijqx,ixp->ijqp", weights, _unit(context))
        return _mean_cosine(queries, found, asks if ignore_padding else None)

    by_words = one_way(words, regions, pairs.transpose(2, 3), word_valid, region_valid)
    by_regions = one_way(regions, words, pairs.transpose(0, 1), region_valid, word_valid)
    return by_words + by_regions.T


def relevance(regions: Tensor, words: Tensor) -> Tensor:
    """Cosine of every region and every word behind a leaky ReLU of slope 0.1: ``(B1, B2, N, L)``."""
    return leaky_relu(torch.einsum("inp,jlp->ijnl", _unit(regions), _unit(words)), 0.1)


def attention_weights(
    pairs: Tensor,
    query_valid: Tensor,
    context_valid: Tensor,
    *,
    scale: float = 20.0,
    focal: bool = True,
    ignore_padding: bool = False,
) -> Tensor:
    """How much of every context row a query takes: ``(I, J, Q, X)``; a row sums to 1, or to 0 where nothing is there.

    Args:
        pairs: ``(I, J, Q, X)``, see ``relevance``; its last two axes change places where words ask for regions.
        query_valid, context_valid: bool ``(J, Q)`` and ``(I, X)``.
        scale, focal, ignore_padding: See ``region_word_scores``.
    """
    if ignore_padding:
        pairs = pairs * query_valid[None, :, :, None]
    # Over the queries, not over the context: context that everybody asks for says less.
    pairs = pairs / (pairs.norm(dim=2, keepdim=True) + EPS)
    # As adding -100 before the scale, for every scale; where all is padding the released code attends to the padding.
    there = context_valid | ~context_valid.any(dim=-1, keepdim=True)
    weights = (pairs * scale).masked_fill(~there[:, None, None], -torch.inf).softmax(dim=-1)
    if ignore_padding:  # only padding to look at: nothing is found
        weights = weights * context_valid[:, None, None]
    if not focal:
        return weights
    count = pairs.shape[-1]
    size = context_valid.sum(dim=-1)[:, None, None, None] if ignore_padding else count
    kept = (weights * size - weights.sum(dim=-1, keepdim=True)) > 0
    kept = kept | ~kept.any(dim=-1, keepdim=True)
    weights = weights * kept
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=EPS)


def region_word_alignment_loss(scores: Tensor, scale: float = 20.0, eps: float = 1e-6) -> Tensor:
    """Kullback-Leibler divergence of softmax(scale * scores), over the sentences of a video, from the identity.

    Args:
        scores: ``(N, N)``, rows are videos, columns sentences; pair i is row i and column i.
        scale: Of the softmax; above 0.
        eps: Added to the identity, so that its logarithm exists; above 0.

    Returns:
        A scalar, the mean over videos; at least -log(1 + N eps).

    Raises:
        InputError: The matrix is not square, or ``scale`` or ``eps`` is not above 0.
    """
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or len(scores) == 0:
        raise InputError(f"scores have shape {tuple(scores.shape)}; expected (N, N), videos by sentences")
    if not (scale > 0 and eps > 0):
        raise InputError(f"scale = {scale}, eps = {eps}: expected above 0")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    log_shares = (scores * scale).log_softmax(dim=1)
    identity = torch.eye(len(scores), dtype=scores.dtype, device=scores.device)
    return (log_shares.exp() * (log_shares - (identity + eps).log())).sum() / len(scores)


def _valid(what: str, rows: Tensor, valid: Tensor | None) -> Tensor:
    if rows.ndim != 3 or 0 in rows.shape:
        raise InputError(f"{what} have shape {tuple(rows.shape)}; expected three sizes above 0: (B, rows, P)")
    if valid is None:
        return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    if valid.shape != rows.shape[:2]:
        raise InputError(f"validity of {what} has shape {tuple(valid.shape)}; expected {tuple(rows.shape[:2])}")
    return valid.to(rows.device).bool()


def _unit(vectors: Tensor) -> Tensor:
    return vectors / (vectors.norm(dim=-1, keepdim=True) + EPS)


def _mean_cosine(queries: Tensor, found: Tensor, valid: Tensor | None) -> Tensor:
    """``(I, J)``: mean over the queries ``(J, Q, P)`` of their cosine with what they found, ``(I, J, Q, P)``."""
    lengths = queries.norm(dim=-1) * found.norm(dim=-1)
    cosines = torch.einsum("jqp,ijqp->ijq", queries, found) / lengths.clamp(min=EPS)
    if valid is None:
        return cosines.mean(dim=-1)
    return (cosines * valid).sum(dim=-1) / valid.sum(dim=-1).clamp(min=1)


# ------------------------------------------------------------------------------------------------------ questions


class RegionQAHead(nn.Module):
    """Answers a question about a video by attention of the question to its regions.

    The answer head of bottom-up and top-down attention (Anderson et al., CVPR 2018, arXiv 1707.07998) as DemoVLP has
    it. Its projections are weight-normalised with one gain per matrix.

    Args:
        region_dim: Width of a region vector.
        text_dim: Width of the vector of a question.
        num_answers: How many answers there are.
        hidden: Width inside.
        dropout: Of the joint vector in the attention.

    Raises:
        InputError: A size below 1.
    """

    def __init__(
        self, region_dim: int, text_dim: int, num_answers: int, hidden: int = 256, dropout: float = 0.2
    ) -> None:
        super().__init__()
        if min(region_dim, text_dim, num_answers, hidden) < 1:
            raise InputError(
                f"region_dim = {region_dim}, text_dim = {text_dim}, num_answers = {num_answers}, hidden = {hidden}: "
                "expected 1 or more"
            )
        self.attention_regions = _scaled(region_dim, hidden)
        self.attention_text = _scaled(text_dim, hidden)
        self.attention_out = _scaled(hidden, 1)
        self.text = _scaled(text_dim, hidden)
        self.regions = _scaled(region_dim, hidden)
        self.answer = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.ReLU(), nn.Dropout(dropout))
        self.out = nn.Linear(2 * hidden, num_answers)
        self.dropout = nn.Dropout(dropout)

    def attention(self, text: Tensor, regions: Tensor, valid: Tensor | None = None) -> Tensor:
        """Weights of the regions ``(B, N)``. Padded ones have the logit 0, as in the released code."""
        asked = relu(self.attention_text(text))[:, None]
        logits = self.attention_out(self.dropout(relu(self.attention_regions(regions)) * asked)).squeeze(-1)
        if valid is not None:
            logits = logits * valid.to(logits.dtype)
        return logits.softmax(dim=-1)

    def forward(self, text: Tensor, regions: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits ``(B, num_answers)``.

        Args:
            text: ``(B, text_dim)``, the largest of every channel over the words of the question.
            regions: ``(B, N, region_dim)``.
            valid: ``(B, N)``, true or 1 where a region is real.

        Raises:
            InputError: Shapes do not fit together.
        """
        if text.ndim != 2 or regions.ndim != 3 or len(text) != len(regions):
            raise InputError(
                f"text has shape {tuple(text.shape)}, regions {tuple(regions.shape)}; expected (B, D) and (B, N, D)"
            )
        if valid is not None and valid.shape != regions.shape[:2]:
            raise InputError(f"valid has shape {tuple(valid.shape)}; expected {tuple(regions.shape[:2])}")
        pooled = torch.einsum("bn,bnd->bd", self.attention(text, regions, valid), regions)
        return self.out(self.answer(relu(self.text(text)) * relu(self.regions(pooled))))


def _scaled(inputs: int, outputs: int) -> nn.Module:
    return weight_norm(nn.Linear(inputs, outputs), dim=None)  # type: ignore[arg-type]
