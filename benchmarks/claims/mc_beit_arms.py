"""The arms of mc-beit.toml are those of ``beit_arms``."""

from beit_arms import run

__all__ = ["run"]
