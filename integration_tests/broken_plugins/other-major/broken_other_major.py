"""Written for hooks of another major version."""

from bowerbird.hookspecs import hookimpl
from bowerbird.records import EncoderRecord

BOWERBIRD_API = "2.0"


@hookimpl
def bowerbird_encoders():
    yield EncoderRecord(name="other-major:tiny", target="json:JSONDecoder", summary="A tiny encoder.")
