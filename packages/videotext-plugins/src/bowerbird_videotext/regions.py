"""Regions of the frames of a video: boxes, how sure a detector was, and features. DemoVLP reads them, not pixels.

B videos, T frames of each, N pictures, R regions of a picture, F width of their features. Boxes are x1 y1 x2 y2 in
pixels. Sizes are height and width, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from bowerbird.errors import InputError
from bowerbird_videotext.sampling import real_frames

REGION_KEYS = ("regions", "region_geometry", "region_valid")  # of a batch


def box_geometry(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Where regions lie: x1 / W, y1 / H, x2 / W, y2 / H, (x2 - x1) / W, (y2 - y1) / H.

    Args:
        boxes: ``(..., 4)``, pixels.
        sizes: Height and width, ``(2,)`` or ``(B, 2)`` where ``boxes`` are ``(B, ..., 4)``; above 0.

    Returns:
        ``(..., 6)``.

    Raises:
        InputError: Shapes that do not fit together, or a size that is not above 0.
    """
    if boxes.ndim < 1 or boxes.shape[-1] != 4:
        raise InputError(f"boxes have shape {tuple(boxes.shape)}; expected (..., 4)")
    fits = sizes.ndim >= 1 and sizes.shape[-1] == 2 and sizes.ndim <= boxes.ndim
    if not fits or sizes.shape[:-1] != boxes.shape[: sizes.ndim - 1]:
        raise InputError(
            f"sizes have shape {tuple(sizes.shape)}; boxes have {tuple(boxes.shape)}: expected (2,) or (B, 2)"
        )
    if not bool((sizes > 0).all()):
        raise InputError("a picture has a height or a width of 0")
    kind = boxes.dtype if boxes.is_floating_point() else torch.float32
    wide = sizes.to(boxes.device, kind)[..., [1, 0, 1, 0]]  # W H W H
    wide = wide.reshape(*sizes.shape[:-1], *[1] * (boxes.ndim - sizes.ndim), 4)
    places = boxes.to(kind) / wide
    return torch.cat([places, places[..., 2:] - places[..., :2]], dim=-1)


@dataclass(frozen=True)
class FrameRegions:
    """Regions found in N pictures, up to R each.

    Attributes:
        boxes: ``(N, R, 4)``, pixels.
        scores: ``(N, R)``, how sure they are.
        features: ``(N, R, F)``.
        valid: bool ``(N, R)``, false where a picture has fewer.
    """

    boxes: Tensor
    scores: Tensor
    features: Tensor
    valid: Tensor

    def best(self, count: int) -> FrameRegions:
        """The ``count`` surest of every picture, the surest first; where there are fewer, the last one is repeated,
        not valid."""
        if count < 1:
            raise InputError(f"{count} regions per frame: expected 1 or more")
        ranked = self.scores.masked_fill(~self.valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
        found = self.valid.sum(dim=1, keepdim=True)
        places = torch.arange(count, device=found.device)[None]
        rows = ranked.gather(1, torch.minimum(places, (found - 1).clamp(min=0)))

        def taken(values: Tensor) -> Tensor:
            return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))

        return FrameRegions(
            boxes=taken(self.boxes),
            scores=self.scores.gather(1, rows),
            features=taken(self.features),
            valid=places < found,
        )


def frame_regions(boxes: Sequence[Tensor], scores: Sequence[Tensor], features: Sequence[Tensor]) -> FrameRegions:
    """What was found in single pictures as one: ``(r, 4)``, ``(r,)`` and ``(r, F)`` of each, r may be 0.

    Raises ``InputError`` where their numbers differ, or there is no picture.
    """
    if not boxes or not len(boxes) == len(scores) == len(features):
        raise InputError(
            f"boxes of {len(boxes)} pictures, scores of {len(scores)}, features of {len(features)}: expected as many, "
            "at least one"
        )
    counts = [len(found) for found in boxes]
    for i, count in enumerate(counts):
        if len(scores[i]) != count or len(features[i]) != count:
            raise InputError(
                f"picture {i}: {count} boxes, {len(scores[i])} scores, {len(features[i])} features: expected as many"
            )
    most = max(1, *counts)
    pad = torch.nn.utils.rnn.pad_sequence
    rows = torch.arange(most, device=boxes[0].device)
    valid = rows[None] < torch.tensor(counts, device=rows.device)[:, None]

    def padded(values: Sequence[Tensor]) -> Tensor:
        joined = pad(list(values), batch_first=True)
        return joined if joined.shape[1] else joined.new_zeros(len(values), most, *joined.shape[2:])

    return FrameRegions(padded(boxes), padded(scores), padded(features), valid)


