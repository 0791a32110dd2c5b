"""What a protocol reads from an encoder: the class token, the mean of the patches, the last blocks.

Works with every vision transformer of the hook (``mim:vit``, ``mim:beit-vit``, ``mim:part-vit``, timm's), because it
listens to the blocks while the encoder runs as usual. Networks without such blocks have ``pooled`` only.

B batch, D width, T tokens of a sequence (the class token first, the L patches last).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bowerbird.errors import InputError
from bowerbird.protocols import Encoder, Features

FeatureKind = Literal["pooled", "class", "mean", "class-mean", "class-4"]


def transformer_of(encoder: nn.Module) -> Any | None:
    """The part of ``encoder`` that has ``blocks`` and a final ``norm``, or ``None``."""
    for module in encoder.modules():
        blocks, norm = getattr(module, "blocks", None), getattr(module, "norm", None)
        if isinstance(blocks, nn.ModuleList | nn.Sequential) and len(blocks) and isinstance(norm, nn.Module):
            return module
    return None


def run_blocks(encoder: Encoder, images: Tensor, count: int = 1) -> tuple[Features, list[Tensor]]:
    """What ``encoder`` returns, and the outputs ``(B, T, D)`` of its last ``count`` blocks, before the final norm.

    Raises:
        InputError: The encoder has no such blocks, or fewer than ``count``.
    """
    part = transformer_of(encoder)
    if part is None:
        raise InputError(
            f"{type(encoder).__name__} has no transformer blocks, and so no class token or patch tokens of its own; "
            "use features = 'pooled'"
        )
    if not 1 <= count <= len(part.blocks):
        raise InputError(f"the last {count} blocks were asked for; the encoder has {len(part.blocks)}")
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output)

    hooks = [block.register_forward_hook(keep) for block in list(part.blocks)[-count:]]
    try:
        features: Features = encoder({"image": images})
    finally:
        for hook in hooks:
            hook.remove()
    if features.tokens is None or any(not isinstance(o, Tensor) or o.ndim != 3 for o in outputs):
        raise InputError(f"{type(encoder).__name__} has no patch tokens; use features = 'pooled'")
    return features, outputs


def frozen_features(encoder: Encoder, images: Tensor, kind: FeatureKind) -> Tensor:
    """Features of a frozen encoder, not normalised.

    Args:
        encoder: Of any width D.
        images: ``(B, C, H, W)``.
        kind: ``pooled``: its embedding. Of a transformer, each after the final norm: ``class``: the class token;
            ``mean``: the mean of the patch tokens; ``class-mean``: both, ``(B, 2 D)``; ``class-4``: the class tokens of
            the last four blocks, first to last, ``(B, 4 D)`` (DINO, linear evaluation of ViT-S).

    Raises:
        InputError: Another kind, or an encoder that has no such tokens.
    """
    if kind not in get_args(FeatureKind):
        raise InputError(f"features = {kind!r}: expected one of {', '.join(get_args(FeatureKind))}")
    if kind == "pooled":
        features: Features = encoder({"image": images})
        return features.pooled
    features, outputs = run_blocks(encoder, images, 4 if kind == "class-4" else 1)
    norm = transformer_of(encoder).norm  # type: ignore[union-attr]
    normed = [norm(output) for output in outputs]
    if kind == "class-4":
        return torch.cat([tokens[:, 0] for tokens in normed], dim=1)
    assert features.tokens is not None
    mean = normed[-1][:, -features.tokens.shape[1] :].mean(dim=1)
    if kind == "mean":
        return mean
    return normed[-1][:, 0] if kind == "class" else torch.cat([normed[-1][:, 0], mean], dim=1)
