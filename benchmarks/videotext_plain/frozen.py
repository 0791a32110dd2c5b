"""The step of "Frozen in Time": divided space-time attention, a text transformer, symmetric cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from videotext_plain.towers import Towers, nce


def plain(objective: Any) -> Callable[[dict[str, Any]], Tensor]:
    towers = Towers(dict(objective.named_parameters()), objective.encoder)

    def loss(batch: dict[str, Any]) -> Tensor:
        whole = towers.norm(towers.clip_states(batch["video"])[-1][:, 0], "encoder.video_encoder.norm")
        texts = towers.caption(towers.text_states(batch["text"]))
        return nce(texts, towers.linear(whole, "encoder.video_proj"), objective.temperature)

    return loss
