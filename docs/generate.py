"""Write the parts of the documentation that are made from the code: method tables, the command reference,
hooks and records, and the HTTP API.

python docs/generate.py           write them
python docs/generate.py --check   fail if a committed page differs from what would be written
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from api_page import api_page, made_by_another, openapi_json, roles, schema
from hooks_page import hooks_page

ROOT = Path(__file__).parent.parent
KINDS = {
    "encoder": "Encoders",
    "objective": "Objectives",
    "dataset": "Data sets",
    "retriever": "Retrievers",
    "modifier": "Modifiers",
    "evaluator": "Evaluators",
}
# Records that share a page with their paper.
PAGES = {
    "adapter": "adapters",
    "detector": "torchvision-detectors",
    "dense": "mv-former",
    "dual-encoder": "frozen-dual-encoder",
    "dual-softmax": "video-retrieval-evaluation",
    "dvae": "tokenizer",
    "fcn": "cdcl",
    "frozen": "frozen-dual-encoder",
    "lift": "bict",
    "magnitude": "spartan",
    "metric-compatible": "online-backfilling",
    "miou": "cdcl",
    "mixstyle": "dsu",
    "multiple-choice": "video-retrieval-evaluation",
    "phases": "mv-former",
    "pspnet": "cdcl",
    "qa": "video-retrieval-evaluation",
    "rank-merge": "online-backfilling",
    "reverse-transform": "online-backfilling",
    "segmentation": "cdcl",
    "tokenizer-quality": "tokenizer",
    "top-k": "spartan",
    "torchvision": "torchvision-detectors",
    "videotext:retrieval": "video-retrieval-evaluation",
    "vqvae": "tokenizer",
    "zero-shot-actions": "video-retrieval-evaluation",
}
# The README has what people look for first; the rest is on the page of methods.
IN_README = {
    "objective": "Training",
    "modifier": "Modifiers of any training",
    "retriever upgrade": "Ways to upgrade",
    "retriever store": "Galleries in",
}


def method_table(kinds: dict[str, str], *, with_links: str) -> str:
    """Records of the packages here, one Markdown table per kind (and role). ``with_links``: prefix to docs/."""
    from bowerbird.registry import get_registry

    registry = get_registry()
    bad = [p for p in registry.plugins if p.state != "ok"]
    if bad:
        sys.exit(f"cannot generate: plugin {bad[0].name} is {bad[0].state}: {bad[0].detail}")
    lines = []
    for kind, title in kinds.items():
        records = registry.records(*kind.split())
        if not records:
            continue
        lines += [f"| {title} | what it is | paper |", "|---|---|---|"]
        for record in records:
            method = record.name.split(":")[1]
            slug = PAGES.get(record.name) or PAGES.get(method, method)
            page = ROOT / "docs" / "methods" / f"{slug}.md"
            name = f"[`{record.name}`]({with_links}methods/{slug}.md)" if page.exists() else f"`{record.name}`"
            lines.append(f"| {name} | {record.summary} | {record.paper or ''} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def command_reference() -> str:
    """``--help`` of every command, as the tool prints it at 100 columns."""
    import click

    from bowerbird.cli import main

    def pages(command: click.Command, path: list[str]) -> list[str]:
        context = click.Context(command, info_name=" ".join(path), terminal_width=100, max_content_width=100)
        own = [f"## `{' '.join(path)}`\n\n```text\n{command.get_help(context)}\n```\n"]
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                child = command.get_command(context, name)
                if child is not None and not child.hidden:
                    own += pages(child, [*path, name])
        return own

    return "# Command line\n\nMade by `python docs/generate.py`.\n\n" + "\n".join(pages(main, ["bowerbird"]))


def replace_between(text: str, marker: str, new: str) -> str:
    pattern = rf"(<!-- {marker} begin[^>]*-->\n).*?(<!-- {marker} end -->)"
    if not re.search(pattern, text, flags=re.DOTALL):
        sys.exit(f"no '<!-- {marker} begin -->' block found")
    return re.sub(pattern, lambda m: m.group(1) + new + m.group(2), text, flags=re.DOTALL)


def generated() -> dict[Path, str]:
    readme, interface = ROOT / "README.md", schema()
    intro = (
        "# Methods\n\nMade by `python docs/generate.py` from the plugins' records. "
        "`bowerbird show NAME` prints the settings of each.\n\n"
    )
    return {
        readme: replace_between(readme.read_text(), "methods", method_table(IN_README, with_links="docs/")),
        ROOT / "docs/methods/index.md": intro + method_table(KINDS, with_links="").replace("(methods/", "("),
        ROOT / "docs/reference/cli.md": command_reference(),
        ROOT / "docs/plugin-authors/hooks.md": hooks_page(),
        ROOT / "docs/http-api.md": api_page(interface, roles()),
        ROOT / "docs/openapi.json": openapi_json(interface),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    check = parser.parse_args().check
    stale = []
    interface = (ROOT / "docs/http-api.md", ROOT / "docs/openapi.json")
    other_words = check and made_by_another(interface[1])
    for path, text in generated().items():
        if other_words and path in interface:
            print(f"not compared, it was made by another version of FastAPI: {path.relative_to(ROOT)}")
            continue
        if path.exists() and path.read_text() == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if stale and check:
        sys.exit(f"out of date: {', '.join(stale)}. Run: python docs/generate.py")
    print("\n".join(f"wrote {path}" for path in stale) or "up to date")


if __name__ == "__main__":
    main()
