"""BEiT: the official numbers, what holds for every input, views, weights of timm, refusals."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from timm.models.beit import Block
from token_world import SMALL, ColourTokenizer, compare_gradients, context_with, from_golden
from torch import Tensor

from bowerbird import dist
from bowerbird.data.images import Preprocessing
from bowerbird.errors import DataError, InputError, RecipeError
from bowerbird.protocols import BuildContext, Encoder
from bowerbird.testing import EncoderContract, ObjectiveContract, SimpleBuildContext, assert_close
from bowerbird_mim.beit import (
    BEiTConfig,
    BEiTObjective,
    BlockwiseMaskGenerator,
    MaskedTokenModel,
    RandomMaskGenerator,
    RelativePositionBias,
    TwoViews,
    masked_token_loss,
    relative_position_index,
)
from bowerbird_mim.beit_vit import BEiTEncoder, BEiTViTConfig
from bowerbird_mim.patches import patchify, unpatchify
from bowerbird_mim.vit import ViTEncoder


class TestContract(ObjectiveContract):
    name = "mim:beit"
    config = {"tokenizer": "runs/t"}
    image_size = 16

    def make_encoder(self) -> BEiTEncoder:
        return BEiTEncoder.build(BEiTViTConfig(**SMALL))

    def make_context(self) -> BuildContext:
        return context_with(ColourTokenizer())


class TestContractOfTheEncoder(EncoderContract):
    name = "mim:beit-vit"
    config = {**SMALL}


class TestContractOfTheEncoderForFineTuning(EncoderContract):
    name = "mim:beit-vit"
    config = {**SMALL, "image_size": [8, 16], "relative_position": "per-block", "pooling": "mean-norm"}


# ------------------------------------------------------------------------------------------------ official numbers


def test_a_whole_step(golden) -> None:
    values = golden("beit/model_step")
    model, mask = from_golden(values), values["bool_masked_pos"]
    features, logits = model(values["images"], mask)
    assert_close(features, values["features"][:, 1:])
    assert_close(logits, values["logits_all"])
    assert_close(logits[mask], values["logits_masked"])
    loss = masked_token_loss(logits[mask], values["token_ids"][mask])
    assert_close(loss, values["loss"])
    loss.backward()
    compare_gradients(model, values)
    right = (logits[mask].argmax(dim=1) == values["token_ids"][mask]).double().mean()
    assert_close(right, values["mlm_accuracy"])


def test_a_block(golden) -> None:
    values = golden("beit/block")
    encoder = BEiTEncoder(
        image_size=8,
        patch_size=4,
        embed_dim=values["embed_dim"],
        depth=1,
        num_heads=values["num_heads"],
        mlp_ratio=values["mlp_ratio"],
        layer_norm_eps=values["layernorm_eps"],
    ).double()
    block: Block = encoder.blocks[0]
    block.load_state_dict({k.removeprefix("sd."): v for k, v in values.items() if k.startswith("sd.")})
    x, bias = values["x"].requires_grad_(), values["rel_pos_bias"].requires_grad_()
    y = block(x, shared_rel_pos_bias=bias)
    assert_close(y, values["y"])
    (y * values["upstream"]).sum().backward()
    assert_close(x.grad, values["grad_x"])
    assert_close(bias.grad, values["grad_rel_pos_bias"])
    for name, parameter in block.named_parameters():
        assert_close(parameter.grad, values[f"grad.{name}"], atol=1e-10, where=name)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_relative_positions(golden, case: str) -> None:
    values = golden("beit/relative_position_bias")
    window, table = tuple(values[f"{case}.window"].tolist()), values[f"{case}.table"]
    assert torch.equal(relative_position_index(window), values[f"{case}.index"])
    bias = RelativePositionBias(window, table.shape[1]).double()
    with torch.no_grad():
        bias.relative_position_bias_table.copy_(table)
    assert_close(bias(), values[f"{case}.bias"])


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_block_masks(golden, case: str) -> None:
    values = golden("beit/blockwise_mask")
    largest = values[f"{case}.max_num_patches"]
    generator = BlockwiseMaskGenerator(
        tuple(values[f"{case}.grid"].tolist()),
        values[f"{case}.num_masking_patches"],
        values[f"{case}.min_num_patches"],
        None if largest == -1 else largest,
        values["min_aspect"],
    )
    mask = generator(random.Random(values[f"{case}.python_random_seed"]))
    assert torch.equal(mask, values[f"{case}.mask"].bool())


# ------------------------------------------------------------------------------------------------ invariants


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(2, 9),
    columns=st.integers(2, 9),
    share=st.floats(0.05, 1.0),
    smallest=st.integers(1, 6),
    kind=st.sampled_from(["numpy", "python", "torch"]),
    seed=st.integers(0, 1000),
)
def test_a_block_mask_is_a_union_of_rectangles_and_never_too_large(
    rows: int, columns: int, share: float, smallest: int, kind: str, seed: int
) -> None:
    wanted = max(1, int(share * rows * columns))
    generator = BlockwiseMaskGenerator((rows, columns), wanted, smallest)
    drawn = []

    class Noted(BlockwiseMaskGenerator):
        def _add_rectangle(self, mask, *rest):
            before = mask.copy()
            added = super()._add_rectangle(mask, *rest)
            assert added == mask.sum() - before.sum()
            if added:
                drawn.append(mask & ~before)
            return added

    def rng():
        return {
            "numpy": np.random.default_rng(seed),
            "python": random.Random(seed),
            "torch": torch.Generator().manual_seed(seed),
        }[kind]

    mask = generator(rng())
    assert mask.shape == (rows, columns) and mask.dtype == torch.bool
    assert mask.sum() <= wanted
    assert torch.equal(Noted((rows, columns), wanted, smallest)(rng()), mask)
    assert torch.equal(torch.from_numpy(sum(drawn, np.zeros((rows, columns), bool))), mask)
    for new in drawn:  # what is new lies in a rectangle smaller than the grid in both directions
        y, x = np.nonzero(new)
        assert np.ptp(y) + 1 < rows and np.ptp(x) + 1 < columns


def test_rectangles_keep_their_aspect() -> None:
    generator = BlockwiseMaskGenerator((40, 40), 60, min_block=60, max_block=60)  # one rectangle, if it fits
    for seed in range(30):
        y, x = np.nonzero(generator(np.random.default_rng(seed)).numpy())
        if len(y):
            height, width = np.ptp(y) + 1, np.ptp(x) + 1
            assert (height - 0.5) / (width + 0.5) <= 1 / 0.3
            assert (width - 0.5) / (height + 0.5) <= 1 / 0.3


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_the_bias_depends_on_the_offset_alone(rows: int, columns: int) -> None:
    bias = RelativePositionBias((rows, columns), 2)
    with torch.no_grad():
        bias.relative_position_bias_table.copy_(torch.randn_like(bias.relative_position_bias_table))
    values, seen = bias(), {}
    for a in range(rows * columns):
        for b in range(rows * columns):
            offset = (a // columns - b // columns, a % columns - b % columns)
            found = seen.setdefault(offset, values[:, 1 + a, 1 + b])
            assert torch.equal(found, values[:, 1 + a, 1 + b])
    index = relative_position_index((rows, columns))
    assert len(seen) == len(index[1:, 1:].unique())
    assert len({int(index[0, 1]), int(index[1, 0]), int(index[0, 0]), *index[1:, 1:].flatten().tolist()}) == (
        len(seen) + 3
    )


def small_model(vocab_size: int = 7, **options: object) -> MaskedTokenModel:
    return MaskedTokenModel(BEiTEncoder(**{**SMALL, **options}), vocab_size).double()


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.float64)


def test_a_bias_of_zero_is_plain_attention() -> None:
    block = small_model().encoder.blocks[0]
    x = torch.randn(2, 17, 12, dtype=torch.float64)
    zero = RelativePositionBias((4, 4), 3).double()()
    assert_close(block(x, shared_rel_pos_bias=zero), block(x))


def test_pixels_of_masked_patches_change_nothing() -> None:
    model, images = small_model(), pictures()
    mask = torch.rand(2, 16) < 0.5
    patches = patchify(images, 4)
    other = unpatchify(torch.where(mask[..., None], torch.randn_like(patches), patches), (4, 4), 4)
    for first, second in zip(model(images, mask), model(other, mask), strict=True):
        assert torch.equal(first, second)


def test_an_untrained_model_costs_the_log_of_the_vocabulary() -> None:
    model, mask = small_model(50), torch.rand(2, 16) < 0.5
    ids = torch.randint(50, (int(mask.sum()),))
    assert masked_token_loss(model(pictures(), mask)[1][mask], ids).item() == pytest.approx(math.log(50), abs=0.1)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert_close(masked_token_loss(model(pictures(), mask)[1][mask], ids), math.log(50))


def test_without_layer_scale_weights_the_blocks_do_nothing() -> None:
    shallow, deep = small_model(depth=1), small_model(depth=3)
    for model in (shallow, deep):
        for block in model.encoder.blocks:
            torch.nn.init.zeros_(block.gamma_1)
            torch.nn.init.zeros_(block.gamma_2)
    deep.load_state_dict(shallow.state_dict(), strict=False)
    images, mask = pictures(), torch.rand(2, 16) < 0.5
    assert torch.equal(shallow(images, mask)[0], deep(images, mask)[0])


def test_an_attention_has_biases_for_q_and_v_only() -> None:
    attention = small_model().encoder.blocks[0].attn
    assert sum(p.numel() for p in attention.parameters()) == 3 * 144 + 2 * 12 + 144 + 12


def test_when_all_patches_are_hidden_all_outputs_are_equal() -> None:
    features, _ = small_model()(pictures(), torch.ones(2, 16, dtype=torch.bool))
    assert_close(features, features[:1, :1].expand_as(features))


def test_the_gradient_of_the_loss_is_softmax_minus_onehot_over_the_count() -> None:
    logits, ids = torch.randn(9, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (9,))
    masked_token_loss(logits, ids).backward()
    assert_close(logits.grad, (logits.softmax(dim=1) - F.one_hot(ids, 5)).detach() / 9)
    assert logits.grad.sum(dim=1).abs().max() < 1e-15


def test_first_weights_are_cut_at_one_deviation_and_shrink_with_depth() -> None:
    encoder = BEiTEncoder(**{**SMALL, "embed_dim": 48, "depth": 4})
    for name, parameter in encoder.named_parameters():
        if parameter.ndim > 1 and "relative_position" not in name:
            assert 0.01 / 3 < parameter.abs().max() <= 0.02, name
    largest = [
        block.attn.proj.weight.abs().max().item() * math.sqrt(2 * n) for n, block in enumerate(encoder.blocks, 1)
    ]
    assert largest == pytest.approx([0.02] * 4, rel=0.02)


# ------------------------------------------------------------------------------------------------ views and training


def test_both_views_show_the_same_crop() -> None:
    views = TwoViews(
        preprocessing=Preprocessing(size=32),
        tokenizer=Preprocessing(size=16),
        mask=RandomMaskGenerator((4, 4), 0.5),
    )
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    picture = Image.fromarray(
        np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.zeros((64, 64))], -1).astype(np.uint8)
    )
    for seed in range(8):
        made = views({"image": picture}, np.random.default_rng(seed))
        assert made["image"].shape == (3, 32, 32) and made["tokenizer_image"].shape == (3, 16, 16)
        assert made["token_mask"].shape == (16,) and made["token_mask"].sum() == 8
        halved = F.avg_pool2d(torch.from_numpy(made["image"])[None], 2)[0].numpy()
        assert np.abs(halved - made["tokenizer_image"]).max() < 0.05  # -1 to 1


def test_the_tokenizer_stays_as_it_is() -> None:
    tokenizer = ColourTokenizer()
    objective = BEiTObjective(tokenizer, model=MaskedTokenModel(BEiTEncoder(**SMALL), 6)).train()
    assert not tokenizer.training and objective.model.training
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


def test_class_token_and_vectors_do_not_decay() -> None:
    objective = BEiTObjective(ColourTokenizer(), model=MaskedTokenModel(BEiTEncoder(**SMALL), 6))
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    decays, still = ({names[id(p)] for p in group["params"]} for group in objective.parameter_groups())
    assert {"model.mask_token", "model.encoder.rel_pos_bias.relative_position_bias_table"} < decays
    assert {"model.encoder.cls_token", "model.encoder.blocks.0.gamma_1", "model.lm_head.bias"} < still


def test_two_processes_take_the_mean_over_the_masked_patches_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = BEiTObjective(ColourTokenizer(), model=MaskedTokenModel(BEiTEncoder(**SMALL), 6)).double()
    batch = {
        "image": torch.randn(4, 3, 16, 16).double(),
        "tokenizer_image": torch.randn(4, 3, 8, 8).double(),
        "token_mask": torch.arange(16) < torch.tensor([[2], [3], [9], [12]]),  # block masks hide unequal numbers
    }

    def step(rows: slice) -> list[Tensor]:
        objective.zero_grad()
        total = objective({key: value[rows] for key, value in batch.items()}).total
        total.backward()
        return [total.detach(), *(p.grad for p in objective.parameters() if p.grad is not None)]

    alone = step(slice(4))
    monkeypatch.setattr(dist, "is_distributed", lambda: True)
    monkeypatch.setattr(dist, "mean_over_processes", lambda count: torch.tensor((2 + 3 + 9 + 12) / 2))
    for whole, first, second in zip(alone, step(slice(2)), step(slice(2, 4)), strict=True):
        assert_close((first + second) / 2, whole, rtol=1e-6)  # of the count, float32


# ------------------------------------------------------------------------------------------------ weights


def seeded_encoder(**options: object) -> BEiTEncoder:
    encoder = BEiTEncoder(**{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


@pytest.mark.parametrize("pooling", ["mean", "class", "mean-norm"])
def test_timm_reads_the_weights(pooling: str, tmp_path) -> None:
    encoder = seeded_encoder(pooling=pooling)
    form, file = encoder.timm_form(), tmp_path / "model.safetensors"
    save_file({name: value.contiguous() for name, value in form.state.items()}, file)
    model = timm.create_model(form.architecture, checkpoint_path=str(file), num_classes=0, **form.arguments).eval()
    images = pictures().float()
    with torch.no_grad():
        assert torch.equal(model(images), encoder({"image": images}).pooled)

    again = BEiTEncoder.build(
        BEiTViTConfig(**SMALL, relative_position="per-block", pooling=pooling, weights=str(file))
    ).eval()
    with torch.no_grad():
        assert torch.equal(again({"image": images}).pooled, encoder({"image": images}).pooled)


def test_fine_tuning_starts_from_the_shared_bias_in_every_block() -> None:
    encoder = seeded_encoder()
    tuned = encoder.for_finetuning()
    table = encoder.rel_pos_bias.relative_position_bias_table
    own = [block.attn.relative_position_bias_table for block in tuned.blocks]
    assert tuned.rel_pos_bias is None
    assert all(torch.equal(one, table) for one in own)
    assert len({one.data_ptr() for one in (table, *own)}) == 3
    batch = {"image": pictures().float()}
    with torch.no_grad():
        assert torch.equal(tuned(batch).pooled, encoder(batch).pooled)


def test_a_pretraining_checkpoint_is_cloned_into_the_blocks(tmp_path) -> None:
    model = MaskedTokenModel(seeded_encoder(), 7)
    file = tmp_path / "beit.pth"
    state = {name.removeprefix("encoder."): value for name, value in model.state_dict().items()}
    torch.save({"model": {**state, "rel_pos_bias.relative_position_index": relative_position_index((4, 4))}}, file)
    for kind in ("shared", "per-block"):
        encoder = BEiTEncoder.build(BEiTViTConfig(**SMALL, relative_position=kind, weights=str(file))).eval()
        images = pictures().float()
        with torch.no_grad():
            assert_close(encoder.tokens(images), model.encoder.eval().tokens(images), atol=1e-6)


def test_weights_of_another_architecture_are_refused(tmp_path) -> None:
    file = tmp_path / "vit.safetensors"
    save_file(ViTEncoder(**SMALL).state_dict(), file)
    with pytest.raises(DataError, match=r"missing: .*gamma_1.*unknown: .*pos_embed"):
        BEiTEncoder.build(BEiTViTConfig(**SMALL, weights=str(file)))


# ------------------------------------------------------------------------------------------------ refusals


def build(tokenizer: Encoder, encoder: Encoder | None = None, **settings: object) -> BEiTObjective:
    encoder = encoder or BEiTEncoder.build(BEiTViTConfig(**SMALL))
    return BEiTObjective.build(BEiTConfig(tokenizer="runs/t", **settings), encoder, context_with(tokenizer))


def test_a_tokenizer_that_does_not_fit_is_refused_with_both_shapes() -> None:
    with pytest.raises(
        InputError, match="grid of 8 x 8 codes, but there are 4 x 4 patches; it needs pictures of 8 x 8"
    ):
        build(ColourTokenizer(), tokenizer_size=16)
    with pytest.raises(InputError, match="vocab_size = 8192, but the tokenizer has 6 codes"):
        build(ColourTokenizer(), vocab_size=8192)
    with pytest.raises(InputError, match="is a ViTEncoder, which gives no codes"):
        build(ViTEncoder(**SMALL))
    with pytest.raises(RecipeError, match="no run in 'runs/t'"):
        BEiTObjective.build(BEiTConfig(tokenizer="runs/t"), BEiTEncoder(**SMALL), SimpleBuildContext())
    objective = build(ColourTokenizer())
    batch = {"image": torch.zeros(2, 3, 16, 16), "token_mask": torch.ones(2, 16, dtype=torch.bool)}
    with pytest.raises(InputError, match=r"shape \(2, 6, 3, 3\) .* need \(2, 6, 4, 4\)"):
        objective({**batch, "tokenizer_image": torch.zeros(2, 3, 6, 6)})
    with pytest.raises(InputError, match="the tokenizer has 6 tokens, the model predicts 9"):
        BEiTObjective(ColourTokenizer(), model=MaskedTokenModel(BEiTEncoder(**SMALL), 9))


def test_what_does_not_fit_is_refused() -> None:
    model = small_model()
    with pytest.raises(InputError, match=r"mask has shape \(2, 15\); 2 pictures of 4 x 4 patches need \(2, 16\)"):
        model(pictures(), torch.ones(2, 15, dtype=torch.bool))
    with pytest.raises(InputError, match=r"needs \(B, 3, 16, 16\)"):
        model(torch.zeros(2, 3, 8, 8, dtype=torch.float64), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="no masked position"):
        masked_token_loss(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    for wrong in (-100, 5):  # torch's cross-entropy would leave -100 out
        with pytest.raises(InputError, match=rf"ids_masked from {min(wrong, 1)} to {max(wrong, 1)}; expected 0 to 4"):
            masked_token_loss(torch.zeros(2, 5), torch.tensor([1, wrong]))
    with pytest.raises(InputError, match=r"of type torch\.float32; expected integers"):
        masked_token_loss(torch.zeros(2, 5), torch.zeros(2))
    with pytest.raises(InputError, match="num_masked = 17: a grid of 4 x 4 patches accepts 1 to 16"):
        BlockwiseMaskGenerator((4, 4), 17)
    with pytest.raises(InputError, match="no rectangle of"):
        build(ColourTokenizer(), BEiTEncoder.build(BEiTViTConfig(**{**SMALL, "image_size": (4, 32)})))
    with pytest.raises(InputError, match="for fine-tuning"):
        MaskedTokenModel(BEiTEncoder(**SMALL, pooling="mean-norm"), 5)
    with pytest.raises(InputError, match=r"window = \(0, 3\)"):
        relative_position_index((0, 3))
    with pytest.raises(InputError, match=r"mask_ratio = 0\.05 hides none of 4 x 4 patches"):
        RandomMaskGenerator((4, 4), 0.05)
    for make in (BlockwiseMaskGenerator((4, 4), 8), RandomMaskGenerator((4, 4))):
        with pytest.raises(InputError, match=r"rng = 7: expected a generator of random numbers, .*numpy\.random"):
            make(7)  # type: ignore[operator]


def test_ids_may_be_of_any_integer_type() -> None:
    logits, ids = torch.randn(3, 5), torch.tensor([0, 4, 2])
    for kind in (torch.int32, torch.uint8):
        assert torch.equal(masked_token_loss(logits, ids.to(kind)), masked_token_loss(logits, ids))


@pytest.mark.parametrize(
    "make_rng", [random.Random, np.random.default_rng, np.random.RandomState, torch.Generator().manual_seed]
)
def test_rectangles_reach_every_edge_with_every_kind_of_generator(make_rng) -> None:
    make = BlockwiseMaskGenerator((3, 3), num_masked=1, min_block=1, min_aspect=1.0)  # one patch
    rng = make_rng(0)
    assert torch.stack([make(rng) for _ in range(120)]).any(dim=0).all()
