"""Write a suite as a task of the LM Evaluation Harness: a YAML file, and the rendered items as JSONL.

The harness gives the same figures on it. Kinds whose figures it lacks (macro F1; F1 and exact match as SQuAD; regular
expressions and schemas) get a Python file beside the YAML, which calls fastgpt, so fastgpt must be installed there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from fastgpt.core.command import Parser
from fastgpt.core.errors import UserError
from fastgpt.evaluate.classification import classification, confusion_matrix
from fastgpt.evaluate.suite import SuitePart, suite_of
from fastgpt.evaluate.suite_file import Suite, open_suite
from fastgpt.evaluate.suite_items import Item
from fastgpt.evaluate.suite_settings import GENERATES

SCORING = '''\
"""Figures of the suite {name}, which fastgpt computes; written by `fastgpt eval export-suite`."""

from fastgpt.evaluate.suite_export import figures_of, macro_f1  # noqa: F401

SUITE = {suite!r}


def process_results(doc, results):
    return figures_of(SUITE, doc, results)
'''
FIGURES = {
    "choice": (("acc", "mean"), ("acc_norm", "mean")),
    "classification": (("acc", "mean"), ("macro_f1", "!macro_f1")),
    "cloze": (("acc", "mean"), ("perplexity", "perplexity")),
    "perplexity": (
        ("word_perplexity", "weighted_perplexity"),
        ("byte_perplexity", "weighted_perplexity"),
        ("bits_per_byte", "bits_per_byte"),
    ),
    "qa": (("exact_match", "mean"), ("f1", "mean")),
    "span": (("exact_match", "mean"), ("f1", "mean")),
}
TYPES = {
    "choice": "multiple_choice",
    "classification": "multiple_choice",
    "cloze": "loglikelihood",
    "perplexity": "loglikelihood_rolling",
}


class _Function(str):
    """A name that YAML marks as a function of the harness."""


class _Dumper(yaml.SafeDumper):
    """YAML as the harness reads it."""


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def export_suite(suite: Suite, out: Path) -> Path:
    """Write the task to a folder and return its YAML file. The name of the task is that of the suite.

    Raises:
        UserError: a model judges the suite, or it has `chat: true`.
    """
    s, name = suite.settings, suite.settings.suite
    if s.judge.model is not None:
        raise UserError(f"suite {suite.path} is judged by a model, which the harness cannot do, expected another judge")
    if s.chat:
        raise UserError(
            f"suite {suite.path} has `chat: true`, expected a suite without it: the harness takes --apply_chat_template"
        )
    out.mkdir(parents=True, exist_ok=True)
    files = {"test": out / f"{name}.jsonl"}
    _write_rows(files["test"], suite, suite.items)
    if s.shots:
        files["examples"] = out / f"{name}.examples.jsonl"
        _write_rows(files["examples"], suite, suite.pool)
    module = f"{name.replace('-', '_').replace('.', '_')}_scoring"
    if s.kind in (*GENERATES, "classification"):
        text = SCORING.format(name=name, suite=str(suite.path.resolve()))
        (out / f"{module}.py").write_text(text, encoding="utf-8")
    task = _task(suite, {split: str(path.resolve()) for split, path in files.items()}, module)
    path = out / f"{name}.yaml"
    path.write_text(yaml.dump(task, Dumper=_Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def _write_rows(path: Path, suite: Suite, items: list[Item]) -> None:
    lead = suite.settings.delimiter if suite.settings.kind == "cloze" else ""  # the harness adds none to a cloze
    with path.open("w", encoding="utf-8") as f:
        for item in items:
            row: dict[str, Any] = {"prompt": item.prompt, "target": lead + item.target}
            if item.choices:
                row |= {"choices": list(item.choices), "gold": item.gold}
            elif suite.settings.kind in GENERATES:
                row |= {"answers": list(item.answers), "regex": item.regex}
            elif suite.settings.kind == "perplexity":
                row = {"prompt": "", "target": item.prompt}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def _task(suite: Suite, files: dict[str, str], module: str) -> dict[str, Any]:
    s = suite.settings
    task: dict[str, Any] = {
        "task": s.suite,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "output_type": TYPES.get(s.kind, "generate_until"),
        "doc_to_text": "prompt",
        "doc_to_target": "gold" if s.kind in ("choice", "classification") else "target",
        "target_delimiter": "" if s.kind == "cloze" else s.delimiter,
        "num_fewshot": s.shots,
    }
    if s.kind in ("choice", "classification"):
        task["doc_to_choice"] = "choices"
    if s.description:
        task["description"] = s.description
    if s.shots:
        task |= {"fewshot_split": "examples", "fewshot_config": {"sampler": "first_n"}}
    if s.kind in GENERATES:
        stops = {"until": list(s.stop), "max_gen_toks": s.max_new_tokens, "do_sample": False}
        task["generation_kwargs"] = stops
    if s.kind in (*GENERATES, "classification"):
        task["process_results"] = _Function(f"{module}.process_results")
    judged = "valid" if s.judge.schema is not None else "pass"
    task["metric_list"] = [
        {
            "metric": metric,
            "aggregation": _Function(f"{module}.{how[1:]}") if how.startswith("!") else how,
            "higher_is_better": not metric.endswith(("perplexity", "bits_per_byte")),
        }
        for metric, how in FIGURES.get(s.kind, ((judged, "mean"),))
    ]
    return task | {"metadata": {"version": 1}}


_parts: dict[str, SuitePart] = {}  # suites of this process, by path


def figures_of(suite: str, doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """Return the figures of an item for the harness: `process_results` of an exported suite.

    Args:
        suite: path of the suite.
        doc: row of the exported file.
        results: what the model gave: a text, or (log-probability, greedy) of each label.
    """
    if suite not in _parts:
        _parts[suite] = suite_of(suite)
    if "gold" in doc:
        logprobs = [logprob for logprob, _ in results]
        picked = logprobs.index(max(logprobs))
        return {"acc": float(picked == doc["gold"]), "macro_f1": (doc["gold"], picked)}
    figures: dict[str, Any] = _parts[suite].grade(results[0], doc["answers"], doc["regex"])
    return figures


def macro_f1(pairs: list[tuple[int, int]]) -> float:
    """Return macro F1 of (true, picked) pairs: the aggregation of an exported classification."""
    true, picked = zip(*pairs)
    return classification(confusion_matrix(true, picked, max(*true, *picked) + 1))["macro_f1"]


def main(argv: list[str]) -> int:
    """Run `fastgpt eval export-suite`."""
    parser = Parser(
        prog="fastgpt eval export-suite", description="Write a suite as a task of the LM Evaluation Harness."
    )
    parser.add_argument("suite", metavar="SUITE", help="YAML file of the suite")
    parser.add_argument("out", metavar="DIR", type=Path, help="folder to write to")
    args = parser.parse_args(argv)
    path = export_suite(open_suite(args.suite), args.out)
    print(f"wrote {path}; lm_eval --include_path {args.out} --tasks {path.stem} runs it")
    return 0
