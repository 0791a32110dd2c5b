"""How well a detector finds objects: ``detection:coco-ap``, and which classes a picture has: ``detection:multi-label``.

The numbers of the first are faster-coco-eval's, which are those of pycocotools. C classes, R objects of one picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray
from torchmetrics.functional.classification import multilabel_average_precision
from torchvision.transforms.v2 import functional as F

from bowerbird.data.dataset import Dataset
from bowerbird.errors import InputError
from bowerbird.protocols import Detector, EvalContext, Evaluator, Metrics, Objects
from bowerbird_detection.data_configs import CocoAPConfig, MultiLabelConfig
from bowerbird_detection.detection_set import GROUPS, DetectionSet, coco_annotations, detection_set

IOU_TYPES = {"box": "bbox", "mask": "segm", "keypoint": "keypoints"}
COCO_KEYPOINTS = 17  # of a person; only for them are the widths of COCO known
_LARGEST = 1e5**2  # what COCO takes for the largest area


class CocoAP(Evaluator):
    """Average precision as COCO defines it; with ``lvis`` as LVIS does (arXiv:1908.03195, section 4).

    ``AP`` (mean over IoU 0.5 to 0.95 and classes), ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl`` (by area), ``AR`` of
    boxes; the same with ``mask`` and ``keypoint`` before the name where the data have them and the detector finds them;
    ``APr``, ``APc``, ``APf`` of rare, common and frequent classes. What has no annotated object is left out.
    """

    def __init__(self, config: CocoAPConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: CocoAPConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """Raises ``InputError`` for encoders, data sets and classes that do not fit together."""
        c = self.config
        detector = _detector(context, "detection:coco-ap")
        dataset, positions = _pictures(context, c, "detection:coco-ap")
        if c.lvis and not all("frequency" in one for one in dataset.categories()):
            raise InputError(
                f"detection:coco-ap: lvis = true needs annotations as LVIS has them, with the frequency of categories; "
                f"{c.dataset!r} has none. Groups by counting: groups_split"
            )
        labels = class_map(detector, dataset.classes)
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in IOU_TYPES}
        for index, objects in detections(detector, dataset, positions, c.batch_size):
            for kind, entry in results(of_classes(objects, labels), index + 1):
                found[kind].append(entry)
        groups = self._groups(context, dataset)
        summary: dict[str, float] = {}
        for kind in self._kinds(dataset, found):
            scores = average_precisions(
                dataset.coco(positions),
                found[kind],
                kind,
                max_detections=c.max_detections,
                area_sides=c.area_sides,
                keypoint_sigmas=self._sigmas(dataset),
                lvis=c.lvis,
            )
            before = "" if kind == "box" else f"{kind} "
            summary |= {before + name: value for name, value in scores.summary(groups).items()}
            if c.per_class:
                summary |= {
                    f"{before}AP/{name}": float(value)
                    for name, value in zip(dataset.classes, scores.by_class(), strict=True)
                    if not np.isnan(value)
                }
        return Metrics(summary=summary)

    def _kinds(self, dataset: DetectionSet, found: Mapping[str, Sequence[Any]]) -> list[str]:
        """By default what the data have, but masks and keypoints only where the detector gives them."""
        there = {"box": True, "mask": dataset.has_masks, "keypoint": bool(dataset.keypoint_names)}
        for kind in self.config.kinds or ():
            if not there[kind]:
                raise InputError(f"detection:coco-ap: kinds has {kind!r}, and {self.config.dataset!r} has no {kind}s")
        return list(self.config.kinds or [kind for kind in IOU_TYPES if there[kind] and (kind == "box" or found[kind])])

    def _groups(self, context: EvalContext, dataset: DetectionSet) -> NDArray[np.int64] | None:
        c = self.config
        if c.lvis:
            return dataset.frequency_groups(c.rare_up_to, c.common_up_to)
        if c.groups_split is None:
            return None
        source, _ = detection_set(context.dataset(c.dataset, split=c.groups_split, **c.settings), "detection:coco-ap")
        if list(source.classes) != list(dataset.classes):
            raise InputError(f"detection:coco-ap: groups_split {c.groups_split!r} has other classes than {c.split!r}")
        return source.frequency_groups(c.rare_up_to, c.common_up_to)

    def _sigmas(self, dataset: DetectionSet) -> Sequence[float] | None:
        count, sigmas = len(dataset.keypoint_names), self.config.keypoint_sigmas
        if isinstance(sigmas, float):
            return None if count == COCO_KEYPOINTS else [sigmas] * count
        if len(sigmas) != count and count:
            raise InputError(f"detection:coco-ap: keypoint_sigmas has {len(sigmas)} widths for {count} keypoints")
        return sigmas


class MultiLabel(Evaluator):
    """Mean average precision of telling which classes a picture has: the detector's ``presence``, or its best score.

    Per class the pictures are ranked; AP is the mean precision at the ranks of those that have the class, crowds
    included. ``mAP`` is the mean over the classes that any picture has; with ``groups_split`` also ``mAPr``, ``mAPc``,
    ``mAPf``.
    """

    def __init__(self, config: MultiLabelConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: MultiLabelConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """Raises ``InputError`` for encoders, data sets and classes that do not fit together."""
        c = self.config
        detector = _detector(context, "detection:multi-label")
        dataset, positions = _pictures(context, c, "detection:multi-label")
        labels = class_map(detector, dataset.classes)
        scores = np.zeros((len(positions), len(dataset.classes)), np.float32)
        present = np.zeros(scores.shape, bool)
        for row, (index, objects) in enumerate(detections(detector, dataset, positions, c.batch_size)):
            scores[row] = presence_scores(objects, labels, len(dataset.classes))
            present[row, dataset.object_labels(index)] = True
        values = presence_precisions(scores, present)
        summary = {"mAP": float(np.nanmean(values))} if present.any() else {}
        if c.groups_split is not None:
            source = context.dataset(c.dataset, split=c.groups_split, **c.settings)
            groups = detection_set(source, "detection:multi-label")[0].frequency_groups(c.rare_up_to, c.common_up_to)
            for position, name in enumerate(GROUPS):
                chosen = values[(groups == position) & ~np.isnan(values)]
                if len(chosen):
                    summary[f"mAP{name[0]}"] = float(chosen.mean())
        if c.per_class:
            pairs = zip(dataset.classes, values.tolist(), strict=True)
            summary |= {f"AP/{name}": value for name, value in pairs if not np.isnan(value)}
        return Metrics(summary=summary)


# ------------------------------------------------------------------------------------------------- from a detector


def detections(
    detector: Detector, dataset: DetectionSet, positions: Sequence[int], batch_size: int = 8
) -> Iterator[tuple[int, Objects]]:
    """Position and found objects of every picture at ``positions``, in that order; in eval mode, without gradients."""
    training = detector.training
    device = next(detector.parameters()).device
    detector.eval()
    try:
        for start in range(0, len(positions), batch_size):
            chosen = positions[start : start + batch_size]
            images = [
                F.to_dtype(F.pil_to_tensor(dataset.image(index)), torch.float32, scale=True).to(device)
                for index in chosen
            ]
            with torch.inference_mode():
                found = detector.detect(images)
            yield from zip(chosen, found, strict=True)
    finally:
        detector.train(training)


def class_map(detector: Detector, classes: Sequence[str]) -> NDArray[np.int64]:
    """For every class of ``detector`` its index in ``classes``, -1 where it is not there.

    Raises ``InputError`` where the detector does not know one of ``classes``.
    """
    lacking = [name for name in classes if name not in set(detector.classes)]
    if lacking:
        raise InputError(
            f"the detector does not know {len(lacking)} of the {len(classes)} classes of the data, such as "
            f"{lacking[0]!r}; it was trained on {len(detector.classes)}: {', '.join(list(detector.classes)[:5])}, ..."
        )
    positions = {name: i for i, name in enumerate(classes)}
    return np.array([positions.get(name, -1) for name in detector.classes], np.int64)


def of_classes(objects: Objects, labels: NDArray[np.int64]) -> Objects:
    """``objects`` with their labels mapped; those that are mapped to -1 are left out."""
    mapped = torch.from_numpy(labels)[objects.labels]
    kept = mapped >= 0
    return Objects(
        boxes=objects.boxes[kept],
        labels=mapped[kept],
        scores=None if objects.scores is None else objects.scores[kept],
        masks=None if objects.masks is None else objects.masks[kept],
        keypoints=None if objects.keypoints is None else objects.keypoints[kept],
    )


def results(objects: Objects, image_id: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Found objects in the form of COCO's result files: kind (``box``, ``mask``, ``keypoint``) and entry."""
    entries = {"box": "bbox", "mask": "segmentation", "keypoint": "keypoints"}
    for one in coco_annotations(objects, image_id):
        for kind, entry in entries.items():
            if entry in one:
                yield kind, {key: one[key] for key in ("image_id", "category_id", "score", entry)}


