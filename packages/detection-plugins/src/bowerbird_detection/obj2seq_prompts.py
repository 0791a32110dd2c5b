"""Obj2Seq's prompt indicator: which of the prompted categories a picture shows (arXiv:2209.13948, section 3.2).

B pictures, K categories, S positions of the features, d width, d_0 width of a prompt's vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bowerbird.errors import InputError
from bowerbird_detection.obj2seq_layers import EPS, FeedForward, PromptClassifier, at_least_float32

PRESENCE_PRIOR = 0.1  # probability that a fresh indicator gives to a category


@dataclass(frozen=True)
class Presence:
    """What the indicator says of U categories.

    Attributes:
        logits: One ``(B, U)`` of every block; the last one counts.
        vectors: ``(B, U, d)``, the prompts after the last block: what the object decoder looks for.
        classes: int64 ``(U,)``, their indices.
    """

    logits: tuple[Tensor, ...]
    vectors: Tensor
    classes: Tensor


class ClassPrompts(nn.Module):
    """One vector per category, trained; as it is, or through a linear layer and LayerNorm where its width is not d.

    Args:
        num_classes: K.
        embed_dim: d.
        vectors: ``(K, d_0)`` first values, such as text features of the names; by default N(0, 1) with d_0 = d.
    """

    def __init__(self, num_classes: int, embed_dim: int, vectors: Tensor | None = None) -> None:
        super().__init__()
        if vectors is None:
            vectors = torch.randn(num_classes, embed_dim)
        if vectors.ndim != 2 or len(vectors) != num_classes or num_classes < 1:
            raise InputError(
                f"prompt vectors {tuple(vectors.shape)} for {num_classes} classes: expected one row per class"
            )
        self.class_prompts = nn.Parameter(vectors.detach().clone().float())
        self.converts = vectors.shape[1] != embed_dim
        if self.converts:
            self.convert_vector = nn.Linear(vectors.shape[1], embed_dim)
            self.vector_ln = nn.LayerNorm(embed_dim)

    def prompts(self, classes: Tensor | None = None) -> Tensor:
        """C' ``(U, d)`` of the categories ``classes``, by default of all."""
        chosen = self.class_prompts if classes is None else self.class_prompts[classes]
        return self.vector_ln(self.convert_vector(chosen)) if self.converts else chosen


