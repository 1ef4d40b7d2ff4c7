"""/openapi.json is what the server does: schemathesis calls every route, with bodies that follow the schema and bodies
that do not, and compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from jsonschema import Draft202012Validator
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from baleen.server.app import ROUTES
from baleen.server.conftest import Server, running_server
from baleen.server.openapi import OPERATIONS, document

# Not `positive_data_acceptance`: a schema cannot say all that makes a request impossible (lengths, what excludes what).
CHECKS = (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
KEY = "sk-whale-7"
schema = schemathesis.openapi.from_dict(document(needs_key=True))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("openapi"), api_key=KEY) as server:
        server.play("hi")
        yield server


@schema.auth()
class Key:
    def get(self, case: schemathesis.Case, ctx: schemathesis.AuthContext) -> str:
        return KEY

    def set(self, case: schemathesis.Case, data: str, ctx: schemathesis.AuthContext) -> None:
        case.headers = {**(case.headers or {}), "Authorization": f"Bearer {data}"}


@schema.parametrize()
@settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_the_server_does_what_the_schema_says(case: schemathesis.Case, server: Server) -> None:
    case.call_and_validate(base_url=server.url, checks=list(CHECKS), timeout=20)


def test_the_examples_are_answered(server: Server) -> None:
    with server.http() as http:
        for path, methods in document(needs_key=True)["paths"].items():
            for method, operation in methods.items():
                content = operation.get("requestBody", {}).get("content", {})
                for example in content.get("application/json", {}).get("examples", {}).values():
                    headers = {"x-api-key": KEY}
                    answer = http.request(method.upper(), path, json=example["value"], headers=headers)
                    assert answer.status_code == 200, answer.text


def test_every_route_is_described() -> None:
    routes = {(re.sub(r":\w+}", "}", path), method) for path, _, methods in ROUTES for method in methods}
    assert set(OPERATIONS) == routes


def schemas_of_answers(whole: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for methods in whole["paths"].values():
        for operation in methods.values():
            for response in operation["responses"].values():
                for media in response.get("content", {}).values():
                    yield media.get("schema", {})


@pytest.mark.parametrize("needs_key", [False, True])
def test_the_document_is_whole(needs_key: bool) -> None:
    """Every reference has its target, every schema is one, and a key is asked for only where there is one."""
    whole = document(needs_key=needs_key)
    schemas = whole["components"]["schemas"]
    text = str(whole)
    refs = set(re.findall(r"#/components/schemas/(\w+)", text))
    assert refs <= set(schemas)
    for part in [*schemas.values(), *schemas_of_answers(whole)]:
        Draft202012Validator.check_schema(part)
        assert len(set(part.get("required", ()))) == len(part.get("required", ()))
    locked = [path for path, methods in whole["paths"].items() for op in methods.values() if "security" in op]
    assert ("securitySchemes" in whole["components"]) == bool(locked) == needs_key
    assert not any(path.startswith(("/health", "/metrics")) for path in locked)


def test_the_server_shows_it(server: Server) -> None:
    with server.http() as http:
        shown = http.get("/openapi.json", headers={"x-api-key": KEY})
    assert shown.json() == document(needs_key=True)
