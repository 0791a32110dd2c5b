"""Start-up time of ``bowerbird --help`` and ``bowerbird list`` against a bare interpreter and the limit of 0.15 s.

python benchmarks/cli_startup.py --output benchmarks/results/cli_startup.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import write_result

LIMIT_S = 0.15


def seconds(command: list[str]) -> float:
    # Compiled modules are cached, as on any user's machine.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tool = str(Path(sys.executable).with_name("bowerbird"))
    commands = {"python -c pass": [sys.executable, "-c", "pass"], "--help": [tool, "--help"], "list": [tool, "list"]}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.runs + 1):  # the first round warms the file cache
        for name, command in commands.items():
            times[name].append(seconds(command))
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    write_result(
        "cli_startup",
        {
            "median_s": median,
            "limit_s": LIMIT_S,
            "within_limit": all(median[name] < LIMIT_S for name in ("--help", "list")),
            "runs": options.runs,
        },
        out=options.output,
    )


if __name__ == "__main__":
    main()
