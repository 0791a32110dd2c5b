"""Written for hooks of the future."""

from bowerbird.hookspecs import hookimpl
from bowerbird.records import EncoderRecord

BOWERBIRD_API = "1.7"


@hookimpl
def bowerbird_encoders():
    yield EncoderRecord(name="wrong-api:tiny", target="json:JSONDecoder", summary="A tiny encoder.")
