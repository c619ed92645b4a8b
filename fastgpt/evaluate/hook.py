"""Evaluations during training: the presets of the settings `evals`, each every so many steps.

They run at validations, on the model under training. The random state and the mode of the model are put back, so losses
are the same with and without them. An evaluation that fails is said, and never ends the run.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from fastgpt.core.errors import UserError
from fastgpt.training.run import Run
from fastgpt.training.runlog import Log

SHOWN = 8  # figures on the console
FEW = 16  # items of each task, to learn the names of figures
R = TypeVar("R", bound=Run)


def attach(run: R) -> R:
    """Give a run the evaluations of its settings, and return it.

    Raises:
        UserError: a preset is unknown, files are missing or wrong, or the model does not fit; nothing was trained.
    """
    cfg = run.cfg
    if cfg.evals:
        from fastgpt.evaluate.presets import parts_of  # here: a run without evals imports nothing of it

        target = target_of(run)
        data = None if cfg.eval_data is None else Path(cfg.eval_data)
        for preset, every in cfg.evals.items():
            name = Path(preset).stem
            if name in run.evaluations:
                raise UserError(f"evals: {preset} is a second evaluation named {name!r}, expected different names")
            parts = parts_of(preset, data)
            for part in parts:
                part.check(target)
            evaluation = Evaluation(name, preset, every, parts, cfg.eval_limit)
            if cfg.patience and cfg.metric.startswith(f"{name}."):
                evaluation.require(run, cfg.metric.removeprefix(f"{name}."))
            run.evaluations[name] = evaluation
    return run


class Evaluation:
    """A preset, evaluated every `every` steps and at the end of a run.

    Args:
        name: of its figures and files.
        parts: those of the preset.
        limit: items of each task; None: all.
    """

    def __init__(self, name: str, preset: str, every: int, parts: list[Any], limit: int | None) -> None:
        self.name, self.preset, self.every, self.parts, self.limit = name, preset, every, parts, limit
        self.spent, self.began = 0.0, time.perf_counter()
        self._said: set[str] = set()
        self._step = -1  # of the last evaluation

    def require(self, run: Run, metric: str) -> None:
        """Raise UserError unless the preset has a figure like `metric`, by evaluating a few items."""
        figures = self.results(run, min(self.limit or FEW, FEW)).figures
        for f in figures:  # a few items need not be of every category
            task = metric.removesuffix(f".{f.metric}")
            if task != metric and re.split("[./]", task)[0] == re.split("[./]", f.task)[0]:
                return
        names = ", ".join(f"{self.name}.{f.task}.{f.metric}" for f in figures if "/" not in f.task)
        raise UserError(f"metric is '{self.name}.{metric}', expected a figure of the preset: {names}")

    def due(self, run: Run) -> bool:
        """Return whether it is time: at the multiples of `every`, and after the last step."""
        p = run.progress
        periodic = p.due(run.cfg.eval_every) and not run.too_slow()
        return p.due(self.every) if periodic else True

    def __call__(self, run: Run, log: Log) -> dict[str, float]:
        """Evaluate if it is time; write the results to the run's folder `eval`, and return them as "task.metric"."""
        step = run.progress.step
        if not self.due(run) or self._step == step:  # the last step may be validated again at the end
            return {}
        self._step = step
        start = time.perf_counter()
        try:
            figures, said = self._evaluate(run)
        except Exception as e:  # a lack of memory, say: no reason to end the run
            figures, said = {}, f"failed ({type(e).__name__}: {e}); the run continues"
        seconds = time.perf_counter() - start
        self.spent += seconds
        share = self.spent / (time.perf_counter() - self.began)
        log.say(f"step {step}: {self.name} took {seconds:.1f} s ({share:.1%} of the time since the start): {said}")
        return figures | {"seconds": seconds, "share_of_time": share} if figures else {}

    def _evaluate(self, run: Run) -> tuple[dict[str, float], str]:
        """Return the figures by name, and what the console shows."""
        results = self.results(run, self.limit)
        path = run.folder / "eval" / f"step-{run.progress.step}-{self.name}.json"
        results.save(path)
        figures = {f"{f.task}.{f.metric}": f.value for f in results.figures}
        shown = [f"{f.task} {f.metric} {f.value:.4g}" for f in results.figures if "/" not in f.task]
        more = [f"{len(shown) - SHOWN} more"] if len(shown) > SHOWN else []
        notes = [f"note: {note}" for note in results.notes if note not in self._said]
        self._said.update(results.notes)
        return figures, "\n".join([", ".join([*shown[:SHOWN], *more]) + f"; results: {path}", *notes])

    def results(self, run: Run, limit: int | None) -> Any:
        """Return the results of the model as it is."""
        from fastgpt.evaluate.run import run_parts

        with untouched(run):
            return run_parts(target_of(run), self.preset, self.parts, limit=limit, progress=False)


@contextmanager
def untouched(run: Run) -> Iterator[None]:
    """Put the model into eval mode; put it and all random states back afterwards."""
    training, device = run.model.training, run.device
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    run.model.eval()
    try:
        yield
    finally:
        run.model.train(training)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, device)


def target_of(run: Run) -> Any:
    """Return the model under training as something to evaluate.

    Raises:
        UserError: its data have no tokenizer.
    """
    from fastgpt.evaluate.target import Target, template_of

    tokenizer = run.data.tokenizer
    if tokenizer is None:
        raise UserError("evals need a tokenizer: pass --tokenizer tokenizer.json")
    name, settings, p = str(run.folder), run.settings(), run.progress
    about = {"name": name, "folder": name, "step": p.step, "tokens": p.tokens, "fingerprint": None}
    settings = {} if "base" in settings else settings  # a fine-tuning run has rows, no corpus
    return Target(run.model, tokenizer, name, run.folder, about, template_of(tokenizer, name), settings)
