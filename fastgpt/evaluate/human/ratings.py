"""Pairs of answers, the order in which a rater sees them, and the votes, one line of JSONL each."""

from __future__ import annotations

import datetime
import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.evaluate.human.answers import Answers, Question
from fastgpt.evaluate.human.files import Prompt, append, prompt_of, read
from fastgpt.evaluate.results import item_id

WINNERS = ("a", "b", "tie", "both_bad")
SCREEN = {"ab": {"first": "a", "second": "b"}, "ba": {"first": "b", "second": "a"}}  # order -> side on screen -> side


@dataclass(frozen=True)
class Pair:
    """A prompt with an answer of each model."""

    id: str
    prompt: Prompt
    a: str
    b: str


def pairs_of(questions: list[Question], a: Answers, b: Answers) -> tuple[list[Pair], int]:
    """Return the pairs whose answers differ, and how many do not.

    Raises:
        UserError: an answer is missing.
    """
    found = []
    for q in questions:
        for answers in (a, b):
            if item_id(q.prompt) not in answers.texts:
                raise UserError(f"{answers.model} has no answer to prompt {q.id}, expected one for each prompt")
        found.append(Pair(q.id, q.prompt, a.texts[item_id(q.prompt)], b.texts[item_id(q.prompt)]))
    different = [p for p in found if p.a != p.b]
    return different, len(found) - len(different)


class Ratings:
    """The votes on pairs, kept in a JSONL file.

    Args:
        path: the file; votes on these pairs that it has are counted as given.
        pairs: what is rated.
        names: of model a and model b.
        seed: of the order of the pairs and of their sides, which differ between raters.

    Raises:
        UserError: the file has a line that is not a rating.
    """

    def __init__(self, path: Path, pairs: list[Pair], names: tuple[str, str], seed: int = 0) -> None:
        self.path, self.pairs, self.names, self.seed = path, pairs, names, seed
        self._lock = threading.Lock()
        self._votes: dict[tuple[str, str], dict[str, Any]] = {}  # (rater, id) -> the last row
        self._orders: dict[str, list[Pair]] = {}
        known = {p.id: p for p in pairs}
        for row in read_ratings(path) if path.exists() else ():
            pair = known.get(row["id"])
            if pair is not None and (row["a"], row["b"]) == (pair.a, pair.b) and names == _models(row):
                self._votes[row["rater"], pair.id] = row

    def __len__(self) -> int:
        return len(self.pairs)

    def order(self, rater: str) -> list[Pair]:
        """Return the pairs in the order in which a rater sees them. It depends on the seed, the rater and the ids."""
        if rater not in self._orders:
            self._orders[rater] = sorted(self.pairs, key=lambda p: self._random(rater, p).random())
        return self._orders[rater]

    def sides(self, rater: str, pair: Pair) -> str:
        """Return "ab" if a rater sees model a first, else "ba"."""
        return "ab" if self._random(rater, pair).getrandbits(64) & 1 else "ba"

    def _random(self, rater: str, pair: Pair) -> random.Random:
        return random.Random(f"{self.seed}\n{rater}\n{pair.id}")

    def done(self, rater: str) -> int:
        """Return how many pairs a rater has rated."""
        return sum(name == rater for name, _ in self._votes)

    def next_place(self, rater: str) -> int | None:
        """Return the first place in a rater's order without a vote; None if there is none."""
        open_places = (i for i, p in enumerate(self.order(rater)) if (rater, p.id) not in self._votes)
        return next(open_places, None)

    def shown(self, rater: str, place: int) -> dict[str, Any]:
        """Return what a rater sees at a place: nothing in it tells the models apart."""
        pair = self.order(rater)[place]
        order = self.sides(rater, pair)
        first, second = (pair.a, pair.b) if order == "ab" else (pair.b, pair.a)
        messages = [{"role": "", "content": pair.prompt}] if isinstance(pair.prompt, str) else pair.prompt
        vote = self._votes.get((rater, pair.id))
        screen = {side: place for place, side in SCREEN[order].items()}
        given = vote and {"choice": screen.get(vote["winner"], vote["winner"]), "comment": vote.get("comment", "")}
        return {"place": place, "prompt": messages, "first": first, "second": second, "vote": given}

    def vote(self, rater: str, place: int, choice: str, seconds: float, comment: str) -> None:
        """Write a vote down; it replaces an earlier one of the rater on the pair.

        Args:
            choice: "first", "second", "tie" or "both_bad".
            seconds: from the display of the pair to the vote.
        """
        pair = self.order(rater)[place]
        order = self.sides(rater, pair)
        row = {
            "id": pair.id,
            "prompt": pair.prompt,
            "a": pair.a,
            "b": pair.b,
            "a_model": self.names[0],
            "b_model": self.names[1],
            "winner": SCREEN[order].get(choice, choice),
            "rater": rater,
            "order": order,
            "seconds": round(seconds, 1),
            "comment": comment,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        with self._lock:
            append(self.path, row)
            self._votes[rater, pair.id] = row


def read_ratings(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file of ratings; of several votes of a rater on a pair of answers the last one counts.

    Raises:
        UserError: a line is not a rating.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, row in read(path):
        where = f"{path}, line {number}"
        prompt_of(row, where)
        for name in ("id", "a", "b", "a_model", "b_model", "rater"):
            if not isinstance(row.get(name), str):
                raise UserError(f"{where}: {name} is {row.get(name)!r:.60}, expected a text")
        if row.get("winner") not in WINNERS:
            raise UserError(f"{where}: winner is {row.get('winner')!r:.60}, expected one of {', '.join(WINNERS)}")
        key = (row["rater"], row["id"], *_models(row), row["a"], row["b"])
        found.pop(key, None)
        found[key] = row
    return list(found.values())


def _models(row: dict[str, Any]) -> tuple[Any, Any]:
    return row.get("a_model"), row.get("b_model")
