"""Evaluation against lm_eval's own model of transformers: `fastgpt bench evaluate --json FILE`.

Log-likelihoods by the LM Evaluation Harness with a random GPT-2 124M in fp32 on a CPU: fastgpt's adapter, and lm_eval's
HFLM on the exported model at batches of 1 and of 4. The requests are made here, of random words, each one token:

    hellaswag  10 shots drawn for each question, as the harness draws them: prompts of 900 to 1000 tokens, four endings
               of 20 to 40 tokens; what exceeds 1024 tokens is cut by both sides
    mmlu       5 shots that all questions share, prompts of 700 to 1000 tokens, four answers of one token

All run in one process with the same weights and threads, and take turns; tokenization counts. Ratios are medians over
the rounds, above 1 is faster; fastgpt against the faster batch of HFLM. tokens: those that go through the model for a
request. products: the matrix products of fastgpt's passes alone, of the same shapes and in the same rounds; "of
products" is the time of everything over theirs. --quick: a tiny model, for trying this program.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.bench._harness import Samples, append_rows, provenance, turns, where
from fastgpt.bench.variants import reason
from fastgpt.core.command import Parser, number, run_command
from fastgpt.core.device import keep_freed_memory
from fastgpt.data import Tokenizer
from fastgpt.data.tokenizer import available_cores, train_tokenizer
from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.target import open_target
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.models.weights import save_pretrained
from fastgpt.models.weights.tokenizer import tokenizer_files

PACKAGES = ("lm_eval", "transformers")
OWN, PRODUCTS = "fastgpt", "products"
BATCHES = (1, 4)  # of HFLM
ALLOWED = 1e-3  # difference between the log-likelihoods of both sides, in nats
Pair = tuple[str, str]


@dataclass(frozen=True)
class Shape:
    """A model, and the lengths of texts as shares of those above."""

    layers: int
    heads: int
    width: int
    vocab: int
    block: int
    scale: float
    words: int

    def config(self) -> ModelConfig:
        sizes: dict[str, Any] = dict(n_layers=self.layers, n_heads=self.heads, width=self.width, block_size=self.block)
        return ModelConfig(**sizes, vocab_size=self.vocab, vocab_multiple=1)


SHAPES = {
    "gpt2-124m": Shape(12, 12, 768, 50257, 1024, 1.0, 1000),
    "tiny": Shape(2, 2, 32, 2048, 256, 0.13, 100),
}


class Words:
    """Texts of random words, each of which is one token."""

    def __init__(self, count: int, scale: float) -> None:
        self.random, self.scale = np.random.default_rng(0), scale
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["".join(self.random.choice(list(letters), self.random.integers(3, 7))) for _ in range(count)]
        self.tokenizer: Tokenizer = train_tokenizer([f" {' '.join(words)} A B C D"] * 4, 300 + 8 * count)
        self.words = [w for w in words if len(self.tokenizer.encode(f" {w}")) == 1]

    def text(self, least: int, most: int) -> str:
        """Return words, least to most of them before scaling."""
        n = max(1, round(self.scale * self.random.integers(least, most + 1)))
        return " ".join(self.random.choice(self.words, n))


def hellaswag(words: Words, questions: int) -> list[Pair]:
    """Return the requests of questions with 10 shots each."""
    pairs = []
    for _ in range(questions):
        shots = "\n\n".join(words.text(80, 92) for _ in range(10))
        context = f"{shots}\n\n{words.text(20, 60)}"
        pairs += [(context, f" {words.text(20, 40)}") for _ in range(4)]
    return pairs


def mmlu(words: Words, questions: int) -> list[Pair]:
    """Return the requests of questions that share 5 shots."""

    def question() -> str:
        choices = "\n".join(f"{letter}. {words.text(5, 25)}" for letter in "ABCD")
        return f"{words.text(30, 90)}\n{choices}\nAnswer:"

    shots = "\n\n".join(f"{question()} A" for _ in range(5))
    contexts = [f"{shots}\n\n{question()}" for _ in range(questions)]
    return [(context, f" {letter}") for context in contexts for letter in "ABCD"]


KINDS: dict[str, Callable[[Words, int], list[Pair]]] = {"hellaswag": hellaswag, "mmlu": mmlu}


class Sides:
    """Both sides over the same weights, and what went through their models in the last run."""

    def __init__(self, shape: Shape, folder: Path, tokenizer: Tokenizer) -> None:
        from lm_eval.models.huggingface import HFLM

        from fastgpt.evaluate.adapter import HarnessModel

        model = GPT(shape.config(), generator=torch.Generator().manual_seed(0)).eval()
        ids = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
        save_pretrained(model, folder / "hf", extra=ids)
        files = tokenizer_files(tokenizer.text, gpt2=True, eos="<|endoftext|>", max_length=shape.block)
        for name, content in files.items():
            (folder / "hf" / name).write_text(content, encoding="utf-8")
        del model
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # a line for each prompt that is cut
        self.engine = Engine(open_target(str(folder / "hf"), device="cpu", dtype="fp32"))
        self.ours = HarnessModel(self.engine)
        self.theirs = HFLM(str(folder / "hf"), device="cpu", dtype="float32", batch_size=1, max_length=shape.block)
        self.passes: list[int] = []  # tokens of each
        self.heads: list[int] = []  # rows of the head of each call
        self.their_tokens = 0
        self._watch()

    def _watch(self) -> None:
        """Note the sizes of what both models compute."""
        model: Any = self.engine.model
        hidden, logits, call = model.hidden, model.logits, self.theirs._model_call

        def watched_hidden(ids: Tensor, **options: Any) -> Tensor:
            self.passes.append(ids.numel())
            return hidden(ids, **options)  # type: ignore[no-any-return]

        def watched_logits(h: Tensor) -> Tensor:
            self.heads.append(len(h))
            return logits(h)  # type: ignore[no-any-return]

        def watched_call(ids: Tensor, **options: Any) -> Tensor:
            self.their_tokens += ids.numel()
            return call(ids, **options)

        model.hidden, model.logits, self.theirs._model_call = watched_hidden, watched_logits, watched_call

    def run(self, name: str, requests: list[Any]) -> list[float]:
        """Return the log-likelihoods of requests by a variant; none for the products."""
        if name == PRODUCTS:
            self.products()
            return []
        self.passes, self.heads, self.their_tokens = ([], [], 0) if name == OWN else (self.passes, self.heads, 0)
        if name == OWN:
            return [logprob for logprob, _ in self.ours.loglikelihood(requests)]
        self.theirs.batch_size_per_gpu = int(name.rpartition(" ")[2])
        return [logprob for logprob, _ in self.theirs.loglikelihood(requests, disable_tqdm=True)]

    @torch.no_grad()
    def products(self) -> None:
        """Compute the matrix products of fastgpt's last run."""
        model = self.engine.model
        layers = [m for block in model.blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
        inputs = {n: torch.randn(max(self.passes), n) for n in {m.in_features for m in layers}}
        for rows in self.passes:
            for m in layers:
                ops.linear(inputs[m.in_features][:rows], m.weight)
        rows_of_head = torch.randn(max(self.heads), model.config.width)
        for rows in self.heads:
            ops.linear(rows_of_head[:rows], model.head_weight[: model.vocab_size])


def compare(shape_name: str, kind: str, questions: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each variant.

    Raises:
        ValueError: the sides differ by more than ALLOWED.
    """
    from lm_eval.api.instance import Instance

    shape = SHAPES[shape_name]
    words = Words(shape.words, shape.scale)
    pairs = KINDS[kind](words, questions)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(shape, Path(folder), words.tokenizer)
    theirs = [f"lm_eval {batch}" for batch in BATCHES]
    names = [OWN, PRODUCTS, *theirs]
    samples, found, tokens = {name: Samples() for name in names}, dict[str, list[float]](), dict[str, int]()
    for turn in range(-1, rounds):
        for name in names if turn < 0 else turns(names, turn):
            start = time.perf_counter()
            found[name] = sides.run(name, requests)
            taken = time.perf_counter() - start
            tokens[name] = sum(sides.passes) if name == OWN else sides.their_tokens
            if turn >= 0:  # the first time is warm-up
                samples[name].seconds.append(taken)
    differ = max(abs(a - b) for name in theirs for a, b in zip(found[OWN], found[name], strict=True))
    if differ > ALLOWED:
        raise ValueError(f"the log-likelihoods differ by {differ:.2g} nats, expected at most {ALLOWED}")
    about = {"bench": "evaluate", "shape": shape_name, "kind": kind, "dtype": "fp32", "block": shape.block}
    about |= {"requests": len(pairs), "difference": differ, "versions": versions()}
    about |= {"machine": provenance(torch.device("cpu")), "cut": sides.ours.truncated // (rounds + 1)}
    rows = [{**about, "variant": n, **figures(samples[n], tokens[n], len(pairs))} for n in (OWN, *theirs)]
    fastest = min(theirs, key=lambda name: samples[name].quantile(0.5))
    for key, ratio in (
        ("speed", samples[fastest].shares(samples[OWN])),
        ("over_products", samples[OWN].shares(samples[PRODUCTS])),
    ):
        rows[0] |= {f"{key}{end}": ratio.quantile(q) for end, q in (("", 0.5), ("_q20", 0.2), ("_q80", 0.8))}
    return rows


def figures(samples: Samples, tokens: int, requests: int) -> dict[str, float]:
    """Return the figures of a variant."""
    return {
        **samples.figures(),
        "requests_per_s": requests / samples.quantile(0.5),
        "tokens_per_request": tokens / requests,
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that are compared."""
    return {name: metadata.version(name) for name in PACKAGES}


def show(rows: list[dict[str, Any]]) -> str:
    """Return the rows of a comparison as text."""
    lines = []
    for r in rows:
        line = f"{r['shape']:<11}{r['kind']:<11}{r['variant']:<11}{r['requests_per_s']:>9.3g} requests/s"
        line += f"{r['tokens_per_request']:>8.0f} tokens each"
        if "speed" in r:
            line += f"  {r['speed']:.2f} ({r['speed_q20']:.2f} .. {r['speed_q80']:.2f}) times as fast, "
            line += f"{r['over_products']:.2f} of products, {r['cut']} prompts cut"
        lines.append(line)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Return 1 if a comparison has no figures, although the packages are there."""
    parser = Parser(prog="fastgpt bench evaluate", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file")
    parser.add_argument("--kind", action="append", choices=KINDS, help="may be repeated (default: both)")
    parser.add_argument("--questions", type=number(int, 1), help="of each set (default: 6 of hellaswag, 16 of mmlu)")
    parser.add_argument("--rounds", type=number(int, 1), help="timed rounds (default: 5)")
    parser.add_argument("--threads", type=number(int, 1), default=available_cores(), help="default: all cores")
    parser.add_argument("--quick", action="store_true", help="a tiny model, for trying this program")
    args = parser.parse_args(argv)
    if missing := [name for name in PACKAGES if util.find_spec(name) is None]:
        print(f"not measured: needs `pip install {' '.join(missing)}`")
        return 0
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    failed = False
    print(f"evaluation in fp32, {where(provenance(torch.device('cpu')))}")
    for kind in args.kind or KINDS:
        questions = args.questions or {"hellaswag": 6, "mmlu": 16}[kind]
        try:
            rows = compare(
                "tiny" if args.quick else "gpt2-124m", kind, questions, args.rounds or (2 if args.quick else 5)
            )
        except Exception as e:
            print(f"{kind}: {reason(e)}", flush=True)
            failed = True
            continue
        print(show(rows), flush=True)
        if args.json:
            append_rows(args.json, rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(run_command(main))
