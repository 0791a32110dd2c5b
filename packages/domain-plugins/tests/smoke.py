"""Run with the Python of an environment that holds only bowerbird-domain and core."""

import subprocess
import sys
from pathlib import Path

out = subprocess.run(
    [str(Path(sys.executable).with_name("bowerbird")), "list"], capture_output=True, text=True, check=True
)
NAMES = """
dsu fcn pspnet cdcl segmentation canvases segmentation-folders miou
"""
for name in NAMES.split():
    assert f"domain:{name}" in out.stdout, f"domain:{name} is not in\n{out.stdout}"

import torch  # noqa: E402

from bowerbird_domain.dsu import FeatureStatisticsUncertainty  # noqa: E402

x = torch.randn(4, 3, 8, 8)
assert not torch.equal(FeatureStatisticsUncertainty(1.0)(x), x)
print("bowerbird-domain alone: ok")
