"""Discovery: reads the entry points of installed plugins, keeps their records, and imports a method when it is used.

This is a loader of our own around pluggy, because pluggy's ``load_setuptools_entrypoints`` ends with the first plugin
that fails. Here every plugin has a ``try`` of its own: import, API version, hooks, records. One that fails is
unregistered and keeps a ``PluginStatus``, so that nothing is lost silently: ``bowerbird list`` names it,
``bowerbird doctor`` shows its traceback, and asking for one of its methods raises with the cause chained.

Environment variables:
    BOWERBIRD_DISABLE_PLUGINS: names, separated by commas, that are not loaded.
    BOWERBIRD_STRICT_PLUGINS: ``1`` raises at the first plugin that fails.
    BOWERBIRD_PLUGIN: paths of plugin files (separated like PATH) to try without packaging them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from bowerbird import hookspecs
from bowerbird.entry_points import PluginEntry, plugin_entries
from bowerbird.errors import MissingExtraError, PluginError, UnknownNameError, did_you_mean
from bowerbird.records import API_VERSION, PLUGIN_NAME, RECORD_TYPES, RETRIEVER_ROLES, Record, check_record

if TYPE_CHECKING:
    from pydantic import BaseModel

HEAVY_MODULES = ("numpy", "torch", "pydantic", "timm", "faiss", "transformers", "PIL")
_KINDS = tuple(record_type.kind for record_type in RECORD_TYPES)


@dataclass(frozen=True, kw_only=True)
class PluginStatus:
    """What became of one plugin.

    Attributes:
        name: Name of the entry point, the left part of its records' names.
        distribution: What was installed, or the path of a file that is tried without packaging.
        version: Of the distribution; empty for a file.
        state: ``ok``, ``disabled``, ``incompatible`` (hook API) or ``broken``.
        detail: One line: why it is not ok; for an ``ok`` plugin a warning or nothing.
        traceback: Of what failed, as text.
        error: What failed; the cause of the errors that its methods raise.
    """

    name: str
    distribution: str
    version: str = ""
    state: str = "ok"
    detail: str = ""
    traceback: str = ""
    error: BaseException | None = field(default=None, repr=False, compare=False)

    @property
    def source(self) -> str:
        """``bowerbird-acme 0.2.0``, or the path of a file."""
        return f"{self.distribution} {self.version}".strip()

    def to_dict(self) -> dict[str, str]:
        """The status as plain data, without the exception object."""
        names = ("name", "distribution", "version", "state", "detail", "traceback")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.source}) is {self.state}" + (f": {self.detail}" if self.detail else "")


class _IncompatibleError(PluginError):
    """The plugin was written for hooks that this core does not have."""


class Registry:
    """Plugins and their records. ``get_registry()`` returns the one of this process."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._statuses: dict[str, PluginStatus] = {}
        self._records: dict[str, list[Record]] = {}  # plugin name -> its records
        self._targets: dict[str, Any] = {}  # import string -> what it names

    # ------------------------------------------------------------------------------------------------ reading

    @property
    def plugins(self) -> list[PluginStatus]:
        """The state of every plugin that was found, by name."""
        return [self._statuses[name] for name in sorted(self._statuses)]

    @property
    def hook(self) -> Any:
        """pluggy's relay, for the events: ``registry.hook.bowerbird_run_started(run_dir=..., recipe=...)``."""
        return self._manager.hook

    def records(self, kind: str | None = None, role: str | None = None) -> list[Record]:
        """All records, or those of one kind (and, for retrievers, one role), sorted by name.

        Raises:
            UnknownNameError: ``kind`` or ``role`` does not exist.
        """
        if kind is not None and kind not in _KINDS:
            raise UnknownNameError(f"no kind {kind!r}.{did_you_mean(kind, _KINDS)} Kinds: {', '.join(_KINDS)}.")
        if role is not None and role not in RETRIEVER_ROLES:
            roles = ", ".join(RETRIEVER_ROLES)
            raise UnknownNameError(f"no role {role!r}.{did_you_mean(role, RETRIEVER_ROLES)} Roles: {roles}.")
        found = [
            record
            for records in self._records.values()
            for record in records
            if (kind is None or record.kind == kind) and (role is None or getattr(record, "role", None) == role)
        ]
        return sorted(found, key=lambda record: (record.name, record.kind, getattr(record, "role", "")))

    def get(self, kind: str | None, name: str, role: str | None = None) -> Record:
        """The record called ``name``: ``plugin:method``, or only ``method`` where that is unambiguous.

        Args:
            kind: ``encoder``, ``objective``, ``dataset``, ``retriever``, ``modifier``, ``evaluator``; ``None`` for any.
            name: For example ``compat:rank-merge`` or ``rank-merge``.
            role: Of a retriever.

        Raises:
            UnknownNameError: There is none (a close name is suggested), or there are several.
            PluginError: Its plugin is installed but not usable; the failure is chained.
        """
        candidates = self.records(kind, role)
        matches = [record for record in candidates if name in (record.name, record.name.partition(":")[2])]
        what = f"{kind or 'method'}{f' with role {role!r}' if role else ''}"
        if len(matches) == 1:
            return matches[0]
        if matches:
            listed = ", ".join(f"{match.name} ({_kind_and_role(match)})" for match in matches)
            raise UnknownNameError(f"{name!r} names more than one {what}: {listed}. Say which.")

        status = self._statuses.get(name.partition(":")[0]) if ":" in name else None
        if status is not None and status.state != "ok":
            remedy = (
                "Take it out of BOWERBIRD_DISABLE_PLUGINS to use it."
                if status.state == "disabled"
                else "`bowerbird doctor` shows the traceback."
            )
            raise PluginError(f"{what} {name!r} is not available: {status}. {remedy}") from status.error
        elsewhere = [record for record in self.records() if record.name == name]
        if elsewhere:
            kinds = " and ".join(_kind_and_role(record) for record in elsewhere)
            raise UnknownNameError(f"{name!r} is no {what} but: {kinds}.")
        names = [record.name for record in candidates]
        hint = did_you_mean(name, names) or did_you_mean(name, [n.partition(":")[2] for n in names])
        if ":" in name and status is None:
            plugin = name.partition(":")[0]
            hint = (
                hint or f" No plugin {plugin!r} is installed; by convention `pip install bowerbird-{plugin}` brings it."
            )
        raise UnknownNameError(
            f"no {what} named {name!r}.{hint} `bowerbird list{f' {kind}' if kind else ''}` shows what there is."
        )

    # ------------------------------------------------------------------------------------------------ loading

    def load(self, record: Record) -> Any:
        """Import what ``record`` points to.

        Raises:
            MissingExtraError: An optional dependency is not installed; the message has the command.
            PluginError: The target cannot be imported; the failure is chained.
        """
        self._check_extras(record)
        return self._import(record.target, record)

    def load_config(self, record: Record) -> type[BaseModel] | None:
        """The pydantic model of the settings of ``record``; ``None`` where it has none. Raises like ``load``."""
        return None if record.config is None else self._import(record.config, record)

    def load_preset(self, record: Record, preset: str) -> dict[str, Any]:
        """The settings of a preset as plain data.

        Raises:
            UnknownNameError: ``record`` has no such preset.
            PluginError: It cannot be imported.
        """
        if preset not in record.presets:
            known = ", ".join(sorted(record.presets)) or "none"
            hint = did_you_mean(preset, record.presets)
            raise UnknownNameError(f"{record.name} has no preset {preset!r}.{hint} Presets: {known}.")
        return dict(self._import(record.presets[preset], record)())

    def missing_extras(self, record: Record) -> dict[str, str]:
        """Import name -> what to install, for the extras of ``record`` that are not installed."""
        return {module: install for module, install in record.extras.items() if not _is_installed(module)}

    def distribution(self, record: Record) -> str:
        """Where ``record`` comes from: ``bowerbird-acme 0.2.0``."""
        status = self._statuses.get(record.name.partition(":")[0])
        return status.source if status else "an unregistered plugin"

    def _check_extras(self, record: Record, cause: BaseException | None = None) -> None:
        missing = self.missing_extras(record)
        if missing:
            raise MissingExtraError(
                f"{record.name!r} needs what is not installed: {', '.join(sorted(missing))}. "
                f"Install with: {install_command(missing)}"
            ) from cause

    def _import(self, target: str, record: Record) -> Any:
        if target not in self._targets:
            try:
                self._targets[target] = import_string(target)
            except KeyboardInterrupt:
                raise
            except BaseException as exc:
                self._check_extras(record, exc)
                raise PluginError(
                    f"{record.name!r} ({self.distribution(record)}): cannot import {target!r}: {_one_line(exc)}"
                ) from exc
        return self._targets[target]

    # ---------------------------------------------------------------------------------------------- discovery

    def discover(self) -> None:
        """Load core's own records and every installed plugin. One that fails is kept as a status, never raised.

        Raises:
            PluginError: Only with BOWERBIRD_STRICT_PLUGINS=1, at the first plugin that fails.
        """
        import bowerbird

        claims: dict[str, list[PluginEntry]] = defaultdict(list)
        for entry in plugin_entries():
            claims[entry.name].append(entry)
        # Core's own records come with this module and not from its entry point: nobody can take the name away.
        foreign = [entry for entry in claims.pop("core", []) if entry.distribution != "bowerbird-core"]
        self._add(
            PluginStatus(name="core", distribution="bowerbird-core", version=bowerbird.__version__),
            lambda: importlib.import_module("bowerbird.builtin"),
        )
        for entry in foreign:
            self._reject_claim(entry, "the name 'core' belongs to bowerbird-core")
        for name in sorted(claims):
            contenders = claims[name]
            if len(contenders) > 1:
                # Which of them is meant is not ours to guess, so that neither is loaded.
                culprits = " and ".join(str(entry) for entry in contenders)
                for entry in contenders:
                    self._reject_claim(entry, f"the name {name!r} is claimed by {culprits}; uninstall one")
                continue
            entry = contenders[0]
            self._add(PluginStatus(name=name, distribution=entry.distribution, version=entry.version), entry.load)

    def add_file(self, path: str | Path) -> PluginStatus:
        """Try a plugin file without packaging it. Its plugin name is the file's name without ``.py``.

        The file's folder is appended to ``sys.path``, so that targets in the file and beside it can be imported.
        """
        path = Path(path).resolve()
        name = path.stem
        known = self._statuses.get(str(path)) or self._statuses.get(name)
        if known is not None and known.distribution == str(path):
            return known
        status = PluginStatus(name=name, distribution=str(path))
        if known is not None or name in sys.modules:
            taken = f"by {known.source}" if known else "by a module that is already imported"
            error = PluginError(f"the name {name!r} is taken {taken}; rename the file")
            return self._keep_failure(replace(status, name=str(path)), error)
        return self._add(status, lambda: _import_file(path))

    def register_module(self, name: str, module: Any) -> PluginStatus:
        """Register a plugin of this process (for tests and notebooks). Raises ``PluginError`` where it is not valid."""
        if name in self._statuses:
            raise PluginError(f"the name {name!r} is already taken by {self._statuses[name].source}")
        status = self._add(PluginStatus(name=name, distribution="(this process)"), lambda: module)
        if status.state != "ok":
            self.unregister(name)
            raise PluginError(str(status)) from status.error
        return status

    def unregister(self, name: str) -> None:
        """Forget the plugin ``name``. Does nothing where there is none."""
        if self._manager.has_plugin(name):
            self._manager.unregister(name=name)
        self._statuses.pop(name, None)
        self._records.pop(name, None)

    def _add(self, status: PluginStatus, import_plugin: Callable[[], Any]) -> PluginStatus:
        if status.name in _names_in("BOWERBIRD_DISABLE_PLUGINS"):
            return self._keep_disabled(status)
        before = {module for module in HEAVY_MODULES if module in sys.modules}
        try:
            if not PLUGIN_NAME.fullmatch(status.name):
                raise PluginError(f"{status.name!r} is no plugin name: use a-z, 0-9, '-' and '_'")
            plugin = import_plugin()
            _check_api(plugin, status)
            self._register_hooks(plugin, status.name)
            self._records[status.name] = self._collect(plugin, status.name)
        except KeyboardInterrupt:
            raise
        except BaseException as exc:  # a plugin may call sys.exit() while it is imported
            return self._keep_failure(status, exc)
        heavy = [module for module in HEAVY_MODULES if module in sys.modules and module not in before]
        if heavy:
            detail = f"imports {', '.join(heavy)} at discovery, which slows every start; import it where it is used"
            status = replace(status, detail=detail)
        self._statuses[status.name] = status
        return status

    def _keep_disabled(self, status: PluginStatus) -> PluginStatus:
        status = replace(status, state="disabled", detail="named in BOWERBIRD_DISABLE_PLUGINS")
        self._statuses[status.name] = status
        return status

    def _keep_failure(self, status: PluginStatus, error: BaseException) -> PluginStatus:
        if self._manager.has_plugin(status.name):
            self._manager.unregister(name=status.name)
        self._records.pop(status.name, None)
        status = replace(
            status,
            state="incompatible" if isinstance(error, _IncompatibleError) else "broken",
            detail=_one_line(error),
            traceback="".join(traceback.format_exception(error)),
            error=error,
        )
        if os.environ.get("BOWERBIRD_STRICT_PLUGINS", "") not in ("", "0"):
            raise PluginError(f"{status} (raised because BOWERBIRD_STRICT_PLUGINS is set)") from error
        self._statuses[status.name] = status
        return status

    def _reject_claim(self, entry: PluginEntry, reason: str) -> None:
        """Keep a contender for a taken name under ``name (distribution)``, so that each culprit is listed."""
        key = entry.name if entry.name not in self._statuses else f"{entry.name} ({entry.distribution})"
        status = PluginStatus(name=key, distribution=entry.distribution, version=entry.version)
        if entry.name in _names_in("BOWERBIRD_DISABLE_PLUGINS"):
            self._keep_disabled(status)
        else:
            self._keep_failure(status, PluginError(reason))

    def _register_hooks(self, plugin: Any, name: str) -> None:
        self._manager.register(plugin, name=name)  # checks the arguments of every hook
        for caller in self._manager.get_hookcallers(plugin) or ():
            if not caller.has_spec() and not any(impl.optionalhook for impl in caller.get_hookimpls()):
                known = [hook for hook in dir(hookspecs) if hook.startswith("bowerbird_")]
                raise PluginError(f"there is no hook {caller.name!r}.{did_you_mean(caller.name, known)}")
        for hook in hookspecs.CATALOGUE_HOOKS:
            implementations = getattr(self._manager.hook, hook).get_hookimpls()
            if callable(getattr(plugin, hook, None)) and all(impl.plugin is not plugin for impl in implementations):
                raise PluginError(f"{hook} has no @hookimpl decorator (from bowerbird.hookspecs import hookimpl)")

    def _collect(self, plugin: Any, name: str) -> list[Record]:
        records: list[Record] = []
        seen: dict[tuple[str, str, str], Record] = {}
        for hook, kind in hookspecs.CATALOGUE_HOOKS.items():
            for implementation in getattr(self._manager.hook, hook).get_hookimpls():
                if implementation.plugin is not plugin:
                    continue
                result = implementation.function()
                if result is None:
                    raise PluginError(f"{hook} returned None; it must yield records")
                for record in result:
                    check_record(record, kind=kind, plugin=name)
                    key = (record.kind, getattr(record, "role", ""), record.name)
                    if key in seen:
                        raise PluginError(
                            f"two {_kind_and_role(record)} records are named {record.name!r}: their targets are "
                            f"{seen[key].target!r} and {record.target!r}"
                        )
                    seen[key] = record
                    records.append(record)
        return records


