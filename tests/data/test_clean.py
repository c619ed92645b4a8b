"""Cleaning: normalisation, settings, presets, dry runs, counts, and properties over any text."""

from __future__ import annotations

import json
import pydoc_data.topics
import textwrap
from pathlib import Path
from typing import Any

import pytest

from fastgpt.core.errors import UserError
from fastgpt.data.clean import PRESETS, STEPS, Cleaner, SettingError, Tally, clean_all, located
from fastgpt.data.clean.step import LONGEST, State
from fastgpt.data.document import Document

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

PYTHON = Path(textwrap.__file__).read_text(encoding="utf-8")


def clean(text: str, values: Any) -> str:
    """Return a text as these rules leave it."""
    outcome = Cleaner.of(values).process(Document(text, "a#0", "a"))
    assert outcome.document is not None, outcome.dropped_by
    return outcome.document.text


@pytest.mark.parametrize(
    "rule, text, expected",
    [
        ("unicode", "e\u0301 \ud800", "\u00e9 \ufffd"),
        ("unicode", "\ufb01 \uff21 \u00b2", "\ufb01 \uff21 \u00b2"),  # NFC, not NFKC
        ("mojibake", "cafÃ© â€œyesâ€\x9d", "café “yes”"),
        ("mojibake", "fine\nvoilÃ\xa0\n‘quoted’ ﬁ &amp; naïve", "fine\nvoilà\n‘quoted’ ﬁ &amp; naïve"),
        ("whitespace", "\n\na  b\t c \r\nd\re\n\n\n\nf\xa0g\u3000h\u200b\x00 \n", "a b c\nd\ne\n\nf g h"),
        ("punctuation", "“It’s… so‑so”!!!!! ????? !?!?", '"It\'s... so-so"!!! ??? !?!?'),
        ("html", "<p>a &lt; b<br/>c</p><script>x < y</script><!-- z -->d", "\na < b\nc\nd"),
        ("html", "if a < b and c > d: List<int>() <T>", "if a < b and c > d: List<int>() <T>"),
        ("html", "&amp;amp;lt;b&amp;gt;x", "x"),
        (
            "boilerplate",
            "Skip to content\nText.\nWe use cookies to improve it.\n© 2024 X. All rights reserved.",
            "Text.",
        ),
        ("boilerplate", "We read more.\nThe privacy policy of Rome.", "We read more.\nThe privacy policy of Rome."),
        ("lowercase", "ÄB İ", "äb i̇"),
    ],
)
def test_transforms(rule: str, text: str, expected: str) -> None:
    assert clean(text, {rule: True}) == expected
    assert clean(expected, {rule: True}) == expected


def test_whitespace_can_keep_the_layout() -> None:
    text = "def f():\n\tx = 1   # a  \n\n\n\n    y\f\n"
    assert clean(text, {"whitespace": {"collapse": False, "max_blank_lines": 2}}) == (
        "def f():\n\tx = 1   # a\n\n\n    y\f"
    )
    assert clean(text, "code") == text
    assert clean("a\r\nb", "code") == "a\nb"


def test_presets_keep_documentation_and_code() -> None:
    for topic, text in pydoc_data.topics.topics.items():
        assert clean(text, "docs").split() == text.split(), topic
    assert clean(PYTHON, "code") == PYTHON.replace("gward@python.net", "<EMAIL>")
    assert clean(PYTHON, "docs").split() == PYTHON.replace("gward@python.net", "<EMAIL>").split()
    web = Cleaner.of("web").process(Document(PYTHON, "a#0", "a"))
    assert web.dropped_by == "gopher_below_alpha_threshold"


def test_prose_keeps_prose() -> None:
    sentences = (
        "The harbour was quiet that morning, and nobody had opened the shutters. She walked along the quay with her "
        "brother's letter in a pocket. It said that he would be back before the winter, which she did not believe. "
        "Two boats were left. One of them belonged to the old man who had taught both of them to sail, to fish "
        "and to wait."
    )
    for preset in ("web", "prose", "docs"):
        assert clean(sentences, preset) == sentences


