"""mc-BEiT: the official numbers, what holds for every input, the schedule, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from token_world import SMALL, ColourTokenizer, compare_gradients, context_with, from_golden
from torch import Tensor

from bowerbird.errors import InputError
from bowerbird.protocols import BuildContext
from bowerbird.testing import ObjectiveContract, assert_close
from bowerbird_mim.beit import MaskedTokenModel, RandomMaskGenerator, masked_token_loss
from bowerbird_mim.beit_vit import BEiTEncoder, BEiTViTConfig
from bowerbird_mim.mc_beit import (
    McBEiTConfig,
    McBEiTObjective,
    mean_perplexity,
    multi_choice_loss,
    patch_similarity,
    refine_choices,
    soft_choices,
)


class TestContract(ObjectiveContract):
    name = "mim:mc-beit"
    config = {"tokenizer": "runs/t"}
    image_size = 16

    def make_encoder(self) -> BEiTEncoder:
        return BEiTEncoder.build(BEiTViTConfig(**SMALL))

    def make_context(self) -> BuildContext:
        return context_with(ColourTokenizer())


# ------------------------------------------------------------------------------------------------ official numbers


def test_a_whole_step(golden) -> None:
    values = golden("mc-beit/model_step")
    model, mask = from_golden(values), values["bool_masked_pos"]
    features, logits = model(values["images"], mask)
    assert_close(features, values["features"])
    assert_close(logits, values["logits"])
    choices = soft_choices(values["tokenizer_logits"], values["temp"])
    refined = refine_choices(choices, features, values["omega"], values["temp_sim"])
    loss = multi_choice_loss(logits, refined, mask)
    assert_close(loss, values["loss"])
    loss.backward()
    compare_gradients(model, values)


def test_the_objective_takes_that_step(golden) -> None:
    values = golden("mc-beit/model_step")

    class Recorded(ColourTokenizer):
        def logits(self, images: Tensor) -> Tensor:
            return values["tokenizer_logits"]

    model = from_golden(values)
    objective = McBEiTObjective(
        Recorded(vocab_size=values["vocab_size"]),
        values["temp"],
        model=model,
        refine_weight=values["omega"],
        similarity_temperature=values["temp_sim"],
    )
    batch = {"image": values["images"], "tokenizer_image": values["images"], "token_mask": values["bool_masked_pos"]}
    output = objective(batch)
    assert_close(output.total, values["loss"])
    output.total.backward()
    compare_gradients(model, values)
    q = values["tokenizer_logits"].div(values["temp"]).softmax(dim=1)
    assert_close(output.stats["choice_perplexity"], (-(q * q.log()).sum(dim=1)).exp().mean())


@pytest.mark.parametrize("reading", ["official", "detached"])
def test_both_readings_of_the_gradient(golden, reading: str) -> None:
    values = golden("mc-beit/multi_choice_loss")
    features, outputs = values["feats"].requires_grad_(), values["outputs"].requires_grad_()
    choices = soft_choices(values["tokenizer_logits"], values["temp"])
    assert_close(choices, values["q"])
    assert_close(patch_similarity(features, values["temp_sim"]), values["W"])
    refined = refine_choices(
        choices, features, values["omega"], values["temp_sim"], detach_similarity=reading == "detached"
    )
    assert_close(refined, values["q_refined"])
    loss = multi_choice_loss(outputs, refined, values["bool_masked_pos"])
    assert_close(loss, values["loss"])
    loss.backward()
    assert_close(outputs.grad, values[f"grad_outputs.{reading}"])
    if reading == "detached":
        assert features.grad is None and not values["grad_feats.detached"].any()
    else:
        assert_close(features.grad, values["grad_feats.official"])
    assert torch.equal(choices.argmax(dim=-1), values["hard_ids"])


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_random_masks(golden, case: str) -> None:
    values = golden("mc-beit/random_mask")
    generator = RandomMaskGenerator(tuple(values[f"{case}.grid"].tolist()), values[f"{case}.mask_ratio"])
    mask = generator(np.random.RandomState(values[f"{case}.numpy_legacy_seed"]))
    assert torch.equal(mask.flatten(), values[f"{case}.mask"].bool())
    assert mask.sum() == generator(np.random.default_rng(0)).sum() == values[f"{case}.num_mask"]


# ------------------------------------------------------------------------------------------------ invariants

sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(2, 6), st.integers(1, 5))


def drawn(size: tuple[int, int, int, int, int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokenizer logits, features, model logits and a mask that hides at least one patch."""
    n, rows, columns, v, d = size
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    mask = torch.rand(n, rows * columns, generator=generator) < 0.5
    mask[0, 0] = True
    return 3 * randn(n, v, rows, columns), randn(n, rows * columns, d), randn(n, rows * columns, v), mask


@settings(max_examples=25, deadline=None)
@given(size=sizes, seed=st.integers(0, 1000))
@example(size=(3, 3, 3, 3, 1), seed=760)
def test_single_choices_are_beit(size: tuple[int, int, int, int, int], seed: int) -> None:
    teacher, features, logits, mask = drawn(size, seed)
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    # So cold that two logits of almost one size, which some seeds draw, are told apart, too.
    refined = refine_choices(soft_choices(teacher, 1e-9), features, refine_weight=0.0)
    soft = multi_choice_loss(one, refined, mask)
    hard = masked_token_loss(other[mask], teacher.argmax(dim=1).flatten(1)[mask])
    assert_close(soft, hard)
    soft.backward()
    hard.backward()
    assert_close(one.grad, other.grad)


