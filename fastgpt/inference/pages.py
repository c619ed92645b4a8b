"""Who owns which page of a PagedCache, and which pages a new text can take because they begin it.

The index is a tree: a full page is found by the page before it and its own tokens. Keys of a dictionary are compared by
value, so texts whose hashes are equal are told apart. A text uses all pages from the root to its last one. When it
ends, they stay in the index, unused, until memory is wanted; then the one that was not used for longest goes first,
which is always one that no other follows.

Source: PagedAttention (Kwon et al. 2023, arXiv:2309.06180), RadixAttention (Zheng et al. 2023, arXiv:2312.07104).
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Node = int | str  # a page of the index, or the name of a tree
Key = tuple[Node, tuple[int, ...]]  # the page before, and the tokens


class Entry(NamedTuple):
    """A page in the index."""

    key: Key
    node: int


@dataclass(eq=False)
class Chain:
    """The pages of a text.

    Attributes:
        node: the last page in the index; before, the name of the tree whose pages this text may share.
        pages: in the order of the text.
        known: how many of the first ones are in the index.
        reused: how many of the first ones were there already.
    """

    node: Node = ""
    pages: list[int] = field(default_factory=list)
    known: int = 0
    reused: int = 0


class Pages:
    """Pages 0 to count - 1, of `size` tokens each."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(reversed(range(count)))
        self._users = [0] * count
        self._index: dict[Key, int] = {}
        self._entries: list[Entry | None] = [None] * count
        self._unused = OrderedDict[int, None]()  # in the index; the one that was not used for longest comes first
        self._nodes = itertools.count()

    @property
    def available(self) -> int:
        """Pages that no text uses."""
        return len(self._free) + len(self._unused)

    @property
    def used(self) -> int:
        """Pages that texts use."""
        return self.count - self.available

    def counts(self) -> dict[str, int]:
        """Return the pages that texts use, those that are kept for others, and those that are free."""
        return {"used": self.used, "kept": len(self._unused), "free": len(self._free)}

    def needed(self, tokens: int) -> int:
        """Return the number of pages of a text."""
        return -(-tokens // self.size)

    def key(self, chain: Chain, text: Sequence[int]) -> Key | None:
        """Return the key of the first page of a text that is not in the index, if another text could take it: it is
        full, and not the last one, whose last token must be read for the next one to be predicted."""
        start = chain.known * self.size
        return (chain.node, tuple(text[start : start + self.size])) if start + self.size < len(text) else None

    def match(self, chain: Chain, text: Sequence[int]) -> None:
        """Take the pages that continue the chain, as far as the index has them."""
        while chain.known == len(chain.pages) and (key := self.key(chain, text)) in self._index:
            assert key is not None
            page = self._index[key]
            self._use(page)
            chain.pages.append(page)
            self._follow(chain, page)
            chain.reused += 1

    def grow(self, chain: Chain, tokens: int) -> bool:
        """Let the chain have pages for `tokens` tokens; return False, and do nothing, if there are too few."""
        more = self.needed(tokens) - len(chain.pages)
        if more > self.available:
            return False
        for _ in range(more):
            page = self._free.pop() if self._free else self._evict()
            self._users[page] = 1
            chain.pages.append(page)
        return True

    def keep(self, chain: Chain, text: Sequence[int]) -> int | None:
        """Enter the full pages of a text, of which all tokens were read, into the index. If another text has entered
        the same page, the chain takes that one and frees its own.

        Returns:
            The first place in the chain where that happened; None: nowhere.
        """
        changed = None
        while (end := (chain.known + 1) * self.size) <= len(text):
            key, own = (chain.node, tuple(text[end - self.size : end])), chain.pages[chain.known]
            page = self._index.setdefault(key, own)
            if page == own:
                self._entries[own] = Entry(key, next(self._nodes))
            else:
                self._use(page)
                self._drop(own)
                chain.pages[chain.known] = page
                changed = chain.known if changed is None else changed
            self._follow(chain, page)
        return changed

    def release(self, chain: Chain) -> None:
        """Give back all pages of a text that ends."""
        for page in reversed(chain.pages):
            self._drop(page)
        chain.pages = []

    def discard(self, chain: Chain) -> None:
        """Take the pages of a text out of the index, so that no other text takes them."""
        for page in chain.pages:
            entry = self._entries[page]
            if entry is not None:
                del self._index[entry.key]
                self._entries[page] = None

    def forget(self) -> None:
        """Empty the index."""
        self._free += self._unused
        self._unused.clear()
        self._index.clear()
        self._entries = [None] * self.count

    def _follow(self, chain: Chain, page: int) -> None:
        entry = self._entries[page]
        assert entry is not None
        chain.node = entry.node
        chain.known += 1

    def _use(self, page: int) -> None:
        self._unused.pop(page, None)
        self._users[page] += 1

    def _drop(self, page: int) -> None:
        self._users[page] -= 1
        if not self._users[page]:
            if self._entries[page] is None:
                self._free.append(page)
            else:
                self._unused[page] = None

    def _evict(self) -> int:
        page, _ = self._unused.popitem(last=False)
        entry = self._entries[page]
        assert entry is not None
        del self._index[entry.key]
        self._entries[page] = None
        return page
