"""Write the corpora of docs/guide.md from what every Python has: its manual and its library.

    python corpora.py

writes general/*.txt (the manual, and documentation of the library), code/*.py (some packages), later/*.py (others,
which come later), style.jsonl (pairs for DPO), and heldout/{general,code,style}.jsonl. The same Python version gives
the same bytes.
"""

from __future__ import annotations

import ast
import json
import sysconfig
import zlib
from pathlib import Path
from pydoc_data.topics import topics

LIBRARY = Path(sysconfig.get_path("stdlib"))
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
CODE = {"asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib"}
LATER = {"concurrent", "ctypes", "html", "json", "sqlite3", "wsgiref", "xml"}
VERBS = "Return Set Create Get Read Add Parse Convert Remove Write Find Send Close Format Delete Open Run Check".split()
LONGEST = 6000  # characters of a text that is held out, so that an evaluation takes seconds


def held_out(name: str) -> bool:
    """Return whether a module, with all of its functions, or a topic of the manual is kept for evaluations."""
    return zlib.crc32(name.encode()) % 8 == 0


def append(file: str, text: str) -> None:
    """Add a text to a file, which may be new."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as f:
        f.write(text)


def document(kind: str, name: str, text: str) -> None:
    """Write a document to its corpus, or to the texts that are held out."""
    if held_out(name) and kind != "later":
        append(f"heldout/{kind}.jsonl", json.dumps({"text": text[:LONGEST]}) + "\n")
    else:
        append(f"{kind}/{name}.{'txt' if kind == 'general' else 'py'}", text)


def pair(module: str, function: ast.FunctionDef, doc: str) -> None:
    """Write a function's head with its documentation in the style of the house ("Returns ...") and as it is."""
    verb, _, rest = doc.split("\n")[0].partition(" ")
    if verb not in VERBS or len(rest) > 60:
        return
    head = f'def {function.name}({ast.unparse(function.args)}):\n    """'
    house, plain = f"{verb}s {rest}", f"{verb} {rest}"
    if held_out(module):
        row = {"question": head, "choices": [house, plain], "answer": house}
        append("heldout/style.jsonl", json.dumps(row) + "\n")
    else:
        append("style.jsonl", json.dumps({"prompt": head, "chosen": house, "rejected": plain}) + "\n")


def module(path: Path) -> None:
    """Write what one module gives."""
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    if SKIPPED & set(parts) or path.stat().st_size < 500:
        return
    try:
        text = path.read_text(encoding="utf-8")
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):  # some files are in another encoding on purpose
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = [(node, doc) for node in nodes if isinstance(node, kinds) and (doc := ast.get_docstring(node))]
    name, package = ".".join(parts), parts[0]
    if package in CODE | LATER:
        document("code" if package in CODE else "later", name, text)
    elif docs:
        document("general", name, "\n\n".join(doc for _, doc in docs))
    for node, doc in docs:
        if isinstance(node, ast.FunctionDef):
            pair(name, node, doc)


if __name__ == "__main__":
    if Path("general").exists():
        raise SystemExit("corpora.py: the folder general exists, expected a new folder to work in")
    for name in sorted(topics):
        document("general", name, topics[name])
    for path in sorted(LIBRARY.rglob("*.py")):
        module(path)
