"""A sparse export is the dense encoder, in fewer bytes and another order of sums."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from sparse_world import sparse_encoder

from bowerbird.cli import main
from bowerbird.encoders import load_encoder
from bowerbird.encoders.bundle import read_classifier
from bowerbird.errors import DataError, InputError
from bowerbird.gallery import Gallery
from bowerbird_sparsity.compression import compress, restore
from bowerbird_sparsity.export import sparse_forms
from bowerbird_sparsity.folders import WEIGHTS, export_sparse_encoder


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return sparse_encoder(tmp_path / "dense")


@pytest.fixture
def pictures() -> list[Image.Image]:
    numbers = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in numbers]


# ------------------------------------------------------------------------------------------------ compression


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]),
    negative=st.booleans(),
    seed=st.integers(0, 99),
)
def test_compressed_weights_come_back_bit_for_bit(
    shape: list[int], share: float, dtype: torch.dtype, negative: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) >= share)
    tensor = (tensor if negative else tensor + 0.0).to(dtype)  # -0.0 + 0.0 is 0.0
    stored, described = compress({"layer.weight": tensor, "other": torch.arange(3)})
    back = restore(stored, described, source="here")
    assert sorted(back) == ["layer.weight", "other"]
    again = back["layer.weight"]
    assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
    assert again.contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8))


def test_ninety_percent_of_zeros_in_blocks_need_about_a_tenth_of_the_bytes() -> None:
    tensor = torch.zeros(256, 256)
    tensor.view(16, 16, 16, 16)[torch.arange(16), :, torch.arange(16)] = torch.rand(16, 16, 16) + 0.1
    stored, described = compress({"w": tensor})
    assert described["w"]["block"] == [16, 16]
    assert sum(part.numel() * part.element_size() for part in stored.values()) < 0.07 * 4 * tensor.numel()


# ------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("format", ["auto", "blocks", "csr", "bsr", "rows"])
def test_a_sparse_export_loads_as_an_encoder_with_the_vectors_of_the_dense_one(
    dense: Path, tmp_path: Path, pictures: list[Image.Image], format: str
) -> None:
    made = export_sparse_encoder(dense, tmp_path / "sparse", format=format, measure=False)
    before, after = load_encoder(dense), load_encoder(tmp_path / "sparse")
    np.testing.assert_allclose(after.encode(pictures), before.encode(pictures), atol=1e-5, rtol=0)
    assert after.fingerprint == before.fingerprint == made.fingerprint
    assert sparse_forms(after.module) == dict(made.forms)
    assert after.spec.classes == ("a", "b")
    classifier = read_classifier(tmp_path / "sparse")
    assert classifier is not None and torch.equal(classifier, torch.ones(2, 16))
    assert made.bytes < 0.6 * made.dense_bytes
    assert "## Sparse export" in (tmp_path / "sparse/README.md").read_text()


def test_a_measured_export_keeps_dense_what_is_faster_dense_and_still_compresses_it(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "bowerbird_sparsity.export.time_in_turns",
        lambda calls, **_: {form: 1.0 if getattr(form, "format", "") == "dense" else 2.0 for form in calls},
    )
    made = export_sparse_encoder(dense, tmp_path / "sparse", batch_size=2)
    assert made.forms == {} and made.bytes < 0.6 * made.dense_bytes
    assert "all stay dense" in "\n".join(made.lines())
    load_encoder(tmp_path / "sparse")


def test_a_vision_transformer_is_exported_with_its_perceptrons_computed_as_one(tmp_path: Path) -> None:
    dense = sparse_encoder(tmp_path / "dense", "core:timm", {"model": "test_vit", "image_size": 32}, block=(16, 16))
    made = export_sparse_encoder(dense, tmp_path / "sparse", format="blocks", measure=False, batch_size=2)
    formats = {name.rpartition(".")[2]: form.format for name, form in made.forms.items()}
    assert formats["mlp"] == "mlp" and formats["qkv"] == "blocks"
    pictures = [Image.new("RGB", (32, 32), color) for color in ("red", "green", "blue")]
    vectors = [load_encoder(folder).encode(pictures) for folder in (dense, tmp_path / "sparse")]
    np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-5, rtol=0)


def test_dead_units_are_removed_when_a_sparse_export_is_loaded(tmp_path: Path, pictures: list[Image.Image]) -> None:
    dense = sparse_encoder(tmp_path / "dense", block=(8, 64), share=0.6)  # units die by eight
    made = export_sparse_encoder(dense, tmp_path / "sparse", measure=False)
    removed = sum(pair.removed for pair in made.shrunk)
    assert removed >= 8 and f"removed {removed} hidden units" in made.lines()[-1]
    sparse = load_encoder(tmp_path / "sparse")
    np.testing.assert_allclose(sparse.encode(pictures), load_encoder(dense).encode(pictures), atol=1e-5, rtol=0)
    assert load_encoder(tmp_path / "sparse", dense=True).module.layers[0].out_features == 128


def test_a_gallery_that_the_dense_encoder_filled_is_searched_with_the_sparse_one(
    dense: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    export_sparse_encoder(dense, tmp_path / "sparse", format="blocks", measure=False)
    before, after = load_encoder(dense), load_encoder(tmp_path / "sparse")
    with Gallery.create(tmp_path / "gallery", before.space()) as gallery:
        gallery.add([str(i) for i in range(len(pictures))], before.encode(pictures))
    with Gallery.open(tmp_path / "gallery", readonly=True) as gallery:
        found = gallery.search({after.fingerprint: after.encode(pictures)}, k=3)
        expected = gallery.search({before.fingerprint: before.encode(pictures)}, k=3)
    assert [ids[0] for ids in found.ids] == [str(i) for i in range(len(pictures))]
    assert found.ids == expected.ids


def test_an_export_in_place_serves_the_gallery_that_names_the_folder(
    dense: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    encoder = load_encoder(dense)
    with Gallery.create(tmp_path / "gallery", encoder.space()) as gallery:
        gallery.add([str(i) for i in range(len(pictures))], encoder.encode(pictures))
    export_sparse_encoder(dense, dense, format="blocks", measure=False)
    assert not (dense / "weights.safetensors").exists() and sparse_forms(load_encoder(dense).module)
    pictures[4].save(tmp_path / "query.png")
    code, out = run("gallery", "search", str(tmp_path / "gallery"), "--image", str(tmp_path / "query.png"), "--json")
    assert code == 0, out
    assert '"4"' in out.split("]")[0]


def test_a_sparse_export_can_be_exported_again_dense_or_sparse(dense: Path, tmp_path: Path) -> None:
    from bowerbird.encoders.export import export_encoder

    export_sparse_encoder(dense, tmp_path / "sparse", format="blocks", measure=False)
    export_encoder(tmp_path / "sparse", tmp_path / "again")
    one, other = (load_file(folder / "weights.safetensors") for folder in (dense, tmp_path / "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    made = export_sparse_encoder(tmp_path / "sparse", tmp_path / "csr", format="csr", measure=False)
    assert {form.format for form in made.forms.values()} == {"csr"}


# ------------------------------------------------------------------------------------------------ bad input


def test_an_encoder_without_zeros_is_refused_with_what_makes_some(tmp_path: Path) -> None:
    dense = sparse_encoder(tmp_path / "dense", share=0.0)
    with pytest.raises(InputError, match=r"none of the 3 linear layers .* has zeros .*sparsity:spartan"):
        export_sparse_encoder(dense, tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()


def test_a_folder_of_something_else_is_not_replaced(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    with pytest.raises(InputError, match="already exists and is no encoder folder"):
        export_sparse_encoder(dense, tmp_path / "mine", measure=False)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def damage(folder: Path) -> Iterator[tuple[str, str]]:
    """Ways to break an export, each with what the error says."""
    manifest, weights = folder / "encoder.json", folder / WEIGHTS
    text, tensors = manifest.read_text(), load_file(weights)
    values = json.loads(text)
    name = next(iter(values["sparse"]["tensors"]))
    save_file({key: value for key, value in tensors.items() if key != f"{name}.kept"}, weights)
    yield "missing bits", "is damaged"
    save_file({**tensors, f"{name}.kept": torch.zeros(1, dtype=torch.uint8)}, weights)
    yield "too few bits", "is damaged"
    save_file({**tensors, f"{name}.values": tensors[f"{name}.values"] + 1}, weights)
    yield "other weights", "not the one it claims to be"
    weights.write_bytes(b"no tensors")
    yield "no tensors", "cannot be read"
    weights.unlink()
    yield "no file", f"has no {WEIGHTS}"
    save_file(tensors, weights)
    for key, value in (("forms", {"layers.99": {"format": "csr"}}), ("forms", {"layers.0": {"format": "run"}})):
        manifest.write_text(json.dumps({**values, "sparse": {**values["sparse"], key: value}}))
        yield str(value), "sparse|no layer"
    manifest.write_text(json.dumps({**values, "sparse": {**values["sparse"], "fingerprint": "0" * 64}}))
    yield "foreign fingerprint", r"sparse\.fingerprint"
    manifest.write_text(text)


def test_a_damaged_export_is_named_and_never_served(dense: Path, tmp_path: Path) -> None:
    export_sparse_encoder(dense, tmp_path / "sparse", format="blocks", measure=False)
    for _, message in damage(tmp_path / "sparse"):
        with pytest.raises((DataError, InputError), match=message):
            load_encoder(tmp_path / "sparse")
    load_encoder(tmp_path / "sparse")


def test_a_form_for_gpus_is_refused_on_a_processor_with_what_to_do(dense: Path, tmp_path: Path) -> None:
    export_sparse_encoder(dense, tmp_path / "sparse", format="blocks", measure=False)
    manifest = tmp_path / "sparse/encoder.json"
    values = json.loads(manifest.read_text())
    values["sparse"]["forms"] = {"layers.0": {"format": "2:4"}}
    manifest.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"runs on CUDA only.*dense=True"):
        load_encoder(tmp_path / "sparse", device="cpu")
    load_encoder(tmp_path / "sparse", device="cpu", dense=True)


# ------------------------------------------------------------------------------------------------ command line


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, result.output


def test_the_command_line_exports_and_says_what_came_of_it(dense: Path, tmp_path: Path) -> None:
    code, out = run("export", str(dense), "--to", str(tmp_path / "fast"), "--sparse", "blocks", "--batch-size", "4")
    assert code == 0, out
    assert "bytes of weights instead of" in out and load_encoder(dense).fingerprint[:12] in out
    code, out = run("export", str(dense), "--to", str(tmp_path / "fast"), "--sparse", "csr", "--json")
    values = json.loads(out)
    assert values["fingerprint"] == load_encoder(tmp_path / "fast").fingerprint and values["largest_difference"] < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparse", "bloks"], "'bloks' is unknown. Did you mean 'blocks'?"),
        (["--sparse", "2:4"], "needs a CUDA device"),
        (["--sparse", "csr", "--format", "timm"], "leave out --format timm"),
        (["--batch-size", "8"], "--batch-size is for --sparse only"),
    ],
)
def test_the_command_line_explains_what_it_refuses(
    dense: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, out = run("export", str(dense), "--to", str(tmp_path / "fast"), *arguments)
    assert code == 2 and message in out
    assert not (tmp_path / "fast").exists()


def test_without_the_package_core_names_the_command_that_installs_it(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_sparse_encoder(dense, tmp_path / "sparse", format="blocks", measure=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "bowerbird_sparsity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    for arguments in (
        ["export", str(dense), "--to", str(tmp_path / "fast"), "--sparse", "auto"],
        ["export", str(tmp_path / "sparse"), "--to", str(tmp_path / "fast")],
    ):
        code, out = run(*arguments)
        assert code == 2 and "pip install bowerbird-sparsity" in out, out


class Absent:
    """An import system in which bowerbird-sparsity is not installed."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] == "bowerbird_sparsity":
            raise ModuleNotFoundError(f"No module named {name!r}", name="bowerbird_sparsity")
