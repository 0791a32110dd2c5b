"""What an export of a sparse model promises: the same numbers, from fewer multiplications."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_world import zero_blocks
from torch import nn

from bowerbird.errors import InputError
from bowerbird_sparsity import block_linear
from bowerbird_sparsity.block_linear import BlockLinear, block_shape_of
from bowerbird_sparsity.export import (
    Form,
    apply_forms,
    dense_copy,
    export_sparse,
    is_two_four_pattern,
    linear_layers,
    skipped_layers,
    sparse_forms,
)
from bowerbird_sparsity.layers import RowsLinear, SparseLinear, SparseMlp
from bowerbird_sparsity.shrink import shrink, shrink_report
from bowerbird_sparsity.spartan import Sparsifier, SparsityConfig
from bowerbird_sparsity.timing import largest_difference


def tiny_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=0
    ).eval()


# ------------------------------------------------------------------------------------------------ block layers


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    block=st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8])),
    share=st.floats(0, 1),
    tokens=st.lists(st.integers(0, 7), min_size=0, max_size=3),
    bias=st.booleans(),
    chunk=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_a_block_layer_computes_what_the_dense_layer_computes(
    rows: int, columns: int, block: tuple[int, int], share: float, tokens: list[int], bias: bool, chunk: int, seed: int
) -> None:
    torch.manual_seed(seed)
    dense = nn.Linear(columns * block[1], rows * block[0], bias=bias, dtype=torch.float64)
    zero_blocks(dense, block, share, seed)
    sparse = BlockLinear.of(dense, block)
    x = torch.randn(*tokens, dense.in_features, dtype=torch.float64)
    before = block_linear.CHUNK_TOKENS
    block_linear.CHUNK_TOKENS = chunk
    try:
        with torch.inference_mode():
            torch.testing.assert_close(sparse(x), dense(x), rtol=1e-10, atol=1e-10)
    finally:
        block_linear.CHUNK_TOKENS = before
    assert torch.equal(sparse.dense_weight(), dense.weight)


@pytest.mark.parametrize("blocks", [((8, 8), (8, 8)), ((4, 8), (8, 4)), ((16, 8), (8, 16))])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_a_block_perceptron_computes_what_its_layers_compute_one_after_the_other(
    blocks: tuple[tuple[int, int], tuple[int, int]], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_linear, "CHUNK_TOKENS", 10)
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(32, 64), nn.Linear(64, 32)
    zero_blocks(fc1, blocks[0], share)
    zero_blocks(fc2, blocks[1], share)
    fused = SparseMlp(BlockLinear.of(fc1, blocks[0]), nn.GELU(), BlockLinear.of(fc2, blocks[1]))
    x = torch.randn(3, 11, 32)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), fc2(nn.functional.gelu(fc1(x))), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fused(x[:0]), x[:0])
    for (weight, bias), layer in zip(fused.dense_layers(), (fc1, fc2), strict=True):
        assert bias is not None
        assert torch.equal(weight, layer.weight) and torch.equal(bias, layer.bias)


@pytest.mark.parametrize("layout", ["csr", "bsr"])
def test_a_layer_with_a_sparse_weight_can_be_called_copied_and_moved(layout: str) -> None:
    dense = zero_blocks(nn.Linear(24, 16), (8, 8), 0.5)
    layer = SparseLinear.of(dense, (8, 8) if layout == "bsr" else None)
    for x in (torch.randn(24), torch.randn(5, 24), torch.randn(2, 3, 24), torch.randn(0, 24)):
        for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
            with mode:
                torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-6, check_layout=False)
    twin = copy.deepcopy(layer).double().to("cpu")
    assert twin.weight.dtype == torch.float64 and layer.weight.dtype == torch.float32
    assert torch.equal(twin.dense_weight(), dense.weight.double())


def test_sparse_layers_have_parameters_to_tell_type_and_device() -> None:
    dense = zero_blocks(nn.Linear(8, 8, bias=False), (4, 4), 1.0).double()
    for layer in (BlockLinear.of(dense, (4, 4)), RowsLinear(dense.weight, None), SparseLinear.of(dense)):
        assert next(layer.parameters()).dtype == torch.float64
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_block_layer_says_that_it_gives_no_gradient() -> None:
    layer = BlockLinear.of(nn.Linear(8, 8), (4, 4))
    with pytest.raises(InputError, match="no gradient"):
        layer(torch.randn(2, 8, requires_grad=True))
    with pytest.raises(InputError, match=r"takes \(\.\.\., 8\)"):
        layer(torch.randn(2, 9))


def test_blocks_that_do_not_divide_the_weight_are_refused() -> None:
    with pytest.raises(InputError, match=r"blocks of \(3, 4\) do not divide"):
        BlockLinear.of(nn.Linear(8, 8), (3, 4))


@pytest.mark.parametrize("block", [(16, 16), (32, 8), (4, 64), (64, 64)])
def test_the_blocks_of_a_weight_are_found(block: tuple[int, int]) -> None:
    layer = nn.Linear(256, 256)
    generator = torch.Generator().manual_seed(1)
    kept = torch.rand(256 // block[0], 256 // block[1], generator=generator) >= 0.5
    with torch.no_grad():
        layer.weight.mul_(kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1))
    assert block_shape_of(layer.weight) == block


def test_single_zeros_are_no_blocks() -> None:
    weight = torch.randn(64, 64) * (torch.rand(64, 64) > 0.9)
    assert block_shape_of(weight) is None
    assert block_shape_of(torch.randn(64, 64)) is None


# ------------------------------------------------------------------------------------------------ export_sparse


@pytest.mark.parametrize("format", ["auto", "blocks", "csr", "bsr", "rows"])
@pytest.mark.parametrize("with_sample", [False, True])
def test_an_exported_model_gives_the_vectors_of_the_dense_one(format: str, with_sample: bool) -> None:
    model = zero_blocks(tiny_vit(), (8, 8), 0.9)
    sample = torch.randn(2, 3, 32, 32)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    exported = export_sparse(model, format, sample if with_sample else None)
    assert largest_difference(model, exported, sample) < 1e-5
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items()), "the model changed"
    if format != "rows" and not with_sample:
        assert sparse_forms(exported)
    again = dense_copy(exported)
    assert not sparse_forms(again)
    assert largest_difference(model, again, sample) < 1e-5


def test_what_spartan_trained_in_blocks_is_exported_in_these_blocks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    config = SparsityConfig(target_density=0.25, block_size=(8, 8), allocation="uniform", adjust=False)
    sparsifier = Sparsifier(model, config, total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(40, 32)
    for _ in range(10):
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
        sparsifier.step()
    with pytest.raises(InputError, match="call finalize"):
        export_sparse(model, "blocks")
    final = sparsifier.finalize()
    exported = export_sparse(final, "blocks")
    assert sparse_forms(exported) == {"0": Form("blocks", (8, 8)), "2": Form("blocks", (8, 8))}
    assert largest_difference(final, exported, x) < 1e-5
    assert largest_difference(final, shrink(final, x), x) < 1e-5


def test_a_named_format_without_a_sample_changes_every_layer_that_has_zeros() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    zero_blocks(model[0], (8, 8), 0.5)
    zero_blocks(model[2], (8, 8), 0.5)
    forms = sparse_forms(export_sparse(model, "csr"))
    assert forms == {"0": Form("csr"), "2": Form("csr")}
    assert export_sparse(model, "csr")[0].weight.layout == torch.sparse_csr
    assert sparse_forms(export_sparse(model, "bsr")) == {"0": Form("bsr", (8, 8)), "2": Form("bsr", (8, 8))}


def test_a_layer_that_is_slower_sparse_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    zero_blocks(model, (8, 8), 0.5)

    def seconds(of: str) -> object:
        return lambda calls, **_: {form: 2.0 if str(form).startswith(of) else 1.0 for form in calls}

    monkeypatch.setattr("bowerbird_sparsity.export.time_in_turns", seconds("csr"))
    assert sparse_forms(export_sparse(model, "csr", torch.randn(4, 32))) == {}
    monkeypatch.setattr("bowerbird_sparsity.export.time_in_turns", seconds("dense"))
    assert set(sparse_forms(export_sparse(model, "csr", torch.randn(4, 32)))) == {"0", "2"}


def test_a_model_that_is_one_linear_layer_is_exported_too() -> None:
    layer = zero_blocks(nn.Linear(64, 64), (8, 8), 0.9)
    x = torch.randn(5, 64)
    for format in ("blocks", "csr"):
        exported = export_sparse(layer, format)
        assert set(sparse_forms(exported)) == {""}
        with torch.inference_mode():
            torch.testing.assert_close(exported(x), layer(x), rtol=1e-5, atol=1e-5)


def test_a_layer_that_stands_in_two_places_stays_one_layer() -> None:
    shared = zero_blocks(nn.Linear(16, 16), (4, 4), 0.8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    exported = export_sparse(model, "blocks")
    assert isinstance(exported[0], BlockLinear) and exported[0] is exported[2]
    assert largest_difference(model, exported, torch.randn(3, 16)) < 1e-5


def test_layers_whose_weights_another_module_reads_stay_dense_and_are_named() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    holder = nn.ModuleDict({"block": model, "head": zero_blocks(nn.Linear(16, 16), (4, 4), 0.8)})
    zero_blocks(model, (4, 4), 0.8)
    with torch.no_grad():
        model.self_attn.in_proj_weight[:8] = 0
    assert set(linear_layers(holder)) == {"head"}
    assert "block.linear1" in skipped_layers(holder) and "block.self_attn.in_proj_weight" in skipped_layers(holder)


def test_bad_requests_are_refused_with_what_is_accepted() -> None:
    model = zero_blocks(nn.Sequential(nn.Linear(16, 16)), (4, 4), 0.5)
    with pytest.raises(InputError, match=r"'bsc' is unknown\. Did you mean 'bsr'.*auto, rows, blocks, csr, bsr, 2:4"):
        export_sparse(model, "bsc")
    with pytest.raises(InputError, match="offers none: it has none"):
        export_sparse(nn.Sequential(nn.Conv2d(3, 4, 3)), "csr")
    with pytest.raises(InputError, match="exported already"):
        export_sparse(export_sparse(model, "blocks"), "csr")
    masked = nn.Sequential(nn.Linear(16, 16))
    nn.utils.parametrize.register_parametrization(masked[0], "weight", nn.ReLU())
    with pytest.raises(InputError, match=r"'0' still computes its weight from a mask.*finalize"):
        export_sparse(masked, "csr")
    with pytest.raises(InputError, match=r"no layer 'layers\.0'"):
        apply_forms(copy.deepcopy(model), {"layers.0": Form("csr")})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_processor_has_the_forms_that_torch_multiplies_there(dtype: torch.dtype) -> None:
    model = zero_blocks(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), (8, 8), 0.9).to(dtype)
    x = torch.randn(3, 32).to(dtype)
    for exported in (export_sparse(model, "auto", x), export_sparse(model, "auto"), export_sparse(model, "blocks")):
        assert largest_difference(model, exported, x) < 0.02
    for format in ("csr", "bsr"):
        with pytest.raises(InputError, match=rf"'0' has weights in \w*float16; .* '{format}' takes float32"):
            export_sparse(model, format)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what a machine without a GPU says")
def test_two_of_four_without_a_gpu_names_the_constraints() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.view(-1, 4)[:, :2] = 0
    assert is_two_four_pattern(model[0].weight)
    with pytest.raises(InputError, match=r"needs a CUDA device of compute capability 8\.0.*0: the weight is on 'cpu'"):
        export_sparse(model, "2:4")


def test_the_pattern_two_of_four_is_recognised() -> None:
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 3, 4], [0, 0, 0, 0, 1, 0, 0, 0]])
    assert is_two_four_pattern(weight)
    weight[1, 5:7] = 1
    assert not is_two_four_pattern(weight)
    assert not is_two_four_pattern(torch.zeros(2, 6))


# ------------------------------------------------------------------------------------------------ shrink


def kill_rows(layer: nn.Linear, rows: slice) -> None:
    with torch.no_grad():
        layer.weight[rows] = 0


def test_dead_units_of_a_perceptron_with_batch_norm_are_removed_and_the_outputs_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 20),
        nn.BatchNorm1d(20),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(20, 30),
        nn.GELU(),
        nn.Linear(30, 4),
    )
    with torch.no_grad():
        model(torch.randn(64, 12))  # running statistics
    model.eval()
    kill_rows(model[0], slice(5, 13))
    kill_rows(model[4], slice(0, 10))
    with torch.no_grad():
        model[6].weight[:, 25:] = 0  # five units that nobody reads
    x = torch.randn(9, 12)
    smaller = shrink(model, x)
    assert (smaller[0].out_features, smaller[1].num_features, smaller[4].in_features) == (12, 12, 12)
    assert (smaller[4].out_features, smaller[6].in_features) == (15, 15)
    with torch.inference_mode():
        torch.testing.assert_close(smaller(x), model(x), rtol=1e-5, atol=1e-6)
    assert model[0].out_features == 20, "the model itself changed"


def test_shrinking_a_vision_transformer_removes_units_of_its_perceptrons() -> None:
    model = tiny_vit()
    for block in model.blocks:
        kill_rows(block.mlp.fc1, slice(10, 200))
        with torch.no_grad():
            block.mlp.fc1.bias.normal_()
    smaller, report = shrink_report(model)
    assert [(r.units, r.removed) for r in report] == [(256, 190)] * 2
    assert smaller.blocks[1].mlp.fc1.weight.shape == (66, 64)
    assert largest_difference(model, smaller, torch.randn(2, 3, 32, 32)) < 1e-5


def test_shrinking_in_float64_is_exact_to_rounding() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8, bias=False)).double()
    kill_rows(model[0], slice(0, 7))
    x = torch.randn(5, 8, dtype=torch.float64)
    smaller = shrink(model, x)
    assert smaller[2].bias is not None, "what the dead units added has to go somewhere"
    torch.testing.assert_close(smaller(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_layer_of_dead_units_only_keeps_one() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    kill_rows(model[0], slice(None))
    x = torch.randn(5, 4)
    smaller = shrink(model, x)
    assert smaller[0].out_features == 1
    torch.testing.assert_close(smaller(x), model(x), rtol=1e-5, atol=1e-6)


def test_what_mixes_units_is_never_shrunk() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    kill_rows(model[0], slice(0, 3))
    assert shrink(model)[0].out_features == 6
    shared = nn.Linear(4, 4)
    kill_rows(shared, slice(0, 2))
    assert shrink(nn.Sequential(shared, nn.ReLU(), shared))[0].out_features == 4


class ReadTwice(nn.Module):
    """Hidden units that a second head reads: what an ``nn.Sequential`` does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.body[1](self.body[0](x))
        return self.body[2](hidden), self.head(hidden)


def test_a_model_that_uses_its_layers_in_other_ways_is_not_shrunk() -> None:
    model = ReadTwice()
    kill_rows(model.body[0], slice(0, 3))
    with pytest.raises(InputError, match=r"does not take the sample.*used in ways that its structure does not show"):
        shrink(model, torch.randn(5, 4))


def test_a_model_that_still_has_masks_is_not_shrunk() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    Sparsifier(model, SparsityConfig(target_density=0.5, adjust=False), 2)
    with pytest.raises(InputError, match="'0' still computes its weight from a mask"):
        shrink(model)


def test_removed_units_need_no_sparse_kernel_any_more() -> None:
    model = tiny_vit()
    for block in model.blocks:
        kill_rows(block.mlp.fc1, slice(0, 128))
    exported = export_sparse(shrink(model), "auto", torch.randn(1, 3, 32, 32))
    assert exported.blocks[0].mlp.fc1.weight.shape == (128, 64)
    assert not [name for name in sparse_forms(exported) if "mlp" in name]