WRONG: list[tuple[Any, str]] = [
    ("wbe", "clean.preset is 'wbe', expected one of web, prose, docs, code, none"),
    ({"gopher_qualty": True}, "clean: unknown setting 'gopher_qualty', the nearest known one is 'gopher_quality'"),
    ({"c4": {"min_sentences": 3}}, "unknown setting 'min_sentences', the nearest known one is 'min_num_sentences'"),
    ({"c4": {"min_num_sentences": "5"}}, "clean.c4.min_num_sentences is '5', expected a whole number or null"),
    ({"c4": 3}, "clean.c4 is 3, expected true, false or its settings"),
    ({"fineweb": {"short_line_thr": -1}}, "clean.fineweb.short_line_thr is -1, expected 0 or more"),
    ({"unicode": {"a": 1}}, "clean.unicode has no settings"),
    ({"language": {"keep": ["en", "english"]}}, "clean.language: keep has 'english', which is not one of"),
    (
        {"classifier": {"path": "/none/x.npz"}},
        "clean.classifier: /none/x.npz: No such file or directory, expected a file of",
    ),
    ({"scorer": {"function": "json:nothing"}}, "clean.scorer: function 'json:nothing' cannot be imported"),
    (
        {"profanity": {"words": "/none/x"}},
        "clean.profanity: word list /none/x: No such file or directory, expected a text file",
    ),
    ({"counterfactual": {"share": 2.0}}, "clean.counterfactual: share is 2.0, expected a number from 0 to 1"),
    ({"boilerplate": {"lines": ["("]}}, "clean.boilerplate: lines: "),
]


