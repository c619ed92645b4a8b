"""/v1/messages and /v1/responses give what the chat gives, each in its own form, and to the clients that people use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")

import httpx
from serve.servers import server, write_model

from fastgpt.serve.guard import Limits

KEY = "secret"
ASKED = "the cat"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = write_model(tmp_path_factory.mktemp("model"))
    with server(folder, limits=Limits(body=10_000, keys=(KEY,))) as (_, found):
        found.headers["x-api-key"] = KEY
        yield found


def chat(client: httpx.Client, **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": ASKED}]
    body = {"messages": messages, "max_tokens": 12, "temperature": 0, **more}
    return client.post("/v1/chat/completions", json=body).json()


def message(**more: Any) -> dict[str, Any]:
    user = {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]}
    return {"messages": [user], "system": "be brief", "max_tokens": 12, "temperature": 0, **more}


def response(**more: Any) -> dict[str, Any]:
    return {"input": ASKED, "instructions": "be brief", "max_output_tokens": 12, "temperature": 0, **more}


def streamed(client: httpx.Client, route: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the events; each has its name in front."""
    text = client.post(route, json={**body, "stream": True}).text
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_messages_are_those_of_the_chat(client: httpx.Client) -> None:
    expected = chat(client)
    answer = client.post("/v1/messages", json=message()).json()
    assert answer["content"] == [{"type": "text", "text": expected["choices"][0]["message"]["content"]}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("max_tokens", None)
    used, usage = expected["usage"], answer["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == used["prompt_tokens"]
    assert usage["output_tokens"] == used["completion_tokens"]
    assert answer["role"] == "assistant" and answer["model"] == "m"


def test_a_message_names_its_stop_sequence(client: httpx.Client) -> None:
    text = chat(client)["choices"][0]["message"]["content"]
    stop = text[3:5]
    answer = client.post("/v1/messages", json=message(stop_sequences=["\0none", stop])).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
    assert answer["content"][0]["text"] == text[: text.index(stop)]


def test_a_stream_of_messages(client: httpx.Client) -> None:
    whole = client.post("/v1/messages", json=message()).json()
    start, begin, *parts, end, last, stop = streamed(client, "/v1/messages", message())
    kinds = [e["type"] for e in (start, begin, end, last, stop)]
    ends = ["content_block_stop", "message_delta", "message_stop"]
    assert kinds == ["message_start", "content_block_start", *ends]
    assert "".join(p["delta"]["text"] for p in parts) == whole["content"][0]["text"] and len(parts) > 1
    assert {p["type"] for p in parts} == {"content_block_delta"}
    assert last["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert last["usage"]["output_tokens"] == 12
    for used in (whole["usage"], last["usage"]):  # the start does not know yet what is in the cache
        assert used["input_tokens"] + used["cache_read_input_tokens"] == start["message"]["usage"]["input_tokens"]


def test_responses_are_those_of_the_chat(client: httpx.Client) -> None:
    expected = chat(client)
    text = expected["choices"][0]["message"]["content"]
    answer = client.post("/v1/responses", json=response()).json()
    (item,) = answer["output"]
    assert item["content"] == [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["usage"]["total_tokens"] == expected["usage"]["total_tokens"]
    again = [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}, item, {"role": "user", "content": "b"}]
    more = client.post("/v1/responses", json={"input": again, "max_output_tokens": 3, "temperature": 0})
    turns = [("user", "a"), ("assistant", text), ("user", "b")]
    said = chat(client, messages=[{"role": role, "content": t} for role, t in turns], max_tokens=3)
    assert more.json()["output"][0]["content"][0]["text"] == said["choices"][0]["message"]["content"]


def test_a_stream_of_responses(client: httpx.Client) -> None:
    whole = client.post("/v1/responses", json=response()).json()
    found = streamed(client, "/v1/responses", response())
    assert [e["sequence_number"] for e in found] == list(range(len(found)))
    assert found[0]["type"] == "response.created" and found[0]["response"]["status"] == "in_progress"
    parts = [e["delta"] for e in found if e["type"] == "response.output_text.delta"]
    assert "".join(parts) == whole["output"][0]["content"][0]["text"] and len(parts) > 1
    assert found[-1]["type"] == "response.incomplete"
    for name in ("status", "usage", "incomplete_details", "temperature"):
        assert found[-1]["response"][name] == whole[name]


IMAGE = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
WRONG: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "no max_tokens": ("messages", 400, "max_tokens is missing", {"messages": [{"role": "user", "content": "a"}]}),
    "image": ("messages", 400, "messages.0.content.0.type: ", message(messages=IMAGE)),
    "message tools": ("messages", 400, "tools: ", message(tools=[{"name": "f"}])),
    "thinking": ("messages", 400, "thinking.type: ", message(thinking={"type": "enabled", "budget_tokens": 1024})),
    "message too long": ("messages", 400, "expected at most 64 in all", message(max_tokens=64)),
    "message model": ("messages", 404, "there is no model 'x'", message(model="x")),
    "large message": ("messages", 413, "the body is too long", message(system="a" * 20_000)),
    "reasoning": ("responses", 400, "reasoning is not known", response(reasoning={"effort": "low"})),
    "previous": ("responses", 400, "previous_response_id is not known", response(previous_response_id="resp-1")),
    "store": ("responses", 400, "store: ", response(store=True)),
    "response tools": ("responses", 400, "tools: ", response(tools=[{"type": "web_search"}])),
    "format": ("responses", 400, "text.format: ", response(text={"format": {"type": "xml"}})),
    "item": ("responses", 400, "input.0.type: ", response(input=[{"type": "reasoning", "summary": []}])),
    "response too long": ("responses", 400, "expected at most 64 in all", response(max_output_tokens=64)),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_supported_is_named(case: str, client: httpx.Client) -> None:
    route, status, said, body = WRONG[case]
    for stream in (False, True):
        answer = client.post(f"/v1/{route}", json={**body, "stream": stream})
        found = answer.json()
        assert (answer.status_code, said in found["error"]["message"]) == (status, True), answer.text
        assert (found.get("type") == "error") == (route == "messages")


def test_a_missing_key_has_the_form_of_the_route(client: httpx.Client) -> None:
    for route, kind in (("messages", "error"), ("responses", None)):
        answer = httpx.post(f"{client.base_url}/v1/{route}".replace("//v1", "/v1"), json={})
        assert answer.status_code == 401 and answer.json().get("type") == kind
        assert answer.json()["error"]["type"] == "authentication_error"


def test_the_client_of_anthropic(client: httpx.Client) -> None:
    anthropic = pytest.importorskip("anthropic")
    asked: dict[str, Any] = {**message(), "model": "m"}
    asked["extra_body"] = {"temperature": asked.pop("temperature")}  # anthropic 2.14 has no argument for it
    text = chat(client)["choices"][0]["message"]["content"]
    api = anthropic.Anthropic(base_url=str(client.base_url).rstrip("/"), api_key=KEY, max_retries=0)
    assert api.messages.create(**asked).content[0].text == text
    with api.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == text
        assert stream.get_final_message().stop_reason == "max_tokens"
    with pytest.raises(anthropic.NotFoundError):
        api.messages.create(**{**asked, "model": "x"})


def test_the_client_of_openai(client: httpx.Client) -> None:
    openai = pytest.importorskip("openai")
    text = chat(client)["choices"][0]["message"]["content"]
    api = openai.OpenAI(base_url=f"{client.base_url}/v1".replace("//v1", "/v1"), api_key=KEY, max_retries=0)
    assert api.responses.create(model="m", **response()).output_text == text
    with api.responses.stream(model="m", **response()) as stream:
        found = [e.delta for e in stream if e.type == "response.output_text.delta"]
    assert "".join(found) == text
    turns: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": ASKED}]
    settings: dict[str, Any] = {"model": "m", "messages": turns, "max_tokens": 12, "temperature": 0}
    assert api.chat.completions.create(**settings).choices[0].message.content == text
    chunks = api.chat.completions.create(**settings, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
    with pytest.raises(openai.BadRequestError, match="store"):
        api.responses.create(model="m", **response(store=True))
