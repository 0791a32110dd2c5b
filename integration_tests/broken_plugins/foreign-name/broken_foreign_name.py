"""A record in the name of another plugin."""

from bowerbird.hookspecs import hookimpl
from bowerbird.records import EncoderRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders():
    yield EncoderRecord(name="core:timm", target="json:JSONDecoder", summary="A tiny encoder.")
