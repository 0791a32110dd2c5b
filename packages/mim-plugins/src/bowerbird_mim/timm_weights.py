"""Weights of timm's vision transformers, in and out.

``mim:vit`` computes what timm's ``VisionTransformer`` with a class token and without extras computes, and its
parameters have the same names. So weights are copied, never converted; what has another architecture is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, MutableMapping
from math import isqrt
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from bowerbird.encoders.weights import load_strictly, read_weights
from bowerbird.errors import DataError, InputError
from bowerbird.protocols import TimmForm
from bowerbird_mim.vit import ViTEncoder

# What training scripts keep beside the encoder: classifiers, and what MAE and SAIM throw away after pre-training.
NOT_THE_ENCODER = re.compile(r"(head|decoder_\w+|mask_token|query_blocks|prediction_head|gaussian_blur)(\.|$)")

# Where the weights lie in a folder: of timm or a hub, of an exported encoder, of a run.
WEIGHTS_OF_FOLDERS = ("model.safetensors", "weights.safetensors", "encoder/weights.safetensors", "pytorch_model.bin")

ARCHITECTURES = {  # (width, depth, heads) -> timm's name; every argument is given, the name only tells the family
    (192, 12, 3): "vit_tiny_patch16_224",
    (384, 12, 6): "vit_small_patch16_224",
    (768, 12, 12): "vit_base_patch16_224",
    (1024, 24, 16): "vit_large_patch16_224",
}


# ------------------------------------------------------------------------------------------------ in


def load_vit_weights(encoder: ViTEncoder, path: str | Path, *, resize_positions: bool = False) -> None:
    """Fill ``encoder`` with the weights of a timm ViT; its classifier is left out.

    Weights do not tell the number of heads. It is compared where ``path`` is a folder with timm's ``config.json``.

    Args:
        encoder: What is filled, or left as it was.
        path: A file (.safetensors, or of torch with tensors only), or a folder that holds one: of timm, of an exported
            encoder, of a run.
        resize_positions: Resample a table of positions for another size of pictures (bicubic, as timm does it).

    Raises:
        DataError: The file cannot be read, or is of another architecture; the message lists what differs.
    """
    path = Path(path)
    file = _file_of(path)
    state = {key: value for key, value in read_weights(file).items() if not NOT_THE_ENCODER.match(key)}
    if "norm.weight" in state:  # beside a norm of the tokens, a second one belongs to the classifier
        state = {key: value for key, value in state.items() if not key.startswith("fc_norm.")}
    fuse_projections(state)
    own = encoder.state_dict()
    differing = _differences(state, own)
    if path.is_dir() and (path / "config.json").is_file():
        differing += _other_heads(path / "config.json", encoder)
    table, wanted = state.get("pos_embed"), own["pos_embed"]
    if differing:
        raise DataError(
            f"weights {str(path)!r} are of another architecture than the encoder: {'; '.join(differing)}. Change the "
            "settings of the encoder, or take other weights"
        )
    if table is not None and table.shape != wanted.shape:
        state["pos_embed"] = _resized(table, encoder, path, resize_positions)
    load_strictly(encoder, state, source=str(path))


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in WEIGHTS_OF_FOLDERS:
        if (path / name).is_file():
            return path / name
    raise DataError(f"weights {str(path)!r}: the folder has none of {', '.join(WEIGHTS_OF_FOLDERS)}")


def fuse_projections(state: MutableMapping[str, Any], prefix: str = "") -> None:
    """Join ``attn.q``, ``attn.k`` and ``attn.v`` below ``prefix`` to ``attn.qkv``, in place."""
    for name in [key for key in state if key.startswith(prefix)]:
        if match := re.search(r"\battn\.q\.(weight|bias)$", name):
            parts = [f"{name[: match.start()]}attn.{part}.{match[1]}" for part in "qkv"]
            if all(part in state for part in parts):
                state[f"{name[: match.start()]}attn.qkv.{match[1]}"] = torch.cat([state.pop(part) for part in parts])


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings of a ViT that can be read off its weights; empty where they are of no ViT."""
    patch, hidden = state.get("patch_embed.proj.weight"), state.get("blocks.0.mlp.fc1.weight")
    if patch is None or patch.ndim != 4 or hidden is None:
        return {}
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    sides = tuple(patch.shape[2:])
    return {
        "patch_size": sides[0] if sides[0] == sides[1] else sides,
        "input channels": patch.shape[1],
        "embed_dim": patch.shape[0],
        "depth": len(blocks),
        "mlp_ratio": hidden.shape[0] / hidden.shape[1],
    }


