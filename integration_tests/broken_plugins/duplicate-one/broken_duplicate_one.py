"""Claims the name that duplicate-two claims."""

from bowerbird.hookspecs import hookimpl
from bowerbird.records import EncoderRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders():
    yield EncoderRecord(name="duplicate:tiny", target="json:JSONDecoder", summary="A tiny encoder.")
