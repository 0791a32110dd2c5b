"""Image tokenizers: from a picture to a grid of codes, trained on your own pictures.

``DiscreteVAE`` (Gumbel-softmax, of DALL-E and BEiT; the default) gives logits over codes; ``VQVAE`` picks the nearest
code. Both are encoders of the hook: a trained one is an exported encoder, which ``mim:beit`` and ``mim:mc-beit`` load
by ``load_tokenizer``, and which serves as a bag of codes.

B batch, C channels, S side of a picture, V codes, h x w cells with h = w = S / stride.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from bowerbird import dist
from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.errors import InputError
from bowerbird.protocols import BuildContext, Encoder, ItemTransform, LossOutput, Objective, freeze
from bowerbird_mim.codes import (
    GumbelQuantizer,
    VectorQuantizer,
    code_kl,
    count_codes,
    gumbel_noise,
    gumbel_softmax,
    item_noise,
    perplexity,
    usage_kl,
)
from bowerbird_mim.precision import at_least_float32
from bowerbird_mim.tokenizer_configs import DVAEConfig, VQVAEConfig
from bowerbird_mim.tokenizer_models import VQVAE, CodeEncoder, DiscreteVAE, DVAELoss
from bowerbird_mim.views import crop_resized, random_crop_box

__all__ = [
    "VQVAE",
    "DVAEConfig",
    "DiscreteVAE",
    "GumbelQuantizer",
    "ImageTokenizer",
    "TokenizerConfig",
    "TokenizerObjective",
    "TokenizerTraining",
    "VQVAEConfig",
    "VectorQuantizer",
    "check_token_grid",
    "code_kl",
    "gumbel_noise",
    "gumbel_softmax",
    "load_tokenizer",
    "save_tokenizer",
    "temperature_at",
    "train_tokenizer",
    "usage_kl",
]  # fmt: skip


LEAST_USAGE = 0.1  # share of the codes below which a tokenizer has collapsed


@runtime_checkable
class ImageTokenizer(Protocol):
    """What masked image modelling needs of a tokenizer.

    Pictures are prepared as the tokenizer's ``preprocessing`` says, where it has one; any side that ``stride`` divides
    is accepted.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def stride(self) -> int: ...

    def logits(self, images: Tensor) -> Tensor:
        """``(B, C, S, S)`` to ``(B, V, S / stride, S / stride)``."""

    def ids(self, images: Tensor) -> Tensor:
        """Most likely code of every cell, int64 ``(B, h, w)``."""

    def decode(self, ids: Tensor) -> Tensor:
        """Pictures ``(B, C, S, S)`` of codes."""


def load_tokenizer(path_or_run: str | Path, context: BuildContext | None = None) -> Any:
    """A frozen ``ImageTokenizer`` (a ``torch.nn.Module`` in eval mode), with ``preprocessing``.

    Args:
        path_or_run: Folder of a run of ``mim:tokenizer`` or of an exported ``mim:dvae`` or ``mim:vqvae``; or a file of
            weights of DALL-E's encoder, of a VQGAN, or of a dVAE as BEiT's, ``.safetensors`` or tensors only.
        context: Of the objective that is being built; runs are then loaded through it.

    Raises:
        InputError: There is no such thing, or it is no tokenizer.
        DataError: A file of another layout; the message lists what differs.
    """
    if Path(path_or_run).is_file():
        from bowerbird_mim.tokenizer_files import read_tokenizer  # networks of other people's checkpoints

        return freeze(read_tokenizer(path_or_run))
    if context is not None:
        encoder: Encoder = context.load_run(path_or_run).encoder
    else:
        from bowerbird.encoders.bundle import load_encoder

        encoder = load_encoder(path_or_run, device="cpu").module
    if not isinstance(encoder, ImageTokenizer):
        raise InputError(
            f"tokenizer {str(path_or_run)!r} is a {type(encoder).__name__}, which gives no codes; expected a run of "
            "mim:tokenizer, or an exported mim:dvae or mim:vqvae"
        )
    return freeze(encoder)


