"""Apply the steps of an augmentation to the training rows of a run.

Every step sees the rows of the files, not what other steps made. What it makes is read like a row, is never part of
validation, and is dropped if the data have it already. `augmented.jsonl` in the run's folder has each new row, in a
form that `fastgpt finetune` reads, with the step and the row that it was made from.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastgpt.core.errors import UserError, counted
from fastgpt.core.functions import open_function
from fastgpt.finetune.asking.dialogue import LeftOut, seed_of
from fastgpt.finetune.asking.journal import write_lines
from fastgpt.finetune.asking.keys import key_of
from fastgpt.finetune.augment.paraphrase import paraphrased
from fastgpt.finetune.augment.rows import Fields, asked, changed, row_of, source_of
from fastgpt.finetune.augment.steps import Step
from fastgpt.finetune.augment.swap import Terms
from fastgpt.finetune.examples import Loaded
from fastgpt.finetune.formats import Unused, Wrong

FILE = "augmented.jsonl"
Set = tuple[Loaded[Any], set[int]]  # what was read of a path, and the numbers of the items that are held out


class Place(NamedTuple):
    """Where a row comes from."""

    path: str
    row: int

    def __str__(self) -> str:
        return f"row {self.row} of {self.path}"


@dataclass
class Opened:
    """A step with what it needs: its terms, or its function."""

    step: Step
    terms: Terms | None = None
    function: Callable[..., Any] | None = None


def open_steps(steps: Sequence[Step]) -> list[Opened]:
    """Open the files of the steps.

    Raises:
        UserError: one cannot be opened.
    """
    found = []
    for step in steps:
        key_of(step.key_env)
        terms = Terms(step.swap) if step.swap else None
        function = open_function(step.hook, f"augment {step.name}") if step.hook else None
        found.append(Opened(step, terms, function))
    return found


class Augmentation:
    """New rows for the training sets of a run.

    Args:
        folder: of the run.
        device: of a model that paraphrases.

    Attributes:
        said: lines for the console.
        made: number of new rows by the name of the step.
    """

    def __init__(self, steps: Sequence[Step], task: str, folder: Path, seed: int, device: str) -> None:
        self.steps, self.task, self.folder, self.seed, self.device = open_steps(steps), task, folder, seed, device
        self.said: list[str] = []
        self.made: Counter[str] = Counter()

    def items(self, sets: dict[str, Set], known: Sequence[Loaded[Any]]) -> dict[str, list[Any]]:
        """Return new items for each training set, and write FILE if there are steps.

        Args:
            sets: by path.
            known: everything that was read, validation data included.

        Raises:
            UserError: a step makes no row, or fails.
        """
        seen = {_key(row_of(origin.source)) for loaded in known for origin in loaded.origins}
        found: dict[str, list[Any]] = {path: [] for path in sets}
        written: list[Fields] = []
        for opened in self.steps:
            name, left = opened.step.name, Counter[str]()
            drawn, could = self._drawn(opened, sets)
            for place, new in self._apply(opened, drawn):
                try:
                    found[place.path] += self._read(sets[place.path][0], new, seen, opened.step, place)
                except LeftOut as why:
                    left[str(why)] += 1
                    continue
                self.made[name] += 1
                provenance = {"step": name, "kind": opened.step.kind, "data": place.path, "row": place.row}
                written.append({**new, "augmented": provenance})  # type: ignore[dict-item]
            self._say(opened.step, could, left)
        if self.steps:
            write_lines(self.folder / FILE, written)
        return found

    def _say(self, step: Step, could: int, left: Counter[str]) -> None:
        dropped = "".join(f"; {n:,} left out: {why}" for why, n in sorted(left.items()))
        made = self.made[step.name]
        line = f"{step.about}: {counted(made, 'row')} added, of {could:,} training rows that it can change{dropped}"
        if not made:
            raise UserError(f"{line}; expected at least one new row")
        self.said.append(line)

    def _drawn(self, opened: Opened, sets: dict[str, Set]) -> tuple[list[tuple[Place, Fields]], int]:
        """Return a share of the training rows that a step can change, swapped already, and how many these are."""
        drawn: list[tuple[Place, Fields]] = []
        could = 0
        for path, (loaded, held) in sets.items():
            rows = [(o.row, row_of(o.source)) for o in loaded.origins if not held.intersection(o.items)]
            if opened.terms is not None:
                swap = opened.terms.swap
                rows = [(number, new) for number, row in rows if (new := changed(row, swap)) != row]
            elif opened.step.paraphrase:
                rows = [(number, row) for number, row in rows if asked(row).strip()]
            count = min(len(rows), max(1, round(opened.step.share * len(rows))))
            draw = random.Random(seed_of(self.seed, path, opened.step.name))
            places = sorted(draw.sample(range(len(rows)), count))
            drawn += [(Place(path, rows[i][0]), rows[i][1]) for i in places]
            could += len(rows)
        return drawn, could

    def _apply(self, opened: Opened, drawn: list[tuple[Place, Fields]]) -> Iterator[tuple[Place, Fields | LeftOut]]:
        """Yield what a step makes of rows."""
        if opened.terms is not None:
            yield from drawn
        elif opened.function is not None:
            for place, row in drawn:
                draw = random.Random(seed_of(self.seed, *place, opened.step.name))
                yield from ((place, new) for new in _called(opened, row, draw, place))
        else:
            new = paraphrased(opened.step, [row for _, row in drawn], self.folder, self.seed, self.device)
            yield from zip((place for place, _ in drawn), new)

    def _read(self, loaded: Loaded[Any], row: Fields | LeftOut, seen: set[str], step: Step, place: Place) -> list[Any]:
        """Return the items of a new row.

        Raises:
            LeftOut: it gives none.
            UserError: a hook made a row with a defect.
        """
        if isinstance(row, LeftOut):
            raise row
        try:
            source = source_of(row, self.task)
            if (key := _key(row_of(source))) in seen:
                raise LeftOut("in the data already")
            items = list(loaded.read(source))
        except Unused as why:
            raise LeftOut(str(why)) from None
        except Wrong as wrong:
            if step.hook:
                raise UserError(f"{step.about}: what it makes of {place} has a defect: {wrong}") from None
            raise LeftOut(wrong.kind) from None
        seen.add(key)
        return items


def _called(opened: Opened, row: Fields, draw: random.Random, place: Place) -> list[Fields]:
    """Return what a hook makes of a row."""
    assert opened.function is not None
    try:
        new = opened.function(json.loads(json.dumps(row)), draw)
    except Exception as e:
        raise UserError(f"{opened.step.about}: it fails for {place} ({type(e).__name__}: {e})") from e
    found = new if isinstance(new, list) else [] if new is None else [new]
    if not all(isinstance(item, dict) for item in found):
        got = f"it returns {str(new)[:60]!r} for {place}"
        raise UserError(f"{opened.step.about}: {got}, expected a row, a list of rows or None")
    return found


def _key(row: Fields) -> str:
    return json.dumps(row, sort_keys=True, default=str)
