"""Weights of timm's vision transformers, in and out."""

from __future__ import annotations

from pathlib import Path

from bowerbird.encoders.weights import load_strictly, read_weights
from bowerbird_mim.vit import ViTEncoder


def load_vit_weights(encoder: ViTEncoder, path: str | Path) -> None:
    """Fill ``encoder`` with the weights of a timm ViT; those of its classifier are left out.

    Raises:
        DataError: The file cannot be read, or is of another architecture; the message lists what differs.
    """
    state = {key: value for key, value in read_weights(path).items() if not key.startswith(("head.", "fc_norm."))}
    load_strictly(encoder, state, source=str(path))
