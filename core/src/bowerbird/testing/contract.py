"""The base of all contracts: what is true of every method, whatever its kind.

A subclass that replaces or removes a test of its contract must say why, otherwise the class cannot be created, and
pytest reports an error while it collects the file.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from bowerbird.errors import did_you_mean
from bowerbird.records import Record
from bowerbird.registry import HEAVY_MODULES, get_registry

F = TypeVar("F", bound=Callable[..., Any])
REASON = "__contract_override_reason__"


def override_contract_test(*, reason: str) -> Callable[[F], F]:
    """Marks a test that replaces a test of the contract; ``reason`` says why this method needs another one."""
    if not isinstance(reason, str) or not reason.strip():
        raise TypeError("override_contract_test needs a reason: why can this method not pass the contract's test?")

    def mark(function: F) -> F:
        setattr(function, REASON, reason)
        return function

    return mark


class Contract:
    """Subclass one of the contracts of a kind and set ``name``.

    Attributes:
        name: Of the record, ``plugin:method``.
        config: Settings to build it with. Choose the smallest that mean something; tests should take milliseconds.
        removed: Test of the contract -> reason, for a test that is set to ``None``.
    """

    kind: ClassVar[str | None] = None
    role: ClassVar[str | None] = None
    name: ClassVar[str]
    config: ClassVar[Mapping[str, Any]] = {}
    removed: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        inherited = {
            name
            for base in cls.__mro__[1:]
            for name in vars(base)
            if name.startswith("test_") and issubclass(base, Contract)
        }
        for name, value in vars(cls).items():
            if name in inherited and not getattr(value, REASON, None) and not (value is None and cls.removed.get(name)):
                raise TypeError(
                    f"{cls.__name__}.{name} replaces a test of its contract without a reason. Decorate it with "
                    f"@override_contract_test(reason='...'), or, to remove it, set {name} = None and give the reason "
                    f"in the class attribute: removed = {{{name!r}: '...'}}."
                )
            if name not in inherited and getattr(value, REASON, None):
                raise TypeError(
                    f"{cls.__name__}.{name} overrides no test of its contract.{did_you_mean(name, inherited)}"
                )
        for name in vars(cls).get("removed", {}):
            if name not in inherited or vars(cls).get(name, name) is not None:
                raise TypeError(
                    f"{cls.__name__}.removed names {name!r}, which is "
                    + ("not set to None." if name in inherited else f"no test.{did_you_mean(name, inherited)}")
                )

    # ------------------------------------------------------------------------------------------------- helpers

    @property
    def record(self) -> Record:
        return get_registry().get(self.kind, self.name, self.role)

    @property
    def target(self) -> Any:
        """The class or function that the record points to."""
        return get_registry().load(self.record)

    def make_config(self, **changes: Any) -> Any:
        """An instance of the record's config model from ``config`` and ``changes``; ``None`` where it has none."""
        model = get_registry().load_config(self.record)
        if model is None:
            assert not self.config, f"{self.name} has no config model, but the test gives it settings"
            return None
        return model(**{**self.config, **changes})

    # --------------------------------------------------------------------------------------------------- tests

    def test_discovery_imports_nothing_heavy(self) -> None:
        """Fix: import torch, numpy and the like in the modules that records name, never in the plugin's own module."""
        imported = modules_imported_at_discovery(self.name.partition(":")[0])
        if imported is None:
            import pytest

            pytest.skip("a plugin of this process; another process cannot discover it")
        assert not imported, f"discovering {self.name.partition(':')[0]!r} imports {', '.join(imported)}"

    def test_settings_survive_a_round_trip(self) -> None:
        """Fix: give every setting a type that JSON can hold, and validators that accept their own output."""
        config = self.make_config()
        if config is None:
            return
        model = type(config)
        assert model.model_validate(config.model_dump()) == config, "settings change on the way through a dict"
        assert model.model_validate_json(config.model_dump_json()) == config, "settings change on the way through JSON"

    def test_settings_are_frozen_and_refuse_unknown_keys(self) -> None:
        """Fix: ``model_config = ConfigDict(frozen=True, extra="forbid")`` in the config model."""
        from pydantic import ValidationError

        config = self.make_config()
        if config is None:
            return
        assert type(config).model_config.get("frozen"), f"{type(config).__name__} is not frozen"
        try:
            self.make_config(no_such_setting_xyz=1)
        except ValidationError:
            return
        raise AssertionError(f"{type(config).__name__} accepts a setting that it does not have")

    def test_presets_are_valid_settings(self) -> None:
        """Fix: a preset is a function without arguments that returns settings of the config model."""
        registry = get_registry()
        for preset in self.record.presets:
            values = registry.load_preset(self.record, preset)
            json.dumps(values)  # plain data
            self.make_config(**values)


@functools.cache
def modules_imported_at_discovery(plugin: str) -> list[str] | None:
    """Which heavy modules the discovery of ``plugin`` alone imports, in a fresh process.

    ``None`` where a fresh process does not find the plugin.
    """
    others = [status.name for status in get_registry().plugins if status.name != plugin]
    code = (
        "import json, sys\n"
        "from bowerbird.registry import get_registry\n"
        f"known = {plugin!r} in [status.name for status in get_registry().plugins]\n"
        f"print(json.dumps([m for m in {HEAVY_MODULES!r} if m in sys.modules] if known else None))\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "BOWERBIRD_DISABLE_PLUGINS": ",".join(others),
    }
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, f"discovery fails in a fresh process:\n{result.stderr}"
    return json.loads(result.stdout.splitlines()[-1])


def must_raise(function: Callable[[], Any], what: str) -> None:
    """``function`` must raise an ordinary exception; ``what`` was wrong with its input."""
    try:
        function()
    except Exception:
        return
    raise AssertionError(f"{what} was accepted silently; check the input and raise an error that names it")


def first_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    """Names of the entries of two state dicts that are not bit-equal."""
    import torch

    for name in first.keys() | second.keys():
        if name not in first or name not in second or not torch.equal(first[name], second[name]):
            yield name
