"""Segmentation of several data sets with one network: networks, and the objectives ``domain:segmentation`` and
``domain:cdcl``.

B batch, H x W picture, F channels of the feature maps, h x w their size, K_i classes of data set i.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional

from bowerbird import dist
from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.encoders.timm_encoder import create_timm_model, load_weights, preprocessing_of, trunk_width
from bowerbird.errors import DataError, InputError, RecipeError
from bowerbird.protocols import BuildContext, Encoder, Features, ItemTransform, LossOutput, Objective
from bowerbird_domain.cdcl import DatasetHeads, active_dataset, convert_batchnorm, export_single, unknown_dataset
from bowerbird_domain.segmentation_configs import (
    CDCLConfig,
    FCNConfig,
    NetworkConfig,
    PixelConfig,
    PSPNetConfig,
    SegmentationConfig,
    Statistics,
)

IGNORE = 255  # class index of a pixel that does not count


def pixel_cross_entropy(logits: Tensor, target: Tensor, *, ignore_index: int = IGNORE) -> Tensor:
    """Cross-entropy as the mean over the pixels that count; 0, with gradient 0, where none does.

    Args:
        logits: ``(B, K, H, W)``, or ``(B, K, ...)``.
        target: Whole numbers ``(B, H, W)``: class indices, or ``ignore_index``.

    Returns:
        A scalar.

    Raises:
        InputError: The shapes do not fit, or a target is no class.
    """
    if logits.ndim < 2 or target.shape != (len(logits), *logits.shape[2:]):
        raise InputError(f"logits {tuple(logits.shape)} do not fit a target of shape {tuple(target.shape)}")
    target = target.long()
    counted = target != ignore_index
    if not torch.compiler.is_compiling():
        wrong = counted & ((target < 0) | (target >= logits.shape[1]))
        if wrong.any():
            raise InputError(
                f"target has class {int(target[wrong][0])}; expected 0 to {logits.shape[1] - 1}, or {ignore_index} for "
                "pixels that do not count"
            )
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    total = functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
    return total / counted.sum().clamp(min=1)


# ------------------------------------------------------------------------------------------------------- networks


class SegmentationEncoder(Encoder):
    """A network that keeps positions, and a 1 x 1 convolution to the classes of every data set.

    Args:
        network: Module from ``(B, 3, H, W)`` to maps ``(B, F, h, w)``.
        width: F.
        config: Its data sets, if they are known already.
        preprocessing: Mean and deviation of the pixels, and the size that ``bowerbird embed`` uses.

    As an encoder: ``pooled`` is the mean of the maps, ``tokens`` are their positions.
    """

    def __init__(self, network: nn.Module, width: int, config: NetworkConfig, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.embed_dim, self.preprocessing = width, preprocessing
        self.label_spaces: dict[str, int] = {}
        self.statistics: Statistics = "shared"
        if config.datasets:
            self.open(config.datasets, config.statistics)

    def open(self, label_spaces: Mapping[str, int], statistics: Statistics) -> None:
        """Add the classifiers of ``label_spaces`` (data set -> K_i) and, for ``private``, statistics of their own.

        Raises ``RecipeError`` where the network has other data sets or classes already.
        """
        if self.label_spaces:
            if (self.label_spaces, self.statistics) != (dict(label_spaces), statistics):
                raise RecipeError(
                    f"the network has the data sets {self.label_spaces} with {self.statistics} statistics, training "
                    f"asks for {dict(label_spaces)} with {statistics} ones; leave out encoder.datasets and "
                    "encoder.statistics"
                )
            return
        self.label_spaces, self.statistics = dict(label_spaces), statistics
        if statistics == "private":
            self.network = convert_batchnorm(self.network, list(label_spaces))
        self.heads = DatasetHeads(
            {name: nn.Conv2d(self.embed_dim, classes, kernel_size=1) for name, classes in label_spaces.items()}
        )
        self.heads.to(next(self.network.parameters()).device)

    def maps(self, image: Tensor, dataset: str | None = None) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, F, h, w)``, with the statistics of ``dataset`` (or of the active one)."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise InputError(f"expected pictures (batch, 3, height, width), found {tuple(image.shape)}")
        named = dataset is not None and self.statistics == "private"
        with active_dataset(self.network, str(dataset)) if named else nullcontext():
            found: Tensor = self.network(image)
        return found

    def classify(self, maps: Tensor, size: Sequence[int], dataset: str | None = None) -> Tensor:
        """Maps to logits ``(B, K_i, *size)`` of the classes of ``dataset``, or of the active one."""
        if not self.label_spaces:
            raise InputError("this network has no classes yet: train it with domain:segmentation or domain:cdcl first")
        logits: Tensor = self.heads(maps) if dataset is None else self.heads(maps, dataset)
        if logits.shape[2:] == tuple(size):
            return logits
        return functional.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)

    def logits(self, image: Tensor, dataset: str | None = None) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, K_i, H, W)`` for pictures of ``dataset``, or of the active one.

        Raises ``InputError`` where no data set is given nor active, ``UnknownNameError`` for one that does not exist.
        """
        return self.classify(self.maps(image, dataset), image.shape[2:], dataset)

    def forward(self, batch: Batch) -> Features:
        maps = self.maps(batch["image"])
        rows, columns = maps.shape[2:]
        return Features(
            pooled=maps.mean(dim=(2, 3)), tokens=maps.flatten(2).transpose(1, 2), grid=(int(rows), int(columns))
        )

    def single(self, dataset: str) -> Self:
        """A copy for one data set: plain batch normalisation and its classes only. Raises ``UnknownNameError``."""
        if dataset not in self.label_spaces:
            raise unknown_dataset(dataset, self.label_spaces)
        made = copy.deepcopy(self)
        if self.statistics == "private":
            made.network = export_single(self.network, dataset)
        made.heads = DatasetHeads({dataset: made.heads[made.heads.position(dataset)]})
        made.label_spaces, made.statistics = {dataset: self.label_spaces[dataset]}, "shared"
        return made

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` with the data sets of the training, without the source of the first weights."""
        kept = {key: value for key, value in config.items() if key not in ("weights", "pretrained")}
        return {**kept, "datasets": dict(self.label_spaces), "statistics": self.statistics}


class FCN(SegmentationEncoder):
    """``domain:fcn``: 3 x 3 convolutions with batch normalisation and ReLU. For small pictures and first steps."""

    @classmethod
    def build(cls, config: FCNConfig) -> Self:
        layers: list[nn.Module] = []
        inputs = 3
        strides = config.strides or (1,) * len(config.widths)
        for outputs, dilation, stride in zip(config.widths, config.dilations, strides, strict=True):
            conv = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        preprocessing = Preprocessing(size=config.image_size, interpolation="bilinear")
        return cls(nn.Sequential(*layers), inputs, config, preprocessing)


class PSPNet(SegmentationEncoder):
    """``domain:pspnet``: a timm network with dilated last stages and a pyramid of pooled maps (arXiv:1612.01105)."""

    @classmethod
    def build(cls, config: PSPNetConfig) -> Self:
        """Raises ``UnknownNameError`` for an unknown backbone, ``InputError`` for one that cannot be dilated."""
        backbone = _Backbone(config)
        inputs = trunk_width(backbone.model)
        pyramid = PyramidPooling(inputs, config.bins, config.width)
        last = nn.Sequential(
            nn.Conv2d(inputs + len(config.bins) * config.width, config.width, 3, padding=1, bias=False),
            nn.BatchNorm2d(config.width),
            nn.ReLU(),
            nn.Dropout2d(config.dropout),
        )
        preprocessing = replace(preprocessing_of(backbone.model), size=config.image_size, resize="squash", crop_pct=1.0)
        return cls(nn.Sequential(backbone, pyramid, last), config.width, config, preprocessing)


class _Backbone(nn.Module):
    """Last maps of a timm model."""

    def __init__(self, config: PSPNetConfig) -> None:
        super().__init__()
        options = {} if config.output_stride == 32 else {"output_stride": config.output_stride}
        self.model = create_timm_model(config.backbone, pretrained=config.pretrained, **options)
        if config.weights is not None:
            load_weights(self.model, config.weights)

    def forward(self, image: Tensor) -> Tensor:
        maps = self.model.forward_features(image)  # type: ignore[operator]
        if not isinstance(maps, Tensor) or maps.ndim != 4:
            raise InputError(f"backbone {type(self.model).__name__} gives no maps (batch, channels, height, width)")
        return maps


class PyramidPooling(nn.Module):
    """``(B, F, h, w)`` to ``(B, F + len(bins) * width, h, w)``: the maps and their means on grids of ``bins`` cells."""

    def __init__(self, inputs: int, bins: Sequence[int], width: int) -> None:
        super().__init__()
        self.bins = tuple(bins)
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(side),
                nn.Conv2d(inputs, width, kernel_size=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
            for side in bins
        )

    def forward(self, maps: Tensor) -> Tensor:
        if self.training and len(maps) == 1 and 1 in self.bins and not dist.is_distributed():
            raise InputError(
                "layer 'pyramid', level 1 x 1: batch statistics need at least two values per channel, and a batch of "
                "one picture has one; use train.batch_size of at least 2, or leave 1 out of encoder.bins"
            )
        pooled = [
            functional.interpolate(level(maps), size=maps.shape[2:], mode="bilinear", align_corners=False)
            for level in self.levels
        ]
        return torch.cat([maps, *pooled], dim=1)


# ----------------------------------------------------------------------------------------------------- objectives


class SegmentationObjective(Objective):
    """``domain:segmentation`` and ``domain:cdcl``: the sum over data sets of the pixel cross-entropy of each.

    With ``train.alternate`` a batch holds one data set, and an optimiser step takes one batch of each: the loop's mean
    over these D batches of ``D w_i L_i`` is the sum. A batch that mixes data sets is read as the whole step: with
    private statistics its parts go through the network one after the other.

    Args:
        encoder: Gets the classifiers and, with private statistics, its branches.
        label_spaces: Data set -> number of classes, in the order of the key ``domain``.
        config: Weights, and whether statistics are shared.
        views: What makes a picture and its label map ready in the processes that read the data.
    """

    def __init__(
        self,
        encoder: SegmentationEncoder,
        label_spaces: Mapping[str, int],
        config: SegmentationConfig | CDCLConfig,
        views: ItemTransform,
    ) -> None:
        super().__init__()
        encoder.open(label_spaces, config.statistics)
        self.encoder: SegmentationEncoder = encoder
        self.datasets = tuple(label_spaces)
        self.views = views
        for name in config.weights:
            if name not in self.datasets:
                raise unknown_dataset(name, self.datasets, "objective.weights: ")
        self.weights = tuple(config.weights.get(name, 1.0) for name in self.datasets)
        if not any(self.weights):
            raise RecipeError("objective.weights: every data set has the weight 0, so there is nothing to train")

    @classmethod
    def build(cls, config: SegmentationConfig | CDCLConfig, encoder: Encoder, context: BuildContext) -> Self:
        """Raises ``RecipeError`` for another encoder than a segmentation network, and for data without label maps."""
        if not isinstance(encoder, SegmentationEncoder):
            raise RecipeError(
                f"encoder: segmentation trains domain:fcn and domain:pspnet, not a {type(encoder).__name__}"
            )
        assert encoder.preprocessing is not None
        objective = cls(encoder, label_spaces_of(context.classes), config, PixelViews(encoder.preprocessing, config))
        on_gpu = any(parameter.is_cuda for parameter in encoder.parameters())
        if dist.is_distributed() and on_gpu:  # statistics of the joined batch; torch can do it on GPUs only
            encoder.network = nn.SyncBatchNorm.convert_sync_batchnorm(encoder.network)
        return objective

    def item_transform(self) -> ItemTransform:
        return self.views

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group: the paper's plain SGD decays scales and shifts like everything else."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def forward(self, batch: Batch) -> LossOutput:
        """Reads ``image (B, 3, H, W)``, ``label_map (B, H, W)`` and ``domain (B,)``. Raises ``InputError``."""
        image, target, domain = self._checked(batch)
        shared = self.encoder.maps(image) if self.encoder.statistics == "shared" else None
        parts: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        weighted = []
        for position in domain.unique().tolist():
            name, rows = self.datasets[position], domain == position
            maps = self.encoder.maps(image[rows], name) if shared is None else shared[rows]
            logits = self.encoder.classify(maps, image.shape[2:], name)
            loss = pixel_cross_entropy(logits, target[rows])
            weighted.append(self.weights[position] * loss)
            parts[f"loss/{name}"] = loss
            stats[f"accuracy/{name}"] = _accuracy(logits.detach(), target[rows])
        total = len(self.datasets) * torch.stack(weighted).mean()
        return LossOutput(total=total, parts=parts, stats=stats)

    def _checked(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        lacking = [key for key in ("image", "label_map", "domain") if key not in batch]
        if lacking:
            raise InputError(f"the batch lacks {', '.join(lacking)}; it has {', '.join(batch)}")
        image, target, domain = batch["image"], batch["label_map"], batch["domain"]
        if image.ndim != 4 or target.shape != (len(image), *image.shape[2:]) or domain.shape != (len(image),):
            raise InputError(
                f"image {tuple(image.shape)}, label_map {tuple(target.shape)} and domain {tuple(domain.shape)} do not "
                "fit; expected (B, 3, H, W), (B, H, W) and (B,)"
            )
        if len(domain) == 0 or int(domain.min()) < 0 or int(domain.max()) >= len(self.datasets):
            raise InputError(
                f"domain = {domain.unique().tolist()}: expected indices of the data sets {', '.join(self.datasets)}"
            )
        return image, target, domain


def label_spaces_of(classes: Sequence[str]) -> dict[str, int]:
    """Data set -> number of classes, from class names of the form ``SET/CLASS``. Raises ``RecipeError``."""
    found: dict[str, int] = {}
    for name in classes:
        dataset, slash, _ = name.partition("/")
        if not slash:
            raise RecipeError(f"segmentation sets have classes called SET/CLASS; the training data has {name!r}")
        found[dataset] = found.get(dataset, 0) + 1
    if not found:
        raise RecipeError("the training data has no classes; segmentation needs a data set with label maps")
    return found


def _accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Share of the pixels that count whose largest logit is that of their class; 0 where none counts."""
    counted = target != IGNORE
    return ((logits.argmax(dim=1) == target) & counted).sum() / counted.sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------- views


def native_pixels(preprocessing: Preprocessing, image: Image.Image) -> NDArray[np.float32]:
    """``(3, H, W)`` of a picture in its own size, with the mean and deviation of ``preprocessing``."""
    return replace(preprocessing, size=(image.height, image.width), resize="squash", crop_pct=1.0)(image)


class PixelViews:
    """An item transform: picture and label map resized, cropped and mirrored together."""

    def __init__(self, preprocessing: Preprocessing, config: PixelConfig) -> None:
        self.preprocessing, self.config = preprocessing, config

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """``image`` float32 (3, H, W), ``label_map`` int64 (H, W), ``domain``. Raises ``DataError``."""
        image, labels = item["image"], np.asarray(item["label_map"])
        if labels.shape != (image.height, image.width):
            raise DataError(
                f"item {item.get('item_id')!r}: a picture of {image.width} x {image.height} pixels and a label map of "
                f"{labels.shape[::-1]}"
            )
        side, (low, high) = self.config.crop_size, self.config.scale
        if low < high or high != 1:
            factor = float(np.exp(generator.uniform(np.log(low), np.log(high))))
            size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
            labels = np.asarray(Image.fromarray(labels.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
            image = image.resize(size, Image.Resampling.BILINEAR)
        if side is not None:
            image, labels = _cropped(image, labels, side, generator)
        if self.config.flip and generator.random() < 0.5:
            image, labels = ImageOps.mirror(image), labels[:, ::-1]
        return {
            "image": native_pixels(self.preprocessing, image),
            "label_map": np.ascontiguousarray(labels, dtype=np.int64),
            "domain": item["domain"],
        }


def _cropped(
    image: Image.Image, labels: NDArray[Any], side: int, generator: np.random.Generator
) -> tuple[Image.Image, NDArray[Any]]:
    """A random square of both; what lies outside a smaller picture is black and does not count."""
    wide, high = max(0, side - image.width), max(0, side - image.height)
    if wide or high:
        image = ImageOps.expand(image, (0, 0, wide, high))
        labels = np.pad(labels, ((0, high), (0, wide)), constant_values=IGNORE)
    left = int(generator.integers(image.width - side + 1))
    top = int(generator.integers(image.height - side + 1))
    return image.crop((left, top, left + side, top + side)), labels[top : top + side, left : left + side]
