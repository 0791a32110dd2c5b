"""Every error a user can cause. The command line prints them as one message and exits with code 2.

The house pattern of a message: what was asked, what was found, what to do.
"""

from __future__ import annotations

from collections.abc import Iterable


class BowerbirdError(Exception):
    """Root of all errors that carry a message for a person. ``exit_code`` is what the command line returns."""

    exit_code = 2


class InputError(BowerbirdError, ValueError):
    """A value given by the user is outside what is accepted."""


class UnknownNameError(InputError, LookupError):
    """A method, split, strategy or key that does not exist; the message suggests close names."""


class RecipeError(InputError):
    """A recipe cannot be read, or asks for something impossible."""


class PluginError(BowerbirdError):
    """A plugin is broken, incompatible or missing; the original failure is chained as ``__cause__``."""


class MissingExtraError(PluginError):
    """An optional dependency is not installed; the message names the command that installs it."""


class DataError(InputError):
    """A data file (an image, a table, a vector file) cannot be used."""


class SpaceError(InputError):
    """Vectors of two unrelated spaces would be compared, or an encoder is not the one it claims to be."""


class GalleryError(BowerbirdError):
    """A gallery refuses an operation in its present state."""


class GalleryLockedError(GalleryError):
    """Another process writes to the gallery; the message names it."""


class SnapshotGoneError(GalleryError):
    """What an earlier snapshot of a gallery showed was dropped or replaced since (`finish`, `rollback`, `compact`)."""


class StoreUnavailableError(GalleryError):
    """The store does not answer at the moment (no connection, a full or failing disk); trying again may help."""

    exit_code = 75  # EX_TEMPFAIL: a script may start the same command again


class CorruptionError(GalleryError):
    """Stored bytes differ from their checksum; the message names the file and the rows."""


class IntegrityError(GalleryError):
    """An item is in both parts, or in neither part, of a gallery that is being upgraded."""


class UpgradeError(GalleryError):
    """An upgrade step is not allowed in the present state."""


def without_passwords(text: str) -> str:
    """``text`` with the passwords and keys of the URLs in it left out, for messages and notes."""
    import re

    text = re.sub(r"((?:password|api_key)=)[^&\s'\"]*", r"\1***", text)
    text = re.sub(r"(?i)(?<=%3A%2F%2F)([^&\s]*?)%3A[^&\s]*%40", r"\1%3A***%40", text)  # a URL within a URL
    # Up to the last @ of a word: a / or @ in a password should be written %2F, %40, and often is not.
    return re.sub(r"(?<=://)([^:/@\s]*):\S*@", r"\1:***@", text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest of ``known``, or an empty string."""
    import difflib  # only a mistake pays for it

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
