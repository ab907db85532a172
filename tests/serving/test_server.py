"""The routes, as OpenAI's own client sees them."""

import asyncio
import dataclasses
import json

import openai
import pytest

import dlm
from dlm.tokenizer import decode

PROMPT = "Once upon a time"


def alone(opened, prompt, seed, **settings):
    """The text that `dlm.generate` writes."""
    own = {name: value for name, value in opened.defaults.items() if name != "chat"}
    config = dlm.SamplingConfig(**(own | {"stop_at_eos": True, "seed": seed} | settings))
    out = dlm.generate(opened.predictor, [prompt], config, tokenizer=opened.tokenizer)
    return decode(opened.tokenizer, out.sequences[0].tolist()), int(out.nfe[0])


def test_completion(client, opened):
    async def ask():
        return await client.completions.create(
            model="tiny-fox", prompt=PROMPT, max_tokens=9, seed=3, n=2, temperature=0.7, extra_body={"block_length": 4}
        )

    got = asyncio.run(ask())
    texts = [alone(opened, PROMPT, 3 + i, gen_length=9, temperature=0.7) for i in range(2)]
    assert [choice.text for choice in got.choices] == [text for text, _ in texts]
    assert [choice.index for choice in got.choices] == [0, 1]
    assert got.usage.nfe == sum(nfe for _, nfe in texts)
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    assert 0 < got.usage.tokens_per_forward <= 9


def test_streamed_completion_is_the_same_text(client, opened):
    async def ask():
        stream = await client.completions.create(
            model="tiny-fox", prompt=PROMPT, max_tokens=12, seed=3, stream=True, stream_options={"include_usage": True}
        )
        return [chunk async for chunk in stream]

    chunks = asyncio.run(ask())
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == alone(opened, PROMPT, 3, gen_length=12)[0]
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] in (["length"], ["stop"])
    assert chunks[-1].choices == [] and chunks[-1].usage.nfe > 0


def test_stream_of_the_canvas(client):
    async def ask():
        stream = await client.completions.create(
            model="tiny-fox", prompt=PROMPT, max_tokens=6, seed=1, stream=True,
            extra_body={"stream_canvas": True, "stop_at_eos": False},
        )  # fmt: skip
        return [chunk async for chunk in stream]

    canvases = [chunk.canvas for chunk in asyncio.run(ask()) if getattr(chunk, "canvas", None)]
    assert [canvas["pass"] for canvas in canvases] == [1, 2, 3, 4, 5, 6]
    for number, canvas in enumerate(canvases, 1):
        assert len(canvas["pieces"]) == len(canvas["confidence"]) == 6
        assert sum(piece is not None for piece in canvas["pieces"]) == number
        assert [piece is None for piece in canvas["pieces"]] == [sure is None for sure in canvas["confidence"]]
        [slot] = canvas["committed"]
        assert canvas["pieces"][slot] is not None
        assert canvases[number - 2]["pieces"][slot] is None or number == 1


def test_chat_and_its_stream(client):
    messages = [{"role": "user", "content": "Tell me a story."}]

    async def ask():
        whole = await client.chat.completions.create(model="tiny-fox", messages=messages, max_tokens=8, seed=2)
        stream = await client.chat.completions.create(
            model="tiny-fox", messages=messages, max_completion_tokens=8, seed=2, stream=True
        )
        return whole, [chunk async for chunk in stream]

    whole, chunks = asyncio.run(ask())
    assert whole.choices[0].message.role == "assistant"
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content


def test_chat_reads_as_many_requests_as_the_checkpoint_says(client, opened, monkeypatch):
    turns = [("user", "A fox."), ("assistant", "Once."), ("user", "A boat.")]
    messages = [{"role": role, "content": text} for role, text in turns]

    async def ask(messages):
        answer = await client.chat.completions.create(model="tiny-fox", messages=messages, max_tokens=4, seed=2)
        return answer.choices[0].message.content, answer.usage.prompt_tokens

    alone, whole = asyncio.run(ask(messages[-1:])), asyncio.run(ask(messages))
    monkeypatch.setitem(opened.defaults, "chat", {"turns": 1})
    assert asyncio.run(ask(messages)) == alone != whole


def test_suffix_fills_the_gap(client, opened):
    async def ask():
        return await client.completions.create(
            model="tiny-fox", prompt="The cat ", suffix=" on the mat.", max_tokens=3, seed=5
        )

    text = asyncio.run(ask()).choices[0].text
    ids = opened.tokenizer("The cat")["input_ids"] + [opened.mask_id] * 3
    ids += opened.tokenizer(" on the mat.", add_special_tokens=False)["input_ids"]
    own = {name: value for name, value in opened.blank_defaults.items() if name != "chat"}
    config = dlm.SamplingConfig(**(own | {"suppress_eos": True, "seed": 5}))
    out = dlm.generate(opened.predictor, dlm.Canvas.from_templates([ids], opened.mask_id), config)
    assert text == opened.text(out.sequences[0].tolist()).removeprefix(" ")


