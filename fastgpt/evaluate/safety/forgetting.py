"""Forgetting: what fine-tuning cost on a general corpus, in bits per byte, which other tokenizers do not change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastgpt.core.errors import UserError
from fastgpt.data import corpus
from fastgpt.data.built import is_built
from fastgpt.data.documents import document_starts
from fastgpt.data.source import open_source
from fastgpt.evaluate import perplexity
from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.paired import Row
from fastgpt.evaluate.results import Items, Results
from fastgpt.evaluate.safety.statistics import item_id
from fastgpt.evaluate.target import Target

METRIC = "bits_per_byte"


class General:
    """A Part: bits per byte and perplexity of a general corpus, task "general".

    Args:
        path: a .jsonl file with `text` in each line, a text file, a folder of them, or a corpus in token shards, of
            which the validation documents are scored.
    """

    name = "general"

    def __init__(self, path: str) -> None:
        self.path = path
        self.texts: list[str] = []

    def check(self, target: Target) -> None:
        """Read the documents. Raises UserError."""
        self.texts = self._shards(target) if self.path.endswith(".bin") or is_built(self.path) else self._texts()
        if not self.texts:
            raise UserError(f"general: {self.path} has no documents, expected at least one")

    def _texts(self) -> list[str]:
        if self.path.endswith(".jsonl"):
            return perplexity.read_texts(Path(self.path))
        return [document for _, text in corpus.read_texts(self.path) for document in corpus.documents(text)]

    def _shards(self, target: Target) -> list[str]:
        data = open_source(self.path, tokenizer=None if is_built(self.path) else target.tokenizer_file)
        tokenizer = data.tokenizer or target.tokenizer
        starts = document_starts(data.val, tokenizer.eot)
        parts = [data.val.read(int(at), int(end - at)) for at, end in zip(starts, starts[1:])]
        texts = [tokenizer.decode(ids[ids != tokenizer.eot].tolist()) for ids in parts]
        return [text for text in texts if text]

    def run(self, engine: Engine, results: Results, limit: int | None) -> None:
        """Append the figures of the first `limit` documents."""
        texts = self.texts[:limit]
        rows = [(t, -logprob, tokens) for t, (logprob, tokens) in zip(texts, engine.rolling(texts))]
        results.figures += perplexity.figures(self.name, rows)
        sizes = [float(len(text.encode())) for text in texts]
        per_byte = [perplexity.figures("", [row])[0].value for row in rows]
        results.items.append(Items(self.name, METRIC, [item_id(text) for text in texts], per_byte, sizes))


@dataclass(frozen=True)
class Forgetting:
    """The change of bits per byte on a corpus.

    Attributes:
        before, after: bits per byte.
        low, high: 95 % interval of the change, paired by document; None for one document.
        allowed: the largest change that is not forgetting.
    """

    task: str
    before: float
    after: float
    low: float | None
    high: float | None
    allowed: float

    @property
    def change(self) -> float:
        """after - before."""
        return self.after - self.before

    @property
    def exceeded(self) -> bool:
        """Whether the change is larger than allowed."""
        return self.change > self.allowed

    def sentence(self) -> str:
        """Return the finding as a sentence."""
        interval = "" if self.low is None or self.high is None else f" ({self.low:+.4f} to {self.high:+.4f})"
        verdict = "more than" if self.exceeded else "within"
        figures = f"{self.before:.4f} bits per byte before, {self.after:.4f} after, {self.change:+.4f}{interval}"
        return f"{self.task}: {figures}, {verdict} the allowed {self.allowed:g}"


def forgetting(rows: list[Row], allowed: float) -> list[Forgetting]:
    """Return the finding for each corpus that both evaluations have."""
    return [Forgetting(r.task, r.a, r.b, r.low, r.high, allowed) for r in rows if r.metric == METRIC]
