"""``bowerbird demo --serve``: the demo's upgrade as people would meet it, live on the page of a service.

Everything that happens after the service has started is asked of it over HTTP, as the page would: the plan, then the
upgrade, slow enough to be watched.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

from bowerbird.demo.encoders import is_trained, recipes, train_encoder
from bowerbird.demo.pictures import new_gallery, write_pictures
from bowerbird.demo.setup import Clock, check_installed, only_one, own_folder
from bowerbird.encoders import LoadedEncoder, load_encoder
from bowerbird.errors import InputError
from bowerbird.serve.run import run
from bowerbird.serve.settings import ServeSettings

HOST = "127.0.0.1"
CANDIDATE, LABEL = "new", "label"
LOOK_SECONDS = 1.0  # between two looks at the upgrade
Say = Callable[[str], None]


def serve_demo(
    out: str | Path,
    *,
    port: int = 8000,
    seconds: float = 120.0,
    seed: int = 0,
    epochs: int = 40,
    limit: int | None = None,
    new_split: str = "new-train",
    open_page: Callable[[str], object] | None = None,
    say: Say = lambda _: None,
    show: bool = False,
) -> None:
    """Train an old and a new encoder, fill a gallery, serve it, and let the service upgrade it; until Ctrl-C.

    Args:
        out: Folder of this or an earlier demo. Encoders that are there are used again; the gallery is made anew, so
            that there is something to see each time.
        port: 0: one that is free.
        seconds: For which the upgrade should last, where this machine is fast enough.
        epochs: As ``limit`` and ``new_split`` (see ``run_demo``) for quick tests.
        open_page: Called with the address of the page, once it is there.
        say: Called with one line per step, and per measurement of the upgrade.
        show: Draw progress bars.

    Raises:
        MissingExtraError: Something that the demo uses is not installed; says what to install.
        GalleryError: ``out`` holds something else.
        InputError: The port is taken, or another process serves this folder.
    """
    out = Path(out)
    check_installed("serve", "fastapi", "uvicorn")
    _check_port(port)
    own_folder(out, keep=True)
    with only_one(out):
        gallery, items = _prepare(
            out, Clock(say), seed=seed, epochs=epochs, limit=limit, new_split=new_split, show=show
        )
        new = out / "runs/new"
        settings = ServeSettings.model_validate(
            {
                "gallery": str(gallery), "host": HOST, "port": port, "label_key": LABEL,
                "candidates": {CANDIDATE: str(new.resolve())},
                "backfill_nice": 5,  # somebody waits for it, and its rate keeps it from disturbing
            }
        )  # fmt: skip
        stopped = threading.Event()

        def started(address: str) -> None:
            say(f"\nThe page: {address}    Ctrl-C ends the service.")
            say(f"Pictures to drop on it: {out / 'images/unseen-query'}\n")
            if open_page is not None:
                open_page(f"{address}/#/upgrade")
            threading.Thread(target=_guide, args=(address, items / seconds, stopped, say), daemon=True).start()

        # What the service does is said here in other words.
        logging.getLogger("bowerbird.serve").setLevel(logging.WARNING)
        try:
            run(settings, started=started)
        finally:
            stopped.set()
    say(
        f"\nStopped. The gallery is as you left it; to go on with it:\n"
        f"  bowerbird serve {gallery} --candidate {CANDIDATE}={new} --label-key {LABEL}"
    )


def _prepare(
    out: Path, clock: Clock, *, seed: int, epochs: int, limit: int | None, new_split: str, show: bool
) -> tuple[Path, int]:
    """The gallery in the old encoder's space, and the number of its items."""
    with clock.step("pictures", "emoji of concepts that no encoder has seen, written as PNG files"):
        _, items = write_pictures(out / "images", limit)
    encoders: dict[str, LoadedEncoder] = {}
    planned = recipes(out / "runs/old", seed=seed, epochs=epochs, new_split=new_split)
    for name, what in (("old", "100 concepts, 3 styles"), ("new", "448 concepts, 5 styles, another seed")):
        folder = out / "runs" / name
        kept = is_trained(planned[name], folder)
        with clock.step(f"{'use' if kept else 'train'} {name}", "trained earlier" if kept else what):
            if not kept:
                shutil.rmtree(folder, ignore_errors=True)  # of another recipe, or not finished
                train_encoder(planned[name], folder, show=show)
            encoders[name] = load_encoder(folder)
    gallery = out / "emoji"
    with clock.step("gallery", f"{len(items)} pictures encoded with the old encoder and added"):
        shutil.rmtree(gallery, ignore_errors=True)
        vectors = encoders["old"].encode([item["path"] for item in items])
        new_gallery(gallery, encoders["old"], items, vectors).close()
    return gallery, len(items)


# ------------------------------------------------------------------------------------------------ over HTTP


def _guide(address: str, rate: float, stopped: threading.Event, say: Say) -> None:
    """Plan the upgrade, start it, and say what it does; in a thread beside the service."""
    try:
        job = _ask(address, "/v1/upgrade/plan", {"candidate": CANDIDATE, "label_key": LABEL})
        say("plan         a sample is encoded by the new encoder, and every way to upgrade is forecast")
        while job["state"] == "running" and not stopped.wait(LOOK_SECONDS):
            job = _ask(address, "/v1/upgrade/plan")
        if job["plan"] is not None:
            say(f"             {job['plan']['recommendation']}: {job['plan']['reason']}")
        elif job["error"] is not None:
            say(f"             failed: {job['error']}")
        _ask(address, "/v1/upgrade/start", {"candidate": CANDIDATE, "label_key": LABEL, "rate": rate})
        say(f"upgrade      begun, at {rate:.0f} items a second so that it can be watched; searches go on\n")
        _follow(address, stopped, say)
    except _Refused as error:
        say(f"the service says: {error}\nIt goes on, and the page has the buttons.")
    except (OSError, HTTPException):
        return  # the service has ended: nobody is left to ask


def _follow(address: str, stopped: threading.Event, say: Say) -> None:
    """Say every new measurement, until the upgrade is finished or rolled back."""
    told, state, done = 0, "running", False
    while state != "none":
        if stopped.wait(LOOK_SECONDS):
            return
        view = _ask(address, "/v1/upgrade")
        for point in view["curve"][told:]:
            say(f"{point['share']:6.0%} re-encoded   {_measured(point)}")
        if view["worker"]["state"] == "done" and not done:  # the last measurement, too
            done = True
            say("Every item is in the new space. Finish it on the page, or roll it back.")
        told, state = len(view["curve"]), view["state"]
    say(f"The upgrade has ended: {view['last']}.")


def _measured(point: Mapping[str, Any]) -> str:
    quality = "" if point["quality"] is None else f"mAP {point['quality']:.3f}   "
    return f"{quality}turned wrong {point['nfr']:.1%}   turned right {point['pfr']:.1%}"


class _Refused(Exception):
    """An answer that is a problem."""


def _ask(address: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """The JSON of an answer; a POST where there is a ``body``. No proxy: it is this machine."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=600) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            raise _Refused(json.load(error).get("detail", str(error))) from error


# -------------------------------------------------------------------------------------------------- set-up


def _check_port(port: int) -> None:
    """Now, and not after half a minute of training."""
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        raise InputError(
            f"port {port} cannot be used ({error.strerror}); choose another with --port, 0 for a free one"
        ) from error
