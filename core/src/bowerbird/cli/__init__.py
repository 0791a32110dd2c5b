"""The command line ``bowerbird``. One module per command, imported when the command is invoked.

``COMMANDS`` has each command's one-line help, so that ``bowerbird --help`` imports none of them. A module
``bowerbird.cli.<name>`` offers its click command as ``command``.
"""

from __future__ import annotations

import errno
import importlib
import os
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import click

import bowerbird
from bowerbird.errors import BowerbirdError, did_you_mean

COMMANDS = {
    "demo": "Watch a live gallery move to a better model (runs offline).",
    "list": "List what is installed: encoders, objectives, data sets, ...",
    "show": "Show one method: what it does and every setting it has.",
    "doctor": "Check this installation and every plugin.",
    "train": "Train an encoder by a recipe.",
    "evaluate": "Evaluate an encoder with a protocol.",
    "export": "Export the encoder of a run to a folder.",
    "embed": "Turn images into vectors.",
    "detect": "Find the objects in images, draw them, write COCO results.",
    "gallery": "Create, fill and search a gallery.",
    "upgrade": "Move a gallery to another model while it serves.",
    "serve": "Serve a gallery: an HTTP interface, and a page to search and upgrade it.",
    "benchmark": "Compare methods and strategies of an upgrade.",
    "report": "Look into a trained encoder: which weights are kept, what that saves.",
    "new-plugin": "Start a plugin of your own.",
}

# A command whose imports need one of these names the extra that brings it.
EXTRA_OF_MODULE = {
    "torch": "torch",
    "torchvision": "torch",
    "timm": "torch",
    "safetensors": "torch",
    "pytorch_metric_learning": "torch",
    "transformers": "transformers",
    "faiss": "faiss-cpu",
    "sklearn": "digits",
    "matplotlib": "report",
    "jinja2": "report",
    "pyarrow": "tables",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "limits": "serve",
    "pebble": "serve",
    "umap": "umap",
}


class _ReportedError(click.ClickException):
    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", file=file, err=True)


class _LazyGroup(click.Group):
    """A group that imports a command when it is invoked and turns errors into one message and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = f"bowerbird.cli.{cmd_name.replace('-', '_')}"
        try:
            return importlib.import_module(module).command
        except ModuleNotFoundError as exc:
            if exc.name == module:
                raise _ReportedError(f"this build of bowerbird-core has no command {cmd_name!r}") from exc
            raise

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            hint = did_you_mean(args[0], COMMANDS)
            ctx.fail(f"no command {args[0]!r}.{hint} Commands: {', '.join(COMMANDS)}.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (KeyboardInterrupt, click.Abort):
            click.echo("stopped", err=True)
            ctx.exit(130)
        except Exception as exc:
            if isinstance(exc, OSError) and exc.errno == errno.EPIPE:
                raise  # the reader of a pipe went away; click ends quietly
            if ctx.params.get("debug"):
                click.echo("".join(traceback.format_exception(exc)), err=True, nl=False)
            raise _as_reported(exc) from exc


def _as_reported(exc: Exception) -> _ReportedError:
    if isinstance(exc, BowerbirdError):
        return _reported(str(exc), exc.exit_code)
    if isinstance(exc, OSError):
        where = f": {exc.filename}" if exc.filename else ""
        return _ReportedError(f"{exc.strerror or exc}{where}")
    module = (exc.name or "").partition(".")[0] if isinstance(exc, ModuleNotFoundError) else ""
    if module in EXTRA_OF_MODULE:
        extra = EXTRA_OF_MODULE[module]
        return _ReportedError(
            f"this needs {module}, which is not installed. Install with: pip install 'bowerbird-core[{extra}]'"
        )
    return _reported(
        f"internal error, {type(exc).__name__}: {exc}. This is a bug; `bowerbird --debug ...` shows where it happened.",
        1,
    )


def _warning_line(message: Warning | str, *_: Any) -> str:
    """A warning as one line: a person who runs a command has no use for the line of code that gave it."""
    return f"warning: {message}\n"


def _reported(message: str, exit_code: int) -> _ReportedError:
    error = _ReportedError(message)
    error.exit_code = exit_code  # type: ignore[misc]  # click declares it for the class
    return error


def examples(*lines: str) -> str:
    """An epilog with an Examples section, kept line by line: ``@click.command(epilog=examples("bowerbird list"))``."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _use_plugin_files(ctx: click.Context, _param: click.Parameter, paths: tuple[str, ...]) -> tuple[str, ...]:
    """Hand the files to the registry, and to processes that a command starts, by the environment."""
    if paths:
        before = os.environ.get("BOWERBIRD_PLUGIN")
        given = [str(Path(path).resolve()) for path in paths]
        os.environ["BOWERBIRD_PLUGIN"] = os.pathsep.join(given + ([before] if before else []))

        def restore() -> None:
            if before is None:
                del os.environ["BOWERBIRD_PLUGIN"]
            else:
                os.environ["BOWERBIRD_PLUGIN"] = before

        ctx.call_on_close(restore)
    return paths


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples("bowerbird demo", "bowerbird list objective", "bowerbird COMMAND --help"),
)
@click.version_option(bowerbird.__version__, prog_name="bowerbird")
@click.option(
    "--plugin",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    callback=_use_plugin_files,
    metavar="FILE",
    help="Try a plugin file without packaging it. May be repeated; also $BOWERBIRD_PLUGIN.",
)
@click.option("--debug", is_flag=True, envvar="BOWERBIRD_DEBUG", help="Show the traceback of an error.")
@click.pass_context
def main(ctx: click.Context, plugin: tuple[str, ...], debug: bool) -> None:
    """Train representations, search a durable gallery with them, and upgrade the model while the gallery serves."""
    # OpenMP reads this when it is loaded. Threads that spin while they wait are worst where cores are shared: small
    # layers on two busy cores trained at 5 steps/s with the default and at 230 with this.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ctx.call_on_close(partial(setattr, warnings, "formatwarning", warnings.formatwarning))
    warnings.formatwarning = _warning_line  # type: ignore[assignment]  # it needs the message only
