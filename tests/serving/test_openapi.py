"""The OpenAPI page says what the routes take; by hand: `schemathesis run http://127.0.0.1:8000/openapi.json`."""

from dlm.serving.server import build_app


def test_page_names_every_sampling_field(engine):
    from dlm.sampling.config import SAMPLING

    schemas = build_app(engine).openapi()["components"]["schemas"]
    for body in ("CompletionBody", "ChatBody"):
        assert set(SAMPLING) <= set(schemas[body]["properties"])
        assert schemas[body]["additionalProperties"] is False
