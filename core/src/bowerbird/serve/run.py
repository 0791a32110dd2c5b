"""Running the application: one process, one port, until SIGTERM or Ctrl-C.

One process on purpose. A gallery's searches are threads of numpy and FAISS that release the interpreter, an encoder
fills its batches best where every request waits in one queue, and pictures are decoded in processes of their own. A
second server process would load the encoders again and halve the batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from bowerbird.errors import InputError
from bowerbird.serve.app import create_app
from bowerbird.serve.protocol import Protocol
from bowerbird.serve.settings import ServeSettings

STOP_SECONDS = 30  # for requests in flight when the service is told to stop


def run(settings: ServeSettings, *, started: Callable[[str], None]) -> None:
    """Serve until the process is told to stop; what is in flight is answered first, for at most ``STOP_SECONDS``.

    Args:
        started: Called with the address, once requests are answered.

    Raises:
        InputError: If the address cannot be used, or the settings do not allow it.
        GalleryError: If the gallery cannot be opened.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")  # of libraries: warnings
    logging.getLogger("bowerbird").setLevel(logging.INFO)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every form that is none
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",  # see _serve
        log_config=None,
        access_log=False,  # the metrics count; the audit log says who changed what
        server_header=False,
        proxy_headers=False,  # an address that a client writes into a header is no address
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    listening = _listening(settings)  # a port that is taken is found before a gallery is opened
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(app, config, listening, lambda: started(address(settings.host, listening))))


async def _serve(app: FastAPI, config: uvicorn.Config, listening: socket.socket, started: Callable[[], None]) -> None:
    """The lifespan is entered here: uvicorn would turn an error of it into a traceback, and end before its end."""
    server = _Uvicorn(config, app, started)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C raises KeyboardInterrupt
            loop.add_signal_handler(number, server.handle_exit, number, None)
    with listening:
        async with app.router.lifespan_context(app):
            await server.serve(sockets=[listening])


class _Uvicorn(uvicorn.Server):
    """Says when it answers, and tells the streams that it stops: they would never end by themselves."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, started: Callable[[], None]) -> None:
        super().__init__(config)
        self.app, self.say = app, started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the caller has; uvicorn would raise the signal again before the gallery is closed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # Modules and encoders stay until the end. A full collection would look at all their objects every now and
        # then, and every request would wait for it.
        gc.collect()
        gc.freeze()
        self.say()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.state.server.stopping.set()
        await super().shutdown(sockets)
        gc.unfreeze()  # libraries look at the end for what was never collected, and complain


def _listening(settings: ServeSettings) -> socket.socket:
    """A socket bound to the address of the settings."""
    try:
        family, kind, proto, _, place = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, proto)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(place)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        raise InputError(
            f"cannot serve at {settings.host} port {settings.port}: {error.strerror or error}. Choose another address "
            "with --host or --port; --port 0 takes one that is free."
        ) from error
    return bound


def address(host: str, listening: socket.socket) -> str:
    """``http://host:port``; of a service on every address the one of this machine."""
    port = listening.getsockname()[1]
    if host in ("0.0.0.0", "::", ""):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
