"""The service against its own OpenAPI schema, by schemathesis: what is promised is what is answered."""

from __future__ import annotations

from typing import Any

import schemathesis
from hostile import TOKEN
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from bowerbird.serve.app import create_app
from bowerbird.serve.settings import ServeSettings

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


# A stream of events has no end; maps and matrices are made aside, in seconds to minutes.
schema = schemathesis.openapi.from_dict(create_app(ServeSettings(gallery="any")).openapi()).exclude(
    path=["/v1/events", "/v1/map", "/v1/spaces"]
)


@schema.parametrize()
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_one_that_the_schema_promises(case: schemathesis.Case, service: Any) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    case.call_and_validate(base_url=service[0].url, headers=headers, checks=CHECKS, timeout=30)
