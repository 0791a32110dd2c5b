"""A store that goes away in the middle: wait for it, a bounded time, and then stop so that the upgrade can go on later.

Only operations of the store are repeated. Each is one transaction, so that a failed one left nothing behind, and a
commit that did arrive although its answer was lost is refused the second time by its fencing token.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from bowerbird.errors import GalleryError, GalleryLockedError, InputError, StoreUnavailableError

T = TypeVar("T")
FIRST_WAIT, LONGEST_WAIT = 0.1, 30.0
# What every Python database driver calls a failure that is not the program's fault (PEP 249), whoever defines it.
DRIVER_ERRORS = {"OperationalError", "InterfaceError"}


def may_pass(error: BaseException) -> bool:
    """Whether an operation of a store that failed like this may succeed when it is tried again."""
    if isinstance(error, StoreUnavailableError | GalleryLockedError):
        return True
    if isinstance(error, GalleryError):
        return False
    return isinstance(error, OSError) or any(cls.__name__ in DRIVER_ERRORS for cls in type(error).__mro__)


class Patience:
    """Calls operations of a store again, with growing pauses, while it does not answer.

    Args:
        name: Of the gallery, for messages.
        seconds: How long a store may stay away; 0 does not wait at all.
    """

    def __init__(self, name: str, seconds: float) -> None:
        if not seconds >= 0:
            raise InputError(f"store_patience is {seconds}; it is a number of seconds, at least 0")
        self.name = name
        self.seconds = seconds

    def __call__(self, operation: Callable[..., T], *args: Any, **options: Any) -> T:
        """What ``operation`` returns.

        Raises:
            StoreUnavailableError: If the store stayed away for ``seconds``; says how to go on.
        """
        wait, deadline = FIRST_WAIT, None
        while True:
            try:
                return operation(*args, **options)
            except Exception as exc:
                if not may_pass(exc):
                    raise
                now = time.monotonic()
                if deadline is None:
                    deadline = now + self.seconds
                    if self.seconds:
                        warnings.warn(
                            f"the store of {self.name} does not answer ({exc}); trying again for up to "
                            f"{self.seconds:g} s",
                            RuntimeWarning,
                            stacklevel=2,
                        )
                if now >= deadline:
                    raise StoreUnavailableError(
                        f"the store of {self.name} did not answer for {self.seconds:g} s ({exc}). What was committed "
                        f"is safe; `bowerbird upgrade run {self.name}` goes on from there once the store is back"
                    ) from exc
                # Not all workers at once when it comes back.
                time.sleep(min(wait * random.uniform(0.5, 1.0), deadline - now))
                wait = min(2 * wait, LONGEST_WAIT)
