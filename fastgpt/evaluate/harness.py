"""Benchmarks of the LM Evaluation Harness from local files: its own task definitions, with the data set replaced.

Each part of a benchmark becomes a YAML in a temporary folder that includes the harness's YAML and reads rows from a
JSON file beside it. Nothing is downloaded. Means and standard errors are over the questions of all parts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.results import Figure, Items, Results, item_id, mean
from fastgpt.evaluate.target import Target
from fastgpt.evaluate.task_files import Benchmark, find, read, where_to_put

SEED = 1234  # of the choice of examples; the harness's default
SHORTEST = 8  # questions that are measured against the context


class HarnessTasks:
    """A benchmark as a part of an evaluation.

    Args:
        data: folder of the files.
        shots: examples in each prompt; default as in the benchmark's YAML.
        whole: whether a missing subject or paradigm is an error.
    """

    def __init__(self, benchmark: Benchmark, data: Path, shots: int | None = None, whole: bool = False) -> None:
        self.name, self.benchmark, self.data, self.whole = benchmark.name, benchmark, data, whole
        self.shots = benchmark.shots if shots is None else shots
        self._folder = tempfile.TemporaryDirectory(prefix="fastgpt-eval-")
        self._tasks: dict[str, Any] = {}
        self._category: dict[str, str] = {}  # part -> category

    def check(self, target: Target) -> None:
        """Read the files and build the tasks, the first time, and measure the prompts against the context.

        Raises:
            UserError: the harness is not installed, files are missing or wrong, there are fewer examples than shots, or
                the context is shorter than every question, or than a choice.
        """
        if not self._tasks:
            self._tasks = self._load(_harness())
        self._check_context(target)

    def _load(self, harness: Path) -> dict[str, Any]:
        """Return the tasks by name, after writing their files."""
        splits = {split: self._read(split) for split in self.benchmark.needs(self.shots)}
        parts = list(splits[self.benchmark.split])
        if self.whole and len(parts) < self.benchmark.parts:
            raise UserError(f"{self.name} has {len(parts)} parts below {self.data}, expected {self.benchmark.parts}")
        for part in parts:
            if self.shots:
                self._check_pool(part, splits)
            self._write(part, {split: rows[part] for split, rows in splits.items()}, harness)
        with _quiet():
            from lm_eval.tasks import TaskManager

            manager = TaskManager(include_path=self._folder.name, include_defaults=False)
            tasks: dict[str, Any] = manager.load([self._task(part) for part in parts])["tasks"]
        return tasks

    def run(self, engine: Engine, results: Results, limit: int | None) -> None:
        """Score the tasks, `limit` questions of each part (None: all)."""
        from lm_eval.evaluator import evaluate

        from fastgpt.evaluate.adapter import HarnessModel

        model = HarnessModel(engine, show=sys.stderr.isatty())
        for task in self._tasks.values():
            task.set_fewshot_seed(seed=SEED)
        with _quiet():
            found = evaluate(model, {"tasks": self._tasks, "groups": {}}, limit=limit, bootstrap_iters=0)
        samples = {part: found["samples"][self._task(part)] for part in self._parts()}
        results.truncated[self.name] = model.truncated
        prompts = len({s["arguments"][0][0] for part in samples.values() for s in part})
        if self.shots and model.truncated >= prompts:
            results.notes.append(
                f"{self.name}: no prompt with {self.shots} examples fits into the context of {engine.context:,} "
                "tokens, so each lost its first ones"
            )
        if len(samples) < self.benchmark.parts:
            results.notes.append(f"{self.name}: {len(samples)} of its {self.benchmark.parts} parts have files")
        for metric in self.benchmark.metrics:
            self._add(metric, samples, results)

    def _read(self, split: str) -> dict[str, list[dict[str, Any]]]:
        files = find(self.data, self.benchmark, split)
        if not files:
            raise UserError(
                f"{self.name} has no {split} files, expected {where_to_put(self.benchmark, self.data, self.shots)}"
            )
        return read(self.benchmark, files)

    def _check_pool(self, part: str, splits: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
        """Refuse a pool of examples that is too small."""
        split = self.benchmark.needs(self.shots)[1]
        pool, name = len(splits[split].get(part, [])), self._label(part)
        least = self.shots + ("test" not in splits)  # without a test split the harness draws one more, to leave one out
        if pool < least:
            raise UserError(f"{name} has {pool} examples in {split} below {self.data}, expected at least {least}")

    def _task(self, part: str) -> str:
        return f"fastgpt_{self.name}" + (f"_{part}" if part else "")

    def _label(self, part: str) -> str:
        """Return the name that a part has in the results: "mmlu/stem/anatomy"."""
        return "/".join(filter(None, [self.name, self._category.get(part), part]))

    def _parts(self) -> list[str]:
        return [name.removeprefix(self._task("")).removeprefix("_") for name in self._tasks]

    def _write(self, part: str, splits: dict[str, list[dict[str, Any]]], harness: Path) -> None:
        """Write the YAML of a part, and its rows."""
        include = harness / "tasks" / self.benchmark.include.format(part=part)
        if not include.is_file():
            raise UserError(f"{self.name} has a part {part!r} below {self.data}, which the harness does not know")
        if tag := re.search(r'tag"?: "?mmlu_(\w+)_tasks', include.read_text(encoding="utf-8")):
            self._category[part] = tag[1]
        folder = Path(self._folder.name)
        files = {split: str(folder / f"{self._task(part)}.{split}.json") for split in splits}
        for split, rows in splits.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            Path(files[split]).write_text(lines, encoding="utf-8")
        config: dict[str, Any] = {
            "include": str(include),
            "task": self._task(part),
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
            "num_fewshot": self.shots,
            **self._splits(files),
            "metric_list": [{"metric": metric} for metric in self.benchmark.metrics],
        }
        (folder / f"{self._task(part)}.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML

    def _splits(self, files: dict[str, str]) -> dict[str, str | None]:
        """Return the settings that make the harness do without the splits that have no file.

        With examples, its own settings stay: they decide which ones are drawn.
        """
        if self.shots:
            names = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
            return {key: None for key, split in names.items() if split not in files}
        return {"training_split": None, "validation_split": None, "test_split": self.benchmark.split}

    def _check_context(self, target: Target) -> None:
        """Refuse a context that is shorter than a choice, or into which no question fits, even without examples."""
        limit, encode = target.model.block_size, target.tokenizer.encode
        for part in self._parts():
            docs = sorted(self._tasks[self._task(part)].eval_docs, key=lambda doc: len(json.dumps(doc)))
            pairs = [pair for doc in docs[:SHORTEST] for pair in self._pairs(part, doc)]
            least = min(len(encode(context + continuation)) for context, continuation in pairs)
            # a choice is part of its question, and has at least one byte for each token
            long = [doc for doc in docs if len(json.dumps(doc)) > limit]
            most = max((len(encode(choice)) for doc in long for _, choice in self._pairs(part, doc)), default=0)
            for what, tokens in (("its shortest question", least), ("its longest choice", most)):
                if tokens > limit:
                    raise UserError(
                        f"{self._label(part)} has {tokens:,} tokens in {what}, "
                        f"expected at most {limit:,}, the context of {target.name}"
                    )

    def _pairs(self, part: str, doc: dict[str, Any]) -> list[tuple[str, str]]:
        """Return context and continuation of each choice of a question, without examples."""
        task = self._tasks[self._task(part)]
        made = task.construct_requests(doc=doc, ctx=task.fewshot_context(doc, 0), metadata=(task.config.task, 0, 1))
        return [request.args for request in (made if isinstance(made, list) else [made])]

    def _add(self, metric: str, samples: dict[str, list[dict[str, Any]]], results: Results) -> None:
        """Append the figures of a metric: of the benchmark, its categories and its parts."""
        every = [s for part in samples.values() for s in part]
        if metric == "acc_bytes":
            other = sum(_winner(s, len) != _winner(s, _bytes) for s in every)
            if not other:
                return  # the same winners as with acc_norm
            results.notes.append(
                f"{self.name}: the length of a choice in characters (acc_norm) and in bytes (acc_bytes) "
                f"makes another one win in {other} of {len(every)} questions"
            )
        results.figures.append(self._figure(self.name, metric, every))
        if metric != "perplexity":  # which is not a mean
            ids = [item_id(s["doc"]) for s in every]
            results.items.append(Items(self.name, metric, ids, [float(s[metric]) for s in every]))
        if not self.benchmark.parts:
            return
        for category in sorted(set(self._category.values())):
            inside = [s for part, ss in samples.items() if self._category[part] == category for s in ss]
            results.figures.append(self._figure(f"{self.name}/{category}", metric, inside))
        results.figures += [self._figure(self._label(part), metric, ss) for part, ss in samples.items()]

    def _figure(self, name: str, metric: str, samples: list[dict[str, Any]]) -> Figure:
        values = [float(s[metric]) for s in samples]
        figure = mean(name, metric, values, shots=self.shots)
        if metric == "perplexity":  # the values are log-probabilities; standard error by the delta method
            value = math.exp(min(-figure.value, 700.0))  # a number in JSON, whatever the model
            stderr = None if figure.stderr is None else value * figure.stderr
            return Figure(name, metric, value, figure.n, stderr, shots=self.shots, higher_is_better=False)
        choices = [len(s["resps"]) for s in samples]
        chance = sum(1 / n for n in choices) / len(choices) if min(choices) > 1 else None
        return Figure(name, metric, figure.value, figure.n, figure.stderr, chance, self.shots)


def _bytes(text: str) -> int:
    return len(text.encode())


def _winner(sample: dict[str, Any], length: Any) -> int:
    """Return the choice with the highest log-probability by `length` of the choice, without the space before it."""
    choices = [arguments[1].removeprefix(" ") for arguments in sample["arguments"]]
    scores = [r[0] / max(1, length(c)) for r, c in zip(sample["filtered_resps"], choices, strict=True)]
    return scores.index(max(scores))


def _harness() -> Path:
    """Import the harness, set to stay off the network; return its folder.

    Raises:
        UserError: it is not installed.
    """
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    try:
        import datasets
        import lm_eval
    except ImportError:
        raise UserError("benchmarks need the LM Evaluation Harness, expected `pip install fastgpt[eval]`") from None
    datasets.config.HF_DATASETS_OFFLINE = True  # in case that it was imported before
    return Path(str(lm_eval.__file__)).parent


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's log and the bars of its loops; errors are raised anyway."""
    import datasets
    from lm_eval.api import model, task

    log, bars = logging.getLogger("lm_eval"), task.tqdm
    level, shown = log.level, datasets.are_progress_bars_disabled()
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    task.tqdm = model.tqdm = lambda *rows, **options: bars(*rows, **options | {"disable": True})
    try:
        yield
    finally:
        log.setLevel(level)
        task.tqdm = model.tqdm = bars
        if not shown:
            datasets.enable_progress_bars()
