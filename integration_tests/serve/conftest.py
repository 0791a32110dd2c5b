"""One service over a small gallery, in a process of its own, for all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fuzz
import serve_world


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[serve_world.Running, tuple[bytes, ...]]]:
    """The running service, and what must never be in an answer."""
    with fuzz.hostile_world(tmp_path_factory.mktemp("hostile")) as (running, secrets):
        yield running, secrets
        assert running.process.poll() is None, "the service has ended:\n" + "".join(running.lines[-50:])
        assert not fuzz.server_faults(running.lines)
