"""Core's data sets keep the contract that plugins' data sets are tested against."""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bowerbird.testing import DatasetContract


class TestImageFolder(DatasetContract):
    name = "core:image-folder"
    splits = ("train", "test")
    disjoint = (("train", "test"),)

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        for i in range(30):
            path = tmp_path / f"class-{i % 3}" / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGBA", (6, 5), (8 * i, 0, 0, 200)).save(path)
        self.config = {"root": tmp_path}


class TestFashionMnist(DatasetContract):
    name = "core:fashion-mnist"
    disjoint = (("train", "test"), ("seen-train", "unseen-test"), ("seen-test", "unseen-test"))

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> None:
        for stem in ("train", "t10k"):
            labels = np.arange(40, dtype=np.uint8) % 10
            images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
            for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
                header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
                (tmp_path / f"{stem}-{kind}-ubyte").write_bytes(header + array.tobytes())
        self.config = {"root": tmp_path}


@pytest.mark.skipif(find_spec("sklearn") is None, reason="needs the extra [digits]")
class TestDigits(DatasetContract):
    name = "core:digits"
    disjoint = (("train", "test"),)
