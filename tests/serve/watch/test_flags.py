"""Flags: a text in any pieces has the flags of the whole text, found as soon as nothing can undo them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("re2")

from fastgpt.core.errors import UserError
from fastgpt.serve.watch.flags import WINDOW, Flag, PatternFlag, Scan, WordFlag

WORDS = ["bad", "very bad", "c++", "敏感", "naïve", "STRASSE", "a"]
PATTERNS = [r"\bcat\b", r"^start", r"end$", r"(?m)^line$", r"\d{3}-\d{4}", r"(?i)secret.*key", r"x\B"]


def words(folder: Path, terms: list[str]) -> WordFlag:
    (folder / "words.txt").write_text("\n".join(["# a comment", *terms]))
    return WordFlag("words", folder / "words.txt")


def pattern(folder: Path, text: str) -> PatternFlag:
    (folder / "patterns.txt").write_text(text)
    return PatternFlag(text, folder / "patterns.txt")


def pieces(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(cuts), len(text)]
    return [text[a:b] for a, b in zip(bounds, bounds[1:])]


@pytest.mark.parametrize(
    "text",
    [
        "that is bad",
        "that is badly put, not BAD",
        "very\n\n bad",
        "C++ and c",
        "这是敏感词",
        "nai\u0308ve",
        "die Straße",
        "bad\u0301",
        "A\uff42ad",
        "the cat. concatenate",
        "start restart",
        "the end",
        "the end.",
        "a\nline\nb",
        "call 555-1234 now",
        "Secret of the\nkey, secret of the key",
        "axb x",
        "bad™ bad",
    ],
)
def test_pieces_have_the_flags_of_the_whole(tmp_path: Path, text: str) -> None:
    flags: list[Flag] = [words(tmp_path, [w]) for w in WORDS]
    for flag, word in zip(flags, WORDS):
        flag.name = word
    flags += [pattern(tmp_path, p) for p in PATTERNS]
    expected = {f.name for f in flags if f.found(text)}
    rng = random.Random(0)
    for cuts in [list(range(len(text))), *([rng.randrange(len(text) + 1) for _ in range(n)] for n in (1, 1, 2, 3))]:
        scan = Scan(flags)
        so_far = ""
        for piece in pieces(text, cuts):
            so_far += piece
            for name in scan.push(piece):
                assert name in expected, f"{name!r} was found in {so_far!r} of {text!r}"
            inside = {f.name for f in flags if isinstance(f, WordFlag) and f.found(text[: scan.clear])}
            assert inside <= set(scan.found), "what is clear has no match"
        scan.end()
        assert set(scan.found) == expected and len(scan.found) == len(expected)


def test_a_flag_is_found_before_the_end(tmp_path: Path) -> None:
    scan = Scan([words(tmp_path, ["very bad"]), pattern(tmp_path, r"\d{3}-\d{4}")])
    assert [scan.push(p) for p in ("so ve", "ry ba", "d", " and")] == [[], [], [], ["words"]]
    assert [scan.push(p) for p in (" 555-", "123", "4", ".")] == [[], [], [], [r"\d{3}-\d{4}"]]
    assert scan.end() == []


def test_windows_of_long_texts(tmp_path: Path) -> None:
    """A match in the middle of a long text is found on the way, one longer than the window at the end, and no window
    is taken for the beginning of a word or of the text."""
    flags = [words(tmp_path, ["lone"]), pattern(tmp_path, r"^b"), pattern(tmp_path, r"(?s)<.*>")]
    scan = Scan(flags)
    for _ in range(WINDOW):
        assert scan.push("a alone b") == []
    assert scan.push("<") == [] and scan.push("y" * 2 * WINDOW) == [] and scan.push(" lone") == []
    assert scan.push("> z") == ["words"]
    assert scan.end() == [r"(?s)<.*>"]


def test_many_words_and_hard_patterns_end(tmp_path: Path) -> None:
    """Under backtracking, the second one would never end."""
    assert not words(tmp_path, [f"term{i} {i % 97}" for i in range(5_000)]).found("term12 term13 " * 200)
    assert not pattern(tmp_path, r"(a+)+(b|aa)*c").found("a" * 3000)


def test_a_long_word_does_not_seem_to_end(tmp_path: Path) -> None:
    scan = Scan([words(tmp_path, ["bad"])])
    scan.push("x bad")
    assert [scan.push("y") for _ in range(2 * WINDOW)] == [[]] * 2 * WINDOW
    assert scan.clear == 2 and scan.end() == []


def test_several_patterns_are_one_flag(tmp_path: Path) -> None:
    """As one automaton, or each alone where that would be too large."""
    for large in ([], [rf"{i}\pL{{400}}" for i in range(4)]):
        flag = pattern(tmp_path, "\n".join([r"(?P<n>\d)x", "(?i)YES", "(?P<n>b)|2{1}c", *large]))
        assert len(flag._whole) == (1 if not large else 7)
        assert [flag.found(t) for t in ("1x", "yes", "b", "2c", "x y")] == [True] * 4 + [False]
        assert Scan([flag]).push("so yes, ") == [flag.name]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for text in ("(a", r"(a)\1", "a(?=b)", "x{2000}"):
        with pytest.raises(UserError, match=r"patterns.txt:1: .* is not a regular expression of RE2 \("):
            pattern(tmp_path, text)
    with pytest.raises(UserError, match="has no rows"):
        words(tmp_path, [])
    assert not pattern(tmp_path, "b").found("\ud800")
