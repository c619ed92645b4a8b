"""Build the documentation site: `make docs`, or `python docs/build.py`; open build/docs/html/index.html.

The sources of the site are assembled in build/docs/source and never committed:
- the pages of docs/ unchanged, with links adapted;
- the start page and the figures from README.md, and CONTRIBUTING.md, CHANGELOG.md and SECURITY.md;
- a page for each op, from the docstrings of its module and functions, the registry, the docstring of its benchmark
(bytes moved) and the heads of its kernel files.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "docs"
LABELS = ("Saved for backward", "Determinism", "Limits")  # labelled paragraphs in the docstring of every op's module
BACKENDS = {"cuda": "CUDA (C++)", "triton": "Triton", "cpu": "CPU (C++)", "torch": "PyTorch (reference)"}
EXTRA = {  # functions that users of an op need too
    "rope": ["fastgpt.ops.rope.rope_frequencies"],
    "linear_cross_entropy": ["fastgpt.ops.linear_log_probs"],
}
CLASSES = {"adamw": "fastgpt.optim.AdamW"}  # ops whose public interface is a class
NO_PAGES = ("navigation.md", "numeric-cover.md")  # the second is the log that tests/numeric_cover.py writes
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
}


def op_names() -> list[str]:
    """Return every op that has a page."""
    from fastgpt import ops  # noqa: F401 (ops fill the registry)
    from fastgpt.core import backend

    return sorted(backend.ops())


def functions(op: str) -> list[str]:
    """Return the dotted names of an op's public functions."""
    ops = import_module("fastgpt.ops")
    module = f"fastgpt.ops.{op}"
    mine = [name for name in ops.__all__ if getattr(ops, name).__module__ == module]
    return [*(f"fastgpt.ops.{name}" for name in mine), *EXTRA.get(op, [])]


def head(path: Path) -> str:
    """Return the text at the head of a source file: its docstring, or its leading // comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    lines = [line for line in re.split(r"\n(?!//)", text, maxsplit=1)[0].splitlines() if line.startswith("//")]
    return "\n".join(line[2:].removeprefix(" ") for line in lines).strip()


def split_head(text: str) -> tuple[str, list[str], dict[str, str]]:
    """Return the summary of a module's docstring, its other paragraphs, and its labelled paragraphs by label."""
    summary, *paragraphs = text.split("\n\n")
    labelled = {}
    for label in LABELS:
        for p in [p for p in paragraphs if p.startswith(f"{label}:")]:
            labelled[label] = p.removeprefix(f"{label}:").strip()
            paragraphs.remove(p)
    return " ".join(summary.split()), paragraphs, labelled


def code(text: str) -> str:
    """Return a block of plain text."""
    return f"```text\n{textwrap.dedent(text).rstrip()}\n```"


def kernel_files(op: str) -> dict[str, list[Path]]:
    """Return backend -> its source files of this op."""
    native = sorted((ROOT / "csrc" / op).glob("c*.c*"))
    return {
        "cuda": [p for p in native if p.suffix == ".cu"],
        "triton": sorted(p for p in (ROOT / "kernels").glob(f"{op}*.py") if p.stem in (op, f"{op}_bwd")),
        "cpu": [p for p in native if p.suffix == ".cpp"],
    }


def backends_table(op: str) -> Iterator[str]:
    """Return the registry's row of this op as a table."""
    from fastgpt.core import backend

    cells = backend.ops()[op]
    heads = any(cell.max_dim for cell in cells.values())
    yield f"| backend | dtypes |{' head dimension |' if heads else ''}"
    yield f"|---|---|{'---|' if heads else ''}"
    for name, title in BACKENDS.items():
        if cell := cells.get(name):
            dtypes = ", ".join(str(d).removeprefix("torch.") for d in cell.dtypes)
            limit = f"up to {cell.max_dim}" if cell.max_dim else "any"
            yield f"| {title} | {dtypes} |{f' {limit} |' if heads else ''}"


def op_page(op: str) -> str:
    """Return the page of an op, in MyST Markdown."""
    source = ROOT / "fastgpt" / "ops" / f"{op}.py"
    summary, paragraphs, labelled = split_head(head(source))
    out = [f"# {op}", summary]
    out += [f"```{{eval-rst}}\n.. autofunction:: {name}\n```" for name in functions(op)]
    out.append("## Formula")
    linked = re.compile("|".join(f"`{re.escape(name)}`" for name in CLASSES.values()))
    out += [code(p) if p.startswith("    ") else linked.sub(r"{py:class}\g<0>", p) for p in paragraphs]
    out += ["## Backends", "\n".join(backends_table(op)), "`fastgpt doctor` says which one serves here, and why."]
    for label in LABELS[:1]:
        out += [f"## {label}", labelled[label]]
    files, benchmark = kernel_files(op), ROOT / "bench" / f"{op}.py"
    if benchmark.exists():
        out += ["## Bytes moved", "What the benchmark of this op counts:", code(head(benchmark))]
    for label in LABELS[1:]:
        out += [f"## {label}", labelled[label][0].upper() + labelled[label][1:]]
    out.append("## Source")
    places = [source, *(p for paths in files.values() for p in paths), *([benchmark] if benchmark.exists() else [])]
    out.append("\n".join(f"- `{p.relative_to(ROOT)}`" for p in places))
    notes = [p for paths in files.values() for p in paths]
    if notes:
        out += ["## How each backend computes it", "The heads of the kernel files."]
        out += [f"### {p.relative_to(ROOT)}\n\n{code(head(p))}" for p in notes]
    return "\n\n".join(out) + "\n"


