"""``core:timm``: any image model of the timm library as an encoder."""

from __future__ import annotations

from math import isqrt
from pathlib import Path
from typing import Any, Self

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.encoders.configs import TimmConfig
from bowerbird.encoders.trunk import TrunkEncoder
from bowerbird.encoders.weights import load_strictly, read_weights
from bowerbird.errors import InputError, UnknownNameError, did_you_mean
from bowerbird.protocols import Features


class TimmEncoder(TrunkEncoder):
    """A timm model without its classifier, and a projection."""

    @classmethod
    def build(cls, config: TimmConfig) -> Self:
        """Raises ``UnknownNameError`` for an unknown model, ``DataError`` for weights that do not fit it."""
        model = create_timm_model(config.model, image_size=config.image_size, pretrained=config.pretrained)
        if config.weights is not None:
            load_weights(model, config.weights)
        return cls(
            TimmTrunk(model),
            trunk_dim=trunk_width(model),
            config=config,
            preprocessing=config.prepared(preprocessing_of(model)),
        )


class TimmTrunk(nn.Module):
    """``image (B, 3, H, W)`` to pooled ``(B, F)`` and tokens ``(B, N, F')``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Features:
        # Convolutions are faster with the channels last, 1.5 times for EfficientNet-Lite on a CPU.
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        maps = self.model.forward_features(image)
        if not isinstance(maps, Tensor):  # a few models return several maps
            return Features(pooled=self.model(image))
        pooled = self.model.forward_head(maps, pre_logits=True)
        tokens, grid = tokens_of(self.model, maps)
        return Features(pooled=pooled, tokens=tokens, grid=grid)


def tokens_of(model: Any, maps: Tensor) -> tuple[Tensor | None, tuple[int, int] | None]:
    """Feature maps of a timm model as ``(B, N, F)`` and their grid; class and register tokens are left out."""
    if maps.ndim == 4:
        maps = maps if str(getattr(model, "output_fmt", "NCHW")).upper().endswith("NHWC") else maps.permute(0, 2, 3, 1)
        rows, columns = maps.shape[1:3]
        return maps.flatten(1, 2), (rows, columns)
    if maps.ndim != 3:
        return None, None
    tokens = maps[:, getattr(model, "num_prefix_tokens", 0) :]
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    side = isqrt(tokens.shape[1])
    if grid is not None and grid[0] * grid[1] == tokens.shape[1]:
        return tokens, (int(grid[0]), int(grid[1]))
    return tokens, (side, side) if side * side == tokens.shape[1] else None


def create_timm_model(
    name: str, *, image_size: int | None = None, pretrained: bool | str = False, **more: Any
) -> nn.Module:
    """A timm model without classifier. ``pretrained`` needs a network or a filled hub cache.

    ``more`` are other arguments of ``timm.create_model`` that not every model takes, such as ``output_stride``.
    """
    if not timm.is_model(name):
        known = timm.list_models()
        raise UnknownNameError(
            f"timm {timm.__version__} has no model {name!r}.{did_you_mean(name, known)} "
            f"It has {len(known)} models: python -c 'import timm; print(timm.list_models(\"resnet*\"))' lists them."
        )
    options: dict[str, Any] = {"num_classes": 0, **more}
    if isinstance(pretrained, str):
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"hf_hub_id": pretrained, "source": "hf-hub"}}
    elif pretrained:
        options |= {"pretrained": True}
    if image_size is not None and takes_image_size(name):
        options |= {"img_size": image_size}
    try:
        return timm.create_model(name, **options)
    except (OSError, RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise InputError(f"timm could not build {name!r} with {options}: {error}") from error


def takes_image_size(name: str) -> bool:
    """Whether the size of the picture is fixed when the model is built (position embeddings)."""
    config = timm.get_pretrained_cfg(name)
    return bool(config is not None and config.fixed_input_size)


def trunk_width(model: Any) -> int:
    return int(getattr(model, "head_hidden_size", None) or model.num_features)


def preprocessing_of(model: Any) -> Preprocessing:
    """How timm prepared the pictures that the model was trained with."""
    data = resolve_model_data_config(model)
    return Preprocessing(
        size=int(data["input_size"][-1]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        resize="squash" if data.get("crop_mode") == "squash" else "crop",
        crop_pct=float(data["crop_pct"]),
    )


def load_weights(model: Any, path: str | Path) -> None:
    """Load a file of weights, every key used and every parameter filled; weights of a classifier are left out."""
    state = read_weights(path)
    classifier = model.pretrained_cfg.get("classifier") if getattr(model, "pretrained_cfg", None) else None
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    kept = {key: value for key, value in state.items() if not key.startswith(tuple(f"{name}." for name in names))}
    load_strictly(model, kept, source=str(path))
