"""Encoding: ids are those of inference, replies are learned with what ends them, specials stay the template's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_rows import CHATML, MARKED, MARKS, TURNS, chat_tokenizer, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece_models import MODELS, sentencepiece_folder
from small_models import byte_tokenizer

from fastgpt.core.errors import UserError
from fastgpt.data.load import load_tokenizer
from fastgpt.finetune.encode import Encoder
from fastgpt.finetune.examples import Rows, load_examples, load_pairs
from fastgpt.finetune.formats import Chat, Text, Wrong
from fastgpt.finetune.render import rendered, summary
from fastgpt.inference.chat import Template

EOT = "<|endoftext|>"


def marked(encoder: Encoder, source: Any) -> str:
    return rendered(encoder.example(source), encoder.tokenizer)


def test_replies_of_chatml_are_learned_with_their_end() -> None:
    encoder = Encoder(chat_tokenizer(), Template(CHATML, "x"))
    assert marked(encoder, Chat(TURNS)) == (
        "<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\nthe cat?<|im_end|>\n"
        "<|im_start|>assistant\n[[the dog<|im_end|>]]\n<|im_start|>user\nand on<|im_end|>\n"
        "<|im_start|>assistant\n[[sat <|im_end|>]]\n"
    )
    assert marked(encoder, Chat(TURNS, first=3)).count("[[") == 1
    everything = Encoder(chat_tokenizer(), Template(CHATML, "x"), "all").example(Chat(TURNS))
    assert everything.learned.sum() == len(everything) - 1


def test_replies_of_the_default_template_end_where_generation_stops() -> None:
    assert marked(Encoder(chat_tokenizer(), Template()), Chat(TURNS[1:4])) == (
        "User: the cat?\nAssistant:[[ the dog\nUser:]] and on\n"
    )
    assert (
        marked(Encoder(chat_tokenizer(), Template()), Chat(TURNS[1:3]))
        == f"User: the cat?\nAssistant:[[ the dog\n{EOT}]]"
    )


def test_a_mark_that_is_no_special_token_is_followed_by_the_end_of_text() -> None:
    assert marked(Encoder(byte_tokenizer(), Template(CHATML, "x")), Chat(TURNS[1:3])).endswith(f"<|im_end|>{EOT}]]")


def test_a_template_may_end_a_conversation_with_the_end_of_text() -> None:
    closing = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    got = marked(Encoder(chat_tokenizer(), Template(closing, "x", EOT)), Chat(TURNS[1:]))
    assert "[[the dog<|im_end|>\n]]<|im_start|>user" in got and got.endswith(f"[[sat <|im_end|>\n{EOT}]]")
    unmarked = "{% for m in messages %}{{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}/{% endfor %}"
    with pytest.raises(UserError, match="does not only append"):  # the end of earlier replies would not be learned
        Encoder(chat_tokenizer(), Template(unmarked, "x", EOT)).example(Chat(TURNS[1:]))


@pytest.mark.parametrize("template", [CHATML, MARKED, None])
def test_the_ids_before_each_reply_are_those_of_inference(template: str | None) -> None:
    t, chat = chat_tokenizer(), Template(template, "x") if template else Template()
    example = Encoder(t, chat).example(Chat(TURNS))
    begins = np.flatnonzero(np.diff(example.learned.astype(int)) == 1) + 1
    for begin, messages in zip(begins, (TURNS[:2], TURNS[:4]), strict=True):
        assert example.ids[:begin].tolist() == t.encode(chat.render(messages), specials=True).tolist()


def test_generation_blocks_agree_with_prefixes_or_are_refused() -> None:
    t = chat_tokenizer()
    ours = Encoder(t, Template(CHATML, "x")).example(Chat(TURNS))
    theirs = Encoder(t, Template(MARKED, "x")).example(Chat(TURNS))
    assert ours.ids.tolist() == theirs.ids.tolist() and ours.learned.tolist() == theirs.learned.tolist()
    wrong = MARKED.replace("== 'assistant'", "== 'user'")
    with pytest.raises(UserError, match=r"x marks replies by \{% generation %\} elsewhere"):
        Encoder(t, Template(wrong, "x")).example(Chat(TURNS))


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages[-2:] %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content[:2] }}\n{% endfor %}",
        "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}",
        CHATML.replace("assistant\\n", "assistant\\n<think>"),
    ],
)
def test_a_template_that_drops_or_rewrites_turns_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="x does not only append: it renders"):
        Encoder(byte_tokenizer(), Template(text, "x")).example(Chat(TURNS))


def test_messages_that_the_template_refuses_are_a_defect_of_their_row(tmp_path: Path) -> None:
    text = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}" + CHATML
    path = write_rows(tmp_path / "a.jsonl", {"messages": TURNS[1:3]}, {"messages": TURNS})
    with pytest.raises(UserError, match="line 2, byte .*: x: the user begins; repair the row"):
        load_examples(path, chat_tokenizer(), Template(text, "x"), 100)
    assert load_examples(path, chat_tokenizer(), Template(text, "x"), 100, Rows(defects="skip")).counts.left_out == {
        "refused by the template": 1
    }


def test_tools_reach_the_template_and_calls_stay_text() -> None:
    text = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML.replace(
        "m['content']", "m['content'] + (m.tool_calls | tojson if m.tool_calls else '')"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    got = marked(Encoder(chat_tokenizer(), Template(text, "x")), Chat([TURNS[1], call], tools=[{"name": "f"}]))
    assert got.startswith('[{"name": "f"}]\n<|im_start|>user')
    assert got.endswith('[[[{"function": {"name": "f", "arguments": {"x": 1}}}]<|im_end|>]]\n')


def test_a_token_never_reaches_over_the_seam() -> None:
    t = chat_tokenizer()
    assert len(t.encode("the dog")) < len(t.encode("the d")) + len(t.encode("og"))
    for prompt, completion in (("the d", "og"), ("a:", " the"), ("a: ", "the"), ("a:  ", " the"), ("", "the")):
        example = Encoder(t, Template()).example(Text(prompt, completion))
        asked = prompt.rstrip(" ")
        assert example.ids[: len(t.prompt(asked))].tolist() == t.prompt(asked)
        assert t.decode(example.ids) == prompt + completion + EOT
        if asked:
            assert example.prompt == len(t.prompt(asked)) and example.learned[example.prompt :].all()


@pytest.mark.parametrize("name", list(MODELS))
def test_completions_of_sentencepiece_gain_no_space(name: str, tmp_path: Path) -> None:
    sentencepiece_folder(tmp_path, **MODELS[name])
    t = load_tokenizer(tmp_path)
    for prompt, completion in (("the cat", " sat"), ("the ca", "t sat"), ("on;\n", "the mat"), ("the", "the")):
        example = Encoder(t, Template()).example(Text(prompt, completion))
        assert example.ids[: example.prompt].tolist() == t.prompt(prompt)
        texts = [t.decode(example.ids[len(t.prefix) : -1]).lstrip(), (prompt + completion).lstrip()]
        assert len({" ".join(text.split()) if "normalised" in name else text for text in texts}) == 1


contents = st.text(max_size=12) | st.sampled_from(
    [EOT, "<|im_end|>", "a<|im_start|>b", "<|im_", "end|>", " ", "the cat"]
)


@settings(max_examples=150, deadline=None)
@given(contents, contents)
def test_no_text_of_a_user_becomes_a_special_token(prompt: str, completion: str) -> None:
    t = _tokenizer
    special = set(t.specials.values())
    encoder = Encoder(t, Template(CHATML, "x"))
    said = (prompt, completion, completion, prompt)
    roles = ("user", "assistant") * 2
    chat = Chat([{"role": role, "content": content} for role, content in zip(roles, said)])
    for source in (Text(prompt, completion), chat):
        try:
            example = encoder.example(source)
        except Wrong as wrong:
            assert wrong.kind in ("empty completion", "special token")
            continue
        except UserError as e:
            assert "surrogate" in str(e)
            continue
        found = [t.decode([i]) for i in example.ids.tolist() if i in special]
        assert found == ([EOT] if isinstance(source, Text) else MARKS * 4)
        assert example.ids[example.learned][-1] in special  # what ends a completion is learned
        if isinstance(source, Text):
            assert t.decode(example.ids[:-1]) == prompt + completion.removesuffix(EOT)
        else:
            assert t.decode(example.ids) == encoder.template.render(chat.messages, ask=False)
            begins = np.flatnonzero(np.diff(example.learned.astype(int)) == 1) + 1
            asked = [encoder.template.render(chat.messages[:i]) for i in (1, 3)]
            assert [example.ids[:b].tolist() for b in begins] == [t.encode(a, specials=True).tolist() for a in asked]


_tokenizer = chat_tokenizer()


def test_rows_that_are_too_long(tmp_path: Path) -> None:
    rows = [
        {"prompt": "abcdefghijklmnop", "completion": "x"},
        {"prompt": "abc", "completion": "0123456789"},
        {"prompt": "abc", "completion": "0"},
    ]
    path = write_rows(tmp_path / "a.jsonl", *rows)

    def load(**options: Any) -> Any:
        return load_examples(path, byte_tokenizer(), Template(), 8, Rows(**options))

    cut = load()
    assert [rendered(e, byte_tokenizer()) for e in cut.items] == ["abc[[012345]]", f"abc[[0{EOT}]]"]
    assert cut.counts.cut == 1 and dict(cut.counts.left_out) == {"the prompt fills the context": 1}
    skipped = load(too_long="skip")
    assert len(skipped.items) == 1 and skipped.counts.left_out["longer than the context"] == 1
    with pytest.raises(UserError, match="line 1, .*: the row has 18 tokens, expected at most 9"):
        load(too_long="error")
    with pytest.raises(UserError, match="no row to train on, of 1: 1 the prompt fills the context"):
        load_examples(write_rows(path, rows[0]), byte_tokenizer(), Template(), 8)
    plain = load_examples(write_rows(path, {"text": "0123456789"}), byte_tokenizer(), Template(), 4)
    assert len(plain.items[0]) == 11 and plain.counts.split == 1


def test_the_summary_says_what_is_learned_and_what_was_left_out(tmp_path: Path) -> None:
    rows = [
        {"prompt": "abc", "completion": "defg"},
        {"prompt": "abc", "completion": ""},
        {"prompt": "abc", "completion": f"d{EOT}e"},
    ]
    path = write_rows(tmp_path / "a.jsonl", *rows)
    loaded = load_examples(path, byte_tokenizer(), Template(), 50, Rows(defects="skip"))
    assert summary(loaded) == [
        f"{path}: 2 examples of 3 rows, 27 tokens, 21 of them (77.8%) carry loss",
        "  left out: 1 empty completion",
        "  1 texts hold the text of a special token, which stays ordinary text",
    ]


def test_a_pair_is_shown_with_both_sides(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    pair = load_pairs(path, byte_tokenizer(), Template(), 50).items[0]
    assert rendered(pair, byte_tokenizer()) == f"chosen:\na[[b{EOT}]]\nrejected:\na[[c{EOT}]]"


def test_the_example_of_the_page_prints_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "finetuning_data.md").read_text(encoding="utf-8")
    code, printed = (page.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "text"))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "finetuning_data.md", "exec"), {})
    assert capsys.readouterr().out == printed
