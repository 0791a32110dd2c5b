"""Requests that wait together become one call: how a network and a search index are shared by many clients.

There is no timer. While one batch is at work the next one gathers, so that a lone request never waits for company, and
the busier a service is, the larger its batches are.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from bowerbird.serve.problems import ProblemError

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")


class Batcher(Generic[Ask, Answer]):
    """Takes requests from ``start`` to ``stop``, which refuses those that are left.

    Args:
        call: Answers B requests, in their order, in ``thread``. An answer that is an exception is raised to its request
            alone; an exception of the call itself to all of them.
        thread: With one worker; several batchers may share it.
        most: Requests per call.
        waiting: Requests that may wait; more are refused with 503.
        seen: Called with the size of every batch.
    """

    def __init__(
        self,
        call: Callable[[Sequence[Ask]], Sequence[Answer | Exception]],
        thread: ThreadPoolExecutor,
        *,
        most: int,
        waiting: int = 4096,
        seen: Callable[[int], None] | None = None,
    ) -> None:
        self._call, self._thread, self._most, self._limit, self._seen = call, thread, most, waiting, seen
        self._queue: deque[tuple[Ask, asyncio.Future[Answer]]] = deque()
        self._filled = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Inside the event loop that the requests come from."""
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    async def __call__(self, request: Ask) -> Answer:
        """The answer to one request. One that is cancelled while it waits is left out of the batch."""
        if self._worker is None:
            raise ProblemError(503, "the service is stopping", headers={"Retry-After": "5"})
        if len(self._queue) >= self._limit:
            raise ProblemError(503, f"{len(self._queue)} requests wait already", headers={"Retry-After": "1"})
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._queue.append((request, future))
        self._filled.set()
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        batch: list[tuple[Ask, asyncio.Future[Answer]]] = []
        try:
            while True:
                await self._filled.wait()
                batch = self._take()
                if not batch:
                    continue
                if self._seen is not None:
                    self._seen(len(batch))
                try:
                    made = await loop.run_in_executor(self._thread, self._call, [request for request, _ in batch])
                    answers = list(zip(batch, made, strict=True))
                except Exception as error:
                    answers = [(asked, error) for asked in batch]
                for (_, future), answer in answers:
                    if future.done():  # its client went away meanwhile
                        continue
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
                batch = []
        finally:
            for _, future in (*batch, *self._queue):
                if not future.done():
                    future.set_exception(ProblemError(503, "the service is stopping", headers={"Retry-After": "5"}))
            self._queue.clear()

    def _take(self) -> list[tuple[Ask, asyncio.Future[Answer]]]:
        batch: list[tuple[Ask, asyncio.Future[Answer]]] = []
        while self._queue and len(batch) < self._most:
            request, future = self._queue.popleft()
            if not future.done():
                batch.append((request, future))
        if not self._queue:
            self._filled.clear()
        return batch
