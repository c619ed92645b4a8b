"""Which requests wait, which are read, and which are generated, with their rows and pages.

A request waits until there is a row for it and enough pages for its text. It then has pages and reads, and when its
text is read, it gets a row. The rows in use are always the first ones: if a request leaves, the last row moves to its
place. If pages are used up, the youngest request gives its own back and waits; the oldest one always has all it needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastgpt.inference.pages import Key, Pages
from fastgpt.inference.rows import Rows, options_of
from fastgpt.inference.running import Running
from fastgpt.inference.sampling import Options
from fastgpt.models.gpt import GPT

PREFILL_TOKENS = 4096  # in one pass
PAGE_SIZE = 32  # tokens
PAGE_SIZES = tuple(1 << n for n in range(3, 9))  # those of ops.attention_decode


@dataclass(frozen=True)
class Limits:
    """What a schedule may use.

    Attributes:
        max_batch: rows.
        context: tokens of a text that the model reads.
        prefill_tokens: tokens of texts that a pass reads while others wait for it.
        cache_tokens: tokens of all texts in the cache; None: max_batch texts of the whole context.
        page_size: tokens of a page.
        reuse: take the pages of earlier texts that begin alike.
        whole: texts are read in one pass.
        graphs: run steps from CUDA graphs.
    """

    max_batch: int
    context: int
    prefill_tokens: int
    cache_tokens: int | None
    page_size: int
    reuse: bool
    whole: bool
    graphs: bool


class Schedule:
    """Requests on their way.

    Attributes:
        waiting: neither rows nor pages.
        reading: pages.
        running: rows and pages, in the order of the rows.
        rows, pages: None and of no pages until they are allocated.
    """

    def __init__(self, model: GPT, limits: Limits) -> None:
        self.model, self.limits = model, limits
        self.waiting: list[Running] = []
        self.reading: list[Running] = []
        self.running: list[Running] = []
        self.rows: Rows | None = None
        self.pages = Pages(0, limits.page_size)
        self._options: Options | None = None

    @property
    def busy(self) -> bool:
        """There are requests."""
        return bool(self.waiting or self.reading or self.running)

    @property
    def options(self) -> Options:
        """What any of the running requests needs."""
        self._options = self._options or options_of([r.request for r in self.running])
        return self._options

    def allocate(self, count: int, size: int) -> None:
        """Allocate `count` rows, and pages for as many texts of `size` tokens or, if less, for cache_tokens."""
        self.rows = None  # free the old one first
        page = next(n for n in PAGE_SIZES if n >= min(self.limits.page_size, size))
        pages = -(-size // page) * count
        if self.limits.cache_tokens is not None:
            pages = min(pages, -(-self.limits.cache_tokens // page))
        self.rows = Rows(self.model, count, size, pages, page, self.limits.graphs)
        self.pages = Pages(pages, page)

    def cancel(self, number: int) -> None:
        """Drop a request."""
        self.waiting = [r for r in self.waiting if r.number != number]
        for r in [r for r in (*self.reading, *self.running) if r.number == number]:
            self._leave(r)

    def admit(self) -> None:
        """Let waiting requests read, in order, as long as they fit."""
        if self.waiting and not self.running and not self.reading:
            count = min(self.limits.max_batch, len(self.waiting))
            size = min(self.limits.context, max(r.wanted for r in self.waiting))
            if self.rows is None or self.rows.count < count or self.rows.size < size:
                self.allocate(count, size)
        while self.waiting and self._fits(self.waiting[0]):
            self.reading.append(self.waiting.pop(0))

    def _fits(self, r: Running) -> bool:
        """Return whether a request can be read now; then it has the pages that others have read for it."""
        rows = self.rows
        assert rows is not None
        if len(self.running) + len(self.reading) == rows.count or min(self.limits.context, r.wanted) > rows.size:
            return False  # more memory is allocated when no request runs
        r.begin(self.limits.context)
        self._match(r)
        if sum(map(self._owed, (*self.running, *self.reading, r))) <= self.pages.available:
            return True
        self.pages.release(r.chain)
        return False

    def _owed(self, r: Running) -> int:
        """Return the pages that a request takes until its text is read and has grown by a page."""
        most = min(len(r.ids) - r.start + self.pages.size, self.limits.context, r.wanted)
        return max(0, self.pages.needed(most) - len(r.chain.pages))

    def _match(self, r: Running) -> None:
        """Take the pages that others have read."""
        if self.limits.reuse and not r.unscored:
            self.pages.match(r.chain, r.text)
            r.read = max(r.read, r.chain.known * self.pages.size)

    def plan(self) -> list[tuple[Running, int]]:
        """Return what the next pass reads: texts, and the number of tokens of each. If several texts have the same page
        to read next, the first one reads it, and the others take it later."""
        alone = len(self.reading) == 1 and not self.running
        left = PREFILL_TOKENS if alone else self.limits.prefill_tokens
        parts: list[tuple[Running, int]] = []
        begun: set[Key] = set()
        for r in list(self.reading):
            self._match(r)
            rest = len(r.text) - r.read
            count = rest if self.limits.whole else min(rest, left)
            if not count:
                break
            key = self.pages.key(r.chain, r.text)
            if self.limits.reuse and key is not None and not r.unscored:
                if key in begun:
                    continue
                begun.add(key)
            if not (self.pages.grow(r.chain, r.read + count) if parts else self.grow(r, r.read + count)):
                break
            parts.append((r, count))
            left = max(0, left - count)
        return parts

    def grow(self, r: Running, tokens: int) -> bool:
        """Let a request have pages for `tokens` tokens. The youngest requests give theirs back and wait; return False
        if this is one of them."""
        while not self.pages.grow(r.chain, tokens):
            youngest = max((*self.running, *self.reading), key=lambda other: other.number)
            self._leave(youngest)
            self.waiting.append(youngest)
            self.waiting.sort(key=lambda other: other.number)
            if youngest is r:
                return False
        return True

    def keep(self, r: Running, count: int) -> None:
        """Note that `count` tokens more of a text were read, so later texts find the pages that are full."""
        r.read += count
        if self.limits.reuse and r.read >= (r.chain.known + 1) * self.pages.size:
            changed = self.pages.keep(r.chain, r.text[: r.read])
            r.placed = r.placed if changed is None else min(r.placed, changed)

    def start(self, r: Running) -> None:
        """Give a row to a request whose text is read."""
        assert self.rows is not None
        self.reading.remove(r)
        self.running.append(r)
        new = r.ids[r.prompt_tokens :]
        self.rows.set(len(self.running) - 1, r.request, r.ids, new, r.read, r.adapter_number)
        if len(r.ids) == r.prompt_tokens:
            r.cached_tokens = r.chain.reused * self.pages.size
        self._options = None

    def place(self) -> bool:
        """Let each row have the pages for its next token; return whether there are rows."""
        for r in list(self.running):
            tokens = len(r.ids) - r.start
            if tokens > len(r.chain.pages) * self.pages.size and r in self.running:
                self.grow(r, tokens)
        places = []
        for row, r in enumerate(self.running):
            if r.placed < len(r.chain.pages):
                places += [(row, i, r.chain.pages[i]) for i in range(r.placed, len(r.chain.pages))]
                r.placed = len(r.chain.pages)
        if places and self.rows is not None:
            self.rows.place(places)
        return bool(self.running)

    def reread(self, r: Running) -> None:
        """Let a request that had a row read its text, which is too long for the context now, anew."""
        r.begin(self.limits.context)
        self.reading.append(r)

    def remove(self, gone: Iterable[int]) -> None:
        """Take rows from their requests; the last row moves to the place of each."""
        for row in sorted(gone, reverse=True):
            self.pages.release(self.running[row].chain)
            last = self.running.pop()
            if row < len(self.running):
                assert self.rows is not None
                self.rows.move(len(self.running), row)
                self.running[row] = last
            self._options = None

    def _leave(self, r: Running) -> None:
        """Take rows and pages from a request."""
        if r in self.running:
            self.remove([self.running.index(r)])
        else:
            self.reading.remove(r)
            self.pages.release(r.chain)
