"""Its hook fails half way."""

from bowerbird.hookspecs import hookimpl
from bowerbird.records import EncoderRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders():
    yield EncoderRecord(name="hook-raises:tiny", target="json:JSONDecoder", summary="A tiny encoder.")
    raise RuntimeError("half way through the catalogue")
