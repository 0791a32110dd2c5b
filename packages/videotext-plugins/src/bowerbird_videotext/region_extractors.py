"""Regions found by detectors and described by networks, and what builds an extractor from its settings.

N pictures, r regions of a picture, F width of their features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from bowerbird.data.images import Preprocessing
from bowerbird.encoders import load_encoder
from bowerbird.encoders.weights import load_strictly, read_weights
from bowerbird.errors import InputError, UnknownNameError, did_you_mean
from bowerbird.protocols import Detector, Encoder, freeze
from bowerbird.recipe import build_config
from bowerbird.registry import get_registry
from bowerbird_videotext.demovlp_config import ExtractorConfig
from bowerbird_videotext.regions import FrameRegions, GivenRegions, GridRegions, PixelFeatures, aligned, frame_regions

CELLS = 7  # per side of a region in which a map is read before its mean is taken


class EncoderFeatures(nn.Module):
    """The mean of an image encoder's tokens inside a region (RoIAlign). The encoder is frozen.

    Args:
        encoder: Gives tokens with their places from pictures.

    Raises:
        InputError: It takes no pictures, or gives no such tokens.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        if encoder.preprocessing is None:
            raise InputError(f"extractor: the encoder {type(encoder).__name__} takes no pictures")
        self.encoder, self.preparation = freeze(encoder), encoder.preprocessing
        self.feature_dim = self._map(torch.zeros(1, 3, self.preparation.height, self.preparation.width)).shape[1]

    @torch.no_grad()
    def forward(self, images: Tensor, boxes: Sequence[Tensor]) -> list[Tensor]:
        maps = self._map(images)
        scale = images.new_tensor([maps.shape[3] / images.shape[3], maps.shape[2] / images.shape[2]]).repeat(2)
        read = aligned(maps, [found * scale for found in boxes], CELLS).mean(dim=(2, 3))
        return list(read.split([len(found) for found in boxes]))

    @torch.no_grad()
    def _map(self, images: Tensor) -> Tensor:
        """``(N, F, h, w)`` of pictures in 0..1, each prepared as a whole, whatever its ratio of sides."""
        p = self.preparation
        if images.shape[2:] != (p.height, p.width):
            images = interpolate(images, (p.height, p.width), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (p.mean, p.std))
        features = self.encoder({"image": (images - mean) / std})
        if features.tokens is None or features.grid is None:
            raise InputError(
                f"extractor: the encoder {type(self.encoder).__name__} gives no tokens with their places, so that "
                "there is nothing to read in a region; take an encoder with tokens, or pixels"
            )
        return features.tokens.transpose(1, 2).unflatten(2, features.grid).contiguous()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)  # frozen: its statistics stay


class DetectorRegions(nn.Module):
    """What a detector of this project finds, described by the map of its backbone.

    Where it finds nothing the whole picture is one region, of score 0.

    Args:
        detector: Trained, with its classes.
        threshold: Least score.
        most: Most regions of a picture.
    """

    takes_boxes = False

    def __init__(self, detector: Detector, *, threshold: float = 0.05, most: int = 100) -> None:
        super().__init__()
        self.features, self.threshold, self.most = EncoderFeatures(detector), threshold, most
        self.feature_dim = self.features.feature_dim

    @torch.no_grad()
    def forward(self, images: Tensor, boxes: Sequence[Tensor] | None = None) -> FrameRegions:
        detector: Any = self.features.encoder
        places, scores = [], []
        for image, objects in zip(images, detector.detect(list(images)), strict=True):
            kept = (objects.scores >= self.threshold).nonzero()[: self.most, 0]
            found, sure = objects.boxes[kept].to(images), objects.scores[kept].to(images)
            if not len(kept):
                found, sure = _whole(image), image.new_zeros(1)
            places.append(found)
            scores.append(sure)
        return frame_regions(places, scores, self.features(images, places))

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


