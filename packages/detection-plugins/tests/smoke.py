"""Run with the Python of an environment that holds only bowerbird-detection and core."""

import subprocess
import sys
from pathlib import Path

out = subprocess.run(
    [str(Path(sys.executable).with_name("bowerbird")), "list"], capture_output=True, text=True, check=True
)
NAMES = """
acsl
canvases
coco
coco-ap
detector
dpt
mimdet
multi-label
obj2seq
torchvision
voc
"""
for name in NAMES.split():
    assert f"detection:{name}" in out.stdout, f"detection:{name} is not in\n{out.stdout}"
print("bowerbird-detection alone: ok")
