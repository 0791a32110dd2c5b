"""Run with the Python of an environment that holds only bowerbird-compat and core."""

import subprocess
import sys
from pathlib import Path

out = subprocess.run(
    [str(Path(sys.executable).with_name("bowerbird")), "list"], capture_output=True, text=True, check=True
)
for name in (
    "bct", "bt2", "ract", "bict", "unibct", "metric-compatible", "basis-transform", "rank-merge",
    "adapter", "reverse-transform", "lift",
):  # fmt: skip
    assert f"compat:{name}" in out.stdout, f"compat:{name} is not in\n{out.stdout}"

import torch  # noqa: E402

from bowerbird_compat.bct import InfluenceLoss  # noqa: E402

loss = InfluenceLoss(torch.eye(3))(torch.eye(3), torch.arange(3))
assert loss.ndim == 0
assert float(loss) > 0

import numpy as np  # noqa: E402

from bowerbird_compat.adapters import fit_adapter  # noqa: E402

vectors = np.random.default_rng(0).standard_normal((80, 4))
adapter = fit_adapter(vectors, vectors[:, ::-1], kind="procrustes", source_space="new", target_space="old")
assert adapter.evidence["verdict"] == "good", adapter.evidence
print("bowerbird-compat alone: ok")