def save_tokenizer(tokenizer: DiscreteVAE | VQVAE, path: str | Path, *, card: str = "") -> str:
    """Write ``tokenizer`` as an exported encoder's folder, whole or not at all, and return its fingerprint.

    Weights are stored in float32, the type in which encoders are loaded. How a ``DiscreteVAE`` is trained
    (``settings``) is not stored: a loaded one is for use.

    Args:
        path: The folder; one that holds an encoder is replaced.
        card: Text for its model card.

    Raises:
        InputError: ``path`` is something else than an encoder's folder.
    """
    from bowerbird.encoders.bundle import save_encoder

    if any(parameter.dtype != torch.float32 for parameter in tokenizer.parameters()):
        tokenizer = copy.deepcopy(tokenizer).float()
    return save_encoder(tokenizer, path, use=tokenizer.record, config=tokenizer.settings_of_record(), card=card)


def check_token_grid(
    tokenizer: ImageTokenizer, size: tuple[int, int], grid: tuple[int, int], *, vocab_size: int | None = None
) -> None:
    """Raise ``InputError`` where pictures of ``size`` (height, width) do not give ``grid`` cells of ``vocab_size``."""
    found = (size[0] / tokenizer.stride, size[1] / tokenizer.stride)
    if found != tuple(grid):
        raise InputError(
            f"pictures of {size[0]} x {size[1]} pixels give the tokenizer (stride {tokenizer.stride}) a grid of "
            f"{found[0]:g} x {found[1]:g} codes, but there are {grid[0]} x {grid[1]} patches; it needs pictures of "
            f"{grid[0] * tokenizer.stride} x {grid[1] * tokenizer.stride}"
        )
    if vocab_size is not None and vocab_size != tokenizer.vocab_size:
        raise InputError(f"vocab_size = {vocab_size}, but the tokenizer has {tokenizer.vocab_size} codes")


# ------------------------------------------------------------------------------------------------ training


def temperature_at(step: int, *, total_steps: int, start: float, end: float) -> float:
    """From ``start`` at step 0 exponentially to ``end`` at the last step."""
    return start * (end / start) ** min(1.0, step / max(1, total_steps - 1))


class TokenizerConfig(BaseModel):
    """Settings of ``mim:tokenizer``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    recon: Literal["mse", "smooth_l1"] = Field(default="mse", description="Reconstruction loss.")
    temperature: float = Field(default=1.0, gt=0, description="Of the Gumbel-softmax at the start (mim:dvae).")
    final_temperature: float = Field(default=0.3, gt=0, description="At the end; it falls exponentially (mim:dvae).")
    straight_through: bool = Field(default=False, description="One code per cell in the forward pass (mim:dvae).")
    usage_weight: float = Field(default=0.05, ge=0, description="Of the KL of the mean code usage (mim:dvae).")
    kl_weight: float = Field(default=0.0, ge=0, description="Of the KL of every cell to the uniform prior (mim:dvae).")
    kl_reduction: Literal["mean", "sum"] = Field(
        default="mean", description="Of that KL: mean over batch and cells, or the sum, as BEiT's code (mim:dvae)."
    )
    crop_scale: tuple[float, float] | None = Field(
        default=None, strict=False, description="Range of a random crop's share of the picture; null: all of it."
    )
    flip_prob: float = Field(default=0.0, ge=0, le=1, description="How often a picture is mirrored.")


DVAE_ONLY = ("temperature", "final_temperature", "straight_through", "usage_weight", "kl_weight", "kl_reduction")


@dataclass(frozen=True)
class TokenizerView:
    """``image``: the picture or a random crop of it; ``noise_seed``: decides the item's Gumbel noise."""

    preprocessing: Preprocessing
    crop_scale: tuple[float, float] | None
    flip_prob: float

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        image: Image.Image = item["image"]
        if self.crop_scale is not None:
            box = random_crop_box(image.size, generator, scale=self.crop_scale)
            image = crop_resized(image, box, self.preprocessing)
        if generator.random() < self.flip_prob:
            image = ImageOps.mirror(image)
        return {"image": self.preprocessing(image), "noise_seed": int(generator.integers(2**63))}


