"""Frames of a video: golden numbers of the released code, and what is true of every length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bowerbird_videotext.sampling import sample_frame_indices


def test_uniform_frames_frames_from_a_start_and_bounds_of_random_ones_are_those_of_the_released_code(
    golden: Any,
) -> None:
    values = golden("frozen-dual-encoder/frame_sampling")
    rows = zip(*(values[key].tolist() for key in ("num_frames", "video_len", "fix_start", "indices")), strict=True)
    for row, (count, length, start, expected) in enumerate(rows):
        expected = [i for i in expected if i >= 0]
        offset = None if start < 0 else start
        assert sample_frame_indices(length, count, "uniform", offset=offset).tolist() == expected
        drawn = torch.stack([sample_frame_indices(length, count, "random") for _ in range(60)])
        first = values["rand_first"][row][: len(expected)]
        last = values["rand_last"][row][: len(expected)] + 1  # the released code leaves out the last frame of a segment
        assert (drawn >= first).all() and (drawn <= last).all()


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 60), count=st.integers(1, 12), seed=st.integers(0, 999))
def test_frames_rise_within_the_video_and_the_same_generator_draws_the_same(length: int, count: int, seed: int) -> None:
    uniform = sample_frame_indices(length, count, "uniform")
    drawn, again = (
        sample_frame_indices(length, count, "random", torch.Generator().manual_seed(seed)) for _ in range(2)
    )
    assert torch.equal(drawn, again)
    for indices in (uniform, drawn):
        assert indices.dtype == torch.int64 and len(indices) == min(count, length)
        assert (indices.diff() > 0).all() and indices[0] >= 0 and indices[-1] < length
    if length <= count:
        assert uniform.tolist() == list(range(length))
    mirrored = length - 1 - uniform.flip(0)
    assert (uniform - mirrored).abs().max() <= 2  # the edges of a segment and its middle are rounded down


def test_every_frame_of_a_segment_is_drawn_at_some_time() -> None:
    drawn = torch.stack([sample_frame_indices(6, 2, "random") for _ in range(200)])
    assert set(drawn[:, 0].tolist()) == {0, 1, 2} and set(drawn[:, 1].tolist()) == {3, 4, 5}


def test_impossible_wishes_are_refused() -> None:
    for length, count, mode in ((0, 4, "uniform"), (4, 0, "uniform"), (4, 4, "middle")):
        with pytest.raises(ValueError):
            sample_frame_indices(length, count, mode)
