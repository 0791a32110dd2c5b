"""A map between two spaces: what it computes, how it is kept, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bowerbird.errors import DataError, InputError, SpaceError
from bowerbird.gallery.transform import Step, VectorTransform


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def residual(width, hidden, seed=0):
    rng = np.random.default_rng(seed)
    branch = (
        Step("linear", rng.normal(size=(hidden, width)), rng.normal(size=hidden)),
        Step("scale", rng.normal(size=hidden), rng.normal(size=hidden)),
        Step("relu"),
        Step("linear", rng.normal(size=(width, hidden))),
    )
    return VectorTransform("a", "b", width, width, (Step("sum", branches=((), branch)),), "test", {"pairs": 3})


def test_a_linear_transform_is_a_matrix_product_of_unit_length():
    rng = np.random.default_rng(0)
    weight, bias, rows = rng.normal(size=(3, 5)), rng.normal(size=3), rng.normal(size=(40, 5))
    made = VectorTransform.linear("old", "new", weight, bias)(rows)
    assert np.allclose(made, unit(rows @ weight.T + bias), atol=1e-6)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 50))
@settings(max_examples=25, deadline=None)
def test_a_row_does_not_depend_on_the_others(seed, count):
    rows = np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)
    transform = residual(6, 9, seed)
    assert np.allclose(transform(rows), np.concatenate([transform(row[None]) for row in rows]), atol=1e-5)


def test_a_file_gives_back_the_same_transform(tmp_path):
    transform = residual(6, 9)
    transform.save(tmp_path / "t.safetensors")
    again = VectorTransform.load(tmp_path / "t.safetensors")
    rows = np.random.default_rng(1).normal(size=(8, 6))
    assert again.fingerprint == transform.fingerprint
    assert (again.source, again.target, again.method, again.evidence) == ("a", "b", "test", {"pairs": 3})
    assert np.array_equal(again(rows), transform(rows))


def test_direction_is_part_of_the_identity():
    weight = np.eye(4)
    assert VectorTransform.linear("a", "b", weight).fingerprint != VectorTransform.linear("b", "a", weight).fingerprint


def test_vectors_of_another_width_are_refused():
    with pytest.raises(SpaceError, match="width 5, got 3; is it meant for the other direction"):
        VectorTransform.linear("old", "new", np.ones((3, 5)))(np.ones((2, 3)))


def test_a_vector_that_vanishes_is_named():
    with pytest.raises(DataError, match="row 1"):
        VectorTransform.linear("old", "new", [[1.0, 0.0]])([[1.0, 0.0], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((Step("linear", np.ones((3, 4))),), "cannot take vectors of width 5"),
        ((Step("scale", np.ones(4), np.ones(4)),), "cannot take width 5"),
        ((Step("sum", branches=((), (Step("linear", np.ones((3, 5))),))),), "one width is needed"),
    ],
)
def test_steps_that_do_not_fit_are_refused(steps, message):
    with pytest.raises(InputError, match=message):
        VectorTransform("a", "b", 5, 3, steps)


def test_one_space_needs_no_transform():
    with pytest.raises(InputError, match="from one space to another"):
        VectorTransform.linear("a", "a", np.eye(2))


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "t.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read as a transform"):
        VectorTransform.load(tmp_path / "t.safetensors")
