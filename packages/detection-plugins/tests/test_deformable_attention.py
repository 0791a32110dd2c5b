"""Deformable attention: the published numbers, and what must hold for every input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bowerbird.errors import InputError
from bowerbird.testing import assert_close
from bowerbird_detection.deformable_attention import MultiScaleDeformableAttention, deformable_attention

SHAPES = [(4, 6), (2, 3)]
POSITIONS = 30


def layer(**more: Any) -> MultiScaleDeformableAttention:
    """With weights that tell something everywhere."""
    made = MultiScaleDeformableAttention(8, 2, 2, 3, **more).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def by_hand(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Equation 3 of the paper, pixel by pixel."""
    batch, _, heads, width = value.shape
    queries, levels, points = locations.shape[1], len(shapes), locations.shape[4]
    out = torch.zeros(batch, queries, heads, width, dtype=value.dtype)
    start = 0
    for level in range(levels):
        rows, columns = shapes[level]
        for b in range(batch):
            for q in range(queries):
                for h in range(heads):
                    for p in range(points):
                        x, y = (locations[b, q, h, level, p] * torch.tensor([columns, rows]) - 0.5).tolist()
                        for i in range(rows):
                            for j in range(columns):
                                near = max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j))
                                share = near * weights[b, q, h, level, p]
                                out[b, q, h] += share * value[b, start + i * columns + j, h]
        start += rows * columns
    return out.flatten(2)


def test_the_sum_over_levels_and_points_gives_the_golden_numbers_and_gradients(
    golden: Callable[[str], dict[str, Any]],
) -> None:
    values = golden("obj2seq/ms_deform_attn_core")
    names = ("value", "sampling_locations", "attention_weights")
    inputs = {name: values[name].requires_grad_() for name in names}
    output = deformable_attention(
        inputs["value"], values["spatial_shapes"], inputs["sampling_locations"], inputs["attention_weights"]
    )
    assert_close(output, values["output"])
    (output * values["upstream"]).sum().backward()
    for name in names:
        assert_close(inputs[name].grad, values[f"grad_{name}"], where=name)


@settings(max_examples=10, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    sizes=st.tuples(*[st.integers(1, 2)] * 4),
    seed=st.integers(0, 99),
)
def test_it_is_the_papers_equation_also_outside_of_the_map(
    shapes: list[tuple[int, int]], sizes: tuple[int, int, int, int], seed: int
) -> None:
    batch, queries, heads, points = sizes
    generator = torch.Generator().manual_seed(seed)
    positions = sum(rows * columns for rows, columns in shapes)
    value = torch.randn(batch, positions, heads, 3, dtype=torch.float64, generator=generator)
    where = (batch, queries, heads, len(shapes), points)
    locations = 1.6 * torch.rand(*where, 2, dtype=torch.float64, generator=generator) - 0.3
    weights = torch.rand(*where, dtype=torch.float64, generator=generator)
    found = deformable_attention(value, shapes, locations, weights)
    assert_close(found, by_hand(value, shapes, locations, weights))


def test_a_single_point_on_the_middle_of_a_pixel_reads_that_pixel() -> None:
    value = torch.randn(1, POSITIONS, 1, 5, dtype=torch.float64)
    middle = torch.tensor([(2 + 0.5) / 6, (3 + 0.5) / 4], dtype=torch.float64)  # column 2, row 3 of the first level
    locations = middle.expand(1, 1, 1, 2, 1, 2)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64).reshape(1, 1, 1, 2, 1)
    assert_close(deformable_attention(value, SHAPES, locations, weights)[0, 0], value[0, 3 * 6 + 2, 0])


def test_equal_features_give_equal_outputs_because_weights_sum_to_one() -> None:
    made = MultiScaleDeformableAttention(8, 2, 2, 3, value_projection=False).double()
    with torch.no_grad():
        made.output_proj.weight.copy_(torch.eye(8))
        made.attention_weights.weight.normal_()
        made.sampling_offsets.bias.mul_(0.05)  # points stay inside
    constant = torch.randn(8, dtype=torch.float64)
    query = torch.randn(1, 7, 8, dtype=torch.float64)
    middle = torch.full((1, 7, 2), 0.5, dtype=torch.float64)
    found = made(query, middle, constant.expand(1, POSITIONS, 8), SHAPES)
    assert_close(found, constant.expand(1, 7, 8))


