"""Tokenizers that others have trained: DALL-E's dVAE, VQGAN, and the dVAE of BEiT's code, from files of weights.

Which one a file holds, and all sizes, follow from the names and shapes of its tensors. A file may lack the decoder:
masked image modelling does not need it.

B batch, C channels, V codes, h x w cells.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird.data.images import Preprocessing
from bowerbird.encoders.weights import load_strictly, read_weights
from bowerbird.errors import DataError, InputError
from bowerbird_mim.codes import GumbelQuantizer, VectorQuantizer, check_finite
from bowerbird_mim.tokenizer_models import DiscreteVAE

CELLS = 14  # per side of the usual picture: 224 pixels in patches of 16


def read_tokenizer(path: str | Path) -> nn.Module:
    """The tokenizer of a file: .safetensors, or a torch file that holds only tensors.

    Raises:
        DataError: The file cannot be read, or is of another layout; the message lists what differs.
    """
    state = read_weights(path)
    for sign, build in LAYOUTS.items():
        if sign in state:
            return build(state, str(path))
    some = ", ".join(list(state)[:5])
    raise DataError(
        f"tokenizer {str(path)!r} is of no known layout: it has {len(state)} tensors ({some}, ...). Expected DALL-E's "
        "encoder (blocks.input.w, ...), a VQGAN (encoder.conv_in.weight, quantize..., ...), or a dVAE of BEiT's code "
        "(codebook.weight, encoder.0.0.weight, ...)"
    )


class FrozenTokenizer(nn.Module):
    """What both networks below have in common. ``decoder`` is ``None`` where the file has none."""

    decoder: nn.Module | None

    def __init__(self, *, channels: int, vocab_size: int, stride: int, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.channels, self.vocab_size, self.stride = channels, vocab_size, stride
        self.preprocessing = preprocessing

    def logits(self, images: Tensor) -> Tensor:
        """``(B, C, height, width)`` to ``(B, V, h, w)``. Raises ``InputError`` for a shape that does not fit."""
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise InputError(
                f"images have shape {tuple(images.shape)}; this tokenizer needs (B, {self.channels}, height, width)"
            )
        height, width = images.shape[2:]
        if height % self.stride or width % self.stride:
            raise InputError(
                f"pictures of {height} x {width} pixels: both sides must be multiples of {self.stride} (the side of a "
                "cell)"
            )
        return check_finite(self._logits(images))

    def ids(self, images: Tensor) -> Tensor:
        """Most likely code of every cell: int64 ``(B, h, w)``."""
        return self.logits(images).argmax(dim=1)

    def decode(self, ids: Tensor) -> Tensor:
        """Pictures of codes, in the numbers of ``preprocessing``. Raises ``InputError`` without a decoder."""
        if self.decoder is None:
            raise InputError("the file of this tokenizer holds no decoder; its codes cannot be turned into pictures")
        return self._decode(ids)

    def _logits(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode(self, ids: Tensor) -> Tensor:
        raise NotImplementedError


def _size(state: Mapping[str, Tensor], name: str, axis: int, source: str) -> int:
    """Length of an axis of a tensor that decides a size."""
    if name not in state or state[name].ndim <= axis:
        raise DataError(f"tokenizer {source!r} lacks {name}, or it has too few axes; its sizes cannot be known")
    return state[name].shape[axis]


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers stand in the first group of ``pattern``."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


# ------------------------------------------------------------------------------------------------ DALL-E


class _DallEBlock(nn.Module):
    """id(x) + branch(x) / (number of blocks)^2; a branch of four convolutions, each behind a ReLU."""

    def __init__(self, into: int, out: int, gain: float, kernels: Sequence[int]) -> None:
        super().__init__()
        hidden = out // 4
        self.gain = gain
        self.id_path = nn.Conv2d(into, out, 1) if into != out else nn.Identity()
        widths = pairwise([into, hidden, hidden, hidden, out])
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, ((a, b), kernel) in enumerate(zip(widths, kernels, strict=True), start=1):
            layers[f"relu_{number}"] = nn.ReLU()
            layers[f"conv_{number}"] = nn.Conv2d(a, b, kernel, padding=kernel // 2)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


class _DallENetwork(nn.Module):
    """Groups of blocks with a halving (encoder) or doubling (decoder) of the sides between them."""

    def __init__(
        self, first: nn.Conv2d, widths: Sequence[int], blocks: int, out: int, *, kernels: Sequence[int], halve: bool
    ) -> None:
        super().__init__()
        gain = 1 / (len(widths) * blocks) ** 2
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=first)
        into = first.out_channels
        for number, width in enumerate(widths, start=1):
            group: OrderedDict[str, nn.Module] = OrderedDict()
            for block in range(1, blocks + 1):
                group[f"block_{block}"] = _DallEBlock(into, width, gain, kernels)
                into = width
            if number < len(widths):
                group["resize"] = nn.MaxPool2d(2) if halve else nn.Upsample(scale_factor=2, mode="nearest")
            layers[f"group_{number}"] = nn.Sequential(group)
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=nn.Conv2d(into, out, 1)))
        self.blocks = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class DallETokenizer(FrozenTokenizer):
    """The dVAE of DALL-E (arXiv 2102.12092). Pictures are mapped to 0.8 x + 0.1, x in [0, 1], by ``preprocessing``."""

    def __init__(self, encoder: _DallENetwork, decoder: _DallENetwork | None, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.encoder, self.decoder = encoder, decoder

    def _logits(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def _decode(self, ids: Tensor) -> Tensor:
        """The mode of the logit-Laplace likelihood: the sigmoid of the first C of 2 C channels."""
        assert self.decoder is not None
        chosen = F.one_hot(ids, self.vocab_size).movedim(-1, 1).to(next(self.parameters()).dtype)
        return self.decoder(chosen)[:, : self.channels].sigmoid()


def _dalle(state: Mapping[str, Tensor], source: str) -> DallETokenizer:
    state = {_dalle_name(name): value for name, value in state.items()}
    hidden = _size(state, "encoder.blocks.input.weight", 0, source)
    channels = _size(state, "encoder.blocks.input.weight", 1, source)
    kernel = _size(state, "encoder.blocks.input.weight", 2, source)
    vocab_size = _size(state, "encoder.blocks.output.conv.weight", 0, source)
    groups = _count(state, r"encoder\.blocks\.group_(\d+)\.")
    blocks = _count(state, r"encoder\.blocks\.group_1\.block_(\d+)\.")
    if not groups or not blocks or hidden < 4:
        raise DataError(
            f"tokenizer {source!r}: {groups} groups of {blocks} blocks of width {hidden}; no DALL-E encoder"
        )
    widths = [hidden * 2**group for group in range(groups)]
    first = nn.Conv2d(channels, hidden, kernel, padding=kernel // 2)
    encoder = _DallENetwork(first, widths, blocks, vocab_size, kernels=(3, 3, 3, 1), halve=True)
    decoder = None
    if any(name.startswith("decoder.") for name in state):
        start = nn.Conv2d(vocab_size, _size(state, "decoder.blocks.input.weight", 0, source), 1)
        last = _size(state, "decoder.blocks.output.conv.weight", 1, source)
        widths = [last * 2**group for group in reversed(range(groups))]
        decoder = _DallENetwork(start, widths, blocks, 2 * channels, kernels=(1, 3, 3, 3), halve=False)
    stride = 2 ** (groups - 1)
    tokenizer = DallETokenizer(
        encoder,
        decoder,
        channels=channels,
        vocab_size=vocab_size,
        stride=stride,
        preprocessing=Preprocessing(size=CELLS * stride, mean=(-0.125,) * 3, std=(1.25,) * 3),
    )
    load_strictly(tokenizer, state, source=source)
    return tokenizer


def _dalle_name(name: str) -> str:
    """DALL-E's own names (``.w``, ``.b``) and those of the same network in ``transformers`` (FLAVA), as ours."""
    name = re.sub(r"\.w$", ".weight", re.sub(r"\.b$", ".bias", name))
    name = name.replace(".group.block_", ".block_").replace(".res_path.path.", ".res_path.")
    return name if name.startswith(("encoder.", "decoder.")) else f"encoder.{name}"


