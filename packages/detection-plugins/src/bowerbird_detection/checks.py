"""What every detector asks of the pictures and the objects that it is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bowerbird.errors import InputError
from bowerbird.protocols import Objects


def checked_pictures(images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Float pictures ``(3, h, w)`` on ``device``. Raises ``InputError`` for what is none."""
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point() or 0 in image.shape:
            raise InputError(
                f"picture {i} is {image.dtype} {tuple(image.shape)}; expected float (3, height, width) in 0..1"
            )
    return [image.to(device, non_blocking=True) for image in images]


def learned_rows(i: int, found: Objects, num_classes: int) -> Tensor:
    """bool ``(R,)``: which objects of picture ``i`` a detector learns to find: those with an area that are no crowds.

    Raises ``InputError`` for shapes that do not fit and for a label that is no class.
    """
    count = len(found.boxes)
    if found.boxes.shape != (count, 4) or found.labels.shape != (count,):
        raise InputError(
            f"picture {i}: boxes {tuple(found.boxes.shape)} and labels {tuple(found.labels.shape)}; expected "
            "(R, 4) and (R,)"
        )
    wrong = (found.labels < 0) | (found.labels >= num_classes)
    if wrong.any():
        raise InputError(
            f"picture {i}: label {int(found.labels[wrong][0])} is no class; expected 0 to {num_classes - 1}"
        )
    kept = (found.boxes[:, 2:] > found.boxes[:, :2]).all(dim=1)
    return kept if found.crowd is None else kept & ~found.crowd
