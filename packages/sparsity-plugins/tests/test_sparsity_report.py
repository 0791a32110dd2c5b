"""Reports: what is kept, what it saves on disk, and whether it is faster here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from sparse_world import sparse_encoder, zero_blocks
from torch import nn

from bowerbird.cli import main
from bowerbird_sparsity import timing
from bowerbird_sparsity.export import export_sparse
from bowerbird_sparsity.report import kept_shares, kept_weights_svg, pattern_of_zeros, sparsity_report
from bowerbird_sparsity.speed import benchmark_sparse


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.01)


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval()


# ------------------------------------------------------------------------------------------------ benchmark_sparse


def test_the_table_has_every_sparse_layer_and_the_whole_model() -> None:
    model = zero_blocks(two_layers(), (32, 32), 0.7)
    table = benchmark_sparse(model, torch.randn(64, 512), seconds=0.02)
    assert [row.name for row in table] == ["0", "2"]
    for row in table:
        assert row.shape == (512, 512) and 0.6 < row.zeros < 0.8
        assert row.ms > 0 and row.dense_ms > 0 and row.speedup == row.dense_ms / row.ms
        assert row.form == "dense" or row.ms <= row.dense_ms
        assert {"blocks 32x32", "csr"} <= {row.form, *dict(row.others)}
    assert table.largest_difference < 1e-5
    lines = str(table).splitlines()
    assert len(lines) == 4 and lines[0].startswith("layer") and lines[-1].startswith("whole model")
    assert json.loads(json.dumps(table.to_dict()))["speedup"] == table.speedup


def test_an_exported_model_is_compared_with_its_dense_self() -> None:
    model = zero_blocks(two_layers(), (32, 32), 0.95)
    x = torch.randn(32, 512)
    table = benchmark_sparse(export_sparse(model, "blocks"), x, seconds=0.02)
    assert [(row.name, row.form) for row in table] == [("0", "blocks 32x32"), ("2", "blocks 32x32")]
    assert table.largest_difference < 1e-5


def test_removed_units_are_a_speed_up_of_their_own() -> None:
    model = two_layers()
    with torch.no_grad():
        model[0].weight[128:] = 0
    table = benchmark_sparse(model, torch.randn(256, 512), seconds=0.02)
    assert [(row.name, row.form) for row in table] == [("0", "shrunk"), ("2", "shrunk")]
    assert table.shrunk[0].removed == 384
    assert table.sparse_ms < table.dense_ms, "a quarter of the work takes less time"


# ------------------------------------------------------------------------------------------------ reports


def test_the_pattern_of_zeros_is_put_into_words() -> None:
    weight = torch.rand(64, 64) + 0.1
    assert pattern_of_zeros(weight) == ""
    assert pattern_of_zeros(weight * 0) == "everything"
    rows = weight.clone()
    rows[3:40] = 0
    assert pattern_of_zeros(rows) == "rows"
    assert pattern_of_zeros(weight * (torch.rand(64, 64) > 0.5)) == "single weights"
    assert pattern_of_zeros(weight * torch.tensor([1.0, 0, 0, 1]).repeat(16)) == "2:4"
    kept = torch.eye(4).repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert pattern_of_zeros(weight * kept) == "16 x 16 blocks"


def test_a_report_counts_what_is_kept_and_what_it_takes_on_disk(tmp_path: Path) -> None:
    dense = sparse_encoder(tmp_path / "dense")
    report, masks = sparsity_report(dense, measure=False)
    assert list(masks) == ["layers.0.weight", "layers.2.weight", "layers.4.weight"]
    assert [layer.kept for layer in report.layers] == [int(mask.sum()) for mask in masks.values()]
    assert report.layers[0].pattern == "8 x 8 blocks"
    file = tmp_path / "dense/weights.safetensors"
    assert file.stat().st_size - 2000 < report.bytes < file.stat().st_size
    assert report.compressed_bytes < 0.5 * report.bytes
    assert "8 x 8 blocks" in str(report) and "as a sparse export" in str(report)


def test_the_picture_shows_every_weight_with_its_share() -> None:
    pytest.importorskip("matplotlib")
    masks = {"a.weight": torch.zeros(100, 30, dtype=torch.bool), "b.weight": torch.ones(8, 3, 3, 3, dtype=torch.bool)}
    masks["a.weight"][:50] = True
    svg = kept_weights_svg(masks)
    assert svg.startswith("<?xml") and "50.0% kept" in svg and "100.0% kept" in svg
    assert svg == kept_weights_svg(masks), "the same bytes for the same weights"
    shares = kept_shares(masks["a.weight"])
    assert shares.shape == (48, 30) and shares[:24].min() == 1 and shares[25:].max() == 0


def test_the_command_reports_times_and_writes_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    dense = sparse_encoder(tmp_path / "dense")
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["report", "sparsity", str(dense), "--batch-size", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert re.search(r"whole model +[\d.]+ +[\d.]+ +[\d.]+x", result.output)
    assert "times as fast as dense" in result.output or "No speed is to be gained" in result.output
    assert sorted(file.name for file in out.iterdir()) == ["sparsity.json", "sparsity.svg", "sparsity.txt"]
    values = json.loads((out / "sparsity.json").read_text())
    assert values["speed"]["dense_ms"] > 0 and len(values["layers"]) == 3


def test_the_command_explains_itself_and_its_errors(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", "sparsity", "--help"])
    assert result.exit_code == 0 and "zeros alone make nothing faster" in " ".join(result.output.split())
    result = CliRunner().invoke(main, ["report", "sparsity", str(tmp_path / "none")])
    assert result.exit_code == 2 and "there is no such folder" in result.output
