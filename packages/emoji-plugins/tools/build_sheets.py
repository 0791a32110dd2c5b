"""Builds the picture sheets and the concept table of ``emoji:styles`` from ten icon sets of the npm registry.

    pip install "resvg-py==0.5.0" pillow numpy
    python packages/emoji-plugins/tools/build_sheets.py --work /tmp/emoji-sources          # writes the package's data
    python packages/emoji-plugins/tools/build_sheets.py --work /tmp/emoji-sources --check  # compares with what is there

The versions and the SHA-256 of the ten packages are pinned below; anything else is refused. A concept is a name that
all ten sets have (896 of them); only the five sets of ``STYLES``, whose licences allow it, are drawn into sheets.
The pixels depend on resvg and, in the choice of the 256 colours, on Pillow; ``sheets.json`` records both versions.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

DATA = Path(__file__).resolve().parent.parent / "src" / "bowerbird_emoji" / "data"
PIXELS, COLUMNS = 64, 32

# npm package @iconify-json/<set> -> (version, SHA-256 of its tarball)
SOURCES = {
    "noto": ("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1": ("1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "twemoji": ("1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "openmoji": ("1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    "fluent-emoji-flat": ("1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "fluent-emoji-high-contrast": ("1.2.6", "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0"),
    "fluent-emoji": ("1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    "emojione": ("1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "emojione-v1": ("1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"),
    "emojione-monotone": ("1.2.1", "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e"),
}
# Sets whose pictures go into the wheel -> licence. The others only take part in the join of names.
STYLES = {
    "noto": "Apache-2.0",
    "noto-v1": "Apache-2.0",
    "fluent-emoji-flat": "MIT",
    "fluent-emoji": "MIT",
    "twemoji": "CC-BY-4.0",
}
# Pairs of names that are one picture: the first in both Noto generations and in Twemoji, the second in flat Fluent.
# Nobody can tell them apart, so they are seen, and neither unseen, old nor validation.
SAME_PICTURE = ("up-button", "upwards-button", "black-medium-square", "white-square-button")

CATEGORIES = {
    "Activities": "activities",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Objects": "objects",
    "People & Body": "people",
    "Smileys & Emotion": "smileys",
    "Symbols": "symbols",
    "Travel & Places": "travel",
}


# ------------------------------------------------------------------------------------------------- sources


def fetch(work: Path) -> dict[str, dict[str, Any]]:
    """Set -> its ``icons.json``, plus noto's categories under ``metadata``. Downloads what is missing in ``work``."""
    work.mkdir(parents=True, exist_ok=True)
    icons = {}
    for name, (release, digest) in SOURCES.items():
        tarball = work / f"iconify-json-{name}-{release}.tgz"
        if not tarball.exists():
            subprocess.run(["npm", "pack", "--silent", f"@iconify-json/{name}@{release}"], cwd=work, check=True)
        found = hashlib.sha256(tarball.read_bytes()).hexdigest()
        if found != digest:
            sys.exit(f"{tarball}: SHA-256 is {found}, expected {digest}. Delete the file to download it again.")
        with tarfile.open(tarball) as archive:
            icons[name] = read_json(archive, "icons")
            if name == "noto":
                icons[name]["metadata"] = read_json(archive, "metadata")
    return icons


def read_json(archive: tarfile.TarFile, member: str) -> dict[str, Any]:
    file = archive.extractfile(f"package/{member}.json")
    assert file is not None, member
    return json.load(file)


def resolve(icon_set: dict[str, Any], name: str) -> tuple[dict[str, Any], bool, bool]:
    """The icon behind ``name`` and whether its aliases mirror it left-right and top-bottom."""
    mirror_x = mirror_y = False
    while name not in icon_set["icons"]:
        alias = icon_set["aliases"][name]
        unknown = set(alias) - {"parent", "hFlip", "vFlip"}
        assert not unknown, f"alias {name} uses {unknown}, which this script does not know"
        mirror_x ^= alias.get("hFlip", False)
        mirror_y ^= alias.get("vFlip", False)
        name = alias["parent"]
    return icon_set["icons"][name], mirror_x, mirror_y


# ------------------------------------------------------------------------------------------------- pictures


def draw(icon_set: dict[str, Any], name: str) -> np.ndarray:
    """uint8 (64, 64, 3): the icon, centred in a square, over white."""
    icon, mirror_x, mirror_y = resolve(icon_set, name)
    width = icon.get("width", icon_set.get("width", 16))
    height = icon.get("height", icon_set.get("height", 16))
    left, top, side = icon.get("left", 0), icon.get("top", 0), max(width, height)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}" '
        f'width="{PIXELS}" height="{PIXELS}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=PIXELS, height=PIXELS, skip_system_fonts=True))
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    canvas = Image.new("RGB", drawn.size, "white")
    canvas.paste(drawn, mask=drawn.getchannel("A"))
    pixels = np.asarray(canvas)
    pixels = pixels[:, ::-1] if mirror_x else pixels
    return pixels[::-1] if mirror_y else pixels


