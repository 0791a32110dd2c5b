"""First weights of MIMDet: from a masked autoencoder with its decoder, or from a plain ViT.

Read are: a run of ``mim:mae`` (the decoder lies in its last checkpoint) or an exported ``mim:vit``, a file or folder of
the official MAE, of transformers' ``ViTMAEForPreTraining`` or of a timm ViT, and timm's own weights by a model's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bowerbird.encoders.weights import read_weights
from bowerbird.errors import DataError, did_you_mean
from bowerbird.recipe import build_config
from bowerbird.registry import get_registry
from bowerbird_detection.mimdet_parts import resize_positions

if TYPE_CHECKING:
    from bowerbird_detection.mimdet import MIMDetBackbone

Grid = tuple[int, int]

# transformers' names -> MAE's, in this order. Projections are joined afterwards.
RENAMED = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.", "decoder_blocks."),
        (r"^(vit\.)?(encoder\.layer|layers)\.(?=\d)", "blocks."),
        (r"^(vit\.)?embeddings\.position_embeddings$", "pos_embed"),
        (r"^(vit\.)?embeddings\.cls_token$", "cls_token"),
        (r"^(vit\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^(vit\.)?layernorm\.", "norm."),
        (r"^decoder\.(?=decoder_|mask_token)", ""),
        (r"\.attention\.(attention\.)?(query|q_proj)\.", ".attn.q."),
        (r"\.attention\.(attention\.)?(key|k_proj)\.", ".attn.k."),
        (r"\.attention\.(attention\.)?(value|v_proj)\.", ".attn.v."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(?<=\d)\.output\.dense\.", ".mlp.fc2."),
    )
)
ENCODER = re.compile(r"(blocks|norm|patch_embed)\.|pos_embed$")
DECODER = re.compile(r"(decoder_embed|decoder_blocks|decoder_norm|conv_feat_proj)\.|(decoder_pos_embed|mask_token)$")
FILLS = ("mask_token", "conv_feat_proj.weight", "conv_feat_proj.bias")  # a decoder has one of the two kinds
POSITIONS = ("encoder.pos_embed", "decoder.decoder_pos_embed")


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor.

    Attributes:
        loaded: Names in the backbone that were filled.
        fresh: Names in the backbone that kept their first values.
        ignored: Names in the checkpoint that the backbone has no use for: class token, patch embedding, late decoder
            blocks, classifiers.
    """

    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    ignored: tuple[str, ...]


def load_mae_checkpoint(
    backbone: MIMDetBackbone,
    state_dict: Mapping[str, Tensor],
    *,
    grid: Grid | None = None,
    source: str = "the checkpoint",
) -> LoadReport:
    """Fill encoder and decoder with the weights of a masked autoencoder, or the encoder with those of a ViT.

    Tables of positions are resized (bicubic) to the backbone's own grid. Of the decoder's blocks the first are taken.
    The stem keeps its first values (a ``PatchStem`` takes the patch embedding); so does the decoder where the
    checkpoint has none. On an error nothing is changed.

    Args:
        backbone: What is filled.
        state_dict: Under the names of the official MAE, timm, transformers' ViTMAE, or a ``mim:mae`` objective.
        grid: Rows and columns of the checkpoint's positions; by default they are square.
        source: For messages.

    Raises:
        DataError: No ViT, or one of another architecture; the message lists what differs.
    """
    state = mae_names(state_dict)
    own = backbone.state_dict()
    if not any(key.startswith("blocks.") for key in state):
        raise DataError(
            f"weights {source!r} are neither of a masked autoencoder nor of a ViT: they have no blocks, but "
            f"{', '.join(list(state_dict)[:4]) or 'nothing'}"
        )
    theirs = {f"encoder.{key}": value for key, value in state.items() if ENCODER.match(key)}
    theirs |= {f"decoder.{key}": value for key, value in state.items() if DECODER.match(key)}
    depth = len(backbone.decoder.decoder_blocks)
    taken = {
        key: value
        for key, value in theirs.items()
        if not ((match := re.match(r"decoder\.decoder_blocks\.(\d+)\.", key)) and int(match[1]) >= depth)
        and not (key.startswith("encoder.patch_embed.") and key not in own)  # of another kind of stem
        and not (key.removeprefix("decoder.") in FILLS and key not in own)
    }
    _refuse_others(taken, own, source)
    for name, wanted in zip(POSITIONS, (backbone.encoder.grid, backbone.decoder.grid), strict=True):
        if name in taken:
            taken[name] = _resized(taken[name], grid, wanted, source)
    with torch.no_grad():
        for key, value in taken.items():
            own[key].copy_(value)  # state_dict shares its memory with the parameters
    used = {key.partition(".")[2] for key in taken}
    return LoadReport(
        loaded=tuple(taken),
        fresh=tuple(key for key in own if key not in taken),
        ignored=tuple(key for key in state if key not in used),
    )


