"""``python -m bowerbird``: the command line, also under ``torchrun -m bowerbird``."""

from __future__ import annotations

from bowerbird.cli import main

if __name__ == "__main__":
    main(prog_name="bowerbird")