def test_json_schema(client):
    schema = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}
    schema["properties"]["age"].pop("minimum")

    async def ask(form):
        return await client.chat.completions.create(
            model="tiny-fox", messages=[{"role": "user", "content": "How old?"}], max_tokens=24, seed=1,
            response_format=form,
        )  # fmt: skip

    shaped = asyncio.run(ask({"type": "json_schema", "json_schema": {"name": "age", "schema": schema}}))
    assert isinstance(json.loads(shaped.choices[0].message.content)["age"], int)
    free = asyncio.run(ask({"type": "json_object"}))
    assert isinstance(json.loads(free.choices[0].message.content), dict)


def test_stop_echo_and_logprobs(client, opened):
    async def ask(**more):
        got = await client.completions.create(model="tiny-fox", prompt=PROMPT, max_tokens=12, seed=3, **more)
        return got.choices[0]

    whole = asyncio.run(ask()).text
    cut = whole[4:6]
    stopped = asyncio.run(ask(stop=[cut, "never"]))
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(cut)], "stop")
    assert asyncio.run(ask(echo=True)).text == PROMPT + whole
    found = asyncio.run(ask(logprobs=2)).logprobs
    assert "".join(found.tokens) == whole
    assert all(value <= 0 for value in found.token_logprobs)
    assert all(len(top) <= 2 for top in found.top_logprobs)
    cut_short = asyncio.run(ask(stop=cut, logprobs=0))  # tokens behind the stop text were listed too
    told = "".join(cut_short.logprobs.tokens)
    assert told.startswith(cut_short.text) and len(told) < len(whole)
    assert len("".join(cut_short.logprobs.tokens[:-1])) < max(1, len(cut_short.text))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"temprature": 1}, "'temprature' is no field: did you mean 'temperature'"),
        ({"tools": []}, "tools is not supported"),
        ({"threshold": 3}, "threshold is 3.0: it must be a confidence, at most 1"),
        ({"method": "fast"}, "method is 'fast', which is not known"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "the model reads 128 together"),
        ({"prompt": [""] * 300, "n": 2}, "600 texts were asked for at once, and the server takes 408: ask for fewer"),
        ({"prompt": "<|mdm_mask|>"}, "mask token"),
        ({"prompt": [99999]}, "the prompt holds id 99999"),
        ({"method": "dual"}, "method 'dual' is for full-attention models"),
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
        ({"temperature": -1}, "temperature is -1.0: it must be 0"),
        ({"regex": "("}, "regex is '(': missing ), unterminated subpattern"),
        ({"json_schema": {"properties": 3}}, "json_schema has 3 at #/properties"),
        ({"choices": []}, "choices is ()"),
        ({"seed": -1}, "seed"),
    ],
)
def test_errors_name_the_field(http, body, words):
    async def ask():
        return await http.post("/v1/completions", json={"prompt": "a", **body})

    answer = asyncio.run(ask())
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert words in error["message"], error["message"]
    assert "\n" not in error["message"]


def test_other_errors_have_openai_s_shape(http, client):
    async def ask():
        return [
            await http.get("/nothing"),
            await http.get("/v1/completions"),
            await http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}),
            await http.post("/v1/completions", content=b"x" * (2**20 + 1)),
            await http.post("/v1/completions", json={"prompt": "a", "model": "gpt-9"}),
            await http.get("/health", headers={"host": "evil.example"}),
        ]

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [404, 405, 400, 413, 404, 421]
    for answer in answers:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    with pytest.raises(openai.NotFoundError, match="no model"):
        asyncio.run(client.completions.create(model="gpt-9", prompt="a"))


def test_a_body_without_the_json_header_names_the_header(http):
    """It said `Input should be a valid dictionary`, which the body was. curl -d sends a form's header, fetch text."""

    async def ask():
        body = b'{"prompt": "a"}'
        kinds = ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"})
        paths = ("/v1/completions", "/v1/chat/completions")
        return [await http.post(path, content=body, headers=kind) for path in paths for kind in kinds]

    for answer in asyncio.run(ask()):
        assert answer.status_code == 400
        wanted = "the body was not read as JSON: send the header content-type: application/json"
        assert answer.json()["error"]["message"] == wanted


def test_models_health_and_metrics(http):
    async def ask():
        return [await http.get(path) for path in ("/v1/models", "/v1/models/tiny-fox", "/health", "/metrics", "/")]

    models, model, health, metrics, page = asyncio.run(ask())
    assert models.json()["data"] == [model.json()]
    assert health.json() == {"status": "ready"}
    assert "dlm_requests_total" in metrics.text and 'dlm_batch_rows_bucket{le="+Inf"}' in metrics.text
    assert page.status_code == 200 and "<html" in page.text


def test_frozen_settings_refuse_nonsense():
    from dlm.serving.engine import EngineSettings
    from dlm.serving.server import ServerSettings

    for wrong in ({"max_rows": 0}, {"timeout": 0.0}, {"kv_bytes": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EngineSettings(**wrong)
    with pytest.raises(ValueError, match="API key is empty"):
        ServerSettings(api_key=" ")
    assert dataclasses.fields(EngineSettings)
