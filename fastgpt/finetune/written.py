"""Sequence-level distillation: a teacher writes the completions of the prompts, once, and a student learns these.

The completions are drawn with fastgpt.inference, each with a seed of its own, and appended to files in the run's folder
as they are written, so an interrupted run writes only those that are missing. The first line of a file says what they
were drawn with, each other line is an object:

    prompt, completion  texts
    ids                 tokens of the completion, with that of its end
    ended               whether it ended within max_new_tokens; else its last token is not followed by an end

Source: Kim and Rush (2016, arXiv:1606.07947), with samples, or at temperature 0 the most likely tokens, for their beam.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt.core import progress
from fastgpt.core.errors import UserError
from fastgpt.data.tokenizer import Tokenizer
from fastgpt.finetune.config import FinetuneConfig
from fastgpt.finetune.encode import Example
from fastgpt.finetune.examples import Counts, Loaded
from fastgpt.finetune.rollouts import Prompt
from fastgpt.inference import Generator, Request
from fastgpt.training.initial import Initial, load_start

MAX_BATCH = 64  # rows of the generator
CHUNK = 256  # completions between two writes to the file


class Teacher:
    """Writes completions; call it with the prompts of one path after the other.

    Args:
        start: the teacher, which is loaded when there is something to write.
        block: tokens of a row, at most the teacher's positions.

    Raises:
        UserError: the teacher has fewer positions.
    """

    def __init__(
        self, cfg: FinetuneConfig, start: Initial, tokenizer: Tokenizer, block: int, dtype: torch.dtype, device: Any
    ) -> None:
        most = start.config.block_size or block
        if most < block:
            raise UserError(f"teacher: {cfg.teacher} has {most} positions, expected at least block_size, {block}")
        self.cfg, self.start, self.tokenizer, self.block = cfg, start, tokenizer, block
        self.dtype, self.device = dtype, device
        self.files = 0
        self.generator: Generator | None = None

    def __call__(self, prompts: Loaded[Prompt]) -> Loaded[Example]:
        """Return the prompts with their completions, of which the latter are learned.

        Raises:
            UserError: the file of an interrupted run has completions of other settings, or cannot be written.
        """
        path = Path(self.cfg.out) / f"teacher-{self.files}.jsonl"
        self.files += 1
        rows = self._completed(path, prompts.items)
        ended = sum(row["ended"] for row in rows)
        print(
            f"{path}: {len(rows):,} completions of the teacher, {ended:,} ended within {self.cfg.max_new_tokens} tokens"
        )
        counts, items = Counts(prompts.counts.rows, prompts.counts.left_out), []
        for prompt, row in zip(prompts.items, rows, strict=True):
            ids = np.array([*prompt.ids, *row["ids"]], np.uint32)
            items.append(Example(ids, np.arange(len(ids)) >= max(1, len(prompt.ids))))
        counts.add(*items)
        return Loaded(prompts.name, items, counts)

    def _completed(self, path: Path, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Return the rows of a file, after writing those that are missing."""
        header = self._header(prompts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as f:
                rows = _read(f, path, header)
                bar = progress.bar(len(prompts), len(rows), desc="teacher", unit="row")
                for first in range(len(rows), len(prompts), CHUNK):
                    new = self._written(prompts[first : first + CHUNK], first)
                    f.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in new))
                    f.flush()
                    rows += new
                    bar.update(len(new))
                bar.close()
        except OSError as e:
            raise UserError(f"{path} cannot be written ({e.strerror})") from e
        return rows

    def _header(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        c = self.cfg
        digest = hashlib.sha256(json.dumps([prompt.ids for prompt in prompts]).encode()).hexdigest()
        drawn = {"temperature": c.temperature, "max_new_tokens": c.max_new_tokens, "seed": c.seed, "prompts": digest}
        return {"teacher": self.start.origin, **drawn}

    def _written(self, prompts: Sequence[Prompt], first: int) -> list[dict[str, Any]]:
        """Return the rows of prompts, the first of which has this number."""
        c = self.cfg
        if self.generator is None:
            model = load_start(self.start, self.start.config, self.dtype, self.device).eval()
            self.generator = Generator(model, self.tokenizer, max_batch=MAX_BATCH, context=self.block, graphs=False)
        options: dict[str, Any] = dict(max_new_tokens=c.max_new_tokens, temperature=c.temperature)
        asked = [Request(p.ids, seed=c.seed + first + i, **options) for i, p in enumerate(prompts)]
        with torch.no_grad():
            results = self.generator.generate(asked)
        return [
            {"prompt": p.text, "completion": r.text, "ids": r.ids, "ended": r.finish_reason != "length"}
            for p, r in zip(prompts, results, strict=True)
        ]


def _read(f: Any, path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a file that is open for appending, and leave it at their end: a new file gets the header, and
    a line that was cut off is removed.

    Raises:
        UserError: the header is another one, or a line is damaged.
    """
    f.seek(0)
    lines = f.read().split(b"\n")
    f.truncate(f.tell() - len(lines.pop()))
    if not lines:
        f.write(json.dumps(header).encode() + b"\n")
        return []
    try:
        found, *rows = map(json.loads, lines)
        rows = [{key: row[key] for key in ("prompt", "completion", "ids", "ended")} for row in rows]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e}), expected completions of a teacher; delete it") from e
    for key, value in header.items():
        if found.get(key) != value:
            was = "other prompts" if key == "prompts" else f"{key} {found.get(key)!r}, not {value!r}"
            raise UserError(f"{path} has completions for {was}; choose another --out, or delete it")
    return rows
