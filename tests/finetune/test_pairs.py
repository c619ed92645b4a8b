"""`fastgpt finetune make-pairs`: pairs that DPO reads, by an endpoint and by a model of our own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_rows import write_rows
from chat_server import ChatServer, chat_server
from small_models import byte_tokenizer, model_that_says, run_of

from fastgpt.core.errors import UserError
from fastgpt.finetune.asking.dialogue import LEFT_OUT, Ask
from fastgpt.finetune.asking.own import OwnModel
from fastgpt.finetune.command import main
from fastgpt.finetune.examples import load_pairs
from fastgpt.finetune.pairs.command import read_prompts
from fastgpt.finetune.pairs.constitution import load_constitution
from fastgpt.inference.chat import Template
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT

ROOT = Path(__file__).parents[2]
RULES = """\
rules:
  - name: kind
    critique: "critique: unkind?"
    revision: "revise: kinder"
    comparison: Which is kinder?
    examples:
      - {prompt: e1, answer: e2, critique: e3, revision: e4}
  - name: short
    critique: "critique: too long?"
    revision: "revise: shorter"
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rules.yaml").write_text(RULES)
    write_rows(Path("prompts.jsonl"), *({"prompt": f"q{i}"} for i in range(6)))


def says(request: dict[str, Any]) -> Any:
    """Answer, criticise and revise, so that one prompt gives equal sides and one an empty answer."""
    asked, turns = request["messages"][-1]["content"], [m["content"] for m in request["messages"]]
    if "top_logprobs" in request:
        first = turns[0].partition("Answer A:\n")[2].partition("\n")[0]
        # the longer number is better by 2; the letter A is preferred by 1
        d = 1.0 + (2.0 if first.endswith("7") else -2.0)
        tokens = [{"token": "A", "logprob": -1.0}, {"token": "B", "logprob": -1.0 - d}]
        return {"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": tokens}]}}
    if asked.startswith("critique"):
        return "it could be better"
    if asked.startswith("revise"):
        prompt = turns[-5]
        return f"answer to {prompt}" if prompt == "q2" else f" better answer to {prompt}\n"
    return "" if asked == "q4" else f"answer to {asked}"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server(says) as state:
        yield state


def make(*more: str) -> list[dict[str, Any]]:
    assert main(["make-pairs", "rules.yaml", "--prompts", "prompts.jsonl", "--out", "pairs.jsonl", *more]) == 0
    return [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]


