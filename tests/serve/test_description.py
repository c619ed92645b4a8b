"""The API's description: schemathesis makes calls from it, none of which may fail or be answered in another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from serve.servers import server, write_model

from fastgpt.serve.app import build_app
from fastgpt.serve.guard import Limits


def test_every_route_says_how_it_fails() -> None:
    paths = build_app({}, Limits()).openapi()["paths"]
    for path, operations in paths.items():
        for operation in operations.values():
            statuses = set(operation["responses"])
            assert "200" in statuses and "422" not in statuses
            assert path in ("/health", "/ready") or {"400", "401", "404", "408", "413"} <= statuses
    (chat,) = paths["/v1/chat/completions"].values()
    assert {"429", "503", "504"} <= set(chat["responses"])
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}


@pytest.mark.slow
def test_calls_from_the_description_are_answered_as_it_says(tmp_path: Path) -> None:
    schemathesis: Any = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.specs.openapi import checks

    say = ["status_code_conformance", "content_type_conformance", "response_schema_conformance"]
    chosen = [schemathesis.checks.not_a_server_error, *(getattr(checks, name) for name in say)]
    limits: dict[str, Any] = dict(max_examples=12, deadline=None, database=None, derandomize=True)
    seen, wrong = set(), []
    with server(write_model(tmp_path), limits=Limits(body=100_000)) as (_, client):
        schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json".replace("//openapi", "/openapi"))
        operations = [found.ok() for found in schema.get_all_operations()]
        for operation in operations:
            for mode in schemathesis.GenerationMode:

                @settings(**limits, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
                @given(case=operation.as_strategy(generation_mode=mode))
                def call(case: Any) -> None:
                    answer = case.call(timeout=60)
                    seen.add(answer.status_code)
                    case.validate_response(answer, checks=chosen)

                try:
                    call()
                except Unsatisfiable:  # a route without parameters has no wrong ones
                    assert mode is schemathesis.GenerationMode.NEGATIVE
                except Exception as e:
                    wrong.append(f"{operation.label}: {e} {getattr(e, 'exceptions', '')}")
        assert client.get("/ready").status_code == 200
    assert not wrong, "\n\n".join(wrong)
    assert {200, 400} <= seen
