from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bowerbird.errors import InputError
from bowerbird.testing import assert_close
from bowerbird_detection.depatch import (
    SIZE_BIAS,
    DeformablePatchEmbed,
    box_sampling_grid,
    decode_patch_boxes,
    replace_patch_embeds,
    sample_points,
)

ZERO_INIT, RANDOM, RECTANGULAR = "depatch_zero_init", "depatch_random_offsets", "depatch_rectangular"


def with_offsets(embed: DeformablePatchEmbed, *, spread: float = 0.5) -> DeformablePatchEmbed:
    torch.nn.init.normal_(embed.offset_predictor.weight, std=spread)
    return embed


# ------------------------------------------------------------------------------------------- published numbers


def test_boxes_points_and_their_gradients_are_those_of_the_published_code(golden):
    g = golden("dpt/box_coder")
    raw, bias = g["raw_prediction"].requires_grad_(), torch.full((2,), g["wh_bias_init"]).requires_grad_()
    boxes = decode_patch_boxes(raw, bias, g["grid"])
    points = box_sampling_grid(boxes, g["points_per_side"])
    grad_raw, grad_bias = torch.autograd.grad((points * g["upstream"]).sum(), (raw, bias))
    assert_close(boxes, g["boxes_xyxy"], rtol=0, atol=1e-6)
    assert_close(points, g["points_xy"], rtol=0, atol=1e-6)
    assert_close(grad_raw, g["grad_raw_prediction"], rtol=1e-5, atol=1e-5)
    assert_close(grad_bias, g["grad_wh_bias"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [ZERO_INIT, RANDOM, RECTANGULAR])
def test_tokens_and_every_gradient_are_those_of_the_published_code(golden, name):
    g = golden(f"dpt/{name}")
    state = {key.removeprefix("param/"): value for key, value in g.items() if key.startswith("param/")}
    x = g["x"].requires_grad_()
    embed = DeformablePatchEmbed(x.shape[1], len(state["norm.weight"]), g["patch_size"], g["points_per_side"])
    embed.load_state_dict(state, strict=True)  # names and buffers as published
    tokens, grid, boxes = embed(x, return_boxes=True)
    (tokens * g["upstream"]).sum().backward()
    assert grid == (x.shape[2] // 2, x.shape[3] // 2)
    assert_close(boxes, g["boxes_xyxy"], rtol=0, atol=1e-6)
    assert_close(tokens, g["y"], rtol=0, atol=1e-5)
    assert_close(x.grad, g["grad_x"], rtol=1e-5, atol=1e-5)
    for parameter, value in embed.named_parameters():
        scale = float(g[f"grad/{parameter}"].abs().max())
        assert_close(value.grad, g[f"grad/{parameter}"], rtol=0, atol=1e-5 * max(1.0, scale), where=parameter)


def test_sampling_is_deformable_attention_of_one_level_before_its_weights(golden):
    g = golden("dpt/ms_deform_attn_core")
    (height, width), value = g["spatial_shapes"][0].tolist(), g["value"].requires_grad_()
    locations, weights = g["sampling_locations"].requires_grad_(), g["attention_weights"].requires_grad_()
    batch, _, heads, dim = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    maps = value.permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
    where = locations[:, :, :, 0].transpose(1, 2).reshape(batch * heads, queries * points, 2)
    read = sample_points(maps, where).view(batch, heads, queries, points, dim)
    output = torch.einsum("bhqpd,bqhp->bqhd", read, weights[:, :, :, 0]).flatten(2)
    gradients = torch.autograd.grad((output * g["upstream"]).sum(), (value, locations, weights))
    assert_close(output, g["output"])
    for name, found in zip(("value", "sampling_locations", "attention_weights"), gradients, strict=True):
        assert_close(found, g[f"grad_{name}"])


# -------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("patch_size", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
def test_at_first_a_box_is_half_its_patch_wide_and_lies_in_its_middle(patch_size, grid):
    embed = DeformablePatchEmbed(3, 8, patch_size)
    height, width = grid[0] * patch_size, grid[1] * patch_size
    one, other = (embed.boxes(torch.randn(1, 3, height, width)) for _ in range(2))
    assert torch.equal(one, other)  # whatever the picture
    pixels = one[0] * torch.tensor([width, height, width, height])
    rows = torch.arange(grid[0]).repeat_interleave(grid[1])
    columns = torch.arange(grid[1]).repeat(grid[0])
    low = torch.stack((columns, rows), dim=1) * patch_size + patch_size / 4
    assert_close(pixels, torch.cat((low, low + patch_size / 2), dim=1), rtol=0, atol=1e-5)


def test_the_first_box_of_patches_of_two_pixels_has_its_corners_at_pixel_centres():
    boxes = DeformablePatchEmbed(3, 8).boxes(torch.randn(1, 3, 8, 8))
    assert_close(boxes[0, 0] * 8, torch.tensor([0.5, 0.5, 1.5, 1.5]), rtol=0, atol=1e-6)


def test_with_two_points_per_side_the_first_reading_is_a_convolution():
    embed = DeformablePatchEmbed(5, 7, patch_size=2, points_per_side=2, norm_layer=lambda _: torch.nn.Identity())
    x = torch.randn(2, 5, 6, 10)
    tokens, grid = embed(x)
    linear = embed.output_proj.weight.view(7, 2, 2, 5)  # (d, x, y, c)
    expected = F.conv2d(x, linear.permute(0, 3, 2, 1), embed.output_proj.bias, stride=2)
    assert grid == (3, 5)
    assert_close(tokens, expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)


def test_where_the_picture_is_constant_offsets_do_not_matter():
    embed = DeformablePatchEmbed(4, 8)
    x = torch.randn(1, 4, 1, 1).expand(2, 4, 12, 12)
    before, _ = embed(x)
    after, _, boxes = with_offsets(embed)(x, return_boxes=True)
    inside = ((boxes[..., :2] >= 0.5 / 12) & (boxes[..., 2:] <= 1 - 0.5 / 12)).all(dim=2)
    assert inside.sum() > inside.numel() // 3
    assert not torch.allclose(boxes, DeformablePatchEmbed(4, 8).boxes(x))
    assert_close(after[inside], before[inside], rtol=0, atol=1e-5)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    spread=st.floats(0.01, 20),
    bias=st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_boxes_stay_in_the_map_near_their_patch_and_below_two_patches(rows, columns, spread, bias, seed):
    pred = spread * torch.randn(2, rows * columns, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    boxes = decode_patch_boxes(pred, torch.tensor(bias, dtype=torch.double), (rows, columns))
    low, high = boxes[..., :2], boxes[..., 2:]
    cell = torch.tensor([1 / columns, 1 / rows], dtype=torch.double)
    assert (boxes >= 0).all()
    assert (boxes <= 1).all()
    assert (low <= high).all()
    assert (high - low <= 2 * cell + 1e-12).all()
    anchors = (torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1) + 0.5) * cell
    assert (low <= anchors + cell + 1e-12).all()  # the centre moved by one patch at most, and a cut only shortens
    assert (high >= anchors - cell - 1e-12).all()
    whole = (low > 0).all(dim=2) & (high < 1).all(dim=2)
    assert (((low + high) / 2 - anchors).abs() <= cell + 1e-12)[whole].all()


def test_a_ramp_is_read_exactly():
    height, width = 6, 9
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    ramp = torch.stack((3 * x - 2 * y + 1, x, y))[None]
    points = torch.rand(1, 50, 2, dtype=torch.double) * (1 - 1 / torch.tensor([width, height])) + 0.5 / torch.tensor(
        [width, height]
    )
    at_x, at_y = (points * torch.tensor([width, height]) - 0.5)[0].unbind(dim=1)
    assert_close(sample_points(ramp, points)[0], torch.stack((3 * at_x - 2 * at_y + 1, at_x, at_y), dim=1))


def test_points_go_along_y_first_and_half_of_the_outermost_reading_is_padding():
    points = box_sampling_grid(torch.tensor([[[0.0, 0.0, 1.0, 0.5]]]), 3)
    assert points[0, :, 0].tolist() == [0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1]
    assert points[0, :, 1].tolist() == [0, 0.25, 0.5] * 3
    assert sample_points(torch.ones(1, 1, 4, 4), torch.tensor([[[0.0, 0.5], [0.0, 0.0]]])).flatten().tolist() == [
        0.5,
        0.25,
    ]


def test_mirroring_picture_and_shifts_mirrors_the_points_of_every_patch():
    rows, columns, k = 3, 4, 3
    pred, bias = torch.randn(2, rows * columns, 4, dtype=torch.double), torch.tensor([0.3, 0.1], dtype=torch.double)
    x = torch.randn(2, 5, 6, 8, dtype=torch.double)

    def read(maps: Tensor, predicted: Tensor) -> Tensor:
        boxes = decode_patch_boxes(predicted, bias, (rows, columns))
        return sample_points(maps, box_sampling_grid(boxes, k)).view(2, rows, columns, k, k, 5)

    mirrored = pred.view(2, rows, columns, 4).flip(2) * torch.tensor([-1.0, 1, 1, 1])
    assert_close(read(x.flip(3), mirrored.flatten(1, 2)), read(x, pred).flip(2, 3))


def test_channels_are_read_alike():
    order = torch.randperm(6)
    x, points = torch.randn(2, 6, 5, 7), torch.rand(2, 11, 2)
    assert torch.equal(sample_points(x[:, order], points), sample_points(x, points)[..., order])


def test_the_gradient_is_that_of_the_function():
    embed = with_offsets(DeformablePatchEmbed(2, 3)).double()
    x = torch.randn(1, 2, 4, 6, dtype=torch.double, requires_grad=True)
    weight, bias = embed.offset_predictor.weight, embed.box_coder.wh_bias
    assert torch.autograd.gradcheck(lambda x, *_: embed(x)[0], (x, weight, bias))


def test_a_box_cut_at_the_edge_or_without_a_size_gets_no_gradient_there():
    pred = torch.zeros(1, 4, 4, dtype=torch.double)
    pred[0, 0, 0] = -3  # to the left, over the edge
    pred[0, 3, 2:] = -2  # size below zero
    pred.requires_grad_()
    boxes = decode_patch_boxes(pred, torch.full((2,), SIZE_BIAS, dtype=torch.double), (2, 2))
    assert boxes[0, 0, 0] == 0
    (cut,) = torch.autograd.grad(boxes[0, 0, 0], pred, retain_graph=True)
    (size,) = torch.autograd.grad((boxes[0, 3, 2:] - boxes[0, 3, :2]).sum(), pred, retain_graph=True)
    (free,) = torch.autograd.grad(boxes[0, 1, 2:].sum(), pred)
    assert not cut.any()
    assert not size.any()
    assert free.any()


# --------------------------------------------------------------------------------------------------- behaviour


def test_frozen_offsets_leave_a_reading_of_fixed_boxes_that_is_trained():
    embed = DeformablePatchEmbed(3, 8)
    embed.freeze_offsets()
    x = torch.randn(2, 3, 8, 8)
    before = embed.boxes(x)
    embed(x)[0].square().sum().backward()
    trained = {name for name, parameter in embed.named_parameters() if parameter.grad is not None}
    assert trained == {"output_proj.weight", "output_proj.bias", "norm.weight", "norm.bias"}
    assert torch.equal(before, embed.boxes(torch.randn(2, 3, 8, 8)))


def test_half_precision_never_reaches_the_positions():
    embed = with_offsets(DeformablePatchEmbed(3, 8))
    x = torch.randn(1, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, _, boxes = embed(x, return_boxes=True)
    assert boxes.dtype == tokens.dtype == torch.float32
    assert torch.equal(tokens, embed(x)[0])


@pytest.mark.parametrize("shape", [(1, 3, 7, 8), (1, 3, 8, 9), (1, 3, 0, 8), (3, 8, 8)])
def test_maps_that_cannot_be_cut_into_patches_are_refused(shape):
    with pytest.raises(InputError, match=r"multiples|expected maps"):
        DeformablePatchEmbed(3, 8)(torch.zeros(shape))


def test_maps_of_other_channels_are_refused():
    with pytest.raises(InputError, match=r"expected maps \(B, 3, H, W\), found shape \(1, 4, 8, 8\)"):
        DeformablePatchEmbed(3, 8)(torch.zeros(1, 4, 8, 8))


def test_wrong_arguments_are_refused():
    with pytest.raises(InputError, match="at least 2"):
        DeformablePatchEmbed(3, 8, points_per_side=1)
    with pytest.raises(InputError, match="at least 2"):
        box_sampling_grid(torch.zeros(1, 4, 4), 1)
    with pytest.raises(InputError, match="2 x 3"):
        decode_patch_boxes(torch.zeros(1, 4, 4), torch.zeros(2), (2, 3))
    with pytest.raises(InputError, match="do not fit"):
        sample_points(torch.zeros(1, 2, 4, 4), torch.zeros(2, 5, 2))


# ---------------------------------------------------------------------------------------------- other networks


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "depths": (1, 1, 1, 1), "embed_dim": 24}),
        ("swinv2_tiny_window8_256", {"img_size": 64, "window_size": 4, "depths": (1, 1, 1, 1), "embed_dim": 24}),
    ],
)
def test_pyramids_of_timm_get_deformable_patches_and_keep_their_shapes(name, options):
    model = timm.create_model(name, num_classes=5, **options)
    x = torch.randn(2, 3, 64, 64)
    shape = model.forward_features(x).shape
    assert replace_patch_embeds(model, stages=(1, 3)) is model
    assert sum(isinstance(part, DeformablePatchEmbed) for part in model.modules()) == 2
    assert model.forward_features(x).shape == shape
    replace_patch_embeds(model, stages=2)
    model(x).square().sum().backward()
    assert all(
        part.offset_predictor.weight.grad.any() for part in model.modules() if isinstance(part, DeformablePatchEmbed)
    )


def test_what_has_no_such_patches_is_refused():
    with pytest.raises(InputError, match="PVT-v2, Swin"):
        replace_patch_embeds(timm.create_model("resnet10t"))
    model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1))
    with pytest.raises(InputError, match=r"stages \[0, 4\].*\[1, 2, 3\]"):
        replace_patch_embeds(model, stages=(0, 1, 4))
    assert not any(isinstance(part, DeformablePatchEmbed) for part in model.modules())
