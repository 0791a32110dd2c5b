"""Encoders: what turns an image (or a text) into a vector, and the folders in which trained ones are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bowerbird.encoders.bundle import EncoderSpec, LoadedEncoder, load_encoder, save_encoder

__all__ = ["EncoderSpec", "LoadedEncoder", "load_encoder", "save_encoder"]


def __getattr__(name: str) -> Any:
    # On first use only: the settings in bowerbird.encoders.configs are read without torch.
    if name in __all__:
        from bowerbird.encoders import bundle

        return getattr(bundle, name)
    raise AttributeError(f"module 'bowerbird.encoders' has no attribute {name!r}")
