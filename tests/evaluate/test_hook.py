"""Evaluations during training: the same losses with and without them, the log, resumed runs, and bad settings."""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt import train
from fastgpt.core.backend import use
from fastgpt.core.errors import UserError
from fastgpt.evaluate import hook
from fastgpt.evaluate.results import load_results
from fastgpt.finetune.command import main as finetune

SMALL = (
    "--model.n-layers 2 --model.n-heads 2 --model.width 32 --block-size 32 --micro-batch 4 --batch-tokens 256 "
    "--model.resid-dropout 0.1 --max-minutes null --warmup-steps 2 --eval-batches 2 --eval-every 2 --save-every 4 "
    "--vocab-size 300 --sample-tokens 8 --lr 1e-3 --device cpu --data text.txt"
).split()
EVALS = ["--evals", "{safety: 4}", "--eval-data", "safety", "--eval-limit", "2"]
PAIRS = (
    ",sent_more,sent_less,stereo_antistereo,bias_type\n0,He ran.,She ran.,stereo,gender\n1,We go.,They go.,stereo,age\n"
)
SETTINGS = "toxicity: {samples: 2, max_new_tokens: 4}\nmemorisation: {prefix: 4, next: 4, documents: 2}\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with text, rows, and the files of three probes."""
    folder = tmp_path_factory.mktemp("hook")
    draw = random.Random(0)
    words = ["the cat", "a dog", "runs", "sleeps", "and", "far", "home", "to him", "to her"]
    texts = [" ".join(draw.choices(words, k=20)) for _ in range(300)]
    (folder / "text.txt").write_text("\n\n".join(texts))
    rows = [json.dumps({"prompt": t[:20], "completion": t[20:40]}) for t in texts[:40]]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "safety").mkdir()
    (folder / "safety" / "crows_pairs_anonymized.csv").write_text(PAIRS)
    (folder / "safety" / "toxicity_words.txt").write_text("cat\n")
    (folder / "safety" / "toxicity_prompts.txt").write_text("The dog\nA cat\n")
    (folder / "safety" / "safety.yaml").write_text(SETTINGS)
    (folder / "list.yaml").write_text("- perplexity\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main([*SMALL, "--max-steps", "8", "--out", "plain"]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(files)
    with use():
        yield


def rows(out: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(out: str | Path) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows(out) if "loss" in row}


def figures(out: str | Path, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in rows(out) if name in row}


def test_losses_are_the_same_with_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*SMALL, *EVALS, "--max-steps", "8", "--out", "with"]) == 0
    assert losses("with") == losses("plain")
    shares = figures("with", "safety.crows_pairs.pct_stereotype")
    assert list(shares) == [4, 8]
    assert all(v > 0 for v in figures("with", "safety.seconds").values())
    assert all(0 < v < 1 for v in figures("with", "safety.share_of_time").values())
    results = load_results("with/eval/step-4-safety.json")
    figure = results.figure("crows_pairs", "pct_stereotype")
    assert figure is not None and figure.value == shares[4] and results.model["step"] == 4
    assert results.figure("memorisation.train", "verbatim") is not None
    out = capsys.readouterr().out
    assert "step 4: safety took" in out and "% of the time since the start): crows_pairs pct_stereotype" in out
    assert out.count("probes without files") == 1


def test_a_resumed_run_evaluates_on() -> None:
    stopped = [*SMALL, *EVALS, "--out", "resumed"]
    assert train.main([*stopped, "--max-steps", "6", "--schedule", "constant"]) == 0
    assert train.main([*stopped, "--max-steps", "8", "--schedule", "constant"]) == 0
    assert list(figures("resumed", "safety.crows_pairs.pct_stereotype")) == [4, 6, 8]
    assert sorted(p.name for p in Path("resumed/eval").iterdir()) == [f"step-{n}-safety.json" for n in (4, 6, 8)]


