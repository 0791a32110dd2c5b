"""Image tokenizers: the official numbers, what holds for every input, and a trained one that others can use."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bowerbird import dist
from bowerbird.data.images import Preprocessing
from bowerbird.encoders import load_encoder
from bowerbird.errors import InputError
from bowerbird.protocols import TrainedRun
from bowerbird.recipe import resolve_recipe
from bowerbird.testing import EncoderContract, ObjectiveContract, SimpleBuildContext, assert_close
from bowerbird.train.loop import train
from bowerbird_mim.codes import code_mixture, count_codes, item_noise, perplexity
from bowerbird_mim.tokenizer import (
    VQVAE,
    DiscreteVAE,
    DVAEConfig,
    GumbelQuantizer,
    ImageTokenizer,
    TokenizerConfig,
    TokenizerObjective,
    TokenizerTraining,
    VectorQuantizer,
    VQVAEConfig,
    check_token_grid,
    code_kl,
    gumbel_noise,
    gumbel_softmax,
    load_tokenizer,
    save_tokenizer,
    temperature_at,
    train_tokenizer,
    usage_kl,
)
from bowerbird_mim.tokenizer_quality import tokenizer_quality

SMALL = {"image_size": 8, "num_tokens": 6, "codebook_dim": 5, "hidden_dim": 4, "num_layers": 1}


class TestDVAEContract(EncoderContract):
    name = "mim:dvae"
    config = SMALL


class TestVQVAEContract(EncoderContract):
    name = "mim:vqvae"
    config = SMALL


class TestVQVAELearnedByGradientContract(EncoderContract):
    name = "mim:vqvae"
    config = {**SMALL, "learn_codes": "gradient"}


class TestObjectiveContract(ObjectiveContract):
    name = "mim:tokenizer"
    config = {"kl_weight": 0.01}

    def make_encoder(self) -> DiscreteVAE:
        return DiscreteVAE.build(DVAEConfig(**SMALL))


class TestVQObjectiveContract(ObjectiveContract):
    name = "mim:tokenizer"
    config = {"recon": "smooth_l1", "crop_scale": (0.5, 1.0), "flip_prob": 0.5}

    def make_encoder(self) -> VQVAE:
        # Of 4 channels behind codes near 0 all ReLUs may be closed.
        return VQVAE.build(VQVAEConfig(**SMALL | {"hidden_dim": 16}))


# ------------------------------------------------------------------------------------------------ official numbers


@pytest.mark.parametrize("name", ["dvae_mse", "dvae_smoothl1"])
def test_a_whole_step_of_the_dvae(golden, name: str) -> None:
    values = golden(f"tokenizer/{name}")
    model = DiscreteVAE(
        values["image_size"],
        values["channels"],
        num_tokens=values["num_tokens"],
        codebook_dim=values["codebook_dim"],
        hidden_dim=values["hidden_dim"],
        num_layers=values["num_layers"],
        temperature=values["temperature"],
        kl_weight=values["kl_div_loss_weight"],
        kl_reduction="sum",
        recon="smooth_l1" if values["smooth_l1_loss"] else "mse",
    ).double()
    model.load_state_dict({k.removeprefix("sd."): v for k, v in values.items() if k.startswith("sd.")})
    output = model.output(values["images"], values["gumbel_noise"])
    output.loss.backward()
    loose = {"rtol": 1e-6, "atol": 1e-9}  # the prior is a float32 number in the official code
    assert_close(model.logits(values["images"]), values["logits"])
    soft = gumbel_softmax(values["logits"], values["gumbel_noise"], values["temperature"])
    assert_close(soft, values["soft_one_hot"])
    assert_close(output.reconstruction, values["reconstruction"])
    assert_close(output.parts["reconstruction"], values["recon_loss"])
    assert_close(output.parts["kl"], values["kl_term_unweighted"], **loose)
    assert_close(output.loss, values["loss"], **loose)
    assert_close(model.loss(values["images"], values["gumbel_noise"]), values["loss"], **loose)
    assert torch.equal(model.ids(values["images"]), values["indices"])
    assert_close(model.probs(values["images"]), values["probs"])
    assert_close(model.decode(values["indices"]), values["decode_of_indices"])
    for parameter_name, parameter in model.named_parameters():
        assert_close(parameter.grad, values[f"grad.{parameter_name}"], where=parameter_name, **loose)


def test_gumbel_quantiser(golden) -> None:
    values = golden("tokenizer/gumbel_quantize")
    quantizer = GumbelQuantizer(
        values["num_hiddens"],
        values["embedding_dim"],
        values["n_embed"],
        temperature=values["tau"],
        straight_through=bool(values["hard"]),
    ).double()
    quantizer.load_state_dict({k.removeprefix("sd."): v for k, v in values.items() if k.startswith("sd.")})
    z = values["z"].clone().requires_grad_()
    chosen = quantizer(z, values["gumbel_noise"])
    (chosen.quantized * values["upstream"]).sum().backward()
    assert_close(chosen.logits, values["logits"])
    assert_close(chosen.quantized, values["z_q"])
    assert torch.equal(chosen.ids, values["indices"])
    assert_close(z.grad, values["grad_z"])
    for name, parameter in quantizer.named_parameters():
        assert_close(parameter.grad, values[f"grad.{name}"], where=name)


def quantizer_with(codebook: torch.Tensor, **options) -> VectorQuantizer:
    quantizer = VectorQuantizer(*codebook.shape, **options).double()
    with torch.no_grad():
        quantizer.codebook.copy_(codebook)
    return quantizer


def test_vector_quantiser_with_the_weight_where_the_first_release_had_it(golden) -> None:
    values = golden("tokenizer/vector_quantize")
    quantizer = quantizer_with(values["codebook"], commitment=values["beta"], weight_on="codebook")
    z = values["z"].clone().requires_grad_()
    quantized, loss, ids = quantizer(z)
    ((quantized * values["upstream"]).sum() + loss).backward()
    assert_close(quantized, values["z_q"])
    assert_close(loss, values["loss"])
    assert torch.equal(ids, values["indices"])
    assert_close(perplexity(count_codes(ids, 6)), values["perplexity"], rtol=1e-6)
    assert_close(z.grad, values["grad_z"])
    assert_close(quantizer.codebook.grad, values["grad_codebook"])


def test_vector_quantiser_of_the_paper_has_the_same_value_and_other_gradients(golden) -> None:
    values = golden("tokenizer/vector_quantize")
    z = values["z"].clone().requires_grad_()
    quantizer = quantizer_with(values["codebook"], commitment=values["beta"])
    quantized, loss, _ = quantizer(z)
    ((quantized * values["upstream"]).sum() + loss).backward()
    assert_close(loss, values["loss_paper_convention_beta_on_commitment"])
    assert_close(quantizer.codebook.grad, values["grad_codebook"] / values["beta"])
    assert_close(z.grad - values["upstream"], (values["grad_z"] - values["upstream"]) * values["beta"], atol=1e-12)


def test_codes_that_follow_their_features(golden) -> None:
    values = golden("tokenizer/ema_codebook")
    quantizer = quantizer_with(values["weight_before"], ema_decay=values["decay"], eps=values["eps"])
    quantizer.cluster_size.copy_(values["cluster_size_before"])
    quantizer.embed_sum.copy_(values["embed_avg_before"])
    quantizer.update(values["z"], values["indices"])
    assert_close(quantizer.cluster_size, values["cluster_size_after"])
    assert_close(quantizer.embed_sum, values["embed_avg_after"])
    assert_close(quantizer.codebook, values["weight_after"])


# ------------------------------------------------------------------------------------------------ invariants


@settings(max_examples=20, deadline=None)
@given(vocab=st.integers(2, 9), cells=st.integers(1, 4), temperature=st.floats(0.05, 5.0), seed=st.integers(0, 10**6))
def test_a_relaxed_choice_is_a_probability_vector(vocab: int, cells: int, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, vocab, cells, cells, generator=generator, dtype=torch.float64)
    noise = gumbel_noise(tuple(logits.shape), generator=generator, dtype=torch.float64)
    soft = gumbel_softmax(logits, noise, temperature)
    assert (soft >= 0).all()
    assert_close(soft.sum(dim=1), torch.ones(2, cells, cells, dtype=torch.float64))
    sharp = gumbel_softmax(logits, noise, 1e-6)
    assert torch.equal(sharp.argmax(dim=1), (logits + noise).argmax(dim=1))
    assert_close(sharp.amax(dim=1), torch.ones(2, cells, cells, dtype=torch.float64), rtol=1e-3)


def test_the_largest_noisy_logit_is_drawn_from_the_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5])
    noise = gumbel_noise((100_000, 4), generator=torch.Generator().manual_seed(0))
    frequencies = count_codes((logits + noise).argmax(dim=1), 4) / 100_000
    assert_close(frequencies, logits.softmax(dim=0), atol=0.006, rtol=0)


def test_noise_of_an_item_depends_on_its_own_seed_only() -> None:
    noise = item_noise(torch.tensor([5, 7, 5]), (6, 2, 2))
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1:2], item_noise(torch.tensor([7]), (6, 2, 2)))
    many = item_noise(torch.arange(200), (50, 2, 2))
    assert abs(float(many.mean()) - 0.5772) < 0.02 and abs(float(many.var()) - math.pi**2 / 6) < 0.05


@settings(max_examples=20, deadline=None)
@given(vocab=st.integers(2, 9), scale=st.floats(0.0, 20.0), seed=st.integers(0, 10**6))
def test_divergences_from_uniform_lie_between_0_and_ln_v(vocab: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, vocab, 3, 3, generator=generator, dtype=torch.float64)
    per_cell, of_mean = float(code_kl(logits)), float(usage_kl(logits.softmax(dim=1)))
    assert -1e-12 <= of_mean <= per_cell + 1e-12 <= math.log(vocab) + 2e-12
    shifted = logits + torch.randn(2, 1, 3, 3, generator=generator, dtype=torch.float64)
    assert abs(float(code_kl(shifted)) - per_cell) < 1e-10


def test_divergences_are_0_for_constant_logits_and_ln_v_for_one_code() -> None:
    constant = torch.full((2, 5, 2, 2), 3.0, dtype=torch.float64)
    assert abs(float(code_kl(constant))) < 1e-12
    assert abs(float(usage_kl(constant.softmax(dim=1)))) < 1e-12
    one = torch.zeros(2, 5, 2, 2, dtype=torch.float64)
    one[:, 3] = 1e3
    assert_close(code_kl(one), math.log(5))
    assert_close(usage_kl(one.softmax(dim=1)), math.log(5))


def test_two_processes_have_the_usage_and_the_gradient_of_the_joined_batch(monkeypatch) -> None:
    logits = torch.randn(4, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    joined = usage_kl(logits.softmax(dim=1))
    (gradient,) = torch.autograd.grad(joined, logits)
    means = [part.softmax(dim=1).mean(dim=(0, 2, 3)).detach() for part in logits.chunk(2)]
    monkeypatch.setattr(dist, "is_distributed", lambda: True)
    monkeypatch.setattr(dist, "mean_over_processes", lambda _: (means[0] + means[1]) / 2)
    own = [usage_kl(part.softmax(dim=1)) for part in logits.chunk(2)]
    (averaged,) = torch.autograd.grad((own[0] + own[1]) / 2, logits)
    assert_close(own[0], joined)
    assert_close(own[1], joined)
    assert_close(averaged, gradient)


def test_certain_cells_that_share_the_codes_evenly_cost_no_usage() -> None:
    ids = torch.arange(8).reshape(2, 2, 2) % 4
    certain = torch.nn.functional.one_hot(ids, 4).movedim(-1, 1).double()
    assert abs(float(usage_kl(certain))) < 1e-12


def small_dvae(**options) -> DiscreteVAE:
    return DiscreteVAE(8, 3, num_tokens=6, codebook_dim=5, hidden_dim=4, num_layers=2, **options).double()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_ids_ignore_a_shift_and_a_positive_factor_of_the_logits(images) -> None:
    model = small_dvae()
    ids = model.ids(images)
    with torch.no_grad():
        model.encoder[-1].bias += 7.0
        assert torch.equal(model.ids(images), ids)
        for parameter in model.encoder[-1].parameters():
            parameter *= 0.25
    assert torch.equal(model.ids(images), ids)


def test_straight_through_takes_a_row_of_the_codebook_exactly_and_has_the_soft_gradient() -> None:
    codes = torch.randn(6, 5)
    upstream = torch.randn(2, 5, 3, 3)
    gradients = []
    noise = gumbel_noise((2, 6, 3, 3))
    for straight_through in (False, True):
        logits = torch.linspace(-1, 1, 108).reshape(2, 6, 3, 3).requires_grad_()
        mixture = code_mixture(gumbel_softmax(logits, noise, 0.7, straight_through=straight_through), codes)
        (mixture * upstream).sum().backward()
        gradients.append(logits.grad)
    assert torch.equal(mixture.movedim(1, -1), codes[(logits + noise).argmax(dim=1)])
    assert_close(gradients[1], gradients[0], rtol=1e-6)


def test_a_row_of_the_codebook_is_quantised_to_itself_at_no_cost() -> None:
    quantizer = VectorQuantizer(7, 3)
    with torch.no_grad():
        quantizer.codebook.normal_()
    z = quantizer.codebook[[4, 1, 4]].detach().clone().requires_grad_()
    quantized, loss, ids = quantizer(z)
    assert ids.tolist() == [4, 1, 4] and loss == 0 and torch.equal(quantized, z)


def test_the_gradient_passes_the_quantiser_unchanged() -> None:
    z, upstream = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    (VectorQuantizer(7, 3)(z).quantized * upstream).sum().backward()
    assert torch.equal(z.grad, upstream)


def test_without_memory_a_used_code_becomes_the_mean_of_its_features() -> None:
    quantizer = VectorQuantizer(3, 2, ema_decay=0.0, eps=1e-12).double()
    quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]))
    z = torch.tensor([[1.0, 1.0], [-1.0, 2.0], [9.0, 1.0]], dtype=torch.float64)
    assert quantizer(z).ids.tolist() == [0, 0, 1]
    assert_close(quantizer.codebook[:2], torch.tensor([[0.0, 1.5], [9.0, 1.0]]).double(), atol=1e-9)


def test_codes_move_in_training_only_and_unused_ones_stay_where_they_are() -> None:
    quantizer = VectorQuantizer(3, 2, ema_decay=0.9).double().eval()
    quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [5.0, 5.0], [-5.0, 5.0]]))
    quantizer.embed_sum.copy_(quantizer.codebook)
    before = quantizer.codebook.clone()
    z = torch.tensor([[0.5, 0.5]] * 3, dtype=torch.float64)
    quantizer(z)
    assert torch.equal(quantizer.codebook, before)
    quantizer.train()(z)
    assert 0 < quantizer.codebook[0, 0] < 0.5
    assert_close(quantizer.codebook[1:], before[1:], rtol=1e-4)


def test_evaluation_of_the_gumbel_quantiser_draws_no_noise() -> None:
    quantizer = GumbelQuantizer(4, 3, 6).eval()
    z = torch.randn(2, 4, 3, 3)
    first, second = quantizer(z), quantizer(z)
    assert torch.equal(first.quantized, second.quantized)
    assert torch.equal(first.ids, first.logits.argmax(dim=1))
    drawn = [quantizer.train()(z).ids for _ in range(2)]
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("kind", [DiscreteVAE, VQVAE])
def test_the_numbering_of_codes_does_not_matter(images, kind) -> None:
    model = kind(8, 3, num_tokens=6, codebook_dim=5, hidden_dim=4, num_layers=1).double().eval()
    ids = model.ids(images)
    picture = model.decode(ids)
    order = torch.randperm(6)
    with torch.no_grad():
        model.codes.copy_(model.codes[order].clone())
    assert torch.equal(model.decode(order.argsort()[ids]), picture)


@settings(max_examples=15, deadline=None)
@given(layers=st.integers(1, 3), height=st.integers(1, 40), width=st.integers(1, 40), vq=st.booleans())
def test_a_cell_is_2_to_the_n_pixels_wide_and_other_sides_are_refused(
    layers: int, height: int, width: int, vq: bool
) -> None:
    stride = 2**layers
    kind = VQVAE if vq else DiscreteVAE
    model = kind(2 * stride, 1, num_tokens=4, codebook_dim=3, hidden_dim=2, num_layers=layers)
    pictures = torch.zeros(1, 1, height, width)
    if height % stride or width % stride:
        with pytest.raises(ValueError, match=f"{height} x {width} pixels: both sides must be multiples of {stride}"):
            model.logits(pictures)
        return
    assert model.logits(pictures).shape == (1, 4, height // stride, width // stride)
    assert model.reconstruct(pictures).shape == pictures.shape


def test_logits_of_the_nearest_code_are_negative_distances(images) -> None:
    model = VQVAE(8, 3, num_tokens=6, codebook_dim=5, hidden_dim=4, num_layers=1, variance=0.2).double()
    z = model.encoder(images)
    distances = (z[:, None] - model.codes[None, :, :, None, None]).square().sum(dim=2)
    assert_close(model.logits(images), -distances / 0.4, rtol=1e-6)
    assert torch.equal(model.ids(images), model.quantizer(z).ids)


def test_bf16_keeps_losses_in_float32() -> None:
    for model in (small_dvae(usage_weight=0.1, kl_weight=0.1).float(), VQVAE(8, num_tokens=6, num_layers=1)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model.output(torch.randn(2, 3, 8, 8))
        assert output.loss.dtype == torch.float32 and output.loss.isfinite()
        output.loss.backward()


@pytest.mark.parametrize("kind", [DiscreteVAE, VQVAE])
def test_networks_in_half_precision_have_losses_in_float32(kind) -> None:
    model, pictures = kind(8, num_tokens=6, num_layers=1).bfloat16(), torch.randn(2, 3, 8, 8).bfloat16()
    loss = model.loss(pictures)
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert model({"image": pictures}).tokens.shape == (2, 16, model.codes.shape[1])
    quantizer = GumbelQuantizer(3, 4, 6).bfloat16()
    assert quantizer(pictures).quantized.shape == (2, 4, 8, 8)


def test_a_compiled_step_gives_the_same_loss() -> None:
    model, pictures, noise = small_dvae(usage_weight=0.1), torch.randn(2, 3, 8, 8).double(), torch.rand(2, 6, 2, 2)
    step = torch.compile(lambda x, n, t: model.loss(x, n, temperature=t), fullgraph=True, backend="eager")
    for temperature in (1.0, 0.5):
        t = torch.tensor(temperature)
        assert_close(step(pictures, noise.double(), t), model.loss(pictures, noise.double(), temperature=temperature))


# ------------------------------------------------------------------------------------------------ training


def blobs(count: int, seed: int = 0) -> torch.Tensor:
    """Smooth pictures of 8 x 8 in [-1, 1]: what few codes can restore."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 2, 2, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=8, mode="bilinear").tanh()