def test_an_answer_its_critique_and_its_revision(server: ChatServer, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make("--endpoint", server.url, "--model", "m", "--seed", "3")
    assert [row["prompt"][0]["content"] for row in rows] == ["q0", "q1", "q3", "q5"]
    assert {row["rule"] for row in rows} == {"kind", "short"}
    row = rows[0]
    assert row["chosen"] == [{"role": "assistant", "content": "better answer to q0"}]
    assert row["rejected"] == [{"role": "assistant", "content": "answer to q0"}]
    assert (row["answer"], row["critique"], row["model"]) == ("answer to q0", "it could be better", "m")
    assert row["revision"] == " better answer to q0\n"
    said = capsys.readouterr().out
    assert "pairs.jsonl: 4 pairs of 6 prompts; 1 left out: empty answer; 1 left out: equal sides" in said
    shown = next(r["messages"] for r in server.requests if len(r["messages"]) == 11)
    assert [m["content"] for m in shown[:6]] == ["e1", "e2", "critique: unkind?", "e3", "revise: kinder", "e4"]
    pairs = load_pairs("pairs.jsonl", byte_tokenizer(), Template(), 200).items
    assert byte_tokenizer().decode(pairs[0].chosen.ids).startswith("User: q0\nAssistant: better answer to q0\n")
    assert not Path("pairs.jsonl.part").exists()


def test_two_answers_are_compared_in_both_orders(server: ChatServer) -> None:
    def numbered(request: dict[str, Any]) -> Any:
        return says(request) if "top_logprobs" in request else f"a {7 if request['seed'] % 2 else 8}"

    server.answer = numbered
    rows = make("--endpoint", server.url, "--model", "m", "--mode", "compare", "--at-once", "1")
    assert rows and all(row["chosen"][0]["content"] == "a 7" for row in rows)
    assert all(row["rejected"][0]["content"] == "a 8" and sorted(row["answers"]) == ["a 7", "a 8"] for row in rows)
    assert all(row["margin"] == pytest.approx(2) and row["position_bias"] == pytest.approx(1) for row in rows)
    assert {row["rule"] for row in rows} == {"kind"}  # the other has no comparison
    question = next(r["messages"] for r in server.requests if "top_logprobs" in r)
    assert len(question) == 1 and "Which is kinder?" in question[0]["content"]
    assert len({r["seed"] for r in server.requests if "top_logprobs" not in r}) == 12


def test_an_interrupted_command_goes_on_and_asks_no_row_again(server: ChatServer) -> None:
    whole = make("--endpoint", server.url, "--model", "m")
    Path("pairs.jsonl").unlink()
    server.requests.clear()

    def breaks(request: dict[str, Any]) -> Any:
        if request["messages"][-1]["content"] == "q3":
            server.failures = [(503, {}, "down")] * 9
        return says(request)

    server.answer = breaks
    options = ("--endpoint", server.url, "--model", "m", "--at-once", "1")
    with pytest.raises(UserError, match=r"answers 503 .*run the command again to continue"):
        make(*options, "--retries", "0")
    assert not Path("pairs.jsonl").exists()
    kept = [json.loads(line) for line in Path("pairs.jsonl.part").read_text().splitlines()][1:]
    assert len(kept) >= 2 and LEFT_OUT in kept[2]
    with pytest.raises(UserError, match=r"pairs.jsonl.part was begun with another temperature"):
        make(*options, "--temperature", "0.5")
    server.answer, before = says, len(server.requests)
    server.failures.clear()
    assert make(*options) == whole
    again = {r["messages"][-1]["content"] for r in server.requests[before:]}
    assert {"q3", "q4", "q5"} <= again and not {"q0", "q1"} & again


def test_no_pair_at_all_is_an_error(server: ChatServer) -> None:
    server.answer = lambda request: "the same"
    with pytest.raises(UserError, match="no pair came of 6 prompts; 6 left out: equal sides"):
        make("--endpoint", server.url, "--model", "m")
    assert not Path("pairs.jsonl").exists()


def random_model(scale: float) -> GPT:
    model = GPT(ModelConfig(n_layers=1, n_heads=1, width=16, vocab_size=257, vocab_multiple=1, block_size=700))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * scale)
    return model


def test_a_model_of_our_own_makes_the_same_pairs_in_batches_of_any_size() -> None:
    """Its logits are all 0, so rounding decides no token."""
    run = run_of(random_model(0.0), "run")
    options = ("--model", run, "--max-tokens", "8", "--device", "cpu")
    found = {}
    for at_once in ("1", "4"):
        found[at_once] = make(*options, "--at-once", at_once, "--keep-cut")
        Path("pairs.jsonl").unlink()
    assert found["1"] == found["4"] and len(found["1"]) >= 3
    assert len({row["answer"] for row in found["1"]}) == len(found["1"])
    with pytest.raises(UserError, match="left out: answer longer than max_tokens"):
        make(*options)
    write_rows(Path("prompts.jsonl"), {"prompt": "long " * 200}, {"prompt": "a<|endoftext|>"})
    Path("pairs.jsonl.part").unlink()
    with pytest.raises(
        UserError, match="1 left out: a text holds a special token; 1 left out: longer than the context"
    ):
        make(*options)