def test_patience_watches_a_figure_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    stop = [*SMALL, "--evals", "{list.yaml: 4}", "--patience", "1", "--metric-goal", "max", "--max-steps", "20"]
    assert train.main([*stop, "--out", "stopped", "--metric", "list.validation.perplexity"]) == 0
    seen = figures("stopped", "list.validation.perplexity")
    assert list(seen) == [4, 8] and seen[4] > seen[8]  # it falls, so the goal max is missed
    assert "stopping: 1 validations without a better list.validation.perplexity" in capsys.readouterr().out


def test_a_failed_evaluation_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: Any, **more: Any) -> None:
        torch.rand(3), random.random(), np.random.rand()
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fastgpt.evaluate.run.run_parts", fails)
    assert train.main([*SMALL, *EVALS, "--max-steps", "8", "--out", "failed"]) == 0
    assert losses("failed") == losses("plain")
    assert "failed (RuntimeError: out of memory); the run continues" in capsys.readouterr().out


def test_finetune_evaluates(tmp_path: Path) -> None:
    fast = (
        "--block-size 32 --micro-batch 2 --batch 4 --max-steps 4 --eval-every 2 --eval-batches 1 --device cpu".split()
    )
    arguments = ["--base", "plain", "--data", "rows.jsonl", *fast, "--lora.rank", "2", "--lora.dropout", "0.1"]
    assert finetune([*arguments, "--out", str(tmp_path / "plain")]) == 0
    assert finetune([*arguments, *EVALS[:1], "{safety: 2}", *EVALS[2:], "--out", str(tmp_path / "with")]) == 0
    assert losses(tmp_path / "with") == losses(tmp_path / "plain")
    assert list(figures(tmp_path / "with", "safety.toxicity.words.toxic")) == [2, 4]
    notes = load_results(tmp_path / "with" / "eval" / "step-2-safety.json").notes
    assert any("memorisation is skipped" in note for note in notes)


BAD = {
    "--evals {nothing: 4}": "preset is 'nothing', expected base, full, safety or a file",
    "--evals {safety: 3}": "evals.safety is 3, expected 0 or a multiple of eval_every, 2",
    "--evals {safety: 4} --eval-every 0": "evals.safety is 4, expected 0 or a multiple of eval_every, 0",
    "--evals {safety: 4} --eval-data nowhere": "nowhere",
    "--evals {full: 4}": "needs the files of",
    "--evals {safety: 4} --eval-limit 0": "eval_limit is 0, expected more than 0",
    "--evals {safety: 4, other/safety: 2}": "other/safety is a second evaluation named 'safety'",
    "--evals {list.yaml: 4} --patience 1 --metric list.validation.perplexety --metric-goal min": "expected a figure of",
    "--evals {safety: 4} --data tokens.bin": "evals need a tokenizer",
}


@pytest.mark.parametrize("options", BAD)
def test_what_is_wrong_is_said_before_the_first_step(options: str, tmp_path: Path) -> None:
    np.random.default_rng(0).integers(0, 100, 5000, dtype=np.uint16).tofile("tokens.bin")
    words = options.replace("{", "'{").replace("}", "}'")
    with pytest.raises(UserError, match=BAD[options]):
        train.main([*SMALL, "--max-steps", "4", "--out", str(tmp_path / "run"), *shlex.split(words)])
    assert not (tmp_path / "run").exists()


def test_a_run_without_evals_imports_nothing_of_them() -> None:
    names = "{'lm_eval', 'datasets', 'transformers', 'fastgpt.evaluate.presets', 'fastgpt.evaluate.safety'}"
    code = f"import sys, fastgpt.train, fastgpt.finetune.run; print(*({names} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()


def test_random_states_and_mode_are_put_back() -> None:
    run: Any = SimpleNamespace(model=torch.nn.Dropout(), device=torch.device("cpu"))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt), hook.untouched(run):
        assert not run.model.training
        random.seed(2), np.random.seed(2), torch.manual_seed(2)
        raise KeyboardInterrupt
    found = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert run.model.training and found == (random.random(), np.random.rand(), torch.rand(1).item())