class PromptIndicator(ClassPrompts):
    """Every prompt looks at the whole picture and is scored for presence. Prompts do not see each other.

    Args:
        num_classes, embed_dim, vectors: As of ``ClassPrompts``.
        num_heads: Of the attention.
        num_blocks: How often a prompt looks.
        ffn_dim: Width inside the feed-forward layers.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_blocks: int = 2,
        ffn_dim: int = 1024,
        *,
        vectors: Tensor | None = None,
    ) -> None:
        super().__init__(num_classes, embed_dim, vectors)
        if num_blocks < 1:
            raise InputError(f"num_blocks = {num_blocks}: expected at least 1")
        self.prompt_blocks = nn.ModuleList(_PromptBlock(embed_dim, num_heads, ffn_dim) for _ in range(num_blocks))
        # One classifier for all blocks, listed once for each as in the authors' code.
        self.classifier_label = nn.ModuleList([PromptClassifier(embed_dim, PRESENCE_PRIOR)] * num_blocks)

    def forward(self, features: Tensor, padding_mask: Tensor | None = None, classes: Tensor | None = None) -> Presence:
        """How sure it is of every category.

        Args:
            features: ``(B, S, d)``.
            padding_mask: bool ``(B, S)``, true where a position is padding.
            classes: int64 ``(U,)``, the categories to ask for; by default all.

        Raises:
            InputError: Shapes that do not fit, or a category that does not exist.
        """
        if features.ndim != 3 or (padding_mask is not None and padding_mask.shape != features.shape[:2]):
            mask = None if padding_mask is None else tuple(padding_mask.shape)
            raise InputError(f"features {tuple(features.shape)} and padding_mask {mask}: expected (B, S, d) and (B, S)")
        count = len(self.class_prompts)
        if classes is None:
            classes = torch.arange(count, device=features.device)
        elif len(classes) == 0 or int(classes.min()) < 0 or int(classes.max()) >= count:
            raise InputError(f"classes {classes.tolist()}: expected at least one index from 0 to {count - 1}")
        prompts = self.prompts(classes)
        x = prompts.expand(len(features), -1, -1)
        logits = []
        for block, classifier in zip(self.prompt_blocks, self.classifier_label, strict=True):
            x = block(x, features, padding_mask)
            logits.append(classifier(x, prompts))
        return Presence(logits=tuple(logits), vectors=x, classes=classes)


class _PromptBlock(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.cross_attn = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim)

    def forward(self, x: Tensor, features: Tensor, padding_mask: Tensor | None) -> Tensor:
        read, _ = self.cross_attn(x, features, features, key_padding_mask=padding_mask, need_weights=False)
        out: Tensor = self.ffn(self.norm1(x + read))
        return out


@torch.no_grad()
def select_prompts(
    logits: Tensor,
    k: int,
    forced: Tensor | None = None,
    *,
    least: int | None = None,
    threshold: float = 0.0,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The categories to look for in every picture: those of the highest presence.

    Args:
        logits: ``(B, K)``.
        k: Most categories of a picture.
        forced: ``(B, K)``: bool, true for categories that come first (in training: those that are there); or scores,
            where one of at least 0 takes the place of the probability, and one of 1 comes first.
        least: Fewest categories, by default ``k``; between the two as many as reach ``threshold``.
        threshold: Probability that counts.
        allowed: bool ``(B, K)``, categories that may be chosen at all.

    Returns:
        ``batch_index`` and ``class_index``, int64 ``(n,)``, by picture and then by category. Of equal probabilities the
        first category is taken.

    Raises:
        InputError: A shape that does not fit, or numbers out of order.
    """
    least = k if least is None else least
    if logits.ndim != 2 or not 1 <= least <= k:
        raise InputError(f"logits {tuple(logits.shape)}, k = {k}, least = {least}: expected (B, K) and 1 <= least <= k")
    for name, given in (("forced", forced), ("allowed", allowed)):
        if given is not None and given.shape != logits.shape:
            raise InputError(f"{name} {tuple(given.shape)}: expected the shape of the logits, {tuple(logits.shape)}")
    scores = at_least_float32(logits).sigmoid()
    if forced is not None:
        wanted = forced.to(scores.dtype)
        wanted = torch.where(wanted >= 1, 2.0, wanted)  # before those whose probability is rounded to 1
        scores = torch.where(forced if forced.dtype == torch.bool else wanted >= 0, wanted, scores)
    available = torch.full_like(scores, True, dtype=torch.bool) if allowed is None else allowed
    counts = ((scores >= threshold) & available).sum(dim=1).clamp(min=least, max=k).minimum(available.sum(dim=1))
    order = scores.masked_fill(~available, -1.0).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(logits.shape[1], device=logits.device) < counts[:, None]
    chosen = torch.zeros_like(available).scatter(1, order, first)
    batch_index, class_index = chosen.nonzero(as_tuple=True)
    return batch_index, class_index


def asymmetric_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    gamma_pos: float = 0.0,
    gamma_neg: float = 2.0,
    clip: float = 0.0,
    eps: float = EPS,
) -> Tensor:
    """Asymmetric focal loss of many labels (Ben-Baruch et al., ICCV 2021, arXiv:2009.14119), as Obj2Seq sums it.

        -1/B * (B K / sum u) * sum u [ y (1-p)^gamma_pos log p + (1-y) p^gamma_neg log(1-p) ]

    The focusing factors carry no gradient; logarithms are of at least ``eps``.

    Args:
        logits, targets: ``(B, K)``; targets 0 or 1.
        weights: u ``(B, K)``, at least 0; by default 1.
        clip: Added to 1 - p (no more than 1) in the second term.

    Returns:
        A scalar; 0 where every weight is 0.

    Raises:
        InputError: The shapes do not fit.
    """
    if logits.ndim != 2 or targets.shape != logits.shape or (weights is not None and weights.shape != logits.shape):
        raise InputError(
            f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)} and weights "
            f"{None if weights is None else tuple(weights.shape)}: expected (B, K) of all"
        )
    logits = at_least_float32(logits)
    y = targets.to(logits.dtype)
    u = torch.ones_like(logits) if weights is None else weights.to(logits.dtype)
    p = logits.sigmoid()
    q = (1 - p + clip).clamp(max=1)
    log_likelihood = y * p.clamp(min=eps).log() + (1 - y) * q.clamp(min=eps).log()
    with torch.no_grad():
        right = y * p + (1 - y) * q  # probability of what is true
        focus = (1 - right) ** (y * gamma_pos + (1 - y) * gamma_neg)
    total = -(u * focus * log_likelihood).sum() / len(logits)
    return total * logits.numel() / u.sum().clamp(min=torch.finfo(u.dtype).tiny)
