"""The documentation matches the code: a page for every op, examples that run, every environment variable."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastgpt
from fastgpt import ops, optim

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site = _load(DOCS / "build.py")
DOCUMENTED: dict[str, Any] = {
    **{name: getattr(ops, name) for name in ops.__all__ if name != "use"},
    "AdamW": optim.AdamW,
}


@pytest.mark.parametrize("op", site.op_names())
def test_an_op_has_its_page(op: str) -> None:
    page = site.op_page(op)
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    wanted = {"Formula", "Backends", "Bytes moved", "Source", *site.LABELS}
    assert f"fastgpt/ops/{op}.py" in sections["Source"] and f"bench/{op}.py" in sections["Source"]
    assert wanted <= set(sections) and all(sections[name].strip() for name in wanted)
    assert "```text" in sections["Formula"]
    assert op in site.CLASSES or site.functions(op), "no public function of this op"


def test_a_page_shows_the_registry_and_the_kernels_heads() -> None:
    page = site.op_page("attention")
    assert "| CUDA (C++) | bfloat16, float16 | up to 256 |" in page
    assert "\n### kernels/attention_bwd.py\n" in page and "online softmax" in page
    assert [p.suffix for paths in site.kernel_files("layer_norm").values() for p in paths] == [".cu", ".py", ".cpp"]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_example_of_a_docstring_runs(name: str) -> None:
    """The public ops and the optimizer have the reference's sections, and an example that prints what it claims."""
    documented = DOCUMENTED[name]
    text = documented.__doc__
    assert all(re.search(rf"^    {section}:$", text, re.M) for section in ("Args", "Example"))
    assert name == "AdamW" or all(re.search(rf"^    {section}:$", text, re.M) for section in ("Returns", "Raises"))
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    result = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST).run(test)
    assert result.attempted and not result.failed


def variables(path: Path) -> Iterator[str]:
    """Return the environment variables that a module reads: os.environ, getenv and the `wanted` of setup.py."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        name: ast.expr | None = None
        if isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            if called in ("os.environ.get", "os.environ.setdefault", "os.getenv", "wanted"):
                name = node.args[0]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            name = node.slice
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
            name = node.left
        if isinstance(name, ast.Constant):
            yield str(name.value)
        elif isinstance(name, ast.Name):  # for name in ("A", "B"): ... environ.get(name)
            loops = [n for n in ast.walk(tree) if isinstance(n, ast.For) and ast.unparse(n.target) == name.id]
            loops = [n for n in loops if any(inner is node for inner in ast.walk(n))]
            yield from (str(ast.literal_eval(e)) for n in loops for e in getattr(n.iter, "elts", []))


def test_environment_page_has_every_variable() -> None:
    read = {"PATH"}  # mentioned in the text
    folders = [ROOT / "fastgpt", ROOT / "kernels", ROOT / "bench"]
    for path in [ROOT / "setup.py", *(p for folder in folders for p in folder.rglob("*.py"))]:
        read |= set(variables(path))
    for path in (ROOT / "csrc").rglob("*.*"):
        read |= set(re.findall(r'getenv\("(\w+)"\)', path.read_text(encoding="utf-8")))
    rows = re.findall(r"^\| `(\w+)` \|", (DOCS / "environment.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) == len(set(rows))
    assert set(rows) == read - {"PATH"}


def test_every_page_is_reachable_and_every_link_leads_somewhere() -> None:
    navigation = (DOCS / "navigation.md").read_text(encoding="utf-8")
    entries = set(re.findall(r"^([\w/-]+)$", navigation, re.M))
    pages = {p.relative_to(DOCS).with_suffix("").as_posix() for p in DOCS.rglob("*.md")}
    assert pages - entries <= {name.removesuffix(".md") for name in site.NO_PAGES}
    assert entries - pages == {
        "figures",
        "ops/index",
        "reference/settings",
        *(p.removesuffix(".md") for p in site.PAGES.values()),
    }
    for path in [*DOCS.rglob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", path.read_text(encoding="utf-8")):
            if not target.startswith(("../ops/", "settings.md")):  # generated by the build
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_citation_has_the_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {fastgpt.__version__}\n" in citation


def test_links_of_the_site() -> None:
    def adapted(text: str) -> str:
        return str(site.adapted(text, "docs"))

    assert adapted("[training.md](training.md#memory)") == "[](<training.md#memory>)"
    assert adapted("[how](../CONTRIBUTING.md)") == "[how](contributing.md)"
    assert adapted("[loop](../fastgpt/train.py)") == "loop (`fastgpt/train.py`)"
    assert adapted("[x](https://example.org)") == "[x](https://example.org)"


PYTHON = re.findall(r"^```python\n(.*?)^```", (DOCS / "data.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.split("import ")[-1].split()[0])
def test_the_examples_of_data_sets_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/data.md", "exec"), {})
