"""The arms of mst-masks.toml: some of those of mst.toml."""

from mst_arms import run

__all__ = ["run"]
