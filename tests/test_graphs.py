"""A step that is recorded and replayed equals the called step bit for bit: on graphs where there is a GPU, elsewhere
on a recorder of PyTorch's calls under the same rules (fixed addresses, host numbers frozen, no waiting)."""

import functools
import importlib
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import recording
from torch import Tensor

from fastgpt import train
from fastgpt.bench.variants import train_step
from fastgpt.core.errors import UserError
from fastgpt.data import TokenLoader
from fastgpt.kernels import _tables
from fastgpt.models.config import ModelConfig
from fastgpt.nn import keep_gradients
from fastgpt.training import graphs
from fastgpt.training.build import build_model, build_optimizer
from fastgpt.training.config import TrainConfig
from fastgpt.training.schedule import learning_rate
from fastgpt.training.stability import LossScale, SpikeGuard

MODEL = ModelConfig(n_layers=2, n_heads=2, width=512, vocab_size=96, vocab_multiple=1)
SETTINGS = TrainConfig(MODEL, device="cpu", block_size=16, micro_batch=2, max_steps=9, warmup_steps=4, lr=0.01)


def settings(**more: Any) -> TrainConfig:
    """Build the settings from the dataclasses: a GPU machine may lack the command-line packages."""
    return replace(SETTINGS, **more)


@pytest.fixture
def unlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the checks of ids and targets, as on a GPU."""
    for op in ("attention", "cross_entropy", "embedding", "rope"):
        monkeypatch.setattr(importlib.import_module(f"fastgpt.ops.{op}"), "checks_values", lambda t: False)


class Training:
    """A model with its optimizer and data, and `steps` that train it."""

    def __init__(self, cfg: TrainConfig, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.cfg, self.device = cfg, torch.device(device)
        self.model = build_model(cfg, 96, self.device)
        keep_gradients(self.model, min_numel=2**18)  # the MLP's matrices; autograd allocates the other gradients
        self.optimizer = build_optimizer(cfg, self.model)
        self.guard = SpikeGuard(3.0, self.device)
        self.scaling = LossScale(self.device) if cfg.dtype == "fp16" else None
        tokens = torch.randint(96, (4000,), generator=torch.Generator().manual_seed(1)).numpy().astype("uint16")
        self.loader = TokenLoader(tokens, 2, 16, device=self.device, eot=3 if cfg.doc_masks else None)

    def state(self) -> list[Tensor]:
        """Return everything that a step changes."""
        found = [*self.model.parameters(), self.guard.state, self.optimizer.grad_norm, self.optimizer._steps]  # type: ignore[union-attr, list-item]
        found += [p.grad for p in self.model.parameters() if p.grad is not None]
        found += [] if self.scaling is None else [self.scaling.state]
        return found + [t for s in self.optimizer.state.values() for k, t in s.items() if k != "step"]

    def steps(self, how: graphs.Graphs | None, n: int = 9) -> list[list[float]]:
        rows = []
        for step in range(n):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.cfg, step, n)
            parts = (self.cfg.accumulation, self.guard, self.scaling, how)
            rows.append(train_step(self.model, self.optimizer, self.loader, *parts).tolist())
        return rows


CASES: dict[str, dict[str, Any]] = {
    "one micro-batch": dict(batch_tokens=32),
    "accumulated": dict(batch_tokens=96),
    "documents": dict(batch_tokens=96, doc_masks=True),
    "dropout": dict(batch_tokens=64, model=replace(MODEL, attn_dropout=0.1, resid_dropout=0.1)),
    "norms made again": dict(batch_tokens=64, recompute="norms"),
    "blocks made again": dict(batch_tokens=64, recompute="block"),
    "fp16": dict(batch_tokens=64, dtype="fp16"),
    "bf16, remainders": dict(batch_tokens=64, dtype="bf16", master="remainder"),
    "bf16, stochastic": dict(batch_tokens=64, dtype="bf16", master="stochastic"),
}


@pytest.mark.usefixtures("unlooked")
@pytest.mark.parametrize("case", CASES)
def test_a_replayed_step_is_the_called_step(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = settings(**CASES[case])
    called = Training(cfg)
    expected = called.steps(None)
    recorded = Training(cfg)
    monkeypatch.setattr(graphs, "record", recording(recorded.state))
    how = graphs.Graphs(recorded.model)
    assert recorded.steps(how) == expected
    assert not how.failure
    last = "accumulate" if cfg.accumulation > 1 else "forward_backward"
    assert how.recorded["optimizer_step"][0][0] is how.recorded[last][2], "read where it is, not copied"
    assert sorted(how.recorded) == sorted(
        {"forward_backward", "optimizer_step"} | ({"accumulate"} if cfg.accumulation > 1 else set())
    )
    for a, b in zip(called.model.parameters(), recorded.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len({loss for loss, *_ in expected}) == len(expected), "every step has other data"


@pytest.mark.usefixtures("unlooked")
@pytest.mark.parametrize("part", ["forward_backward", "accumulate", "optimizer_step"])
def test_a_part_that_waits_is_called_instead(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = settings(batch_tokens=96)
    expected = Training(cfg).steps(None)
    training = Training(cfg)
    record = recording(training.state)
    order = ["forward_backward", "accumulate", "optimizer_step"]

    def fails(function: graphs.Function, inputs: list[Tensor], pool: object) -> Any:
        def late(*x: Tensor) -> Tensor:
            out = function(*x)
            if how.steps > graphs.WARM_STEPS and not how.failure:
                raise RuntimeError("get_state is not for captures")
            return out

        return record(late if len(how.recorded) == order.index(part) else function, inputs, pool)

    monkeypatch.setattr(graphs, "record", fails)
    how = graphs.Graphs(training.model)
    assert training.steps(how) == expected
    assert how.failure == f"{part}: get_state is not for captures"
    assert len(how.recorded) == order.index(part)


@pytest.mark.usefixtures("unlooked")
def test_a_part_that_waits_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(settings(batch_tokens=32))
    record = recording(training.state)

    def waits(function: graphs.Function, inputs: list[Tensor], pool: object) -> Any:
        return record(lambda *x: x[0] * float(function(*x)), inputs, pool)

    monkeypatch.setattr(graphs, "record", waits)
    with pytest.raises(
        UserError, match="forward_backward cannot be recorded .operation not permitted.* with --no-graphs"
    ):
        training.steps(graphs.Graphs(training.model))


class FakeCuda:
    """A fake of torch.cuda's capture: an error inside may invalidate it; ending it then raises, and the state it set
    remains."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing = self.invalid = False
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: self)

    def __enter__(self) -> None:
        self.capturing = True

    def __exit__(self, *args: object) -> None:
        if self.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.capturing = False

    def function(self, x: Tensor, invalidates: bool, raises: str = "stop") -> Tensor:
        if self.capturing:
            self.invalid = invalidates
            try:
                raise ValueError("the reason")
            except ValueError as e:
                raise RuntimeError(raises) from (e if raises == "stop" else None)
        return x + 1


