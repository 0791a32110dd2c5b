"""Claims the name of core."""

from bowerbird.hookspecs import hookimpl
from bowerbird.records import EncoderRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders():
    yield EncoderRecord(name="core:tiny", target="json:JSONDecoder", summary="A tiny encoder.")
