"""The program ``bowerbird``; also ``python -m bowerbird``, and under ``torchrun -m bowerbird``."""

from __future__ import annotations

import sys


def run() -> None:
    """The command line. Ctrl-C ends it with code 130 and no traceback, also while Python imports it."""
    try:
        from bowerbird.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    main(prog_name="bowerbird")


if __name__ == "__main__":
    run()
