"""A library that nobody has."""

import a_library_that_nobody_has
from bowerbird.hookspecs import hookimpl
from bowerbird.records import EncoderRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders():
    yield EncoderRecord(name="import-error:tiny", target="json:JSONDecoder", summary="A tiny encoder.")
