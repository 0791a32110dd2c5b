"""MST: the official numbers of its parts, and what holds for every input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bowerbird.errors import InputError
from bowerbird.testing import ObjectiveContract, SimpleBuildContext, TinyEncoder, assert_close, override_contract_test
from bowerbird_mim.dino import ProjectionHead, SelfDistillation, SelfDistillationLoss
from bowerbird_mim.mst import (
    GlobalImageDecoder,
    MaskedSelfDistillation,
    MSTConfig,
    MSTObjective,
    attention_guided_mask,
    class_attention,
    restoration_loss,
    tokens_and_class_attention,
)
from bowerbird_mim.patches import patchify, unpatchify
from bowerbird_mim.vit import ViTConfig, ViTEncoder

ENCODER = {
    "image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0,
    "position": "learned", "pooling": "class", "init": "truncated",
}  # fmt: skip
SMALL = {"out_dim": 12, "head_hidden": 16, "head_bottleneck": 8, "local_size": 8, "local_crops": 2}


class MSTContract(ObjectiveContract):
    name = "mim:mst"
    config = SMALL
    image_size = 16

    def make_encoder(self) -> ViTEncoder:
        return ViTEncoder.build(ViTConfig(**ENCODER))

    @override_contract_test(reason="the goal moves: the loss rises while the centre settles, so both are held")
    def test_training_on_one_batch_lowers_the_loss(self) -> None:
        self.config = {**self.config, "momentum_teacher": 1.0, "center_momentum": 1.0}
        super().test_training_on_one_batch_lowers_the_loss()


class TestContract(MSTContract):
    pass


class TestContractOfRandomMasksWithoutDecoder(MSTContract):
    config = {**SMALL, "mask_strategy": "random", "restore_weight": 0.0}


class TestContractWithoutMasks(MSTContract):
    config = {**SMALL, "mask_strategy": "none", "decoder": "linear"}


# ------------------------------------------------------------------------------------------------ official numbers


def test_masks(golden) -> None:
    values = golden("mst/attention_guided_mask")
    scores = class_attention(values["attention"])
    assert_close(scores, values["cls_attention"])
    low = 1 / values["num"]
    candidates = attention_guided_mask(scores, low, 1.0, values["uniform"])
    assert torch.equal(candidates, values["candidates"])
    assert torch.equal(candidates, values["attmask_low"])
    assert torch.equal(attention_guided_mask(scores, low, values["mask_prob"], values["uniform"]), values["mask"])


def test_tokens_of_a_masked_student(golden) -> None:
    values = golden("mst/masked_student_tokens")
    encoder = ViTEncoder(
        image_size=values["img_size"],
        patch_size=values["patch_size"],
        embed_dim=values["embed_dim"],
        depth=values["depth"],
        num_heads=values["num_heads"],
        mlp_ratio=values["mlp_ratio"],
        layer_norm_eps=values["layernorm_eps"],
        position="learned",
        pooling="class",
    ).double()
    encoder.load_state_dict({name[3:]: value for name, value in values.items() if name.startswith("sd.")})
    tokens = encoder.tokens(values["images"], token_mask=values["mask"], mask_token=values["mask_token"])
    assert_close(tokens, values["tokens"])


# ------------------------------------------------------------------------------------------------ masks

drawn = st.tuples(st.integers(0, 999), st.integers(1, 60), st.integers(1, 8), st.floats(0, 1))


def random_scores(seed: int, length: int) -> torch.Tensor:
    return torch.rand(3, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(drawn)
def test_masked_patches_are_among_the_least_attended(values) -> None:
    seed, length, num, prob = values
    scores = random_scores(seed, length)
    candidates = attention_guided_mask(scores, 1 / num, 1.0)
    assert (candidates.sum(dim=1) == length // num).all()
    mask = attention_guided_mask(scores, 1 / num, prob)
    assert (mask <= candidates).all()
    assert not attention_guided_mask(scores, 1 / num, 0.0).any()
    for row, chosen in zip(scores, candidates, strict=True):
        if chosen.any() and not chosen.all():
            assert row[chosen].max() <= row[~chosen].min()


@settings(max_examples=25, deadline=None)
@given(drawn)
def test_only_the_order_of_the_scores_matters(values) -> None:
    seed, length, num, prob = values
    scores, uniform = random_scores(seed, length), torch.rand(3, length)
    mask = attention_guided_mask(scores, 1 / num, prob, uniform)
    assert torch.equal(attention_guided_mask((5 * scores).exp() - 7, 1 / num, prob, uniform), mask)


def test_equal_scores_hide_fewer_patches_never_more() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.2, 0.2]])
    assert attention_guided_mask(scores, 0.5, 1.0).tolist() == [[True, False, False, False]]


def test_fewer_patches_than_the_denominator_are_never_masked() -> None:
    assert not attention_guided_mask(torch.rand(2, 3), 0.25, 1.0).any()


# ------------------------------------------------------------------------------------------------ model


def encoder() -> ViTEncoder:
    return ViTEncoder.build(ViTConfig(**ENCODER))


def dino() -> SelfDistillation:
    return SelfDistillation(encoder(), ProjectionHead(16, 12, 16, 8), SelfDistillationLoss(12, defer_center=True))


def model(**settings) -> MaskedSelfDistillation:
    torch.manual_seed(0)
    return MaskedSelfDistillation(dino(), GlobalImageDecoder(16, 4, 3), **settings).double()


def views(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = {"dtype": torch.float64}
    return torch.randn(batch, 2, 3, 16, 16, **size), torch.randn(batch, 2, 3, 8, 8, **size), torch.rand(batch, 2, 16)


def test_without_mask_and_restoration_it_is_dino() -> None:
    masked, plain = model(mask_strategy="none", restore_weight=0.0), model().dino
    images, small, _ = views()
    output, expected = masked(images, small), plain(images, small)
    output.loss.backward()
    expected.loss.backward()
    assert torch.equal(output.loss, expected.loss)
    for (name, ours), (_, theirs) in zip(masked.dino.named_parameters(), plain.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14, msg=name)


def test_the_mask_comes_from_the_teachers_attention_on_the_same_view() -> None:
    masked = model(mask_prob=1.0)
    images, small, uniform = views()
    with torch.no_grad():
        for parameter in masked.dino.student.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # the student looks elsewhere
    output = masked(images, small, uniform)
    for crop in range(2):
        teacher = masked.dino.teacher.module.backbone
        attention = class_attention(teacher.last_attention(images[:, crop])[1])
        rows = slice(3 * crop, 3 * crop + 3)
        torch.testing.assert_close(output.scores[rows], attention)
        assert torch.equal(output.mask[rows], attention_guided_mask(attention, 0.25, 1.0))


def test_the_class_row_alone_is_the_row_of_the_whole_attention() -> None:
    network, images = encoder().double(), torch.randn(2, 3, 16, 24, dtype=torch.float64)
    tokens, scores = tokens_and_class_attention(network, images)
    expected, attention = network.last_attention(images)
    torch.testing.assert_close(tokens, expected)
    torch.testing.assert_close(scores, class_attention(attention))


def test_the_student_does_not_see_masked_patches_but_must_restore_them() -> None:
    masked = model(mask_strategy="random", low_fraction=1.0)
    images, small, uniform = views()
    first = masked(images, small, uniform)
    flat = images.transpose(0, 1).flatten(0, 1)
    patches = patchify(flat, 4)
    changed = unpatchify(torch.where(first.mask[..., None], torch.randn_like(patches), patches), (4, 4), 4)
    second = masked(changed.view(2, 3, 3, 16, 16).transpose(0, 1), small, uniform)
    assert torch.equal(first.mask, second.mask) and first.mask.any()
    torch.testing.assert_close(first.student, second.student)
    torch.testing.assert_close(first.reconstruction, second.reconstruction)
    assert first.restoration != second.restoration


def test_nothing_reaches_the_teacher_and_an_unused_mask_token_gets_a_zero() -> None:
    masked = model(mask_prob=0.0)
    images, small, uniform = views()
    masked(images.requires_grad_(), small, uniform).loss.backward()
    assert all(parameter.grad is None for parameter in masked.dino.teacher.parameters())
    assert torch.equal(masked.mask_token.grad, torch.zeros_like(masked.mask_token))


def test_restoring_costs_the_mean_absolute_difference() -> None:
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    restored = torch.randn_like(images).requires_grad_()
    restoration_loss(restored, images).backward()
    torch.testing.assert_close(restored.grad, (restored.detach() - images).sign() / images.numel())
    assert restoration_loss(images, images) == 0


@settings(max_examples=10, deadline=None)
@given(log_patch=st.integers(0, 4), rows=st.integers(1, 3), columns=st.integers(1, 3), channels=st.integers(1, 4))
def test_a_decoder_draws_pictures_of_the_grids_size(log_patch, rows, columns, channels) -> None:
    patch = 2**log_patch
    tokens = torch.randn(2, rows * columns, 24)
    for kind in ("conv", "linear"):
        decoded = GlobalImageDecoder(24, patch, channels, kind).eval()(tokens, (rows, columns))
        assert decoded.shape == (2, channels, rows * patch, columns * patch)


def test_the_linear_decoder_puts_every_token_where_its_patch_is() -> None:
    decoder = GlobalImageDecoder(3 * 9, 3, 3, "linear")
    torch.nn.init.eye_(decoder.layers.weight)
    images = torch.randn(2, 3, 6, 9)
    torch.testing.assert_close(decoder(patchify(images, 3), (2, 3)), images)


def test_the_convolutional_decoder_of_vit_small_has_the_stated_size() -> None:
    decoder = GlobalImageDecoder(384, 16, 3)
    weights = sum(p.numel() for p in decoder.parameters() if p.ndim == 4)
    assert weights == 16 * (384 * 192 + 192 * 96 + 96 * 48 + 48 * 24) + 9 * 24 * 3


@pytest.mark.parametrize("strategy", ["random", "attention_low"])
def test_strategies_hide_the_same_share_on_average(strategy: str) -> None:
    masked = model(mask_strategy=strategy)
    share = masked(*views(64)[:2], torch.rand(64, 2, 16)).mask.double().mean()
    assert math.isclose(float(share), 0.125, abs_tol=0.03)


def test_what_is_kept_is_the_teachers_backbone() -> None:
    objective = MSTObjective.build(MSTConfig(**SMALL), encoder(), SimpleBuildContext())
    assert objective.exported_encoder() is objective.dino.teacher.module.backbone
    assert objective.encoder is objective.dino.student.backbone


# ------------------------------------------------------------------------------------------------ refusals


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="needs the encoder mim:vit, not TinyEncoder"):
        MSTObjective.build(MSTConfig(**SMALL), TinyEncoder(), SimpleBuildContext())
    mean_pooled = ViTEncoder.build(ViTConfig(**{**ENCODER, "pooling": "mean"}))
    with pytest.raises(InputError, match=r"encoder\.pooling = 'class'"):
        MSTObjective.build(MSTConfig(**SMALL), mean_pooled, SimpleBuildContext())
    with pytest.raises(InputError, match=r"patch_size = 6 is no power of 2: use the decoder kind 'linear'"):
        GlobalImageDecoder(8, 6)
    with pytest.raises(InputError, match=r"dim = 8, patch_size = 0, channels = 3"):
        GlobalImageDecoder(8, 0, kind="linear")
    for kind in ("conv", "linear"):
        with pytest.raises(InputError, match=r"tokens have shape \(1, 6, 9\); a grid of \(2, 3\) needs \(B, 6, 8\)"):
            GlobalImageDecoder(8, 4, kind=kind)(torch.zeros(1, 6, 9), (2, 3))
    with pytest.raises(InputError, match=r"restore_weight = -1"):
        model(restore_weight=-1.0)
    with pytest.raises(InputError, match=r"low_fraction = 1.5"):
        attention_guided_mask(torch.rand(2, 4), 1.5)
    with pytest.raises(InputError, match=r"mask_prob = -0.1"):
        attention_guided_mask(torch.rand(2, 4), 0.5, -0.1)
    with pytest.raises(InputError, match=r"uniform has shape \(2, 3\); expected \(2, 4\)"):
        attention_guided_mask(torch.rand(2, 4), uniform=torch.rand(2, 3))
    with pytest.raises(InputError, match="mask_strategy = 'blocks'"):
        model(mask_strategy="blocks")
    images, small, _ = views()
    with pytest.raises(InputError, match=r"uniform has shape \(3, 2, 9\); expected \(3, 2, 16\)"):
        model()(images, small, torch.rand(3, 2, 9))
    with pytest.raises(InputError, match="attention has shape"):
        class_attention(torch.rand(2, 4, 5))