# ----------------------------------------------------------------------------------------------------- functions


@cache
def _discovered() -> Registry:
    registry = Registry()
    registry.discover()
    return registry


def get_registry() -> Registry:
    """The registry of this process. Plugins are discovered at the first call."""
    registry = _discovered()
    for path in os.environ.get("BOWERBIRD_PLUGIN", "").split(os.pathsep):
        if path:
            registry.add_file(path)
    return registry


def import_string(target: str) -> Any:
    """What ``"package.module:attribute"`` names."""
    module_name, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module_name)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def install_command(extras: Mapping[str, str]) -> str:
    """``pip install 'bowerbird-core[torch]'`` for a mapping of import names to what provides them."""
    return "pip install " + " ".join(shlex.quote(requirement) for requirement in sorted(set(extras.values())))


def _kind_and_role(record: Record) -> str:
    role = getattr(record, "role", None)
    return f"{record.kind}, role {role}" if role else record.kind


def _names_in(variable: str) -> set[str]:
    return {name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()}


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, PluginError):
        return " ".join(lines)
    return f"{type(error).__name__}: {' '.join(lines[:3])}" if lines else type(error).__name__


def _is_installed(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a dotted name whose parent is missing or is no package
        return False


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} is no Python file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _check_api(plugin: Any, status: PluginStatus) -> None:
    declared = getattr(plugin, "BOWERBIRD_API", None)
    if declared is None:
        raise PluginError(f"it declares no hook API; add BOWERBIRD_API = {API_VERSION!r} to the plugin's module")
    major, minor = (int(part) for part in API_VERSION.split("."))
    try:
        wanted_major, wanted_minor = (int(part) for part in declared.split("."))
    except (AttributeError, ValueError):
        raise PluginError(f"BOWERBIRD_API is {declared!r}; it must be a string such as {API_VERSION!r}") from None
    if (wanted_major, wanted_minor) > (major, minor):
        raise _IncompatibleError(f"needs hook API {declared}, core provides {API_VERSION}. Upgrade bowerbird-core.")
    if wanted_major < major:
        raise _IncompatibleError(
            f"was written for hook API {declared}, core provides {API_VERSION}. Upgrade {status.distribution}."
        )
