"""Text as it comes: whole characters, and nothing of a stop string."""

from __future__ import annotations

import random

import pytest

from fastgpt.inference.stream import TextStream

TEXT = "naïve 👩🏽‍🚀 $a€b, ß\n한국 "


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    """Cut bytes into tokens of one to four bytes."""
    tokens = []
    while data:
        n = rng.randint(1, 4)
        tokens.append(data[:n])
        data = data[n:]
    return tokens


@pytest.mark.parametrize("data", [TEXT.encode(), b"\xff" + TEXT.encode()[1:-2] + b"\xe2\x82", b"\xe2\x82\xe2\x82\xac"])
def test_pieces_are_whole_characters_and_together_the_text(data: bytes) -> None:
    whole = data.decode("utf-8", errors="replace")
    for seed in range(40):
        stream = TextStream()
        pieces = [stream.push(token) for token in cut(data, random.Random(seed))]
        assert all(whole.startswith("".join(pieces[:n])) for n in range(len(pieces)))
        assert "".join([*pieces, stream.end()]) == whole == stream.text


@pytest.mark.parametrize(
    "stop, expected",
    [
        (["€"], "naïve 👩🏽‍🚀 $a"),
        (["€b, ß"], "naïve 👩🏽‍🚀 $a"),
        ([", x", ", ß"], "naïve 👩🏽‍🚀 $a€b"),
        (["ß\n", "b, ß"], "naïve 👩🏽‍🚀 $a€"),
        (["aa", "é"], TEXT),
        ([" "], "naïve"),
        (["n"], ""),
    ],
)
def test_no_piece_shows_a_part_of_a_stop_string(stop: list[str], expected: str) -> None:
    for seed in range(40):
        stream, pieces = TextStream(stop), []
        for token in cut(TEXT.encode(), random.Random(seed)):
            pieces.append(stream.push(token))
            if stream.stopped:
                break
        assert all(expected.startswith("".join(pieces[:n])) for n in range(len(pieces)))
        assert "".join(pieces) + stream.end() == expected == stream.text
        assert stream.stopped is (expected != TEXT)


def test_what_only_begins_a_stop_string_comes_late_but_comes() -> None:
    stream = TextStream(["abac"])
    assert [stream.push(c.encode()) for c in "ababx"] == ["", "", "", "ab", "abx"]
    assert stream.push(b"aba") == "" and stream.end() == "aba" and not stream.stopped
