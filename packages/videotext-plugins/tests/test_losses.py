"""Similarities and losses of pairs: golden numbers of the released code, and what must be true of every matrix."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bowerbird_videotext.losses import cosine_similarity_matrix, max_margin_loss, symmetric_info_nce


def matrix(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, count, generator=generator, dtype=torch.float64) * 2 - 1


squares = given(count=st.integers(2, 7), seed=st.integers(0, 9999))


@pytest.mark.parametrize(
    ("name", "text", "video"),
    [
        ("frozen-dual-encoder/norm_softmax_loss", "text", "video"),
        ("mac/masked_contrastive_loss", "masked_text", "masked_video"),
    ],
)
def test_the_loss_of_embeddings_and_its_gradients_are_those_of_the_released_code(
    golden: Any, name: str, text: str, video: str
) -> None:
    values = golden(name)
    texts, videos = values[text].requires_grad_(), values[video].requires_grad_()
    loss = symmetric_info_nce(cosine_similarity_matrix(texts, videos), values["temperature"])
    assert loss.item() == pytest.approx(values["loss"], rel=1e-9)
    loss.backward()
    torch.testing.assert_close(texts.grad, values[f"grad_{text}"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(videos.grad, values[f"grad_{video}"], rtol=1e-9, atol=1e-12)


def test_similarities_and_rows_of_zeros_are_those_of_the_released_code(golden: Any) -> None:
    values = golden("frozen-dual-encoder/norm_softmax_loss")
    sims = cosine_similarity_matrix(values["text"], values["video"], values["eps"])
    torch.testing.assert_close(sims, values["sims"], rtol=1e-9, atol=1e-12)
    leaf = values["sims"].requires_grad_()
    symmetric_info_nce(leaf, values["temperature"]).backward()
    torch.testing.assert_close(leaf.grad, values["grad_sims"], rtol=1e-9, atol=1e-12)
    with_zeros = cosine_similarity_matrix(values["text_with_zero_row"], values["video_for_zero_row"])
    torch.testing.assert_close(with_zeros, values["sims_with_zero_row"], rtol=1e-9, atol=1e-12)
    assert symmetric_info_nce(with_zeros).item() == pytest.approx(values["loss_with_zero_row"], rel=1e-9)


@pytest.mark.parametrize("fix_norm", [True, False])
def test_the_margin_loss_is_that_of_the_released_code(golden: Any, fix_norm: bool) -> None:
    values = golden("frozen-dual-encoder/max_margin_loss")
    sims = values["sims"].requires_grad_()
    loss = max_margin_loss(sims, values["margin"], fix_norm=fix_norm)
    assert loss.item() == pytest.approx(values[f"loss_fix_norm_{fix_norm}"], rel=1e-6)
    loss.backward()
    torch.testing.assert_close(sims.grad, values[f"grad_fix_norm_{fix_norm}"], rtol=1e-6, atol=1e-6)


@settings(max_examples=15, deadline=None)
@squares
def test_the_loss_does_not_depend_on_the_order_of_pairs_nor_on_which_side_is_called_text(count: int, seed: int) -> None:
    sims = matrix(count, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    loss = symmetric_info_nce(sims)
    torch.testing.assert_close(symmetric_info_nce(sims[order][:, order]), loss)
    torch.testing.assert_close(symmetric_info_nce(sims.T), loss)
    torch.testing.assert_close(max_margin_loss(sims[order][:, order]), max_margin_loss(sims))
    flat = symmetric_info_nce(torch.zeros(count, count, dtype=torch.float64))
    assert flat.item() == pytest.approx(2 * math.log(count))


@settings(max_examples=15, deadline=None)
@squares
def test_gradients_pull_pairs_together_push_others_apart_and_sum_to_zero(count: int, seed: int) -> None:
    sims = matrix(count, seed).requires_grad_()
    symmetric_info_nce(sims, 0.5).backward()
    others = ~torch.eye(count, dtype=torch.bool)
    assert sims.grad is not None
    assert sims.grad.sum().abs() < 1e-12
    assert (sims.grad.diagonal() <= 0).all() and (sims.grad[others] >= 0).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 9999), scale=st.floats(1e-3, 1e3))
def test_cosines_lie_between_minus_one_and_one_whatever_the_lengths(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    texts, videos = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (3, 4))
    sims = cosine_similarity_matrix(texts, videos)
    assert sims.shape == (3, 4) and sims.abs().max() <= 1 + 1e-12
    torch.testing.assert_close(cosine_similarity_matrix(texts * scale, videos), sims)
    texts[1] = 0
    zeros = cosine_similarity_matrix(texts, videos)[1]
    assert torch.equal(zeros, torch.zeros_like(zeros))


def test_losses_in_bfloat16_are_computed_in_float32() -> None:
    sims = matrix(6, 0)
    assert symmetric_info_nce(sims.bfloat16()).dtype == torch.float32
    texts, videos = torch.randn(6, 32), torch.randn(6, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = symmetric_info_nce(sims.float())
        cosines = cosine_similarity_matrix(texts, videos)
    torch.testing.assert_close(cosines, cosine_similarity_matrix(texts, videos), rtol=1e-6, atol=1e-6)
    assert loss.item() == pytest.approx(symmetric_info_nce(sims).item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 4), (3,), (0, 0)])
def test_a_matrix_that_is_not_square_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(N, N\)"):
        symmetric_info_nce(torch.zeros(shape))


def test_impossible_values_are_refused() -> None:
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            symmetric_info_nce(torch.zeros(2, 2), temperature)
    with pytest.raises(ValueError, match="2 or more"):
        max_margin_loss(torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"expected \(Q, P\) and \(G, P\)"):
        cosine_similarity_matrix(torch.zeros(2, 3), torch.zeros(2, 4))
