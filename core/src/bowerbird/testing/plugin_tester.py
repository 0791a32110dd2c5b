"""A whole plugin at once: is it discovered, and does everything that its records name exist and fit together?"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Self

from bowerbird.cli.doctor import CONTRACTS
from bowerbird.errors import BowerbirdError, PluginError
from bowerbird.records import Record
from bowerbird.registry import PluginStatus, get_registry, import_string
from bowerbird.testing.contract import modules_imported_at_discovery


class PluginTester:
    """Checks a plugin by the name of its entry point, or a module that is not installed.

    ::

        def test_my_plugin_is_sound():
            PluginTester("acme").assert_sound()

    With a module it is also a context manager that registers the plugin for a while::

        with PluginTester(module, name="acme"):
            get_registry().get("encoder", "acme:tiny")
    """

    def __init__(self, plugin: str | ModuleType | Any, *, name: str | None = None) -> None:
        """``name``: the plugin name of a module; by default the last part of its import name."""
        self._module = None if isinstance(plugin, str) else plugin
        self.name: str = plugin if isinstance(plugin, str) else name or plugin.__name__.rpartition(".")[2]

    def __enter__(self) -> Self:
        if self._module is not None:
            get_registry().register_module(self.name, self._module)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._module is not None:
            get_registry().unregister(self.name)

    @property
    def status(self) -> PluginStatus:
        """Raises ``PluginError`` where no such plugin is installed."""
        for status in get_registry().plugins:
            if status.name == self.name:
                return status
        raise PluginError(f"no plugin {self.name!r} is installed; is its entry point in the group 'bowerbird'?")

    def problems(self) -> list[str]:
        """Everything that is wrong, one sentence each; empty for a sound plugin. Imports every method."""
        try:
            with self:
                status = self.status
                if status.state != "ok":
                    return [f"{status}\n{status.traceback}"]
                found = [] if self._module is not None else self._discovery_problems()
                records = [r for r in get_registry().records() if r.name.partition(":")[0] == self.name]
                if not records:
                    found.append("it has no records; implement at least one catalogue hook")
                for record in records:
                    found += [f"{record.kind} {record.name}: {problem}" for problem in _record_problems(record)]
                return found
        except PluginError as exc:
            return [str(exc)]

    def assert_sound(self) -> None:
        """Raises ``AssertionError`` that lists all problems."""
        problems = self.problems()
        if problems:
            raise AssertionError(f"plugin {self.name!r} has problems:\n" + "\n".join(f"- {line}" for line in problems))

    def _discovery_problems(self) -> list[str]:
        heavy = modules_imported_at_discovery(self.name)
        return [f"its discovery imports {', '.join(heavy)}; import them where they are used"] if heavy else []


def _record_problems(record: Record) -> list[str]:
    registry = get_registry()
    problems = []
    try:
        target = registry.load(record)
        config = registry.load_config(record)
    except PluginError as exc:
        return [str(exc)]
    if record.kind in CONTRACTS:
        contract = import_string(CONTRACTS[record.kind])
        if not (isinstance(target, type) and issubclass(target, contract)):
            problems.append(f"{record.target} is no subclass of {CONTRACTS[record.kind]}")
    elif not callable(target):
        problems.append(f"{record.target} cannot be called")
    if config is None:
        return problems

    from pydantic import BaseModel, ValidationError

    if not (isinstance(config, type) and issubclass(config, BaseModel)):
        return [*problems, f"{record.config} is no pydantic model"]
    if not config.model_config.get("frozen"):
        problems.append(f"{record.config} is not frozen: model_config = ConfigDict(frozen=True, extra='forbid')")
    if config.model_config.get("extra") != "forbid":
        problems.append(f"{record.config} accepts unknown keys: model_config = ConfigDict(frozen=True, extra='forbid')")
    for name, field in config.model_fields.items():
        if not field.description:
            problems.append(f"setting {name!r} has no description, so that `bowerbird show` cannot explain it")
    for preset in record.presets:
        try:
            config(**registry.load_preset(record, preset))
        except (BowerbirdError, ValidationError, TypeError) as exc:
            problems.append(f"preset {preset!r}: {exc}")
    return problems
