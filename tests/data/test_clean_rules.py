"""Each cleaning rule on a text just inside and one just outside its threshold."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from fastgpt.data.clean import Cleaner, Outcome
from fastgpt.data.clean.features import Features
from fastgpt.data.clean.gopher import not_unique, repeated_characters, top_characters
from fastgpt.data.clean.language import KNOWN, Identifier
from fastgpt.data.document import Document

SYLLABLES = [a + b for a in "bdklmnprst" for b in "ao"]


def process(text: str, settings: Mapping[str, Any] | str) -> Outcome:
    """Return the outcome of a text with only these rules on."""
    return Cleaner.of(settings).process(Document(text, "a#0", "a"))


def prose(n: int) -> str:
    """Return n different words with no stop words among them, in sentences of ten words of six letters."""
    words = ["".join(SYLLABLES[i // 20**k % 20] for k in range(3)) for i in range(n)]
    return " ".join(w + "." if i % 10 == 9 else w for i, w in enumerate(words))


STOPS = " the of "
GOPHER = {  # rule: (kept, dropped)
    "gopher_short_doc": (prose(48) + STOPS, prose(47) + STOPS),
    "gopher_below_avg_threshold": ("abc " * 100 + STOPS + "abcd", "abc " * 100 + STOPS),
    "gopher_above_avg_threshold": ("abcdefghij " * 99 + STOPS, "abcdefghijk " * 99 + STOPS),
    "gopher_too_many_hashes": ("# " * 10 + "word " * 88 + STOPS, "# " * 11 + "word " * 87 + STOPS),
    "gopher_too_many_ellipsis": ("word ... " * 10 + "word " * 78 + STOPS, "word ... " * 11 + "word " * 76 + STOPS),
    "gopher_too_many_bullets": (
        "- word word word word word the of\n" * 9 + "word the of\n",
        "- word word word word word the of\n" * 10,
    ),
    "gopher_too_many_end_ellipsis": (
        "word word word word word the of\n" * 14 + "word word word the of...\n" * 6,
        "word word word word word the of\n" * 13 + "word word word the of...\n" * 7,
    ),
    "gopher_below_alpha_threshold": ("word " * 78 + "1234 " * 20 + STOPS, "word " * 77 + "1234 " * 21 + STOPS),
    "gopher_enough_stop_words": ("word " * 80 + "the of", "word " * 80 + "the The"),
}


@pytest.mark.parametrize("rule", GOPHER)
def test_gopher_quality(rule: str) -> None:
    kept, dropped = GOPHER[rule]
    assert process(kept, {"gopher_quality": True}).dropped_by is None
    assert process(dropped, {"gopher_quality": True}).dropped_by == rule


def test_gopher_long_doc() -> None:
    settings = {"gopher_quality": {"max_doc_words": 60}}
    assert process(prose(58) + STOPS, settings).dropped_by is None
    assert process(prose(59) + STOPS, settings).dropped_by == "gopher_long_doc"


def lines_of(different: int, same: int, line: str = "one two three", sep: str = "\n") -> str:
    return sep.join([f"{prose(9 * (i + 1))[-60:]} {i}" for i in range(different)] + [line] * (same + 1))


REPETITION = {
    "dup_line_frac": (lines_of(6, 3, "z"), lines_of(5, 3, "z")),
    "dup_para_frac": (lines_of(6, 3, "z", "\n\n"), lines_of(5, 3, "z", "\n\n")),
    "top_2_gram": ("ab cd " * 2 + "x" * 38, "ab cd " * 2 + "x" * 37),
    "top_3_gram": ("a b c " * 2 + "x" * 44, "a b c " * 2 + "x" * 43),
}


@pytest.mark.parametrize("rule", REPETITION)
def test_gopher_repetition(rule: str) -> None:
    off = {"dup_n_grams": {}}
    off |= {"top_n_grams": {int(rule[4]): {"2": 0.2, "3": 0.18}[rule[4]]}} if "gram" in rule else {"top_n_grams": {}}
    off |= {"dup_line_frac": None} if rule == "dup_para_frac" else {}
    kept, dropped = REPETITION[rule]
    assert process(kept, {"gopher_repetition": off}).dropped_by is None
    assert process(dropped, {"gopher_repetition": off}).dropped_by == rule


@pytest.mark.parametrize("sep, rule", [("\n", "dup_line_char_frac"), ("\n\n", "dup_para_char_frac")])
def test_repeated_characters(sep: str, rule: str) -> None:
    """The repeated line has 30 characters; the text gets 150 and 149 in all."""
    off = {"dup_line_frac": None, "dup_para_frac": None, "top_n_grams": {}, "dup_n_grams": {}}
    settings = {"gopher_repetition": off}
    for size, expected in ((150, None), (149, rule)):
        filler = prose(100)[: size - 60 - 2 * len(sep)]
        text = sep.join(["y" * 30, filler, "y" * 30])
        assert len(text) == size
        assert process(text, settings).dropped_by == expected


@pytest.mark.parametrize("n, limit", [(5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)])
def test_duplicated_n_grams(n: int, limit: float) -> None:
    """A run of n words of 6 letters occurs twice; the second time counts 6 n characters."""
    run = " ".join(f"word{chr(97 + i)}z" for i in range(n))
    settings = {"gopher_repetition": {"top_n_grams": {}, "dup_n_grams": {n: limit}}}
    least = -(-6 * n // limit)
    for size, expected in ((int(least) + 1, None), (int(6 * n / limit) - 1, f"duplicated_{n}_n_grams")):
        filler = prose(200)[: size - 2 * len(run) - 2]
        text = f"{run} {filler} {run}"
        assert len(text) == size
        assert process(text, settings).dropped_by == expected


def brute_duplicates(words: list[str], n: int) -> int:
    """Return the characters of repeated n-grams, counted word by word as Gopher's text describes it."""
    seen: set[tuple[str, ...]] = set()
    total = at = 0
    while at <= len(words) - n:
        gram = tuple(words[at : at + n])
        if gram in seen:
            total, at = total + sum(map(len, gram)), at + n
        else:
            seen.add(gram)
            at += 1
    return total