@settings(max_examples=25, deadline=None)
@given(size=sizes, seed=st.integers(0, 1000), weight=st.floats(0, 1), scale=st.floats(0.01, 100))
def test_refined_choices_are_distributions_and_no_scale_of_the_features_matters(
    size: tuple[int, int, int, int, int], seed: int, weight: float, scale: float
) -> None:
    teacher, features, logits, mask = drawn(size, seed)
    choices = soft_choices(teacher, 2.0)
    refined = refine_choices(choices, features, weight, 0.5)
    assert (refined >= 0).all()
    assert_close(refined.sum(dim=-1), torch.ones_like(refined[..., 0]))
    assert_close(refine_choices(choices, scale * features, weight, 0.5), refined, rtol=1e-8)

    weights = patch_similarity(features, 0.5)
    assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
    assert (weights.diagonal(dim1=1, dim2=2)[..., None] >= weights - 1e-12).all()

    entropy = -(refined * refined.log()).sum(dim=-1)[mask].mean()
    assert multi_choice_loss(logits, refined, mask) >= entropy - 1e-12
    assert_close(multi_choice_loss(refined.log(), refined, mask), entropy)

    order = torch.randperm(features.shape[1])
    again = refine_choices(choices[:, order], features[:, order], weight, 0.5)
    assert_close(multi_choice_loss(logits[:, order], again, mask[:, order]), multi_choice_loss(logits, refined, mask))


def test_equal_features_share_all_choices_equally() -> None:
    teacher, features, _, _ = drawn((2, 2, 3, 5, 4), 0)
    choices = soft_choices(teacher, 1.0)
    equal = features[:, :1].expand_as(features)
    assert_close(patch_similarity(equal), torch.full((2, 6, 6), 1 / 6, dtype=torch.float64))
    wanted = 0.3 * choices.mean(dim=1, keepdim=True) + 0.7 * choices
    assert_close(refine_choices(choices, equal, 0.3), wanted)


def test_an_endless_temperature_forgets_the_tokenizer() -> None:
    teacher, features, logits, mask = drawn((2, 3, 3, 6, 4), 0)
    loss = multi_choice_loss(logits, refine_choices(soft_choices(teacher, 1e12), features), mask)
    assert_close(loss, -logits.log_softmax(dim=-1)[mask].mean(), rtol=1e-9)


def test_the_similarity_passes_a_gradient_unless_it_is_detached() -> None:
    teacher, features, logits, mask = drawn((2, 3, 3, 6, 4), 0)
    for detach in (False, True):
        h = features.clone().requires_grad_()
        refined = refine_choices(soft_choices(teacher, 1.0), h, 0.2, detach_similarity=detach)
        assert refined.requires_grad is not detach
        if not detach:
            multi_choice_loss(logits, refined, mask).backward()
            assert h.grad.abs().sum() > 0


def test_targets_keep_full_precision_under_autocast() -> None:
    teacher, features, _, _ = drawn((2, 3, 3, 6, 4), 0)
    teacher, features = teacher.float(), features.float()
    plain = refine_choices(soft_choices(teacher, 1.0), features, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(refine_choices(soft_choices(teacher, 1.0), features, 1.0), plain, rtol=1e-6)


def test_perplexity_counts_the_choices() -> None:
    assert_close(mean_perplexity(torch.eye(5)), 1.0)
    assert_close(mean_perplexity(torch.full((3, 5), 0.2)), 5.0, rtol=1e-6)


# ------------------------------------------------------------------------------------------------ schedule, refusals


def build(**settings: object) -> McBEiTObjective:
    tokenizer = ColourTokenizer()
    encoder = BEiTEncoder.build(BEiTViTConfig(**SMALL))
    return McBEiTObjective.build(McBEiTConfig(tokenizer="runs/t", **settings), encoder, context_with(tokenizer))


def test_the_temperature_goes_linearly_to_its_value() -> None:
    objective = build(temperature=4.0, warmup_temperature=1.0, warmup_epochs=4)
    seen = []
    for epoch in range(6):
        objective.on_epoch_start(epoch)
        seen.append(objective.temperature)
    assert seen == [1.0, 2.0, 3.0, 4.0, 4.0, 4.0]
    assert build().temperature == 4.0


def test_masks_are_random_or_blocks() -> None:
    assert isinstance(build().views.mask, RandomMaskGenerator)
    assert build().views.mask.num_masked == 12
    assert build(mask="block", num_mask_patches=5).views.mask.num_masked == 5


def test_what_does_not_fit_is_refused() -> None:
    teacher, features, logits, mask = drawn((2, 2, 3, 5, 4), 0)
    choices = soft_choices(teacher, 1.0)
    with pytest.raises(InputError, match="temperature = 0"):
        soft_choices(teacher, 0)
    with pytest.raises(InputError, match=r"expected \(N, V, rows, columns\)"):
        soft_choices(logits, 1.0)
    with pytest.raises(InputError, match=r"refine_weight = 1\.5: expected a share from 0 to 1"):
        refine_choices(choices, features, 1.5)
    with pytest.raises(InputError, match="similarity_temperature = -1"):
        refine_choices(choices, features, 0.2, -1)
    with pytest.raises(InputError, match="do not fit"):
        refine_choices(choices, features[:, 1:])
    with pytest.raises(InputError, match="no masked position"):
        multi_choice_loss(logits, choices, torch.zeros_like(mask))
    with pytest.raises(InputError, match="do not fit"):
        multi_choice_loss(logits, choices[..., 1:], mask)
    with pytest.raises(ValidationError):
        McBEiTConfig(tokenizer="runs/t", mask_ratio=1.0)
    model = MaskedTokenModel(BEiTEncoder(**SMALL), 6)
    for name, value in (
        ("temperature", math.nan),
        ("refine_weight", -0.1),
        ("warmup_temperature", 0.0),
        ("warmup_epochs", -1),
    ):
        with pytest.raises(InputError, match=name):
            McBEiTObjective(ColourTokenizer(), model=model, **{name: value})
