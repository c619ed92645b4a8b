"""Text to measure data sets with: documents of real sentences in random order, with the defects of real collections.

The sentences are those of the running Python's documentation strings and help topics. A document is a title and 2 to 30
paragraphs of them, with numbers of its own, so no two are alike. Of 100 documents 4 are copies, 6 are copies with a few
words changed, 5 hold personal data, 5 have damaged characters, 10 fail the quality rules.
"""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fastgpt.data.corpus import default_corpus, read_text

_SPACES = re.compile(r"\s+")
_SENTENCE = re.compile(r"(?<=[.!?]) (?=[A-Z])")
_PROSE = re.compile(r"[A-Z](?:[\w ]|[a-z]'[a-z])*,?(?:[\w ]|[a-z]'[a-z])*\.")
_POOR = ("CLICK HERE >>> {n} | buy now | ", "lorem ipsum dolor sit amet ", "{{ item.{n} }} ", "- {n}\n", "... ")


@cache
def sentences() -> list[str]:
    """Return the sentences of the standard library's documentation, 5 to 40 words long, each once."""
    found: dict[str, None] = {}
    for file in default_corpus().files:
        try:
            tree = ast.parse(read_text(file.path))
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        if file.name == "pydoc_data/topics.py":
            texts += [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        for text in texts:
            for sentence in _SENTENCE.split(_SPACES.sub(" ", text)):
                if 5 <= sentence.count(" ") <= 40 and _PROSE.fullmatch(sentence):
                    found[sentence] = None
    return list(found)


def documents(seed: int = 0) -> Iterator[str]:
    """Yield documents without end, the same for the same seed and Python."""
    draw = random.Random(seed)
    pool, earlier = sentences(), list[str]()
    while True:
        kind = draw.random()
        if kind < 0.1 and earlier:
            text = draw.choice(earlier)
            if kind >= 0.04:
                words = text.split(" ")
                for _ in range(max(1, len(words) // 100)):
                    words[draw.randrange(len(words))] = f"word{draw.randrange(1000)}"
                text = " ".join(words)
            yield text
            continue
        if kind < 0.2:
            yield "".join(draw.choice(_POOR).format(n=draw.randrange(10**6)) for _ in range(draw.randrange(20, 400)))
            continue
        text = _article(draw, pool)
        if kind < 0.25:
            text += f"\nWrite to user{draw.randrange(10**6)}@example.org or call (555) {draw.randrange(100, 999)}-0199."
        elif kind < 0.3:
            text = text.replace("'", "\u00e2\u20ac\u2122").replace(" a ", " \u00e9t\u00e9 ")
        if len(earlier) < 1000:
            earlier.append(text)
        yield text


def _article(draw: random.Random, pool: list[str]) -> str:
    paragraphs = [f"About item {draw.randrange(10**9)} and its use"]
    for _ in range(draw.randrange(2, 31)):
        chosen = draw.sample(pool, draw.randrange(3, 9))
        chosen.insert(1, f"Case {draw.randrange(10**9)} belongs to group {draw.randrange(10**6)} of the list.")
        paragraphs.append(" ".join(chosen))
    return "\n\n".join(paragraphs)


def write_corpus(path: Path, megabytes: float, seed: int = 0) -> int:
    """Write documents as JSON Lines, with the fields text and id, up to a size; return the bytes of text."""
    size = 0
    with path.open("w", encoding="utf-8") as out:
        for n, text in enumerate(documents(seed)):
            out.write(json.dumps({"id": f"doc{n}", "text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
            if size >= megabytes * 1e6:
                return size
    return size