@pytest.mark.parametrize("seed", range(20))
def test_n_gram_counts_match_a_plain_count(seed: int) -> None:
    rng = random.Random(seed)
    words = [rng.choice("a bb ccc dddd".split()) for _ in range(rng.randrange(12, 80))]
    features = Features(" ".join(words))
    total = np.concatenate(([0], np.cumsum(features.lengths)))
    for n in range(2, 11):
        grams = features.n_grams(n)
        at = not_unique(grams)
        assert repeated_characters(grams[at], at, total, n) == brute_duplicates(words, n)
        top, count = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1)).most_common(1)[0]
        assert top_characters(grams, features.lengths, n) == len(top) * count


C4 = {
    "too_few_sentences": ("A b c d. " * 5, "A b c d. " * 4),
    "lorem_ipsum": ("A b c d. " * 5 + "Lorem ipsem.", "A b c d. " * 5 + "Lorem ipsum."),
    "curly_bracket": ("A b c d. " * 5 + "(a).", "A b c d. " * 5 + "{a}."),
}


@pytest.mark.parametrize("rule", C4)
def test_c4(rule: str) -> None:
    kept, dropped = C4[rule]
    assert process(kept, {"c4": True}).dropped_by is None
    assert process(dropped, {"c4": True}).dropped_by == rule


@pytest.mark.parametrize(
    "line, kept",
    [
        ("Three words here.", True),
        ("Two words.", False),
        ("No full stop at the end", False),
        ("It ends in dots...", False),
        ("He said: \"it does.\"", True),
        ("Please enable Javascript now.", False),
        ("Read our privacy policy today.", False),
        ("A word of " + "x" * 1000 + ".", False),
        ("A word of " + "x" * 999 + ".", True),
    ],
)  # fmt: skip
def test_c4_lines(line: str, kept: bool) -> None:
    frame = ["Some line with words."] * 5
    out = process("\n".join([*frame, line]), {"c4": True})
    assert out.document is not None
    assert out.document.text == "\n".join([*frame, line] if kept else frame)


def test_c4_removes_citations() -> None:
    out = process("This is known.[1][23]\n" * 5 + "So [edit] is this one.", {"c4": True})
    assert out.document is not None
    assert out.document.text == "This is known.\n" * 5 + "So  is this one."


LONG = "This line is longer than thirty characters"


def test_fineweb_line_punct_ratio() -> None:
    lines = [f"{LONG} {i}." for i in range(12)] + [f"{LONG} {i}" for i in range(12, 100)]
    assert process("\n".join(lines), {"fineweb": True}).dropped_by is None
    lines[0] = lines[0].rstrip(".")
    assert process("\n".join(lines), {"fineweb": True}).dropped_by == "line_punct_ratio"


def test_fineweb_short_line_ratio() -> None:
    lines = [f"{LONG} {i}." for i in range(33)] + [f"A line of thirty letters ok {i}." for i in range(10, 77)]
    assert [len(line) for line in lines[33:]] == [31] * 67
    lines[33:] = [line[1:] for line in lines[33:]]  # 30 characters are short
    assert process("\n".join(lines), {"fineweb": True}).dropped_by is None
    lines[0] = "Short."
    assert process("\n".join(lines), {"fineweb": True}).dropped_by == "short_line_ratio"


def test_fineweb_char_dup_ratio() -> None:
    """A line of 31 characters occurs twice; it is repeated text for 31 of the characters without line ends."""
    twice = "This sentence is 31 characters."
    assert len(twice) == 31
    for size, expected in ((3100, None), (3099, "char_dup_ratio")):
        filler = prose(500)[: size - 62 - 1] + "."
        assert process(f"{twice}\n{filler}\n{twice}", {"fineweb": True}).dropped_by == expected