@pytest.mark.parametrize("invalidates", [False, True])
@pytest.mark.parametrize("raises, said", [("stop", "the reason"), ("the end", "the end")])
def test_only_a_clean_failure_falls_back(
    raises: str, said: str, invalidates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, how = FakeCuda(monkeypatch), graphs.Graphs(torch.nn.Linear(1, 1))
    how.steps = graphs.WARM_STEPS + 1
    call = functools.partial(how, "part", lambda x: cuda.function(x, invalidates, raises), torch.ones(1))
    if invalidates:
        with pytest.raises(UserError, match=f"part cannot be recorded .{said}., .*--no-graphs"):
            call()
    else:
        assert float(call()) == 2.0 and not cuda.capturing and how.failure == f"part: {said}"


def test_a_table_of_a_graph_outlives_newer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = _tables.Tables(torch.device("cuda"))
    monkeypatch.setattr(tables, "_upload", lambda host, note, moves: ((host.clone(), note), None, None))
    capturing = [False, True] + [False] * _tables.ENTRIES
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing.pop(0))

    def get(key: int) -> weakref.ref[Tensor]:
        return weakref.ref(tables.get(key, lambda: (torch.ones(1), None))[0])

    known, again = get(0), get(0)
    newer = [get(key) for key in range(1, _tables.ENTRIES + 1)]
    assert 0 not in tables.entries and known() is again() is not None and newer[-1]() is not None


def test_a_run_says_that_it_goes_on_without_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(Path(train.__file__).read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(graphs.Graphs, "of_run", lambda cfg, model, device, mesh: graphs.Graphs(model))

    def fails(*args: object) -> None:
        raise RuntimeError("no recording here")

    monkeypatch.setattr(graphs, "record", fails)
    argv = "--model.n-layers 1 --model.n-heads 1 --model.width 16 --block-size 16 --micro-batch 2 --batch-tokens 32"
    argv += " --out a --max-steps 5 --max-minutes null --vocab-size 300 --sample-tokens 1 --device cpu --data text.txt"
    argv += " --optimizer adamw"
    assert train.main(argv.split()) == 0
    assert capsys.readouterr().out.count("graphs: a step could not be recorded") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_a_graph_of_the_gpu_is_the_called_step(case: str) -> None:
    cfg = settings(**CASES[case], device="cuda")
    expected = Training(cfg, "cuda").steps(None)
    torch.cuda.set_stream(torch.cuda.Stream())
    recorded = Training(cfg, "cuda")
    how = graphs.Graphs(recorded.model)
    assert recorded.steps(how) == expected
    assert not how.failure
