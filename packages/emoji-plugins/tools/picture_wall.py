"""Draws docs/images/emoji-styles.png: one row per style, eight concepts, seen and unseen.

    python packages/emoji-plugins/tools/picture_wall.py docs/images/emoji-styles.png

Needs matplotlib.
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt

from bowerbird_emoji.config import STYLES
from bowerbird_emoji.sheets import concepts, tiles

SHOWN = ("red-apple", "octopus", "castle", "rocket", "pizza", "penguin", "microscope", "strawberry")


def main(path: str) -> None:
    chosen = sorted((c for c in concepts() if c.name in SHOWN), key=lambda c: SHOWN.index(c.name))
    figure, axes = plt.subplots(len(STYLES), len(chosen), figsize=(len(chosen) * 1.15, len(STYLES) * 1.1 + 0.5))
    for row, style in zip(axes, STYLES, strict=True):
        for axis, concept in zip(row, chosen, strict=True):
            axis.imshow(tiles(style)[concept.tile])
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(style, rotation=0, ha="right", va="center", fontsize=10, labelpad=6)
    for axis, concept in zip(axes[0], chosen, strict=True):
        axis.set_title(f"{concept.name.replace('-', ' ')}\n({concept.part})", fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main(sys.argv[1])