def test_fineweb_list_ratio() -> None:
    lines = [f"onewordthatislongerthanthirtycharacters{i} two ." for i in range(10)]  # 3 tokens a line
    text = "\n".join(lines)
    assert process(text, {"fineweb": {"new_line_ratio": 9 / 30}}).dropped_by is None
    assert process(text + "\n", {"fineweb": {"new_line_ratio": 9 / 30}}).dropped_by == "list_ratio"
    assert process(" \n ", {"fineweb": True}).dropped_by == "empty"


def test_spam() -> None:
    assert process("buy now " * 4 + prose(175), {"spam": True}).dropped_by is None
    assert process("buy now " * 4 + prose(174), {"spam": True}).dropped_by == "spam_phrases"
    assert process("UPPER lower", {"spam": True}).dropped_by is None
    assert process("UPPER lowe", {"spam": True}).dropped_by == "spam_capitals"
    assert process("http://a.example/x " * 4, {"spam": True}).dropped_by is None
    assert process("http://a.example/x " * 5, {"spam": True}).dropped_by == "spam_links"


def test_profanity(tmp_path: Any) -> None:
    assert process("damn " + prose(90), {"profanity": {"max_ratio": 0.01}}).dropped_by is None  # 100 tokens
    assert process("Damn " + prose(89), {"profanity": {"max_ratio": 0.01}}).dropped_by == "profanity"
    words = tmp_path / "words.txt"
    words.write_text("# mine\nfrob the knob\n")
    out = process("Frob the Knob, damn", {"profanity": {"words": str(words), "max_ratio": None}})
    assert out.dropped_by is None and out.changes == {"profanity.words": 1}


def test_language() -> None:
    english = "The committee will meet again on Thursday to discuss the report that was published last week."
    german = "Der Ausschuss trifft sich am Donnerstag wieder, um den Bericht der letzten Woche zu besprechen."
    assert process(english, {"language": True}).dropped_by is None
    assert process(german, {"language": True}).dropped_by == "language"
    assert process(german, {"language": {"keep": ["de"]}}).dropped_by is None
    assert process(german, {"language": {"keep": []}}).changes == {"language.de": 1}
    for short in ("", "the", english[:20], "1234567890 " * 8):
        assert process(short, {"language": True}).dropped_by == "language_unknown"
    assert process(english[:20], {"language": {"unknown": "keep"}}).dropped_by is None
    assert process(english[:20], {"language": {"min_length": 10, "min_confidence": 0}}).dropped_by is None


TONGUES = (
    "The committee meets on Thursday. Der Ausschuss trifft sich am Donnerstag. Le comité se réunit jeudi. "
    "Комитет собирается в четверг. 委員会は木曜日に会合します。 اللجنة تجتمع يوم الخميس. ALL CAPITALS HERE "
    "def f(x): return x + 1 1234567890"
)


@pytest.mark.parametrize("version", [KNOWN[0], "unknown"])
def test_languages_are_those_of_py3langid(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast walk gives the package's answers; with an unknown version the package itself is asked."""
    monkeypatch.setattr("fastgpt.data.clean.language.version", lambda name: version)
    ours = Identifier()
    texts = [TONGUES[i : i + n] for n in (0, 1, 5, 6, 7, 40, 200) for i in range(0, len(TONGUES), 41)]
    for text in [*texts, "\ud800", "e\u0301" * 30]:
        code, confidence = ours.classify(text)
        expected, score = ours._model.classify(text)
        assert confidence == pytest.approx(score, abs=1e-4)
        assert code == expected or score < 0.5


def test_tokens_follow_spacys_rules() -> None:
    text = "Don't it's well-known, 3.14 and/or (foo.bar) e.g. U.S. wait... «A»! https://a.org/b-c?d=1 --flag [x](y)."
    tokens = "Do n't it 's well - known , 3.14 and / or ( foo.bar ) e.g. U.S. wait ... « A » ! "
    tokens += "https://a.org/b-c?d=1 --flag [ x](y ) ."
    features = Features(text)
    assert [text[a:b] for a, b in zip(*features.bounds)] == tokens.split()
    assert Features("").n_words == 0 == Features(" \n").n_words


@pytest.mark.parametrize("text", ["Ab cD X aB", "Ab ÄÖ cD ǅx ß", "A" * 600_000 + " b " + "a" * 600_000])
def test_hashes_depend_on_the_characters_of_a_token_alone(text: str) -> None:
    features = Features(text)
    tokens = [text[a:b] for a, b in zip(*features.bounds)]
    by_token = dict(zip(tokens, features.hashes.tolist()))
    assert len(set(by_token.values())) == len(by_token)
    assert [int(Features(f"x {token}").hashes[-1]) for token in tokens] == [by_token[token] for token in tokens]
    lower = [int(Features(token.lower()).hashes[-1]) for token in tokens]
    assert features.lowered.tolist() == lower


def test_a_long_text_takes_blocks() -> None:
    text = "".join(f"word{i} " for i in range(60_000))
    assert len(text) > 2 << 18
    hashes = Features(text).hashes
    assert len(set(hashes.tolist())) == 60_000
    assert hashes[-1] == Features("word59999").hashes[0]
