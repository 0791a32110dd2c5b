"""``bowerbird serve``: a gallery over HTTP, with a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from bowerbird.cli import examples

MIB = 2**20


def _named(ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """A callback: ``NAME=ENCODER`` given several times."""
    named: dict[str, str] = {}
    for value in values:
        name, equals, encoder = value.partition("=")
        if not equals or not encoder or not re.fullmatch(r"[\w.-]{1,64}", name):
            raise click.BadParameter(
                f"{value!r} is no NAME=ENCODER. The name is what clients and the page call it: letters, digits, dots, "
                "- and _; for example resnet50=runs/new"
            )
        if name in named:
            raise click.BadParameter(f"{name!r} is given twice, for {named[name]!r} and for {encoder!r}")
        named[name] = encoder
    return named


def _refuse_unknown(name: str, encoder: str) -> None:
    """A candidate that cannot be there is found when the service starts, not when somebody wants it."""
    from bowerbird.errors import InputError
    from bowerbird.registry import get_registry
    from bowerbird.upgrade.vectors_encoder import check_vectors_ref, is_vectors_ref

    if is_vectors_ref(encoder):
        check_vectors_ref(encoder)
        return
    kind = encoder.partition("?")[0]
    if Path(encoder).is_dir():
        return
    if ":" not in kind or kind.startswith((".", "/")):
        raise InputError(
            f"candidate {name}: there is no folder {encoder!r}. Expected an encoder's or a run's folder, or a name "
            "such as core:efficientnet-lite?model=lite0"
        )
    get_registry().get("encoder", kind)


@click.command(
    epilog=examples(
        "bowerbird serve photos --open",
        "bowerbird serve photos --candidate new=runs/new --label-key label",
        "bowerbird serve photos --port 0 --read-only",
        "",
        "# For others: a token for each of them, and a proxy that adds TLS.",
        "bowerbird serve --new-token admin --token-name ada      (prints the token, and its lines for tokens.toml)",
        "bowerbird serve photos --host 0.0.0.0 --tokens tokens.toml --allowed-host photos.example.org",
        "",
        "# A gallery in a database has no folder: say where uploaded pictures go.",
        "bowerbird serve 'postgresql://host/db?gallery=photos' --contents /data/uploads",
        "",
        "# Then, from anywhere on this machine:",
        "curl -F file=@cat.jpg -F k=5 http://127.0.0.1:8000/v1/search/image",
        """curl -F 'items=[{"id": "cat", "metadata": {"year": 2026}}]' -F files=@cat.jpg \\""",
        "     http://127.0.0.1:8000/v1/items",
    )
)
@click.argument("gallery", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; beyond this machine it needs --tokens.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: one that is free.")
@click.option("--open", "open_page", is_flag=True, help="Open the page in the browser.")
@click.option("--candidate", "candidates", multiple=True, callback=_named, metavar="NAME=ENCODER",
              help="An encoder to which the page may upgrade the gallery; may be repeated.")  # fmt: skip
@click.option("--label-key", metavar="KEY", help="Metadata key of the items' label: for flips and quality.")
@click.option("--read-only", is_flag=True, help="Refuse whatever changes the gallery.")
@click.option("--contents", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER",
              help="Where uploaded pictures are kept. [default: GALLERY/contents]")  # fmt: skip
@click.option("--tokens", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
              help="TOML file with tokens and roles; clients send `Authorization: Bearer TOKEN`.")  # fmt: skip
@click.option("--new-token", type=click.Choice(["read", "write", "admin"]), metavar="ROLE",
              help="Print a new token (read, write or admin) and its lines for --tokens, and end.")  # fmt: skip
@click.option("--token-name", metavar="NAME", help="With --new-token: whose it is, for the audit log.")
@click.option("--proxy-header", metavar="NAME", help="Header in which a proxy that checked the user names them.")
@click.option("--allowed-host", "allowed_hosts", multiple=True, metavar="HOST",
              help="A name under which clients reach the service; may be repeated.")  # fmt: skip
@click.option("--max-upload-mib", type=click.FloatRange(min=0, min_open=True), default=64, show_default=True,
              help="Most MiB of a request.")  # fmt: skip
@click.option("--max-pixels", type=click.IntRange(min=1), default=64_000_000, show_default=True, help="Of a picture.")
@click.option("--max-files", type=click.IntRange(min=1), default=64, show_default=True, help="Pictures per request.")
@click.option("--decode-seconds", type=click.FloatRange(min=0, min_open=True), default=10.0, show_default=True,
              help="After which a picture is refused.")  # fmt: skip
@click.option("--decoders", type=click.IntRange(min=1), default=1, show_default=True,
              help="Processes that decode pictures.")  # fmt: skip
@click.option("--requests-per-minute", type=click.IntRange(min=0), default=6000, show_default=True,
              help="Of a token, or of an address; 0: no limit.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True,
              help="Most pictures per call of an encoder.")  # fmt: skip
@click.option("--backfill-rate", type=click.FloatRange(min=0, min_open=True), metavar="N",
              help="Most items per second that an upgrade encodes. [default: as many as it can]")  # fmt: skip
@click.option("--backfill-nice", type=click.IntRange(0, 19), default=19, show_default=True,
              help="Priority of that work; 19 yields to everything.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:0.")
def command(gallery: str | None, open_page: bool, new_token: str | None, token_name: str | None,
            max_upload_mib: float, **values: Any) -> None:  # fmt: skip
    """Serve GALLERY over HTTP: a page to search and upgrade it, and the interface under /v1 (schema: /openapi.json).

    Without --tokens everybody on this machine may use it, and nobody else can reach it. SIGTERM and Ctrl-C stop it
    once what is in flight is answered. It is one process, without --workers: the requests of all clients are encoded
    in common batches, and an encoder is in memory once.
    """
    from bowerbird.errors import InputError

    if new_token is not None:
        from bowerbird.serve.access import new_token as make_token

        token, lines = make_token(new_token, token_name or new_token)  # type: ignore[arg-type]  # click checked the role
        click.echo(f"The token, shown only now: {token}\n\nFor the file of --tokens:\n\n{lines}")
        return
    if token_name is not None:
        raise InputError("--token-name goes with --new-token")
    if gallery is None:
        raise InputError("say which gallery to serve: bowerbird serve GALLERY (a folder, or the URL of a store)")
    for name, encoder in values["candidates"].items():
        _refuse_unknown(name, encoder)
    from bowerbird.serve.run import run
    from bowerbird.serve.settings import ServeSettings

    settings = ServeSettings(gallery=gallery, max_upload_bytes=int(max_upload_mib * MIB), **values)

    def started(address: str) -> None:
        from bowerbird.gallery.open import safe_url

        who = f"whoever has a token of {settings.tokens}" if settings.tokens else "everybody on this machine"
        if settings.proxy_header:
            who = f"whoever the proxy names in {settings.proxy_header}"
        reads = "; read-only" if settings.read_only else ""
        click.echo(f"serving {safe_url(gallery)} at {address} to {who}{reads}. Ctrl-C stops it.")
        if open_page:
            click.launch(address)

    run(settings, started=started)
