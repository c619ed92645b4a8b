"""Overlap with evaluation files, against lists of words compared one by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastgpt.core.errors import UserError
from fastgpt.data.dedup import NgramIndex
from fastgpt.data.dedup.ngrams import pieces
from fastgpt.data.dedup.words import split

pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

SENTENCES = st.lists(st.sampled_from(["a", "b", "C", "é", "一"]), max_size=12).map(", ".join)
QUESTION = "How many words does a question need before it counts as long enough to be found again?"


def covered(text: str, evaluation: list[str], n: int, shortest: int) -> set[int]:
    """Return the places of the words of a document that overlap."""
    words, found = split(text), set()
    for other in map(split, evaluation):
        size = min(n, len(other))
        if size < shortest and other != words:
            continue
        for j in range(len(other) - size + 1 if size else 0):
            for i in range(len(words) - size + 1):
                if words[i : i + size] == other[j : j + size]:
                    found |= set(range(i, i + size))
    return found


@settings(max_examples=100, deadline=None)
@given(st.lists(SENTENCES, max_size=4), st.lists(SENTENCES, max_size=4), st.integers(1, 5), st.integers(1, 5))
def test_overlaps_are_those_of_brute_force(texts: list[str], evaluation: list[str], n: int, shortest: int) -> None:
    index = NgramIndex({"e": evaluation}, n, min(n, shortest))
    for text, overlaps in zip(texts, index.overlaps_of(texts)):
        expected = covered(text, evaluation, n, min(n, shortest))
        assert sum(overlap.words for overlap in overlaps) == len(expected)
        inside = [split(text[o.start : o.end]) for o in overlaps]
        assert [len(words) for words in inside] == [o.words for o in overlaps]
        assert sum(inside, []) == [word for i, word in enumerate(split(text)) if i in expected]
        assert index.overlaps(text) == overlaps


def test_places_and_files(tmp_path: Path) -> None:
    (tmp_path / "qa.jsonl").write_text(json.dumps({"q": {"text": [QUESTION]}, "a": "yes", "id": 7}) + "\n\n")
    (tmp_path / "plain.txt").write_text(f"Something else. {QUESTION}")
    names = [str(tmp_path / "plain.txt"), str(tmp_path / "qa.jsonl")]
    index = NgramIndex.from_files(names)
    text = f"Before. {QUESTION.upper().replace(' ', '  ')} After."
    (overlap,) = index.overlaps(text)
    assert text[overlap.start : overlap.end] == QUESTION.upper().replace(" ", "  ").rstrip("?")
    assert overlap.files == tuple(names) and overlap.words == 17
    assert index.overlaps("yes")[0].files == (names[1],) and not index.overlaps("yes it is")
    assert (index.files[names[1]].texts, index.files[names[1]].short, index.files[names[1]].tiny) == (2, 1, 1)
    only = NgramIndex.from_files(names[1:], fields=["a"])
    assert not only.overlaps(text)


def test_short_texts_are_found_whole() -> None:
    index = NgramIndex({"e": ["one two three four five six seven eight", "one two three"]})
    assert index.overlaps("zero One two, three four five six seven eight nine")[0].words == 8
    assert not index.overlaps("one two three four five six seven")
    assert index.overlaps("One, two, three!")[0].words == 3


@settings(max_examples=100, deadline=None)
@given(st.text("ab \n", max_size=40), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10))), st.integers(0, 5))
def test_pieces_are_the_characters_outside(text: str, places: list[tuple[int, int]], margin: int) -> None:
    inside = sorted((min(a, len(text)), min(a + n, len(text))) for a, n in places)
    gone = {i for a, b in inside for i in range(a - margin, b + margin)}
    left = pieces(text, inside, margin)
    assert all(text[a:b].strip() for a, b in left) and left == sorted(left)
    visible = {i for i in range(len(text)) if i not in gone and text[i].strip()}
    assert {i for a, b in left for i in range(a, b) if text[i].strip()} == visible


def test_clean_drops_or_cuts() -> None:
    index = NgramIndex({"e": [QUESTION]})
    document = "x" * 30 + ". " + QUESTION + " " + "y" * 30
    assert index.clean([document, "other"])[0] == [None, "other"]
    (left,), report = index.clean([document], "cut", margin=2)
    assert left == "x" * 30 + "\n" + "y" * 30
    assert (report.documents, report.places, report.dropped, report.cut) == ({"e": 1}, {"e": 1}, 0, 1)
    assert index.clean([document], "cut", margin=26)[0] == [None]  # too little is left


def test_a_collision_of_hashes_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgpt.data.dedup import ngrams

    real = ngrams.grams

    def colliding(*args: object, **options: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        hashes, first, bounds = real(*args, **options)  # type: ignore[arg-type]
        return np.full_like(hashes, 5), first, bounds

    monkeypatch.setattr(ngrams, "grams", colliding)
    index = NgramIndex({"e": [QUESTION[:60], QUESTION]}, n=5, shortest=5)
    assert not index.overlaps("entirely different words in this document")
    assert index.overlaps(QUESTION[:60])


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.jsonl", b'{"q": "x"}\n{"q": \n', r"a.jsonl:2 is not JSON"),
        ("a.json", b'[\n{"q" 1}]', r"a.json:2 is not JSON"),
        ("a.txt", b"\xff", "cannot read the evaluation file"),
        ("a.jsonl", b'{"p": "x"}', "has a field 'q' or 'r'"),
        ("none.txt", None, "cannot read the evaluation file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        NgramIndex.from_files([tmp_path / name], fields=["q", "r"])


def test_empty_index() -> None:
    index = NgramIndex({"e": ["", "..."]})
    assert index.overlaps_of(["", "a b"]) == [[], []] and index.files["e"].texts == 0
    with pytest.raises(ValueError, match="shortest must be in"):
        NgramIndex({}, 5, 8)
