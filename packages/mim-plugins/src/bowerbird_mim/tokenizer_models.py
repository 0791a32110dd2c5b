"""The two image tokenizers that are trained here: ``DiscreteVAE`` and ``VQVAE``.

They share convolutions, the meaning of ids, and how they serve as encoders. The names of the parameters of
``DiscreteVAE`` are those of BEiT's code, so that its checkpoints load.

B batch, C channels, H hidden channels, V codes, d width of a code, n stages, h x w cells with h = height / 2^n.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.errors import InputError
from bowerbird.protocols import Encoder, Features
from bowerbird_mim.codes import (
    VectorQuantizer,
    check_finite,
    check_sizes,
    code_kl,
    code_mixture,
    gumbel_noise,
    gumbel_softmax,
    usage_kl,
)
from bowerbird_mim.precision import at_least_float32
from bowerbird_mim.tokenizer_configs import DVAEConfig, VQVAEConfig

# ------------------------------------------------------------------------------------------------ convolutions


class ResBlock(nn.Module):
    """x + Conv1x1(ReLU(Conv3x3(ReLU(Conv3x3(x)))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def conv_encoder(channels: int, hidden_dim: int, num_layers: int, out: int) -> nn.Sequential:
    """n times {convolution 4x4 of stride 2, ReLU, ResBlock}, then a 1x1 convolution to ``out`` channels."""
    layers: list[nn.Module] = []
    for stage in range(num_layers):
        into = channels if stage == 0 else hidden_dim
        layers.append(nn.Sequential(nn.Conv2d(into, hidden_dim, 4, stride=2, padding=1), nn.ReLU()))
        layers.append(ResBlock(hidden_dim))
    return nn.Sequential(*layers, nn.Conv2d(hidden_dim, out, 1))


def conv_decoder(code_dim: int, hidden_dim: int, num_layers: int, channels: int) -> nn.Sequential:
    """n times {transposed convolution 4x4 of stride 2, ReLU, ResBlock}, then a 1x1 convolution to ``channels``."""
    layers: list[nn.Module] = []
    for stage in range(num_layers):
        into = code_dim if stage == 0 else hidden_dim
        layers.append(nn.Sequential(nn.ConvTranspose2d(into, hidden_dim, 4, stride=2, padding=1), nn.ReLU()))
        layers.append(ResBlock(hidden_dim))
    return nn.Sequential(*layers, nn.Conv2d(hidden_dim, channels, 1))


def reconstruction_loss(reconstruction: Tensor, images: Tensor, kind: Literal["mse", "smooth_l1"]) -> Tensor:
    """Mean over all numbers of the squared error, or of smooth L1 with beta = 1."""
    if kind not in ("mse", "smooth_l1"):
        raise InputError(f"recon = {kind!r}: accepted are 'mse' and 'smooth_l1'")
    loss = F.mse_loss if kind == "mse" else F.smooth_l1_loss
    return loss(at_least_float32(reconstruction), at_least_float32(images))


# ------------------------------------------------------------------------------------------------ what both share


@dataclass(frozen=True)
class TokenizerOutput:
    """``loss``: scalar; ``parts``: its terms; ``reconstruction (B, C, height, width)``; ``ids`` int64 ``(B, h, w)``."""

    loss: Tensor
    reconstruction: Tensor
    ids: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class CodeEncoder(Encoder):
    """An encoder, codes, a decoder. Any sides that the stride divides are accepted; ``image_size`` is the usual one.

    As an encoder of pictures it gives a bag of codes: ``pooled (B, V)`` is the mean over cells of the probability of
    each code, ``tokens (B, h * w, d)`` the expected code of each cell.

    Raises:
        InputError: Sizes out of range, or an ``image_size`` that 2^n does not divide.
    """

    record: ClassVar[str]  # its name in recipes
    encoder: nn.Sequential
    decoder: nn.Sequential

    def __init__(
        self,
        image_size: int,
        channels: int,
        *,
        num_tokens: int,
        num_layers: int,
        preprocessing: Preprocessing | None,
        **widths: int,
    ) -> None:
        super().__init__()
        check_sizes(2, num_tokens=num_tokens)
        check_sizes(1, channels=channels, num_layers=num_layers, **widths)
        self.image_size, self.channels, self.num_tokens = image_size, channels, num_tokens
        self.stride = 2**num_layers
        self.embed_dim = num_tokens
        self.preprocessing = preprocessing
        self._check_sides(image_size, image_size)

    @property
    def vocab_size(self) -> int:
        return self.num_tokens

    @property
    def codes(self) -> Tensor:
        """``(V, d)``."""
        raise NotImplementedError

    def logits(self, images: Tensor) -> Tensor:
        """``(B, C, height, width)`` to ``(B, V, h, w)``.

        Raises:
            InputError: A shape that does not fit, or logits that are not finite.
        """
        raise NotImplementedError

    def output(self, images: Tensor, **options: Any) -> TokenizerOutput:
        """Loss, its parts, and what was reconstructed."""
        raise NotImplementedError

    def loss(self, images: Tensor, **options: Any) -> Tensor:
        """``output(images, ...).loss``: a scalar."""
        return self.output(images, **options).loss

    def probs(self, images: Tensor) -> Tensor:
        """softmax of the logits over codes: ``(B, V, h, w)``."""
        return at_least_float32(self.logits(images)).softmax(dim=1)

    def ids(self, images: Tensor) -> Tensor:
        """Most likely code of every cell, without noise: int64 ``(B, h, w)``."""
        return self.logits(images).argmax(dim=1)

    def decode(self, ids: Tensor) -> Tensor:
        """Pictures of codes: int64 ``(B, h, w)`` to ``(B, C, height, width)``.

        Raises:
            InputError: Another shape, or an id outside 0..V - 1.
        """
        if ids.ndim != 3 or ids.is_floating_point():
            raise InputError(f"ids have shape {tuple(ids.shape)} and type {ids.dtype}; expected integers (B, h, w)")
        if not torch.compiler.is_compiling() and ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.num_tokens:
                raise InputError(f"ids from {low} to {high}; expected 0 to {self.num_tokens - 1}")
        return self.decoder(F.embedding(ids, self.codes).movedim(-1, 1))

    def reconstruct(self, images: Tensor) -> Tensor:
        """``decode(ids(images))``."""
        return self.decode(self.ids(images))

    def forward(self, batch: Batch) -> Features:
        probabilities = self.probs(batch["image"])
        tokens = code_mixture(probabilities, self.codes).flatten(2).transpose(1, 2)
        rows, columns = probabilities.shape[2:]
        return Features(pooled=probabilities.flatten(2).mean(dim=2), tokens=tokens, grid=(rows, columns))

    def settings_of_record(self) -> dict[str, Any]:
        """The settings of ``record`` that build this tokenizer."""
        seen = self.preprocessing
        return {
            "image_size": self.image_size,
            "channels": self.channels,
            "num_tokens": self.num_tokens,
            "codebook_dim": self.codes.shape[1],
            "hidden_dim": self.decoder[-1].in_channels,
            "num_layers": self.stride.bit_length() - 1,
            "pictures": seen is not None,
            **({} if seen is None else {"resize": seen.resize, "mean": seen.mean, "std": seen.std}),
        }

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` without the source of the first weights: the weights lie beside it."""
        return {key: value for key, value in config.items() if key != "weights"}

    def check_images(self, images: Tensor) -> Tensor:
        """``images``. Raises ``InputError`` for a wrong shape, or whole numbers."""
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise InputError(
                f"images have shape {tuple(images.shape)}; this tokenizer needs (B, {self.channels}, height, width)"
            )
        if not images.is_floating_point():
            raise InputError(f"images are of type {images.dtype}; expected prepared pictures, floating point numbers")
        self._check_sides(images.shape[2], images.shape[3])
        return images

    def _check_sides(self, height: int, width: int) -> None:
        if height < 1 or width < 1 or height % self.stride or width % self.stride:
            raise InputError(
                f"pictures of {height} x {width} pixels: both sides must be multiples of {self.stride} "
                f"(2^num_layers, the side of a cell)"
            )


# ------------------------------------------------------------------------------------------------ dVAE


@dataclass(frozen=True)
class DVAELoss:
    """What ``DiscreteVAE`` minimises: recon + kl_weight * KL of every cell + usage_weight * KL of the mean.

    Attributes:
        temperature: Of the Gumbel-softmax, above 0.
        straight_through: One code per cell in the forward pass.
        kl_weight, kl_reduction: Of ``code_kl``.
        usage_weight: Of ``usage_kl``.
        recon: ``mse`` or ``smooth_l1``.
    """

    temperature: float = 0.9
    straight_through: bool = False
    kl_weight: float = 0.0
    kl_reduction: Literal["mean", "sum"] = "mean"
    usage_weight: float = 0.0
    recon: Literal["mse", "smooth_l1"] = "mse"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature = {self.temperature}: expected a number above 0")
        if self.kl_weight < 0 or self.usage_weight < 0:
            raise InputError(f"kl_weight = {self.kl_weight}, usage_weight = {self.usage_weight}: expected 0 or more")
        if self.kl_reduction not in ("mean", "sum"):
            raise InputError(f"kl_reduction = {self.kl_reduction!r}: accepted are 'mean' and 'sum'")
        if self.recon not in ("mse", "smooth_l1"):
            raise InputError(f"recon = {self.recon!r}: accepted are 'mse' and 'smooth_l1'")


class DiscreteVAE(CodeEncoder):
    """The discrete VAE of DALL-E (arXiv 2102.12092) in the small form of BEiT's own trainer.

    Args:
        image_size: Usual side of a picture; 2^num_layers divides it.
        channels: C.
        num_tokens: V, at least 2.
        codebook_dim: d.
        hidden_dim: H.
        num_layers: n; the stride is 2^n.
        temperature, straight_through, kl_weight, kl_reduction, usage_weight, recon: See ``DVAELoss``.
        preprocessing: How a picture file is prepared; ``None`` where only tensors come.
    """

    record = "mim:dvae"

    def __init__(
        self,
        image_size: int = 256,
        channels: int = 3,
        *,
        num_tokens: int = 512,
        codebook_dim: int = 512,
        hidden_dim: int = 64,
        num_layers: int = 3,
        temperature: float = 0.9,
        straight_through: bool = False,
        kl_weight: float = 0.0,
        kl_reduction: Literal["mean", "sum"] = "mean",
        usage_weight: float = 0.0,
        recon: Literal["mse", "smooth_l1"] = "mse",
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__(
            image_size,
            channels,
            num_tokens=num_tokens,
            num_layers=num_layers,
            preprocessing=preprocessing,
            codebook_dim=codebook_dim,
            hidden_dim=hidden_dim,
        )
        self.settings = DVAELoss(temperature, straight_through, kl_weight, kl_reduction, usage_weight, recon)
        self.encoder = conv_encoder(channels, hidden_dim, num_layers, num_tokens)
        self.codebook = nn.Embedding(num_tokens, codebook_dim)
        self.decoder = conv_decoder(codebook_dim, hidden_dim, num_layers, channels)

    @classmethod
    def build(cls, config: DVAEConfig) -> Self:
        """The decoder is frozen: only ``mim:tokenizer`` trains it.

        Raises ``DataError`` for weights that do not fit, naming what differs.
        """
        from bowerbird.encoders.weights import load_strictly, read_weights

        tokenizer = cls(**config.architecture(), preprocessing=config.preprocessing())
        if config.weights is not None:
            load_strictly(tokenizer, read_weights(config.weights), source=config.weights)
        tokenizer.decoder.requires_grad_(False)
        return tokenizer

    @property
    def codes(self) -> Tensor:
        return self.codebook.weight

    def logits(self, images: Tensor) -> Tensor:
        return check_finite(self.encoder(self.check_images(images)))

    def output(  # type: ignore[override]  # noise and temperature are those of this tokenizer
        self, images: Tensor, gumbel_noise: Tensor | None = None, *, temperature: float | Tensor | None = None
    ) -> TokenizerOutput:
        """One training pass.

        Args:
            images: ``(B, C, height, width)``.
            gumbel_noise: ``(B, V, h, w)``; drawn from torch's generator if it is not given.
            temperature: In the place of ``settings.temperature``.
        """
        own = self.settings
        logits = at_least_float32(self.encoder(self.check_images(images)))
        if gumbel_noise is None:
            gumbel_noise = _noise_like(logits)
        weights = gumbel_softmax(
            logits,
            gumbel_noise,
            own.temperature if temperature is None else temperature,
            straight_through=own.straight_through,
        )
        reconstruction = self.decoder(code_mixture(weights, self.codes))
        parts = {"reconstruction": reconstruction_loss(reconstruction, images, own.recon)}
        loss = parts["reconstruction"]
        if own.kl_weight:
            parts["kl"] = code_kl(logits, own.kl_reduction)
            loss = loss + own.kl_weight * parts["kl"]
        if own.usage_weight:
            parts["usage_kl"] = usage_kl(logits.softmax(dim=1))
            loss = loss + own.usage_weight * parts["usage_kl"]
        return TokenizerOutput(loss, reconstruction, logits.detach().argmax(dim=1), parts)

    def loss(self, images: Tensor, gumbel_noise: Tensor | None = None, **options: Any) -> Tensor:
        """``output(images, gumbel_noise, ...).loss``: a scalar."""
        return self.output(images, gumbel_noise, **options).loss


def _noise_like(logits: Tensor) -> Tensor:
    return gumbel_noise(tuple(logits.shape), device=logits.device, dtype=logits.dtype)


# ------------------------------------------------------------------------------------------------ VQ-VAE


class VQVAE(CodeEncoder):
    """The same convolutions around a ``VectorQuantizer`` (arXiv 1711.00937).

    Logits are -d / (2 variance) with d the squared distance of a feature to a code.

    Args:
        image_size, channels, num_tokens, codebook_dim, hidden_dim, num_layers, recon, preprocessing: See
            ``DiscreteVAE``.
        commitment, ema_decay: See ``VectorQuantizer``.
        variance: Above 0; the larger, the softer the probabilities. Ids do not depend on it.
    """

    record = "mim:vqvae"

    def __init__(
        self,
        image_size: int = 256,
        channels: int = 3,
        *,
        num_tokens: int = 512,
        codebook_dim: int = 64,
        hidden_dim: int = 64,
        num_layers: int = 3,
        commitment: float = 0.25,
        ema_decay: float | None = 0.99,
        variance: float = 0.5,
        recon: Literal["mse", "smooth_l1"] = "mse",
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__(
            image_size,
            channels,
            num_tokens=num_tokens,
            num_layers=num_layers,
            preprocessing=preprocessing,
            codebook_dim=codebook_dim,
            hidden_dim=hidden_dim,
        )
        if not variance > 0:
            raise InputError(f"variance = {variance}: expected a number above 0")
        self.variance, self.recon = variance, recon
        self.encoder = conv_encoder(channels, hidden_dim, num_layers, codebook_dim)
        self.quantizer = VectorQuantizer(num_tokens, codebook_dim, commitment, ema_decay)
        self.decoder = conv_decoder(codebook_dim, hidden_dim, num_layers, channels)

    @classmethod
    def build(cls, config: VQVAEConfig) -> Self:
        """The decoder is frozen: only ``mim:tokenizer`` trains it."""
        tokenizer = cls(**config.architecture(), preprocessing=config.preprocessing())
        tokenizer.decoder.requires_grad_(False)
        return tokenizer

    @property
    def codes(self) -> Tensor:
        return self.quantizer.codebook

    def settings_of_record(self) -> dict[str, Any]:
        own = self.quantizer
        learned = {"learn_codes": "gradient"} if own.ema_decay is None else {"ema_decay": own.ema_decay}
        return super().settings_of_record() | learned | {"commitment": own.commitment, "variance": self.variance}

    def logits(self, images: Tensor) -> Tensor:
        distances = self.quantizer.distances(self.encoder(self.check_images(images)))
        return check_finite(distances) / (-2 * self.variance)

    def output(self, images: Tensor, **options: Any) -> TokenizerOutput:
        """One training pass; in training mode it moves the codes where ``ema_decay`` is set."""
        features = self.encoder(self.check_images(images))
        quantized, quantizer_loss, ids = self.quantizer(features)
        reconstruction = self.decoder(quantized.to(features.dtype))
        parts = {
            "reconstruction": reconstruction_loss(reconstruction, images, self.recon),
            "quantizer": quantizer_loss,
        }
        return TokenizerOutput(parts["reconstruction"] + quantizer_loss, reconstruction, ids, parts)
