"""What detectors are built on: maps of several strides from a timm model or from any encoder of the registry.

B batch, H x W pixels, level l of stride s_l has F_l channels and maps of ceil(H / s_l) x ceil(W / s_l).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork

from bowerbird.data.images import Preprocessing
from bowerbird.encoders.bundle import load_encoder
from bowerbird.encoders.timm_encoder import TimmEncoder, create_timm_model, load_weights, preprocessing_of
from bowerbird.errors import InputError, RecipeError
from bowerbird.protocols import Encoder, Features
from bowerbird.recipe import build_config
from bowerbird.registry import get_registry

PLAIN_FACTORS = (0.25, 0.5, 1.0, 2.0)  # strides of the levels of a plain ViT over the side of its patches


class Pyramid(nn.Module):
    """Maps of several strides, finest first.

    Attributes:
        channels: F_l of every level.
        strides: s_l of every level; each is twice the one before.
        embed_dim: Width of the embedding of a picture.
        preprocessing: How the backbone's pictures are prepared.
        source: The backbone as a table with ``use``, which builds the same modules without first weights.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    embed_dim: int
    preprocessing: Preprocessing
    source: Mapping[str, Any]

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        """``(B, 3, H, W)``, normalised, to maps ``(B, F_l, h_l, w_l)`` named "0", "1", ..."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def features(self, image: Tensor) -> Features:
        """The last map as an embedding: its mean, and its positions as tokens."""
        return _features(list(self(image).values())[-1])

    def freeze_unused(self) -> None:
        """No gradient for parameters that no map depends on (a classifier's norm): DDP waits for all others."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not trainable:
            return
        device, was_training = trainable[0].device, self.training
        self.eval()  # statistics stay as they are, and no random number is drawn
        side = 2 * self.strides[-1]
        with torch.enable_grad():
            maps = self(torch.zeros(1, 3, side, side, device=device)).values()
            found = torch.autograd.grad([level.sum() for level in maps], trainable, allow_unused=True)
        self.train(was_training)
        for parameter, gradient in zip(trainable, found, strict=True):
            parameter.requires_grad_(gradient is not None)


class StagePyramid(Pyramid):
    """The last ``levels`` stages of a timm model whose stages grow coarser (ResNet, ConvNeXt, Swin, EfficientNet)."""

    def __init__(
        self, model: Any, strides: Sequence[int], channels: Sequence[int], levels: int, source: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.indices = list(range(len(strides) - levels, len(strides)))
        self.strides, self.channels = tuple(strides[-levels:]), tuple(channels[-levels:])
        self.embed_dim, self.preprocessing, self.source = self.channels[-1], preprocessing_of(model), source
        model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        self.model = model

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.model.forward_intermediates(image, indices=self.indices, intermediates_only=True, output_fmt="NCHW")
        return _named(maps)


class MapsPyramid(Pyramid):
    """The last ``levels`` maps of an encoder that gives them itself.

    Such an encoder has ``feature_maps(images)``, a list of maps ``(B, F_l, h_l, w_l)``, finest first, and the tuples
    ``strides`` and ``dims`` (F_l) of them.
    """

    def __init__(self, encoder: Any, levels: int, source: Mapping[str, Any]) -> None:
        super().__init__()
        drop_class_token = getattr(encoder, "without_class_token", None)
        self.encoder = encoder if drop_class_token is None else drop_class_token()
        self.strides, self.channels = tuple(encoder.strides[-levels:]), tuple(encoder.dims[-levels:])
        self.embed_dim, self.preprocessing, self.source = self.channels[-1], _prepared(encoder), source

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        return _named(self.encoder.feature_maps(image)[-len(self.channels) :])


class PlainPyramid(Pyramid):
    """A plain ViT has one map, at the stride p of its patches. From it levels of strides p/4, p/2, p and 2p are made.

    Transposed convolutions make finer maps, pooling the coarser one: Li, Mao, Girshick, He: Exploring Plain Vision
    Transformer Backbones for Object Detection, ECCV 2022 (arXiv 2203.16527), section 3.

    Args:
        tokens: Module from pictures ``(B, 3, H, W)`` to one map ``(B, F, H / p, W / p)``.
        width: F.
        patch: p.
        levels: 1 to 4; fewer leave out the finest.
    """

    def __init__(
        self, tokens: nn.Module, width: int, patch: int, levels: int, preprocessing: Preprocessing,
        source: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__()
        factors = PLAIN_FACTORS[-levels:]
        if any(patch * factor < 1 or patch * factor % 1 for factor in factors):
            raise InputError(
                f"backbone: patches of {patch} pixels cannot make maps of {factors[0]} times their side; use one "
                "with patches of at least 4 pixels"
            )
        self.tokens = tokens
        self.strides, self.channels = tuple(int(patch * factor) for factor in factors), (width,) * len(factors)
        self.embed_dim, self.preprocessing, self.source = width, preprocessing, source
        self.levels = nn.ModuleList(_resampled(width, factor) for factor in factors)

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.tokens(image)
        return _named([level(maps) for level in self.levels])

    def features(self, image: Tensor) -> Features:
        """The map of the ViT itself."""
        return _features(self.tokens(image))


def _resampled(width: int, factor: float) -> nn.Module:
    def doubled() -> nn.Module:
        return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)

    if factor == 0.25:
        return nn.Sequential(doubled(), nn.GroupNorm(1, width), nn.GELU(), doubled())
    if factor == 0.5:
        return doubled()
    return nn.Identity() if factor == 1 else nn.MaxPool2d(2)


class _TimmTokens(nn.Module):
    """The last map of a plain timm ViT, normed."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        (maps,) = self.model.forward_intermediates(
            image, indices=1, norm=True, intermediates_only=True, output_fmt="NCHW"
        )
        return maps


class _EncoderTokens(nn.Module):
    """The tokens of an encoder as a map."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> Tensor:
        features = self.encoder({"image": image})
        if features.tokens is None or features.grid is None:
            raise InputError(
                f"backbone: the encoder {type(self.encoder).__name__} gives no tokens with their places, so there is "
                "nothing to find objects in; choose a timm model or an encoder with tokens"
            )
        return features.tokens.transpose(1, 2).unflatten(2, features.grid).contiguous()


class FeaturePyramid(nn.Module):
    """A pyramid whose levels have equal width and see the coarser ones (FPN), in the form that torchvision takes.

    Attributes:
        body: The pyramid below.
        out_channels: Width of all levels.
        names: Of the levels that regions are read from; ``extra`` adds coarser ones.
        strides: Of all levels, those of ``extra`` included.
    """

    def __init__(self, body: Pyramid, width: int, *, extra: ExtraFPNBlock, num_extra: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(body.channels), width, extra_blocks=extra)
        self.out_channels = width
        self.names = [str(level) for level in range(len(body.channels))]
        self.strides = (*body.strides, *(body.strides[-1] * 2 ** (i + 1) for i in range(num_extra)))

    @property
    def embed_dim(self) -> int:
        return self.body.embed_dim

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(self.body(image))

    def features(self, image: Tensor) -> Features:
        return self.body.features(image)


# ---------------------------------------------------------------------------------------------- from a name to maps


def pyramid_of(
    backbone: str | Mapping[str, Any],
    *,
    levels: int = 4,
    weights: str | None = None,
    pretrained: bool = False,
    freeze_norm: bool = False,
) -> Pyramid:
    """The maps of a backbone.

    Args:
        backbone: Name of a timm model (``resnet50``); a folder of an exported encoder or of a finished run; an encoder
            by name (``core:timm?model=resnet18``), or as a table (``{"use": "core:timm", "model": "resnet18"}``). A
            projection behind a timm model is left out.
        levels: How many maps, counted from the coarsest.
        weights: File of first weights of a timm model.
        pretrained: Let timm fetch its weights.
        freeze_norm: Batch normalisation with its present statistics, scales and shifts, for ever.

    Raises:
        UnknownNameError: There is no such timm model or encoder.
        InputError: The backbone has fewer levels, or none that keep places; ``weights`` for something else than timm.
    """
    if levels < 1:
        raise InputError(f"levels = {levels}: expected at least 1")
    if isinstance(backbone, str) and not is_reference(backbone):
        pyramid = _of_timm(backbone, levels, weights=weights, pretrained=pretrained)
    else:
        if weights is not None or pretrained:
            raise InputError("backbone: weights and pretrained are for the name of a timm model; leave them out")
        pyramid = _of_encoder(*_encoder(backbone), levels)
    if freeze_norm:
        pyramid = freeze_batch_norm_2d(pyramid)
    pyramid.freeze_unused()
    return pyramid


def is_reference(backbone: str) -> bool:
    """Whether it is a path or a record's name rather than the name of a timm model."""
    return ":" in backbone or "/" in backbone or backbone.startswith(".") or Path(backbone).is_dir()


def _encoder(backbone: str | Mapping[str, Any]) -> tuple[Encoder, dict[str, Any]]:
    """The encoder, trainable, and the table that builds its modules again."""
    if isinstance(backbone, str):
        loaded = load_encoder(backbone, device="cpu", dense=True)
        table = {"use": loaded.spec.use, **loaded.module.stored_config(loaded.spec.config)}
        made, _ = _encoder(table)  # a loaded one is frozen, and no longer says what of it is never trained
        made.load_state_dict(loaded.module.state_dict())
        made.preprocessing = loaded.module.preprocessing
        return made, table
    settings = {key: value for key, value in backbone.items() if key != "use"}
    registry = get_registry()
    record = registry.get("encoder", str(backbone.get("use")))
    encoder: Encoder = registry.load(record).build(build_config(record, settings, where="backbone"))
    return encoder, {"use": record.name, **encoder.stored_config(settings)}


def _of_encoder(encoder: Encoder, source: dict[str, Any], levels: int) -> Pyramid:
    if isinstance(encoder, TimmEncoder):
        trained: Any = encoder.trunk.model
        preprocessing = _prepared(encoder)
        pyramid = _of_timm(source["model"], levels, state=trained.state_dict(), image_size=preprocessing.size)
        projection = ("embed_dim", "head", "freeze_trunk")
        pyramid.source = {key: value for key, value in source.items() if key not in projection}
        pyramid.preprocessing = preprocessing
        return pyramid
    if hasattr(encoder, "feature_maps"):
        return MapsPyramid(encoder, _enough(levels, len(getattr(encoder, "strides", ())), source["use"]), source)
    preprocessing = _prepared(encoder)
    tokens = _EncoderTokens(encoder)
    with torch.no_grad():  # eval mode: statistics stay as they are
        maps = tokens.eval()(torch.zeros(1, 3, preprocessing.height, preprocessing.width))
    tokens.train()
    patch = preprocessing.height // maps.shape[2]
    return PlainPyramid(tokens, maps.shape[1], patch, _enough(levels, 4, source["use"]), preprocessing, source)


def _of_timm(
    name: str,
    levels: int,
    *,
    weights: str | None = None,
    pretrained: bool = False,
    state: Mapping[str, Tensor] | None = None,
    image_size: Any = None,
) -> Pyramid:
    model: Any
    try:  # pictures of every size: position tables are resized
        model = create_timm_model(name, image_size=image_size, pretrained=pretrained, dynamic_img_size=True)
    except InputError:
        model = create_timm_model(name, image_size=image_size, pretrained=pretrained)
    if weights is not None:
        load_weights(model, weights)
    if state is not None:
        model.load_state_dict(state)
    info = model.feature_info if isinstance(model.feature_info, list) else list(model.feature_info.info)
    strides, channels = [int(level["reduction"]) for level in info], [int(level["num_chs"]) for level in info]
    source = {"use": "core:timm", "model": name}
    if not hasattr(model, "forward_intermediates"):
        raise InputError(f"backbone {name!r}: timm does not give its intermediate maps; choose another model")
    if len(set(strides)) == 1:
        model.prune_intermediate_layers(1, prune_norm=False, prune_head=True)
        preprocessing = preprocessing_of(model)
        return PlainPyramid(
            _TimmTokens(model), channels[-1], strides[-1], _enough(levels, 4, name), preprocessing, source
        )
    return StagePyramid(model, strides, channels, _enough(levels, len(strides), name), source)


def _enough(levels: int, found: int, name: str) -> int:
    if levels > found:
        raise InputError(f"backbone {name!r} has {found} levels; {levels} were asked for")
    return levels


def _prepared(encoder: Encoder) -> Preprocessing:
    if encoder.preprocessing is None:
        raise RecipeError(f"backbone: the encoder {type(encoder).__name__} takes no pictures")
    return encoder.preprocessing


def _features(maps: Tensor) -> Features:
    rows, columns = maps.shape[2:]
    return Features(
        pooled=maps.mean(dim=(2, 3)), tokens=maps.flatten(2).transpose(1, 2), grid=(int(rows), int(columns))
    )


def _named(maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
    return OrderedDict((str(level), found) for level, found in enumerate(maps))
