"""``scale:postgres`` passes the suite that every store passes, against a real server."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bowerbird.testing import StoreContract


class TestPostgres(StoreContract):
    name = "scale:postgres"

    @pytest.fixture(autouse=True)
    def _server(self, postgres_url: Callable[[], str]) -> None:
        self.new_url = postgres_url  # type: ignore[method-assign]