def mae_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under the names of the official MAE: ``blocks.0.attn.qkv.weight``, ``decoder_blocks.0...``, ..."""
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        key = key.removeprefix("module.").removeprefix("model.")
        for pattern, replacement in RENAMED:
            key = pattern.sub(replacement, key)
        named[re.sub(r"^(encoder|decoder)\.", "", key)] = value
    for key in [key for key in named if re.search(r"\.attn\.q\.(weight|bias)$", key)]:
        parts = [key.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in named for part in parts):
            named[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat([named.pop(part) for part in parts])
    return named


def _refuse_others(taken: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    """Raises ``DataError`` where the tensors in ``taken`` are of another architecture than ``own``."""
    found = []
    wanted = {key for key in own if re.match(r"encoder\.(blocks|norm)\.", key)}
    for part, blocks, width, setting in (
        ("encoder", "blocks", "norm1.weight", "embed_dim"),
        ("decoder", "decoder_blocks", "norm1.weight", "decoder_dim"),
    ):
        first = f"{part}.{blocks}.0.{width}"
        if first in taken and first in own and taken[first].shape != own[first].shape:
            found.append(f"{setting} {len(taken[first])} (ours: {len(own[first])})")
        depths = [
            len({key.split(".")[2] for key in state if key.startswith(f"{part}.{blocks}.")}) for state in (taken, own)
        ]
        if part == "encoder" and depths[0] != depths[1]:
            found.append(f"depth {depths[0]} (ours: {depths[1]})")
    shapes = [
        f"{key} {tuple(taken[key].shape)} (ours: {tuple(own[key].shape)})"
        for key in taken
        if key in own and key not in POSITIONS and taken[key].shape != own[key].shape
    ]
    for what, keys in (
        ("of another shape:", shapes if not found else []),
        ("tensors that ours has not:", [key for key in taken if key not in own] if not found else []),
        ("tensors that it lacks:", [key for key in wanted if key not in taken] if not found else []),
    ):
        if keys:
            found.append(f"{what} {', '.join(sorted(keys)[:4])}{', ...' if len(keys) > 4 else ''}")
    if found:
        raise DataError(
            f"weights {source!r} are of another architecture than MIMDet's backbone: {'; '.join(found)}. Change the "
            "settings of the encoder, or take other weights"
        )


def _resized(table: Tensor, grid: Grid | None, wanted: Grid, source: str) -> Tensor:
    """``(1, 1 + L, D)`` of the grid ``wanted``, from a table with or without a class row."""
    length = table.shape[1] if table.ndim == 3 else 0
    if grid is None:
        side = next((isqrt(n) for n in (length - 1, length) if n > 0 and isqrt(n) ** 2 == n), 0)
        grid = (side, side)
    if table.ndim != 3 or length - grid[0] * grid[1] not in (0, 1) or not length:
        raise DataError(
            f"weights {source!r}: a table of positions of shape {tuple(table.shape)} is none of "
            f"{'a square grid' if not grid[0] else f'{grid[0]} x {grid[1]} cells'}"
        )
    if length == grid[0] * grid[1]:
        table = torch.cat([table.new_zeros(1, 1, table.shape[2]), table], dim=1)
    return resize_positions(table.float(), grid, wanted)


# ------------------------------------------------------------------------------------------------------------ sources


@dataclass(frozen=True)
class FirstWeights:
    """``state`` as ``load_mae_checkpoint`` takes it; ``grid`` of its positions and numbers of heads, where known."""

    state: Mapping[str, Tensor]
    grid: Grid | None = None
    num_heads: int | None = None
    decoder_heads: int | None = None


def read_first_weights(source: str) -> FirstWeights:
    """The weights that ``source`` names.

    Args:
        source: A run of ``mim:mae``, an exported encoder, a folder of timm or transformers, a file (.safetensors, or of
            torch with tensors only), or the name of a timm ViT, whose weights timm then fetches.

    Raises:
        DataError: There is no such thing, or it cannot be read.
        RecipeError: The run is not finished.
    """
    path = Path(source)
    if path.is_file():
        return FirstWeights(read_weights(path))
    if path.is_dir():
        if any((path / name).is_file() for name in ("encoder.json", "recipe.json")):
            return _of_run(path)
        return _of_hub_folder(path)
    return _of_timm(source)


def _of_run(path: Path) -> FirstWeights:
    from bowerbird.train.run import load_run

    run = load_run(path)
    network: Any = getattr(getattr(run.encoder, "trunk", None), "model", run.encoder)  # core:timm wraps timm's model
    prefix = "model.decoder."
    decoder = {k.removeprefix(prefix): v for k, v in run.objective_state.items() if k.startswith(prefix)}
    heads = None
    if decoder:
        registry = get_registry()
        settings = {key: value for key, value in run.recipe["objective"].items() if key != "use"}
        record = registry.get("objective", run.recipe["objective"]["use"])
        heads = getattr(build_config(record, settings, where=f"{str(path)!r} [objective]"), "decoder_heads", None)
    return FirstWeights(
        state={**network.state_dict(), **decoder},
        grid=_grid(network),
        num_heads=_heads(network),
        decoder_heads=heads,
    )


def _grid(network: Any) -> Grid | None:
    grid = getattr(network, "grid", None) or getattr(getattr(network, "patch_embed", None), "grid_size", None)
    return None if grid is None else (int(grid[0]), int(grid[1]))


def _heads(network: Any) -> int | None:
    blocks = getattr(network, "blocks", None)
    return getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks else None


def _of_hub_folder(path: Path) -> FirstWeights:
    files = [path / name for name in ("model.safetensors", "weights.safetensors", "pytorch_model.bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise DataError(
            f"init {str(path)!r}: the folder holds no run, no exported encoder, and none of "
            f"{', '.join(file.name for file in files)}"
        )
    settings: dict[str, Any] = {}
    if (path / "config.json").is_file():
        try:
            settings = json.loads((path / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{str(path / 'config.json')!r} cannot be read: {error}") from error
    return FirstWeights(
        read_weights(file),
        num_heads=settings.get("num_attention_heads") or (settings.get("model_args") or {}).get("num_heads"),
        decoder_heads=settings.get("decoder_num_attention_heads"),
    )


def _of_timm(name: str) -> FirstWeights:
    import timm

    from bowerbird.encoders.timm_encoder import create_timm_model

    if not timm.is_model(name):
        known = timm.list_models("vit_*")
        raise DataError(
            f"init {name!r}: there is no such file or folder, and timm has no model of this name."
            f"{did_you_mean(name, known)} Accepted: a run of mim:mae, an exported encoder, a file of MAE's weights, or "
            "a timm ViT"
        )
    model: Any = create_timm_model(name, pretrained=True)
    return FirstWeights(model.state_dict(), grid=_grid(model), num_heads=_heads(model))
