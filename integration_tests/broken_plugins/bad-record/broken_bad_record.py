"""A record with a role that does not exist."""

from bowerbird.hookspecs import hookimpl
from bowerbird.records import RetrieverRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_retrievers():
    yield RetrieverRecord(name="bad-record:fast", role="indx", target="json:JSONDecoder", summary="A fast index.")
