"""The OpenAPI page says what the routes take; from outside: `schemathesis run http://127.0.0.1:8000/openapi.json`."""

import pytest

from dlm.serving.server import ServerSettings, build_app


def test_page_names_every_sampling_field(engine):
    from dlm.sampling.options import SAMPLING

    schemas = build_app(engine).openapi()["components"]["schemas"]
    for body in ("CompletionBody", "ChatBody"):
        assert set(SAMPLING) <= set(schemas[body]["properties"])
        assert schemas[body]["additionalProperties"] is False


def test_page_lists_the_names_of_each_choice(engine):
    from dlm.sampling.config import CHOICES

    schemas = build_app(engine).openapi()["components"]["schemas"]
    for body in ("CompletionBody", "ChatBody"):
        for field, names in CHOICES.items():
            kinds = schemas[body]["properties"][field]["anyOf"]
            assert kinds == [{"type": "string", "enum": list(names)}, {"type": "null"}], field
    assert CHOICES["revise"] == ("none", "edit", "remask", "verify")


@pytest.mark.slow
def test_answers_are_those_of_the_page(engine):
    """Schemathesis draws requests from the page, right ones and wrong ones: no answer is an error of the server, and
    each has a status, a type and a body that the page names. (That fields contradict each other a page cannot say.)"""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install schemathesis")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    page = schemathesis.openapi.from_asgi("/openapi.json", build_app(engine, ServerSettings(allowed_hosts=())))
    wanted = [not_a_server_error, checks.status_code_conformance, checks.content_type_conformance]
    wanted += [checks.response_schema_conformance, checks.negative_data_rejection]
    names = []
    for operation in (item.ok() for item in page.get_all_operations()):

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy())
        def check(case):
            case.call_and_validate(checks=wanted)

        check()
        names.append(operation.label)
    assert "POST /v1/completions" in names and "POST /v1/chat/completions" in names and len(names) == 6
