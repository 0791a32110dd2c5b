"""MIMDet's backbone: the authors' numbers, and what must hold for every input (arXiv 2204.02964)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bowerbird.errors import InputError
from bowerbird_detection.mimdet import (
    ConvStem,
    MIMDetBackbone,
    MIMDetDecoder,
    MIMDetEncoder,
    PatchStem,
    StemMaps,
    mimdet_param_groups,
    padding_mask_of,
    resize_positions,
    sample_tokens,
    sincos_positions,
)

Golden = Callable[[str], dict[str, Any]]


def backbone(
    *,
    dim: int = 24,
    heads: int = 3,
    ratio: float = 1.0,
    train_ratio: float = 0.5,
    stem: ConvStem | PatchStem | None = None,
    **more: Any,
) -> MIMDetBackbone:
    torch.manual_seed(1)
    shared: dict[str, Any] = {"image_size": 64, **more}
    fill = shared.pop("fill", "conv")
    encoder = MIMDetEncoder(embed_dim=dim, depth=2, num_heads=heads, stem=stem, **shared)
    decoder = MIMDetDecoder(dim, image_size=64, embed_dim=16, depth=1, num_heads=4, fill=fill)
    made = MIMDetBackbone(encoder, decoder, train_ratio=train_ratio, test_ratio=ratio)
    with torch.no_grad():  # no parameter keeps a first value that tells nothing
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def pictures(batch: int = 2, height: int = 64, width: int = 96, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(2))


def noise_of(seed: int, batch: int = 2, length: int = 24) -> Tensor:
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------- the goldens


@pytest.mark.parametrize("name", ["sr100", "sr50", "sr25_padded"])
def test_the_backbone_gives_the_authors_maps_and_gradients(golden: Golden, name: str) -> None:
    given = golden(f"mimdet/backbone_{name}")
    weights = {key.removeprefix("param/"): value for key, value in given.items() if key.startswith("param/")}
    width, heads = given["tokens_kept"].shape[-1], given["num_heads"]
    depths = [
        len({k.split(".")[2] for k in weights if k.startswith(part)}) for part in ("encoder.bl", "decoder.decoder_bl")
    ]
    encoder = MIMDetEncoder(
        image_size=64, embed_dim=width, depth=depths[0], num_heads=heads, norm_eps=given["encoder_norm_eps"]
    )
    decoder = MIMDetDecoder(
        width, image_size=64, embed_dim=16, depth=depths[1], num_heads=heads, norm_eps=given["decoder_norm_eps"]
    )
    made = MIMDetBackbone(encoder, decoder, test_ratio=given["sample_ratio"]).eval()
    made.load_state_dict(weights)

    images = given["x"].requires_grad_()
    tokens = encoder.tokens(encoder.patch_embed(images).c4)
    torch.testing.assert_close(tokens, given["tokens_before_sampling"], atol=1e-5, rtol=1e-5)
    grid = tuple(given["padding_mask"].shape[1:])
    assert torch.equal(padding_mask_of(given["image_sizes"], grid, 16), given["padding_mask"])
    sampled = sample_tokens(tokens, given["sample_ratio"], given["padding_mask"], given["noise"])
    torch.testing.assert_close(sampled.tokens, given["tokens_kept"], atol=1e-5, rtol=1e-5)
    assert torch.equal(sampled.restore_ids, given["ids_restore"])

    maps = made(images, given["image_sizes"], given["noise"])
    assert list(maps) == ["c2", "c3", "c4", "c5"]
    for level, found in maps.items():
        torch.testing.assert_close(found, given[level], atol=1e-5, rtol=1e-5)
    torch.stack([(found * given[f"up_{level}"]).sum() for level, found in maps.items()]).sum().backward()
    torch.testing.assert_close(images.grad, given["grad_x"], atol=2e-5, rtol=2e-5)
    parameters = dict(made.named_parameters())
    kept = [key for key in given if key.startswith("grad/")]
    assert kept
    for key in kept:
        found = parameters[key.removeprefix("grad/")].grad
        scale = max(1.0, float(given[key].abs().max()))  # the stem's are sums over all pixels, in float32
        torch.testing.assert_close(found, given[key], atol=2e-5 * scale, rtol=2e-5)


def test_the_stem_gives_the_authors_maps_and_gradients(golden: Golden) -> None:
    given = golden("mimdet/conv_stem")
    stem = ConvStem(3, given["embed_dim"])
    stem.load_state_dict({k.removeprefix("param/"): v for k, v in given.items() if k.startswith("param/")})
    images = given["x"].requires_grad_()
    maps = stem(images)
    for found, level in zip(maps, ("c2", "c3", "c4_conv"), strict=True):
        torch.testing.assert_close(found, given[level], atol=1e-5, rtol=1e-5)
    torch.stack([(m * given[f"up_{level}"]).sum() for level, m in maps._asdict().items()]).sum().backward()
    torch.testing.assert_close(images.grad, given["grad_x"], atol=2e-5, rtol=2e-5)
    for name, parameter in stem.named_parameters():
        wanted = given[f"grad/{name}"]
        torch.testing.assert_close(parameter.grad, wanted, atol=2e-5 * max(1.0, float(wanted.abs().max())), rtol=2e-5)


def test_positions_are_the_authors(golden: Golden) -> None:
    given = golden("mimdet/pos_embed")
    side = given["grid"]
    table = sincos_positions(given["embed_dim"], (side, side), class_row=True)
    torch.testing.assert_close(table, given["sincos_with_cls"], atol=1e-12, rtol=0)
    resized = resize_positions(table[None].float(), (side, side), tuple(given["new_size"].tolist()))
    torch.testing.assert_close(resized, given["interpolated_with_cls"], atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- invariants


@torch.no_grad()
def test_with_all_tokens_the_noise_does_not_matter() -> None:
    images, made = pictures(), backbone(ratio=1.0)
    one, other = made(images, noise=noise_of(1)), made(images, noise=noise_of(2))
    assert all(torch.equal(one[level], other[level]) for level in one)

    # Nor does the order in which sampling would have brought them in.
    stem = made.encoder.patch_embed(images)
    tokens = made.encoder.tokens(stem.c4)
    permuted = sample_tokens(tokens, 1.0, noise=noise_of(3))
    full = made.decoder(made.encoder.encode(permuted.tokens), permuted.keep_ids, stem.c4)
    torch.testing.assert_close(full.transpose(1, 2).reshape(one["c4"].shape), one["c4"], atol=1e-5, rtol=1e-5)


@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 40),
    ratio=st.floats(0.01, 1.0),
    padded=st.integers(0, 39),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_sampling_keeps_distinct_tokens_valid_ones_first(
    batch: int, length: int, ratio: float, padded: int, seed: int
) -> None:
    padded = min(padded, length - 1)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, length, 3, generator=generator)
    mask = torch.rand(batch, length, generator=generator).argsort(dim=1) < padded  # as many in every picture
    sampled = sample_tokens(tokens, ratio, mask, generator=generator)
    kept = max(1, int(length * ratio))
    assert sampled.tokens.shape == (batch, kept, 3)
    assert all(len(set(ids)) == kept for ids in sampled.keep_ids.tolist())
    of_padding = mask.gather(1, sampled.keep_ids)
    assert int(of_padding.sum()) == batch * max(0, kept - (length - padded)), "padding only where nothing else is left"
    assert not (of_padding[:, :-1] & ~of_padding[:, 1:]).any(), "valid tokens come first"

    order = sampled.restore_ids.argsort(dim=1)
    assert torch.equal(order.gather(1, sampled.restore_ids), torch.arange(length).expand(batch, -1)), "an inverse"
    assert torch.equal(order[:, :kept], sampled.keep_ids)
    index = order[..., None].expand(-1, -1, 3)
    there = tokens.gather(1, index)
    assert torch.equal(there[:, :kept], sampled.tokens)
    assert torch.equal(there.gather(1, sampled.restore_ids[..., None].expand(-1, -1, 3)), tokens), "and back again"


def test_sampling_draws_from_the_generator_that_it_gets() -> None:
    tokens = torch.randn(2, 30, 4)
    made = [sample_tokens(tokens, 0.5, generator=torch.Generator().manual_seed(seed)).keep_ids for seed in (5, 5, 6)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@torch.no_grad()
def test_the_finest_maps_depend_neither_on_the_ratio_nor_on_the_noise() -> None:
    images, made = pictures(), backbone()
    whole = made(images)
    made.test_ratio = 0.25
    for seed in (1, 2):
        part = made(images, noise=noise_of(seed))
        assert torch.equal(part["c2"], whole["c2"]) and torch.equal(part["c3"], whole["c3"])
        assert not torch.allclose(part["c4"], whole["c4"], atol=1e-3)


@torch.no_grad()
def test_dropped_tokens_speak_only_through_their_projected_features() -> None:
    made = backbone(ratio=0.5)
    c4 = torch.randn(1, 24, 4, 6)
    tokens, noise = made.encoder.tokens(c4), noise_of(4, batch=1)
    sampled = sample_tokens(tokens, 0.5, noise=noise)
    dropped = (sampled.restore_ids >= 12).reshape(1, 1, 4, 6)
    changed = torch.where(dropped, c4 + 1.0, c4)
    again = sample_tokens(made.encoder.tokens(changed), 0.5, noise=noise)
    encoded, encoded_again = made.encoder.encode(sampled.tokens), made.encoder.encode(again.tokens)
    assert torch.equal(encoded, encoded_again)
    filled = [made.decoder(encoded, sampled.keep_ids, maps) for maps in (c4, changed)]
    assert not torch.allclose(filled[0], filled[1], atol=1e-3)
    nn.init.zeros_(made.decoder.conv_feat_proj.weight)
    nn.init.zeros_(made.decoder.conv_feat_proj.bias)
    assert torch.equal(*(made.decoder(encoded, sampled.keep_ids, maps) for maps in (c4, changed)))


@torch.no_grad()
def test_tokens_of_padding_are_not_kept_while_there_are_others() -> None:
    sizes = [(64, 50), (40, 96)]
    mask = padding_mask_of(sizes, (4, 6), 16)
    assert mask.tolist()[0] == [[False] * 4 + [True] * 2] * 4, "50 columns reach into the fourth cell"
    assert mask.tolist()[1] == [[False] * 6] * 3 + [[True] * 6], "40 rows reach into the third"
    for seed in range(5):
        sampled = sample_tokens(torch.randn(2, 24, 4), 0.5, mask, noise_of(seed))
        assert not mask.flatten(1).gather(1, sampled.keep_ids).any()
    # Of the first picture 16 tokens are valid, 18 are kept: two of padding come in.
    sampled = sample_tokens(torch.randn(2, 24, 4), 0.75, mask, noise_of(0))
    assert mask.flatten(1).gather(1, sampled.keep_ids).sum(dim=1).tolist() == [2, 0]


@torch.no_grad()
def test_what_lies_in_dropped_padding_does_not_reach_the_encoder() -> None:
    made = backbone(ratio=0.5)
    noise = noise_of(7, batch=1)
    sizes = torch.tensor([[64, 48]])
    seen: list[Tensor] = []
    made.encoder.norm.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    images = pictures(batch=1)
    for padding in (0.0, 5.0):
        c4 = made.encoder.patch_embed(images).c4
        c4[..., 3:] = padding
        made.encoder.patch_embed.forward = _fixed(c4)  # type: ignore[method-assign]
        made(images, sizes, noise)
        del made.encoder.patch_embed.forward
    assert torch.equal(*seen)


def _fixed(c4: Tensor) -> Any:
    return lambda _images: StemMaps(c4, c4, c4)


@pytest.mark.parametrize("depth", [3, 4])
@pytest.mark.parametrize("kind", [ConvStem, PatchStem])
def test_maps_have_the_channels_and_strides_that_the_backbone_says(kind: Any, depth: int) -> None:
    made = backbone(stem=kind(3, 24, depth))
    maps = made(pictures(height=128, width=64))
    patch = 2**depth
    assert made.channels == (6, 12, 16, 16)
    assert made.strides == (patch // 4, patch // 2, patch, 2 * patch)
    for found, channels, stride in zip(maps.values(), made.channels, made.strides, strict=True):
        assert found.shape == (2, channels, 128 // stride, 64 // stride)
    assert torch.equal(maps["c5"], nn.functional.max_pool2d(maps["c4"], 2))


@pytest.mark.parametrize(("ratio", "fill"), [(1.0, "conv"), (0.5, "conv"), (0.5, "mask_token")])
def test_everything_but_the_positions_learns(ratio: float, fill: str) -> None:
    made = backbone(train_ratio=ratio, fill=fill).train()
    sum(found.square().sum() for found in made(pictures()).values()).backward()
    for name, parameter in made.named_parameters():
        if name.endswith("pos_embed"):
            assert parameter.grad is None
        elif "conv_feat_proj" in name and ratio == 1:
            assert not parameter.grad.any(), "nothing was dropped"  # type: ignore[union-attr]
        else:
            assert parameter.grad is not None and parameter.grad.any(), name


def test_the_encoders_work_falls_with_the_ratio_and_that_of_attention_with_its_square() -> None:
    made = backbone()
    rows = []
    for ratio in (0.25, 0.5, 1.0):
        tokens = torch.randn(1, int(96 * ratio), 24)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            made.encoder.encode(tokens)
        counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        rows.append((sum(counts.values()), sum(n for op, n in counts.items() if "bmm" in op)))
    total, attention = zip(*rows, strict=True)
    assert total[0] < total[1] < total[2]
    assert attention[2] == 4 * attention[1] == 16 * attention[0] > 0


@given(rows=st.integers(1, 7), columns=st.integers(1, 7), quarter=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_a_table_resized_to_its_own_grid_is_itself(rows: int, columns: int, quarter: int) -> None:
    table = sincos_positions(4 * quarter, (rows, columns), class_row=True)[None]
    assert torch.equal(resize_positions(table, (rows, columns), (rows, columns)), table)
    codes = table[:, 1:].reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    by_hand = nn.functional.interpolate(codes, size=(rows, columns), mode="bicubic", align_corners=False)
    torch.testing.assert_close(by_hand, codes)


# ------------------------------------------------------------------------------------------------------ further rules


def test_the_networks_have_the_published_sizes() -> None:
    with torch.device("meta"):
        encoder, decoder = MIMDetEncoder(), MIMDetDecoder(768)

    def millions(module: nn.Module) -> float:
        return sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6

    assert round(millions(encoder.patch_embed), 2) == 4.08
    assert round(millions(encoder), 1) == 89.1
    assert round(millions(decoder), 1) == 13.4


def test_half_of_the_tokens_is_seen_in_training_and_all_in_evaluation() -> None:
    made = backbone(train_ratio=0.3)
    seen: list[int] = []
    made.encoder.norm.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[1]))
    made(pictures())
    made.train()(pictures())
    assert seen == [24, math.floor(24 * 0.3)]


@torch.no_grad()
def test_a_mask_token_stands_at_every_dropped_place() -> None:
    made = backbone(ratio=0.5, fill="mask_token")
    assert not hasattr(made.decoder, "conv_feat_proj")
    made.decoder.decoder_blocks = nn.ModuleList()
    made.decoder.decoder_norm = nn.Identity()  # type: ignore[assignment]
    noise = noise_of(8)
    c4 = made(pictures(), noise=noise)["c4"].flatten(2).transpose(1, 2)
    dropped = sample_tokens(torch.zeros(2, 24, 1), 0.5, noise=noise).restore_ids >= 12
    places = resize_positions(made.decoder.decoder_pos_embed[:, 1:], (4, 4), (4, 6)).expand(2, -1, -1)
    torch.testing.assert_close((c4 - places)[dropped], made.decoder.mask_token[0].expand(24, -1))


def test_checkpointing_changes_no_number() -> None:
    grads = []
    for checkpointing in (False, True):
        made = backbone(checkpointing=checkpointing).train()
        made(pictures(), noise=noise_of(1))["c4"].square().mean().backward()
        grads.append([p.grad for p in made.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_it_runs_in_bf16() -> None:
    made = backbone(train_ratio=0.5).train()
    with torch.autocast("cpu", torch.bfloat16):
        maps = made(pictures())
    assert all(torch.isfinite(found.float()).all() for found in maps.values())


def test_stem_encoder_and_the_rest_learn_at_three_paces() -> None:
    made = nn.ModuleDict({"backbone": backbone(), "head": nn.Linear(16, 3)})
    groups = mimdet_param_groups(made, 8e-5, 2.0, 0.1)
    name_of = {id(parameter): name for name, parameter in made.named_parameters()}
    found = {name_of[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert set(found) == {n for n, p in made.named_parameters() if p.requires_grad}
    assert not any("pos_embed" in name for name in found)
    assert sum(len(group["params"]) for group in groups) == len(found), "every parameter once"
    for name, (lr, decay) in found.items():
        pace = 1 / 2.0 if name.startswith("backbone.encoder.") else 2.0
        pace = 1.0 if "patch_embed" in name else pace
        assert lr == pytest.approx(8e-5 * pace), name
        assert decay == (0.1 if made.get_parameter(name).ndim > 1 else 0.0), name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ConvStem(3, 20), "multiple of 8"),
        (lambda: ConvStem(3, 24, depth=2), "at least 3"),
        (lambda: sample_tokens(torch.zeros(1, 4, 2), 0.0), "ratio = 0.0"),
        (lambda: sample_tokens(torch.zeros(1, 4, 2), 1.5), "ratio = 1.5"),
        (lambda: sample_tokens(torch.zeros(1, 4, 2), 0.5, noise=torch.zeros(1, 3)), r"expected \(1, 4\)"),
        (lambda: sample_tokens(torch.zeros(1, 4, 2), 0.5, torch.zeros(1, 4)), "padding_mask"),
        (lambda: backbone().eval()(pictures(), noise=noise_of(0, length=5)), r"expected \(2, 24\)"),  # at ratio 1
        (lambda: backbone(ratio=2.0), "test_ratio = 2.0"),
        (lambda: backbone(train_ratio=0.0), "train_ratio = 0.0"),
        (lambda: backbone()(pictures(width=80)), "multiples of 32"),
        (lambda: backbone()(pictures(channels=1)), r"expected \(B, 3, H, W\)"),
        (lambda: backbone()(pictures(), [(64, 96)]), "of 1 pictures"),
        (lambda: backbone(image_size=60), "multiples of the tokens' stride"),
        (lambda: MIMDetDecoder(24, image_size=64, fill="zeros"), "fill = 'zeros'"),  # type: ignore[arg-type]
        (lambda: mimdet_param_groups(nn.Linear(2, 2), 1e-4, 2.0, 0.1), "no MIMDetBackbone"),
        (lambda: mimdet_param_groups(backbone(), 1e-4, 0.0, 0.1), "multiplier = 0.0"),
    ],
)
def test_impossible_requests_are_refused_with_a_reason(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()


def test_a_tiny_picture_keeps_at_least_one_token() -> None:
    made = backbone(ratio=0.25)
    made.test_ratio = 0.01
    assert made(pictures(height=32, width=32))["c4"].shape == (2, 16, 2, 2)
