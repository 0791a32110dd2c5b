"""Encoders: what turns an image (or a text) into a vector, and the folders in which trained ones are kept."""

from __future__ import annotations

from bowerbird.encoders.bundle import EncoderSpec, LoadedEncoder, load_encoder, save_encoder

__all__ = ["EncoderSpec", "LoadedEncoder", "load_encoder", "save_encoder"]
