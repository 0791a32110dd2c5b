"""The promises of an upgrade, tested at full length, and what was measured, as data.

Runs core/tests/test_promises_*.py with BOWERBIRD_PROMISES=full: 0 changed lists at both ends of an upgrade, 10,000
random operations against a model, 200 kills, several workers against one, 200 rollbacks. The quick versions run with
the other tests. Each line of the result has its seed and what was counted; a broken promise is a failed test.

python benchmarks/promises.py --output benchmarks/results/promises.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import write_result

TESTS = Path(__file__).parent.parent / "core" / "tests"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the version that runs with the other tests")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    files = sorted(str(path) for path in TESTS.glob("test_promises_*.py"))
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "promises.jsonl"
        environment = {
            **os.environ,
            "BOWERBIRD_PROMISES": "quick" if args.quick else "full",
            "BOWERBIRD_PROMISES_OUT": str(lines),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        code = subprocess.run([sys.executable, "-m", "pytest", "-q", *files], env=environment, check=False).returncode
        measured = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    write_result("promises", {"kept": code == 0, "promises": measured}, out=args.output if code == 0 else None)
    return code


if __name__ == "__main__":
    sys.exit(main())
