"""``detection:obj2seq``: Obj2Seq as a detector. The network is in ``obj2seq``.

B pictures, K classes, Q queries of a class, R objects of a picture, P keypoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import box_convert

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.errors import DataError, InputError, RecipeError, UnknownNameError, did_you_mean
from bowerbird.protocols import Detector, Features, Objects
from bowerbird.train.data import padded
from bowerbird_detection.backbones import Pyramid, is_reference, pyramid_of
from bowerbird_detection.checks import checked_pictures, learned_rows
from bowerbird_detection.obj2seq import (
    DETECTION,
    Obj2Seq,
    Obj2SeqOutput,
    PictureTargets,
    PromptedSetCriterion,
    keypoint_task,
)
from bowerbird_detection.obj2seq_config import Obj2SeqConfig
from bowerbird_detection.obj2seq_criterion import corners
from bowerbird_detection.obj2seq_encoder import ConvPyramid, DeformableEncoder

FOUND = 2.0  # visibility of a keypoint that was found


class Obj2SeqDetector(Detector):
    """Obj2Seq: boxes, keypoints where the classes have them, and the presence of every class.

    Args:
        backbone: Maps of several strides.
        config: Everything else.

    As an encoder: ``pooled`` is the mean over the levels of each level's mean; ``tokens`` are those of the finest.
    """

    def __init__(self, backbone: Pyramid, config: Obj2SeqConfig) -> None:
        super().__init__()
        self.classes: Sequence[str] = ()
        self.config, self.embed_dim, self.source = config, config.embed_dim, dict(backbone.source)
        self.preprocessing: Preprocessing = backbone.preprocessing
        if config.embed_size is not None:
            self.preprocessing = replace(backbone.preprocessing, size=config.embed_size)
        self.encoder = DeformableEncoder(
            backbone, config.embed_dim, num_layers=config.encoder_layers, num_heads=config.num_heads,
            num_points=config.num_points, ffn_dim=config.ffn_dim, extra_levels=config.extra_levels,
        )  # fmt: skip
        self.criterion = PromptedSetCriterion(oks_variant=config.oks_variant, sigmas=config.keypoint_sigmas or None)
        if config.classes:
            self.open(config.classes)

    @classmethod
    def build(cls, config: Obj2SeqConfig) -> Self:
        """Raises ``UnknownNameError`` or ``InputError`` for a backbone that does not exist or keeps no places."""
        if config.stages:
            return cls(ConvPyramid(config.stages, config.levels, config.shorter_side), config)
        backbone = pyramid_of(
            config.backbone, levels=config.levels, weights=config.weights, pretrained=config.pretrained,
            freeze_norm=config.freeze_norm,
        )  # fmt: skip
        return cls(backbone, config)

    def open(self, classes: Sequence[str]) -> None:
        if self.classes:
            if tuple(classes) != tuple(self.classes):
                raise RecipeError(
                    f"the detector has {len(self.classes)} classes ({self.classes[0]}, ...), the data other ones or in "
                    f"another order ({len(classes)}). Leave out encoder.classes, or choose data with the same classes"
                )
            return
        if not classes:
            raise RecipeError("a detector needs at least one class, and the data names none")
        config = self.config
        for name in config.keypoint_classes:
            if name not in classes:
                raise RecipeError(
                    f"encoder.keypoint_classes: {name!r} is no class of the data.{did_you_mean(name, classes)}"
                )
        posed = (config.keypoint_classes or classes) if config.num_keypoints else ()
        tasks = [keypoint_task(config.num_keypoints) if name in posed else DETECTION for name in classes]
        vectors = self._prompt_vectors(classes)
        self.prompt_width = None if vectors is None else vectors.shape[1]
        combine = config.combine or ("multiple" if config.prompting == "indicator" else "none")
        self.network = Obj2Seq(
            self.encoder, len(classes), tasks=tasks, prompting=config.prompting, head=config.head, combine=combine,
            retained=config.retained, num_queries=config.num_queries, refine=config.refine, prompt_vectors=vectors,
            prompt_blocks=config.prompt_blocks, decoder_layers=config.decoder_layers, num_heads=config.num_heads,
            num_points=config.num_points, ffn_dim=config.ffn_dim,
        ).to(self._device)  # fmt: skip
        del self.encoder  # it is the network's now; one place for its weights
        self.classes = tuple(classes)

    def losses(self, images: Sequence[Tensor], objects: Sequence[Objects]) -> Mapping[str, Tensor]:
        """The terms of ``Obj2Seq.losses``. Boxes around crowds say only that their class is there.

        Raises:
            InputError: The detector has no classes yet or is in eval mode; a label that is no class; a shape that does
                not fit; keypoints that the detector learns from are missing.
        """
        self._check(training=True)
        if len(images) != len(objects) or not images:
            raise InputError(
                f"{len(images)} pictures and the objects of {len(objects)}: expected as many, at least one"
            )
        targets = [self._target(i, image, found) for i, (image, found) in enumerate(zip(images, objects, strict=True))]
        sides = self.config.train_sides or (self.config.shorter_side,)
        side = sides[int(torch.randint(len(sides), ()))] if len(sides) > 1 else sides[0]
        batch, mask = self._batch(images, side)
        forced = torch.stack([target.present for target in targets])
        output = self.network(batch, mask, forced=forced)
        return self.network.losses(output, targets, self.criterion)

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor], prompts: Sequence[str] | None = None) -> list[Objects]:
        """See ``Detector.detect``. ``prompts``: classes to look for, by default all.

        Without prompts for them, classes have presence 0. Where the prompts are no more than ``retained``, what is
        found of a class does not depend on the others.

        Raises:
            UnknownNameError: A prompt that is no class.
        """
        self._check(training=False)
        asked = None
        if prompts is not None:
            for name in prompts:
                if name not in self.classes:
                    raise UnknownNameError(f"prompt {name!r} is no class.{did_you_mean(name, self.classes)}")
            asked = [[self.classes.index(name) for name in prompts]] * len(images)
        if not images:
            return []
        batch, mask = self._batch(images, self.config.shorter_side)
        output = self.network(batch, mask, asked)
        presence = torch.zeros((len(images), len(self.classes)))
        if output.presence is not None:
            presence[:, output.presence.classes.cpu()] = output.presence.logits[-1].sigmoid().float().cpu()
        return [
            replace(
                self._found(output, i, (int(image.shape[1]), int(image.shape[2]))),
                presence=presence[i] if output.presence is not None else None,
            )
            for i, image in enumerate(images)
        ]

    def forward(self, batch: Batch) -> Features:
        """Reads ``image (B, 3, H, W)``, normalised. Raises ``InputError`` for another shape."""
        image = self._image_encoder(batch["image"])
        levels = image.tokens.split([rows * columns for rows, columns in image.spatial_shapes], dim=1)
        pooled = torch.stack([level.mean(dim=1) for level in levels]).mean(dim=0)
        return Features(pooled=pooled, tokens=levels[0], grid=image.spatial_shapes[0])

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` with the classes, and with a backbone and prompts that are built without files."""
        kept = {key: value for key, value in config.items() if key not in ("weights", "pretrained", "prompt_vectors")}
        backbone = kept.get("backbone")
        if isinstance(backbone, Mapping) or (backbone is not None and is_reference(backbone)):
            kept["backbone"] = self.source
        if self.classes and self.prompt_width is not None:
            kept["prompt_width"] = self.prompt_width
        return {**kept, "classes": list(self.classes)}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The backbone, reference points and offsets learn more slowly; vectors, prompts and positions do not decay."""
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            scale = 1.0
            if ".backbone." in name:
                scale = self.config.backbone_lr
            elif "reference_points" in name or "sampling_offsets" in name:
                scale = self.config.points_lr
            still = ("class_prompts", "level_embed", "pos_emb.", "position.", "position_patterns.")
            decays = parameter.ndim > 1 and not any(part in name for part in still)
            groups.setdefault((scale, decays), []).append(parameter)
        return [
            {"params": found, "lr_scale": scale, **({} if decays else {"weight_decay": 0.0})}
            for (scale, decays), found in groups.items()
        ]

    # ---------------------------------------------------------------------------------------------------- helpers

    @property
    def _image_encoder(self) -> DeformableEncoder:
        return self.network.encoder if self.classes else self.encoder

    @property
    def _device(self) -> torch.device:
        return next(self._image_encoder.parameters()).device

    def _check(self, *, training: bool) -> None:
        if not self.classes:
            raise InputError("this detector has no classes yet: train it, or call open(classes), first")
        if self.training != training:
            needed = "losses need training mode: call train()" if training else "detect needs eval mode: call eval()"
            raise InputError(f"{needed} first")

    def _prompt_vectors(self, classes: Sequence[str]) -> Tensor | None:
        config = self.config
        if config.prompt_vectors is None:
            return None if config.prompt_width is None else torch.randn(len(classes), config.prompt_width)
        file = Path(config.prompt_vectors)
        try:
            found = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"encoder.prompt_vectors = {str(file)!r} is no readable .npy file: {error}") from error
        if not isinstance(found, np.ndarray) or found.ndim != 2 or len(found) != len(classes):
            raise DataError(
                f"encoder.prompt_vectors = {str(file)!r} holds {getattr(found, 'shape', 'several arrays')}; expected "
                f"one row for each of {len(classes)} classes"
            )
        return torch.from_numpy(found.astype(np.float32))

    def _batch(self, images: Sequence[Tensor], side: int) -> tuple[Tensor, Tensor | None]:
        """Resized, normalised and padded pictures ``(B, 3, H, W)``, and where they are padding."""
        assert self.preprocessing is not None
        mean = torch.tensor(self.preprocessing.mean, device=self._device)[:, None, None]
        std = torch.tensor(self.preprocessing.std, device=self._device)[:, None, None]
        made = [
            (_resized(image, side, self.config.longer_side) - mean) / std
            for image in checked_pictures(images, self._device)
        ]
        batch = padded(made)
        mask = torch.ones((len(made), *batch.shape[2:]), dtype=torch.bool, device=self._device)
        for free, image in zip(mask, made, strict=True):
            free[: image.shape[1], : image.shape[2]] = False
        return batch, mask if len({image.shape for image in made}) > 1 else None

    def _target(self, i: int, image: Tensor, found: Objects) -> PictureTargets:
        count, classes = len(found.boxes), len(self.classes)
        kept = learned_rows(i, found, classes)
        present = torch.zeros(classes, dtype=torch.bool, device=self._device)
        present[found.labels] = True
        size = found.boxes.new_tensor([image.shape[2], image.shape[1]])
        boxes = box_convert(found.boxes[kept].float() / size.repeat(2), "xyxy", "cxcywh").clamp(0, 1)
        points = None
        if self.config.num_keypoints:
            wanted = (count, self.config.num_keypoints, 3)
            if found.keypoints is None or found.keypoints.shape != wanted:
                shape = "none" if found.keypoints is None else tuple(found.keypoints.shape)
                raise InputError(f"picture {i}: keypoints {shape}; expected {wanted}, see encoder.num_keypoints")
            points = found.keypoints[kept].float()
            points = torch.cat([points[..., :2] / size, points[..., 2:]], dim=-1).to(self._device)
        return PictureTargets(boxes.to(self._device), found.labels[kept].to(self._device), present, points)

    def _found(self, output: Obj2SeqOutput, picture: int, size: tuple[int, int]) -> Objects:
        """The best objects of one picture of ``size`` (height, width)."""
        height, width = size
        rows = torch.nonzero(output.batch_index == picture)[:, 0]
        scores = output.last.logits[rows].sigmoid().float()  # (rows, Q) or (1, Q, K)
        each = scores.flatten()
        each, best = each.topk(min(self.config.max_detections, len(each)))
        best, each = best[each >= self.config.score_threshold], each[each >= self.config.score_threshold]
        if output.class_index is None:
            pair, labels = best // scores.shape[2], best % scores.shape[2]
            row, query = rows[pair // scores.shape[1]], pair % scores.shape[1]
        else:
            row, query = rows[best // scores.shape[1]], best % scores.shape[1]
            labels = output.class_index[row]
        scale = scores.new_tensor([width, height])
        boxes = (corners(output.last.boxes[row, query].float()) * scale.repeat(2)).clamp(min=0)
        keypoints = None
        if self.config.num_keypoints:
            keypoints = scores.new_zeros((len(best), self.config.num_keypoints, 3))
            for part in output.last.tasks:
                if "keypoints" in part.values:
                    mine, at = torch.nonzero(row[:, None] == part.rows, as_tuple=True)
                    keypoints[mine, :, :2] = part.values["keypoints"][at, query[mine]].float() * scale
                    keypoints[mine, :, 2] = FOUND
        return Objects(
            boxes=torch.minimum(boxes, scale.repeat(2)).cpu(),
            labels=labels.cpu(),
            scores=each.cpu(),
            keypoints=None if keypoints is None else keypoints.cpu(),
        )


def _resized(image: Tensor, shorter: int, longer: int) -> Tensor:
    """``(3, h, w)`` with the shorter side ``shorter``, or less where the longer one would be above ``longer``."""
    height, width = int(image.shape[1]), int(image.shape[2])
    scale = min(shorter / min(height, width), longer / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    if size == (height, width):
        return image
    return functional.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
