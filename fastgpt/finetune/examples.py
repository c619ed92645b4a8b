"""From the rows of files to examples, pairs, ratings and labelled texts, with everything that was left out counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from fastgpt.core.errors import UserError
from fastgpt.data.read.defects import Defect
from fastgpt.data.read.files import find_files
from fastgpt.data.read.format import Format
from fastgpt.data.read.rows import Row, open_rows
from fastgpt.data.tokenizer import Tokenizer
from fastgpt.finetune.encode import Encoder, Example, Ids, Loss
from fastgpt.finetune.formats import EXAMPLES, LABELS, TAGGED, Formats, Labelled, Reader, Unused, Wrong, detect
from fastgpt.finetune.ratings import PREFERENCES, RATED, Poll, Vote
from fastgpt.inference.chat import Template

TooLong = Literal["cut", "skip", "error"]
Head = Literal["classification", "regression", "tags"]
MOST_LABELS = 1 << 16  # numbers above this are codes, not classes
UNLABELLED = -100  # the label of a token that has none
T = TypeVar("T")


class Pair(NamedTuple):
    """A chosen and a rejected completion of one prompt."""

    chosen: Example
    rejected: Example


class Rated(NamedTuple):
    """A completion and whether it is good."""

    example: Example
    good: bool


class Classified(NamedTuple):
    """A text, ids (n,) uint32, and its label: the int of a class, a float, or (n,) int64 tags."""

    ids: Ids
    label: int | float | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """How the rows of files become examples.

    Attributes:
        format: a format of fastgpt.finetune.formats; "auto": by the columns of the first row of each file.
        columns: column of the format -> column of the files, where they differ.
        loss: "completions": completions, replies and plain text carry loss; "all": prompts too.
        too_long: what to do with rows that are longer than the context: "cut" their end, "skip" them, or "error".
            Plain text is split instead. A row whose prompt fills the context cannot be cut and is skipped.
        defects: "fail" raises at the first defect of a file; "skip" leaves out and counts what is defective.
        keep: keep what the items were made from, in Loaded.origins.
    """

    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    loss: Loss = "completions"
    too_long: TooLong = "cut"
    defects: Literal["fail", "skip"] = "fail"
    keep: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("loss", Loss), ("too_long", TooLong), ("defects", Literal["fail", "skip"])):
            if getattr(self, name) not in get_args(allowed):
                expected = ", ".join(get_args(allowed))
                raise UserError(f"{name} is {getattr(self, name)!r}, expected one of {expected}")


@dataclass
class Counts:
    """What became of the rows.

    Attributes:
        rows: rows read.
        left_out: number of rows that are not used, by reason.
        cut: rows whose end was cut off. split: plain texts longer than the context, which are split when packed.
        special_texts: texts that hold the text of a special token, which stays ordinary text.
        tokens, learned: tokens of the examples (of both sides of pairs), and how many of them carry loss.
    """

    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    split: int = 0
    special_texts: int = 0
    tokens: int = 0
    learned: int = 0

    def add(self, *examples: Example) -> None:
        """Count the tokens of examples."""
        self.tokens += sum(len(e) for e in examples)
        self.learned += sum(int(e.learned.sum()) for e in examples)


class Origin(NamedTuple):
    """What items were made from: a source, the number of its row, from 1, and the numbers of the items."""

    source: Any
    row: int
    items: range


@dataclass
class Loaded(Generic[T]):
    """The examples of one path.

    Attributes:
        name: the path, for messages.
        items: the examples, in the order of the files.
        labels: the names of the classes or tags; empty unless there are some.
        origins: of the items, with Rows.keep.
        read: makes items from another source, and counts them.
    """

    name: str
    items: list[T]
    counts: Counts
    labels: tuple[str, ...] = ()
    origins: list[Origin] = field(default_factory=list)
    read: Callable[[Any], Iterable[T]] = lambda source: ()


def load_examples(
    path: str | Path, tokenizer: Tokenizer, template: Template, context: int, rows: Rows | None = None
) -> Loaded[Example]:
    """Read a file, folder or glob for fine-tuning.

    Args:
        template: for conversations.
        context: positions of the model, T; a sequence has at most T + 1 tokens, the last of which is only predicted.

    Raises:
        UserError: no file, no row that can be used, a template that cannot be used, a defect (then with file and line)
            unless `rows.defects` is "skip", or a row that is too long where `rows.too_long` is "error".
    """
    load = _Load[Example](path, tokenizer, template, context + 1, rows or Rows(), EXAMPLES)

    def read(source: Any) -> Iterator[Example]:
        example = load.fitted(load.encoder.example(source))
        load.counts.add(example)
        yield example

    return load.run(read)


def load_pairs(
    path: str | Path, tokenizer: Tokenizer, template: Template, context: int, rows: Rows | None = None
) -> Loaded[Pair]:
    """Read preference pairs, as load_examples; a side has at most T tokens."""
    load = _Load[Pair](path, tokenizer, template, context, rows or Rows(), PREFERENCES)

    def read(sources: Any) -> Iterator[Pair]:
        pair = Pair(*(load.fitted(load.encoder.example(source)) for source in sources))
        if np.array_equal(pair.chosen.ids, pair.rejected.ids):
            raise Wrong("equal sides", "chosen and rejected are equal where they fit the context", "remove the row")
        load.counts.add(*pair)
        yield pair

    return load.run(read)


def load_ratings(
    path: str | Path, tokenizer: Tokenizer, template: Template, context: int, rows: Rows | None = None
) -> Loaded[Rated]:
    """Read completions rated good or bad, or both sides of preference pairs as such, as load_pairs."""
    load = _Load[Rated](path, tokenizer, template, context, rows or Rows(), RATED)

    def read(sources: Any) -> Iterator[Rated]:
        rated = [Rated(load.fitted(load.encoder.example(source)), good) for source, good in sources]
        load.counts.add(*(r.example for r in rated))
        yield from rated

    return load.run(read)


def load_labelled(
    path: str | Path,
    tokenizer: Tokenizer,
    context: int,
    head: Head,
    labels: tuple[str, ...] = (),
    rows: Rows | None = None,
) -> Loaded[Classified]:
    """Read texts with labels, as load_examples; a text has at most T tokens.

    Args:
        head: "classification": a label for each text; "regression": a number for each text; "tags": a label for each
            word, which its first token bears.
        labels: names of the classes or tags; empty: those of the data, sorted. A label may also be their number.

    Raises:
        UserError: as load_examples, or a label that is not in `labels`.
    """
    load = _Load[Classified](path, tokenizer, Template(), context, rows or Rows(), TAGGED if head == "tags" else LABELS)
    names = labels if labels or head == "regression" else _names(load, head)
    numbers = {name: i for i, name in enumerate(names)}

    def read(row: Labelled) -> Iterator[Classified]:
        if head == "tags":
            yield _tagged(load, row, numbers)
            return
        ids = np.array([*tokenizer.prefix, *load.encoder.plain(str(row.text))], np.uint32)
        kept = load.kept(len(ids))
        load.counts.tokens += kept
        yield Classified(ids[:kept], _number(row.label) if head == "regression" else _class(row.label, numbers))

    loaded = load.run(read)
    loaded.labels = names
    return loaded


class _Load(Generic[T]):
    """The reading of one path."""

    def __init__(
        self, path: str | Path, tokenizer: Tokenizer, template: Template, longest: int, rows: Rows, formats: Formats
    ) -> None:
        if rows.format != "auto" and rows.format not in formats:
            raise UserError(f"format is {rows.format!r}, expected auto or one of {', '.join(formats)}")
        self.path, self.longest, self.rows, self.formats = path, longest, rows, formats
        self.encoder = Encoder(tokenizer, template, rows.loss)
        self.counts = Counts()
        self.format = Format(mode=rows.defects)

    def run(self, read: Callable[[Any], Iterator[T]]) -> Loaded[T]:
        """Return what `read` makes of each row in its format."""
        items: list[T] = []
        origins: list[Origin] = []
        for row, source in self.sources(self._count):
            try:
                before = len(items)
                items += read(source)
                if self.rows.keep:
                    origins.append(Origin(source, self.counts.rows, range(before, len(items))))
            except Wrong as wrong:
                self._report(row, wrong)
            except Unused as reason:
                self.counts.left_out[str(reason)] += 1
        self.counts.special_texts = self.encoder.special_texts
        if not items:
            left = ", ".join(f"{n} {why}" for why, n in sorted(self.counts.left_out.items()))
            raise UserError(
                f"{self.path} has no row to train on, of {self.counts.rows}" + (f": {left}" if left else "")
            )
        return Loaded(str(self.path), items, self.counts, origins=origins, read=read)

    def sources(self, on_defect: Callable[[Defect], None]) -> Iterator[tuple[Row, Any]]:
        """Yield each row with what its format makes of it. Votes are counted first, in a pass of their own."""
        poll = None
        for row, source in self._parsed(self.format, on_defect):
            if isinstance(source, Vote):
                poll = poll or self._poll()
                try:
                    source = poll.settle(source)
                except Unused as reason:
                    self.counts.left_out[str(reason)] += 1
                    continue
            if source is not None:
                yield row, source

    def _poll(self) -> Poll:
        """Count the votes of all rows."""
        poll, before = Poll(), self.counts.rows
        for _, vote in self._parsed(replace(self.format, mode="skip"), lambda defect: None):
            if isinstance(vote, Vote):
                poll.add(vote)
        self.counts.rows = before
        return poll

    def _parsed(self, format: Format, on_defect: Callable[[Defect], None]) -> Iterator[tuple[Row, Any]]:
        """Yield each row as a source, or as a vote."""
        reader = Reader(self.rows.columns)
        for file in find_files(self.path, format, on_defect).files:
            name = self.rows.format
            for row in open_rows(file, format, on_defect):
                self.counts.rows += 1
                try:
                    name = detect(row, self.formats, self.rows.columns) if name == "auto" else name
                    source = self.formats[name][1](reader, row)
                except Wrong as wrong:
                    self._report(row, wrong)
                    continue
                yield row, source

    def _report(self, row: Row, wrong: Wrong) -> None:
        row.report(wrong.kind, wrong.problem, wrong.remedy)

    def _count(self, defect: Defect) -> None:
        self.counts.left_out[defect.kind] += 1

    def kept(self, size: int) -> int:
        """Return how many tokens of a row of `size` are kept.

        Raises:
            Unused: it is too long and skipped.
            Wrong: it is too long and that is an error.
        """
        if size <= self.longest:
            return size
        if self.rows.too_long == "error":
            problem = f"the row has {size} tokens, expected at most {self.longest}"
            raise Wrong("too long", problem, "shorten it, raise the context, or set too_long to cut or skip")
        if self.rows.too_long == "skip":
            raise Unused("longer than the context")
        self.counts.cut += 1
        return self.longest

    def fitted(self, example: Example) -> Example:
        """Return an example that fits the context, or a plain text of any length.

        Raises:
            Unused, Wrong: as `kept`; also where the prompt fills the context, or nothing is learned.
        """
        if not example.learned.any():
            raise Unused("nothing to learn")
        if example.plain:
            self.counts.split += len(example) > self.longest
            return example
        if example.prompt >= self.longest and self.rows.too_long != "error":
            raise Unused("the prompt fills the context")
        kept = self.kept(len(example))
        return Example(example.ids[:kept], example.learned[:kept])


def _names(load: _Load[Classified], head: Head) -> tuple[str, ...]:
    """Return the labels of the data: names in order, or the numbers from 0 to the largest."""
    found: set[Any] = set()
    for _, row in load.sources(lambda defect: None):
        found.update(x for x in (row.label if head == "tags" else [row.label]) if isinstance(x, (str, int)))
    load.counts.rows = 0
    found.discard(UNLABELLED)
    if all(isinstance(label, int) for label in found):
        if max(found, default=0) >= MOST_LABELS:
            raise UserError(f"{load.path} has the label {max(found)}, expected names, or numbers from 0 up")
        return tuple(str(i) for i in range(max(found, default=-1) + 1))
    return tuple(sorted({str(label) for label in found}, key=lambda x: (not x.isdecimal(), len(x) * x.isdecimal(), x)))


def _tagged(load: _Load[Classified], row: Labelled, numbers: dict[str, int]) -> Classified:
    """Return the tokens of words, with the label of each word on its first token."""
    ids, first = load.encoder.words(list(row.text))
    label = np.full(len(ids), UNLABELLED, np.int64)
    label[first] = [UNLABELLED if tag == UNLABELLED else _class(tag, numbers) for tag in row.label]
    kept = load.kept(len(ids))
    learned = int((label[:kept] != UNLABELLED).sum())
    if not learned:
        raise Unused("nothing to learn")
    load.counts.tokens, load.counts.learned = load.counts.tokens + kept, load.counts.learned + learned
    return Classified(ids[:kept], label[:kept])


def _class(label: Any, numbers: dict[str, int]) -> int:
    """Return the number of a label."""
    if isinstance(label, int) and 0 <= label < len(numbers):
        return label
    if not isinstance(label, str) or label not in numbers:
        known = ", ".join(list(numbers)[:10]) + (", ..." if len(numbers) > 10 else "")
        raise Wrong("unknown label", f"the label {label!r} is unknown, expected one of {known}", "repair it")
    return numbers[label]


def _number(label: Any) -> float:
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = float("nan")
    if not isfinite(value):
        raise Wrong("wrong type", f"the label is {label!r}, expected a number", "write a number")
    return value
