"""Run every benchmark, one after the other on an otherwise idle machine, and write benchmarks/results/*.json.

    python benchmarks/run.py                 all of them, about half an hour
    python benchmarks/run.py gallery_search  only these

Each measures its subject and its limit in turns in one process, and states the limit that it is held against.
Those of LONG and MINUTES take from minutes to an hour, and run only when they are named. benchmarks/scale_growth.py is
run by hand: it needs a folder with room for 25 GB, and resumes where it ended.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
LONG = ("serve_share_exact", "serve_share_ivf", "serve_share_hnsw")  # 1M items
SHORT = ("cli_startup", "gallery_search", "gallery_ann", "gallery_add", "gallery_open", "serve_passes", "scale_shards")
MINUTES = ("serve_upgrade",)  # ten
STEPS = ("compat_losses", "mim_steps", "mim_data_wait", "dsu_step", "mimdet_sampling", "soft_topk", "spartan_step")
HTTP = ("serve_http",)
VIDEO = ("videotext_steps", "videotext_data")
DETECTION = ("acsl_loss", "deformable_attention", "detector_inference")
ONE_CORE = (*SHORT, *LONG, *MINUTES, *STEPS, *DETECTION, *VIDEO, *HTTP)
TWO_CORES = ("transforms", "sparse_vit")
ALL = (*SHORT, "embed", "upgrade_run", "upgrade_workers", *STEPS, *DETECTION, *VIDEO, *HTTP, *TWO_CORES)


def measure(name: str) -> None:
    cores = 1 if name in ONE_CORE else 2 if name in TWO_CORES else None
    threads = {} if cores is None else {"OMP_NUM_THREADS": str(cores), "OPENBLAS_NUM_THREADS": str(cores)}
    # Some machines choose an old BLAS kernel by these; it would slow both sides, and numpy most.
    unset = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OMP_WAIT_POLICY")
    if name == "transforms":
        threads["OMP_WAIT_POLICY"] = "PASSIVE"  # a thread that waits must not take the core of one that works
    environment = {key: value for key, value in os.environ.items() if key not in unset} | threads
    # The limits of embed and upgrade run are for an encoder on one core: on two the decoding has no core of its own.
    extra = ["--threads", "1"] if name in ("embed", "upgrade_run") else []
    script, kind = name.rsplit("_", 1) if name in LONG else (name, "")
    extra += ["--kind", kind] if kind else []
    command = [sys.executable, f"benchmarks/{script}.py", *extra, "--output", f"benchmarks/results/{name}.json"]
    print(f"--- {name}", flush=True)
    subprocess.run(command, check=True, env=environment, cwd=HERE.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*ALL, *LONG, *MINUTES, []], help="default: all but the long ones")
    options = parser.parse_args()
    for name in options.names or ALL:
        measure(name)


if __name__ == "__main__":
    main()
