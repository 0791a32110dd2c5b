"""Run with the Python of an environment that holds only bowerbird-videotext and core."""

import subprocess
import sys
from pathlib import Path

out = subprocess.run(
    [str(Path(sys.executable).with_name("bowerbird")), "list"], capture_output=True, text=True, check=True
)
NAMES = """
demovlp
didemo
lsmdc
moving
msr-vtt
msvd
table
all-in-one
dual-encoder
frozen
mac
mcq
miles
mv-former
dense
dual-softmax
multiple-choice
phases
qa
retrieval
zero-shot-actions
"""
for name in NAMES.split():
    assert f"videotext:{name}" in out.stdout, f"videotext:{name} is not in\n{out.stdout}"
print("bowerbird-videotext alone: ok")
