"""Checkpoints: complete or absent, verified, limited to the last k."""

import errno
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastgpt.core import tensorfile
from fastgpt.core.errors import UserError
from fastgpt.optim import AdamW
from fastgpt.training import checkpoint

WEIGHTS = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
STATE = {"0.step": torch.tensor(3.0), "0.exp_avg": torch.zeros(2, 3).t()}


def save(run: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(run, step, WEIGHTS, STATE, {"note": step}, keep)


def test_round_trip_and_keep(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_00000002", "step_00000010"]
    path = checkpoint.find(tmp_path)
    state = checkpoint.read_state(path)
    assert state["step"] == 10 and state["note"] == 10
    for name, expected in ((checkpoint.MODEL, WEIGHTS), (checkpoint.OPTIMIZER, STATE)):
        got = checkpoint.read_tensors(path, name, state)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[k], expected[k]) and got[k].dtype == expected[k].dtype for k in got)
    save(tmp_path, 10)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "nothing is left lying about"


def test_files_are_the_safetensors_package_s(tmp_path: Path) -> None:
    """The safetensors package reads what fastgpt writes, and vice versa: every dtype, a scalar, an empty tensor,
    unusual strides."""
    tensors = {name: torch.arange(3).to(dtype) for name, dtype in tensorfile.DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "strided": torch.randn(4, 3).t()}
    path = tmp_path / "ours"
    tensorfile.save_file(tensors, path)
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs")
    for got in (safetensors.torch.load_file(path), *map(tensorfile.load_file, (path, tmp_path / "theirs"))):
        assert got.keys() == tensors.keys()
        assert all(torch.equal(got[k], t) and got[k].dtype == t.dtype for k, t in tensors.items())


@pytest.mark.parametrize("at", ["save_file", "replace", "fsync"])
def test_a_write_that_fails_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    earlier = save(tmp_path, 1)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint if at == "save_file" else checkpoint.os, at, full)
    with pytest.raises(UserError, match="step_00000002 could not be written .*No space left.*; earlier .* untouched"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == [earlier.name]
    checkpoint.read_tensors(earlier, checkpoint.MODEL, checkpoint.read_state(earlier))


def test_damage_is_named_with_the_one_before(tmp_path: Path) -> None:
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    state = checkpoint.read_state(newest)
    (newest / checkpoint.MODEL).unlink()
    with pytest.raises(UserError, match=f"model.safetensors is missing; the previous checkpoint is {older}"):
        checkpoint.read_tensors(newest, checkpoint.MODEL, state)
    (newest / checkpoint.STATE).write_text('{"format": 99}')
    with pytest.raises(UserError, match="not of format 1 or 2"):
        checkpoint.read_state(newest)
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder"):
        checkpoint.find(tmp_path / "nowhere")


def test_optimizer_state_survives_bitwise() -> None:
    p = torch.nn.Parameter(torch.randn(5, 4).bfloat16())
    opt = AdamW([p], max_norm=1.0)
    p.grad = torch.randn_like(p)
    opt.step()
    q = torch.nn.Parameter(p.detach().clone())
    again = AdamW([q], max_norm=1.0)
    checkpoint.unflatten_optimizer(again, checkpoint.flatten_optimizer(opt, [("w", p)]), [("w", q)])
    for name, t in opt.state[p].items():
        assert torch.equal(t, again.state[q][name]) and t.dtype == again.state[q][name].dtype


def test_optimizer_state_finds_its_parameter_by_name() -> None:
    def make(*order: str) -> tuple[AdamW, list[tuple[str, torch.nn.Parameter]]]:
        ps = {name: torch.nn.Parameter(torch.ones(2)) for name in "abc"}
        return AdamW([{"params": [ps[name]]} for name in order]), list(ps.items())

    opt, names = make("a", "b", "c")
    for name, p in names:
        p.grad = torch.full((2,), float(ord(name)))
    opt.step()
    saved = checkpoint.flatten_optimizer(opt, names)
    again, now = make("c", "a", "b")
    checkpoint.unflatten_optimizer(again, saved, now)
    old = {f"{'abc'.index(key[0])}{key[1:]}": t for key, t in saved.items()}  # format 1: numbers, the groups' order
    numbered, then = make("a", "b", "c")
    checkpoint.unflatten_optimizer(numbered, old, then)
    for optimizer, known in ((again, now), (numbered, then)):
        for name, p in known:
            assert torch.equal(optimizer.state[p]["exp_avg"], saved[f"{name}.exp_avg"])
    for order, match in (("ab", "c has state in the checkpoint, but"), ("abc", "b has no state in the checkpoint")):
        part, of = make(*order)
        tensors = {key: t for key, t in saved.items() if order == "ab" or key[0] != "b"}
        with pytest.raises(UserError, match=match):
            checkpoint.unflatten_optimizer(part, tensors, of)
    saved["a.exp_avg"] = torch.ones(3)
    with pytest.raises(UserError, match=r"does not fit \(AdamW: saved exp_avg has shape"):
        checkpoint.unflatten_optimizer(again, saved, now)


def test_random_states_restore() -> None:
    device = torch.device("cpu")
    states = checkpoint.random_states(device)
    first = torch.rand(3)
    checkpoint.restore_random_states(states, device)
    assert torch.equal(first, torch.rand(3))


def test_the_background_writes_what_was_there_when_it_was_asked(tmp_path: Path) -> None:
    writer, w = checkpoint.Writer(), torch.zeros(1000)
    for step in range(1, 6):
        writer.save(tmp_path, step, {"w": w, "same": w}, {"t": w.view(10, 100).t()}, {}, 2, {1})
        w += 1
    assert [p.name for p in writer.finished(wait=True)] == [f"step_{step:08d}" for step in range(1, 6)]
    left = checkpoint.checkpoints(tmp_path)
    assert [p.name for p in left] == ["step_00000001", "step_00000004", "step_00000005"]
    for path, value in zip(left, (0, 3, 4), strict=True):
        got = checkpoint.read_tensors(path, checkpoint.MODEL, checkpoint.read_state(path))
        assert torch.equal(got["w"], torch.full((1000,), float(value))) and torch.equal(got["w"], got["same"])
    assert writer.finished() == []


def test_the_background_hands_its_error_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    writer = checkpoint.Writer()
    writer.save(tmp_path, 1, WEIGHTS, STATE, {}, 2)
    with pytest.raises(UserError, match="step_00000001 could not be written .*No space left"):
        writer.finished(wait=True)
    writer.save(tmp_path, 2, WEIGHTS, STATE, {}, 2)
    with pytest.raises(UserError, match="step_00000002"):
        writer.save(tmp_path, 3, WEIGHTS, STATE, {}, 2)
