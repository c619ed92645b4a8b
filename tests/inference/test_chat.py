"""Conversations: what a template gives the model, where a reply ends, and which turns go."""

from __future__ import annotations

import argparse
import io

import pytest
from small_models import byte_tokenizer, model_that_says

from fastgpt.core.errors import UserError
from fastgpt.data import Tokenizer
from fastgpt.inference import Generator, Piece
from fastgpt.inference.chat import Conversation, Template
from fastgpt.inference.terminal import add_options, chat

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


def test_the_default_template() -> None:
    template = Template()
    assert template.render(TURNS) == "System: s\nUser: u\nAssistant:"
    assert template.stop == "\nUser:"


def test_a_template_of_a_run_equals_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = Template(CHATML, "x")
    theirs = render_jinja_template([TURNS], chat_template=CHATML, add_generation_prompt=True)[0][0]
    assert template.render(TURNS) == theirs
    assert template.stop == "<|im_end|>"


def test_a_template_cannot_leave_its_sandbox() -> None:
    with pytest.raises(UserError, match="x is not a valid chat template"):
        Template("{{ messages.__class__.__mro__[1].__subclasses__() }}", "x")


def test_special_tokens_of_the_template_become_ids_and_messages_may_not_hold_them() -> None:
    tokenizer = byte_tokenizer()
    text = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    conversation = Conversation(Template(text, "x", "<|endoftext|>"), tokenizer, 100)
    assert conversation.ask("hi") == ([*tokenizer.encode("hi"), tokenizer.eot], 0)
    assert conversation.template.stop == "<|endoftext|>"
    with pytest.raises(UserError, match="the message contains <|endoftext|>, expected text without special tokens"):
        conversation.ask("a<|endoftext|>b")


def test_whole_turns_are_dropped_and_the_system_message_stays() -> None:
    tokenizer = byte_tokenizer()
    conversation = Conversation(Template(), tokenizer, 70, system="be kind")
    sizes = []
    for i in range(6):
        ids, dropped = conversation.ask(f"question {i}")
        text = tokenizer.decode(ids)
        assert text.startswith("System: be kind\nUser: question ") and text.endswith(f"User: question {i}\nAssistant:")
        assert len(ids) <= 70 and text.count("User:") == text.count("Assistant:")
        conversation.answer("ok")
        sizes.append((text.count("User:"), dropped))
    assert sizes == [(1, 0), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1)]
    with pytest.raises(UserError, match="the message needs 93 tokens, expected at most 70"):
        conversation.ask("x" * 60)
    ids, dropped = conversation.ask("q")  # what was refused left no trace
    text = tokenizer.decode(ids)
    assert dropped == 0 and "question 5\nAssistant: ok\nUser: q\n" in text


def talk(lines: list[str], monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, *options: str) -> int:
    script = list(b"ok\nUser: " * 30)
    model = model_that_says([int(i) for i in tokenizer.encode(bytes(script).decode())], tokenizer.n_vocab)
    parser = argparse.ArgumentParser()
    add_options(parser, "")
    args = parser.parse_args(["--temperature", "0", *options])
    args.system = ""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    return chat(model, tokenizer, Template(), args)


def test_replies_end_before_the_next_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(["hello", "again", "/quit", "more"], monkeypatch, byte_tokenizer()) == 0
    out = capsys.readouterr()
    assert len(out.out.splitlines()) == 2 and all(line.endswith("ok") for line in out.out.splitlines())
    assert out.err == ""


def test_a_reply_can_be_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls, step = [], Generator.step

    def interrupted(self: Generator) -> list[Piece]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Generator, "step", interrupted)
    assert talk(["hello", "again"], monkeypatch, byte_tokenizer()) == 0
    out = capsys.readouterr()
    assert out.err == "(interrupted)\n" and len(out.out.splitlines()) == 2 and out.out.endswith("k\n")


def test_replies_are_cut_and_that_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk(["", "hello", "/quit"], monkeypatch, byte_tokenizer(), "--tokens", "1") == 0
    out = capsys.readouterr()
    assert len(out.out) <= 2 and out.err == "(cut after 1 token)\n"