TRAINING = TokenizerTraining(
    encoder=DVAEConfig(image_size=8, channels=1, num_tokens=8, codebook_dim=8, hidden_dim=16, num_layers=1),
    steps=80,
    batch_size=32,
    lr=1e-2,
)


def test_a_trained_tokenizer_restores_new_pictures_with_most_of_its_codes() -> None:
    tokenizer = train_tokenizer(blobs(256), TRAINING, torch.Generator().manual_seed(0))
    quality = tokenizer_quality(tokenizer, blobs(64, seed=1).split(16))
    assert quality["mse_share"] < 0.15
    assert quality["usage"] > 0.5
    assert quality["perplexity"] > 2
    assert not tokenizer.training


def test_training_depends_on_its_generator_only() -> None:
    short = TRAINING.model_copy(update={"steps": 3})
    torch.manual_seed(1)
    first = train_tokenizer(blobs(64), short, torch.Generator().manual_seed(3)).state_dict()
    torch.manual_seed(2)
    second = train_tokenizer(list(blobs(64)), short, torch.Generator().manual_seed(3)).state_dict()
    other = train_tokenizer(blobs(64), short, torch.Generator().manual_seed(4)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_pictures_and_items_of_data_sets_are_prepared_as_the_tokenizer_says() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 10, 3), np.uint8)
    items = [{"image": Image.fromarray(array), "label": 0} for array in pixels]
    config = TokenizerTraining(encoder=VQVAEConfig(**SMALL), steps=2, batch_size=4)
    tokenizer = train_tokenizer(items, config)
    assert isinstance(tokenizer, VQVAE)
    prepared = torch.stack([torch.from_numpy(tokenizer.preprocessing(item["image"])) for item in items])
    again = train_tokenizer(prepared, config)
    assert torch.equal(tokenizer.codes, again.codes)


