"""``detection:torchvision``: torchvision's Faster, Mask and Keypoint R-CNN and RetinaNet on any backbone.

B pictures, C classes, R objects of a picture, K keypoints. Ren et al.: Faster R-CNN, NeurIPS 2015 (arXiv 1506.01497);
He et al.: Mask R-CNN, ICCV 2017 (arXiv 1703.06870); Lin et al.: Focal Loss, ICCV 2017 (arXiv 1708.02002).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetClassificationHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.errors import InputError, RecipeError
from bowerbird.protocols import Detector, Features, Objects
from bowerbird_detection.acsl import ACSLBoxHead, initialize_classifier
from bowerbird_detection.backbones import FeaturePyramid, is_reference, pyramid_of
from bowerbird_detection.checks import checked_pictures, learned_rows
from bowerbird_detection.configs import ClassLoss, HeadsConfig, TorchvisionConfig

BOX_CELLS, MASK_CELLS = 7, 14  # per side of a region that the heads read
OCTAVES = tuple(2 ** (i / 3) for i in range(3))  # RetinaNet: three sides of anchors per map


class TorchvisionDetector(Detector):
    """A torchvision detection model as a ``Detector``.

    Args:
        backbone: Module from normalised pictures ``(B, 3, H, W)`` to maps by name, with ``out_channels``, ``names`` (of
            the maps that regions are read from), ``strides`` (of all maps), ``embed_dim``, ``features(image)`` and
            ``body.strides``; as ``bowerbird_detection.backbones.FeaturePyramid``.
        config: Everything else of the model.
        preprocessing: Mean and deviation of the pixels, and how a picture is prepared that is embedded.

    As an encoder it gives what ``backbone.features`` gives.
    """

    def __init__(self, backbone: Any, config: HeadsConfig, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.config, self.embed_dim = config, int(backbone.embed_dim)
        if config.embed_size is not None:
            preprocessing = replace(preprocessing, size=config.embed_size)
        self.preprocessing: Preprocessing = preprocessing
        self.classes: tuple[str, ...] = ()
        self.model: Any = _model(backbone, config, preprocessing)
        if config.class_loss != "softmax":
            self.use_class_loss(config.class_loss)
        if config.classes:
            self.open(config.classes)

    @classmethod
    def build(cls, config: TorchvisionConfig) -> Self:
        """Raises ``UnknownNameError`` or ``InputError`` for a backbone that does not exist or does not fit."""
        retina = config.detector == "retinanet"
        body = pyramid_of(
            config.backbone,
            levels=3 if retina else 4,
            weights=config.weights,
            pretrained=config.pretrained,
            freeze_norm=config.freeze_norm,
        )
        if not retina and any(stride & (stride - 1) for stride in body.strides):
            raise InputError(
                f"backbone {config.backbone!r} has maps of strides {list(body.strides)}; torchvision reads regions "
                "from strides that are powers of 2 only. Take patches of 8, 16 or 32 pixels, or detector = 'retinanet'"
            )
        extra = LastLevelP6P7(config.fpn_width, config.fpn_width) if retina else LastLevelMaxPool()
        backbone = FeaturePyramid(body, config.fpn_width, extra=extra, num_extra=2 if retina else 1)
        return cls(backbone, config, body.preprocessing)

    def open(self, classes: Sequence[str]) -> None:
        if self.classes:
            if tuple(classes) != tuple(self.classes):
                raise RecipeError(
                    f"the detector has the classes {_listed(self.classes)}; the data has {_listed(classes)}. Leave out "
                    "encoder.classes, or choose data with the detector's classes in their order"
                )
            return
        if not classes:
            raise RecipeError("a detector needs at least one class, and the data names none")
        self.classes = tuple(classes)
        device = next(self.model.parameters()).device
        width, count = self.config, len(self.classes) + 1  # R-CNN: class 0 is the background
        if isinstance(self.model, RetinaNet):
            old = self.model.head.classification_head
            channels = self.model.backbone.out_channels
            self.model.head.classification_head = RetinaNetClassificationHead(
                channels, old.num_anchors, len(self.classes)
            ).to(device)
            return
        heads = self.model.roi_heads
        heads.box_predictor = FastRCNNPredictor(width.head_width, count).to(device)
        if self.class_loss != "softmax":
            initialize_classifier(heads.box_predictor.cls_score)
        if heads.has_mask():
            heads.mask_predictor = MaskRCNNPredictor(width.mask_width, width.mask_width, count).to(device)

    @property
    def class_loss(self) -> ClassLoss:
        """Of the box head; RetinaNet's own counts as ``softmax``, the loss that comes with the model."""
        heads = getattr(self.model, "roi_heads", None)
        return heads.class_loss if isinstance(heads, ACSLBoxHead) else "softmax"

    def use_class_loss(self, class_loss: ClassLoss, **settings: Any) -> None:
        """From now on another loss and its scores, over the same weights.

        Args:
            settings: Of ``ACSLBoxHead``: ``class_frequency`` and others.

        Raises:
            RecipeError: The detector has no box head.
        """
        if isinstance(self.model, RetinaNet):
            raise RecipeError(f"class_loss = {class_loss!r} is for the box head of R-CNN; retinanet has its focal loss")
        self.model.roi_heads = ACSLBoxHead.of(self.model.roi_heads, class_loss=class_loss, **settings)

    def losses(self, images: Sequence[Tensor], objects: Sequence[Objects]) -> Mapping[str, Tensor]:
        """Boxes around crowds and boxes without area are left out.

        Raises:
            InputError: The detector has no classes yet or is in eval mode; a label that is no class; a shape that does
                not fit; masks or keypoints that the detector learns from are missing.
        """
        if not self.classes:
            raise InputError("this detector has no classes yet: call open(classes) before losses")
        if not self.training:
            raise InputError("losses need training mode: call train() first")
        if len(images) != len(objects) or not images:
            raise InputError(
                f"{len(images)} pictures and the objects of {len(objects)}: expected as many, at least one"
            )
        pictures = self._checked(images)
        targets = [
            self._target(i, image, found) for i, (image, found) in enumerate(zip(pictures, objects, strict=True))
        ]
        found: dict[str, Tensor] = self.model(pictures, targets)
        return found

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor]) -> list[Objects]:
        if not self.classes:
            raise InputError("this detector has no classes yet: train it first")
        if self.training:
            raise InputError("detect needs eval mode: call eval() first")
        if not images:
            return []
        first = 0 if isinstance(self.model, RetinaNet) else 1
        return [_objects(result, first) for result in self.model(self._checked(images))]

    def forward(self, batch: Batch) -> Features:
        """Reads ``image (B, 3, H, W)``, normalised. Raises ``InputError`` for another shape."""
        image = batch["image"]
        if image.ndim != 4 or image.shape[1] != 3:
            raise InputError(f"expected pictures (batch, 3, height, width), found {tuple(image.shape)}")
        features: Features = self.model.backbone.features(image)
        return features

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` with the classes, and with a backbone that is built without files."""
        kept = {key: value for key, value in config.items() if key not in ("weights", "pretrained")}
        backbone = kept.get("backbone")
        if isinstance(backbone, Mapping) or (backbone is not None and is_reference(backbone)):
            kept["backbone"] = dict(self.model.backbone.body.source)
        if self.class_loss != "softmax":
            kept["class_loss"] = self.class_loss
        return {**kept, "classes": list(self.classes)}

    def _checked(self, images: Sequence[Tensor]) -> list[Tensor]:
        return checked_pictures(images, next(self.model.parameters()).device)

    def _target(self, i: int, image: Tensor, found: Objects) -> dict[str, Tensor]:
        """The annotations of picture ``i`` as torchvision takes them."""
        count, kept = len(found.boxes), learned_rows(i, found, len(self.classes))
        first = 0 if isinstance(self.model, RetinaNet) else 1
        target = {"boxes": found.boxes[kept].float(), "labels": found.labels[kept].long() + first}
        if self.config.detector == "mask-rcnn":
            if found.masks is None:
                raise InputError(f"picture {i} has no masks, which mask-rcnn learns from; choose faster-rcnn")
            if found.masks.shape != (count, *image.shape[1:]):
                raise InputError(
                    f"picture {i}: masks {tuple(found.masks.shape)} do not fit {count} boxes in "
                    f"{tuple(image.shape[1:])} pixels"
                )
            target["masks"] = found.masks[kept].to(torch.uint8)
        if self.config.detector == "keypoint-rcnn":
            wanted = (count, self.config.num_keypoints, 3)
            if found.keypoints is None or found.keypoints.shape != wanted:
                shape = "none" if found.keypoints is None else tuple(found.keypoints.shape)
                raise InputError(f"picture {i}: keypoints {shape}; keypoint-rcnn expects {wanted}, see num_keypoints")
            target["keypoints"] = found.keypoints[kept].float()
        return {name: value.to(image.device) for name, value in target.items()}


def _objects(result: Mapping[str, Tensor], first: int) -> Objects:
    masks, keypoints = result.get("masks"), result.get("keypoints")
    if keypoints is not None:
        keypoints = torch.cat([keypoints[..., :2], torch.full_like(keypoints[..., 2:], 2.0)], dim=-1).cpu()
    return Objects(
        boxes=result["boxes"].cpu(),
        labels=(result["labels"] - first).cpu(),
        scores=result["scores"].cpu(),
        masks=None if masks is None else (masks[:, 0] >= 0.5).cpu(),
        keypoints=keypoints,
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")


def _model(backbone: Any, config: HeadsConfig, preprocessing: Preprocessing) -> nn.Module:
    """The model with heads for the background alone; ``open`` makes those of the classes."""
    retina = config.detector == "retinanet"
    scale = config.anchor_scale or (4.0 if retina else 8.0)
    octaves = OCTAVES if retina else (1.0,)
    sizes = tuple(tuple(scale * stride * octave for octave in octaves) for stride in backbone.strides)
    anchors = AnchorGenerator(sizes, (config.anchor_ratios,) * len(sizes))
    common: dict[str, Any] = {
        "min_size": config.shorter_side,
        "max_size": config.longer_side,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
        "size_divisible": backbone.body.strides[-1],
    }
    if retina:
        return RetinaNet(
            backbone,
            num_classes=1,
            anchor_generator=anchors,
            score_thresh=config.score_threshold,
            nms_thresh=config.nms_threshold,
            detections_per_img=config.max_detections,
            topk_candidates=config.proposals_test,
            **common,
        )
    width = backbone.out_channels
    common |= {
        "rpn_anchor_generator": anchors,
        "rpn_pre_nms_top_n_train": config.proposals_train,
        "rpn_post_nms_top_n_train": config.proposals_train,
        "rpn_pre_nms_top_n_test": config.proposals_test,
        "rpn_post_nms_top_n_test": config.proposals_test,
        "box_roi_pool": _region_reader(backbone, BOX_CELLS),
        "box_head": TwoMLPHead(width * BOX_CELLS**2, config.head_width),
        "box_predictor": FastRCNNPredictor(config.head_width, 1),
        "box_score_thresh": config.score_threshold,
        "box_nms_thresh": config.nms_threshold,
        "box_detections_per_img": config.max_detections,
        "box_batch_size_per_image": config.rois,
    }
    if config.detector == "mask-rcnn":
        return MaskRCNN(
            backbone,
            mask_roi_pool=_region_reader(backbone, MASK_CELLS),
            mask_head=MaskRCNNHeads(width, (config.mask_width,) * 4, dilation=1),
            mask_predictor=MaskRCNNPredictor(config.mask_width, config.mask_width, 1),
            **common,
        )
    if config.detector == "keypoint-rcnn":
        return KeypointRCNN(
            backbone,
            keypoint_roi_pool=_region_reader(backbone, MASK_CELLS),
            keypoint_head=KeypointRCNNHeads(width, (config.keypoint_width,) * 8),
            keypoint_predictor=KeypointRCNNPredictor(config.keypoint_width, config.num_keypoints),
            **common,
        )
    return FasterRCNN(backbone, **common)


def _region_reader(backbone: Any, cells: int) -> MultiScaleRoIAlign:
    return MultiScaleRoIAlign(featmap_names=backbone.names, output_size=cells, sampling_ratio=2)