def presence_scores(objects: Objects, labels: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """``(count,)``: how sure it is that a picture has each class; 0 where nothing of it was found."""
    scores = np.zeros(count, np.float32)
    if objects.presence is not None:
        scores[labels[labels >= 0]] = objects.presence.float().numpy()[labels >= 0]
        return scores
    found = of_classes(objects, labels)
    assert found.scores is not None
    np.maximum.at(scores, found.labels.numpy(), found.scores.float().numpy())
    return scores


def presence_precisions(scores: NDArray[np.float32], present: NDArray[np.bool_]) -> NDArray[np.float64]:
    """``(C,)`` average precision of ranking pictures by ``scores`` ``(N, C)``; NaN for classes that none has."""
    values = np.full(scores.shape[1], np.nan)
    some = present.any(axis=0)
    if some.any():
        chosen = torch.from_numpy(scores[:, some]), torch.from_numpy(present[:, some].astype(np.int64))
        found = multilabel_average_precision(*chosen, num_labels=int(some.sum()), average="none")
        values[some] = np.atleast_1d(found.double().numpy())
    return values


def _detector(context: EvalContext, asked_by: str) -> Detector:
    if not isinstance(context.encoder, Detector):
        raise InputError(
            f"{asked_by} measures detectors, such as those of detection:torchvision, not a "
            f"{type(context.encoder).__name__}"
        )
    return context.encoder


def _pictures(
    context: EvalContext, c: CocoAPConfig | MultiLabelConfig, asked_by: str
) -> tuple[DetectionSet, Sequence[int]]:
    dataset: Dataset = context.dataset(c.dataset, split=c.split, **c.settings)
    found, positions = detection_set(dataset, asked_by)
    if not positions:
        raise InputError(f"{asked_by}: the split {c.split!r} of {c.dataset!r} has no pictures")
    return found, positions


# ------------------------------------------------------------------------------------------------ average precision


@dataclass(frozen=True)
class AveragePrecisions:
    """``precision`` (T, R, C, A, M) and ``recall`` (T, C, A, M) of COCO, -1 where nothing is annotated.

    T IoU thresholds 0.5, 0.55, ..., 0.95; R recalls; A areas: ``areas``; M limits of the number of detections.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    areas: Sequence[str]

    def summary(self, groups: NDArray[np.int64] | None = None) -> dict[str, float]:
        """By name, as fractions. ``groups`` ``(C,)``: 0 rare, 1 common, 2 frequent."""
        precision, recall = self.precision[..., -1], self.recall[..., -1]
        values = {
            "AP": _mean(precision[:, :, :, 0]),
            "AP50": _mean(precision[0, :, :, 0]),
            "AP75": _mean(precision[5, :, :, 0]),
            **{f"AP{name[0]}": _mean(precision[..., i]) for i, name in enumerate(self.areas) if i},
            "AR": _mean(recall[:, :, 0]),
            **{f"AR{name[0]}": _mean(recall[..., i]) for i, name in enumerate(self.areas) if i},
        }
        if groups is not None:
            values |= {f"AP{name[0]}": _mean(precision[:, :, groups == i, 0]) for i, name in enumerate(GROUPS)}
        return {name: value for name, value in values.items() if not np.isnan(value)}

    def by_class(self) -> NDArray[np.float64]:
        """``(C,)`` AP, NaN for classes that are not annotated."""
        return np.array([_mean(self.precision[:, :, k, 0, -1]) for k in range(self.precision.shape[2])])


def average_precisions(
    truth: dict[str, Any],
    found: list[dict[str, Any]],
    kind: str = "box",
    *,
    max_detections: int = 100,
    area_sides: tuple[float, float] = (32, 96),
    keypoint_sigmas: Sequence[float] | None = None,
    lvis: bool = False,
) -> AveragePrecisions:
    """COCO's average precision of ``found`` (result entries) in the pictures of ``truth`` (COCO's form).

    Args:
        kind: ``box``, ``mask`` or ``keypoint``.
        max_detections: Per picture, the best ones; COCO has 100, LVIS 300. Of keypoints always 20.
        area_sides: Sides in pixels of the squares that divide small, medium and large objects.
        keypoint_sigmas: Widths of the K keypoints; ``None``: those of COCO's 17.
        lvis: Count detections only of classes that were verified in a picture (``neg_category_ids``,
            ``not_exhaustive_category_ids``, and ``frequency`` of categories).

    ``truth`` and ``found`` are changed by the evaluation.
    """
    small, large = (side**2 for side in area_sides)
    ranges = {"small": [0, small], "medium": [small, large], "large": [large, _LARGEST]}
    annotated = COCO(truth)
    empty = {**truth, "annotations": []}
    evaluation = COCOeval_faster(
        annotated,
        annotated.loadRes(found) if found else COCO(empty),
        IOU_TYPES[kind],
        ranges=ranges,
        kpt_oks_sigmas=None if keypoint_sigmas is None else list(keypoint_sigmas),
        lvis_style=lvis,
    )
    p = evaluation.params
    p.imgIds, p.catIds = [one["id"] for one in truth["images"]], [one["id"] for one in truth["categories"]]
    if kind == "keypoint":
        p.areaRng[1:] = [ranges["medium"], ranges["large"]]
    else:
        p.maxDets = [max_detections]
    evaluation.evaluate()
    evaluation.accumulate()
    return AveragePrecisions(evaluation.eval["precision"], evaluation.eval["recall"], p.areaRngLbl)


def _mean(values: NDArray[np.float64]) -> float:
    """Over what is annotated; NaN where nothing is."""
    known = values[values > -1]
    return float(known.mean()) if len(known) else float("nan")