def test_from_a_constitution_to_a_step_of_dpo() -> None:
    run = run_of(random_model(0.02), "run")
    make("--model", run, "--max-tokens", "8", "--device", "cpu", "--keep-cut")
    sizes = "--block-size 128 --batch 2 --micro-batch 2 --max-steps 1 --val-fraction 0.2 --device cpu --out aligned"
    assert main(["--task", "dpo", "--base", run, "--data", "pairs.jsonl", *sizes.split()]) == 0
    rows = [json.loads(line) for line in Path("aligned/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_text_of_a_model_is_its_reply() -> None:
    text = "User: q\nAssistant: yes\nUser:"
    ids = [*byte_tokenizer().encode(text).tolist(), byte_tokenizer().eot]
    model = OwnModel(run_of(model_that_says([*ids[1:], 0] + [0] * 9, 257), "run"), device="cpu")

    def dialogue() -> Any:
        (reply,) = yield [Ask([{"role": "user", "content": "q"}], max_tokens=12, temperature=0.0)]
        return {"text": reply.text, "cut": reply.cut}

    assert list(model.records([dialogue()])) == [{"text": " yes", "cut": False}]  # "User:" begins the next message


def test_labels_have_the_log_probabilities_of_the_logits() -> None:
    model = OwnModel(run_of(random_model(0.3), "run"), device="cpu")
    ask = Ask([{"role": "user", "content": "A or B?"}], labels=("A", "B"))

    def dialogue() -> Any:
        (reply,) = yield [ask]
        return {"logprobs": reply.logprobs}

    (record,) = model.records([dialogue()])
    for label, found in zip("AB", record["logprobs"]):
        ids = byte_tokenizer().encode(f"User: A or B?\nAssistant: {label}").tolist()
        with torch.no_grad():
            logits = model.engine.model.double()(torch.tensor([ids]))[0].log_softmax(-1)
        expected = sum(float(logits[at - 1, ids[at]]) for at in (len(ids) - 2, len(ids) - 1))
        assert found == pytest.approx(expected, abs=1e-4) and math.isfinite(found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "rules.yaml, line 1: the file holds no mapping"),
        ("rules: []", "rules.yaml, line 1: rules is empty"),
        ("rule:\n", r"rules.yaml, line 1: rule is not a key \(did you mean rules\?\)"),
        (RULES.replace("revision", "revison"), r"rules.yaml, line 4: rules\[0\].revison is not a key"),
        (RULES.replace('    revision: "revise: shorter"\n', ""), r"rules.yaml, line 8: rules\[1\].revision is missing"),
        (RULES.replace('"critique: unkind?"', '" "'), r"rules.yaml, line 3: rules\[0\].critique is empty"),
        (RULES.replace("short", "kind", 1), r"rules.yaml, line 8: rules\[1\].name is 'kind' for the second time"),
        (RULES.replace("answer: e2", "answer: ''"), r"line 7: rules\[0\].examples\[0\].answer is empty"),
        (RULES.replace("answer: e2", "answer: [e2]"), r"line 7: rules\[0\].examples\[0\].answer is '\[e2\]', expected"),
        ("rules: [", "rules.yaml, line 1: not valid YAML"),
    ],
)
def test_errors_name_file_line_and_key(text: str, message: str) -> None:
    Path("rules.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        load_constitution("rules.yaml")
    assert "\n" not in str(raised.value)


REFUSED = {
    "--model x --key-env K": "--key-env has no effect here: it only applies with --endpoint",
    "--model x --endpoint http://localhost/v1 --device cpu": "--device has no effect here",
    "--model x --endpoint http://localhost/v1 --key-env NO_KEY_HERE": "the environment variable NO_KEY_HERE is not set",
    "--model x --endpoint http://localhost/v1 --body [1]": "--body is .*, expected an object of JSON",
    "--model x --mode compare --temperature 0": "--temperature is 0, expected more with --mode compare",
    "--model x --prompts no.jsonl": "no.jsonl",
    "--model no": "no is not a folder, expected a run",
    "--model x --out rules.yaml": "rules.yaml exists, expected a new file",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_does_not_fit_is_one_sentence(options: str) -> None:
    with pytest.raises(UserError, match=REFUSED[options]) as raised:
        make(*options.split())
    assert "\n" not in str(raised.value) and not list(Path().glob("pairs*"))


def test_a_rule_without_comparison_cannot_compare() -> None:
    Path("rules.yaml").write_text(RULES.replace("    comparison: Which is kinder?\n", ""))
    with pytest.raises(UserError, match="no rule of the constitution has the key comparison"):
        make("--model", "x", "--mode", "compare")


def test_prompts_of_conversations_are_what_is_before_the_last_reply() -> None:
    turns = [{"role": role, "content": f"c{i}"} for i, role in enumerate(["user", "assistant", "user", "assistant"])]
    write_rows(Path("chat.jsonl"), {"messages": turns}, {"messages": turns[:3]})
    assert read_prompts("chat.jsonl") == [turns[:3]] * 2
    assert read_prompts("chat.jsonl", 1) == [turns[:3]]


def test_prompts_end_with_the_user() -> None:
    write_rows(Path("prompts.jsonl"), {"prompt": "q"}, {"prompt": [{"role": "assistant", "content": "a"}]})
    with pytest.raises(UserError, match="prompts.jsonl.*line 2.*of the role assistant, expected the user's"):
        make("--model", "x")


def test_the_example_is_valid() -> None:
    rules = load_constitution(ROOT / "recipes" / "finetune" / "constitution.yaml").rules
    assert len(rules) >= 4 and all(rule.comparison for rule in rules) and any(rule.examples for rule in rules)
