"""MV-Former's network against the authors' numbers (data/mv-former/README.md), and what must hold for any input."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from bowerbird.errors import InputError
from bowerbird_videotext.mv_former import (
    FixedWidthTokens,
    LateFusionVideoTransformer,
    LearnableSpatialTokenPooling,
    MultiEntityVideoTransformer,
    ProjectionHead,
    temporal_position_table,
)

Golden = Callable[[str], dict[str, Any]]
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def load_pooling(pooling: LearnableSpatialTokenPooling, g: dict[str, Any], prefix: str = "") -> None:
    names = {
        "queries": "Q_s", "query_bias": "Q_s_b", "key.weight": "linear_K2d.weight", "key.bias": "linear_K2d.bias",
        "value.weight": "linear_V2d.weight", "value.bias": "linear_V2d.bias",
        "dynamic.weight": "in2dynQ.weight", "dynamic.bias": "in2dynQ.bias",
    }  # fmt: skip
    own = pooling.state_dict()
    for name in own:
        value = g[f"{prefix}{names[name]}"]
        own[name] = value[0] if name == "queries" else value
    pooling.load_state_dict(own)


def load_transformer(model: MultiEntityVideoTransformer, g: dict[str, Any]) -> None:
    """Official names to ours: the three projections of an attention are one matrix here."""
    state = {}
    for name in model.mlp.state_dict():  # dropout, linear, norm, ReLU, dropout, ... on both sides
        if "num_batches" not in name:
            state[f"mlp.{name}"] = g[f"param.fc_layers.{name}"]
    for part in ("weight", "bias"):
        state[f"to_hidden.{part}"] = g[f"param.video_emb.{part}"]
        state[f"to_embedding.{part}"] = g[f"param.embedding_layer.{part}"]
    layers = {int(match[1]) for name in g if (match := re.search(r"enc_layers\.(\d+)\.", name))}
    for i in layers:
        old, new = f"param.video_encoder.enc_layers.{i}", f"transformer.layers.{i}"
        for part in ("weight", "bias"):
            state[f"{new}.norm1.{part}"] = g[f"{old}.res_layer0.norm.{part}"]
            state[f"{new}.norm2.{part}"] = g[f"{old}.res_layer1.norm.{part}"]
            state[f"{new}.self_attn.in_proj_{part}"] = torch.cat(
                [g[f"{old}.self_att.linear_{x}2d.{part}"] for x in "QKV"]
            )
            state[f"{new}.self_attn.out_proj.{part}"] = g[f"{old}.self_att.linear_d2Q.{part}"]
            state[f"{new}.linear1.{part}"] = g[f"{old}.feed_forward.fc1.{part}"]
            state[f"{new}.linear2.{part}"] = g[f"{old}.feed_forward.fc2.{part}"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    left = [name for name in missing if "num_batches" not in name and not name.startswith("pooling")]
    assert not unexpected and not left
    if isinstance(model.pooling, LearnableSpatialTokenPooling):
        load_pooling(model.pooling, g, "param.pooling.cross_att.")


def golden_settings(g: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden": g["hidden"], "layers": g["num_layers"], "heads": g["num_heads"], "ffn": g["d_ff"],
        "embedding_dim": g["embedding_size"], "train_frames": g["train_num_frames"],
        "mlp_widths": g["fc_widths"].tolist(),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize("name", ["lstp_static", "lstp_static_dynamic", "lstp_valpass_lnkeys_disjoint"])
def test_pooling_gives_the_authors_tokens_and_gradients(golden: Golden, name: str) -> None:
    g = golden(f"mv-former/{name}")
    pooling = LearnableSpatialTokenPooling(
        g["patch_features"].shape[-1], g["pool_channels"], g["num_static"], g["num_dynamic"], g["dynamic_control"],
        g["value_passthrough"], g["l2_normalize_keys"], g["disjoint"],
    ).double()  # fmt: skip
    load_pooling(pooling, g, "param.")
    patches = g["patch_features"][None].requires_grad_()
    frames = None
    if g["num_dynamic"]:
        frames = g["dynamic_input"][None].requires_grad_()
    tokens, attention = pooling(patches, frames)
    assert_close(tokens[0], g["out"][:, 0], **CLOSE)
    assert_close(attention[0], g["attention"], **CLOSE)
    (tokens[0] * g["cotangent"][:, 0]).sum().backward()
    assert_close(patches.grad[0], g["grad_patch_features"], **CLOSE)
    assert_close(pooling.queries.grad, g["grad.Q_s"][0], **CLOSE)
    assert_close(pooling.query_bias.grad, g["grad.Q_s_b"], **CLOSE)
    assert_close(pooling.key.weight.grad, g["grad.linear_K2d.weight"], **CLOSE)
    if frames is not None:
        assert_close(frames.grad[0], g["grad_dynamic_input"], **CLOSE)
        assert_close(pooling.dynamic.weight.grad, g["grad.in2dynQ.weight"], **CLOSE)


@settings(max_examples=10, deadline=None)
@given(
    patches=st.integers(1, 9), static=st.integers(1, 4), dynamic=st.integers(0, 2), keys=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_order_of_patches_says_nothing_and_attention_sums_to_one(
    patches: int, static: int, dynamic: int, keys: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    pooling = LearnableSpatialTokenPooling(5, 4, static, dynamic, normalize_keys=keys).double()
    x, frames = torch.randn(2, 3, patches, 5).double(), torch.randn(2, 3, 5).double()
    order = torch.randperm(patches)
    tokens, attention = pooling(x, frames)
    assert tokens.shape == (2, 3, static + dynamic, 4) and attention.shape == (2, 3, static + dynamic, patches)
    assert_close(pooling(x[:, :, order], frames)[0], tokens)
    assert_close(attention.sum(dim=-1), torch.ones(2, 3, static + dynamic).double())
    pooling.queries.data = pooling.queries.data.flip(0)
    assert_close(pooling(x, frames)[0][:, :, :static], tokens[:, :, :static].flip(2))


def test_disjoint_gives_a_patch_to_one_entity() -> None:
    pooling = LearnableSpatialTokenPooling(5, 4, 3, disjoint=True)
    x = torch.randn(2, 3, 8, 5)
    attention = pooling(x)[1]
    assert ((attention > 0).sum(dim=-2) == 1).all()
    assert (attention.sum(dim=-1) <= 1 + 1e-6).all()
    pooling.disjoint = False
    plain = pooling(x)[1]
    assert_close(attention, plain * (plain == plain.amax(dim=-2, keepdim=True)))  # and is not normalised again


def test_dynamic_queries_come_from_the_frame_the_first_frame_or_the_mean() -> None:
    x, frames = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 7)
    made = LearnableSpatialTokenPooling(5, 4, 0, 2, global_channels=7)
    by_frame = made(x, frames)[0]
    made.dynamic_control = "first"
    assert_close(made(x, frames)[0], made(x, frames[:, :1].expand(-1, 4, -1))[0])
    assert_close(made(x, frames)[0][:, 0], by_frame[:, 0])
    valid = torch.tensor([[False, True, True, True], [True, True, False, False]])
    assert_close(made(x, frames, valid)[0][0], made(x[:1], frames[:1, 1:2].expand(-1, 4, -1))[0][0])
    made.dynamic_control = "average"
    mean = frames.mean(dim=1, keepdim=True).expand(-1, 4, -1)
    assert_close(made(x, frames)[0], made(x, mean)[0])
    half = frames[1:, :2].mean(dim=1, keepdim=True).expand(-1, 4, -1)
    assert_close(made(x, frames, valid)[0][1], made(x[1:], half)[0][0])


def test_pooling_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="at least one query"):
        LearnableSpatialTokenPooling(5, num_static=0)
    with pytest.raises(InputError, match="separate, first, average"):
        LearnableSpatialTokenPooling(5, dynamic_control="last")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"expected \(clips, frames, patches, 5\)"):
        LearnableSpatialTokenPooling(5)(torch.zeros(2, 3, 4, 6))
    with pytest.raises(InputError, match="found none"):
        LearnableSpatialTokenPooling(5, num_dynamic=1)(torch.zeros(2, 3, 4, 5))
    with pytest.raises(InputError, match="global_features of 7"):
        FixedWidthTokens(7)(torch.zeros(2, 3, 4, 5))


# ---------------------------------------------------------------------------------------------------- positions


def test_position_tables_are_the_authors(golden: Golden) -> None:
    g = golden("mv-former/temporal_position_table")
    for i in range(3):
        frames, dim, trained = (g[f"{name}_{i}"] for name in ("seq_len", "d_model", "train_len"))
        table = temporal_position_table(frames, dim, trained, dtype=torch.float64)
        assert_close(table, g[f"table_{i}"], **CLOSE)


@settings(max_examples=15, deadline=None)
@given(frames=st.integers(2, 30), trained=st.integers(2, 30), dim=st.integers(1, 12))
def test_positions_begin_at_0_and_end_where_training_ended(frames: int, trained: int, dim: int) -> None:
    plain = temporal_position_table(trained, dim, dtype=torch.float64)
    table = temporal_position_table(frames, dim, trained, dtype=torch.float64)
    assert_close(table[0], plain[0])
    assert_close(table[-1], plain[-1])
    if frames == trained:
        assert_close(table, plain)


# ---------------------------------------------------------------------------------------------------- the transformer


@pytest.mark.parametrize("name", ["one", "avg_masked_resampled_positions", "max_onehot_enc"])
def test_the_transformer_gives_the_authors_embeddings_and_gradients(golden: Golden, name: str) -> None:
    g = golden(f"mv-former/encoder_final_{name}")
    channels = g["features"].shape[2]
    model = MultiEntityVideoTransformer(
        LearnableSpatialTokenPooling(channels, g["pool_channels"], g["num_tokens"], g["num_dynamic"]),
        entity_one_hot=g["one_hot"], reduction=g["final_pool"], **golden_settings(g),
    )  # fmt: skip
    check_against(model, g)


def test_the_baseline_gives_the_authors_embeddings_and_gradients(golden: Golden) -> None:
    g = golden("mv-former/late_fusion_baseline")
    check_against(LateFusionVideoTransformer("max", g["features"].shape[2], **golden_settings(g)), g)


def check_against(model: MultiEntityVideoTransformer, g: dict[str, Any]) -> None:
    model = model.double().eval()
    load_transformer(model, g)
    maps = g["features"].requires_grad_()
    patches = maps.flatten(3).transpose(2, 3)
    out = model(patches, g["frame_valid"][:, 0] if "frame_valid" in g else None)
    assert_close(out, g["out"], **CLOSE)
    (out * g["cotangent"]).sum().backward()
    assert_close(maps.grad, g["grad_features"], **CLOSE)


def test_the_projection_head_is_the_authors(golden: Golden) -> None:
    g = golden("mv-former/projection_head")
    head = ProjectionHead(5, 7).double()
    names = {"layers.": "param.net."}
    state = {key: g[key.replace("layers.", names["layers."])] for key in head.state_dict() if "num_b" not in key}
    head.load_state_dict(state, strict=False)
    assert_close(head.eval()(g["embeddings"]), g["out_eval"], **CLOSE)
    assert_close(head.train()(g["embeddings"]), g["out_train"], **CLOSE)


def small(reduction: str = "one", one_hot: str = "pool", entities: int = 3, **more: Any) -> MultiEntityVideoTransformer:
    pooling = LearnableSpatialTokenPooling(5, 4, entities, **more)
    return (
        MultiEntityVideoTransformer(
            pooling,
            16,
            2,
            4,
            24,
            6,
            one_hot,
            reduction,
            5,
            mlp_widths=(10, 10),  # type: ignore[arg-type]
        )
        .double()
        .eval()
    )


@pytest.mark.parametrize("reduction", ["one", "avg", "max", "lin"])
def test_frames_that_are_not_there_change_nothing(reduction: str) -> None:
    model = small(reduction)
    x = torch.randn(2, 7, 6, 5).double()
    valid = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 1, 1]]).bool()
    out = model(x, valid)
    other = torch.where(valid[:, :, None, None], x, torch.randn_like(x))
    assert_close(model(other, valid)[valid], out[valid])
    assert not torch.allclose(model(other)[valid], out[valid])  # without the mask they do


def test_one_uniform_entity_is_the_baseline_with_a_linear_layer_more() -> None:
    model = small(one_hot="none", entities=1)
    model.pooling.queries.data.zero_()
    model.pooling.query_bias.data.zero_()
    baseline = LateFusionVideoTransformer("avg", 4, 16, 2, 4, 24, 6, 5, mlp_widths=(10, 10)).double().eval()
    own = {key: value for key, value in model.state_dict().items() if not key.startswith("pooling.")}
    baseline.load_state_dict(own)
    x = torch.randn(2, 5, 6, 5).double()
    assert_close(model(x), baseline(model.pooling.value(x)))


@pytest.mark.parametrize("reduction", ["avg", "max"])
def test_without_one_hot_rows_entities_can_be_exchanged(reduction: str) -> None:
    model = small(reduction, "none")
    x = torch.randn(2, 5, 6, 5).double()
    out = model(x)
    model.pooling.queries.data = model.pooling.queries.data[[2, 0, 1]]
    assert_close(model(x), out)


@pytest.mark.parametrize("entities", [1, 3])
def test_the_last_layer_gives_entity_0_what_it_gives_among_all(entities: int) -> None:
    whole, one = small("avg", entities=entities), small("one", entities=entities)
    one.load_state_dict(whole.state_dict())
    x, valid = torch.randn(2, 7, 6, 5).double(), torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 1, 1]])
    of_all: list[torch.Tensor] = []
    whole.transformer.layers[-1].register_forward_hook(lambda _m, _i, out: of_all.append(out))
    with torch.enable_grad():
        whole(x, valid)
        assert_close(one(x, valid), one.to_embedding(of_all[0].view(2, entities, 7, 16)[:, 0]))


def test_layers_start_as_copies_of_one() -> None:
    first, second = small().transformer.layers
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_fixed_width_baseline_reads_global_features_alone() -> None:
    model = MultiEntityVideoTransformer(FixedWidthTokens(7, 4, 3), 16, 1, 4, 24, 6, train_frames=5).eval()
    frames = torch.randn(2, 5, 7)
    out = model(torch.randn(2, 5, 6, 5), global_features=frames)
    assert out.shape == (2, 5, 6)
    assert_close(model(torch.randn(2, 5, 6, 5), global_features=frames), out)
    baseline = LateFusionVideoTransformer("cls", 7, 16, 1, 4, 24, 6, 5).eval()
    assert baseline(torch.randn(2, 5, 6, 5), global_features=frames).shape == (2, 5, 6)


def test_the_transformer_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="one, avg, max, lin"):
        small("mean")
    with pytest.raises(InputError, match="divided among"):
        MultiEntityVideoTransformer(LearnableSpatialTokenPooling(5), 10, heads=4)
    with pytest.raises(InputError, match="layers = 0"):
        MultiEntityVideoTransformer(LearnableSpatialTokenPooling(5), layers=0)
    with pytest.raises(InputError, match=r"expected \(2, 5\)"):
        small()(torch.zeros(2, 5, 6, 5).double(), torch.ones(2, 4))
