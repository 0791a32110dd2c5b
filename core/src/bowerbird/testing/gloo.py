"""Run a function in two processes that talk over gloo, to test what data parallel training must get right."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


def run_two_ranks(function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """``[result of rank 0, result of rank 1]`` of ``function(rank, *args)``, with ``torch.distributed`` initialised.

    The processes are started fresh and import the file in which ``function`` is defined, so it works in test modules
    that cannot be imported by name. They meet through a file: no port, no network.

    Args:
        function: A function at the top level of a file.
        args: Tensors, numbers, text, and lists, tuples and dicts of them. The result must be of the same types.
        timeout: Seconds for both processes together.

    Raises:
        TypeError: ``function`` is not at the top level of a file.
        AssertionError: A rank failed (its output is in the message) or both took too long. No process is left behind.
    """
    import torch

    source = inspect.getsourcefile(function)
    if source is None or "." in function.__qualname__:
        raise TypeError(f"{function.__qualname__} must be a function at the top level of a file")
    with tempfile.TemporaryDirectory(prefix="bowerbird-gloo-") as folder:
        torch.save(list(args), Path(folder, "args.pt"))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "RANK": "",
            "WORLD_SIZE": "2",
        }
        if sys.platform == "linux":  # a machine without a network has no other interface
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        ranks = []
        outputs = []
        try:
            for rank in range(2):
                output = Path(folder, f"output-{rank}.txt").open("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
                outputs.append(output)
                command = [sys.executable, "-m", __name__, source, function.__name__, folder, str(timeout)]
                environment = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
            _wait(ranks, time.monotonic() + timeout)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()
            texts = []
            for output in outputs:
                output.seek(0)
                texts.append(output.read())
                output.close()
        codes = [process.returncode for process in ranks]
        if codes != [0, 0]:
            text = "\n".join(f"--- rank {rank}, exit code {codes[rank]}\n{texts[rank]}" for rank in range(2))
            raise AssertionError(f"{function.__name__} failed in two processes (within {timeout:g} s):\n{text}")
        return [torch.load(Path(folder, f"result-{rank}.pt"), weights_only=True) for rank in range(2)]


def _wait(ranks: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Until both ended, one failed (the other would wait for it in vain), or the time is over."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in ranks]
        if None not in codes or any(codes):
            return
        time.sleep(0.01)


def _main(source: str, name: str, folder: str, timeout: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo",
        init_method=Path(folder, "meeting").as_uri(),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=float(timeout)),
    )
    try:
        spec = importlib.util.spec_from_file_location("bowerbird_two_ranks", source)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        args = torch.load(Path(folder, "args.pt"), weights_only=True)
        result = getattr(module, name)(rank, *args)
        torch.save(result, Path(folder, f"result-{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