def test_the_temperature_falls_exponentially_from_start_to_end() -> None:
    values = [temperature_at(step, total_steps=5, start=1.0, end=0.3) for step in range(5)]
    assert values[0] == 1.0 and math.isclose(values[-1], 0.3)
    ratios = [b / a for a, b in pairwise(values)]
    assert all(math.isclose(ratio, ratios[0]) for ratio in ratios)
    objective = TokenizerObjective(small_dvae().float(), TokenizerConfig(), total_steps=5)
    objective.before_step(2)
    assert math.isclose(float(objective.temperature), values[2], rel_tol=1e-6)


def test_a_collapsed_tokenizer_is_reported() -> None:
    model = DiscreteVAE(8, 3, num_tokens=40, codebook_dim=5, hidden_dim=4, num_layers=1)
    with torch.no_grad():
        model.encoder[-1].bias[7] += 100.0
    objective = TokenizerObjective(model, TokenizerConfig(), total_steps=5).train()
    batch = {"image": torch.randn(4, 3, 8, 8), "noise_seed": torch.arange(4)}
    stats = objective(batch).stats
    assert_close(stats["usage"], 1 / 40, rtol=1e-6)
    assert_close(stats["perplexity"], 1.0, rtol=1e-6)
    with pytest.warns(UserWarning, match=r"uses 1 of 40 codes \(less than 10%\)"):
        objective.exported_encoder()


