"""Obj2Seq's heads: an object as a sequence of numbers, written step by step, or for comparison all at once.

N prompts (rows; one category in one picture), Q queries of a prompt, T steps, d width, h heads. See section 3.3 of
the paper (arXiv:2209.13948).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bowerbird.errors import InputError
from bowerbird_detection.deformable_attention import ImageRows, MultiScaleDeformableAttention
from bowerbird_detection.obj2seq_layers import ImageFeatures, PromptClassifier, at_least_float32, logit

BOX_STEPS = 4
FIRST_SIZE = -2.0  # bias of the steps of width and height: first boxes have sigmoid(-2) = 0.12 of the picture
Combine = Literal["multiple", "none"]


@dataclass(frozen=True)
class SequenceTask:
    """What the numbers of a category's objects mean.

    Attributes:
        name: Of the task.
        num_steps: T.
        decode: From sequences ``(M, Q, T)`` and reference points ``(M, Q, 2)``, or boxes ``(M, Q, 4)``, to ``boxes
            (M, Q, 4)`` (centre, width, height, in 0..1) and, for a task with keypoints, ``keypoints (M, Q, K, 2)``.
            Losses and matching are those of what it gives.
    """

    name: str
    num_steps: int
    decode: Callable[[Tensor, Tensor], Mapping[str, Tensor]]


def decode_boxes(sequence: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """``boxes``: sigmoid of the first four numbers, those of the reference added to them as logits."""
    known = reference.shape[-1]
    numbers = sequence[..., :BOX_STEPS]
    return {"boxes": torch.cat([numbers[..., :known] + logit(reference), numbers[..., known:]], dim=-1).sigmoid()}


def decode_keypoints(sequence: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """``boxes``, and ``keypoints``: centre plus the next two numbers times the box's size, point by point."""
    boxes = decode_boxes(sequence, reference)["boxes"]
    steps = sequence[..., BOX_STEPS:].unflatten(-1, (-1, 2))
    return {"boxes": boxes, "keypoints": boxes[..., None, :2] + steps * boxes[..., None, 2:]}


DETECTION = SequenceTask("detection", BOX_STEPS, decode_boxes)


def keypoint_task(num_keypoints: int, name: str = "pose") -> SequenceTask:
    """A box and ``num_keypoints`` points: 38 steps for the 17 of a person."""
    return SequenceTask(name, BOX_STEPS + 2 * num_keypoints, decode_keypoints)


class _ObjectHead(nn.Module):
    """How sure it is that a query found an object: alike for both heads."""

    def __init__(self, num_steps: int, embed_dim: int, combine: Combine) -> None:
        super().__init__()
        if num_steps < BOX_STEPS:
            raise InputError(f"num_steps = {num_steps}: expected at least {BOX_STEPS}, those of a box")
        if combine not in ("multiple", "none"):
            raise InputError(f"combine = {combine!r}: expected 'multiple' or 'none'")
        self.num_steps, self.combine = num_steps, combine
        self.classifier = PromptClassifier(embed_dim)

    def logits(self, features: Tensor, class_vectors: Tensor, presence: Tensor | None) -> Tensor:
        """``(N, Q)`` for one vector per row ``(N, d)``; ``(N, Q, K)`` for those of K classes ``(N, K, d)``."""
        if class_vectors.ndim == 3:
            found: Tensor = self.classifier(features[:, :, None], class_vectors[:, None])
            return found
        found = self.classifier(features, class_vectors[:, None])
        if self.combine == "none":
            return found
        if presence is None or presence.shape != found.shape[:1]:
            shape = None if presence is None else tuple(presence.shape)
            raise InputError(
                f"combine = 'multiple' needs the presence logit of every row ({len(found)},), found {shape}"
            )
        return logit(at_least_float32(found).sigmoid() * at_least_float32(presence).sigmoid()[:, None]).to(found)

    def _steps(self, steps: Sequence[int] | None, count: int) -> list[int]:
        found = [self.num_steps] * count if steps is None else [int(length) for length in steps]
        if len(found) != count or not all(BOX_STEPS <= length <= self.num_steps for length in found):
            raise InputError(
                f"steps {found} for {count} rows: expected a number of each from {BOX_STEPS} to num_steps = "
                f"{self.num_steps}"
            )
        return found


