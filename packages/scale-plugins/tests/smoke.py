"""Run with the Python of an environment that holds only bowerbird-scale and core."""

import subprocess
import sys
from pathlib import Path


def bowerbird(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("bowerbird")), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


listed = bowerbird("list")
assert listed.returncode == 0, listed.stderr
assert "scale:postgres" in listed.stdout, listed.stdout
# Its database driver is an extra: the error names what to install.
refused = bowerbird("gallery", "info", "postgresql:///nowhere")
assert refused.returncode == 2, refused.stderr
assert "bowerbird-scale[postgres]" in refused.stderr + refused.stdout, refused.stderr
print("bowerbird-scale alone: ok")
