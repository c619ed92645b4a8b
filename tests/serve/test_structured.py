"""Structured output and the other settings of texts, over HTTP, in every form in which clients ask for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

import httpx
from serve.servers import server, write_model

from fastgpt.data import train_tokenizer
from fastgpt.inference.chat import DEFAULT, Template
from fastgpt.serve.errors import ApiError
from fastgpt.serve.infill import infill
from fastgpt.serve.served import Served

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["cat", "mat"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a", "n"],
    "additionalProperties": False,
}
ASKED = [{"role": "user", "content": "the cat"}]
NAMED = {"name": "answer", "schema": SCHEMA, "strict": True}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, httpx.Client]]:
    with server(write_model(tmp_path_factory.mktemp("model"))) as found:
        yield found


@pytest.fixture(scope="module")
def client(running: tuple[Served, httpx.Client]) -> httpx.Client:
    return running[1]


def chat(**more: Any) -> dict[str, Any]:
    return {"messages": ASKED, "max_tokens": 40, "seed": 3, "temperature": 0.7, **more}


def is_object(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"a", "n"} and value["a"] in ("cat", "mat") and 0 <= value["n"] <= 99


def whole(pattern: str) -> Any:
    return lambda text: re.fullmatch(pattern, text) is not None


OUTPUTS: dict[str, tuple[dict[str, Any], Any]] = {
    "regex": ({"regex": "[a-c]{2,5}"}, whole("[a-c]{2,5}")),
    "choice": ({"choice": ["yes", "nö"]}, whole("yes|nö")),
    "grammar": ({"grammar": 'start: "a" ("b" | "c")'}, whole("a[bc]")),
    "json": ({"json": SCHEMA}, is_object),
    "json as a text": ({"json": json.dumps(SCHEMA)}, is_object),
}


def biased(served: Served) -> dict[str, float]:
    """Return a bias against blanks, with which a random model would fill the room that JSON has for them."""
    tokens = [(i, served.tokenizer.decode_bytes([i])) for i in range(served.tokenizer.n_vocab)]
    return {str(i): -100.0 for i, text in tokens if text[:1] in (b" ", b"\t", b"\r", b"\n")}


@pytest.mark.parametrize("name", OUTPUTS)
def test_structured_outputs(name: str, running: tuple[Served, httpx.Client]) -> None:
    (served, client), (outputs, fits) = running, OUTPUTS[name]
    more = {"structured_outputs": outputs, "logit_bias": biased(served), "n": 2}
    answer = client.post("/v1/chat/completions", json=chat(**more)).json()
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop" and fits(choice["message"]["content"]), choice
    body = {"prompt": ["the", "cat"], "max_tokens": 40, "temperature": 1.5, **more}
    for choice in client.post("/v1/completions", json=body).json()["choices"]:
        assert choice["finish_reason"] == "stop" and fits(choice["text"]), choice


def test_formats_of_the_three_apis(running: tuple[Served, httpx.Client]) -> None:
    served, client = running
    asked = {"type": "json_schema", "json_schema": NAMED}
    answer = client.post("/v1/chat/completions", json=chat(response_format=asked, logit_bias=biased(served))).json()
    assert is_object(answer["choices"][0]["message"]["content"])
    some = client.post("/v1/chat/completions", json=chat(response_format={"type": "json_object"})).json()
    assert some["choices"][0]["message"]["content"].startswith("{")
    form = {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA}}
    response = client.post("/v1/responses", json={"input": "the", "max_output_tokens": 40, "text": form}).json()
    text = response["output"][0]["content"][0]["text"]
    assert text.startswith("{") and (response["status"] == "incomplete" or is_object(text))
    assert response["text"] == form
    body = {"messages": ASKED, "max_tokens": 40, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    message = client.post("/v1/messages", json=body).json()
    text = message["content"][0]["text"]
    assert text.startswith("{") and (message["stop_reason"] == "max_tokens" or is_object(text))


def test_a_stream_is_the_same_text_and_a_cut_one_says_so(client: httpx.Client) -> None:
    for body in (chat(structured_outputs={"regex": "(ab|c){3,9}"}), chat(structured_outputs={"regex": "a{50}"})):
        expected = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        lines = client.post("/v1/chat/completions", json={**body, "stream": True}).text.split("\n\n")
        chunks = [
            json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line and "[DONE]" not in line
        ]
        assert "".join(c["delta"].get("content", "") for c in chunks) == expected["message"]["content"]
        assert chunks[-1]["finish_reason"] == expected["finish_reason"]
    assert expected["finish_reason"] == "length" and expected["message"]["content"] == "a" * len(
        expected["message"]["content"]
    )


DEEP: Any = {}
for _ in range(150):
    DEEP = {"items": DEEP}
WIDE = {"enum": [f"value {i}" for i in range(4000)]}
FORMAT = {"type": "json_schema", "json_schema": NAMED}
TOO_MUCH = {"regex": "(((a{100}){100}){100})"}
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "keyword": ("chat/completions", chat(structured_outputs={"json": {"not": {}}}), "grammar: the json_schema cannot"),
    "deep": ("chat/completions", chat(structured_outputs={"json": DEEP}), "recursion limit exceeded"),
    "wide": ("chat/completions", chat(structured_outputs={"json": WIDE}), "expected at most 32,768"),
    "regex": ("completions", {"prompt": "a", "structured_outputs": {"regex": "["}}, "unclosed character class"),
    "limit": ("completions", {"prompt": "a", "structured_outputs": TOO_MUCH}, "the text cannot be continued"),
    "two fields": (
        "completions",
        {"prompt": "a", "structured_outputs": {"regex": "a", "choice": ["b"]}},
        "has 2 fields",
    ),
    "no field": ("completions", {"prompt": "a", "structured_outputs": {}}, "has 0 fields, expected one of json"),
    "unknown field": ("completions", {"prompt": "a", "structured_outputs": {"structural_tag": "x"}}, "is not known"),
    "two ways": (
        "chat/completions",
        chat(structured_outputs={"regex": "a"}, response_format=FORMAT),
        "response_format and structured_outputs are both given",
    ),
    "ignore_eos": (
        "completions",
        {"prompt": "a", "structured_outputs": {"regex": "a"}, "ignore_eos": True},
        "ignore_eos",
    ),
    "format": ("chat/completions", chat(response_format={"type": "xml"}), "response_format"),
    "no schema": ("chat/completions", chat(response_format={"type": "json_schema"}), "json_schema is missing"),
    "responses": ("responses", {"input": "a", "text": {"format": {"type": "json_schema", "name": "x"}}}, "is missing"),
    "messages": (
        "messages",
        {
            "messages": ASKED,
            "max_tokens": 5,
            "output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}},
        },
        "grammar: the json_schema cannot",
    ),
    "bias": ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    "bias of no token": ("completions", {"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias has ids beyond"),
    "large bias": ("completions", {"prompt": "a", "logit_bias": {"1": 101}}, "less than or equal to 100"),
    "large penalty": ("completions", {"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
    "suffix": ("completions", {"prompt": "a", "suffix": "b"}, "the tokenizer has no fill-in-the-middle tokens"),
    "suffix of ids": ("completions", {"prompt": [1], "suffix": "b"}, "suffix is for one prompt that is a text"),
    "best_of": ("completions", {"prompt": "a", "best_of": 2}, "best_of"),
    "nothing to continue": ("chat/completions", chat(continue_final_message=True), "expected a last message of the"),
    "continue and ask": (
        "chat/completions",
        chat(
            messages=[*ASKED, {"role": "assistant", "content": "a"}],
            continue_final_message=True,
            add_generation_prompt=True,
        ),
        "are both true",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_are_one_sentence(name: str, client: httpx.Client) -> None:
    route, body, expected = WRONG[name]
    answer = client.post(f"/v1/{route}", json=body)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and expected in message and "\n" not in message, message


def test_bias_and_penalties_decide(running: tuple[Served, httpx.Client]) -> None:
    served, client = running
    token = int(served.tokenizer.encode("x")[0])
    body = {"prompt": "the", "max_tokens": 6, "temperature": 0}
    assert (
        client.post("/v1/completions", json={**body, "logit_bias": {str(token): 100}}).json()["choices"][0]["text"]
        == "x" * 6
    )
    one, two = ({str(token): 100, str(token + 1): 99.5}, dict(presence_penalty=2, frequency_penalty=2))
    text = client.post("/v1/completions", json={**body, "logit_bias": one, **two}).json()["choices"][0]["text"]
    assert {"x", "y"} <= set(text)


def test_a_last_message_of_the_assistant_is_continued(client: httpx.Client) -> None:
    begun = [*ASKED, {"role": "assistant", "content": "on the"}]
    plain = {"max_tokens": 8, "temperature": 0}
    prompt = {"prompt": "User: the cat\nAssistant: on the", **plain, "stop": ["User:"]}
    expected = client.post("/v1/completions", json=prompt).json()
    message = client.post("/v1/messages", json={"messages": begun, **plain}).json()
    assert message["content"][0]["text"] == expected["choices"][0]["text"]
    used = message["usage"]
    assert used["input_tokens"] + used["cache_read_input_tokens"] == expected["usage"]["prompt_tokens"]
    body = {"messages": begun, **plain, "continue_final_message": True, "add_generation_prompt": False}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == expected["choices"][0]["text"]
    bare = client.post("/v1/chat/completions", json={"messages": ASKED, "add_generation_prompt": False, **plain}).json()
    assert bare["usage"]["prompt_tokens"] < answer["usage"]["prompt_tokens"]


def test_tokens_of_messages_are_counted(client: httpx.Client) -> None:
    marked = {"type": "text", "text": "the cat", "cache_control": {"type": "ephemeral", "ttl": "5m"}}
    body = {"messages": [{"role": "user", "content": [marked]}], "system": [{**marked, "text": "be brief"}]}
    counted = client.post("/v1/messages/count_tokens", json=body).json()
    settings = {"max_tokens": 4, "temperature": 0, "metadata": {"user_id": "somebody"}}
    answer = client.post("/v1/messages", json={**body, **settings}).json()
    used = answer["usage"]
    assert counted == {"input_tokens": used["input_tokens"] + used["cache_read_input_tokens"]}
    plain = {"messages": ASKED, "system": "be brief"}
    assert client.post("/v1/messages", json={**plain, **settings}).json()["content"] == answer["content"]
    wrong = client.post("/v1/messages/count_tokens", json={**body, "max_tokens": 4})
    assert wrong.status_code == 400 and wrong.json()["error"]["message"].startswith("max_tokens is not known")


@pytest.mark.parametrize(
    "template, expected",
    [
        (DEFAULT, "User: a\nAssistant: b "),
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}",
            "<|user|>a<|end|><|assistant|>b ",
        ),
    ],
)
def test_a_template_leaves_the_last_message_open(template: str, expected: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}]
    assert Template(template).render_open(messages) == expected


def test_infilling_needs_its_tokens() -> None:
    marks = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    tokenizer = train_tokenizer(["a b"], 270, marks)
    ids = infill(tokenizer, "def f(", "return x")
    assert tokenizer.decode(ids) == "<|fim_prefix|>def f(<|fim_suffix|>return x<|fim_middle|>"
    assert [i for i in ids if i in tokenizer.specials.values()] == [tokenizer.specials[m] for m in marks]
    with pytest.raises(ApiError, match="no fill-in-the-middle tokens"):
        infill(train_tokenizer(["a b"], 270), "a", "b")


def test_the_clients_ask_for_structured_output(running: tuple[Served, httpx.Client]) -> None:
    openai, anthropic = pytest.importorskip("openai"), pytest.importorskip("anthropic")
    served, client = running
    url, extra = str(client.base_url).rstrip("/"), {"logit_bias": biased(served)}
    api = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    form: Any = {"type": "json_schema", "json_schema": NAMED}
    asked: dict[str, Any] = dict(model="m", messages=ASKED, max_tokens=40)
    answer = api.chat.completions.create(**asked, response_format=form, extra_body=extra)
    assert is_object(answer.choices[0].message.content)
    some = api.completions.create(model="m", prompt="a", extra_body={"structured_outputs": {"choice": ["b", "c"]}})
    assert some.choices[0].text in ("b", "c")
    with pytest.raises(openai.BadRequestError, match="the regex cannot be used"):
        api.completions.create(model="m", prompt="a", extra_body={"structured_outputs": {"regex": "["}})
    other = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    message = other.messages.create(**asked, output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    assert message.content[0].text.startswith("{")
    counted = other.messages.count_tokens(model="m", messages=ASKED)
    assert counted.input_tokens == message.usage.input_tokens
