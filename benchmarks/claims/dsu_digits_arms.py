"""The arms of dsu-digits.toml: those of dsu.toml, in one of its two worlds."""

from dsu_arms import run

__all__ = ["run"]
