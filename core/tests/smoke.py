"""Run with the Python of an environment that holds only bowerbird-core: what a user gets from the wheel alone."""

import subprocess
import sys
import tempfile
from pathlib import Path

TOOL = str(Path(sys.executable).with_name("bowerbird"))
out = subprocess.run([TOOL, "list"], capture_output=True, text=True, check=True).stdout
assert "core:timm" in out, out
assert "core:exact" in out, out
with tempfile.TemporaryDirectory() as folder:
    subprocess.run([TOOL, "new-plugin", "acme", "--output", folder], check=True, capture_output=True)
    assert list(Path(folder).rglob("plugin.py")), "the template is not in the wheel"

import numpy as np  # noqa: E402

from bowerbird.gallery import Gallery, Space  # noqa: E402

with (
    tempfile.TemporaryDirectory() as folder,
    Gallery.create(Path(folder) / "g", Space(fingerprint="f" * 64, encoder="x", dim=4)) as g,
):
    g.add(["a", "b"], np.eye(4, dtype=np.float32)[:2])
    assert g.search(np.eye(4, dtype=np.float32)[1:2], k=1).ids[0] == ["b"]
print("bowerbird-core alone: ok")
