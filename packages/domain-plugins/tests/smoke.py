"""Run with the Python of an environment that holds only bowerbird-domain and core."""

import subprocess
import sys
from pathlib import Path

out = subprocess.run(
    [str(Path(sys.executable).with_name("bowerbird")), "list"], capture_output=True, text=True, check=True
)
NAMES = """
dsu
"""
for name in NAMES.split():
    assert f"domain:{name}" in out.stdout, f"domain:{name} is not in\n{out.stdout}"
