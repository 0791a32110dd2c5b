"""The losses of frames against the authors' numbers (data/mv-former/README.md), and what must hold for any input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from bowerbird.errors import InputError
from bowerbird_videotext.scl import cycle_consistency_loss, sequence_contrastive_loss

Golden = Callable[[str], dict[str, Any]]


def batch(clips: int = 2, frames: int = 5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(clips, 2, frames, 4, generator=generator).double(), dim=-1)
    times = torch.stack([torch.randperm(20, generator=generator)[:frames] for _ in range(2 * clips)])
    return {
        "z": z,
        "times": times.view(clips, 2, frames).sort(dim=-1)[0],
        "lengths": torch.full((clips, 2), 20),
        "valid": torch.ones(clips, 2, frames, dtype=torch.bool),
    }


@pytest.mark.parametrize("negatives", ["single_noself", "batch_noself"])
def test_the_loss_and_its_gradient_are_the_authors(golden: Golden, negatives: Any) -> None:
    g = golden(f"mv-former/sequence_contrastive_loss_{negatives}")
    z = g["embeddings"].requires_grad_()
    loss = sequence_contrastive_loss(
        z, g["frame_steps"], g["seq_lens"], g["frame_valid"], g["temperature"], g["label_variance"], negatives
    )
    assert_close(float(loss.detach()), g["loss"], rtol=1e-9, atol=1e-12)
    loss.backward()
    assert_close(z.grad, g["grad_embeddings"], rtol=1e-9, atol=1e-12)


def test_the_cycle_consistency_loss_and_its_gradient_are_the_authors(golden: Golden) -> None:
    g = golden("mv-former/cycle_consistency_loss_regression_mse_var")
    z = g["embeddings"].requires_grad_()
    loss = cycle_consistency_loss(
        z, g["frame_steps"], g["seq_lens"], loss=g["loss_type"], similarity=g["similarity"],
        temperature=g["temperature"], variance_lambda=g["variance_lambda"], normalize_indices=g["normalize_indices"],
        label_smoothing=g["label_smoothing"],
    )  # fmt: skip
    assert_close(float(loss.detach()), g["loss"], rtol=1e-9, atol=1e-12)
    loss.backward()
    assert_close(z.grad, g["grad_embeddings"], rtol=1e-8, atol=1e-10)


@settings(max_examples=10, deadline=None)
@given(
    clips=st.integers(1, 3), frames=st.integers(1, 6), seed=st.integers(0, 50),
    negatives=st.sampled_from(["batch", "batch_noself", "single", "single_noself"]),
)  # fmt: skip
def test_the_two_views_can_be_exchanged(clips: int, frames: int, seed: int, negatives: Any) -> None:
    b = batch(clips, frames, seed)
    b["valid"] = torch.rand(clips, 2, frames) < 0.8
    loss = sequence_contrastive_loss(**b, negatives=negatives)
    assert torch.isfinite(loss)
    assert_close(
        sequence_contrastive_loss(**{key: value.flip(1) for key, value in b.items()}, negatives=negatives), loss
    )


def test_a_narrow_target_makes_it_info_nce_over_the_other_view() -> None:
    b = batch(1, 6)
    b["times"][:, 1] = b["times"][:, 0]
    first, second = b["z"][0]
    logits = first @ second.T
    own = torch.arange(6)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert_close(sequence_contrastive_loss(**b, temperature=1.0, variance=1e-9), expected, rtol=1e-4, atol=1e-5)


def test_with_single_negatives_other_clips_get_no_gradient() -> None:
    b = batch(3)
    z = b.pop("z").requires_grad_()
    valid = b.pop("valid")
    mine = torch.zeros_like(valid)
    mine[0] = True
    only = sequence_contrastive_loss(z[:1], *(b[key][:1] for key in ("times", "lengths")), valid[:1])
    (alone,) = torch.autograd.grad(only, z)
    (together,) = torch.autograd.grad(sequence_contrastive_loss(z, **b, valid=valid), z)
    assert_close(together[0] * 3, alone[0])  # the mean is over three clips
    (with_batch,) = torch.autograd.grad(sequence_contrastive_loss(z, **b, valid=valid, negatives="batch_noself"), z)
    assert not torch.allclose(with_batch[0] * 3, alone[0])


def test_frames_that_are_not_there_hardly_count() -> None:
    b = batch(2)
    b["valid"][:, :, -1] = False
    loss = sequence_contrastive_loss(**b)
    b["z"][:, :, -1] = F.normalize(torch.randn(2, 2, 4).double(), dim=-1)
    assert_close(sequence_contrastive_loss(**b), loss, rtol=0, atol=1e-3)  # a weight of 1e-6 among the negatives
    short = {key: value[:, :, :-1] if key != "lengths" else value for key, value in b.items()}
    assert_close(sequence_contrastive_loss(**short), loss, rtol=0, atol=1e-3)


def test_nothing_real_is_no_loss_and_large_vectors_no_overflow() -> None:
    b = batch(1)
    assert sequence_contrastive_loss(**{**b, "valid": torch.zeros(1, 2, 5)}) == 0
    z = (1000 * b["z"]).requires_grad_()
    sequence_contrastive_loss(**{**b, "z": z}).backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("loss", ["regression_mse_var", "regression_mse", "regression_huber", "classification"])
@pytest.mark.parametrize("similarity", ["l2", "cosine"])
def test_cycles_of_equal_videos_close(loss: Any, similarity: Any) -> None:
    z = F.normalize(torch.randn(1, 6, 32).double(), dim=-1).expand(3, -1, -1)
    times, lengths = torch.arange(6).expand(3, -1), torch.full((3,), 6)
    options: dict[str, Any] = {"loss": loss, "similarity": similarity, "temperature": 1e-3, "label_smoothing": 0.0}
    shuffled = z.clone()
    shuffled[1] = F.normalize(torch.randn(6, 32).double(), dim=-1)
    closed = cycle_consistency_loss(z, times, lengths, **options)
    if loss != "regression_mse_var":  # whose logarithm of the variance has no lower bound
        assert_close(float(closed), 0.0, rtol=0, atol=1e-6)
        assert cycle_consistency_loss(shuffled, times, lengths, **options) > 0.01


def test_cycles_leave_out_frames_that_are_not_there() -> None:
    z, times, lengths = torch.randn(2, 6, 4).double(), torch.arange(6).expand(2, -1), torch.tensor([6, 6])
    valid = torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)
    for loss in ("regression_mse_var", "classification"):
        short = cycle_consistency_loss(z[:, :4], times[:, :4], lengths, loss=loss)  # type: ignore[arg-type]
        assert_close(cycle_consistency_loss(z, times, lengths, valid, loss=loss), short)  # type: ignore[arg-type]


def test_losses_refuse_what_does_not_fit() -> None:
    b = batch()
    with pytest.raises(InputError, match=r"expected \(B, 2, T, P\)"):
        sequence_contrastive_loss(**{**b, "times": b["times"][:1]})
    with pytest.raises(InputError, match="accepted: batch, batch_noself"):
        sequence_contrastive_loss(**b, negatives="none")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="numbers above 0"):
        sequence_contrastive_loss(**b, variance=0.0)
    with pytest.raises(InputError, match="at least two videos"):
        cycle_consistency_loss(torch.zeros(1, 3, 2), torch.zeros(1, 3), torch.ones(1))
    two = torch.zeros(2, 3, 2), torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(InputError, match="l2, cosine"):
        cycle_consistency_loss(*two, similarity="l1")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="regression_mse_var"):
        cycle_consistency_loss(*two, loss="mse")  # type: ignore[arg-type]


@pytest.mark.parametrize("negatives", ["batch", "batch_noself", "single", "single_noself"])
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_the_loss_is_that_of_the_formula_pair_by_pair(negatives: str, share: float) -> None:
    b = batch(3, 4, seed=5)
    b["lengths"] = torch.tensor([[20, 20], [30, 25], [22, 40]])
    b["valid"] = torch.rand(3, 2, 4) < share
    found = sequence_contrastive_loss(**b, temperature=0.5, variance=4.0, negatives=negatives)  # type: ignore[arg-type]
    assert_close(float(found), loss_by_the_formula(b, negatives, 0.5, 4.0), rtol=1e-9, atol=1e-12)


def loss_by_the_formula(b: dict[str, Tensor], negatives: str, temperature: float, variance: float) -> float:
    rows = [(c, v, t) for c in range(len(b["z"])) for v in range(2) for t in range(b["z"].shape[2])]
    total = 0.0
    for i in rows:
        if not b["valid"][i]:
            continue
        target, p, normalizer = {}, {}, 0.0
        for j in rows:
            power = float(torch.exp(b["z"][i] @ b["z"][j] / temperature))
            weight = 0.0 if negatives.startswith("single") and j[0] != i[0] else 1.0
            weight = 0.0 if negatives.endswith("noself") and j[:2] == i[:2] else weight
            normalizer += power * (weight if b["valid"][j] else 1e-6)
            if j[0] == i[0] and j[1] != i[1] and b["valid"][j]:
                here, there = float(b["times"][i]), float(b["times"][j])
                apart = here / float(b["lengths"][i[:2]]) * float(b["lengths"][j[:2]]) - there
                target[j], p[j] = math.exp(-(apart**2) / (2 * variance)), power
        whole = sum(target.values())
        for j, value in target.items():
            g = value / whole
            total += g * (math.log(g) - math.log(p[j] / normalizer + 1e-6))
    return total / int(b["valid"].sum())


@pytest.mark.parametrize("loss", ["regression_mse_var", "regression_mse", "regression_huber", "classification"])
def test_videos_without_a_real_frame_count_in_no_cycle(loss: Any) -> None:
    z = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    times, lengths = torch.arange(4).expand(3, 4), torch.tensor([9, 8, 7])
    valid = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    found = cycle_consistency_loss(z, times, lengths, valid, loss=loss)
    there = [0, 2]
    assert_close(found, cycle_consistency_loss(z[there], times[there], lengths[there], valid[there], loss=loss))
    found.backward()
    assert z.grad is not None and z.grad.isfinite().all() and not z.grad[1].any()
    assert cycle_consistency_loss(z, times, lengths, 0 * valid, loss=loss) == 0