def _differences(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """What tells the architecture of ``state`` from that of ``own``, the number of positions left out."""
    theirs, ours = _sizes(state), _sizes(own)
    if not theirs:
        return ["it is no vision transformer of timm (no patch_embed.proj and blocks); " + _kinds(state, "it has", 6)]
    found = [f"{name} {theirs[name]:g} (encoder: {value:g})" for name, value in ours.items() if theirs[name] != value]
    shared = {_kind(key) for key in state} & {_kind(key) for key in own}
    more = [key for key in state if _kind(key) not in shared]
    less = [key for key in own if _kind(key) not in shared]
    found += [_kinds(more, "parameters that the encoder has not:", 8)] if more else []
    found += [_kinds(less, "parameters that only the encoder has:", 8)] if less else []
    return found


def _kind(key: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", key)


def _kinds(keys: Any, text: str, most: int) -> str:
    kinds = list(dict.fromkeys(_kind(key) for key in keys))
    return f"{text} {', '.join(kinds[:most])}{', ...' if len(kinds) > most else ''}"


def _other_heads(file: Path, encoder: ViTEncoder) -> list[str]:
    """The number of heads that timm's ``config.json`` says, if it says another one."""
    try:
        settings = json.loads(file.read_text())
        architecture, arguments = settings.get("architecture"), settings.get("model_args") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        return []
    with torch.device("meta"):
        model: Any = timm.create_model(architecture, **arguments)
    heads = getattr(getattr(next(iter(getattr(model, "blocks", [])), None), "attn", None), "num_heads", None)
    return [] if heads in (None, encoder.num_heads) else [f"num_heads {heads} (encoder: {encoder.num_heads})"]


def _resized(table: Tensor, encoder: ViTEncoder, path: Path, allowed: bool) -> Tensor:
    rows, columns = encoder.grid
    side = isqrt(max(0, table.shape[1] - 1))
    if table.ndim != 3 or side * side + 1 != table.shape[1]:
        raise DataError(
            f"weights {str(path)!r}: a table of positions of shape {tuple(table.shape)} is none of a class token and a "
            f"square grid; the encoder has {rows} x {columns} patches and a class token"
        )
    if not allowed:
        raise DataError(
            f"weights {str(path)!r} have positions for {side} x {side} patches, the encoder has {rows} x {columns}. "
            f"Set image_size = {side * encoder.patch_size}, or let the positions be resampled: resize_positions = true"
        )
    return resample_abs_pos_embed(table, [rows, columns], [side, side], num_prefix_tokens=1)


# ------------------------------------------------------------------------------------------------ out


def vit_timm_form(encoder: ViTEncoder) -> TimmForm:
    """The timm model that computes ``encoder``'s embedding.

    Raises:
        InputError: timm's ``VisionTransformer`` cannot be like this encoder.
    """
    if encoder.layer_norm_eps != 1e-6:
        raise InputError(f"layer_norm_eps = {encoder.layer_norm_eps}: timm's vision transformers have 1e-06")
    height, width = encoder.image_size
    arguments = {
        "img_size": height if height == width else [height, width],
        "patch_size": encoder.patch_size,
        "in_chans": encoder.in_channels,
        "embed_dim": encoder.embed_dim,
        "depth": encoder.depth,
        "num_heads": encoder.num_heads,
        "mlp_ratio": encoder.mlp_ratio,
        # The norm comes before the mean, as in this encoder; by default timm's mean comes before the norm.
        "global_pool": "token" if encoder.pooling == "class" else "avg",
        "fc_norm": False,
    }
    architecture = ARCHITECTURES.get((encoder.embed_dim, encoder.depth, encoder.num_heads), "vit_tiny_patch16_224")
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=0, **arguments)  # type: ignore[arg-type]
    state = encoder.state_dict()
    differing = _differences(model.state_dict(), state)
    if differing:
        raise InputError(
            f"{type(encoder).__name__} is no vision transformer as timm has it: {'; '.join(differing)}; "
            "use --format bowerbird"
        )
    return TimmForm(architecture=architecture, arguments=arguments, state=state)
