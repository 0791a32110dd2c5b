"""Ends the process when it is imported."""

import sys

from bowerbird.hookspecs import hookimpl
from bowerbird.records import EncoderRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders():
    yield EncoderRecord(name="system-exit:tiny", target="json:JSONDecoder", summary="A tiny encoder.")


sys.exit("goodbye")