def test_only_the_tokenizer_objective_trains_the_decoder() -> None:
    model = DiscreteVAE.build(DVAEConfig(**SMALL))
    assert not any(parameter.requires_grad for parameter in model.decoder.parameters())
    TokenizerObjective(model, TokenizerConfig(), total_steps=1)
    assert all(parameter.requires_grad for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------ kept tokenizers


@pytest.mark.parametrize("config", [DVAEConfig(**SMALL), VQVAEConfig(**SMALL, learn_codes="gradient", variance=0.1)])
def test_a_saved_tokenizer_is_an_encoder_and_gives_the_same_logits(tmp_path, config) -> None:
    kind = DiscreteVAE if isinstance(config, DVAEConfig) else VQVAE
    model = kind.build(config).eval()
    fingerprint = save_tokenizer(model, tmp_path / "tokenizer")
    again = load_tokenizer(tmp_path / "tokenizer")
    assert isinstance(again, ImageTokenizer)
    pictures = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.logits(pictures), model.logits(pictures))
    assert not again.training and not any(parameter.requires_grad for parameter in again.parameters())
    loaded = load_encoder(tmp_path / "tokenizer")
    assert loaded.fingerprint == fingerprint and loaded.dim == 6
    rows = loaded.encode([Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")])
    assert rows.shape == (2, 6) and (rows >= 0).all()
    assert_close(torch.from_numpy(rows).norm(dim=1), torch.ones(2), rtol=1e-5)


def test_a_tokenizer_of_tensors_is_kept_as_well(tmp_path) -> None:
    model = VQVAE(8, 1, num_tokens=6, codebook_dim=5, hidden_dim=4, num_layers=2, ema_decay=0.5)
    save_tokenizer(model, tmp_path / "tokenizer")
    again = load_tokenizer(tmp_path / "tokenizer")
    pictures = torch.randn(2, 1, 8, 12)
    with torch.no_grad():
        assert torch.equal(again.logits(pictures), model.logits(pictures))
    assert again.preprocessing is None and again.quantizer.ema_decay == 0.5


@pytest.mark.parametrize("kind", [DiscreteVAE, VQVAE])
def test_a_tokenizer_in_double_precision_is_kept_in_float32(tmp_path, kind) -> None:
    model = kind(8, 1, num_tokens=6, codebook_dim=5, hidden_dim=4, num_layers=2).double()
    save_tokenizer(model, tmp_path / "tokenizer")
    again, pictures = load_tokenizer(tmp_path / "tokenizer"), torch.randn(2, 1, 8, 12)
    assert_close(again.logits(pictures).double(), model.logits(pictures.double()), rtol=1e-4, atol=1e-5)
    assert next(model.parameters()).dtype == torch.float64  # what was saved is left alone


def test_a_run_is_loaded_through_the_context_of_the_objective_that_asks(tmp_path) -> None:
    model = DiscreteVAE.build(DVAEConfig(**SMALL))
    run = TrainedRun(path=tmp_path, encoder=model, objective_state={}, classes=(), recipe={})
    assert load_tokenizer("runs/x", SimpleBuildContext(runs={"runs/x": run})) is model


def test_the_share_of_every_code_in_a_picture_is_its_embedding(images) -> None:
    model = small_dvae()
    features = model({"image": images})
    assert_close(features.pooled, model.probs(images).mean(dim=(2, 3)))
    assert features.grid == (2, 2)
    assert_close(features.tokens, model.probs(images).flatten(2).transpose(1, 2) @ model.codebook.weight)


# ------------------------------------------------------------------------------------------------ refusals


def test_what_does_not_fit_is_refused(images) -> None:
    model = small_dvae()
    for call, message in (
        (lambda: DiscreteVAE(30, num_layers=2), "30 x 30 pixels: both sides must be multiples of 4"),
        (lambda: DiscreteVAE(8, num_tokens=1, num_layers=1), "num_tokens = 1: expected at least 2"),
        (lambda: VectorQuantizer(1, 4), "num_codes = 1: expected at least 2"),
        (lambda: VectorQuantizer(4, 0), "dim = 0: expected at least 1"),
        (lambda: VectorQuantizer(4, 4, eps=0.0), "eps = 0.0: expected a number above 0"),
        (lambda: GumbelQuantizer(3, 0, 4), "dim = 0: expected at least 1"),
        (lambda: VectorQuantizer(4, 4, ema_decay=1.0), "ema_decay = 1.0"),
        (lambda: DiscreteVAE(8, num_layers=1, recon="l3"), "recon = 'l3'"),
        (lambda: DiscreteVAE(8, num_layers=1, kl_reduction="max"), "kl_reduction = 'max'"),
        (lambda: DiscreteVAE(8, num_layers=1, temperature=0.0), "temperature = 0.0"),
        (lambda: VQVAE(8, num_layers=1, variance=0.0), "variance = 0.0"),
        (lambda: model.logits(images[:, :1]), r"\(3, 1, 8, 8\); this tokenizer needs \(B, 3, height, width\)"),
        (lambda: model.logits((images * 50).byte()), "of type torch.uint8; expected .* floating point"),
        (lambda: model.logits(images * math.nan), "72 of 72 are NaN or infinite"),
        (lambda: model.loss(images * math.inf), "NaN or infinite"),
        (lambda: model.loss(images, torch.zeros(3, 6, 4, 4)), r"gumbel_noise has shape \(3, 6, 4, 4\)"),
        (lambda: model.decode(torch.full((1, 2, 2), 6)), "ids from 6 to 6; expected 0 to 5"),
        (lambda: model.decode(torch.zeros(1, 6, 2, 2)), r"expected integers \(B, h, w\)"),
        (lambda: train_tokenizer([], TRAINING), "no pictures"),
        (lambda: train_tokenizer((images[:, :1] * 50).byte(), TRAINING), "of type torch.uint8"),
        (lambda: train_tokenizer([(images[0], 1)], TRAINING), "item 0 is a tuple without a picture"),
        (lambda: train_tokenizer([{"picture": images[0]}], TRAINING), "item 0 is a dict without a picture"),
        (lambda: train_tokenizer([images[0], images[0, :, :4]], TRAINING), r"shapes \[\(3, 4, 8\), \(3, 8, 8\)\]"),
        (lambda: tokenizer_quality(model, []), "no pictures"),
        (
            lambda: check_token_grid(model, (8, 8), (4, 4)),
            "2 x 2 codes, but .* 4 x 4 patches; it needs .* 16 x 16",
        ),
        (lambda: check_token_grid(model, (8, 8), (2, 2), vocab_size=9), "vocab_size = 9, but the tokenizer has 6"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_settings_of_a_recipe_are_checked() -> None:
    with pytest.raises(ValueError, match="image_size = 30 is no multiple of 2\\^num_layers = 8"):
        DVAEConfig(image_size=30)
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        VQVAEConfig(num_tokens=1)
    context = SimpleBuildContext()
    with pytest.raises(InputError, match=r"objective\.usage_weight: a setting for mim:dvae"):
        TokenizerObjective.build(TokenizerConfig(usage_weight=0.1), VQVAE.build(VQVAEConfig(**SMALL)), context)
    from bowerbird.testing import TinyEncoder

    with pytest.raises(InputError, match="trains mim:dvae and mim:vqvae, not a TinyEncoder"):
        TokenizerObjective.build(TokenizerConfig(), TinyEncoder(), context)
    run = TrainedRun(path="x", encoder=TinyEncoder(), objective_state={}, classes=(), recipe={})
    with pytest.raises(InputError, match="'x' is a TinyEncoder, which gives no codes"):
        load_tokenizer("x", SimpleBuildContext(runs={"x": run}))
    tensors_only = TokenizerObjective(DiscreteVAE(8, 1, num_layers=1), TokenizerConfig(), total_steps=1)
    with pytest.raises(InputError, match="reads no picture files"):
        tensors_only.item_transform()


@pytest.mark.parametrize("kind", ["mim:dvae", "mim:vqvae"])
def test_a_run_by_recipe_is_measured_and_loaded(tmp_path, kind: str) -> None:
    recipe = resolve_recipe(
        {
            "name": "digits-tokenizer",
            "encoder": {"use": kind, **SMALL, "hidden_dim": 16},
            "objective": {"use": "mim:tokenizer"},
            "dataset": {"use": "core:digits", "split": "train"},
            "train": {"epochs": 1, "batch_size": 64, "optimizer": "adam", "lr": 0.01, "device": "cpu"},
            "evaluate": [{"use": "mim:tokenizer-quality", "dataset": "core:digits", "split": "test"}],
        },
        "test",
    )
    result = train(recipe, tmp_path / "run")
    assert {"mse_share", "usage", "perplexity", "target_perplexity"} == {key.split("/")[-1] for key in result.metrics}
    assert result.metrics["mim:tokenizer-quality/mse_share"] < 1
    assert 1 <= result.metrics["mim:tokenizer-quality/perplexity"] <= 6
    tokenizer = load_tokenizer(tmp_path / "run")
    assert tokenizer.ids(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 4)


def test_no_warning_where_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_tokenizer(blobs(32), TRAINING.model_copy(update={"steps": 2}))
    assert Preprocessing(size=8) == DVAEConfig(**SMALL).preprocessing()
