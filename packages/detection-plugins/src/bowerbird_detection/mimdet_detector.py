"""``detection:mimdet``: torchvision's Mask R-CNN on a plain ViT that sees a random part of the picture in training.

Section 3 of Fang et al., ICCV 2023 (arXiv 2204.02964); the backbone is in ``bowerbird_detection.mimdet``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from math import gcd
from typing import Any, Self

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from bowerbird import dist
from bowerbird.data.images import Preprocessing
from bowerbird.errors import DataError
from bowerbird.protocols import Features
from bowerbird_detection.detectors import BOX_CELLS, TorchvisionDetector
from bowerbird_detection.mimdet import (
    ConvStem,
    LoadReport,
    MIMDetBackbone,
    MIMDetDecoder,
    MIMDetEncoder,
    PatchStem,
    load_mae_checkpoint,
    mimdet_param_groups,
)
from bowerbird_detection.mimdet_config import MIMDetConfig
from bowerbird_detection.mimdet_weights import read_first_weights

Norm = Callable[[int], nn.Module]


class MIMDetPyramid(nn.Module):
    """The last ``levels`` of MIMDet's maps brought to equal width, in the form that torchvision's detectors take.

    torchvision hands a backbone the padded batch only. The sizes of the pictures in it, which sampling needs, come from
    the transform that pads them: ``remember_sizes`` is its forward hook.
    """

    def __init__(self, body: MIMDetBackbone, levels: int, width: int, norm: Norm) -> None:
        super().__init__()
        self.body = body
        channels, strides = body.channels[-levels:], body.strides[-levels:]
        self.fpn = FeaturePyramidNetwork(list(channels), width, extra_blocks=LastLevelMaxPool(), norm_layer=norm)
        self.out_channels, self.embed_dim = width, body.encoder.embed_dim
        self.names = ["c2", "c3", "c4", "c5"][-levels:]
        self.strides = (*strides, 2 * strides[-1])
        self._sizes: Sequence[tuple[int, int]] | None = None

    def remember_sizes(self, transform: nn.Module, arguments: Any, result: tuple[ImageList, Any]) -> None:
        self._sizes = result[0].image_sizes

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """``(B, 3, H, W)`` to maps ``(B, width, H / s, W / s)`` of the strides s; "pool" is the coarsest."""
        sizes, self._sizes = self._sizes, None
        maps = self.body(images, sizes)
        return self.fpn(OrderedDict((name, maps[name]) for name in self.names))

    def features(self, images: Tensor) -> Features:
        """Tokens of the encoder, which sees all of them here, and their mean."""
        encoder = self.body.encoder
        c4 = encoder.patch_embed(images).c4
        tokens = encoder.encode(encoder.tokens(c4))
        return Features(pooled=tokens.mean(dim=1), tokens=tokens, grid=(c4.shape[2], c4.shape[3]))


class MIMDetDetector(TorchvisionDetector):
    """``detection:mimdet``. As an encoder it embeds whole pictures with all their tokens: nothing is random.

    Attributes:
        loaded: What came from ``init`` and what kept its first values; ``None`` without ``init``.
    """

    loaded: LoadReport | None = None

    def __init__(self, backbone: MIMDetBackbone, config: MIMDetConfig, preprocessing: Preprocessing) -> None:
        norm = _norm(config.norm)
        super().__init__(MIMDetPyramid(backbone, config.levels, config.fpn_width, norm), config, preprocessing)
        self.settings = config
        model: Any = self.model
        model.transform.register_forward_hook(model.backbone.remember_sizes)
        width, heads = config.fpn_width, model.roi_heads
        anchors = model.rpn.anchor_generator.num_anchors_per_location()[0]
        model.rpn.head = RPNHead(width, anchors, conv_depth=config.rpn_convs)
        heads.box_head = FastRCNNConvFCHead(
            (width, BOX_CELLS, BOX_CELLS), [width] * config.box_convs, [config.head_width], norm_layer=norm
        )
        if heads.has_mask():
            heads.mask_head = MaskRCNNHeads(width, [config.mask_width] * 4, dilation=1, norm_layer=norm)

    @classmethod
    def build(cls, config: MIMDetConfig) -> Self:  # type: ignore[override]
        """Raises ``DataError`` where ``init`` cannot be read or does not fit."""
        stem = (ConvStem if config.stem == "conv" else PatchStem)(3, config.embed_dim, config.stem_depth)
        shared: dict[str, Any] = {
            "image_size": config.image_size,
            "mlp_ratio": config.mlp_ratio,
            "norm_eps": config.layer_norm_eps,
            "checkpointing": config.checkpointing,
        }
        encoder = MIMDetEncoder(
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            drop_path=config.drop_path,
            stem=stem,
            **shared,
        )
        decoder = MIMDetDecoder(
            config.embed_dim,
            patch_size=encoder.patch_size,
            embed_dim=config.decoder_dim,
            depth=config.decoder_depth,
            num_heads=config.decoder_heads,
            fill=config.fill,
            **shared,
        )
        backbone = MIMDetBackbone(encoder, decoder, config.train_ratio, config.test_ratio)
        loaded = None if config.init is None else _start_from(backbone, config)
        preprocessing = Preprocessing(size=config.image_size, mean=config.mean, std=config.std)
        made = cls(backbone, config, preprocessing)
        made.loaded = loaded
        return made

    @property
    def backbone(self) -> MIMDetBackbone:
        """For instance to set ``test_ratio``."""
        body: MIMDetBackbone = self.model.backbone.body
        return body

    def open(self, classes: Sequence[str]) -> None:
        super().open(classes)
        on_gpu = next(self.model.parameters()).is_cuda
        if dist.is_distributed() and on_gpu:  # statistics of the joined batch; torch can do it on GPUs only
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Stem, encoder and the rest at three paces (``lr_multiplier``); no weight decay for vectors."""
        return scaled_groups(self.model, self.settings.lr_multiplier)

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` with the classes, without the source of the first weights."""
        return {key: value for key, value in super().stored_config(config).items() if key != "init"}


def scaled_groups(model: nn.Module, multiplier: float) -> list[dict[str, Any]]:
    """``mimdet_param_groups`` in the form of ``Objective.parameter_groups``: relative to the recipe's values."""
    groups = mimdet_param_groups(model, 1.0, multiplier, 1.0)
    no_decay = {"weight_decay": 0.0}
    return [
        {"params": group["params"], "lr_scale": group["lr"], **({} if group["weight_decay"] else no_decay)}
        for group in groups
    ]


def _norm(kind: str) -> Norm:
    if kind == "batch":
        return nn.BatchNorm2d
    return _group_norm


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(gcd(32, channels), channels)


def _start_from(backbone: MIMDetBackbone, config: MIMDetConfig) -> LoadReport:
    assert config.init is not None
    found = read_first_weights(config.init)
    for name, theirs, ours in (
        ("num_heads", found.num_heads, config.num_heads),
        ("decoder_heads", found.decoder_heads, config.decoder_heads),
    ):
        if theirs not in (None, ours):
            raise DataError(
                f"init {config.init!r} has {name} = {theirs}, the encoder {ours}: set encoder.{name} = {theirs}"
            )
    return load_mae_checkpoint(backbone, found.state, grid=found.grid, source=config.init)
