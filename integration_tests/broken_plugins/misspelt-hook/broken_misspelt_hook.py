"""A hook that does not exist."""

from bowerbird.hookspecs import hookimpl
from bowerbird.records import EncoderRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoder():
    yield EncoderRecord(name="misspelt-hook:tiny", target="json:JSONDecoder", summary="A tiny encoder.")
