"""Multi-scale deformable attention (Deformable DETR, arXiv:2010.04159, equation 3) on ``grid_sample``.

Every query looks at a few points around its reference, on every level of a pyramid, instead of at all positions:

    out_q = W_o concat_h sum_{l,p} A_hlqp V_hl(r_q + d_hlqp)        A = softmax over (l, p), d = offset of the point

with V read bilinearly and zero outside the map. No compiled extension: it runs on whatever torch runs on.
B pictures, N rows of queries, Q queries of a row, L levels, S = sum of H_l W_l positions, h heads, P points of a head
and level, d width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from bowerbird.errors import InputError

Shapes = Sequence[tuple[int, int]]  # (H_l, W_l) of every level


def deformable_attention(
    value: Tensor, spatial_shapes: Shapes | Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The sum over levels and points, without any projection.

    Args:
        value: ``(B, S, h, d/h)``, the levels one after the other, each row by row.
        spatial_shapes: (H_l, W_l) of every level, or whole numbers ``(L, 2)``.
        sampling_locations: ``(B, Q, h, L, P, 2)``, x and y; the map spans 0..1 (pixel centres at (i + 0.5) / W_l).
        attention_weights: ``(B, Q, h, L, P)``.

    Returns:
        ``(B, Q, d)``, the heads side by side.

    Raises:
        InputError: The shapes do not fit.
    """
    shapes = shapes_of(spatial_shapes)
    if value.ndim != 4:
        raise InputError(f"value of shape {tuple(value.shape)}: expected (batch, positions, heads, width of a head)")
    _check_positions(value.shape[1], shapes)
    count, _, heads, _ = value.shape
    expected = (count, heads, len(shapes))
    found = sampling_locations.shape
    if len(found) != 6 or (found[0], found[2], found[3]) != expected or attention_weights.shape != found[:-1]:
        raise InputError(
            f"sampling_locations {tuple(found)} and attention_weights {tuple(attention_weights.shape)} do not fit a "
            f"batch of {count}, {heads} heads and {len(shapes)} levels; expected (B, Q, h, L, P, 2) and (B, Q, h, L, P)"
        )
    return _sampled(value_maps(value, shapes), sampling_locations, attention_weights)


def value_maps(value: Tensor, shapes: Shapes) -> list[Tensor]:
    """``(B, S, h, d/h)`` as one map ``(B h, d/h, H_l, W_l)`` per level, which ``grid_sample`` reads."""
    count, _, heads, width = value.shape
    levels = value.permute(0, 2, 3, 1).split([rows * columns for rows, columns in shapes], dim=3)
    return [
        level.reshape(count * heads, width, rows, columns)
        for level, (rows, columns) in zip(levels, shapes, strict=True)
    ]


