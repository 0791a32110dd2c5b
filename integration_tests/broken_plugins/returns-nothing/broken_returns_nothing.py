"""A hook that forgets to yield."""

from bowerbird.hookspecs import hookimpl
from bowerbird.records import EncoderRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders():
    EncoderRecord(name="returns-nothing:tiny", target="json:JSONDecoder", summary="A tiny encoder.")
