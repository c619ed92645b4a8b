"""Imports go in one direction: each layer of the package imports from layers below it, or from within itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fastgpt

PACKAGE = Path(fastgpt.__file__).parent
# From the lowest layer up. Parts on the same line do not import each other.
LAYERS = (
    {"_version", "_build_info"},
    {"core", "kernels"},
    {"ops"},
    {"nn", "optim"},
    {"models", "patching", "parity"},
    {"data", "inference", "checks"},
    {"distributed"},
    {"training"},
    {"config", "errors"},
    {"evaluate", "report"},
    {"train", "convert"},
    {"finetune", "sweep"},
    {"serve"},
    {"bench"},
    {"cli"},
)
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}
# `fastgpt` itself exports ops and imports patching at first use; a module that imports it may use the names it exports.
EXPORTED = {"ops", "patch", "patch_report", "unpatch"}


def modules() -> Iterator[tuple[str, Path]]:
    """Return every module by its dotted name below fastgpt, links to kernels/ and bench/ included."""
    linked = [PACKAGE / "kernels", PACKAGE / "bench", PACKAGE / "bench" / "model"]
    for folder in [PACKAGE, *(p for p in PACKAGE.rglob("*") if p.is_dir()), *linked]:
        for path in sorted(folder.glob("*.py")):
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            yield ".".join(parts), path


def imported(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """Return the dotted names below fastgpt that a module imports anywhere, functions included, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("fastgpt."):
                    yield alias.name.removeprefix("fastgpt."), node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".")[: -node.level]
                base = ".".join(["fastgpt", *package, *filter(None, [base])])
            if base == "fastgpt":
                yield from ((alias.name, node.lineno) for alias in node.names if alias.name not in EXPORTED)
            elif base.startswith("fastgpt."):
                yield base.removeprefix("fastgpt."), node.lineno


def imports_of_names(name: str, path: Path, names: set[str]) -> Iterator[tuple[str, int]]:
    """Return the imports like `imported`, down to the module: `from fastgpt.core import backend` imports
    core.backend."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    from_lines = {n.lineno: [a.name for a in n.names] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    own = name.removesuffix(".__init__")
    for target, line in imported(name, path):
        members = [f"{target}.{n}" for n in from_lines.get(line, []) if f"{target}.{n}" in names]
        yield from ((m, line) for m in members or [target] if m != own)


def climbs(name: str, path: Path) -> list[str]:
    """Return a module's imports from its own layer or above, those from its own part excluded."""
    part = name.split(".")[0]
    if part == "__init__":
        return []
    return [
        f"{path.name}:{line} (fastgpt.{name}) imports fastgpt.{target}"
        for target, line in imported(name, path)
        if target.split(".")[0] != part and HEIGHT[target.split(".")[0]] >= HEIGHT[part]
    ]


def test_every_part_has_a_layer() -> None:
    assert {name.split(".")[0] for name, _ in modules()} - {"__init__"} <= set(HEIGHT)


def test_imports_go_down() -> None:
    wrong = [line for name, path in modules() for line in climbs(name, path)]
    assert not wrong, "\n".join(wrong)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return a circle of imports, as the names along it; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        found = next(filter(None, (visit(n, [*path, name]) for n in sorted(graph.get(name, ())))), [])
        done.add(name)
        return found

    return next(filter(None, (visit(name, []) for name in sorted(graph))), [])


def test_no_circles() -> None:
    names = {name.removesuffix(".__init__") for name, _ in modules()}
    graph: dict[str, set[str]] = {}
    for name, path in modules():
        for node, _ in imports_of_names(name, path, names):
            graph.setdefault(name.removesuffix(".__init__"), set()).add(node)
    assert not circle(graph)


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_an_import_upwards_is_found(tmp_path: Path) -> None:
    module = tmp_path / "norms.py"
    module.write_text("def f():\n    from fastgpt.training import plan\n    from ..bench import _op\n")
    assert len(climbs("nn.norms", module)) == 2


def test_public_names_have_their_paths() -> None:
    from fastgpt import config, errors
    from fastgpt.core.errors import UserError
    from fastgpt.training.config import load_config

    assert config.load_config is load_config and errors.UserError is UserError


def chosen_by_hand(tree: ast.AST) -> Iterator[int]:
    """Return the lines that pick a kernel by the name of a backend, as in SWIGLU_FWD["cuda"]: only `select` may return
    that name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and not (isinstance(node.value, ast.Name) and node.value.id == "KEYS"):
            names = [part.value for part in ast.walk(node.slice) if isinstance(part, ast.Constant)]
            if set(names) & {"cuda", "triton", "cpu"}:
                yield node.lineno


def test_no_op_chooses_a_kernel_by_device() -> None:
    assert list(chosen_by_hand(ast.parse('y = FWD["cpu" if x else "cuda"](x)\nz = FWD["cuda"](x)'))) == [1, 2]
    files = [p for folder in ("ops", "nn", "optim", "patching", "models") for p in (PACKAGE / folder).glob("*.py")]
    wrong = [f"{p.name}:{line}" for p in files for line in chosen_by_hand(ast.parse(p.read_text(encoding="utf-8")))]
    assert not wrong, wrong
