"""Discovery: every plugin has a try of its own, nothing is lost silently, nothing heavy is imported."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bowerbird.entry_points import GROUP, plugin_entries
from bowerbird.errors import MissingExtraError, PluginError, UnknownNameError
from bowerbird.hookspecs import hookimpl
from bowerbird.records import EncoderRecord, ObjectiveRecord, Record, RetrieverRecord
from bowerbird.registry import Registry, get_registry

ENCODER = {"name": "acme:tiny", "target": "acme_lib:Tiny", "summary": "A tiny encoder."}


def plugin(records: list[Any] | Callable[[], Any] = (), *, api: Any = "1.0", hook: str = "bowerbird_encoders") -> Any:
    """A plugin module with one catalogue hook."""
    module = types.ModuleType("acme_plugin")
    if api is not None:
        module.BOWERBIRD_API = api

    def implementation() -> Any:
        return records() if callable(records) else records

    implementation.__name__ = hook
    setattr(module, hook, hookimpl(implementation))
    return module


@pytest.fixture
def registry() -> Registry:
    return Registry()


def add(registry: Registry, module: Any, name: str = "acme") -> Any:
    return registry.register_module(name, module)


# ------------------------------------------------------------------------------------------------- installed


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts distributions with one module each on ``sys.path``, as pip would."""
    installed = []

    def write(distribution: str, entry: str, source: str, *, version: str = "0.1.0", folder: str = "site") -> None:
        site = tmp_path / folder
        site.mkdir(exist_ok=True)
        if str(site) not in sys.path:
            monkeypatch.syspath_prepend(site)
        module = distribution.replace("-", "_") + "_plugin"
        (site / f"{module}.py").write_text(source)
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n\nName: no\n")
        (info / "entry_points.txt").write_text(f"[console_scripts]\nx = y:z\n\n[{GROUP}]\n{entry} = {module}\n")
        installed.append(module)

    yield write
    for module in installed:
        sys.modules.pop(module, None)


GOOD = """
from bowerbird.hookspecs import hookimpl
from bowerbird.records import EncoderRecord
BOWERBIRD_API = "1.0"
@hookimpl
def bowerbird_encoders():
    yield EncoderRecord(name="acme:tiny", target="acme_lib:Tiny", summary="A tiny encoder.")
"""


def discovered() -> Registry:
    registry = Registry()
    registry.discover()
    return registry


def status(registry: Registry, name: str) -> Any:
    return next(status for status in registry.plugins if status.name == name)


def test_entry_points_are_those_that_importlib_metadata_finds(install: Callable[..., None]) -> None:
    install("bowerbird-acme", "acme", GOOD)
    install("Bowerbird.Other", "other", GOOD, version="1.2.post1")
    expected = {
        (entry.name, entry.value, entry.dist.name, entry.dist.version)
        for entry in importlib.metadata.entry_points(group=GROUP)
        if entry.dist is not None
    }
    assert {(e.name, e.value, e.distribution, e.version) for e in plugin_entries()} == expected
    assert ("acme", "bowerbird_acme_plugin", "bowerbird-acme", "0.1.0") in expected


def test_of_two_copies_of_a_distribution_the_first_on_the_path_counts(install: Callable[..., None]) -> None:
    install("bowerbird-acme", "acme", GOOD, version="1.0", folder="second")
    install("bowerbird-acme", "acme", GOOD, version="2.0", folder="first")
    assert [entry.version for entry in plugin_entries() if entry.name == "acme"] == ["2.0"]


def test_an_installed_plugin_is_found_with_its_distribution_and_version(install: Callable[..., None]) -> None:
    install("bowerbird-acme", "acme", GOOD, version="0.2.0")
    registry = discovered()
    assert str(status(registry, "acme")) == "plugin 'acme' (bowerbird-acme 0.2.0) is ok"
    assert registry.get("encoder", "acme:tiny").target == "acme_lib:Tiny"
    assert registry.get(None, "tiny") is registry.get("encoder", "acme:tiny")


