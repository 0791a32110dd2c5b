"""The command line: light to start, clear about errors, scriptable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import bowerbird.cli
from bowerbird.cli import COMMANDS, main
from bowerbird.errors import GalleryError
from bowerbird.hookspecs import hookimpl
from bowerbird.records import EncoderRecord, RetrieverRecord
from bowerbird.registry import HEAVY_MODULES, get_registry

MY_IDEA = """
from bowerbird.hookspecs import hookimpl
from bowerbird.records import RetrieverRecord
BOWERBIRD_API = "1.0"
@hookimpl
def bowerbird_retrievers():
    yield RetrieverRecord(name="my_idea:first", role="order", target="my_idea:order", summary="First come first.")
def order(ids, old_vectors, *, seed, centers=None):
    return range(len(ids))
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def run_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from bowerbird.cli import main; main(prog_name='bowerbird')"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.fixture
def acme() -> Iterator[types.ModuleType]:
    """A plugin with one method of each sort that `show` and `doctor` treat in another way."""
    lib = types.ModuleType("acme_show_lib")
    exec(ACME_LIB, lib.__dict__)
    sys.modules[lib.__name__] = lib
    module: Any = types.ModuleType("acme_plugin")
    module.BOWERBIRD_API = "1.0"

    @hookimpl
    def bowerbird_encoders() -> Iterator[EncoderRecord]:
        yield EncoderRecord(
            name="acme:tiny",
            target="acme_show_lib:Tiny",
            config="acme_show_lib:Config",
            summary="A tiny encoder.",
            paper="Small Things, arXiv:0000.00000",
            presets={"large": "acme_show_lib:large"},
        )

    @hookimpl
    def bowerbird_retrievers() -> Iterator[RetrieverRecord]:
        yield RetrieverRecord(
            name="acme:tiny",
            role="merger",
            target="acme_show_lib:Tiny",
            summary="Belongs to it.",
            maturity="experimental",
            extras={"no_such_library": "acme[all]"},
        )

    module.bowerbird_encoders, module.bowerbird_retrievers = bowerbird_encoders, bowerbird_retrievers
    get_registry().register_module("acme", module)
    yield lib
    get_registry().unregister("acme")
    del sys.modules[lib.__name__]


ACME_LIB = """
from typing import Literal
from pydantic import BaseModel, ConfigDict, Field
class Inner(BaseModel):
    depth: int = Field(default=2, ge=1, le=8, description="Layers.")
class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    width: int = Field(gt=0, description="Columns of the embedding.")
    kind: Literal["plain", "fancy"] = Field(default="plain", description="Which sort.")
    rate: float | None = Field(default=None, ge=0, lt=1, description="Share dropped.")
    sizes: tuple[int, ...] = Field(default=(1, 2), description="Of the layers.")
    inner: Inner = Inner()
def large():
    return {"width": 512}
class Tiny: ...
"""


# ------------------------------------------------------------------------------------------------ starting


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["list", "--json"], ["show", "--help"], ["doctor", "--help"]]
)
def test_starting_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from bowerbird.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        f"heavy = [m for m in {(*HEAVY_MODULES, 'rich', 'importlib.metadata')!r} if m in sys.modules]\n"
        "assert not heavy or 'doctor' in sys.argv, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments[:1]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_help_lists_every_command_without_importing_one() -> None:
    code = (
        "import sys\n"
        "from bowerbird.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not [m for m in sys.modules if m.startswith('bowerbird.cli.')]\n"
        "assert 'bowerbird.registry' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name, text in COMMANDS.items():
        assert name in result.stdout and text.split(":")[0][:20] in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_in_its_help(name: str) -> None:
    try:
        result = run(name, "--help")
    except ModuleNotFoundError as exc:  # pragma: no cover
        pytest.fail(f"{name} --help needs {exc.name}")
    assert result.exit_code == 0, result.output
    assert "Examples:" in result.output
    lines = result.output.partition("Examples:")[2].splitlines()
    assert any(line.startswith("    bowerbird ") for line in lines), "examples are kept line by line"


def test_an_unknown_command_suggests_a_close_one() -> None:
    result = run("lits")
    assert result.exit_code == 2
    assert "no command 'lits'. Did you mean 'list'?" in result.output


# --------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `bowerbird demo` raise what the test says."""

    def use(error: BaseException) -> None:
        @click.command()
        def command() -> None:
            raise error

        module = types.ModuleType("bowerbird.cli.demo")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "bowerbird.cli.demo", module)

    return use


def test_a_user_error_is_one_message_and_exit_code_2(failing: Any) -> None:
    failing(GalleryError("gallery 'g' is being upgraded; finish or roll back first"))
    result = run("demo")
    assert result.exit_code == 2
    assert result.stderr == "error: gallery 'g' is being upgraded; finish or roll back first\n"


