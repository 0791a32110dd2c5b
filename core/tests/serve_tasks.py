"""What the tests let a decoder do instead of decoding. Of its own, because a decoder imports it: it imports nothing."""

from __future__ import annotations

import os
import signal
import time


def sleep(source: bytes) -> None:
    time.sleep(60)


def die(source: bytes) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_memory(source: bytes) -> int:
    return len(bytearray(64 << 30))
