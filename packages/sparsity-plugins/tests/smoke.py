"""Run with the Python of an environment that holds only bowerbird-sparsity and core."""

import subprocess
import sys
from pathlib import Path

out = subprocess.run(
    [str(Path(sys.executable).with_name("bowerbird")), "list"], capture_output=True, text=True, check=True
)
for name in ("spartan", "magnitude", "top-k"):
    assert f"sparsity:{name}" in out.stdout, f"sparsity:{name} is not in\n{out.stdout}"

import torch  # noqa: E402

from bowerbird_sparsity.spartan import Sparsifier, SparsityConfig  # noqa: E402

model = torch.nn.Linear(20, 20, bias=False)
sparsifier = Sparsifier(model, SparsityConfig(target_density=0.25), total_steps=4)
for _ in range(4):
    model(torch.randn(3, 20)).square().sum().backward()
    sparsifier.step()
assert int((sparsifier.finalize().weight != 0).sum()) == 100
print("bowerbird-sparsity alone: ok")
