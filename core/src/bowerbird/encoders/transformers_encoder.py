"""``core:transformers``: vision and text towers of the transformers library as encoders.

B batch, L word tokens, N patch tokens, F width of the tower. A model with two towers (CLIP, SigLIP) gives the one that
is asked for, with its own projection into the shared space, or both: then pictures and texts have one space.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.encoders.configs import TransformersConfig
from bowerbird.encoders.trunk import TrunkEncoder
from bowerbird.errors import InputError
from bowerbird.protocols import Features


class TransformersEncoder(TrunkEncoder):
    """A tower of a transformers model, or both, and a projection. Texts need a tokenizer."""

    architecture: Any
    takes_texts: bool
    tokenizer: Any = None
    max_tokens: int = 77

    @classmethod
    def build(cls, config: TransformersConfig) -> Self:
        """Raises ``InputError`` for a model that cannot be loaded or has no such tower."""
        model = _load_model(config)
        both = config.tower == "both"
        trunk = _TwoTowers(model, config.pooling) if both else _Tower(model, config.tower, config.pooling)
        preprocessing = None
        if config.tower != "text":
            preprocessing = config.prepared(_preprocessing(config, model.config))
        encoder = cls(trunk, trunk_dim=trunk.width, config=config, preprocessing=preprocessing)
        encoder.max_tokens, encoder.takes_texts = config.max_tokens, config.tower != "vision"
        encoder.architecture = model.config
        source = config.tokenizer or (config.model if encoder.takes_texts else None)
        if source is not None:
            encoder.load_tokenizer(source)
        return encoder

    def load_tokenizer(self, source: str | Path) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(source))
        except (OSError, ValueError) as error:
            raise InputError(f"no tokenizer in {str(source)!r}: {_first_line(error)}") from error

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, int64 ``(B, L)``, padded to the longest text."""
        if not self.takes_texts:
            raise InputError(
                "this is the vision tower alone, which takes no texts; where the model has a text tower too, such as "
                "CLIP, set tower = 'both'"
            )
        if self.tokenizer is None:
            raise InputError("this text encoder has no tokenizer; set encoder.tokenizer to a folder that holds one")
        found = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        return {key: found[key] for key in ("input_ids", "attention_mask")}

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in config.items() if key not in ("model", "tokenizer")}
        found = self.architecture
        return {**kept, "architecture": {**found.to_diff_dict(), "model_type": found.model_type}}


class _Tower(nn.Module):
    """One tower of ``model``; the other one is dropped."""

    def __init__(self, model: Any, tower: str, pooling: str | None) -> None:
        super().__init__()
        self.tower = tower
        two_towers = hasattr(model, f"{tower}_model")
        config = getattr(model.config, f"{tower}_config", model.config)
        if not two_towers and any(hasattr(model.config, f"{other}_config") for other in ("vision", "text")):
            raise InputError(f"{type(model).__name__} has no {tower} tower that can be used by itself")
        self.pooling = pooling or ("model" if two_towers else "cls" if tower == "vision" else "mean")
        projection = getattr(model, f"{tower}_projection" if tower == "text" else "visual_projection", None)
        self.projection = projection if two_towers and self.pooling == "model" else None
        other = "text" if tower == "vision" else "vision"
        if two_towers and hasattr(model, f"{other}_model"):
            delattr(model, f"{other}_model")  # its weights are neither used nor stored
        self.model = model
        self.inner_name = f"{tower}_model" if two_towers else None
        sizes: Any = getattr(config, "hidden_sizes", None)
        width = self.projection.out_features if self.projection is not None else getattr(config, "hidden_size", None)
        self.width = int(width or sizes[-1])

    def forward(self, batch: Batch) -> Features:
        inner = getattr(self.model, self.inner_name) if self.inner_name else self.model
        mask = None
        if self.tower == "vision":
            output = inner(pixel_values=batch["image"])
        else:
            mask = batch["text"]["attention_mask"].bool()
            output = inner(**batch["text"])
        hidden = output.last_hidden_state
        grid = None
        if hidden.ndim == 4:  # feature maps of a convolutional network
            grid = (int(hidden.shape[2]), int(hidden.shape[3]))
            hidden = hidden.flatten(2).transpose(1, 2)
        return Features(pooled=self._pool(output, hidden, mask, grid), tokens=hidden, grid=grid, mask=mask)

    def _pool(self, output: Any, hidden: Tensor, mask: Tensor | None, grid: tuple[int, int] | None) -> Tensor:
        if self.pooling == "model":
            pooled = getattr(output, "pooler_output", None)
            if pooled is None:
                raise InputError("this model has no pooling of its own; set pooling to cls or mean")
            pooled = pooled.flatten(1)
            return pooled if self.projection is None else self.projection(pooled)
        if self.pooling == "cls" and grid is None:
            return hidden[:, 0]
        if mask is None:
            return hidden.mean(dim=1)
        weight = mask.to(hidden.dtype).unsqueeze(-1)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