def test_debug_shows_the_traceback_with_its_cause(failing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    error = GalleryError("cannot")
    error.__cause__ = ZeroDivisionError("because")
    failing(error)
    for result in (run("--debug", "demo"), CliRunner().invoke(main, ["demo"], env={"BOWERBIRD_DEBUG": "1"})):
        assert result.exit_code == 2
        assert "Traceback" in result.stderr and "ZeroDivisionError: because" in result.stderr
        assert result.stderr.endswith("error: cannot\n")


def test_ctrl_c_is_a_clean_stop(failing: Any) -> None:
    failing(KeyboardInterrupt())
    result = run("demo")
    assert (result.exit_code, result.stderr) == (130, "stopped\n")


@pytest.mark.parametrize("interrupted", ["click", "bowerbird.cli", "bowerbird.records"])
def test_ctrl_c_while_the_program_is_imported_is_quiet(interrupted: str) -> None:
    code = (
        "import sys\n"
        "class CtrlC:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {interrupted!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, CtrlC())\n"
        "from bowerbird.__main__ import run\n"
        "run()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, "show", "rank-merge"], capture_output=True, text=True)
    assert ended.returncode == 130
    assert ended.stderr in ("", "stopped\n") and ended.stdout == ""


def test_a_full_disk_is_an_error_and_no_traceback(failing: Any) -> None:
    failing(OSError(28, "No space left on device", "vectors.bin"))
    result = run("demo")
    assert (result.exit_code, result.stderr) == (2, "error: No space left on device: vectors.bin\n")


def test_a_missing_library_names_the_extra_that_brings_it(failing: Any) -> None:
    failing(ModuleNotFoundError("No module named 'timm.layers'", name="timm.layers"))
    result = run("demo")
    assert result.exit_code == 2
    assert (
        result.stderr
        == "error: this needs timm, which is not installed. Install with: pip install 'bowerbird-core[torch]'\n"
    )


def test_a_bug_says_that_it_is_one_and_how_to_see_more(failing: Any) -> None:
    failing(TypeError("oops"))
    result = run("demo")
    assert result.exit_code == 1
    assert "internal error, TypeError: oops" in result.stderr and "--debug" in result.stderr


def test_a_missing_command_module_breaks_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bowerbird.cli.COMMANDS, "not-there", "A command without a module.")
    result = run("not-there")
    assert result.exit_code == 2 and "no command 'not-there'" in result.stderr
    assert run("list").exit_code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX pipes")
def test_a_closed_pipe_ends_quietly() -> None:
    code = "from bowerbird.cli import main; main(['list'])"
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert "Traceback" not in process.stderr and process.returncode != 0


# ------------------------------------------------------------------------------------------- list, --plugin


def test_list_groups_by_kind_and_marks_what_is_experimental(acme: Any) -> None:
    result = run("list")
    assert result.exit_code == 0
    encoders = result.output.partition("encoders\n")[2].partition("\n\n")[0]
    assert "acme:tiny" in encoders and "A tiny encoder." in encoders
    assert "merger: Belongs to it. [experimental]" in result.output


def test_list_of_one_kind_takes_singular_and_plural_and_refuses_others(acme: Any) -> None:
    assert run("list", "encoder").output == run("list", "encoders").output
    assert "core:exact" not in run("list", "encoder").output
    result = run("list", "encodre")
    assert result.exit_code == 2 and "Did you mean 'encoder'" in result.stderr


def test_list_as_json_has_records_and_plugins(acme: Any) -> None:
    data = json.loads(run("list", "retriever", "--json").output)
    assert {"core:exact", "acme:tiny"} <= {record["name"] for record in data["records"]}
    assert {record["kind"] for record in data["records"]} == {"retriever"}
    assert {"name": "acme", "state": "ok"}.items() <= next(p for p in data["plugins"] if p["name"] == "acme").items()


def test_a_plugin_file_is_listed_and_handed_on_to_child_processes(tmp_path: Path) -> None:
    path = tmp_path / "my_idea.py"
    path.write_text(MY_IDEA)
    result = run_process("--plugin", str(path), "list", "retriever")
    assert "my_idea:first" in result.stdout and "order: First come" in result.stdout
    assert "my_idea:first" in run_process("list", BOWERBIRD_PLUGIN=str(path)).stdout
    assert "my_idea" not in run_process("list").stdout


def test_a_broken_plugin_file_is_named_at_the_end_of_the_list(tmp_path: Path) -> None:
    path = tmp_path / "my_idea.py"
    path.write_text("import no_such_library_at_all\n" + MY_IDEA)
    last = run_process("--plugin", str(path), "list").stdout.splitlines()[-1]
    assert "my_idea" in last and "broken" in last and "no_such_library_at_all" in last and "bowerbird doctor" in last
    doctor = run_process("--plugin", str(path), "doctor")
    assert doctor.returncode == 1
    assert "import no_such_library_at_all" in doctor.stdout and "Traceback" in doctor.stdout
    missing = run_process("--plugin", str(path), "show", "my_idea:first")
    assert missing.returncode == 2 and str(path) in missing.stderr and "Traceback" not in missing.stderr


def test_a_plugin_file_that_does_not_exist_is_a_user_error() -> None:
    result = run("--plugin", "nowhere.py", "list")
    assert result.exit_code == 2 and "nowhere.py" in result.stderr


# ----------------------------------------------------------------------------------------------------- show


def test_show_prints_every_setting_with_type_default_range_and_description(acme: Any) -> None:
    output = run("show", "acme:tiny").output
    table = {line.split()[0]: line for line in output.partition("Settings")[2].splitlines() if line.strip()}
    assert "integer" in table["width"] and "(required)" in table["width"] and "> 0" in table["width"]
    assert '"plain"' in table["kind"] and "plain, fancy" in table["kind"]
    assert "number or null" in table["rate"] and ">= 0 and < 1" in table["rate"]
    assert "list of integer" in table["sizes"]
    assert ">= 1 and <= 8" in table["inner.depth"]
    for description in ("Columns of the embedding.", "Which sort.", "Share dropped.", "Layers."):
        assert description in output
    assert "large: width = 512" in output
    assert "arXiv:0000.00000" in output


def test_show_of_a_shared_name_shows_all_kinds_and_what_is_missing(acme: Any) -> None:
    output = run("show", "acme:tiny").output
    assert "acme:tiny  (encoder)" in output and "acme:tiny  (retriever)" in output
    assert "Not installed: no_such_library. Install with: pip install 'acme[all]'" in output


def test_show_as_json_and_json_schema_agree(acme: Any) -> None:
    data = json.loads(run("show", "acme:tiny", "--json").output)
    schema = json.loads(run("show", "acme:tiny", "--json-schema").output)
    encoder = next(record for record in data if record["kind"] == "encoder")
    assert encoder["settings"] == schema
    assert schema["properties"]["width"]["exclusiveMinimum"] == 0
    assert encoder["preset_values"] == {"large": {"width": 512}}


def test_show_of_an_unknown_method_suggests_a_close_one() -> None:
    result = run("show", "core:exat")
    assert result.exit_code == 2 and "Did you mean 'core:exact'" in result.stderr


# --------------------------------------------------------------------------------------------------- doctor


def test_doctor_finds_targets_that_do_not_exist_without_importing_them(acme: Any, tmp_path: Path) -> None:
    (tmp_path / "my_idea.py").write_text(MY_IDEA.replace("my_idea:order", "my_idea:ordre"))
    result = run_process("--plugin", str(tmp_path / "my_idea.py"), "doctor", "--json")
    assert result.returncode == 1
    report = json.loads(result.stdout)
    broken = {method["name"]: method["detail"] for method in report["methods"] if method["state"] == "broken"}
    assert "defines no 'ordre'" in broken["my_idea:first"]
    assert report["ok"] is False and report["libraries"]["click"]


def test_doctor_deep_imports_targets(tmp_path: Path) -> None:
    source = MY_IDEA.replace("my_idea:order", "my_idea_lib:order")
    (tmp_path / "my_idea.py").write_text(source)
    (tmp_path / "my_idea_lib.py").write_text("def order(): ...\nraise RuntimeError('only when imported')\n")
    code = (
        "import sys; from bowerbird.registry import get_registry; from bowerbird.cli import doctor\n"
        "r = get_registry(); record = r.get('retriever', 'my_idea:first')\n"
        "assert doctor._check_method(r, record, deep=False)['state'] == 'ok'\n"
        "found = doctor._check_method(r, record, deep=True)\n"
        "assert found['state'] == 'broken' and 'only when imported' in found['detail'], found\n"
    )
    env = {**os.environ, "BOWERBIRD_PLUGIN": str(tmp_path / "my_idea.py")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr


def test_doctor_warns_about_two_faiss_and_about_a_name_that_disables_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from bowerbird.cli import doctor

    monkeypatch.setenv("BOWERBIRD_DISABLE_PLUGINS", "no-such-plugin")
    warnings = doctor._warnings(get_registry(), {"faiss-cpu": "1.9", "faiss-gpu": "1.9"})
    assert any("pip uninstall -y faiss-cpu faiss-gpu" in warning for warning in warnings)
    assert any("'no-such-plugin'" in warning for warning in warnings)
    monkeypatch.delenv("BOWERBIRD_DISABLE_PLUGINS")
    assert not any("faiss" in warning for warning in doctor._warnings(get_registry(), {"faiss-cpu": "1.9"}))


def test_core_and_its_methods_are_sound() -> None:
    report = json.loads(run("doctor", "--json").output)
    assert next(p for p in report["plugins"] if p["name"] == "core")["state"] == "ok"
    assert [m for m in report["methods"] if m["name"].startswith("core:") and m["state"] == "broken"] == []
