"""Write the rows of the recipes in this folder, from the source of Python's standard library.

    python recipes/finetune/rows.py data/rows

writes train/NAME.jsonl and val/NAME.jsonl in the folder. Validation has whole modules that training lacks; where rows
come from no module, their text decides. The same Python version gives the same bytes.
"""

from __future__ import annotations

import ast
import json
import random
import sys
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "__pycache__"}
FAMILIES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "unittest")
SHORT = 240  # characters of a passage: with its question it fits 128 tokens of the tiny tokenizer
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
Row = tuple[str, dict[str, Any]]  # what decides between training and validation, and the row


@dataclass(frozen=True)
class Module:
    """A module: its dotted name, its text and its syntax tree."""

    name: str
    text: str
    tree: ast.Module


@dataclass(frozen=True)
class Function:
    """A documented function: its module, name, arguments, docstring and the source of the body below this."""

    module: str
    name: str
    arguments: ast.arguments
    doc: str
    body: str

    @property
    def head(self) -> str:
        return f"def {self.name}({ast.unparse(self.arguments)}):"

    @property
    def first(self) -> str:
        """The first line of the docstring."""
        return self.doc.split("\n")[0].strip()


def modules() -> Iterator[Module]:
    """Yield the modules of the standard library, without its tests and without those that ast cannot read."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED & set(parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            yield Module(".".join(parts), text, ast.parse(text))
        except (SyntaxError, ValueError):
            continue


def functions(module: Module) -> Iterator[Function]:
    """Yield the documented functions and methods of a module."""
    lines = module.text.split("\n")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
            start, end = node.body[0].end_lineno or 0, node.end_lineno
            body = textwrap.dedent("\n".join(lines[start:end])).strip("\n")
            yield Function(module.name, node.name, node.args, doc, textwrap.indent(body, "    "))


def completion(found: list[Function]) -> Iterator[Row]:
    """A function's head and first line of documentation -> its body."""
    for f in found:
        if 0 < len(f.body) <= SHORT and len(f.head) + len(f.first) <= SHORT:
            yield f.module, {"prompt": f'{f.head}\n    """{f.first}"""\n', "completion": f.body}


def chat(found: list[Function]) -> Iterator[Row]:
    """A question about a function -> the first line of its documentation."""
    for f in found:
        asked = f"What does `{f.head[4:-1]}` of the module {f.module} do?"
        if 10 < len(f.first) and len(asked) + len(f.first) <= SHORT:
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": f.first}]
            yield f.module, {"messages": turns}


def content(found: list[Function]) -> Iterator[Row]:
    """Whole docstrings, as texts to imitate."""
    yield from ((f.module, {"text": f.doc}) for f in found if len(f.doc) > 100)


def summarize(found: list[Function]) -> Iterator[Row]:
    """The rest of a docstring -> its first line, which stands for a summary."""
    for f in found:
        rest = " ".join(f.doc.split("\n")[1:]).split()
        text = " ".join(rest)[:SHORT].strip()
        if len(text) > 60 and 10 < len(f.first) <= 100:
            yield f.module, {"prompt": f"{text}\n\nSummary:", "completion": f" {f.first}"}


def qa(found: list[Function]) -> Iterator[Row]:
    """A function's head and first line, and a question -> a span of the passage, or "not in the text"."""
    for f in found:
        names, defaults = [a.arg for a in f.arguments.args], f.arguments.defaults
        passage = f"{f.head}\n{f.first}"
        if not names or len(passage) > SHORT:
            continue
        asked = {"What is the name of the function?": f.name, "What is the first parameter?": names[0]}
        asked["What is the last parameter?"] = names[-1]
        asked[f"What is the default of {names[-1]}?"] = ast.unparse(defaults[-1]) if defaults else "not in the text"
        for question, answer in asked.items():
            yield f.module, {"prompt": f"{passage}\n\nQuestion: {question}\nAnswer:", "completion": f" {answer}"}