class _TwoTowers(nn.Module):
    """Both towers of ``model``, each with its projection into the shared space."""

    def __init__(self, model: Any, pooling: str | None) -> None:
        super().__init__()
        if not (hasattr(model, "vision_model") and hasattr(model, "text_model")):
            raise InputError(
                f"{type(model).__name__} has no two towers, of pictures and of texts; set tower to the one"
            )
        self.vision, self.text = (_Tower(_shallow(model), tower, pooling) for tower in ("vision", "text"))
        if self.vision.width != self.text.width:
            raise InputError(
                f"the towers of {type(model).__name__} have no shared space: pictures become {self.vision.width} "
                f"numbers, texts {self.text.width}"
            )
        self.width = self.vision.width

    def forward(self, batch: Batch) -> Features:
        features: Features = self.vision(batch) if "image" in batch else self.text(batch)
        return features


def _shallow(model: Any) -> Any:
    """``model`` with the same parts, of which one may be left out without the other losing it."""
    half = copy.copy(model)
    half._modules = dict(model._modules)
    return half


def _load_model(config: TransformersConfig) -> Any:
    try:
        if config.model is not None:
            return AutoModel.from_pretrained(config.model, dtype=torch.float32)
        assert config.architecture is not None
        return AutoModel.from_config(AutoConfig.for_model(**config.architecture))
    except (OSError, ValueError, KeyError, TypeError) as error:
        where = repr(config.model) if config.model is not None else "the given architecture"
        offline = " (offline: HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise InputError(f"transformers could not load {where}{offline}: {_first_line(error)}") from error


def _preprocessing(config: TransformersConfig, architecture: Any) -> Preprocessing:
    """What the model's folder says about its pictures; for fresh weights plain 0.5 and the size of the architecture."""
    vision = getattr(architecture, "vision_config", architecture)
    size = getattr(vision, "image_size", None) or 224
    size = int(size if isinstance(size, int) else size[-1])
    if config.model is None:
        return Preprocessing(size=size, resize="squash")
    try:
        processor = AutoImageProcessor.from_pretrained(config.model)
    except (OSError, ValueError):
        return Preprocessing(size=size, resize="squash")
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    resized = getattr(processor, "size", None) or {}
    side = int((crop or resized).get("height") or (crop or resized).get("shortest_edge") or size)
    shorter = int(resized.get("shortest_edge") or resized.get("height") or side)
    return Preprocessing(
        size=side,
        mean=tuple(processor.image_mean) if getattr(processor, "do_normalize", True) else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if getattr(processor, "do_normalize", True) else (1.0, 1.0, 1.0),
        interpolation="bilinear" if int(getattr(processor, "resample", 3) or 3) == 2 else "bicubic",
        resize="crop" if crop is not None or "shortest_edge" in resized else "squash",
        crop_pct=min(1.0, side / shorter),
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
