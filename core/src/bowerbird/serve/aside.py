"""Work on a gallery that takes seconds (a map, a matrix), in a process of its own.

It runs at a low priority with one thread, opens the gallery for reading by itself, and gives its memory back by
ending. The request goes to its standard input as one line of JSON, the answer comes from its standard output. It ends
when its input is closed, so that it never outlives the service.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from bowerbird import errors
from bowerbird.errors import BowerbirdError

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
NICE = 10  # a person waits for it: below searches, above the backfill


async def aside(task: str, *, seconds: float, **request: Any) -> Any:
    """The plain data that ``task`` (``map``, ``matrix``) returns. Cancelled with its caller, which ends the process.

    Raises:
        BowerbirdError: Whatever the task raised.
        ProblemError: 503 after ``seconds``, or where the process was killed.
    """
    from bowerbird.serve.problems import ProblemError  # here: the process itself needs no FastAPI

    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bowerbird.serve.aside"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **dict.fromkeys(THREADS, "1")},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        async with asyncio.timeout(seconds):
            process.stdin.write(json.dumps({"task": task, **request}).encode() + b"\n")
            answer = await process.stdout.read()  # its input stays open until then
    except TimeoutError:
        raise ProblemError(
            503, f"the {task} was given up after {seconds:g} seconds", headers={"Retry-After": "60"}
        ) from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await asyncio.shield(process.wait())
    try:
        made = json.loads(answer)
    except ValueError:
        raise ProblemError(503, f"the process that made the {task} was killed", headers={"Retry-After": "10"}) from None
    if "error" in made:
        kind = getattr(errors, made["error"], BowerbirdError)
        raise kind(made["message"])
    return made["result"]


def main() -> None:
    os.nice(NICE)
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from bowerbird.serve import mapping, spaces

    tasks: dict[str, Callable[..., Any]] = {"map": mapping.make_layout, "matrix": spaces.make_matrix}
    try:
        made = {"result": tasks[request.pop("task")](**request)}
    except BowerbirdError as exc:
        made = {"error": type(exc).__name__, "message": str(exc)}
    sys.stdout.write(json.dumps(made))
    sys.stdout.flush()
    os._exit(0)  # the thread waits for its input


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