class SequenceHead(_ObjectHead):
    """Writes an object's numbers one by one; every step sees the earlier ones and looks at the picture again.

    Args:
        num_steps: T, of the longest task.
        embed_dim, num_heads: d and h.
        num_levels, num_points: Of the deformable attention.
        combine: ``multiple``: an object's probability is that of the query times that of its category's presence;
            ``none``: that of the query alone.
        refines: References are boxes of an earlier layer that this head corrects, so its first numbers are zero.
    """

    def __init__(
        self,
        num_steps: int,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        *,
        combine: Combine = "multiple",
        refines: bool = False,
    ) -> None:
        super().__init__(num_steps, embed_dim, combine)
        self.self_attn = CachedSelfAttention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.cross_attn = MultiScaleDeformableAttention(
            embed_dim, num_levels, num_heads, num_points, value_projection=False
        )
        self.norm1 = nn.LayerNorm(embed_dim)
        self.pos_emb = nn.Embedding(num_steps, embed_dim)
        nn.init.trunc_normal_(self.pos_emb.weight, std=0.02)
        self.output_embeds = nn.ModuleList(_Number(embed_dim) for _ in range(num_steps))
        self.refines = refines
        self.reset_outputs()

    def reset_outputs(self) -> None:
        """Let first boxes be their reference points with a small size or, where it refines, their references."""
        for step, output in enumerate(self.output_embeds):
            linear: Any = output.layers[0]  # type: ignore[index]
            nn.init.zeros_(linear.weight)
            nn.init.constant_(linear.bias, FIRST_SIZE if step in (2, 3) and not self.refines else 0.0)

    def maps(self, image: ImageFeatures) -> list[Tensor]:
        """The features as every step of every layer reads them: nothing is projected."""
        return self.cross_attn.maps(image.tokens, image.spatial_shapes, image.padding_mask)

    def forward(
        self,
        features: Tensor,
        reference_points: Tensor,
        image: ImageFeatures,
        class_vectors: Tensor,
        presence_logits: Tensor | None = None,
        *,
        batch_index: Tensor | None = None,
        steps: Sequence[int] | None = None,
        maps: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores and sequences of every query.

        Args:
            features: ``(N, Q, d)`` of the decoder.
            reference_points: ``(N, Q, 2)`` in 0..1, or boxes ``(N, Q, 4)``.
            image: Of the B pictures.
            class_vectors: ``(N, d)``, the prompt of every row; or ``(N, K, d)``: queries are for any of K classes.
            presence_logits: ``(N,)``, that the row's category is in its picture; for ``combine = "multiple"``.
            batch_index: int64 ``(N,)``, the picture of a row; by default N is B and row i is picture i.
            steps: N numbers, how many steps a row needs; by default all. What follows them is 0 in the result.
            maps: ``self.maps(image)``, where it is known already.

        Returns:
            Logits ``(N, Q)`` (or ``(N, Q, K)``), and sequences ``(N, Q, T)`` with T the most steps of a row.

        Raises:
            InputError: Shapes that do not fit, or more steps than the head has.
        """
        lengths = self._steps(steps, len(features))
        logits = self.logits(features, class_vectors, presence_logits)
        maps = self.maps(image) if maps is None else maps
        batch_index = torch.arange(len(features), device=features.device) if batch_index is None else batch_index

        x, position = features, reference_points.detach()
        active = torch.arange(len(features), device=features.device)
        rows, cache = ImageRows(batch_index, len(image.tokens)), KeyValueCache()
        written: list[Tensor] = []
        for step in range(max(lengths)):
            if step in lengths:  # rows that are finished leave the batch
                going = torch.tensor([lengths[row] > step for row in active.tolist()], device=active.device)
                active, x, position, cache = active[going], x[going], position[going], cache.rows(going)
                rows = ImageRows(batch_index[active], len(image.tokens))
            x = x + self.pos_emb.weight[step]
            x = self.norm2(x + self.self_attn(x, cache))
            places = image.scaled(position, batch_index[active])
            x = self.norm1(x + self.cross_attn.attend(x, places, maps, rows))
            number = self.output_embeds[step](x).to(position)  # places are never in half precision
            if step < 2:  # the box's centre: later steps look there
                moved = logit(position[..., step]) + number.detach()
                position = position.index_copy(
                    2, torch.tensor([step], device=position.device), moved.sigmoid()[..., None]
                )
            if len(active) < len(features):
                number = number.new_zeros(features.shape[:2]).index_copy(0, active, number)
            written.append(number)
            x = x.detach()
        if self.training:  # DDP waits for every parameter, also for steps that no row of this batch needed
            for unused in self.output_embeds[len(written) :]:
                logits = logits + 0.0 * sum(parameter.sum() for parameter in unused.parameters())
        return logits, torch.stack(written, dim=2)


class ParallelHead(_ObjectHead):
    """Writes all numbers at once with a perceptron of three layers, as DETR's heads do: what SequenceHead is held to.

    Arguments and results as of ``SequenceHead``; it does not look at the picture again.
    """

    def __init__(
        self, num_steps: int, embed_dim: int = 256, *, combine: Combine = "multiple", refines: bool = False
    ) -> None:
        super().__init__(num_steps, embed_dim, combine)
        self.hidden = nn.Sequential(
            nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, embed_dim), nn.ReLU()
        )
        self.output = nn.Linear(embed_dim, num_steps)
        self.refines = refines
        self.reset_outputs()

    def reset_outputs(self) -> None:
        """As of ``SequenceHead``."""
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        if not self.refines:
            nn.init.constant_(self.output.bias[2:4], FIRST_SIZE)

    def maps(self, image: ImageFeatures) -> None:
        return None

    def forward(
        self,
        features: Tensor,
        reference_points: Tensor,
        image: ImageFeatures,
        class_vectors: Tensor,
        presence_logits: Tensor | None = None,
        *,
        batch_index: Tensor | None = None,
        steps: Sequence[int] | None = None,
        maps: None = None,
    ) -> tuple[Tensor, Tensor]:
        lengths = self._steps(steps, len(features))
        sequence = self.output(self.hidden(features))[..., : max(lengths)].to(reference_points)
        ends = torch.tensor(lengths, device=features.device)[:, None, None]
        unused = torch.arange(max(lengths), device=features.device) >= ends
        return self.logits(features, class_vectors, presence_logits), sequence.masked_fill(unused, 0.0)


class KeyValueCache:
    """Keys and values of the steps so far, each ``(N, Q, h, d/h)``. They keep their gradient."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def rows(self, chosen: Tensor) -> KeyValueCache:
        kept = KeyValueCache()
        kept.keys, kept.values = [key[chosen] for key in self.keys], [value[chosen] for value in self.values]
        return kept


class CachedSelfAttention(nn.Module):
    """Attention of the present step to itself and the earlier steps of the same object."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, cache: KeyValueCache) -> Tensor:
        """``(N, Q, d)``; appends to ``cache``."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        cache.keys.append(key)
        cache.values.append(value)
        scores = torch.stack([(query * key).sum(-1) for key in cache.keys], dim=-1)  # (N, Q, h, t)
        weights = (scores / math.sqrt(query.shape[-1])).softmax(dim=-1).unbind(-1)
        read = sum(weight[..., None] * value for weight, value in zip(weights, cache.values, strict=True))
        out: Tensor = self.proj(read.flatten(2))  # type: ignore[union-attr]
        return out


class _Number(nn.Module):
    """One number of a sequence: a linear layer, under the name that it has in the authors' code."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(embed_dim, 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x).squeeze(-1)
