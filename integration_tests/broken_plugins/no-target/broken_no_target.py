"""A target that does not exist."""

from bowerbird.hookspecs import hookimpl
from bowerbird.records import EncoderRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders():
    yield EncoderRecord(name="no-target:tiny", target="broken_no_target_missing.deep:Encoder", summary="A tiny encoder.")
