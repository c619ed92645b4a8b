"""Ratings by people: the votes on an item count together, and become preference pairs or rated completions.

=============== ============================================== ===================================================
format          columns                                        notes
=============== ============================================== ===================================================
ratings         prompt, a, b, winner [, rater]                 winner: a, b, tie or both_bad
feedback        prompt, response, thumb [, rater]              thumb: up or down
=============== ============================================== ===================================================

`prompt` is a text or a list of messages; the other texts are what was written after it.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastgpt.data.read.rows import Row
from fastgpt.finetune.formats import PAIRS, RATINGS, Formats, Reader, Source, Unused, Wrong, joined

WINNERS = {"a": "first", "b": "second", "tie": "tie", "both_bad": "both bad"}
SWAPPED = {"first": "second", "second": "first"}
THUMBS = ("up", "down")
TIED = "tied votes"
Sides = tuple[Source, Source]


class Vote(NamedTuple):
    """What one person said about an item.

    Attributes:
        prompt: of the item, as a key. item: the key of what was rated; "" is part of no other key.
        choice: "first", "second", "tie" or "both bad" of two sides; "up" or "down" for one.
        rater: of several votes of a rater on an item the last one counts; empty: each row is another rater.
        sides: what was rated, one or two.
        rated: whether to settle as [(chosen, True), (rejected, False)].
        blank: whether a side has no text, as models write it now and then.
    """

    prompt: str
    item: str
    choice: str
    rater: str
    sides: tuple[Source, ...]
    rated: bool = False
    blank: bool = False


@dataclass
class Poll:
    """The votes on all items.

    Attributes:
        votes: item -> rater -> choice.
        thumbs: prompt -> item -> the completion, for items with one side.
        settled: items that have been returned.
    """

    votes: dict[str, dict[str, str]] = field(default_factory=dict)
    thumbs: dict[str, dict[str, Source]] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)

    def add(self, vote: Vote) -> None:
        """Count a vote."""
        votes = self.votes.setdefault(vote.item, {})
        votes[vote.rater or f"row {len(votes)}"] = vote.choice
        if len(vote.sides) == 1:
            self.thumbs.setdefault(vote.prompt, {})[vote.item] = vote.sides[0]

    def verdict(self, item: str) -> str:
        """Return the most frequent choice, or TIED if two are equally frequent."""
        (choice, most), *rest = Counter(self.votes[item].values()).most_common()
        return TIED if rest and rest[0][1] == most else choice

    def settle(self, vote: Vote) -> Any:
        """Return the pair that the item of a vote gives, or its two ratings; None if it was returned before, or is the
        rejected side of another item.

        Raises:
            Unused: the item gives no pair.
        """
        if vote.item in self.settled:
            return None
        self.settled.add(vote.item)
        if vote.blank:
            raise Unused("an empty text")
        verdict = self.verdict(vote.item)
        if len(vote.sides) == 1:
            return self._pair_of_thumbs(vote, verdict)
        if verdict not in SWAPPED:
            raise Unused(verdict)
        first, second = vote.sides
        chosen, rejected = (first, second) if verdict == "first" else (second, first)
        return [(chosen, True), (rejected, False)] if vote.rated else (chosen, rejected)

    def _pair_of_thumbs(self, vote: Vote, verdict: str) -> Sides | None:
        """Return the pair of a completion with thumbs up: the n-th of its prompt goes with the n-th that has thumbs
        down."""
        if verdict == TIED:
            raise Unused(TIED)
        of_prompt = self.thumbs[vote.prompt]
        up, down = ([item for item in of_prompt if self.verdict(item) == thumb] for thumb in THUMBS)
        at = (up if verdict == "up" else down).index(vote.item)
        if at >= min(len(up), len(down)):
            raise Unused("no completion of the same prompt with the other thumb")
        return (of_prompt[up[at]], of_prompt[down[at]]) if verdict == "up" else None


def comparison(reader: Reader, row: Row) -> Vote:
    """Return the vote of a row with two sides, which are the same item in either order.

    Raises:
        Wrong: as the methods of Reader, or an unknown winner, or equal sides.
    """
    prompt, a, b = reader.side(row, "prompt"), _written(reader, row, "a"), _written(reader, row, "b")
    winner, column = reader.text(row, "winner"), reader.names.get("winner", "winner")
    if winner not in WINNERS:
        problem = f"field {column!r} is {winner!r}, expected one of {', '.join(WINNERS)}"
        raise Wrong("unknown winner", problem, "repair it")
    if a == b:
        raise Wrong("equal sides", "a and b are equal", "remove the row, or repair one of them")
    choice = WINNERS[winner]
    if b < a:
        a, b, choice = b, a, SWAPPED.get(choice, choice)
    sides = (_after(prompt, a), _after(prompt, b))
    rater, blank = reader.text(row, "rater", empty=True), not (a.strip() and b.strip())
    return Vote(_key(prompt), _key([prompt, a, b]), choice, rater, sides, blank=blank)


def rated_comparison(reader: Reader, row: Row) -> Vote:
    """Return the vote of a row with two sides, to settle as two ratings."""
    return comparison(reader, row)._replace(rated=True)


def thumb(reader: Reader, row: Row) -> Vote:
    """Return the vote of a row with one completion.

    Raises:
        Wrong: as the methods of Reader, or an unknown thumb.
    """
    prompt, response = reader.side(row, "prompt"), reader.text(row, "response")
    choice, column = reader.text(row, "thumb"), reader.names.get("thumb", "thumb")
    if choice not in THUMBS:
        raise Wrong("unknown thumb", f"field {column!r} is {choice!r}, expected up or down", "repair it")
    rater, sides = reader.text(row, "rater", empty=True), (_after(prompt, response),)
    return Vote(_key(prompt), _key([prompt, response]), choice, rater, sides)


def rated_thumb(reader: Reader, row: Row) -> list[tuple[Source, bool]]:
    """Return a completion and whether it has thumbs up."""
    vote = thumb(reader, row)
    return [(vote.sides[0], vote.choice == "up")]


def _written(reader: Reader, row: Row, name: str) -> str:
    """Return the text of a column, which may be empty but not missing."""
    reader.value(row, name)
    return reader.text(row, name, empty=True)


def _after(prompt: Any, text: str) -> Source:
    """Return a text behind a prompt: as the assistant's message where that is a list of messages."""
    return joined(prompt, text if isinstance(prompt, str) else [{"role": "assistant", "content": text}], None)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


_COMPARED = (("prompt",), ("a",), ("b",), ("winner",))
_THUMBED = (("prompt",), ("response",), ("thumb",))
PREFERENCES: Formats = {**PAIRS, "ratings": (_COMPARED, comparison), "feedback": (_THUMBED, thumb)}
RATED: Formats = {**RATINGS, "ratings": (_COMPARED, rated_comparison), "feedback": (_THUMBED, rated_thumb)}