@dataclass(frozen=True)
class RegionFeatures:
    """Regions of T frames of B videos.

    Attributes:
        features: ``(B, T, R, F)``.
        boxes: ``(B, T, R, 4)``, pixels.
        sizes: ``(B, 2)``, height and width of the frames.
        valid: bool ``(B, T, R)``.
    """

    features: Tensor
    boxes: Tensor
    sizes: Tensor
    valid: Tensor

    def __post_init__(self) -> None:
        """Raises ``InputError`` where shapes do not fit together."""
        shape = self.features.shape
        if len(shape) != 4:
            raise InputError(f"region features have shape {tuple(shape)}; expected (B, T, R, F)")
        wanted = {"boxes": (*shape[:3], 4), "sizes": (shape[0], 2), "valid": tuple(shape[:3])}
        for name, expected in wanted.items():
            found = tuple(getattr(self, name).shape)
            if found != expected:
                raise InputError(
                    f"{name} of regions have shape {found}; with features {tuple(shape)} expected {expected}"
                )

    @property
    def geometry(self) -> Tensor:
        """``(B, T, R, 6)``, see ``box_geometry``."""
        return box_geometry(self.boxes, self.sizes)

    def batch(self) -> dict[str, Tensor]:
        """The entries of a batch that ``videotext:demovlp`` reads."""
        return dict(zip(REGION_KEYS, (self.features, self.geometry, self.valid), strict=True))


class RegionExtractor(Protocol):
    """Finds and describes regions.

    Attributes:
        feature_dim: F.
        takes_boxes: Whether it needs ``boxes``, which then say where regions are.
    """

    feature_dim: int
    takes_boxes: bool

    def __call__(self, images: Tensor, boxes: Sequence[Tensor] | None = None) -> FrameRegions:
        """Regions of pictures ``(N, 3, H, W)`` in 0..1; ``boxes`` are N times ``(r, 4)`` pixels."""
        ...


def video_regions(
    extractor: RegionExtractor, video: Tensor, regions_per_frame: int, boxes: Sequence[Tensor] | None = None
) -> RegionFeatures:
    """The regions of clips; frames of zeros at the end, which fill up short clips, have none.

    Args:
        extractor: What finds them.
        video: ``(B, T, 3, H, W)`` in 0..1.
        regions_per_frame: R.
        boxes: Where the extractor takes boxes: B times ``(T, r, 4)`` in pixels of ``video``; fewer frames for short
            clips.

    Raises:
        InputError: Another shape; boxes are missing or do not fit.
    """
    if video.ndim != 5 or video.shape[2] != 3:
        raise InputError(f"video has shape {tuple(video.shape)}; expected (B, T, 3, H, W)")
    batch, frames = video.shape[:2]
    per_frame = None
    if extractor.takes_boxes:
        per_frame = _boxes_of_frames(boxes, video)
    found = extractor(video.flatten(0, 1), per_frame).best(regions_per_frame)
    there = real_frames(video)

    def whole(values: Tensor) -> Tensor:
        return values.unflatten(0, (batch, frames))

    sizes = torch.tensor(video.shape[3:], device=video.device).expand(batch, 2)
    return RegionFeatures(whole(found.features), whole(found.boxes), sizes, whole(found.valid) & there[..., None])


