"""Obj2Seq: Formatting Objects as Sequences with Class Prompt for Visual Tasks, NeurIPS 2022, arXiv:2209.13948.

Categories are prompts. The indicator says which of them a picture shows; for each that is kept the decoder looks for
its objects with queries of its own; the head writes every object as a sequence of numbers. This module joins the
parts, which are in ``obj2seq_encoder``, ``obj2seq_prompts``, ``obj2seq_head`` and ``obj2seq_criterion``.

B pictures, K categories, N rows (pairs of a picture and a category), Q queries of a row, d width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bowerbird import dist
from bowerbird.errors import InputError
from bowerbird_detection.deformable_attention import (
    ImageRows,
    MultiScaleDeformableAttention,
    deformable_attention,
)
from bowerbird_detection.obj2seq_criterion import PromptedSetCriterion, match_prompted, visible_points
from bowerbird_detection.obj2seq_encoder import DeformableEncoder
from bowerbird_detection.obj2seq_head import (
    DETECTION,
    Combine,
    ParallelHead,
    SequenceHead,
    SequenceTask,
    keypoint_task,
)
from bowerbird_detection.obj2seq_layers import FeedForward, ImageFeatures
from bowerbird_detection.obj2seq_prompts import (
    ClassPrompts,
    Presence,
    PromptIndicator,
    asymmetric_loss,
    select_prompts,
)

Prompting = Literal["indicator", "every", "none"]
HeadKind = Literal["sequence", "parallel"]
PRESENCE_WEIGHT = 0.25


@dataclass(frozen=True)
class TaskPredictions:
    """What ``SequenceTask.decode`` made of the rows (int64 ``(M,)``) whose categories have the task."""

    task: SequenceTask
    rows: Tensor
    values: Mapping[str, Tensor]


@dataclass(frozen=True)
class PromptPredictions:
    """Of one decoder layer: ``logits (N, Q)``, of queries that are for any category ``(N, Q, K)``; and by task."""

    logits: Tensor
    tasks: tuple[TaskPredictions, ...]

    @property
    def boxes(self) -> Tensor:
        """``(N, Q, 4)``: centre, width and height in 0..1."""
        made = self.tasks[0].values["boxes"]
        if len(self.tasks) == 1:
            return made
        joined = made.new_zeros((*self.logits.shape[:2], 4))
        for part in self.tasks:
            joined = joined.index_copy(0, part.rows, part.values["boxes"])
        return joined


@dataclass(frozen=True)
class Obj2SeqOutput:
    """Predictions, row by row.

    Attributes:
        image: Features of the pictures.
        batch_index: int64 ``(N,)``, the picture of a row.
        class_index: int64 ``(N,)``, its category; ``None`` where queries are for any category.
        presence: What the indicator says; ``None`` without one.
        layers: Of every decoder layer, the last one last; in eval mode of the last only.
    """

    image: ImageFeatures
    batch_index: Tensor
    class_index: Tensor | None
    presence: Presence | None
    layers: tuple[PromptPredictions, ...]

    @property
    def last(self) -> PromptPredictions:
        return self.layers[-1]


@dataclass(frozen=True)
class PictureTargets:
    """The objects of a picture.

    Attributes:
        boxes: ``(G, 4)``, centre, width and height in 0..1.
        labels: int64 ``(G,)``, categories.
        present: bool ``(K,)``, the categories that the picture shows, also those of crowds only.
        keypoints: ``(G, P, 3)``, x and y in 0..1 and the flag, or ``None``.
    """

    boxes: Tensor
    labels: Tensor
    present: Tensor
    keypoints: Tensor | None = None

    def of(self, category: int) -> dict[str, Tensor]:
        """The objects of one category, as ``PromptedSetCriterion`` takes them."""
        mine = self.labels == category
        found = {"boxes": self.boxes[mine], "labels": self.labels[mine]}
        return found if self.keypoints is None else {**found, "keypoints": self.keypoints[mine]}


class ObjectDecoder(nn.Module):
    """Finds the objects of every prompt: Q queries that see each other and look at the picture, layer by layer.

    Args:
        head: Applied after every layer, with the same weights.
        embed_dim, num_layers, num_queries, num_heads, num_levels, num_points, ffn_dim: Sizes; d, Q, ...
        refining_heads: One head for each further layer: every layer then starts from the boxes of the one before.

    The first reference points are learned; a query is a learned vector plus its prompt's.
    """

    def __init__(
        self,
        head: SequenceHead | ParallelHead,
        embed_dim: int = 256,
        *,
        num_layers: int = 4,
        num_queries: int = 100,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        ffn_dim: int = 1024,
        refining_heads: Sequence[SequenceHead | ParallelHead] = (),
    ) -> None:
        super().__init__()
        if min(num_layers, num_queries) < 1:
            raise InputError(f"num_layers = {num_layers}, num_queries = {num_queries}: expected at least 1")
        if refining_heads and len(refining_heads) != num_layers - 1:
            raise InputError(f"{len(refining_heads)} refining heads: expected one for each of {num_layers - 1} layers")
        self.refines = bool(refining_heads)
        self.position_patterns = nn.Embedding(num_queries, embed_dim)
        self.position = nn.Embedding(num_queries, embed_dim)
        self.reference_points = nn.Linear(embed_dim, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)
        self.object_decoder_layers = nn.ModuleList(
            _DecoderLayer(embed_dim, num_levels, num_heads, num_points, ffn_dim) for _ in range(num_layers)
        )
        self.detect_head = nn.ModuleList([head, *refining_heads])

    def forward(
        self,
        image: ImageFeatures,
        prompts: Tensor | None,
        class_vectors: Tensor,
        tasks: Sequence[SequenceTask],
        presence_logits: Tensor | None = None,
        *,
        batch_index: Tensor,
        every_layer: bool | None = None,
    ) -> tuple[PromptPredictions, ...]:
        """Predictions of every layer, or of the last.

        Args:
            image: Of B pictures.
            prompts: ``(N, d)``, added to the queries of a row; ``None`` for queries without a prompt.
            class_vectors: ``(N, d)`` or ``(N, K, d)``, what objects are compared with; see ``SequenceHead``.
            tasks: N, that of every row's category.
            presence_logits: ``(N,)``; see ``SequenceHead``.
            batch_index: int64 ``(N,)``.
            every_layer: By default in training mode.
        """
        every_layer = self.training if every_layer is None else every_layer
        rows = ImageRows(batch_index, len(image.tokens))
        x = self.position_patterns.weight.expand(len(batch_index), -1, -1)
        if prompts is not None:
            x = x + prompts[:, None]
        places = self.reference_points(self.position.weight).to(self.position.weight)  # in half precision too coarse
        reference = places.sigmoid().expand(len(batch_index), -1, -1)
        steps = [task.num_steps for task in tasks]
        heads: Any = self.detect_head
        maps = None if self.refines else heads[0].maps(image)
        found = []
        for index, layer in enumerate(self.object_decoder_layers):
            last = index + 1 == len(self.object_decoder_layers)
            x = layer(x, image.scaled(reference, batch_index), image, rows)
            if not (every_layer or self.refines or last):
                continue
            head = heads[index if self.refines else 0]
            logits, sequence = head(
                x, reference, image, class_vectors, presence_logits, batch_index=batch_index, steps=steps, maps=maps
            )
            predictions = PromptPredictions(logits, _decoded(sequence, reference, tasks))
            if every_layer or last:
                found.append(predictions)
            if self.refines:
                reference = predictions.boxes.detach()
        return tuple(found)


class _DecoderLayer(nn.Module):
    def __init__(self, embed_dim: int, num_levels: int, num_heads: int, num_points: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.cross_attn = MultiScaleDeformableAttention(embed_dim, num_levels, num_heads, num_points)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim)

    def forward(self, x: Tensor, references: Tensor, image: ImageFeatures, rows: ImageRows) -> Tensor:
        x = self.norm2(x + self.self_attn(x, x, x, need_weights=False)[0])
        maps = self.cross_attn.maps(image.tokens, image.spatial_shapes, image.padding_mask)
        out: Tensor = self.ffn(self.norm1(x + self.cross_attn.attend(x, references, maps, rows)))
        return out


def _decoded(sequence: Tensor, reference: Tensor, tasks: Sequence[SequenceTask]) -> tuple[TaskPredictions, ...]:
    found = []
    for task in dict.fromkeys(tasks):
        rows = torch.tensor([row for row, mine in enumerate(tasks) if mine == task], device=sequence.device)
        values = task.decode(sequence[rows, :, : task.num_steps], reference[rows])
        found.append(TaskPredictions(task, rows, values))
    return tuple(found)


class Obj2Seq(nn.Module):
    """The whole network. Defaults are the paper's for detection on COCO.

    Args:
        encoder: From pictures to features.
        num_classes: K.
        tasks: One task for all categories, or one for each.
        prompting: ``indicator``: categories are prompts that the indicator scores, and the best are looked for;
            ``every``: every category is looked for, without an indicator (the paper's setting for poses); ``none``: no
            prompts, queries for objects of any category (as Deformable DETR), for comparison.
        head: ``sequence``, or ``parallel`` for comparison.
        combine: ``multiple`` or ``none``, see ``SequenceHead``; ``multiple`` needs the indicator.
        retained: K', the most categories of a picture that are looked for.
        num_queries: Q.
        refine: Every decoder layer corrects the boxes of the one before, with a head of its own.
        prompt_vectors: ``(K, d_0)`` first values of the prompts.
        prompt_blocks, decoder_layers, num_heads, num_points, ffn_dim: Sizes.

    Raises:
        InputError: Settings that do not fit together.
    """

    def __init__(
        self,
        encoder: DeformableEncoder,
        num_classes: int,
        *,
        tasks: SequenceTask | Sequence[SequenceTask] = DETECTION,
        prompting: Prompting = "indicator",
        head: HeadKind = "sequence",
        combine: Combine = "multiple",
        retained: int = 20,
        num_queries: int = 100,
        refine: bool = False,
        prompt_vectors: Tensor | None = None,
        prompt_blocks: int = 2,
        decoder_layers: int = 4,
        num_heads: int = 8,
        num_points: int = 4,
        ffn_dim: int = 1024,
    ) -> None:
        super().__init__()
        tasks = (tasks,) * num_classes if isinstance(tasks, SequenceTask) else tuple(tasks)
        if num_classes < 1 or len(tasks) != num_classes:
            raise InputError(f"{len(tasks)} tasks for {num_classes} classes: expected one for each, or one for all")
        if prompting != "indicator" and combine != "none":
            raise InputError(f"prompting = {prompting!r} gives no presence to multiply with: set combine = 'none'")
        if prompting == "none" and len(set(tasks)) > 1:
            raise InputError("prompting = 'none': queries are for every category, so all need the same task")
        if retained < 1:
            raise InputError(f"retained = {retained}: expected at least 1")
        self.num_classes, self.tasks, self.prompting, self.retained = num_classes, tasks, prompting, retained
        self.encoder, embed_dim = encoder, encoder.embed_dim
        self.prompt_indicator: ClassPrompts = (
            PromptIndicator(num_classes, embed_dim, num_heads, prompt_blocks, ffn_dim, vectors=prompt_vectors)
            if prompting == "indicator"
            else ClassPrompts(num_classes, embed_dim, prompt_vectors)
        )
        num_levels, num_steps = self.encoder.num_levels, max(task.num_steps for task in tasks)

        def make(refines: bool) -> SequenceHead | ParallelHead:
            if head == "parallel":
                return ParallelHead(num_steps, embed_dim, combine=combine, refines=refines)
            return SequenceHead(
                num_steps, embed_dim, num_heads, num_levels, num_points, combine=combine, refines=refines
            )

        self.object_decoder = ObjectDecoder(
            make(False), embed_dim, num_layers=decoder_layers, num_queries=num_queries, num_heads=num_heads,
            num_levels=num_levels, num_points=num_points, ffn_dim=ffn_dim,
            refining_heads=[make(True) for _ in range(decoder_layers - 1)] if refine else (),
        )  # fmt: skip

    def forward(
        self,
        images: Tensor,
        padding_mask: Tensor | None = None,
        prompts: Sequence[Sequence[int]] | None = None,
        *,
        forced: Tensor | None = None,
    ) -> Obj2SeqOutput:
        """Looks for the objects of the prompted categories.

        Args:
            images: ``(B, 3, H, W)``, normalised.
            padding_mask: bool ``(B, H, W)``, true for padding.
            prompts: For every picture the categories to look for; by default all. What is found of a category does not
                depend on the others, unless there are more than ``retained``.
            forced: ``(B, K)``, categories that are retained first; see ``select_prompts``. For training.

        Raises:
            InputError: Shapes that do not fit, no prompt for a picture, or a category that does not exist.
        """
        image = self.encoder(images, padding_mask)
        classes, allowed = self._asked(prompts, len(images), images.device)
        if self.prompting == "none":
            return self._unprompted(image, prompts)
        presence, vectors, logits = None, None, None
        if isinstance(self.prompt_indicator, PromptIndicator):
            presence = self.prompt_indicator(image.tokens, image.padding_mask, classes)
            wanted = None if forced is None else forced[:, classes]
            chosen = select_prompts(presence.logits[-1], self.retained, wanted, allowed=allowed)
            vectors, logits = presence.vectors[chosen], presence.logits[-1][chosen]
        else:
            pictures, categories = allowed.nonzero(as_tuple=True)
            chosen = (pictures, categories)
            vectors = self.prompt_indicator.prompts(classes)[chosen[1]]
        batch_index, class_index = chosen[0], classes[chosen[1]]
        tasks = [self.tasks[category] for category in class_index.tolist()]
        layers = self.object_decoder(image, vectors, vectors, tasks, logits, batch_index=batch_index)
        return Obj2SeqOutput(image, batch_index, class_index, presence, layers)

    def _asked(
        self, prompts: Sequence[Sequence[int]] | None, count: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The categories that any picture asks for ``(U,)``, and which picture asks for which, bool ``(B, U)``."""
        if prompts is None:
            return torch.arange(self.num_classes, device=device), torch.ones(
                (count, self.num_classes), dtype=torch.bool, device=device
            )
        if len(prompts) != count or not all(len(asked) for asked in prompts):
            raise InputError(
                f"prompts {[list(asked) for asked in prompts]} for {count} pictures: expected at least one category "
                "for each; None asks for all"
            )
        union = sorted({int(category) for asked in prompts for category in asked})
        if union[0] < 0 or union[-1] >= self.num_classes:
            raise InputError(
                f"prompts {[list(asked) for asked in prompts]}: expected categories from 0 to {self.num_classes - 1}"
            )
        allowed = [[category in asked for category in union] for asked in prompts]
        return torch.tensor(union, device=device), torch.tensor(allowed, device=device)

    def _unprompted(self, image: ImageFeatures, prompts: object) -> Obj2SeqOutput:
        if prompts is not None:
            raise InputError("prompting = 'none': this network takes no prompts")
        count = len(image.tokens)
        batch_index = torch.arange(count, device=image.tokens.device)
        vectors = self.prompt_indicator.prompts().expand(count, -1, -1)
        layers = self.object_decoder(image, None, vectors, self.tasks[:1] * count, batch_index=batch_index)
        return Obj2SeqOutput(image, batch_index, None, None, layers)

    def losses(
        self, output: Obj2SeqOutput, targets: Sequence[PictureTargets], criterion: PromptedSetCriterion
    ) -> dict[str, Tensor]:
        """Weighted terms by name, each summed over blocks or layers; their sum is minimised.

        ``cls_asl`` is the asymmetric loss of presence; the others are those of ``PromptedSetCriterion``. Objects of a
        category that is not retained have no loss but count in the number of boxes.

        Raises:
            InputError: As many targets as pictures are needed, with labels of the K categories; keypoints where a task
                has them; boxes in 0..1.
        """
        if len(targets) != len(output.image.tokens):
            raise InputError(f"{len(targets)} targets for {len(output.image.tokens)} pictures")
        for picture, target in enumerate(targets):
            labels = target.labels
            if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= self.num_classes):
                raise InputError(f"picture {picture}: labels {labels.tolist()}; expected 0 to {self.num_classes - 1}")
        losses: dict[str, Tensor] = {}
        if output.presence is not None:
            present = torch.stack([target.present for target in targets])[:, output.presence.classes]
            losses["cls_asl"] = torch.stack(
                [PRESENCE_WEIGHT * asymmetric_loss(logits, present) for logits in output.presence.logits]
            ).sum()
        rows = self._row_targets(output, targets)
        num_boxes, num_points = self._numbers(targets, output)
        for layer in output.layers:
            for part in layer.tasks:
                found = criterion(
                    layer.logits[part.rows], part.values["boxes"], [rows[row] for row in part.rows.tolist()],
                    part.values.get("keypoints"), num_boxes=num_boxes, num_points=num_points,
                )  # fmt: skip
                for name, value in found.items():
                    losses[name] = losses[name] + value if name in losses else value
        return losses

    def _row_targets(self, output: Obj2SeqOutput, targets: Sequence[PictureTargets]) -> list[dict[str, Tensor]]:
        if output.class_index is None:
            whole = [{"boxes": target.boxes, "labels": target.labels} for target in targets]
            return [
                row if target.keypoints is None else {**row, "keypoints": target.keypoints}
                for row, target in zip(whole, targets, strict=True)
            ]
        pairs = zip(output.batch_index.tolist(), output.class_index.tolist(), strict=True)
        return [targets[picture].of(category) for picture, category in pairs]

    def _numbers(self, targets: Sequence[PictureTargets], output: Obj2SeqOutput) -> tuple[float, float]:
        """Boxes, and visible points of categories with keypoints, of the batch; mean over processes, at least 1."""
        posed = {part.task for part in output.last.tasks if "keypoints" in part.values}
        boxes, points = 0.0, 0.0
        for target in targets:
            boxes += len(target.boxes)
            if target.keypoints is not None:
                mine = torch.tensor([self.tasks[label] in posed for label in target.labels.tolist()], dtype=torch.bool)
                points += float(visible_points(target.keypoints[mine.to(target.keypoints.device)]).sum())
        counts = dist.mean_over_processes(torch.tensor([boxes, points], device=output.image.tokens.device))
        return max(1.0, float(counts[0])), max(1.0, float(counts[1]))


__all__ = [
    "DETECTION", "DeformableEncoder", "MultiScaleDeformableAttention", "Obj2Seq", "Obj2SeqOutput", "ObjectDecoder",
    "ParallelHead", "PictureTargets", "Presence", "PromptIndicator", "PromptPredictions", "PromptedSetCriterion",
    "SequenceHead", "SequenceTask", "TaskPredictions", "asymmetric_loss", "deformable_attention", "keypoint_task",
    "match_prompted", "select_prompts",
]  # fmt: skip