@pytest.mark.parametrize("values, message", WRONG)
def test_wrong_settings(values: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        Cleaner.of(values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_setting_names_its_place() -> None:
    with pytest.raises(SettingError) as error:
        Cleaner.of({"preset": "web", "c4": {"x": 1}})
    assert error.value.path == ("c4", "x")


def test_the_fingerprint_follows_settings_and_files(tmp_path: Path) -> None:
    def fingerprint(words: str) -> str:
        (tmp_path / "words.txt").write_text(words)
        return Cleaner.of(located({"profanity": {"words": "words.txt"}}, tmp_path)).fingerprint

    assert fingerprint("a") == fingerprint("a") != fingerprint("b")
    assert Cleaner.of("docs").fingerprint == Cleaner.of({"preset": "docs"}).fingerprint
    assert Cleaner.of("docs").fingerprint != Cleaner.of({"preset": "docs", "html": True}).fingerprint
    assert located("web", tmp_path) == "web" and located({"c4": 3, "spam": True}, tmp_path) == {"c4": 3, "spam": True}


def test_settings_change_a_preset() -> None:
    cleaner = Cleaner.of(
        {"preset": "web", "c4": {"min_num_sentences": 3}, "spam": False, "fineweb": True, "lowercase": True}
    )
    assert cleaner.settings["c4"] == {"filter_no_terminal_punct": False, "min_num_sentences": 3}
    assert "spam" not in cleaner.settings
    assert list(cleaner.settings) == [name for name in STEPS if name in cleaner.settings]
    assert Cleaner.of({}).settings == {} == Cleaner.of("none").settings


def test_rules_decide_on_the_beginning_of_a_long_text() -> None:
    state = State(Document("a " * (LONGEST // 2) + "b@c.org", "a#0", "a"))
    assert len(state.features.text) == LONGEST
    state.replace("b")
    assert (state.text, state.features.text) == ("b", "b")
    state = State(Document("A " * (LONGEST // 2) + "b@c.org", "a#0", "a"))
    outcome = Cleaner.of({"personal_data": True, "spam": True}).process(state.document, dry_run=True)
    assert outcome.document is not None and outcome.document.text.endswith(" <EMAIL>")
    assert outcome.dropped_by == "spam_capitals"


def test_dry_run_lets_every_rule_decide() -> None:
    document = Document("{ LOREM IPSUM", "a#7", "a")
    outcome = Cleaner.of({"gopher_quality": True, "c4": {"min_words_per_line": None}, "spam": True}).process(
        document, dry_run=True
    )
    assert outcome.dropped_by == "gopher_short_doc"
    assert outcome.would_drop == ("gopher_short_doc", "no")[:1] + outcome.would_drop[1:]
    assert "spam_capitals" in outcome.would_drop
    assert outcome.document == document


def test_tally() -> None:
    documents = [
        Document(text, f"a#{i}", "a") for i, text in enumerate(["a@b.org", "DROP", "", "c@d.org e@f.org", "DROP IT"])
    ]
    cleaner = Cleaner.of({"personal_data": True, "spam": True})
    kept, tally = clean_all(cleaner, documents)
    assert [d.text for d in kept] == ["<EMAIL>", "<EMAIL> <EMAIL>"] or tally.dropped
    parts = [Tally(), Tally()]
    for i, document in enumerate(documents):
        parts[i > 1].add(document, cleaner.process(document))
    parts[0].merge(parts[1])
    assert parts[0] == tally == Tally.from_json(json.loads(json.dumps(tally.to_json())))
    assert (tally.documents, tally.kept) == (5, 2)
    assert tally.dropped == {"spam_capitals": 2, "empty": 1}
    assert tally.examples == {"spam_capitals": ["a#1", "a#4"], "empty": ["a#2"]}
    assert tally.changes == {"personal_data.email": 3} and tally.changed == {"personal_data.email": 2}


PIECES = "<b> <br> &amp; lt; <script> </script> <!-- --> [1] Ã© a@b.org 8.8.8.8".split()
ALPHABET = st.one_of(
    st.characters(codec="utf-8"),
    st.sampled_from("\r\n\t \xa0\u2028\u0301\u200b\ud800\x00\x85&;<>/@.:-+'\"[]{}0123456789ÃÂ©â€œİ"),
    st.sampled_from([*PIECES, "\n\n\n", "Read more"]),
)
TEXTS = st.lists(ALPHABET, max_size=40).map("".join)
RULES = ("unicode", "mojibake", "whitespace", "punctuation", "html", "boilerplate", "personal_data", "lowercase")
TRANSFORMS = dict.fromkeys(RULES, True) | {
    "c4": {"filter_no_terminal_punct": False, "min_num_sentences": 0, "filter_curly_bracket": False}
}
CLEANERS = {name: Cleaner.of(name) for name in PRESETS} | {"transforms": Cleaner.of(TRANSFORMS)}


@pytest.mark.parametrize("name", CLEANERS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXTS)
def test_any_text(name: str, text: str) -> None:
    """No text gives an error or a lone surrogate; a cleaned text stays as it is; the result is the same each time."""
    cleaner = CLEANERS[name]
    document = Document(text, "a#0", "a", {"k": "v"})
    first = cleaner.process(document)
    assert document == Document(text, "a#0", "a", {"k": "v"})
    assert first == cleaner.process(document)
    dry = cleaner.process(document, dry_run=True)
    assert dry.dropped_by == first.dropped_by
    if first.document is None:
        return
    again = cleaner.process(first.document)
    assert again.document is None or again.document.text == first.document.text
    if "unicode" in cleaner.settings or not any("\ud800" <= c <= "\udfff" for c in text):
        first.document.text.encode()


@pytest.mark.parametrize(
    "piece", ["<", "<b", "<script>", "<!--", "&amp;", "&", "[1", "[", "\n", " ", "a.", "Ã©", "!", "-", "'", "\t "]
)
def test_time_is_linear(piece: str) -> None:
    """Texts made to be slow take milliseconds; quadratic rules would take minutes."""
    cleaner = CLEANERS["transforms"]
    cleaner.process(Document(piece * 30_000, "a#0", "a"))
    CLEANERS["web"].process(Document("The end of that is with it. " + piece * 30_000, "a#0", "a"), dry_run=True)
