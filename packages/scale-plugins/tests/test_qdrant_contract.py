"""``scale:qdrant`` passes the suite that every store passes: in Qdrant's local mode, or against a server."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from bowerbird.testing import StoreContract

SERVER = os.environ.get("BOWERBIRD_TEST_QDRANT_URL")


class TestQdrant(StoreContract):
    name = "scale:qdrant"
    sequences = 2
    if not SERVER:
        test_worker_processes_share_the_work_and_one_that_is_killed_costs_nothing = None
        removed = {
            "test_worker_processes_share_the_work_and_one_that_is_killed_costs_nothing": "the local mode of Qdrant is "
            "for one process; with BOWERBIRD_TEST_QDRANT_URL the test runs"
        }

    @pytest.fixture(autouse=True)
    def _servers(self, postgres_url: Callable[[], str], tmp_path: Path) -> None:
        place = SERVER or str(tmp_path / "qdrant")
        self.new_url = lambda: f"qdrant+{postgres_url()}&qdrant={quote(place, safe='/:')}"  # type: ignore[method-assign]
