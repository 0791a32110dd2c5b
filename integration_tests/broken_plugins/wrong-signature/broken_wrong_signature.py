"""A hook with an argument that does not exist."""

from bowerbird.hookspecs import hookimpl
from bowerbird.records import EncoderRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders(device):
    yield EncoderRecord(name="wrong-signature:tiny", target="json:JSONDecoder", summary="A tiny encoder.")
