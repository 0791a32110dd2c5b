"""A plugin for the tests of training: a small network, squares of three colours, and an objective that misbehaves."""

from __future__ import annotations

import os
import signal
import types
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.errors import DataError, InputError, UnknownNameError
from bowerbird.hookspecs import hookimpl
from bowerbird.objectives.configs import SoftmaxConfig
from bowerbird.objectives.softmax import Softmax
from bowerbird.protocols import BuildContext, Dataset, Encoder, Features, ItemTransform, LossOutput, Modifier
from bowerbird.records import DatasetRecord, EncoderRecord, ModifierRecord, ObjectiveRecord

COLOURS = ("red", "green", "blue")


class TinyConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    embed_dim: int = Field(default=8, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    freeze_trunk: bool = False


class TinyEncoder(Encoder):
    """Four by four pixels through one hidden layer."""

    preprocessing = Preprocessing(size=4, interpolation="bilinear")

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.embed_dim = config.embed_dim
        self.trunk = nn.Linear(48, 16)
        self.head = nn.Sequential(nn.Tanh(), nn.Dropout(config.dropout), nn.Linear(16, config.embed_dim))
        self.frozen = config.freeze_trunk
        self.trunk.requires_grad_(not self.frozen)

    @classmethod
    def build(cls, config: TinyConfig) -> Self:
        return cls(config)

    def forward(self, batch: Batch) -> Features:
        if "frozen_features" in batch:
            return Features(pooled=self.head(batch["frozen_features"]))
        return Features(pooled=self.head(self.trunk(batch["image"].flatten(1))))

    def frozen_trunk(self, batch: Batch) -> Tensor | None:
        return self.trunk(batch["image"].flatten(1)) if self.frozen else None


class Squares(Dataset):
    """40 noisy squares, item ``i`` of class ``i % 3``; the split ``test`` has other noise."""

    classes = COLOURS

    def __init__(self, seed: int, count: int = 40, damaged: Sequence[int] = ()) -> None:
        self.damaged = frozenset(damaged)
        self.pixels = np.random.default_rng(seed).integers(0, 80, (count, 6, 6, 3), dtype=np.uint8)
        for i in range(count):
            self.pixels[i, ..., i % 3] += 150

    @classmethod
    def build(cls, config: Any, split: str | None) -> Self:
        if split == "damaged":
            return cls(seed=0, damaged=(3, 11))
        if split not in (None, "train", "test"):
            raise UnknownNameError(f"tiny:squares has no split {split!r}")
        return cls(seed=1 if split == "test" else 0)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.damaged:
            raise DataError(f"Cannot read image square-{index}.png")
        return {"image": Image.fromarray(self.pixels[index]), "label": index % 3, "item_id": f"square-{index}"}

    @property
    def item_ids(self) -> Sequence[str]:
        return [f"square-{i}" for i in range(len(self))]

    def labels(self) -> Sequence[int]:
        return [i % 3 for i in range(len(self))]


class Places(Squares):
    """Squares of two domains: every fourth item is from the sea, the others from the land."""

    domains = ("land", "sea")

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "domain": int(index % 4 == 3)}

    def domain_indices(self) -> Sequence[int]:
        return [int(i % 4 == 3) for i in range(len(self))]


class ByPlace(Softmax):
    """A classifier of its own for every domain; notes the indices and domains that it sees."""

    seen: list[tuple[list[int], list[int]]] = []

    def __init__(self, encoder: Encoder, num_classes: int, config: SoftmaxConfig) -> None:
        super().__init__(encoder, num_classes, config)
        self.classifier = nn.ModuleList(nn.Linear(encoder.embed_dim, num_classes) for _ in Places.domains)

    @classmethod
    def build(cls, config: Any, encoder: Encoder, context: BuildContext) -> Self:
        return cls(encoder, len(context.classes), config)

    def forward(self, batch: Batch) -> LossOutput:
        (domain,) = batch["domain"].unique().tolist()
        ByPlace.seen.append((batch["index"].tolist(), [domain]))
        logits = self.classifier[domain](self.encoder(batch).pooled)
        loss = nn.functional.cross_entropy(logits, batch["label"])
        return LossOutput(total=loss, stats={f"loss of {Places.domains[domain]}": loss.detach()})


class FaultConfig(SoftmaxConfig):
    at_step: int = Field(default=0, ge=0)
    fault: str = "nan"