@pytest.mark.parametrize("failure", ["raise SystemExit(3)", "import no_such_library", "1/0", "def broken(:"])
def test_a_plugin_that_fails_at_import_leaves_the_others_alone(install: Callable[..., None], failure: str) -> None:
    install("bowerbird-bad", "bad", failure)
    install("bowerbird-acme", "acme", GOOD)
    registry = discovered()
    assert status(registry, "bad").state == "broken"
    assert "Traceback" in status(registry, "bad").traceback
    assert [record.name for record in registry.records("encoder") if record.name.startswith("acme")] == ["acme:tiny"]


def test_asking_for_a_method_of_a_broken_plugin_names_the_distribution_and_chains_the_cause(
    install: Callable[..., None],
) -> None:
    install("bowerbird-bad", "bad", "import no_such_library", version="0.3")
    with pytest.raises(
        PluginError, match=r"'bad:thing' is not available.*bowerbird-bad 0\.3.*no_such_library"
    ) as caught:
        discovered().get("objective", "bad:thing")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_ctrl_c_while_a_plugin_is_imported_stops_the_program(install: Callable[..., None]) -> None:
    install("bowerbird-bad", "bad", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        discovered()


def test_two_distributions_with_one_name_are_both_refused_and_both_named(install: Callable[..., None]) -> None:
    install("bowerbird-acme", "acme", GOOD)
    install("acme-fork", "acme", GOOD)
    registry = discovered()
    culprits = [s for s in registry.plugins if s.name.startswith("acme")]
    assert {s.distribution for s in culprits} == {"bowerbird-acme", "acme-fork"}
    for culprit in culprits:
        assert culprit.state == "broken"
        assert "bowerbird-acme 0.1.0" in culprit.detail and "acme-fork 0.1.0" in culprit.detail
    with pytest.raises(PluginError, match=r"claimed by"):
        registry.get("encoder", "acme:tiny")


def test_nobody_can_take_the_name_core(install: Callable[..., None]) -> None:
    install("bowerbird-evil", "core", GOOD.replace("acme:", "core:"))
    registry = discovered()
    assert status(registry, "core").distribution == "bowerbird-core"
    assert status(registry, "core").state == "ok"
    assert status(registry, "core (bowerbird-evil)").state == "broken"
    assert "core:tiny" not in [record.name for record in registry.records()]


def test_strict_mode_raises_at_the_first_broken_plugin(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("bowerbird-bad", "bad", "1/0")
    monkeypatch.setenv("BOWERBIRD_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError, match=r"'bad'.*ZeroDivisionError.*BOWERBIRD_STRICT_PLUGINS") as caught:
        discovered()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_disabled_plugin_is_not_imported_and_says_how_to_enable_it(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("bowerbird-bad", "bad", "raise SystemExit")
    monkeypatch.setenv("BOWERBIRD_DISABLE_PLUGINS", "other, bad")
    registry = discovered()
    assert status(registry, "bad").state == "disabled"
    assert "bowerbird_bad_plugin" not in sys.modules
    with pytest.raises(PluginError, match=r"BOWERBIRD_DISABLE_PLUGINS"):
        registry.get("encoder", "bad:thing")


def test_a_plugin_that_imports_something_heavy_is_warned_about(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bowerbird.registry.HEAVY_MODULES", ("heavy_library",))
    install("bowerbird-acme", "acme", "import sys, types\nsys.modules['heavy_library'] = types\n" + GOOD)
    registry = discovered()
    sys.modules.pop("heavy_library", None)
    assert status(registry, "acme").state == "ok"
    assert "imports heavy_library at discovery" in status(registry, "acme").detail


# --------------------------------------------------------------------------------------------- files to try


def test_a_plugin_file_is_used_without_packaging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "my_trial.py"
    path.write_text(
        GOOD.replace("acme:tiny", "my_trial:tiny").replace("acme_lib:Tiny", "my_trial:Tiny") + "class Tiny: ...\n"
    )
    monkeypatch.setenv("BOWERBIRD_PLUGIN", str(path))
    try:
        registry = get_registry()
        record = registry.get("encoder", "my_trial:tiny")
        assert registry.load(record).__name__ == "Tiny"
        assert registry.distribution(record) == str(path)
        assert get_registry() is registry  # and the file is not read a second time
    finally:
        get_registry.__globals__["_discovered"]().unregister("my_trial")
        sys.modules.pop("my_trial", None)


def test_a_plugin_file_with_a_taken_name_or_a_syntax_error_is_kept_as_broken(
    tmp_path: Path, registry: Registry
) -> None:
    taken = tmp_path / "json.py"
    taken.write_text(GOOD)
    assert "already imported" in registry.add_file(taken).detail
    wrong = tmp_path / "wrong_trial.py"
    wrong.write_text("def (")
    assert registry.add_file(wrong).state == "broken"
    assert "wrong_trial" not in sys.modules
    assert registry.add_file(tmp_path / "not_there.py").state == "broken"


# ------------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("api", "state", "words"),
    [
        ("1.0", "ok", ""),
        ("1.7", "incompatible", "needs hook API 1.7, core provides 1.0. Upgrade bowerbird-core"),
        ("2.0", "incompatible", "Upgrade bowerbird-core"),
        ("0.9", "incompatible", "was written for hook API 0.9.*Upgrade bowerbird-acme"),
        (None, "broken", "declares no hook API"),
        (1.0, "broken", "must be a string"),
        ("new", "broken", "must be a string"),
    ],
)
def test_the_hook_api_of_a_plugin_must_fit(install: Callable[..., None], api: Any, state: str, words: str) -> None:
    line = "" if api is None else f"BOWERBIRD_API = {api!r}"
    install("bowerbird-acme", "acme", GOOD.replace('BOWERBIRD_API = "1.0"', line))
    found = status(discovered(), "acme")
    assert found.state == state
    assert re.search(words, found.detail)


# ---------------------------------------------------------------------------------------------------- hooks


def test_a_hook_with_an_argument_that_does_not_exist_is_refused(registry: Registry) -> None:
    module = plugin()

    @hookimpl
    def bowerbird_step_logged(run_dir: str, loss: float) -> None: ...

    module.bowerbird_step_logged = bowerbird_step_logged
    with pytest.raises(PluginError, match=r"loss"):
        add(registry, module)


def test_a_misspelt_hook_is_refused_with_a_suggestion(registry: Registry) -> None:
    with pytest.raises(PluginError, match=r"no hook 'bowerbird_encoder'.*Did you mean 'bowerbird_encoders'"):
        add(registry, plugin([], hook="bowerbird_encoder"))


def test_a_forgotten_decorator_is_noticed(registry: Registry) -> None:
    module = plugin()
    module.bowerbird_datasets = list
    with pytest.raises(PluginError, match=r"bowerbird_datasets has no @hookimpl"):
        add(registry, module)


def test_a_hook_that_returns_nothing_is_refused(registry: Registry) -> None:
    with pytest.raises(PluginError, match=r"returned None; it must yield records"):
        add(registry, plugin(lambda: None))


def test_a_hook_that_fails_takes_all_of_its_plugin_and_nothing_else_away(registry: Registry) -> None:
    def half() -> Iterator[Record]:
        yield EncoderRecord(**ENCODER)
        raise RuntimeError("half way")

    add(registry, plugin([EncoderRecord(**{**ENCODER, "name": "good:tiny"})]), "good")
    with pytest.raises(PluginError, match=r"half way"):
        add(registry, plugin(half))
    assert [record.name for record in registry.records()] == ["good:tiny"]
    add(registry, plugin([EncoderRecord(**ENCODER)]))  # the name is free again


def test_events_reach_the_plugins(registry: Registry) -> None:
    seen = []
    module = plugin()

    @hookimpl
    def bowerbird_step_logged(step: int, values: dict[str, float]) -> None:
        seen.append((step, values))

    module.bowerbird_step_logged = bowerbird_step_logged
    add(registry, module)
    registry.hook.bowerbird_step_logged(run_dir="runs/a", step=3, values={"loss": 0.5})
    registry.unregister("acme")
    registry.hook.bowerbird_step_logged(run_dir="runs/a", step=4, values={"loss": 0.4})
    assert seen == [(3, {"loss": 0.5})]


# -------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "other:tiny"}, "'acme:<method>'"),
        ({"name": "tiny"}, "'acme:<method>'"),
        ({"name": "acme:Tiny Encoder"}, "a-z"),
        ({"target": "acme_lib.Tiny"}, "target must be an import string"),
        ({"target": "acme_lib:"}, "target must be an import string"),
        ({"config": "acme lib:Config"}, "config must be an import string"),
        ({"presets": {"paper": "nowhere"}}, r"presets\['paper'\] must be an import string"),
        ({"presets": ["paper"]}, "presets must map strings to strings"),
        ({"extras": {"torch": 2}}, "extras must map strings to strings"),
        ({"summary": ""}, "summary must be one line"),
        ({"summary": "two\nlines"}, "summary must be one line"),
        ({"maturity": "beta"}, "stable, experimental"),
        ({"paper": 2003}, "paper must be"),
        ({"inputs": "image"}, "inputs must be a tuple of strings"),
        ({"outputs": ["pooled"]}, "outputs must be a tuple of strings"),
    ],
)
def test_a_bad_record_is_refused_by_field_and_value(registry: Registry, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PluginError, match=words):
        add(registry, plugin([EncoderRecord(**{**ENCODER, **changes})]))
    assert registry.plugins == [] and registry.records() == []


@pytest.mark.parametrize(
    "wrong", ["acme:tiny", ObjectiveRecord(**{**ENCODER, "needs": ("image",)}), None, EncoderRecord]
)
def test_a_record_of_another_type_is_refused(registry: Registry, wrong: Any) -> None:
    with pytest.raises(PluginError, match=r"where a EncoderRecord is expected"):
        add(registry, plugin([wrong]))


def test_a_role_that_does_not_exist_is_refused_with_a_suggestion(registry: Registry) -> None:
    record = RetrieverRecord(**ENCODER, role="merge")
    with pytest.raises(PluginError, match=r"role 'merge' is not one of.*Did you mean 'merger'"):
        add(registry, plugin([record], hook="bowerbird_retrievers"))


def test_one_name_twice_names_both_targets(registry: Registry) -> None:
    other = EncoderRecord(**{**ENCODER, "target": "acme_lib:Other"})
    with pytest.raises(PluginError, match=r"'acme_lib:Tiny' and 'acme_lib:Other'"):
        add(registry, plugin([EncoderRecord(**ENCODER), other]))


# --------------------------------------------------------------------------------------- getting and loading


@pytest.fixture
def filled(registry: Registry) -> Registry:
    records = [
        RetrieverRecord(**{**ENCODER, "name": "acme:rank-merge"}, role="upgrade"),
        RetrieverRecord(**{**ENCODER, "name": "acme:rank-merge"}, role="transform"),
        RetrieverRecord(**{**ENCODER, "name": "acme:distance"}, role="merger"),
    ]
    add(registry, plugin(records, hook="bowerbird_retrievers"))
    add(registry, plugin([EncoderRecord(**{**ENCODER, "name": "other:distance"})]), "other")
    return registry


def test_kind_and_role_choose_among_equal_names(filled: Registry) -> None:
    assert filled.get("retriever", "rank-merge", role="upgrade").role == "upgrade"
    assert filled.get("retriever", "distance").name == "acme:distance"
    assert filled.get("encoder", "distance").name == "other:distance"
    assert [record.name for record in filled.records("retriever", role="merger")] == ["acme:distance"]


def test_an_ambiguous_name_lists_what_it_may_mean(filled: Registry) -> None:
    with pytest.raises(UnknownNameError, match=r"more than one retriever: acme:rank-merge .*transform.*upgrade"):
        filled.get("retriever", "acme:rank-merge")
    with pytest.raises(UnknownNameError, match=r"acme:distance .*other:distance"):
        filled.get(None, "distance")


@pytest.mark.parametrize(
    ("kind", "name", "role", "words"),
    [
        ("retriever", "acme:rank-mrege", None, "no retriever named 'acme:rank-mrege'. Did you mean 'acme:rank-merge'"),
        ("retriever", "rank-merg", None, "Did you mean 'acme:rank-merge'"),
        ("retriever", "nothing:like-it", None, "No plugin 'nothing' is installed.*pip install bowerbird-nothing"),
        ("encoder", "acme:distance", None, "is no encoder but: retriever, role merger"),
        ("retriever", "acme:distance", "upgrade", "is no retriever with role 'upgrade' but: retriever, role merger"),
        ("retreiver", "acme:distance", None, "no kind 'retreiver'. Did you mean 'retriever'"),
        ("retriever", "acme:distance", "mergers", "no role 'mergers'. Did you mean 'merger'"),
    ],
)
def test_an_unknown_name_suggests_a_close_one(filled: Registry, kind: str, name: str, role: Any, words: str) -> None:
    with pytest.raises(UnknownNameError, match=words):
        filled.get(kind, name, role)


def test_a_target_that_does_not_exist_names_the_import_string_and_chains_the_cause(filled: Registry) -> None:
    with pytest.raises(
        PluginError, match=r"'other:distance' \(\(this process\)\): cannot import 'acme_lib:Tiny'"
    ) as caught:
        filled.load(filled.get("encoder", "other:distance"))
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_missing_attribute_is_a_plugin_error_too(registry: Registry) -> None:
    add(registry, plugin([EncoderRecord(**{**ENCODER, "target": "json:NoSuchThing"})]))
    with pytest.raises(PluginError, match=r"'json:NoSuchThing'.*AttributeError"):
        registry.load(registry.get("encoder", "acme:tiny"))


def test_missing_extras_are_named_with_the_command_before_anything_is_imported(registry: Registry) -> None:
    extras = {"no_such_lib_a": "acme[full]", "no_such_lib_b": "lib-b>=2", "json": "never-needed"}
    add(registry, plugin([EncoderRecord(**{**ENCODER, "extras": extras})]))
    record = registry.get("encoder", "acme:tiny")
    assert set(registry.missing_extras(record)) == {"no_such_lib_a", "no_such_lib_b"}
    with pytest.raises(MissingExtraError, match=r"no_such_lib_a, no_such_lib_b.*pip install 'acme\[full\]' 'lib-b>=2'"):
        registry.load(record)


def test_targets_configs_and_presets_are_imported_by_their_strings(registry: Registry) -> None:
    record = EncoderRecord(
        **{**ENCODER, "target": "collections:OrderedDict.fromkeys"},
        config="collections:Counter",
        presets={"paper": "builtins:dict"},
    )
    add(registry, plugin([record]))
    import collections

    assert registry.load(record)("ab") == collections.OrderedDict.fromkeys("ab")
    assert registry.load_config(record) is collections.Counter
    assert registry.load_preset(record, "paper") == {}
    with pytest.raises(UnknownNameError, match=r"no preset 'papre'. Did you mean 'paper'"):
        registry.load_preset(record, "papre")


def test_a_name_can_be_registered_once(registry: Registry) -> None:
    add(registry, plugin())
    with pytest.raises(PluginError, match=r"already taken"):
        add(registry, plugin())


def test_records_as_plain_data_have_every_field() -> None:
    record = RetrieverRecord(**ENCODER, role="merger", extras={"a": "b"})
    data = record.to_dict()
    assert data["kind"] == "retriever" and data["role"] == "merger" and data["extras"] == {"a": "b"}
    assert EncoderRecord(
        **{k: v for k, v in EncoderRecord(**ENCODER).to_dict().items() if k != "kind"}
    ) == EncoderRecord(**ENCODER)
