"""Lifts between encoders that are known by files of vectors, at the command line."""

from __future__ import annotations

import re

import numpy as np
import pytest
from black_box_world import bowerbird, npy

ITEMS = 200


@pytest.fixture(autouse=True)
def gallery(tmp_path, monkeypatch):
    """The gallery ``g`` of ``old.npy``, and files of two more encoders."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    ids, latent = [f"item-{n}" for n in range(ITEMS)], rng.standard_normal((ITEMS + 2, 6))
    for name, dim in (("old", 8), ("new", 12), ("third", 10)):
        vectors = np.tanh(latent @ rng.standard_normal((6, dim))).astype(np.float32)
        npy(tmp_path / f"{name}.npy", ids, vectors[:ITEMS])
        npy(tmp_path / f"asked-{name}.npy", ["a", "b"], vectors[ITEMS:])
    bowerbird("gallery", "create", "g", "--encoder", "vectors:old.npy")
    bowerbird("gallery", "add", "g", "--vectors", "old.npy")


def test_a_lift_of_an_empty_gallery_is_refused():
    bowerbird("gallery", "create", "empty", "--encoder", "vectors:old.npy")
    assert "is empty" in bowerbird("upgrade", "lift", "empty", "--to", "vectors:new.npy", code=2).stderr


def test_one_file_of_queries_for_each_encoder_is_enough_where_a_lifted_part_is_in_the_middle():
    on_top = ("--on-top", "--strategy", "rank-merge", "--stop-at-share")
    bowerbird("upgrade", "lift", "g", "--to", "vectors:new.npy", "--accept-poor-transform")
    bowerbird("upgrade", "run", "g", "--to", "vectors:new.npy", *on_top, 0.5)
    bowerbird("upgrade", "run", "g", "--to", "vectors:third.npy", *on_top, 0.3)
    asked = "vectors:asked-old.npy,asked-new.npy"
    found = bowerbird("upgrade", "serve", "g", "--queries", f"{asked},asked-third.npy").output
    assert len(re.findall(r"item-\d+", found)) == 20
    said = bowerbird("upgrade", "serve", "g", "--queries", asked, code=2).stderr
    assert "has vectors of 3 encoders" in said and "lifted" not in said