# ------------------------------------------------------------------------------------------------ VQGAN


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class _VQResBlock(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(into), nn.Conv2d(into, out, 3, padding=1)
        self.norm2, self.conv2 = _norm(out), nn.Conv2d(out, out, 3, padding=1)
        if into != out:
            self.nin_shortcut = nn.Conv2d(into, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _VQAttention(nn.Module):
    """Self-attention of one head over all cells."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))  # (B, h * w, C)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape))


class _VQResize(nn.Module):
    """Half the sides (padded right and below), or twice the sides, with a 3x3 convolution."""

    def __init__(self, channels: int, *, halve: bool) -> None:
        super().__init__()
        self.halve = halve
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if halve else 1, padding=0 if halve else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.halve else F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _VQLevel(nn.Module):
    """Blocks at one size, each followed by attention where ``attention`` says so, then the change of size."""

    def __init__(self, into: int, out: int, blocks: int, *, attention: bool, resize: str | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(_VQResBlock(into if i == 0 else out, out) for i in range(blocks))
        self.attn = nn.ModuleList(_VQAttention(out) for _ in range(blocks if attention else 0))
        self.resize_name = resize
        if resize is not None:
            self.add_module(resize, _VQResize(out, halve=resize == "downsample"))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x if self.resize_name is None else self.get_submodule(self.resize_name)(x)


class _VQMiddle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            _VQResBlock(channels, channels), _VQAttention(channels), _VQResBlock(channels, channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _VQHalf(nn.Module):
    """The encoder (levels ``down``, then the middle) or the decoder (the middle, then levels ``up`` from the last)."""

    def __init__(self, widths: Sequence[int], first: int, blocks: int, attention: Sequence[bool], into: int, out: int,
                 *, halve: bool) -> None:  # fmt: skip
        super().__init__()
        levels = len(widths)
        if halve:
            inputs = [first, *widths[:-1]]
            self.down = nn.ModuleList(
                _VQLevel(a, b, blocks, attention=attention[i], resize="downsample" if i < levels - 1 else None)
                for i, (a, b) in enumerate(zip(inputs, widths, strict=True))
            )
        else:
            inputs = [*widths[1:], widths[-1]]
            self.up = nn.ModuleList(
                _VQLevel(a, b, blocks, attention=attention[i], resize="upsample" if i else None)
                for i, (a, b) in enumerate(zip(inputs, widths, strict=True))
            )
        self.conv_in = nn.Conv2d(into, first if halve else widths[-1], 3, padding=1)
        self.mid = _VQMiddle(widths[-1])
        last = widths[-1] if halve else widths[0]
        self.norm_out = _norm(last)
        self.conv_out = nn.Conv2d(last, out, 3, padding=1)
        self.halve = halve

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        levels = [*self.down, self.mid] if self.halve else [self.mid, *reversed(self.up)]
        for level in levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGANTokenizer(FrozenTokenizer):
    """VQGAN (arXiv 2012.09841) with its Gumbel or its nearest-code quantiser; pictures are mapped to [-1, 1].

    Logits of the nearest-code kind are -d / (2 variance) with variance 0.5 and d the squared distance.
    """

    def __init__(
        self,
        encoder: _VQHalf,
        decoder: _VQHalf | None,
        quantize: GumbelQuantizer | VectorQuantizer,
        latent: int,
        dim: int,
        **sizes: Any,
    ) -> None:
        super().__init__(**sizes)
        self.encoder, self.decoder, self.quantize = encoder, decoder, quantize
        into = quantize.proj.in_channels if isinstance(quantize, GumbelQuantizer) else dim
        self.quant_conv = nn.Conv2d(latent, into, 1)
        if decoder is not None:
            self.post_quant_conv = nn.Conv2d(dim, latent, 1)

    def _logits(self, images: Tensor) -> Tensor:
        features = self.quant_conv(self.encoder(images))
        if isinstance(self.quantize, GumbelQuantizer):
            return self.quantize.proj(features)
        return -self.quantize.distances(features)

    def _decode(self, ids: Tensor) -> Tensor:
        assert self.decoder is not None
        own = self.quantize
        codes = own.embed.weight if isinstance(own, GumbelQuantizer) else own.codebook
        return self.decoder(self.post_quant_conv(F.embedding(ids, codes).movedim(-1, 1)))


def _vqgan(state: Mapping[str, Tensor], source: str) -> VQGANTokenizer:
    # The loss is of no use here; counts and sums of a moving-average codebook are not either.
    state = {name.replace("quantize.embedding.weight", "quantize.codebook"): value for name, value in state.items()
             if not name.startswith("loss.") and not name.startswith(("quantize.embedding.cluster_size",
                                                                      "quantize.embedding.embed_avg"))}  # fmt: skip
    levels = _count(state, r"encoder\.down\.(\d+)\.")
    first = _size(state, "encoder.conv_in.weight", 0, source)
    widths = [_size(state, f"encoder.down.{i}.block.0.conv1.weight", 0, source) for i in range(levels)]
    odd = [width for width in (first, *widths) if width % 32]
    if not levels or odd:
        raise DataError(f"tokenizer {source!r}: {levels} levels of widths {widths}; a VQGAN's are multiples of 32")
    channels, latent = (
        _size(state, "encoder.conv_in.weight", 1, source),
        _size(state, "encoder.conv_out.weight", 0, source),
    )
    blocks = _count(state, r"encoder\.down\.0\.block\.(\d+)\.")

    def half(side: str, into: int, out: int, blocks: int) -> _VQHalf:
        name = "down" if side == "encoder" else "up"
        attention = [f"{side}.{name}.{i}.attn.0.norm.weight" in state for i in range(levels)]
        return _VQHalf(widths, first, blocks, attention, into, out, halve=side == "encoder")

    quantize: GumbelQuantizer | VectorQuantizer
    if "quantize.codebook" in state:
        vocab_size, dim = (_size(state, "quantize.codebook", axis, source) for axis in (0, 1))
        quantize = VectorQuantizer(vocab_size, dim)
    else:
        vocab_size, dim = (_size(state, "quantize.embed.weight", axis, source) for axis in (0, 1))
        quantize = GumbelQuantizer(_size(state, "quantize.proj.weight", 1, source), dim, vocab_size)
    decoder = None
    if any(name.startswith("decoder.") for name in state):
        decoder = half("decoder", latent, channels, _count(state, r"decoder\.up\.0\.block\.(\d+)\."))
    else:
        state = {name: value for name, value in state.items() if not name.startswith("post_quant_conv.")}
    stride = 2 ** (levels - 1)
    tokenizer = VQGANTokenizer(
        half("encoder", channels, latent, blocks),
        decoder,
        quantize,
        latent,
        dim,
        channels=channels,
        vocab_size=vocab_size,
        stride=stride,
        preprocessing=Preprocessing(size=CELLS * stride),
    )
    load_strictly(tokenizer, state, source=source)
    return tokenizer


# ------------------------------------------------------------------------------------------------ BEiT's dVAE


def _dvae(state: Mapping[str, Tensor], source: str) -> DiscreteVAE:
    num_layers = _count(state, r"encoder\.(\d+)\.0\.weight")
    sides = 2**num_layers
    tokenizer = DiscreteVAE(
        CELLS * sides,
        _size(state, "encoder.0.0.weight", 1, source),
        num_tokens=_size(state, "codebook.weight", 0, source),
        codebook_dim=_size(state, "codebook.weight", 1, source),
        hidden_dim=_size(state, "encoder.0.0.weight", 0, source),
        num_layers=num_layers,
        preprocessing=Preprocessing(size=CELLS * sides),
    )
    load_strictly(tokenizer, state, source=source)
    return tokenizer


# A tensor that only this layout has -> what builds it.
LAYOUTS: dict[str, Callable[[Mapping[str, Tensor], str], nn.Module]] = {
    "blocks.input.w": _dalle,
    "blocks.input.weight": _dalle,
    "encoder.blocks.input.w": _dalle,
    "encoder.blocks.input.weight": _dalle,
    "encoder.conv_in.weight": _vqgan,
    "encoder.0.0.weight": _dvae,
}
