"""Which installed distributions have an entry point in the group ``bowerbird``.

``importlib.metadata`` answers the same question, and a test compares the two. It is not used at start because what it
imports and parses (csv, email, all metadata) is time that ``bowerbird list`` does not need.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GROUP = "bowerbird"


@dataclass(frozen=True)
class PluginEntry:
    """One line ``name = value`` of a distribution's entry points."""

    name: str
    value: str
    distribution: str
    version: str

    def load(self) -> Any:
        """Import what the entry point names: a module, or an attribute of one."""
        module, _, attribute = self.value.partition("[")[0].strip().partition(":")
        found: Any = importlib.import_module(module.strip())
        for part in filter(None, attribute.strip().split(".")):
            found = getattr(found, part)
        return found

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".strip()


def plugin_entries() -> list[PluginEntry]:
    """The entry points of all distributions on ``sys.path``. Of two copies of one distribution the first one counts."""
    found = []
    seen: set[str] = set()
    for folder in dict.fromkeys(sys.path):
        for directory in _metadata_folders(Path(folder)):
            normal = re.sub(r"[-_.]+", "-", directory.stem.partition("-")[0]).lower()
            if normal in seen:
                continue
            seen.add(normal)
            lines = list(_group_lines(directory))
            if lines:
                distribution, version = _name_and_version(directory)
                found += [PluginEntry(name, value, distribution, version) for name, value in lines]
    return found


def _metadata_folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix in (".dist-info", ".egg-info"))
    except OSError:  # a zip file, or a folder that does not exist
        return []


def _group_lines(directory: Path) -> Iterator[tuple[str, str]]:
    try:
        text = (directory / "entry_points.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    section = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1].strip()
        elif section == GROUP and line and not line.startswith(("#", ";")):
            name, _, value = line.partition("=")
            yield name.strip(), value.strip()


def _name_and_version(directory: Path) -> tuple[str, str]:
    fields = {"name": directory.stem, "version": ""}
    for metadata in ("METADATA", "PKG-INFO"):
        try:
            text = (directory / metadata).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        for line in text.partition("\n\n")[0].splitlines():  # the description follows the empty line
            key, _, value = line.partition(":")
            if key.lower() in fields:
                fields[key.lower()] = value.strip()
        break
    return fields["name"], fields["version"]
