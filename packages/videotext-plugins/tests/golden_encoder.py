"""The video encoder of a golden file."""

from __future__ import annotations

from typing import Any

from bowerbird_videotext.space_time import SpaceTimeTransformer


def golden_encoder(values: dict[str, Any], **changes: Any) -> SpaceTimeTransformer:
    """The encoder with the sizes and the parameters (``param.*``) of a golden file, in float64."""
    state = {name.removeprefix("param."): value for name, value in values.items() if name.startswith("param.")}
    encoder = SpaceTimeTransformer(
        values["img_size"],
        values["patch_size"],
        values["embed_dim"],
        values["depth"],
        values["num_heads"],
        values["mlp_ratio"],
        max_frames=values["num_frames_max"] if "num_frames_max" in values else values["num_frames"],
        **changes,
    ).double()
    encoder.load_state_dict(state)
    return encoder