class TokenizerObjective(Objective):
    """``mim:tokenizer``: trains a ``DiscreteVAE`` or a ``VQVAE`` to restore pictures from codes.

    Logged: ``usage`` and ``perplexity`` of codes, where a code counts that occurred in about the last 70 passes.
    """

    counts: Tensor
    temperature: Tensor

    def __init__(self, encoder: CodeEncoder, config: TokenizerConfig, *, total_steps: int) -> None:
        super().__init__()
        self.encoder, self.config, self.total_steps = encoder, config, total_steps
        encoder.requires_grad_(True)  # the decoder, too
        if isinstance(encoder, DiscreteVAE):
            encoder.settings = DVAELoss(
                temperature=config.temperature,
                straight_through=config.straight_through,
                kl_weight=config.kl_weight,
                kl_reduction=config.kl_reduction,
                usage_weight=config.usage_weight,
                recon=config.recon,
            )
        elif isinstance(encoder, VQVAE):
            encoder.recon = config.recon
        self.register_buffer("counts", torch.zeros(encoder.vocab_size))
        # A tensor, so that a compiled step is not compiled again for every value; a function of the step.
        self.register_buffer("temperature", torch.tensor(config.temperature), persistent=False)

    @classmethod
    def build(cls, config: TokenizerConfig, encoder: Encoder, context: BuildContext) -> Self:
        """Raises ``InputError`` for another encoder, or for settings that it does not read."""
        if not isinstance(encoder, DiscreteVAE | VQVAE):
            raise InputError(f"mim:tokenizer trains mim:dvae and mim:vqvae, not a {type(encoder).__name__}")
        # A resolved recipe has written out every default, so only other values tell what was asked for.
        unread = [name for name in DVAE_ONLY if getattr(config, name) != TokenizerConfig.model_fields[name].default]
        if isinstance(encoder, VQVAE) and unread:
            raise InputError(
                f"objective.{unread[0]}: a setting for mim:dvae; mim:vqvae has no Gumbel-softmax. Remove it"
            )
        return cls(encoder, config, total_steps=context.total_steps)

    def item_transform(self) -> ItemTransform:
        preprocessing = self.encoder.preprocessing
        if preprocessing is None:
            raise InputError("this tokenizer reads no picture files (channels other than 3, or pictures = false)")
        return TokenizerView(preprocessing, self.config.crop_scale, self.config.flip_prob)

    def before_step(self, step: int) -> None:
        self.temperature.fill_(
            temperature_at(
                step,
                total_steps=self.total_steps,
                start=self.config.temperature,
                end=self.config.final_temperature,
            )
        )

    def forward(self, batch: Batch) -> LossOutput:
        seeds, tokenizer = batch["noise_seed"], self.encoder
        assert isinstance(tokenizer, DiscreteVAE | VQVAE)
        images = tokenizer.check_images(batch["image"])
        stats: dict[str, Tensor] = {}
        if isinstance(tokenizer, DiscreteVAE):
            shape = (tokenizer.vocab_size, *(side // tokenizer.stride for side in images.shape[2:]))
            noise = item_noise(seeds, shape, dtype=at_least_float32(images).dtype)
            output = tokenizer.output(images, noise, temperature=self.temperature)
            stats["temperature"] = self.temperature.clone()
        else:
            output = tokenizer.output(images)
        with torch.no_grad():
            seen = dist.world_size() * dist.mean_over_processes(count_codes(output.ids, tokenizer.vocab_size))
            if self.training:
                self.counts.mul_(0.99).add_(seen)
            stats |= {"usage": self.usage(), "perplexity": perplexity(self.counts)}
        return LossOutput(total=output.loss, parts=output.parts, stats=stats)

    def usage(self) -> Tensor:
        """Share of the codes that occurred lately: 0.99^69 = 0.5."""
        return (self.counts >= 0.5).float().mean()

    def exported_encoder(self) -> Encoder:
        """The tokenizer. Warns where it uses less than 10 % of its codes."""
        if self.counts.any() and self.usage() < LEAST_USAGE:
            used, size = round(float(self.usage()) * len(self.counts)), len(self.counts)
            warnings.warn(
                f"the tokenizer uses {used} of {size} codes (less than {LEAST_USAGE:.0%}): it has collapsed. Try a "
                "larger objective.usage_weight (mim:dvae), fewer num_tokens, or a smaller train.lr",
                stacklevel=2,
            )
        return self.encoder


class TokenizerTraining(BaseModel):
    """What ``train_tokenizer`` does. The defaults train on small grey or coloured pictures in minutes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    encoder: DVAEConfig | VQVAEConfig = Field(description="The tokenizer.")
    objective: TokenizerConfig = TokenizerConfig()
    steps: int = Field(default=600, ge=1, description="Optimiser steps.")
    batch_size: int = Field(default=64, ge=1, description="Pictures per step.")
    lr: float = Field(default=3e-3, gt=0, description="Of Adam, constant.")


def train_tokenizer(
    dataset: Tensor | Sequence[Any],
    config: TokenizerTraining,
    generator: torch.Generator | None = None,
    *,
    progress: Callable[[int, Mapping[str, float]], None] | None = None,
) -> DiscreteVAE | VQVAE:
    """A trained tokenizer in eval mode, without files: for notebooks and tests; ``bowerbird train`` does the same.

    Args:
        dataset: Prepared pictures ``(N, C, S, S)``; or items by position, each a prepared picture ``(C, S, S)``, a
            Pillow picture, or a dictionary with one of them as ``image``.
        config: See ``TokenizerTraining``.
        generator: Decides first weights, order and noise; by default a fixed one.
        progress: Called after every step with its number (from 1) and values.

    Raises:
        InputError: No pictures, or pictures that do not fit the tokenizer.

    Warns where less than 10 % of the codes are used.
    """
    if not len(dataset):
        raise InputError("there are no pictures to train a tokenizer on")
    generator = generator or torch.Generator().manual_seed(0)
    kind = DiscreteVAE if isinstance(config.encoder, DVAEConfig) else VQVAE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(_seeds(1, generator)))
        tokenizer: Any = kind.build(config.encoder)  # type: ignore[arg-type]
    objective = TokenizerObjective(tokenizer, config.objective, total_steps=config.steps).train()
    optimizer = torch.optim.Adam(objective.parameters(), lr=config.lr)
    size = min(config.batch_size, len(dataset))
    order = torch.empty(0, dtype=torch.int64)
    for step in range(config.steps):
        if len(order) < size:  # the rest of an epoch that fills no batch is left out
            order = torch.randperm(len(dataset), generator=generator)
        chosen, order = order[:size], order[size:]
        images = dataset[chosen] if isinstance(dataset, Tensor) else _pictures(dataset, chosen, tokenizer.preprocessing)
        objective.before_step(step)
        output = objective({"image": images, "noise_seed": _seeds(size, generator)})
        optimizer.zero_grad(set_to_none=True)
        output.total.backward()
        optimizer.step()
        if progress is not None:
            values = {"loss": output.total.detach(), **output.parts, **output.stats}
            progress(step + 1, {name: float(torch.as_tensor(value).detach()) for name, value in values.items()})
    objective.exported_encoder()  # warns of a collapse
    return tokenizer.eval()


def _seeds(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2**62, (count,), generator=generator)


def _pictures(dataset: Sequence[Any], chosen: Tensor, preprocessing: Preprocessing | None) -> Tensor:
    found = []
    for position in chosen.tolist():
        item = dataset[position]
        image = item.get("image") if isinstance(item, Mapping) else item
        if isinstance(image, Image.Image):
            if preprocessing is None:
                raise InputError("the items are picture files, and this tokenizer reads only tensors")
            image = preprocessing(image)
        if not isinstance(image, Tensor | np.ndarray):
            raise InputError(
                f"item {position} is a {type(item).__name__} without a picture: expected a prepared picture (C, S, S), "
                "a Pillow picture, or a dictionary with one of them as 'image'"
            )
        found.append(torch.as_tensor(image))
    if len(shapes := {tuple(image.shape) for image in found}) > 1:
        raise InputError(f"prepared pictures have the shapes {sorted(shapes)}: those of a batch must be equal")
    return torch.stack(found)
