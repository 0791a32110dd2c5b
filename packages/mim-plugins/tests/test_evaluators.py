"""Protocols with labels: the official numbers of LARS, of the schedule and of layer decay, and what always holds."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bowerbird.errors import InputError
from bowerbird.protocols import Encoder, EvalContext
from bowerbird.registry import get_registry
from bowerbird.testing import EvaluatorContract, assert_close
from bowerbird.testing.datasets import SyntheticDataset
from bowerbird.testing.evaluators import SimpleEvalContext
from bowerbird.testing.training import TinyEncoder
from bowerbird_mim.beit_vit import BEiTEncoder, BEiTViTConfig
from bowerbird_mim.evaluators import (
    KNN,
    Finetune,
    FinetuneConfig,
    KNNConfig,
    LinearProbe,
    LinearProbeConfig,
    seeded,
    set_drop_path,
)
from bowerbird_mim.features import frozen_features, run_blocks, transformer_of
from bowerbird_mim.optim import LARS, layer_decay_groups, layer_id, warmup_cosine
from bowerbird_mim.part_vit import PartViTConfig, PartViTEncoder
from bowerbird_mim.vit import ViTConfig, ViTEncoder

SMALL: dict[str, Any] = {"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2}
ENCODERS = {
    "vit": lambda: ViTEncoder.build(ViTConfig(**SMALL)),
    "beit": lambda: BEiTEncoder.build(BEiTViTConfig(**SMALL)),
    "part": lambda: PartViTEncoder.build(PartViTConfig(**SMALL)),
}


def context(encoder: Encoder | None = None, items: int = 24, classes: int = 3) -> EvalContext:
    torch.manual_seed(0)
    return SimpleEvalContext(encoder or ENCODERS["vit"](), default=SyntheticDataset(items, classes))


class TestKNNContract(EvaluatorContract):
    name = "mim:knn"
    config = {"dataset": "any", "ks": [1, 5], "samples": 20}

    def make_context(self) -> EvalContext:
        return context()


class TestLinearProbeContract(EvaluatorContract):
    name = "mim:linear-probe"
    config = {"dataset": "any", "epochs": 3, "warmup_epochs": 1, "samples": 20}

    def make_context(self) -> EvalContext:
        return context()


class TestFinetuneContract(EvaluatorContract):
    name = "mim:finetune"
    config = {"dataset": "any", "epochs": 2, "warmup_epochs": 1, "chunk": 16, "samples": 20}

    def make_context(self) -> EvalContext:
        return context()


# ------------------------------------------------------------------------------------------------ official numbers


def test_lars_makes_the_official_steps(golden) -> None:
    values = {key.removeprefix("lars."): value for key, value in golden("mae/schedule_and_optim").items()}
    weight, bias = nn.Parameter(values["w0"].clone()), nn.Parameter(values["b0"].clone())
    options = {key: values[key] for key in ("lr", "weight_decay", "momentum", "trust_coefficient")}
    optimizer = LARS([weight, bias], **options)
    for step in (1, 2):
        weight.grad, bias.grad = values[f"gw{step}"].clone(), values[f"gb{step}"].clone()
        optimizer.step()
        assert_close(weight.detach(), values[f"w{step}"])
        assert_close(bias.detach(), values[f"b{step}"])


def test_the_learning_rate_follows_the_official_schedule(golden) -> None:
    values = golden("mae/schedule_and_optim")
    rates = [
        warmup_cosine(
            epoch,
            lr=values["base_lr"],
            epochs=values["epochs"],
            warmup_epochs=values["warmup_epochs"],
            min_lr=values["min_lr"],
        )
        for epoch in values["epochs_t"].tolist()
    ]
    assert_close(torch.tensor(rates, dtype=torch.float64), values["lr"])


def test_layers_get_the_official_learning_rates_and_weight_decay(golden) -> None:
    values = golden("mae/schedule_and_optim")
    names, scales, decays = values["param_names"], values["lr_scale"].tolist(), values["weight_decay"].tolist()
    module = nn.Module()
    for name in names:
        *parents, leaf = name.split(".")
        owner = module
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        shape = (4,) if leaf == "bias" or "norm" in name else (1, 4, 4)
        owner.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
    found = {}
    for group in layer_decay_groups(module, num_blocks=values["num_blocks"], layer_decay=values["layer_decay"]):
        found |= {id(p): (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    for name, scale, weight_decay in zip(names, scales, decays, strict=True):
        assert found[id(module.get_parameter(name))] == (pytest.approx(scale, rel=1e-12), weight_decay), name


# ------------------------------------------------------------------------------------------------ optimisation


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("cls_token", 0), ("encoder.pos_embed", 0), ("patch_embed.proj.weight", 0), ("mask_token", 0),
        ("encoder.vit.part_token2", 0), ("vit.part1_pos", 0), ("vit.cls_pos", 0),
        ("blocks.0.attn.qkv.weight", 1), ("encoder.vit.blocks.11.mlp.fc1.bias", 12),
        ("blocks.3.attn.relative_position_bias_table", 4),
        ("rel_pos_bias.relative_position_bias_table", 13), ("norm.weight", 13), ("fc_norm.bias", 13), ("head.bias", 13),
    ],
)  # fmt: skip
def test_the_depth_of_a_parameter_is_read_from_its_name(name: str, depth: int) -> None:
    assert layer_id(name, num_blocks=12) == depth


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_parameter_is_in_one_group_and_deeper_layers_learn_faster(kind: str) -> None:
    encoder = ENCODERS[kind]().requires_grad_(True)
    groups = layer_decay_groups(encoder, num_blocks=4, layer_decay=0.5)
    seen = [id(p) for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in encoder.parameters())
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    blocks = transformer_of(encoder).blocks
    assert [scale[id(block.norm1.weight)] for block in blocks] == [0.5**i for i in (4, 3, 2, 1)]


@settings(max_examples=20, deadline=None)
@given(factor=st.floats(0.01, 100), seed=st.integers(0, 1000))
def test_the_first_step_of_lars_has_the_length_of_the_weight_and_not_of_the_gradient(factor: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start, grad = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    weight.grad = grad * factor
    LARS([weight], lr=0.5, trust_coefficient=0.01).step()
    assert float((weight.detach() - start).norm() / start.norm()) == pytest.approx(0.5 * 0.01)


def test_a_weight_of_zero_takes_the_plain_gradient_with_lars() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    LARS([weight], lr=0.5).step()
    assert torch.equal(weight.detach(), torch.full((2, 2), -0.5))


# ------------------------------------------------------------------------------------------------ features


@pytest.mark.parametrize("kind", ENCODERS)
def test_features_are_tokens_after_the_final_norm(kind: str) -> None:
    encoder = ENCODERS[kind]().eval()
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        features, outputs = run_blocks(encoder, images, 4)
        part = transformer_of(encoder)
        last = part.norm(outputs[-1])
        by_kind = {name: frozen_features(encoder, images, name) for name in ("class", "mean", "class-mean", "class-4")}
    assert torch.equal(by_kind["class"], last[:, 0])
    assert_close(by_kind["mean"], last[:, -4:].mean(dim=1))  # 2 x 2 patches lie behind class and part tokens
    assert torch.equal(by_kind["class-mean"], torch.cat([by_kind["class"], by_kind["mean"]], dim=1))
    assert torch.equal(by_kind["class-4"], torch.cat([part.norm(o)[:, 0] for o in outputs], dim=1))
    assert features.tokens.shape[1] == 4


def test_of_the_plain_vit_the_features_are_those_of_its_own_forward() -> None:
    images = torch.randn(2, 3, 8, 8)
    for pooling, kind in (("mean", "mean"), ("class", "class")):
        encoder = ViTEncoder.build(ViTConfig(**SMALL, pooling=pooling)).eval()
        with torch.no_grad():
            assert_close(frozen_features(encoder, images, kind), encoder({"image": images}).pooled)


def test_no_hook_stays_on_the_encoder() -> None:
    encoder = ENCODERS["vit"]()
    with pytest.raises(InputError):
        frozen_features(encoder, torch.randn(1, 3, 7, 7), "class")
    frozen_features(encoder, torch.randn(1, 3, 8, 8), "class-4")
    assert all(not block._forward_hooks for block in encoder.blocks)


# ------------------------------------------------------------------------------------------------ protocols


def test_every_item_is_its_own_nearest_neighbour() -> None:
    metrics = KNN.build(KNNConfig(dataset="any", ks=(1,))).run(context())
    assert metrics.summary["top1@1"] == 1.0


def test_all_neighbours_together_vote_for_the_commonest_class_at_a_high_temperature() -> None:
    metrics = KNN.build(KNNConfig(dataset="any", ks=(25,), temperature=1e6)).run(context(items=25))
    assert metrics.summary["top1@25"] == 9 / 25  # colour 0 has 9 of 25 items


@pytest.mark.parametrize("options", [{}, {"augment": False}, {"optimizer": "sgd", "batch_norm": False, "base_lr": 2.0}])
def test_a_linear_probe_tells_colours_apart(options: dict[str, Any]) -> None:
    config = LinearProbeConfig(
        dataset="any",
        epochs=30,
        warmup_epochs=2,
        batch_size=12,
        **({"base_lr": 500.0} | options),
        crop_scale=(0.8, 1.0),
    )
    assert LinearProbe.build(config).run(context()).summary["top1"] >= 0.9


def test_fine_tuning_learns_what_the_frozen_encoder_does_not_tell() -> None:
    plain = {"mixup": 0.0, "cutmix": 0.0, "rand_augment": None, "erasing": 0.0, "drop_path": 0.0, "layer_decay": 1.0}
    config = FinetuneConfig(
        dataset="any", epochs=12, warmup_epochs=1, base_lr=0.1, batch_size=12, crop_scale=(0.8, 1.0), **plain
    )
    assert Finetune.build(config).run(context()).summary["top1"] >= 0.9


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("features", ["mean", "class", "pooled"])
def test_every_transformer_can_be_fine_tuned_with_mixup_and_stochastic_depth(kind: str, features: Any) -> None:
    config = FinetuneConfig(dataset="any", epochs=1, warmup_epochs=0, chunk=9, features=features, samples=2)
    given_to = context(ENCODERS[kind]())
    before = {name: value.clone() for name, value in given_to.encoder.state_dict().items()}
    metrics = Finetune.build(config).run(given_to)
    assert 0 <= metrics.summary["top1"] <= 1
    assert all(torch.equal(value, before[name]) for name, value in given_to.encoder.state_dict().items())


def test_parts_of_a_batch_accumulate_to_the_gradient_of_the_whole() -> None:
    plain = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "epochs": 2, "warmup_epochs": 0, "base_lr": 0.05}
    scores = []
    for chunk in (24, 5):
        evaluator = Finetune.build(FinetuneConfig(dataset="any", chunk=chunk, samples=2, **plain))
        outcomes = evaluator.run(context()).per_query["top1"]
        scores.append(outcomes)
    assert np.array_equal(*scores)


def test_stochastic_depth_grows_linearly_over_the_blocks() -> None:
    encoder = ENCODERS["vit"]()
    set_drop_path(encoder, 0.3)
    assert [getattr(b.drop_path2, "drop_prob", 0.0) for b in encoder.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_the_global_generators_are_left_as_they_were() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    with seeded(3):
        first = random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002
    with seeded(3):
        assert first == (random.random(), np.random.rand(), float(torch.rand(())))  # noqa: NPY002
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def test_labels_of_few_items_are_used_and_the_same_for_one_seed() -> None:
    few = KNNConfig(dataset="any", ks=(1,), train_items=4, seed=5)
    results = [KNN.build(few).run(context()).per_query["top1@1"] for _ in range(2)]
    assert np.array_equal(*results)
    assert results[0].mean() < 1  # four items have not all colours, or not all noise


@pytest.mark.parametrize("name", ["mim:knn", "mim:linear-probe", "mim:finetune"])
def test_presets_are_settings_of_their_protocol(name: str) -> None:
    registry = get_registry()
    record = registry.get("evaluator", name)
    model = registry.load_config(record)
    for preset in record.presets:
        model(dataset="any", **registry.load_preset(record, preset))


# ------------------------------------------------------------------------------------------------ bad input


def refused(evaluator: Any, encoder: Encoder | None = None) -> str:
    with pytest.raises(InputError) as error:
        evaluator.run(context(encoder))
    return str(error.value)


def test_what_cannot_be_measured_is_said() -> None:
    assert "takes no pictures" in refused(KNN.build(KNNConfig(dataset="any")), TinyEncoder())
    assert "expected 1 to 24 neighbours" in refused(KNN.build(KNNConfig(dataset="any", ks=(25,))))
    assert "train_items = 25" in refused(KNN.build(KNNConfig(dataset="any", train_items=25)))
    with pytest.raises(InputError, match="expected one of pooled, class"):
        frozen_features(ENCODERS["vit"](), torch.randn(1, 3, 8, 8), "clas")  # type: ignore[arg-type]


def test_networks_without_transformer_blocks_have_their_embedding_only() -> None:
    encoder = TinyEncoder()
    encoder.preprocessing = ENCODERS["vit"]().preprocessing
    assert "use features = 'pooled'" in refused(LinearProbe.build(LinearProbeConfig(dataset="any")), encoder)
    pooled = {"dataset": "any", "features": "pooled", "epochs": 1, "warmup_epochs": 0}
    assert "layer_decay = 0.65" in refused(Finetune.build(FinetuneConfig(**pooled, drop_path=0.0)), encoder)
    assert "drop_path = 0.1" in refused(Finetune.build(FinetuneConfig(**pooled, layer_decay=1.0)), encoder)
    metrics = Finetune.build(FinetuneConfig(**pooled, layer_decay=1.0, drop_path=0.0)).run(context(encoder))
    assert "top1" in metrics.summary


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LARS([nn.Parameter(torch.ones(2))], lr=0.1, momentum=1.0), "momentum = 1.0"),
        (lambda: layer_decay_groups(nn.Linear(2, 2), num_blocks=1, layer_decay=0.0), "layer_decay = 0.0"),
        (lambda: run_blocks(ENCODERS["vit"](), torch.randn(1, 3, 8, 8), 5), "the encoder has 4"),
    ],
)
def test_settings_out_of_range_are_refused(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("config", [LinearProbeConfig, FinetuneConfig])
def test_a_warm_up_as_long_as_the_training_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match="leaves nothing of epochs = 3"):
        config(dataset="any", epochs=3, warmup_epochs=3)