class Faulty(Softmax):
    """Softmax that cannot be built, or whose loss becomes NaN, or that is interrupted or killed, at one step, once."""

    armed = True

    def __init__(self, encoder: Encoder, num_classes: int, config: FaultConfig) -> None:
        super().__init__(encoder, num_classes, config)
        self.config, self.step = config, -1

    @classmethod
    def build(cls, config: Any, encoder: Encoder, context: BuildContext) -> Self:
        if config.fault == "build":
            raise InputError("num_parts = 5 does not divide 64 patches")
        return cls(encoder, len(context.classes), config)

    def before_step(self, step: int) -> None:
        self.step = step

    def forward(self, batch: Batch) -> LossOutput:
        output = super().forward(batch)
        if self.step != self.config.at_step or not Faulty.armed:
            return output
        if self.config.fault == "nan":
            return LossOutput(total=output.total * torch.nan)
        Faulty.armed = False
        if self.config.fault == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            return output
        raise MemoryError("as if the machine had died")


class Mirrored:
    """An item transform: the picture, perhaps mirrored, and a number drawn for it."""

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        pixels = TinyEncoder.preprocessing(item["image"])
        mirrored = pixels[..., ::-1].copy() if generator.random() < 0.5 else pixels
        return {"image": mirrored, "label": item["label"], "noise": np.float32(generator.random())[None]}


class Viewing(Softmax):
    """Softmax on views of its own; counts its calls and looks at the gradients before the optimiser does."""

    seen: list[Tensor] = []
    updates: list[int] = []

    @classmethod
    def build(cls, config: Any, encoder: Encoder, context: BuildContext) -> Self:
        return cls(encoder, len(context.classes), config)

    def item_transform(self) -> ItemTransform:
        return Mirrored()

    def forward(self, batch: Batch) -> LossOutput:
        Viewing.seen.append(batch["noise"])
        return super().forward(batch)

    def before_update(self, step: int) -> None:
        assert all(parameter.grad is not None for parameter in self.parameters())
        Viewing.updates.append(step)


class Noise(Modifier):
    """Adds noise to the features while training."""

    def __init__(self) -> None:
        self.steps = 0

    @classmethod
    def build(cls, config: Any) -> Self:
        return cls()

    def attach(self, module: nn.Module, total_steps: int) -> None:
        self.total_steps = total_steps
        self.handle = module.register_forward_hook(
            lambda m, _inputs, out: (
                Features(pooled=out.pooled + 0.01 * torch.randn_like(out.pooled)) if m.training else out
            )
        )

    def after_step(self, step: int) -> None:
        self.steps += 1

    def finalize(self, module: nn.Module) -> nn.Module:
        self.handle.remove()
        return module


def _record(kind: Any, name: str, target: str, **values: Any) -> Any:
    return kind(name=f"tiny:{name}", target=f"{__name__}:{target}", summary=f"Test {name}.", **values)


def make_plugin() -> types.ModuleType:
    """An in-process plugin ``tiny``."""
    module = types.ModuleType("tiny_plugin")

    @hookimpl
    def bowerbird_encoders() -> Any:
        yield _record(EncoderRecord, "net", "TinyEncoder", config=f"{__name__}:TinyConfig")

    @hookimpl
    def bowerbird_datasets() -> Any:
        yield _record(
            DatasetRecord, "squares", "Squares", provides=("image", "label"), splits=("train", "test", "damaged")
        )

        yield _record(DatasetRecord, "places", "Places", provides=("image", "label", "domain"))

    @hookimpl
    def bowerbird_objectives() -> Any:
        yield _record(
            ObjectiveRecord,
            "by-place",
            "ByPlace",
            config="bowerbird.objectives.configs:SoftmaxConfig",
            needs=("image", "label", "domain"),
        )
        yield _record(ObjectiveRecord, "faulty", "Faulty", config=f"{__name__}:FaultConfig", needs=("label",))
        yield _record(
            ObjectiveRecord,
            "views",
            "Viewing",
            config="bowerbird.objectives.configs:SoftmaxConfig",
            needs=("image", "label"),
        )
        yield _record(ObjectiveRecord, "video", "Faulty", needs=("video", "label"), encoder_needs=("tokens",))

    @hookimpl
    def bowerbird_modifiers() -> Any:
        yield _record(ModifierRecord, "noise", "Noise")

    for hook in (bowerbird_encoders, bowerbird_datasets, bowerbird_objectives, bowerbird_modifiers):
        setattr(module, hook.__name__, hook)
    module.BOWERBIRD_API = "1.0"  # type: ignore[attr-defined]
    return module