class TorchvisionRegions(nn.Module):
    """What a Faster or Mask R-CNN of torchvision finds, described by the vector of its box head (F = 1024 as a rule).

    Where it finds nothing the whole picture is one region, of score 0.

    Args:
        model: Such a model; ``torchvision_model`` makes one.
        threshold: Least score.
        most: Most regions of a picture.
    """

    takes_boxes = False

    def __init__(self, model: Any, *, threshold: float = 0.05, most: int = 100) -> None:
        super().__init__()
        self.model: Any = freeze(model)
        self.threshold, self.most = threshold, most
        self.feature_dim = int(model.roi_heads.box_predictor.cls_score.in_features)

    @torch.no_grad()
    def forward(self, images: Tensor, boxes: Sequence[Tensor] | None = None) -> FrameRegions:
        model = self.model
        sizes = [(int(images.shape[2]), int(images.shape[3]))] * len(images)
        resized, _ = model.transform(list(images))
        maps = model.backbone(resized.tensors)
        proposals, _ = model.rpn(resized, maps)
        detected, _ = model.roi_heads(maps, proposals, resized.image_sizes)
        places, scores = [], []
        for (height, width), objects in zip(resized.image_sizes, detected, strict=True):
            kept = (objects["scores"] >= self.threshold).nonzero()[: self.most, 0]
            found, sure = objects["boxes"][kept], objects["scores"][kept]
            if not len(kept):
                found, sure = images.new_tensor([[0.0, 0.0, width, height]]), images.new_zeros(1)
            places.append(found)
            scores.append(sure)
        heads = model.roi_heads
        vectors = heads.box_head(heads.box_roi_pool(maps, places, resized.image_sizes))
        features = vectors.split([len(found) for found in places])
        back = model.transform.postprocess([{"boxes": found} for found in places], resized.image_sizes, sizes)
        return frame_regions([found["boxes"] for found in back], scores, features)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


def torchvision_model(name: str, num_classes: int) -> Any:
    """A detection model of torchvision with a box head, without weights. Raises ``UnknownNameError``."""
    from torchvision.models import detection as models
    from torchvision.models import list_models

    known = [one for one in list_models(module=models) if "rcnn" in one and not one.startswith("keypoint")]
    if name not in known:
        raise UnknownNameError(
            f"torchvision has no detector {name!r} that gives regions.{did_you_mean(name, known)} "
            f"There are {', '.join(known)}"
        )
    return getattr(models, name)(weights=None, weights_backbone=None, num_classes=num_classes)


# ---------------------------------------------------------------------------------------------------- from settings


def build_extractor(config: ExtractorConfig) -> tuple[Any, ExtractorConfig]:
    """The extractor, and the settings that build the same modules without the files that its weights came from.

    Raises:
        InputError: A folder or file is missing or does not fit.
    """
    if config.torchvision is not None:
        classes = config.num_classes
        state = None
        if config.weights is not None:
            state = read_weights(config.weights)
            head = state.get("roi_heads.box_predictor.cls_score.weight")
            if head is None:
                raise InputError(
                    f"extractor.weights {config.weights!r} has no roi_heads.box_predictor: it is no Faster or Mask "
                    "R-CNN of torchvision"
                )
            classes = len(head)
        if classes is None:
            raise InputError(
                "extractor.torchvision needs extractor.weights, a file of a detector's weights: regions of an "
                "untrained one say nothing"
            )
        model = torchvision_model(config.torchvision, classes)
        if state is not None:
            load_strictly(model, state, source=str(config.weights))
        regions = TorchvisionRegions(model, threshold=config.threshold, most=config.most)
        return regions, config.model_copy(update={"weights": None, "num_classes": classes})
    if config.boxes == "detector":
        assert config.detector is not None
        detector, source = _encoder(config.detector)
        if not isinstance(detector, Detector) or not detector.classes:
            raise InputError(
                f"extractor.detector: {_named(config.detector)} finds no objects; take a run or an export of a "
                "detector, as the objective detection:detector trains"
            )
        found = DetectorRegions(detector, threshold=config.threshold, most=config.most)
        return found, config.model_copy(update={"detector": source})
    features: nn.Module = PixelFeatures(config.cell)
    if config.encoder is not None:
        encoder, source = _encoder(config.encoder)
        features, config = EncoderFeatures(encoder), config.model_copy(update={"encoder": source})
    return (GridRegions(*config.grid, features) if config.boxes == "grid" else GivenRegions(features)), config


def _encoder(ref: str | Mapping[str, Any]) -> tuple[Encoder, dict[str, Any]]:
    """An encoder by reference, and the table that builds its modules again; from such a table, the modules."""
    if isinstance(ref, str):
        loaded = load_encoder(ref, device="cpu", dense=True)
        settings = loaded.module.stored_config(loaded.spec.config)
        preparation = loaded.module.preprocessing
        return loaded.module, {
            "use": loaded.spec.use,
            "settings": settings,
            "preprocessing": None if preparation is None else preparation.to_dict(),
        }
    table = dict(ref)
    registry = get_registry()
    record = registry.get("encoder", str(table.get("use")))
    encoder: Encoder = registry.load(record).build(
        build_config(record, table.get("settings", {}), where="encoder.extractor")
    )
    if table.get("preprocessing") is not None:
        encoder.preprocessing = Preprocessing.from_dict(table["preprocessing"])
    return encoder, table


def _named(ref: str | Mapping[str, Any]) -> str:
    return repr(ref) if isinstance(ref, str) else str(ref.get("use"))


def _whole(image: Tensor) -> Tensor:
    return image.new_tensor([[0.0, 0.0, image.shape[2], image.shape[1]]])
