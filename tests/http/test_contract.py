"""Requests made from the OpenAPI document: no 5xx, and every answer is as the document says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.schemas import BaseSchema

from kvstrata.testing.api import Served, serving
from kvstrata.testing.client import make_namespace, prompt, small_settings, store

TOKEN = "0123456789abcdef-token"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
FEW = settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    database=None,
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("contract")
    (directory / "token").write_text(TOKEN)
    (directory / "token").chmod(0o600)
    logger = logging.getLogger("kvstrata")
    before = logger.level
    with serving(
        small_settings(
            local_disk=str(directory / "kv"),
            runtime_dir=str(directory),
            http_token_file=str(directory / "token"),
        )
    ) as served:
        store(served.client, prompt(200, 1, make_namespace()))
        served.api.wait_job(served.api.post("/clear", {"tiers": ["l1"]}))
        yield served
    logger.setLevel(before)  # PATCH /runtime changes it for the whole process


@pytest.fixture(scope="module")
def document(served: Served) -> BaseSchema:
    schema = schemathesis.openapi.from_dict(served.api.get("/openapi.json"))
    schema.config.update(base_url=served.api.url)
    return schema


def for_every_operation(
    document: BaseSchema, check: Callable[[schemathesis.Case], None], few: settings
) -> int:
    """Call ``check`` with requests made for each operation of the document; how many operations there are."""
    count = 0
    for found in document.get_all_operations():
        operation = found.ok()
        few(given(case=operation.as_strategy())(check))()
        count += 1
    return count


def test_every_answer_is_as_the_document_says(document: BaseSchema) -> None:
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"}, checks=CHECKS)

    assert for_every_operation(document, check, FEW) > 20


def test_nothing_is_answered_without_the_token(document: BaseSchema) -> None:
    def check(case: schemathesis.Case) -> None:
        response = case.call()
        assert response.status_code == (200 if case.path in {"/health", "/ready"} else 401)

    for_every_operation(document, check, settings(FEW, max_examples=2))


def test_the_server_is_as_it_was(served: Served) -> None:
    """After all of the above."""
    assert served.api.get("/health")["status"] == "ok"
    assert served.api.get("/runtime")["l1_capacity_bytes"] > 0