def _boxes_of_frames(boxes: Sequence[Tensor] | None, video: Tensor) -> list[Tensor]:
    if boxes is None:
        raise InputError(
            "these regions lie in boxes that come with the data (extractor.boxes = 'given'), and none came; take boxes "
            "= 'grid' or a detector for videos without them"
        )
    batch, frames = video.shape[:2]
    if len(boxes) != batch:
        raise InputError(f"boxes of {len(boxes)} videos in a batch of {batch}")
    none = torch.zeros(0, 4, device=video.device)
    flat = []
    for i, own in enumerate(boxes):
        own = torch.as_tensor(own, dtype=torch.float32, device=video.device)
        if own.ndim != 3 or own.shape[2] != 4 or len(own) > frames:
            raise InputError(f"boxes of video {i} have shape {tuple(own.shape)}; expected (up to {frames}, r, 4)")
        flat += [*own, *[none] * (frames - len(own))]
    return flat


# --------------------------------------------------------------------------------------------- without a detector


class PixelFeatures(nn.Module):
    """A region's pixels: cut out, resized to a square, in -1..1. Needs no weights.

    Args:
        side: Of the square in pixels; F = 3 side^2.
    """

    def __init__(self, side: int = 8) -> None:
        super().__init__()
        if side < 1:
            raise InputError(f"side = {side}: expected 1 or more")
        self.side, self.feature_dim = side, 3 * side * side

    def forward(self, images: Tensor, boxes: Sequence[Tensor]) -> list[Tensor]:
        """``(r, F)`` for every picture of ``(N, 3, H, W)`` and its boxes ``(r, 4)``."""
        cut = aligned(images, boxes, self.side)
        return list((2 * cut - 1).flatten(1).split([len(found) for found in boxes]))


def aligned(maps: Tensor, boxes: Sequence[Tensor], side: int) -> Tensor:
    """Squares ``(all r, C, side, side)`` of maps ``(N, C, h, w)`` in boxes given in cells of the map (RoIAlign)."""
    from torchvision.ops import roi_align

    found: Tensor = roi_align(maps, [b.to(maps.dtype) for b in boxes], side, sampling_ratio=2, aligned=True)
    return found


class GridRegions(nn.Module):
    """The cells of a grid over the picture as regions, row by row, all equally sure: no detector, no weights.

    Args:
        rows, columns: Of the grid.
        features: Module from pictures and boxes to features, such as ``PixelFeatures``.
    """

    takes_boxes = False

    def __init__(self, rows: int, columns: int, features: nn.Module) -> None:
        super().__init__()
        if rows < 1 or columns < 1:
            raise InputError(f"a grid of {rows} x {columns} cells: expected 1 or more each way")
        self.rows, self.columns, self.features = rows, columns, features
        self.feature_dim = int(features.feature_dim)  # type: ignore[arg-type]

    def forward(self, images: Tensor, boxes: Sequence[Tensor] | None = None) -> FrameRegions:
        count, _, height, width = images.shape
        y = torch.linspace(0, height, self.rows + 1, device=images.device)
        x = torch.linspace(0, width, self.columns + 1, device=images.device)
        corners = [torch.cartesian_prod(y[i : len(y) - 1 + i], x[i : len(x) - 1 + i]).flip(1) for i in (0, 1)]
        cells = torch.cat(corners, dim=1)
        features = torch.stack(self.features(images, [cells] * count))
        shape = features.shape[:2]
        return FrameRegions(
            boxes=cells.expand(count, -1, -1),
            scores=features.new_ones(shape),
            features=features,
            valid=torch.ones(shape, dtype=torch.bool, device=images.device),
        )


class GivenRegions(nn.Module):
    """Regions in boxes that come with the data, in their order, all equally sure.

    Args:
        features: Module from pictures and boxes to features.
    """

    takes_boxes = True

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.feature_dim = int(features.feature_dim)  # type: ignore[arg-type]

    def forward(self, images: Tensor, boxes: Sequence[Tensor] | None = None) -> FrameRegions:
        """Raises ``InputError`` without boxes."""
        if boxes is None or len(boxes) != len(images):
            raise InputError(f"{len(images)} pictures and boxes of {0 if boxes is None else len(boxes)}")
        scores = [images.new_ones(len(found)) for found in boxes]
        return frame_regions(boxes, scores, self.features(images, boxes))