def _sampled(maps: Sequence[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    count, queries, heads = locations.shape[:3]
    kind = torch.promote_types(maps[0].dtype, locations.dtype)  # of half precision only where both are
    # Queries come last: the sum over the few points then runs along whole rows of memory.
    grids = (2 * locations - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # (L, B h, P, Q, 2)
    factors = weights.permute(3, 0, 2, 4, 1).flatten(1, 2)[:, :, None]  # (L, B h, 1, P, Q)
    total: Tensor | None = None
    for level, grid, factor in zip(maps, grids, factors, strict=True):
        read = functional.grid_sample(
            level.to(kind), grid.to(kind), mode="bilinear", padding_mode="zeros", align_corners=False
        )
        part = (read * factor).sum(dim=2)  # (B h, d/h, Q)
        total = part if total is None else total + part
    assert total is not None
    return total.reshape(count, heads * total.shape[1], queries).transpose(1, 2)


class ImageRows:
    """Rows of queries that read pictures: row i reads picture ``batch_index[i]``.

    A picture has as many rows as it has prompts. Instead of a copy of its features for every row, the rows of a picture
    are put side by side and read it together.
    """

    def __init__(self, batch_index: Tensor, num_images: int) -> None:
        if len(batch_index) == 0 or int(batch_index.min()) < 0 or int(batch_index.max()) >= num_images:
            raise InputError(
                f"batch_index {batch_index.tolist()}: expected the pictures of at least one row, 0 to {num_images - 1}"
            )
        self.batch_index, self.num_images = batch_index, num_images
        counts = torch.bincount(batch_index, minlength=num_images)
        self.most = int(counts.max())
        even = torch.arange(num_images, device=batch_index.device).repeat_interleave(self.most)
        self.even = torch.equal(even, batch_index)  # equally many rows each, in order: nothing has to move
        order = batch_index.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        self.slots = torch.empty_like(order)
        self.slots[order] = torch.arange(len(order), device=order.device) - starts[batch_index[order]]

    def together(self, x: Tensor) -> Tensor:
        """``(N, Q, ...)`` to ``(B, R Q, ...)``, R the most rows of a picture; zeros where one has fewer."""
        if self.even:
            rows = x.unflatten(0, (self.num_images, self.most))
        else:
            rows = x.new_zeros((self.num_images, self.most, *x.shape[1:]))
            rows = rows.index_put((self.batch_index, self.slots), x)
        return rows.flatten(1, 2)

    def apart(self, x: Tensor) -> Tensor:
        """The inverse: ``(B, R Q, ...)`` to ``(N, Q, ...)``."""
        rows = x.unflatten(1, (self.most, -1))
        return rows.flatten(0, 1) if self.even else rows[self.batch_index, self.slots]


class MultiScaleDeformableAttention(nn.Module):
    """Deformable attention with its projections; parameters have the names of Deformable DETR's code.

    Args:
        embed_dim: d.
        num_levels, num_heads, num_points: L, h, P.
        value_projection: Project the features to values; without it they are split into heads as they are.

    At first the offsets of head i point in its own direction (2 pi i / h), 1 to P steps far, and all weights are equal.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_levels: int = 4,
        num_heads: int = 8,
        num_points: int = 4,
        value_projection: bool = True,
    ) -> None:
        super().__init__()
        if min(embed_dim, num_levels, num_heads, num_points) < 1 or embed_dim % num_heads:
            raise InputError(
                f"embed_dim = {embed_dim}, num_levels = {num_levels}, num_heads = {num_heads}, num_points = "
                f"{num_points}: expected numbers of at least 1, and a width that the heads divide"
            )
        self.embed_dim, self.num_levels, self.num_heads, self.num_points = embed_dim, num_levels, num_heads, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, 2 * samples)
        self.attention_weights = nn.Linear(embed_dim, samples)
        self.value_proj = nn.Linear(embed_dim, embed_dim) if value_projection else None
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=1)
        directions = directions / directions.abs().amax(dim=1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)[None, None, :, None]
        offsets = (directions[:, None, None] * steps).expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        features: Tensor,
        spatial_shapes: Shapes | Tensor,
        padding_mask: Tensor | None = None,
        *,
        batch_index: Tensor | None = None,
    ) -> Tensor:
        """What every query reads.

        Args:
            query: ``(N, Q, d)``.
            reference_points: ``(N, Q, 2)`` or, per level, ``(N, Q, L, 2)``: x and y in 0..1. Offsets are then in pixels
                of the level. Or boxes ``(..., 4)``, centre and size: offsets are then in ``1/P`` of half their size.
            features: ``(B, S, d)``.
            spatial_shapes: (H_l, W_l) of every level.
            padding_mask: bool ``(B, S)``, true where a position is padding, which is read as zero.
            batch_index: int64 ``(N,)``, whose features a row reads; by default N is B and row i reads picture i.

        Returns:
            ``(N, Q, d)``.

        Raises:
            InputError: The shapes do not fit.
        """
        maps = self.maps(features, spatial_shapes, padding_mask)
        rows = None if batch_index is None else ImageRows(batch_index, len(features))
        return self.attend(query, reference_points, maps, rows)

    def maps(
        self, features: Tensor, spatial_shapes: Shapes | Tensor, padding_mask: Tensor | None = None
    ) -> list[Tensor]:
        """The values as maps, for several calls of ``attend``. Arguments as of ``forward``."""
        shapes = shapes_of(spatial_shapes)
        if features.ndim != 3 or features.shape[2] != self.embed_dim or len(shapes) != self.num_levels:
            raise InputError(
                f"features {tuple(features.shape)} of {len(shapes)} levels: expected (batch, positions, "
                f"{self.embed_dim}) of {self.num_levels} levels"
            )
        _check_positions(features.shape[1], shapes)
        if padding_mask is not None and padding_mask.shape != features.shape[:2]:
            raise InputError(
                f"padding_mask {tuple(padding_mask.shape)}: expected that of the features, {tuple(features.shape[:2])}"
            )
        value = features if self.value_proj is None else self.value_proj(features)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0.0)
        return value_maps(value.unflatten(2, (self.num_heads, -1)), shapes)

    def attend(
        self, query: Tensor, reference_points: Tensor, maps: Sequence[Tensor], rows: ImageRows | None = None
    ) -> Tensor:
        """``forward`` on ready ``maps``; ``rows`` says which picture a row reads."""
        count, queries = query.shape[:2]
        if reference_points.ndim == 3:
            reference_points = reference_points[:, :, None]
        fits = reference_points.ndim == 4 and reference_points.shape[:2] == (count, queries)
        fits = fits and reference_points.shape[2] in (1, self.num_levels) and reference_points.shape[3] in (2, 4)
        pictures = len(maps[0]) // self.num_heads
        if not fits or count != (pictures if rows is None else len(rows.batch_index)):
            raise InputError(
                f"query {tuple(query.shape)} and reference_points {tuple(reference_points.shape)} do not fit the "
                f"features of {pictures} pictures and {self.num_levels} levels; expected reference_points (N, Q, 2 or "
                "4) or (N, Q, levels, 2 or 4) for N rows, one per picture or per entry of batch_index"
            )
        per_sample = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).unflatten(2, (*per_sample, 2))
        weights = self.attention_weights(query).unflatten(2, (self.num_heads, -1)).softmax(dim=-1)
        weights = weights.unflatten(3, per_sample[1:])
        points = reference_points[:, :, None, :, None]  # (N, Q, 1, L or 1, 1, 2 or 4)
        if points.shape[-1] == 2:
            sizes = query.new_tensor([[level.shape[3], level.shape[2]] for level in maps])
            locations = points + offsets / sizes[:, None]
        else:
            locations = points[..., :2] + offsets / self.num_points * (0.5 * points[..., 2:])
        if rows is None:
            read = _sampled(maps, locations, weights)
        else:
            read = rows.apart(_sampled(maps, rows.together(locations), rows.together(weights)))
        out: Tensor = self.output_proj(read.to(query.dtype))
        return out


def shapes_of(spatial_shapes: Shapes | Tensor) -> list[tuple[int, int]]:
    """``(H_l, W_l)`` of every level as whole numbers."""
    values = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    return [(int(rows), int(columns)) for rows, columns in values]


def _check_positions(found: int, shapes: Shapes) -> None:
    expected = sum(rows * columns for rows, columns in shapes)
    if found != expected:
        raise InputError(f"features of {found} positions do not fit the levels {list(shapes)}, which have {expected}")
