"""ONNX files give the vectors of the encoder, for any batch size."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sparse_world import sparse_encoder

from bowerbird.encoders import load_encoder
from bowerbird.errors import InputError, MissingExtraError
from bowerbird_sparsity import onnx_export, timing


@pytest.mark.parametrize("faster", ["dense", "blocks"])
def test_the_file_holds_the_graph_that_is_faster_and_gives_the_vectors_of_the_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: str
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(
        onnx_export, "time_in_turns", lambda calls: {name: 0.1 if name == faster else 0.2 for name in calls}
    )
    dense = sparse_encoder(tmp_path / "dense")
    made = onnx_export.export_onnx_encoder(dense, tmp_path / "onnx", batch_size=3)
    assert sorted(file.name for file in (tmp_path / "onnx").iterdir()) == ["model.onnx", "preprocessing.json"]
    assert bool(made.forms) == (faster == "blocks") and made.largest_difference < 1e-4
    session = runtime.InferenceSession(str(tmp_path / "onnx/model.onnx"), providers=["CPUExecutionProvider"])
    encoder = load_encoder(dense, device="cpu")
    for count in (1, 5):
        images = torch.randn(count, 3, 8, 8)
        vectors = session.run(None, {"image": images.numpy()})[0]
        np.testing.assert_allclose(vectors, encoder.forward({"image": images}), atol=1e-5, rtol=0)
    description = json.loads((tmp_path / "onnx/preprocessing.json").read_text())
    assert description["fingerprint"] == encoder.fingerprint and description["dim"] == 16
    assert json.dumps(made.to_dict()) and "checked with onnxruntime" in made.lines()[0]


def test_zeros_that_lie_in_no_blocks_are_not_compared_with_blocks(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made = onnx_export.export_onnx_encoder(
        sparse_encoder(tmp_path / "dense", block=(1, 1), share=0.5), tmp_path / "onnx", batch_size=2
    )
    assert made.sparse_ms is None and made.kept_dense
    assert "no zeros lie in blocks" in made.lines()[1]


def test_without_the_extra_the_error_names_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.import_module

    def absent(name: str) -> object:
        if name == "onnxscript":
            raise ModuleNotFoundError(name=name)
        return object() if name.startswith("onnx") else found(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingExtraError, match=r"pip install 'bowerbird-sparsity\[onnx\]'"):
        onnx_export.export_onnx_encoder("core:perceptron?image_size=8", tmp_path / "onnx")


def test_a_place_that_is_in_use_and_an_encoder_without_zeros_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "_runtime", object)
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    dense = sparse_encoder(tmp_path / "dense", share=0.0)
    with pytest.raises(InputError, match="already exists and is not empty"):
        onnx_export.export_onnx_encoder(dense, dense)
    with pytest.raises(InputError, match="has zeros in its weights"):
        onnx_export.export_onnx_encoder(dense, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
