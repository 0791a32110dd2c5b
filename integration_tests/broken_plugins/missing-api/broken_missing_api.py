"""Declares no hook API."""

from bowerbird.hookspecs import hookimpl
from bowerbird.records import EncoderRecord


@hookimpl
def bowerbird_encoders():
    yield EncoderRecord(name="missing-api:tiny", target="json:JSONDecoder", summary="A tiny encoder.")
