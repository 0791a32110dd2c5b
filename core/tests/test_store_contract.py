"""The embedded store passes the suite that every store passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bowerbird.testing import StoreContract


class TestEmbedded(StoreContract):
    name = "core:embedded"
    made = 0

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def new_url(self) -> str:
        self.made += 1
        return str(self.folder / f"gallery-{self.made}")
