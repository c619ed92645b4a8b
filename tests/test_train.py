"""The loop as a user runs it: to the end, resumed, on bad input, copied; small models, real text."""

import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgpt import train
from fastgpt.bench.variants import train_step
from fastgpt.core.backend import use
from fastgpt.core.command import run_command
from fastgpt.core.errors import UserError
from fastgpt.data import IGNORE
from fastgpt.data.shards import ShardWriter
from fastgpt.data.source import open_source, open_validation
from fastgpt.optim.muon import MuonAdamW
from fastgpt.training import checkpoint, profiling, stability, steplog, task
from fastgpt.training.build import build_model, build_optimizer
from fastgpt.training.config import TrainConfig, load_config
from fastgpt.training.run import Run
from fastgpt.training.schedule import learning_rate
from fastgpt.training.stability import LossScale, SpikeGuard

SMALL = (
    "--model.n-layers 2 --model.n-heads 2 --model.width 32 --block-size 32 --micro-batch 4 --batch-tokens 256 "
    "--max-minutes null --max-steps 12 --warmup-steps 2 --eval-every 6 --eval-batches 2 --save-every 4 --log-every 4 "
    "--vocab-size 300 --sample-tokens 8 --device cpu --optimizer adamw --lr 3e-3"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a real text: the source files next to this one."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(Path(train.__file__).parent.rglob("*.py")):
        shutil.copy(path, folder / f"{path.stem}.txt")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put runs and prepared data into the test's folder; forget kernel choices afterwards."""
    monkeypatch.chdir(tmp_path)
    with use():
        yield tmp_path


def go(text: Path, *more: str) -> int:
    return train.main([*SMALL, "--data", str(text), "--out", "run", *more])


def rows(run: str = "run") -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def written() -> int:
    """Return the number of complete lines; a run in progress may be writing one more."""
    path = Path("run/metrics.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def losses(run: str = "run") -> list[tuple[int, float]]:
    return [(int(r["step"]), r["loss"]) for r in rows(run) if "loss" in r]


def test_a_run_leaves_everything_a_person_expects(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go(text) == 0
    out = capsys.readouterr()
    assert (
        "validation loss" in out.out and "unigram model of the same tokens" in out.out and "--- sample ---" in out.out
    )
    assert "tok/s" in out.err and "12/12" in out.err, "progress bar"
    names = {p.name for p in Path("run").iterdir()}
    assert {"metrics.jsonl", "loss.png", "samples.txt", "run.json", "tokenizer.json", "step_00000012"} <= names
    assert "step_00000004" not in names, "only the last two checkpoints are kept"
    assert Path("run/loss.png").read_bytes()[:4] == b"\x89PNG"
    assert [s for s, _ in losses()] == list(range(1, 13)) and losses()[-1][1] < losses()[0][1]
    header = json.loads(Path("run/run.json").read_text())
    assert header["config"]["max_steps"] == 12 and header["machine"]["torch"] == torch.__version__
    assert {"grad_norm", "lr", "tokens_per_second", "mfu_causal", "mfu_full", "memory_gb"} <= rows()[0].keys()


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM during this step of the next run."""
    real, seen = train.learning_rate, []

    def signalled(cfg: TrainConfig, number: int, last_step: int) -> float:
        if number == step - 1 and not seen:
            seen.append(number)
            signal.raise_signal(signal.SIGTERM)
        return real(cfg, number, last_step)

    monkeypatch.setattr(train, "learning_rate", signalled)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_resume_is_bitwise(text: Path, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at any step and resumed, with accumulation and dropout: the losses of the uninterrupted run."""
    extra = ["--model.resid-dropout", "0.1", "--model.attn-dropout", "0.1", "--kernels", f"all={kernels}"]
    assert go(text, *extra) == 0
    whole, weights = losses(), torch.cat([p.flatten() for p in _weights("run").values()])
    shutil.rmtree("run")
    for stop in (5, 9):
        stop_at(stop, monkeypatch)
        assert go(text, *extra) == 0
        assert losses()[-1][0] == stop
    shutil.rmtree("run/step_00000009")  # the second time the run is lost from step 8 on, as after SIGKILL
    assert go(text, *extra) == 0
    assert losses() == whole
    assert torch.equal(weights, torch.cat([p.flatten() for p in _weights("run").values()]))


def _weights(run: str) -> dict[str, torch.Tensor]:
    path = checkpoint.find(run)
    return checkpoint.read_tensors(path, checkpoint.MODEL, checkpoint.read_state(path))


def test_accumulation_does_not_change_the_gradient(text: Path) -> None:
    """1 x 16 sequences and 4 x 4 take the same steps up to fp32 rounding."""
    more = ["--batch-tokens", "512", "--max-steps", "4"]
    assert go(text, *more, "--micro-batch", "16", "--out", "a") == 0
    assert go(text, *more, "--micro-batch", "4", "--out", "b") == 0
    for (_, a), (_, b) in zip(losses("a"), losses("b"), strict=True):
        assert a == pytest.approx(b, rel=2e-5)


def test_the_benchmarked_step_is_the_loops(text: Path) -> None:
    more = ["--max-steps", "3", "--model.resid-dropout", "0.1", "--data", str(text), "--out", "run"]
    cfg = load_config([*SMALL, *more])
    assert train.train(cfg) == 0
    run, taken = train.prepare(dataclasses.replace(cfg, out="other")), []
    for step in range(3):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step, 3)
        values = train_step(run.model, run.optimizer, run.loader, cfg.accumulation, run.guard).tolist()
        taken.append((step + 1, *values[:2]))
    assert taken == [(int(r["step"]), r["loss"], r["grad_norm"]) for r in rows() if "loss" in r]


def test_every_counted_token_weighs_the_same() -> None:
    """With micro-batches that count only some tokens, and one that counts none, the gradient is that of the whole
    batch."""
    torch.manual_seed(0)
    cfg = load_config([*SMALL, "--clip", "0"])
    ids, targets = torch.randint(60, (8, 32)), torch.randint(60, (8, 32))
    targets[0, 3:], targets[2:4], targets[5, ::3] = IGNORE, IGNORE, IGNORE
    found = []
    for parts in (1, 4):
        model = build_model(cfg, 60, torch.device("cpu"))
        optimizer = build_optimizer(cfg, model)
        batches = iter(zip(ids.chunk(parts), targets.chunk(parts), strict=True))
        loss, norm, _ = train_step(model, optimizer, batches, parts).tolist()  # type: ignore[arg-type]
        model = build_model(cfg, 60, torch.device("cpu"))
        assert loss == pytest.approx(float(model(ids, targets)), rel=1e-6)
        found.append(norm)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_spikes_are_flagged_and_move_nothing() -> None:
    guard = SpikeGuard(6.0, torch.device("cpu"))
    losses = 3 + 0.1 * torch.randn(300, 1, generator=torch.Generator().manual_seed(0))
    assert not any(guard(loss) for loss in losses)
    mean, variance, _ = guard.state.tolist()
    assert abs(mean - 3) < 0.05 and 0.05 < variance**0.5 < 0.15
    before = guard.state.clone()
    assert guard(torch.tensor([4.0])) and not guard(torch.tensor([torch.nan])) and torch.equal(guard.state, before)
    assert not guard(torch.tensor([2.0])), "a loss may fall as far as it likes"
    young = SpikeGuard(6.0, torch.device("cpu"))
    assert not any(young(loss) for loss in (*losses[:99], torch.tensor([50.0])))


def test_a_spike_changes_no_weight_and_is_said(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stability, "SPIKE_HORIZON", 4)
    seen: list[torch.Tensor] = []
    real = train.forward_backward

    def spiky(model: torch.nn.Module, *rest: Any) -> torch.Tensor:
        seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return real(model if len(seen) != 8 else lambda *a, **k: 30 * model(*a, **k), *rest)

    monkeypatch.setattr(train, "forward_backward", spiky)
    assert go(text, "--micro-batch", "8") == 0
    assert "step 8: loss" in (said := capsys.readouterr().out) and "(spike_sigmas)" in said
    assert torch.equal(seen[7], seen[8]) and not torch.equal(seen[8], seen[9])


def test_patience_ends_a_run_and_keeps_its_best(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = iter([5.0, 4.0, 4.5, 4.1, 9.0, 9.0])
    monkeypatch.setattr(task, "mean_over", lambda *args: {"loss": next(values)})
    more = ["--patience", "2", "--eval-every", "2", "--save-every", "0", "--max-steps", "40", "--keep", "1"]
    assert go(text, *more) == 0
    assert "stopping: 2 validations without a better val_loss than 4.0000 at step 4" in capsys.readouterr().out
    assert losses()[-1][0] == 8
    assert [p.name for p in checkpoint.checkpoints(Path("run"))] == ["step_00000004", "step_00000008"]
    assert go(text, *more) == 0 and losses()[-1][0] == 8, "ended is ended"


def test_patience_watches_any_figure(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rising figure of an evaluation; NaN is never the best. Another metric has a best of its own, so the run goes
    on."""
    scores = iter([math.nan, 0.5, 0.7, 0.6, 0.7, *(float(n) for n in range(9))])
    monkeypatch.setitem(train.EVALUATIONS, "quiz", lambda run: {"acc": next(scores)})
    more = ["--eval-every", "2", "--save-every", "0", "--max-steps", "12", "--keep", "1"]
    assert go(text, *more, "--patience", "2", "--metric", "quiz.acc") == 0
    said = capsys.readouterr().out
    assert "stopping: 2 validations without a better quiz.acc than 0.7000 at step 6" in said
    assert "best quiz.acc: 0.7000, of run/step_00000006" in said
    assert [p.name for p in checkpoint.checkpoints(Path("run"))] == ["step_00000006", "step_00000010"]
    assert go(text, *more, "--patience", "2", "--metric", "loss") == 0
    assert losses()[-1][0] == 12


def test_a_run_resumes_without_the_rows_that_are_damaged(text: Path) -> None:
    assert go(text) == 0
    lines = Path("run/metrics.jsonl").read_bytes().splitlines(keepends=True)
    damaged = {3: b"\0\0\xff\n", 5: b"[1]\n", 7: b'{"step": "x"}\n', 8: b"{}\n"}
    Path("run/metrics.jsonl").write_bytes(b"".join(damaged.get(i, line) for i, line in enumerate(lines)))
    assert go(text, "--max-steps", "13") == 0
    kept = [json.loads(line) for i, line in enumerate(lines) if i not in damaged]
    assert rows()[: len(kept)] == kept and losses()[-1][0] == 13


def test_a_run_from_before_the_metric_resumes(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints have best_loss and no metric."""
    values = iter([5.0, 4.0, 4.5, 9.0, 4.1, 9.0, 9.0])
    monkeypatch.setattr(task, "mean_over", lambda *args: {"loss": next(values)})
    more = ["--patience", "3", "--eval-every", "2", "--save-every", "0", "--keep", "1"]
    save = checkpoint.save

    def old(run: Path, step: int, weights: Any, optimizer: Any, state: dict[str, Any], *rest: Any) -> Path:
        progress = {"best_loss" if k == "best" else k: v for k, v in state["progress"].items()}
        config = {k: v for k, v in state["config"].items() if not k.startswith("metric")}
        return save(run, step, weights, optimizer, {**state, "progress": progress, "config": config}, *rest)

    with monkeypatch.context() as before:
        before.setattr(checkpoint, "save", old)
        assert go(text, *more, "--max-steps", "6") == 0
    state = json.loads((checkpoint.find("run") / "state.json").read_text())
    assert state["progress"]["best_loss"] == 4.0 and "metric" not in state["config"]
    assert go(text, *more, "--max-steps", "40") == 0
    assert losses()[-1][0] == 12, "three validations after the best, 4.0 before the resume"


@pytest.mark.parametrize(
    "options, message",
    [
        ("--metric quiz.acc", "metric is 'quiz.acc', expected a figure of the validation: val_loss"),
        ("--metric val_los --metric-goal min", r"metric is 'val_los' \(did you mean val_loss\?\), expected a figure"),
        ("--metric size", "metric_goal is 'auto', expected min or max: the name 'size' does not tell"),
    ],
)
def test_an_unknown_metric_is_one_sentence_before_training(text: Path, options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        go(text, "--patience", "1", "--eval-every", "2", *options.split())
    assert not Path("run").exists()


def test_a_metric_that_an_evaluation_lacks_is_said_at_the_first_validation(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(train.EVALUATIONS, "quiz", lambda run: {"f1": 1.0})
    with pytest.raises(
        UserError, match="metric is 'quiz.acc'.*, expected a figure of the validation: quiz.f1, val_loss"
    ):
        go(text, "--patience", "1", "--eval-every", "2", "--metric", "quiz.acc")


def test_profile_names_the_ops(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go(text, "--profile", "3:4", "--kernels", "layer_norm=auto") == 0
    assert "profile: run/trace.json" in capsys.readouterr().out
    names = {e["name"] for e in json.loads(Path("run/trace.json").read_text())["traceEvents"]}
    assert any(name.startswith("fastgpt::layer_norm_fwd") for name in names)


def test_energy_of_a_run(text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    counter = itertools.chain([1000.0], itertools.repeat(4600.0))
    monkeypatch.setattr(profiling, "energy_joules", lambda device: next(counter))
    monkeypatch.setattr(profiling, "PERIOD", 0.0)
    assert go(text) == 0
    said = capsys.readouterr().out
    assert re.search(r"energy: 0.001 kWh in 12 steps, \d+ W on average, 1172 mJ a token", said), said  # 3072 tokens
    assert [r["joules"] for r in rows() if "joules" in r] == [3600.0]
    assert {r["power_watts"] for r in rows() if "loss" in r} == {0.0}


def test_power_is_the_mean_between_readings_of_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, counter = iter([0.0, 0.5, 2.0, 2.0, 10.0, 14.0, 14.0]), iter([100.0, 300.0, 900.0, 1300.0])
    monkeypatch.setattr(profiling, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(profiling, "energy_joules", lambda device: next(counter))
    power = profiling.Power(torch.device("cpu"))
    assert [power.watts(), power.watts()] == [None, 100.0], "half a second is too short"
    power.restart()
    assert power.watts() == 100.0
    monkeypatch.setattr(profiling, "energy_joules", lambda device: None)
    monkeypatch.setattr(profiling, "time", SimpleNamespace(perf_counter=lambda: 99.0))
    assert profiling.Power(torch.device("cpu")).watts() is None


def test_validation_loss_by_source(text: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text((text / "train.txt").read_text())
    (tmp_path / "digits.txt").write_text("".join(f"{n * 7919 % 1000:03d} " for n in range(2000)))
    sources = json.dumps({"own": "own.txt", "digits": "digits.txt"})
    assert go(text, "--val-sources", sources) == 0
    found = [{k: v for k, v in r.items() if k.startswith("val_loss")} for r in rows() if "val_loss" in r]
    assert len(found) == 2 and all(set(r) == {"val_loss", "val_loss.own", "val_loss.digits"} for r in found)
    assert found[-1]["val_loss.own"] < found[-1]["val_loss.digits"], "it has seen no such digits"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("absent.txt", "val_sources.web is 'absent.txt', expected a UTF-8 text file or .bin shards"),
        ("absent.bin", "absent.bin"),
        ("empty.txt", "val_sources.web has 0 tokens, expected at least 2"),
    ],
)
def test_wrong_validation_sources(path: str, expected: str, text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=expected):
        go(text, "--val-sources", json.dumps({"web": path}))


def test_validation_sources_of_shards(text: Path, tmp_path: Path) -> None:
    for name, n in (("a.bin", 4000), ("b.bin", 500)):
        with ShardWriter(tmp_path / name, 300) as shard:
            shard.write(torch.arange(n).remainder(300).numpy())
    source = open_source("a.bin", val_fraction=0.1)
    assert {k: len(v) for k, v in open_validation({"b": "b.bin"}, source).items()} == {"b": 500}
    with pytest.raises(UserError, match="val_sources.text is 'own.txt', expected .bin shards"):
        open_validation({"text": "own.txt"}, source)
    with ShardWriter(tmp_path / "more.bin", 60000) as shard:
        shard.write(torch.arange(59000).numpy())
    with pytest.raises(UserError, match="more.bin"):
        open_validation({"more": "more.bin"}, source)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Return the runs that reached their end."""
    found: list[Run] = []
    monkeypatch.setitem(train.EVALUATIONS, "ended", lambda run: found.append(run) or {})
    return found


def test_learning_rates_by_name(text: Path, ended: list[Run]) -> None:
    more = ["--lr-ratios", '{"wte|wpe": 0.5, "norm": 0.0}', "--max-steps", "3"]
    cfg = load_config([*SMALL, "--data", str(text), "--out", "run", *more])
    before = {name: p.clone() for name, p in train.prepare(cfg).model.named_parameters()}
    assert go(text, *more) == 0
    run = ended[-1]
    moved = {name: not torch.equal(before[name], p) for name, p in run.model.named_parameters()}
    assert not any(moved[name] for name in moved if "norm" in name)
    assert all(moved[name] for name in moved if "norm" not in name)
    rates = {g["lr"] / learning_rate(cfg, 2, 3) for g in run.optimizer.param_groups}
    assert rates == {0.0, 0.5, 1.0}
    with pytest.raises(UserError, match="lr_ratios: 'head.*' matches no parameter"):
        train.prepare(dataclasses.replace(cfg, lr_ratios={"head": 0.1}))


def test_evaluations_of_ones_own(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(train.EVALUATIONS, "own", lambda run: {"step": run.progress.step, "two": 2.0})
    assert go(text) == 0
    found = [(r["step"], r["own.step"], r["own.two"]) for r in rows() if "val_loss" in r]
    assert found == [(6, 6.0, 2.0), (12, 12.0, 2.0)] and "own.two 2.0000" in capsys.readouterr().out


def test_a_resume_with_other_groups_keeps_each_parameters_moments(text: Path, ended: list[Run]) -> None:
    def resumed(*more: str) -> Run:
        run = train.prepare(load_config([*SMALL, "--data", str(text), "--out", "run", *more]))
        run.resume()
        return run

    def state_of(run: Run) -> dict[str, torch.Tensor]:
        return checkpoint.flatten_optimizer(run.optimizer, run.model.named_parameters())

    assert go(text, "--max-steps", "1") == 0
    run = ended[-1]
    other = resumed("--lr-ratios", '{"wte": 1.0}')
    assert len(other.optimizer.param_groups) > len(run.optimizer.param_groups)
    before, after = state_of(run), state_of(other)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(UserError, match="has optimizer 'adamw', expected 'muon'"):
        resumed("--optimizer", "muon")
    path = checkpoint.find("run") / checkpoint.STATE
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))  # its state would be matched by number
    with pytest.raises(UserError, match=r"has lr_ratios \{\}, expected \{'wte': 1.0\}"):
        resumed("--lr-ratios", '{"wte": 1.0}')


def test_fp16_scales_its_loss_and_resumes_bitwise(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "GROW_AFTER", 3)
    more = ["--dtype", "fp16", "--keep", "0", "--save-every", "5", "--eval-batches", "1"]
    assert go(text, *more) == 0
    whole = losses()
    assert whole[-1][1] < whole[0][1]
    state = {p.name: checkpoint.read_state(p) for p in checkpoint.checkpoints(Path("run"))}
    scales = [
        checkpoint.read_tensors(Path("run") / name, checkpoint.OPTIMIZER, s)["scaling"].tolist()
        for name, s in state.items()
    ]
    assert scales[0] == [131072.0, 2.0] and all(scale > 65536 for scale, _ in scales)  # larger ones may overflow
    for name in list(state)[1:]:
        shutil.rmtree(Path("run") / name)
    assert go(text, *more) == 0 and losses() == whole


def test_an_overflow_halves_the_scale_and_changes_nothing() -> None:
    cfg = load_config([*SMALL, "--dtype", "fp16"])
    model = build_model(cfg, 60, torch.device("cpu"))
    optimizer, scaling = build_optimizer(cfg, model), LossScale(torch.device("cpu"))
    ids = torch.randint(60, (4, 32), generator=torch.Generator().manual_seed(0))
    plain = train_step(model, optimizer, iter([(ids, ids)]), 1, None, scaling)  # type: ignore[arg-type]
    assert bool(plain.isfinite().all()) and scaling.state.tolist() == [65536.0, 1.0]
    before = [p.clone() for p in model.parameters()]
    scaling.state[0] = 2.0**40
    over = train_step(model, optimizer, iter([(ids, ids)]), 1, None, scaling)  # type: ignore[arg-type]
    assert not over[1].isfinite() and scaling.state.tolist() == [2.0**39, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_muon_trains_and_resumes_bitwise(text: Path) -> None:
    more = ["--optimizer", "muon", "--dtype", "bf16", "--keep", "0"]
    assert go(text, *more) == 0
    whole = losses()
    assert whole[-1][1] < whole[0][1] - 0.3
    for path in checkpoint.checkpoints(Path("run"))[1:]:
        shutil.rmtree(path)
    assert go(text, *more) == 0 and losses() == whole


def test_muon_takes_the_matrices_of_the_blocks(text: Path, ended: list[Run]) -> None:
    more = ["--optimizer", "muon", "--clip", "0.5", "--max-steps", "1"]
    cfg = load_config([*SMALL, "--data", str(text), "--out", "run", *more])
    before = {name: p.clone() for name, p in train.prepare(cfg).model.named_parameters()}
    assert train.train(cfg) == 0
    run, norm = ended[-1], rows()[0]["grad_norm"]
    assert isinstance(run.optimizer, MuonAdamW)
    named = {p: name for name, p in run.model.named_parameters()}
    expected = {name for name, p in run.model.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
    assert {named[p] for p in run.optimizer.matrices} == expected
    assert all(not torch.equal(before[name], p) for name, p in run.model.named_parameters())
    w = run.model.blocks[0].mlp.up.weight.detach()  # a Muon step: equal singular values, of AdamW's size
    rate = learning_rate(cfg, 0, cfg.max_steps)
    moved = before["blocks.0.mlp.up.weight"].detach() * (1 - rate * cfg.weight_decay) - w
    values = torch.linalg.svdvals(moved) / (0.2 * max(w.shape) ** 0.5 * rate)
    assert norm > 0 and 0.6 < float(values.quantile(0.1)) and float(values.max()) < 1.3
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    run.optimizer.found_inf = torch.ones(1)
    for p in run.model.parameters():
        p.grad = torch.ones_like(p)
    run.optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in run.model.named_parameters())


def test_milestones_stay(text: Path) -> None:
    assert go(text, "--keep", "1", "--save-every", "2", "--keep-every", "4") == 0
    kept = [p.name for p in checkpoint.checkpoints(Path("run"))]
    assert kept == ["step_00000004", "step_00000008", "step_00000012"]


def test_finished_run_is_not_trained_again(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go(text) == 0
    newest = checkpoint.find("run")
    written = newest.stat().st_mtime_ns
    assert go(text) == 0
    assert "resumed at step 12 of 12" in capsys.readouterr().out
    assert newest.stat().st_mtime_ns == written, "its checkpoint stays as it is"
    assert len(losses()) == 12
    assert go(text, "--max-steps", "14", "--lr", "1e-4") == 0
    said = capsys.readouterr().out
    assert "resumed at step 12 of 14; changed since then: max_steps 12 -> 14, lr 0.003 -> 0.0001" in said
    assert "the run ends with step 14" in said
    assert [s for s, _ in losses()] == list(range(1, 15))


def test_signal_ends_with_a_checkpoint_and_exit_0(text: Path) -> None:
    command = [sys.executable, "-m", "fastgpt.train", *SMALL, "--data", str(text), "--out", "run"]
    command += ["--max-steps", "100000", "--save-every", "0", "--eval-every", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 60
    while time.time() < deadline and written() < 3:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert f"to resume: fastgpt train {shlex.join(command[3:])}" in output
    done = checkpoint.read_state(checkpoint.find("run"))["progress"]["step"]
    assert done >= 3 and losses()[-1][0] == done


def test_minutes_fix_the_number_of_steps_once(text: Path) -> None:
    assert go(text, "--max-minutes", "0.03", "--max-steps", "100000", "--eval-every", "0", "--save-every", "0") == 0
    progress = checkpoint.read_state(checkpoint.find("run"))["progress"]
    assert progress["length_known"] and progress["last_step"] < 100000
    assert steplog.MEASURED_STEPS < progress["step"] <= progress["last_step"]
    assert rows()[-2]["lr"] < 0.5 * 3e-3 or progress["step"] < progress["last_step"], "the schedule reached its end"
    known = {}
    for limits in ("--max-minutes 0.03 --max-steps 100000", "--max-minutes 0.09 --max-steps 100000", "--max-steps 99"):
        run = train.prepare(load_config([*SMALL, "--data", str(text), "--out", "run", *limits.split()]))
        run.resume()
        known[limits] = run.progress.length_known, run.progress.last_step
    assert [*known.values()] == [(True, progress["last_step"]), (False, 100000), (True, 99)], "a new limit counts"


def test_baseline_check_fails_a_model_that_learnt_nothing(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go(text, "--check-baseline", "true", "--lr", "1e-9", "--max-steps", "2") == 1
    assert "below the unigram model, expected at least 1" in capsys.readouterr().out


def test_gradients_that_stay_nan_stop_the_run(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steplog, "STOP_AFTER_SKIPS", 3)
    real = train.forward_backward

    def broken(model: torch.nn.Module, *rest: object) -> torch.Tensor:
        with torch.no_grad():
            model.norm_f.weight[0] = torch.nan  # type: ignore[union-attr, index]
        return real(model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "forward_backward", broken)
    with pytest.raises(UserError, match="3 steps in a row were skipped, .*; there is no checkpoint yet"):
        go(text)
    assert [row.get("skipped") for row in rows()] == [1, 1, 1]


def test_token_shards_train_without_a_tokenizer(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = open_source(str(text), vocab_size=300)
    folder = Path("data") / f"{text.name}-300"
    assert made.name == str(folder)
    assert train.main([*SMALL, "--data", f"{folder}/*.bin", "--out", "bin", "--max-steps", "3"]) == 0
    assert "the data has no tokenizer" in capsys.readouterr().out
    with_tokenizer = ["--tokenizer", str(folder / "tokenizer.json"), "--out", "bin2", "--max-steps", "3"]
    assert train.main([*SMALL, "--data", f"{folder}/train.bin", *with_tokenizer]) == 0


def test_characters_as_ids(here: Path) -> None:
    """nanoGPT's character-level train.bin: the model's vocabulary may be as small as the ids allow."""
    torch.arange(4000).remainder(65).short().numpy().tofile("train.bin")
    settings = [*SMALL, "--data", "train.bin", "--val-sources", '{"more": "train.bin"}']
    assert train.prepare(load_config(settings)).model.vocab_size == 50257
    run = train.prepare(load_config([*settings, "--model.vocab-size", "65"]))
    assert (run.model.vocab_size, run.data.n_vocab) == (65, 65)
    with pytest.raises(UserError, match="model.vocab_size is 64, but train.bin has 65 token ids"):
        train.prepare(load_config([*settings, "--model.vocab-size", "64"]))
    torch.full((500,), 70).short().numpy().tofile("train.bin.more.bin")
    more = ["--val-sources", '{"more": "train.bin.more.bin"}', "--model.vocab-size", "65"]
    with pytest.raises(UserError, match="more.bin has token id 70 at position 0; the vocabulary has 65 ids"):
        train.prepare(load_config([*SMALL, "--data", "train.bin", *more]))


def test_train_py_copied_out_of_the_checkout_runs(text: Path, here: Path) -> None:
    open_source(str(text), vocab_size=300)
    tokens = next(Path("data").glob("*/train.bin")).resolve()
    shutil.copy(train.__file__, here / "train.py")
    done = subprocess.run(
        [sys.executable, "train.py", *SMALL, "--data", str(tokens), "--max-steps", "20", "--save-every", "0"],
        cwd=here,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH" or "shim" in v},
    )
    assert done.returncode == 0, done.stderr
    assert "step     20/20" in done.stdout


def bad(text: Path, change: str) -> list[str]:
    """Return the arguments of a run that must fail, after preparing the cause."""
    if change == "missing":
        return ["--data", "nowhere.txt"]
    if change == "empty":
        Path("empty.txt").touch()
        return ["--data", "empty.txt"]
    if change == "not utf-8":
        Path("latin.txt").write_bytes(b"caf\xe9\n" * 1000)
        return ["--data", "latin.txt"]
    if change == "short":
        Path("short.txt").write_text("less than a block of text\n" * 9)
        return ["--data", "short.txt", "--block-size", "4096", "--batch-tokens", "16384"]
    if change == "heads":
        return ["--model.n-heads", "3"]
    if change == "kernels":
        return ["--kernels", "atention=torch"]
    if change == "track":
        return ["--track", "wandb,tensorbord"]
    if change == "profile":
        return ["--profile", "5:3"]
    if change == "corrupt shard":
        Path("train.bin").write_bytes(struct.pack("<3i", 20240520, 1, 10**6) + bytes(1012))
        return ["--data", "train.bin"]
    assert go(text, "--max-steps", "4") == 0
    newest = checkpoint.find("run")
    if change == "truncated":
        file = newest / checkpoint.MODEL
        file.write_bytes(file.read_bytes()[:-10])
    elif change == "altered":
        file = newest / checkpoint.OPTIMIZER
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    elif change == "state":
        (newest / checkpoint.STATE).write_text("{")
    elif change == "tokenizer":
        return ["--vocab-size", "301"]
    elif change == "model":
        return ["--model.width", "64"]
    elif change == "occupied":
        return ["--resume", "never"]
    return []


@pytest.mark.parametrize(
    "change,message",
    [
        ("missing", "nowhere.txt"),
        ("empty", "empty.txt"),
        ("track", "track is 'wandb,tensorbord', expected some of tensorboard, trackio, wandb"),
        ("profile", "profile is '5:3', expected FIRST:LAST"),
        ("not utf-8", "latin.txt.*UTF-8"),
        ("short", r"the corpus has \d+ tokens, one block needs 4096"),
        ("heads", "model.n_heads is 3, expected a divisor of model.width 32"),
        ("kernels", "there is no op 'atention'"),
        ("corrupt shard", "train.bin has 1024 bytes, but its header says 1000000 tokens"),
        ("truncated", "is damaged: model.safetensors has .* bytes, expected"),
        ("altered", "is damaged: the content of optimizer.safetensors has changed"),
        ("state", "is damaged: state.json cannot be read"),
        ("tokenizer", "another tokenizer"),
        ("model", "model.width 32, expected 64"),
        ("occupied", "already holds a run"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    text: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = bad(text, change)
    before = {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")} if Path("run").exists() else {}
    capsys.readouterr()
    assert run_command(lambda: go(text, *more)) == 2
    err = capsys.readouterr().err
    line = [part for part in err.splitlines() if part.startswith("fastgpt: error: ")]
    assert len(line) == 1 and re.search(message, line[0]) and "Traceback" not in err, err
    after = {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")} if Path("run").exists() else {}
    assert after == before, "nothing overwritten, nothing half written"


def test_learning_rate_schedules() -> None:
    base = load_config([*SMALL, "--lr", "1.0", "--min-lr-ratio", "0.1", "--warmup-steps", "10", "--max-steps", "110"])
    expected = {
        "cosine": (0.1, 1.0, 0.55, 0.1),
        "linear": (0.1, 1.0, 0.55, 0.1),
        "constant": (0.1, 1.0, 1.0, 1.0),
        "wsd": (0.1, 1.0, 1.0, 0.1),
    }
    for schedule, values in expected.items():
        cfg = dataclasses.replace(base, schedule=schedule)
        got = [learning_rate(cfg, step, 110) for step in (0, 10, 60, 110)]
        assert got == pytest.approx(values), schedule
