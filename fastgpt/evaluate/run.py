"""Evaluate a model on a preset: check every part, then run them one after another."""

from __future__ import annotations

import datetime
import importlib.metadata
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fastgpt._version import __version__
from fastgpt.core.errors import UserError, counted
from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.part import Part
from fastgpt.evaluate.presets import parts_of
from fastgpt.evaluate.results import Results
from fastgpt.evaluate.target import Target

PACKAGES = ("torch", "lm_eval", "datasets", "tokenizers")


def evaluate(
    target: Target,
    preset: str,
    *,
    data: Path | None,
    limit: int | None = None,
    progress: bool = True,
    texts: Sequence[Path] = (),
    batch_tokens: int | None = None,
) -> Results:
    """Evaluate a model.

    Args:
        preset: "base", "full", "safety", or a file.
        data: folder with the files of the benchmarks.
        limit: items of each task, the first ones; None: all.
        progress: whether to print a line for each part.
        texts: files whose perplexity is computed besides.
        batch_tokens: tokens in one forward pass of the model.

    Raises:
        UserError: a file, a setting or a package is missing or wrong; nothing was computed.
    """
    return run_parts(
        target, preset, parts_of(preset, data, texts), limit=limit, progress=progress, batch_tokens=batch_tokens
    )


def run_parts(
    target: Target,
    preset: str,
    parts: Sequence[Part],
    *,
    limit: int | None = None,
    progress: bool = True,
    batch_tokens: int | None = None,
) -> Results:
    """Check the parts of an evaluation, then run them; see `evaluate`."""
    engine = Engine(target, batch_tokens=batch_tokens)
    for part in parts:
        part.check(target)
    results = Results(dict(target.about), preset, date=datetime.date.today().isoformat(), versions=_versions())
    if limit is not None:
        results.notes.append(f"the first {limit:,} items of each task only (--limit {limit})")
    for part in parts:
        before, start = len(results.figures), time.perf_counter()
        part.run(engine, results, limit)
        seconds = time.perf_counter() - start
        added = results.figures[before:]
        if not added:
            continue
        results.seconds[part.name] = round(seconds, 3)
        if progress:
            print(f"{part.name}: {counted(len(added), 'figure')} in {seconds:.1f} s", file=sys.stderr)
    if not results.figures:
        raise UserError(f"preset {preset} found nothing to evaluate: {'; '.join(results.notes)}")
    return results


def _versions() -> dict[str, str]:
    found = {"fastgpt": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
