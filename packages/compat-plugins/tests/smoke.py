"""Run with the Python of an environment that holds only bowerbird-compat and core."""

import subprocess
import sys
from pathlib import Path

out = subprocess.run(
    [str(Path(sys.executable).with_name("bowerbird")), "list"], capture_output=True, text=True, check=True
)
assert "compat:bct" in out.stdout, out.stdout
assert "compat:rank-merge" in out.stdout, out.stdout

import torch  # noqa: E402

from bowerbird_compat.bct import InfluenceLoss  # noqa: E402

loss = InfluenceLoss(torch.eye(3))(torch.eye(3), torch.arange(3))
assert loss.ndim == 0
assert float(loss) > 0
print("bowerbird-compat alone: ok")
