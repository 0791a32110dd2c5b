"""``detection:acsl``: the second stage of ACSL, or of its controls: only a trained detector's classifier is trained.

Paper: see ``bowerbird_detection.acsl``.
"""

from __future__ import annotations

from typing import Any, Self

from bowerbird.batch import Batch
from bowerbird.encoders.weights import load_strictly
from bowerbird.errors import RecipeError
from bowerbird.protocols import BuildContext, Encoder, LossOutput, Objective
from bowerbird_detection.acsl import freeze_all_but
from bowerbird_detection.configs import ACSLConfig
from bowerbird_detection.detectors import TorchvisionDetector
from bowerbird_detection.objective import DetectionObjective, classes_of, detector_of, frequency_columns, pictures_of
from bowerbird_detection.transforms import DetectionTransform

CLASSIFIER = "model.roi_heads.box_predictor.cls_score"


class ACSLObjective(DetectionObjective):
    """The class loss alone, of a detector that is frozen but for its last classification layer.

    Frozen layers stay in eval mode: statistics of norms do not move, nothing is dropped.
    """

    encoder: TorchvisionDetector

    @classmethod
    def build(cls, config: ACSLConfig, encoder: Encoder, context: BuildContext) -> Self:  # type: ignore[override]
        """Raises ``RecipeError`` for an encoder without a box head and for a run of other classes, ``DataError`` for a
        run of another detector."""
        detector = detector_of(encoder, "detection:acsl")
        if not isinstance(detector, TorchvisionDetector) or not hasattr(detector.model, "roi_heads"):
            raise RecipeError(
                "encoder: detection:acsl trains the box head of an R-CNN; choose detector = 'faster-rcnn', 'mask-rcnn' "
                "or 'keypoint-rcnn'"
            )
        first = context.load_run(config.run)
        if tuple(first.classes) != tuple(classes_of(context)):
            raise RecipeError(
                f"objective.run = {config.run!r}: that run has {len(first.classes)} classes and the data has "
                f"{len(context.classes)}, or they differ in name or order: both stages need the same classes"
            )
        detector.open(context.classes)
        load_strictly(detector, first.encoder.state_dict(), source=config.run)
        settings: dict[str, Any] = {}
        if config.class_loss == "acsl":
            groups = frequency_columns(context, rare_up_to=config.rare_up_to, common_up_to=config.common_up_to)
            settings = {
                "class_frequency": groups,
                "score_threshold": config.score_threshold,
                "background_fractions": config.background_fractions,
            }
        detector.use_class_loss(config.class_loss, **settings)
        freeze_all_but(detector, [CLASSIFIER])
        return cls(detector, DetectionTransform(config))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        model = self.encoder.model
        for part in (model.backbone, model.roi_heads.box_head):
            part.eval()
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        return Objective.parameter_groups(self)  # the detector's own would hold what is frozen

    def forward(self, batch: Batch) -> LossOutput:
        """Reads what ``detection:detector`` reads. Raises ``InputError``."""
        images, objects = pictures_of(batch)
        loss = self.encoder.losses(images, objects)["loss_classifier"]
        return LossOutput(total=loss, parts={"loss_classifier": loss})
