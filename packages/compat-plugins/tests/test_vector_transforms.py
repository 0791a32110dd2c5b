"""Torch transforms become served ones: the same numbers without torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bowerbird.errors import InputError
from bowerbird.gallery.transform import VectorTransform
from bowerbird_compat.bict import ForwardTransform, TransformChain
from bowerbird_compat.online_backfilling import ReverseQueryTransform
from bowerbird_compat.vector_transforms import to_vector_transform

ENDS = {"source": "a", "target": "b"}


def disturbed(module: nn.Module) -> nn.Module:
    """Every weight and statistic away from its start, as after training."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.dtype.is_floating_point:
            tensor.data = tensor + 0.3 * torch.rand_like(tensor)
    return module.eval()


MODULES = [
    lambda: ReverseQueryTransform(7, 5, **ENDS),
    lambda: ReverseQueryTransform(6, 6, hidden=9, **ENDS),
    *(
        lambda norm=norm, depth=depth: ForwardTransform(5, 8, 11, depth, norm, **ENDS)
        for norm in ("batch", "layer", None)
        for depth in (1, 2, 3)
    ),
    lambda: ForwardTransform(6, 6, norm="batch", residual=True, **ENDS),
    lambda: ForwardTransform(1, 3, norm="layer", **ENDS),
]


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_equals_the_module_in_eval_mode(make, dtype, tmp_path):
    module = disturbed(make().to(dtype))
    vectors = torch.randn(33, next(p for p in module.parameters() if p.ndim == 2).shape[1], dtype=dtype)
    with torch.no_grad():
        expected = F.normalize(module(vectors)).float().numpy()
    made = to_vector_transform(module, method="test")
    assert np.abs(made(vectors.numpy()) - expected).max() < 1e-5
    assert (made.source, made.target, made.method) == ("a", "b", "test")
    made.save(tmp_path / "t.safetensors")
    assert VectorTransform.load(tmp_path / "t.safetensors").fingerprint == made.fingerprint


@pytest.mark.parametrize("normalize", [True, False])
def test_a_chain_becomes_one_transform_from_its_first_space_to_its_last(normalize):
    chain = TransformChain([
        disturbed(ForwardTransform(4, 6, source="1", target="2")),
        disturbed(ForwardTransform(6, 6, norm="layer", residual=True, source="2", target="3")),
        disturbed(ForwardTransform(6, 3, norm=None, source="3", target="4")),
    ])  # fmt: skip
    composed = chain.compose(["1", "2", "3", "4"], normalize=normalize)
    made = to_vector_transform(composed)
    vectors = torch.randn(20, 4)
    with torch.no_grad():
        expected = F.normalize(composed(vectors)).numpy()
    assert np.abs(made(vectors.numpy()) - expected).max() < 1e-5
    assert (made.source, made.target, made.dim_in, made.dim_out) == ("1", "4", 4, 3)


def test_batch_norm_without_gain_and_with_tiny_variance_is_kept_to_five_digits():
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Dropout(0.5), nn.Linear(5, 3)).eval()
    module[1].running_var.fill_(1e-9)
    module[1].running_mean.normal_()
    vectors = torch.randn(9, 4)
    with torch.no_grad():
        expected = F.normalize(module(vectors)).numpy()
    assert np.abs(to_vector_transform(module, **ENDS)(vectors.numpy()) - expected).max() < 1e-5


def test_layer_norm_without_gain_is_served():
    module = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5, elementwise_affine=False)).eval()
    vectors = torch.randn(9, 4)
    expected = F.normalize(module(vectors)).detach().numpy()
    assert np.abs(to_vector_transform(module, **ENDS)(vectors.numpy()) - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.GELU()), "GELU"),
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3, eps=1e-3)), "LayerNorm"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)), "running"),
        (nn.ReLU(), "no linear layer"),
    ],
)
def test_a_layer_without_a_counterpart_is_named(module, message):
    with pytest.raises(InputError, match=message):
        to_vector_transform(module, **ENDS)


def test_a_transform_without_a_direction_is_refused():
    with pytest.raises(InputError, match="from one space to another"):
        to_vector_transform(ReverseQueryTransform(3, 3))