@pytest.mark.parametrize("value_projection", [True, False])
def test_what_lies_under_the_padding_has_no_effect(value_projection: bool) -> None:
    made = layer(value_projection=value_projection)
    query, points = torch.randn(2, 5, 8).double(), torch.rand(2, 5, 2).double()
    features = torch.randn(2, POSITIONS, 8).double()
    mask = torch.zeros(2, POSITIONS, dtype=torch.bool)
    mask[1, 10:] = True
    other = features.masked_fill(mask[..., None], 1e6)
    assert_close(made(query, points, other, SHAPES, mask), made(query, points, features, SHAPES, mask))
    assert not torch.allclose(made(query, points, features, SHAPES), made(query, points, features, SHAPES, mask))


@settings(max_examples=15, deadline=None)
@given(index=st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_rows_read_the_picture_that_they_name_as_if_its_features_were_copied(index: list[int]) -> None:
    torch.manual_seed(4)
    made = layer()
    features = torch.randn(3, POSITIONS, 8).double()
    query, points = torch.randn(len(index), 4, 8).double(), torch.rand(len(index), 4, 2).double()
    rows = torch.tensor(index)
    copied = made(query, points, features[rows], SHAPES)
    assert_close(made(query, points, features, SHAPES, batch_index=rows), copied)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_features_of_half_precision_are_read_at_places_in_float32(kind: torch.dtype) -> None:
    made, (query, features) = layer(), torch.randn(2, 1, POSITIONS, 8).double()
    points = torch.rand(1, POSITIONS, 2)
    wanted = made(query, points.double(), features, SHAPES)
    found = made.to(kind)(query.to(kind), points, features.to(kind), SHAPES)
    assert found.dtype == kind
    torch.testing.assert_close(found.double(), wanted, rtol=0.1, atol=0.1)


def test_offsets_are_pixels_of_the_level_for_points_and_parts_of_the_half_size_for_boxes() -> None:
    made = MultiScaleDeformableAttention(4, 1, 1, 2, value_projection=False).double()
    with torch.no_grad():
        made.output_proj.weight.copy_(torch.eye(4))
        made.sampling_offsets.bias.copy_(torch.tensor([1.0, 0.0, 1.0, 0.0]))  # both points: one to the right
    features = torch.randn(1, 24, 4).double()
    query = torch.zeros(1, 1, 4).double()
    point = torch.tensor([[[1.5 / 6, 2.5 / 4]]], dtype=torch.float64)
    assert_close(made(query, point, features, [(4, 6)])[0, 0], features[0, 2 * 6 + 2])
    # A width of 4 pixels: one half of half of it is 1 pixel.
    box = torch.tensor([[[1.5 / 6, 2.5 / 4, 4 / 6, 0.1]]], dtype=torch.float64)
    assert_close(made(query, box, features, [(4, 6)])[0, 0], features[0, 2 * 6 + 2])


def test_at_first_heads_look_in_directions_of_their_own_with_equal_weights() -> None:
    made = MultiScaleDeformableAttention(16, 2, 4, 3)
    offsets = made.sampling_offsets.bias.detach().reshape(4, 2, 3, 2)
    first = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for step in range(3):
        for level in range(2):
            torch.testing.assert_close(offsets[:, level, step], (step + 1) * first, atol=1e-6, rtol=0)
    assert not made.attention_weights.weight.any() and not made.attention_weights.bias.any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    made = layer()
    query, points, features = torch.randn(1, 3, 8), torch.rand(1, 3, 2), torch.randn(1, POSITIONS, 8)
    made.float()
    with pytest.raises(InputError, match="29 positions"):
        made(query, points, features[:, 1:], SHAPES)
    with pytest.raises(InputError, match="of 1 levels"):
        made(query, points, features[:, :24], SHAPES[:1])
    with pytest.raises(InputError, match="reference_points"):
        made(query, points[..., :1], features, SHAPES)
    with pytest.raises(InputError, match="padding_mask"):
        made(query, points, features, SHAPES, torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="batch_index"):
        made(query, points, features, SHAPES, batch_index=torch.tensor([1]))
    with pytest.raises(InputError, match="heads divide"):
        MultiScaleDeformableAttention(10, 2, 4, 1)
    with pytest.raises(InputError, match="sampling_locations"):
        deformable_attention(torch.rand(1, POSITIONS, 2, 4), SHAPES, torch.rand(1, 3, 2, 1, 2, 2), torch.rand(1, 3, 2))
