"""Find what texts begin with in common, so that it is computed once.

The texts are sorted; the longest common prefixes of neighbours then determine a tree. A part that saves fewer than
LEAST tokens is not shared, because every part is a sequence of its own in attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
LEAST = 16  # tokens


@dataclass(eq=False)
class Node:
    """A part of one or several texts.

    Attributes:
        ids: of one of the texts, from its first token on.
        end: length of the text up to the end of this part.
        start: where this part begins, the end of its parent.
        children: the parts that follow, two or more, or none.
        parent: the part before it; None: it is the first one.
        texts: numbers of the texts that end in this part.
        tokens: of this part and all below it.
    """

    ids: Ids
    end: int
    start: int = 0
    children: list[Node] = field(default_factory=list)
    parent: Node | None = None
    texts: list[int] = field(default_factory=list)
    tokens: int = 0


def trees_of(texts: Sequence[Ids], limit: int | None = None) -> list[Node]:
    """Return the roots of the trees of texts; a text longer than `limit` tokens is a tree of its own."""
    keys = [t.astype(">u4").tobytes() for t in texts]  # sorts as the ids do
    root = Node(np.empty(0, np.int32), 0)
    path = [root]  # from the root to the last text
    for i in sorted(range(len(texts)), key=keys.__getitem__):
        text, before = texts[i], path[-1].ids
        common = _common(text, before)
        if limit is not None and max(len(text), len(before)) > limit and common < max(len(text), len(before)):
            common = 0
        _climb(path, common)
        if path[-1].end < len(text):
            path.append(Node(text, len(text)))
        path[-1].texts.append(i)
    _climb(path, 0)
    for node in root.children:
        node.parent = None
    return root.children


def _common(a: Ids, b: Ids) -> int:
    """Return the length of the longest common prefix."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def _climb(path: list[Node], end: int) -> None:
    """Close the nodes of the path that end after `end`; if none ends there, a new one does."""
    while path[-1].end > end:
        node = path.pop()
        if path[-1].end < end:
            path.append(Node(node.ids, end))
        _close(node, path[-1])


def _close(node: Node, parent: Node) -> None:
    """Put a node that is complete below its parent, or else its children if it saves too little."""
    own, children = node.end - parent.end, node.children
    node.start, node.tokens = parent.end, own + sum(child.tokens for child in children)
    dissolved = bool(children) and (len(children) - 1) * own < LEAST
    if dissolved:
        children[0].texts += node.texts
    for child in children if dissolved else [node]:
        if dissolved:
            child.start, child.tokens = parent.end, child.tokens + own
        child.parent = parent
        parent.children.append(child)


def depth_first(roots: Iterable[Node]) -> tuple[list[Node], list[int]]:
    """Return all nodes of trees, each before its children and these before the next tree, and the number of the parent
    of each, -1 for a root."""
    nodes: list[Node] = []
    parents: list[int] = []
    waiting = [(root, -1) for root in roots][::-1]
    while waiting:
        node, parent = waiting.pop()
        waiting += [(child, len(nodes)) for child in reversed(node.children)]
        nodes.append(node)
        parents.append(parent)
    return nodes, parents