def ops_index() -> str:
    """Return the page that lists the ops."""
    rows = [f"| [{op}]({op}.md) | {split_head(head(ROOT / 'fastgpt' / 'ops' / f'{op}.py'))[0]} |" for op in op_names()]
    names = "\n".join(op_names())
    intro = (
        "Each op is a differentiable function of PyTorch tensors that works under `torch.compile`, on several "
        "backends. Two differ: `adamw` is the step of an optimizer, and `linear` has a kernel only for generation on a "
        "CPU."
    )
    choose = "```{eval-rst}\n.. autoclass:: fastgpt.ops.use\n```"
    table = "\n".join(["| op | what it computes |", "|---|---|", *rows])
    toc = f"```{{toctree}}\n:hidden:\n\n{names}\n```"
    return "\n\n".join(["# Ops", intro, table, "## Choosing a backend", choose, toc]) + "\n"


def settings_page() -> str:
    """Return a page of every setting of training runs and of their model: option, values, default, meaning."""
    from fastgpt.core import options
    from fastgpt.finetune.config import FinetuneConfig, LoraSettings
    from fastgpt.models.config import ModelConfig
    from fastgpt.training.config import TrainConfig

    out = [
        "# Settings",
        "Every setting of a training run and of its model, and of a fine-tuning run and its adapters. "
        "[Training](../training.md) and [fine-tuning](../finetune.md) say how they work together. "
        "In a YAML file `-` becomes `_`. An option that is true or false needs no value: `--compile` is true, "
        "`--no-compile` false.",
    ]
    classes: tuple[tuple[str, Any, str], ...] = (
        ("The run", TrainConfig, ""),
        ("The model", ModelConfig, "model."),
        ("Fine-tuning", FinetuneConfig, ""),
        ("Adapters", LoraSettings, "lora."),
    )
    for title, cls, prefix in classes:
        hints, texts = get_type_hints(cls), options.descriptions(cls)
        rows = ["| option | values | default | meaning |", "|---|---|---|---|"]
        for f in dataclasses.fields(cls):
            if not dataclasses.is_dataclass(hints[f.name]):
                made = f.default_factory
                default = f.default if made is dataclasses.MISSING else made()
                shown = default if isinstance(default, str) else json.dumps(default)
                cells = [
                    f"`--{prefix}{f.name.replace('_', '-')}`",
                    options.describe(hints[f.name]),
                    f"`{shown}`" * bool(shown),
                ]
                text = re.sub(r"--[a-z-]+", r"`\g<0>`", texts[f.name]).replace("`|`", "&#124;")
                rows.append(f"| {' | '.join([*cells, text])} |")
        out += [f"## {title}", "\n".join(rows)]
    return "\n\n".join(out) + "\n"


def adapted(text: str, folder: str) -> str:
    """Return a page whose links lead to pages of the site; a link to another file of the checkout becomes its name."""

    def link(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        path, _, anchor = target.partition("#")
        place = os.path.normpath(os.path.join(folder, path))
        page = PAGES.get(place) or (place.removeprefix("docs/") if place.startswith("docs/") else "")
        if place == "README.md":
            page = "index.md"
        if page and words.strip("`") in (path, target):  # the title of the page says more than its file name
            return f"[](<{page}{'#' + anchor if anchor else ''}>)"
        if page:
            return f"[{words}]({page}{'#' + anchor if anchor else ''})"
        name = words.strip("`")
        if name == f"{os.path.dirname(place)}/":  # a folder that links to its README
            return f"`{name}`"
        return f"`{place}`" if name in (place, path) else f"{words} (`{place}`)"

    return re.sub(r"\[([^\]]+)\]\((?!https?:|#|mailto:)([^)\s]+)\)", link, text)


def readme_parts() -> tuple[str, str]:
    """Return README without its figures, and the figures."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    figures = re.search(r"^## Figures\n(.*?)(?=^## )", text, re.M | re.S)
    assert figures is not None, "README.md has no section Figures"
    return text.replace(figures[0], ""), f"# Figures\n{figures[1]}"


def assemble(folder: Path) -> None:
    """Write the sources of the site into an empty folder."""
    docs = ROOT / "docs"
    for name in ("conf.py", "site.css"):
        shutil.copy(docs / name, folder)
    start, figures = readme_parts()
    navigation = (docs / "navigation.md").read_text(encoding="utf-8")
    pages = {"index.md": adapted(start, "") + "\n" + navigation, "figures.md": adapted(figures, "")}
    pages |= {
        page: adapted((ROOT / name).read_text(encoding="utf-8"), os.path.dirname(name)) for name, page in PAGES.items()
    }
    for path in [*docs.glob("*.md"), *docs.glob("reference/*.md")]:
        name = path.relative_to(docs).as_posix()
        if name not in NO_PAGES:
            pages[name] = adapted(path.read_text(encoding="utf-8"), "docs") if "/" not in name else path.read_text()
    pages |= {f"ops/{op}.md": op_page(op) for op in op_names()}
    pages |= {"ops/index.md": ops_index(), "reference/settings.md": settings_page()}
    for name, text in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def main() -> int:
    """Assemble and build; a warning, such as a broken link, is an error."""
    source = SITE / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    assemble(source)
    options = ["-q", "-W", "--keep-going", "-n", "-b", "html", "-d", str(SITE / "doctrees")]
    done = subprocess.run([sys.executable, "-m", "sphinx", *options, str(source), str(SITE / "html")])
    if done.returncode == 0:
        print(f"open {SITE / 'html' / 'index.html'}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