def sheet(icon_set: dict[str, Any], names: list[str]) -> Image.Image:
    """All pictures of a style, row by row in the order of ``names``, reduced to 255 colours and exact white."""
    tiles = np.stack([draw(icon_set, name) for name in names])
    rows = -(-len(names) // COLUMNS)
    grid = np.full((rows * COLUMNS, PIXELS, PIXELS, 3), 255, np.uint8)
    grid[: len(names)] = tiles
    full = grid.reshape(rows, COLUMNS, PIXELS, PIXELS, 3).transpose(0, 2, 1, 3, 4)
    full = full.reshape(rows * PIXELS, COLUMNS * PIXELS, 3)
    reduced = Image.fromarray(full).quantize(255, method=Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
    pixels = np.asarray(reduced.convert("RGB")).copy()
    pixels[(full == 255).all(-1)] = 255
    return Image.fromarray(pixels)


# ------------------------------------------------------------------------------------------------- concepts


def rank(salt: str, name: str) -> bytes:
    return hashlib.sha256(f"emoji:styles 1 {salt} {name}".encode()).digest()


def balanced(names: list[str], category: dict[str, str], count: int, salt: str) -> set[str]:
    """``count`` of ``names``, from every category in proportion, otherwise by hash; those of ``SAME_PICTURE`` first."""
    keyed = []
    for group in sorted(set(category.values())):
        members = sorted(
            (n for n in names if category[n] == group), key=lambda n: (n not in SAME_PICTURE, rank(salt, n))
        )
        keyed += [((i + 0.5) / len(members), rank(salt, n), n) for i, n in enumerate(members)]
    return {n for _, _, n in sorted(keyed)[:count]}


def concept_table(icons: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """One row per concept: name, category, part (seen or unseen), role among the seen (old, validation or -)."""
    names = sorted(set.intersection(*[set(s["icons"]) | set(s.get("aliases", {})) for s in icons.values()]))
    assert len(names) == 896, len(names)
    by_icon = {icon: c for c, members in icons["noto"]["metadata"]["categories"].items() for icon in members}

    def parent(name: str) -> str:
        while name not in by_icon:
            name = icons["noto"]["aliases"][name]["parent"]
        return name

    category = {n: CATEGORIES[by_icon[parent(n)]] for n in names}
    seen = balanced(names, category, len(names) // 2, "seen")
    assert seen.issuperset(SAME_PICTURE)
    old = balanced(sorted(seen - set(SAME_PICTURE)), category, 100, "old")
    validation = balanced(sorted(seen - old - set(SAME_PICTURE)), category, 112, "validation")
    role = {**dict.fromkeys(old, "old"), **dict.fromkeys(validation, "validation")}
    return [
        {"name": n, "category": category[n], "part": "seen" if n in seen else "unseen", "role": role.get(n, "-")}
        for n in names
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the npm tarballs; kept")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the committed data differ")
    arguments = parser.parse_args()

    icons = fetch(arguments.work)
    concepts = concept_table(icons)
    table = "\n".join("\t".join(row.values()) for row in [dict(zip(concepts[0], concepts[0], strict=True)), *concepts])
    names = [row["name"] for row in concepts]
    made_with = {"resvg-py": version("resvg-py"), "pillow": version("pillow")}
    record: dict[str, Any] = {"pixels": PIXELS, "columns": COLUMNS, "made_with": made_with, "styles": {}}
    differs = []
    if arguments.check and (DATA / "concepts.tsv").read_text() != table + "\n":
        differs.append("concepts.tsv")
    for style, licence in STYLES.items():
        picture = sheet(icons[style], names)
        path = DATA / f"{style}.webp"
        if arguments.check:
            with Image.open(path) as committed:
                same = np.array_equal(np.asarray(committed.convert("RGB")), np.asarray(picture))
            differs += [] if same else [path.name]
            continue
        picture.save(path, lossless=True, quality=100, method=6)
        release, digest = SOURCES[style]
        record["styles"][style] = {
            "package": f"@iconify-json/{style}",
            "version": release,
            "package_sha256": digest,
            "licence": licence,
            "sheet_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        print(f"{path.name}: {path.stat().st_size:,} bytes", flush=True)
    if arguments.check:
        sys.exit(f"differ from a new build: {', '.join(differs)}" if differs else 0)
    (DATA / "concepts.tsv").write_text(table + "\n")
    (DATA / "sheets.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