def extract(found: list[Module]) -> Iterator[Row]:
    """Import statements -> the modules that they name, as JSON."""
    for module in found:
        lines = module.text.split("\n")
        imports = [node for node in module.tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        for node, after in zip([None, *imports], [*imports, None]):
            nodes = [n for n in (node, after) if n is not None]
            text = "\n".join("\n".join(lines[n.lineno - 1 : n.end_lineno]) for n in nodes)
            if nodes and len(text) <= SHORT:
                record = {"imports": [name for n in nodes for name in _imported(n)]}
                yield module.name, {"prompt": f"{text}\n\nJSON:", "completion": f" {json.dumps(record)}"}


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return ["." * node.level + (node.module or "")]
    return [alias.name for alias in node.names]


def code(found: list[Module]) -> Iterator[Row]:
    """Whole files of up to 8,000 characters."""
    yield from ((m.name, {"text": m.text}) for m in found if 200 < len(m.text) <= 8000)


def classify(found: list[Function]) -> Iterator[Row]:
    """A docstring -> the package that it comes from."""
    for f in found:
        text, package = " ".join(f.doc.split())[:SHORT], f.module.split(".")[0]
        if package in FAMILIES and len(text) > 20:
            yield text, {"text": text, "label": package}


def pairs(found: list[Function]) -> Iterator[Row]:
    """A function's head, with its own first line of documentation preferred to another function's."""
    draw = random.Random(0)
    for f in found:
        other = draw.choice(found).first
        if 10 < len(f.first) and other not in ("", f.first) and len(f.head) + len(f.first) + len(other) <= SHORT:
            prompt = f'{f.head}\n    """'
            yield f.module, {"prompt": prompt, "chosen": f'{f.first}"""', "rejected": f'{other}"""'}


def ratings(found: list[Function]) -> Iterator[Row]:
    """The same heads, each with one of the two lines, and whether it is the function's own."""
    for i, (module, row) in enumerate(pairs(found)):
        good = i % 2 == 0
        text = row["chosen" if good else "rejected"]
        yield module, {"prompt": row["prompt"], "completion": text, "label": good}


def numbers() -> Iterator[Row]:
    """English number words -> digits: a small language with one right translation."""
    for n in random.Random(0).sample(range(1000), 1000):
        yield words(n), {"prompt": f"Words: {words(n)}\nDigits:", "completion": f" {n}"}


def words(n: int) -> str:
    """Return a number below 1000 in English words."""
    if n < 20:
        return UNITS[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f"-{UNITS[n % 10]}" if n % 10 else "")
    return f"{UNITS[n // 100]} hundred" + (f" and {words(n % 100)}" if n % 100 else "")


def sums() -> Iterator[Row]:
    """Sums of two digits, twenty times each; half of the answers are drawn at random, so GRPO has something to do."""
    draw = random.Random(0)
    for i in range(2000):
        a, b = i // 10 % 10, i % 10
        answer = a + b if draw.random() < 0.5 else draw.randint(0, 18)
        yield str(draw.random()), {"prompt": f"{a} + {b} =", "completion": f" {answer}"}


def problems() -> Iterator[Row]:
    """The sums without answers to learn; the reward function reads the column `answer`."""
    for i in range(100):
        yield str(i), {"prompt": f"{i // 10} + {i % 10} =", "answer": str(i // 10 + i % 10)}


def write(folder: Path, name: str, rows: Iterator[Row]) -> str:
    """Write the rows of a recipe; return a line for the console."""
    parts: dict[str, list[str]] = {"train": [], "val": []}
    for key, row in rows:
        parts["train" if zlib.crc32(key.encode()) % 16 else "val"].append(json.dumps(row) + "\n")
    for part, lines in parts.items():
        path = folder / part / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    return f"{name}: {len(parts['train']):,} rows for training, {len(parts['val']):,} for validation"


def main(folder: Path) -> None:
    """Write the rows of all recipes."""
    source = list(modules())
    found = [f for module in source for f in functions(module)]
    for make in (completion, chat, content, summarize, qa, classify, pairs, ratings):
        print(write(folder, make.__name__, make(found)))
    for read in (extract, code):
        print(write(folder, read.__name__, read(source)))
    for draw in (numbers, sums, problems):
        print(write(folder, draw.__name__, draw()))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data/rows"))
