"""`make gpu` keeps its results whatever happens: kills at every stage, with stand-ins; its real stages on a CPU."""

import dataclasses
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.bench import OPS, _harness, gpu, gpu_table, stages, tiles
from fastgpt.bench._harness import Setting
from fastgpt.bench.stages import FRESH, Record, Stage
from fastgpt.kernels import attention as kernels

ROOT = Path(__file__).resolve().parent.parent
ROW = {"bench": "throughput", "shape": "small", "batch": 1, "variant": "torch", "ms": 1.0, "tokens_per_s": 2.0}
ROW |= {"peak_mb": None, "loss_gap": 0.0, "machine": {"commit": None}}
NAMES = ("build", "first", "second", "third")
# A command whose GPU and plan are stand-ins: each stage writes a row; the stage named DIES starts another row and,
# before finishing it, is killed (SELF) or kills its parent (PARENT).
DRILL = """
import json, os, sys
from pathlib import Path
from bench import gpu
from bench.stages import FRESH, Stage

name, how = os.environ["DIES"], os.environ["HOW"]
stage = '''
import json, os, signal, sys, time
out, name, row = sys.argv[1:]
with open(out, "a") as f:
    f.write(row + chr(10))
    print("done", name, flush=True)
    if name == os.environ["DIES"]:
        f.write(row[:20])
        f.flush()
        open(out + ".pid", "w").write(str(os.getpid()))
        os.kill(os.getpid() if os.environ["HOW"] == "SELF" else os.getppid(), getattr(signal, os.environ["SIGNAL"]))
        time.sleep(60)
'''

def plan(site, out, arch):
    names = ("build", "first", "second", "third")
    return [
        Stage(n, [sys.executable, "-c", stage, str(out / FRESH), n, os.environ["ROW"]], 20, 1, str(site)) for n in names
    ]

gpu.plan, gpu.probe = plan, lambda: ("9.0a", "")
sys.exit(gpu.main(["--out", sys.argv[1], "--commit", "abc"]))
"""


def drill(out: Path, dies: str, how: str, number: str = "SIGKILL") -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "DIES": dies, "HOW": how, "SIGNAL": number, "ROW": json.dumps(ROW)}
    command = [sys.executable, "-c", DRILL, str(out)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("dies", NAMES)
def test_a_stage_that_is_killed_costs_itself_alone(dies: str, tmp_path: Path) -> None:
    done = drill(tmp_path, dies, "SELF")
    assert done.returncode == 1, done.stderr
    rows = [json.loads(line) for line in lines(tmp_path / "rows.jsonl")]
    assert [r["stage"] for r in rows] == list(NAMES) and {r["machine"]["commit"] for r in rows} == {"abc"}
    outcomes = {s["name"]: s["outcome"] for s in json.loads((tmp_path / "gpu.json").read_text())["stages"]}
    assert outcomes == {n: "FAILED: exit code -9" if n == dies else "passed" for n in NAMES}
    assert done.stdout.endswith((tmp_path / "gpu.txt").read_text()) and not (tmp_path / FRESH).exists()
    assert done.stdout.count("(third)") == 1, "figures of every stage are in the table"


@pytest.mark.parametrize("dies", NAMES)
def test_a_kill_of_the_command_leaves_every_row(dies: str, tmp_path: Path) -> None:
    assert drill(tmp_path, dies, "PARENT").returncode == -signal.SIGKILL
    before = NAMES[: NAMES.index(dies)]
    assert [json.loads(line)["stage"] for line in lines(tmp_path / "rows.jsonl")] == list(before)
    assert len(lines(tmp_path / FRESH)) == 2 and json.loads(lines(tmp_path / FRESH)[0]) == ROW
    assert f"done {dies}" in (tmp_path / "log.txt").read_text()
    table = gpu.table_of(tmp_path)
    assert all(f"({name})" in table for name in (*before, "killed")) and f"{dies:<21}     0.0  did not end" in table
    pid = int((tmp_path / f"{FRESH}.pid").read_text())
    deadline = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < deadline, "the stage outlives the command"
        time.sleep(0.05)
    (tmp_path / f"{FRESH}.pid").unlink()
    assert drill(tmp_path, "nobody", "").returncode == 0, "the next run takes over what was left"
    assert len(lines(tmp_path / "rows.jsonl")) == len(before) + 1 + len(NAMES)


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_sigterm_ends_with_the_table(tmp_path: Path) -> None:
    done = drill(tmp_path, "second", "PARENT", "SIGTERM")
    assert done.returncode == 130, done.stderr
    assert [json.loads(line)["stage"] for line in lines(tmp_path / "rows.jsonl")] == ["build", "first", "second"]
    told = re.findall(r"^(\w+) +[\d.]+  (.*?)(?: \||$)", done.stdout.rpartition("stage  ")[2], re.M)
    assert told == [
        ("build", "passed"),
        ("first", "passed"),
        ("second", "FAILED: interrupted"),
        ("third", "not run"),
    ]


def test_stages_are_limited_and_none_begins_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit applies to all processes of a stage; the budget counts from the command's start."""
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    planned = [
        Stage("bad", [sys.executable, "-c", "raise SystemExit(3)"], 20, 1),
        Stage("absent", ["no-such-command-here"], 20, 1),
        Stage("late", [sys.executable, "-c", child], 1, 1),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "LEAST", 0.5)
        assert stages.run_stages(planned, tmp_path, Record("gpu", 60.0, "abc")) == 1
    outcomes = [s.outcome for s in planned]
    assert outcomes[:2] == ["FAILED: exit code 3", "not run: no-such-command-here was not found"]
    assert outcomes[2] == "FAILED: over its limit of 1 s" and planned[2].seconds < 10
    late = [Stage("over", [sys.executable, "-c", ""], 20, 1)]
    assert stages.run_stages(late, tmp_path, Record("gpu", 60.0, "abc", time.monotonic() - 56)) == 0
    assert late[0].outcome == "not run: out of time"
    assert capsys.readouterr().out.splitlines()[-1].startswith("over ")


def test_a_table_that_fails_costs_no_row(tmp_path: Path) -> None:
    (tmp_path / FRESH).write_text("{\n\n[1]\n" + json.dumps(ROW) + "\n")

    def broken(rows: list[dict[str, Any]]) -> list[str]:
        raise KeyError("ms")

    assert [r["machine"]["commit"] for r in stages.collect(tmp_path, "abc", "one")] == ["abc"]
    stages.keep([], [ROW], tmp_path, Record("gpu", 1.0, "abc"), broken)
    assert "no figures: KeyError: 'ms'" in (tmp_path / "gpu.txt").read_text()
    assert len(lines(tmp_path / "rows.jsonl")) == 1


def test_limits_of_the_first_stages_fit_the_budget(tmp_path: Path) -> None:
    planned = gpu.plan(tmp_path / "site", tmp_path, "9.0a")
    first = [s.name for s in planned[: gpu.FIRST]]
    assert first == ["build", "throughput", "attention", "tune", "throughput tuned", "parity"]
    assert sum(s.limit for s in planned[: gpu.FIRST]) <= gpu.BUDGET - 15 and gpu.BUDGET <= 540
    assert {*OPS, "torch compile", "training", "graphs", "tiles"} < {s.name for s in planned}
    assert len({s.name for s in planned}) == len(planned) and all(s.guess <= s.limit for s in planned)
    check = gpu.plan_check(tmp_path / "site", tmp_path, "9.0a")
    assert [s.name for s in check] == ["build", "memcheck", "racecheck"]
    assert sum(s.limit for s in check) <= gpu.CHECK_BUDGET - 15
    assert planned[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a" == gpu.arch_of(9, 0) and gpu.arch_of(8, 9) == "8.9"


def test_the_dry_run_prints_the_plan() -> None:
    for more, names in (([], ("build", "parity", *OPS, "throughput")), (["--check"], ("build", "memcheck"))):
        command = [sys.executable, "-m", "bench.gpu", "--dry-run", *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert all(f"\n{name} " in done.stdout for name in names) and "not measured" in done.stdout


@pytest.mark.parametrize(
    "code, says",
    [
        ("pass", "there is no CUDA device here"),
        ("import no_such_module", "cannot import torch, which the build and every stage need (ModuleNotFoundError"),
    ],
)
def test_nothing_to_run_on_is_one_sentence(
    code: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "PROBE", code)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err and not list(tmp_path.iterdir())


def test_a_build_without_cuda_kernels_is_a_failure_here() -> None:
    stage = Stage("build", [], 1, 1, outcome="passed", last="fastgpt: built the cpu kernels; left out cuda: no nvcc")
    gpu.judge_build(stage)
    assert stage.outcome.startswith("FAILED")


def test_the_table_holds_what_was_measured() -> None:
    machine: dict[str, Any] = {"machine": {}}
    op = {"bench": "attention", "phase": "both", "shape": [1, 2], "dtype": "bfloat16", "backend": "cuda"} | machine
    tile = {"bench": "tiles", "kernel": "dq", "in_use": False} | machine
    rows: list[dict[str, Any]] = [
        {**ROW, "stage": "throughput", "speed_vs_torch": [1.25, 1.2, 1.3], "variant": "fastgpt"},
        {**ROW, "stage": "throughput", "variant": "fastgpt graphs", "ms": None, "red": "out of memory"},
        {"bench": "energy", "variant": "fastgpt", "joules_per_token": 0.002, **machine},
        {**op, "provider": "cuda", "ms": 2.0},
        {**op, "provider": "triton", "ms": 1.0},
        {**op, "provider": "broken", "red": "wrong"},
        {"bench": "tune", "op": "attention", "chosen": "triton", "note": "1.3x torch", **machine},
        {"bench": "training", "note": "60 steps", **machine},
        {**tile, "mode": "64x64", "ms": 2.0},
        {**tile, "mode": "128x64", "ms": 1.0},
    ]
    rows[1].pop("ms")
    text = "\n".join(gpu_table.figures(rows))
    for part in ("1.250", "out of memory", "fastgpt 2.000", "triton 1.000, cuda 2.000, broken RED", "1.3x torch"):
        assert part in text, part
    assert "training run: 60 steps" in text and "tiles of dq, ms: 128x64 1.000, 64x64 2.000" in text
    assert gpu_table.figures([]) == []


def test_kernels_stand_beside_their_model() -> None:
    """What takes over 1.5 times its modelled time is first and marked; kernels without a model are left out."""
    kernels = [("layer_norm_fwd_kernel", 2.0), ("adamw_update_kernel", 1.0), ("gemv_kernel", 9.0)]
    modelled = {"bench": "model", "figure": "kernel", "class": "own"}
    rows: list[Any] = [{**modelled, "kernel": "layer_norm_fwd_kernel", "ms": ms} for ms in (0.5, 0.5)]
    rows.append({**modelled, "kernel": "adamw_update_kernel", "ms": 0.9})
    measured = [{"name": name, "ms": ms, "calls": 1.0} for name, ms in kernels]
    rows.append({"bench": "roofline", "variant": "fastgpt graphs", "kernels": measured})
    first, *lines = gpu_table.modelled(rows)
    assert first.split()[-3:] == ["ms", "modelled", "ratio"]
    assert [line.split() for line in lines] == [
        ["layer_norm_fwd_kernel", "2.000", "1.000", "2.00", "over", "1.5"],
        ["adamw_update_kernel", "1.000", "0.900", "1.11"],
    ]
    assert gpu_table.modelled(rows[:-1]) == []


MODEST = {  # options that shorten a stage of the plan to seconds on a CPU
    "throughput": "--device cpu --steps 2 --variant fastgpt",
    "attention": "--device cpu --shape 1x8x2x2x16 --seconds 0",
    "tune": "--device cpu --seconds 0",
    "parity": "--jobs 2 embedding cpu",
    "training": "--device cpu --shape small --batch 1",
    "layer_norm": "--device cpu --shape 4x33 --seconds 0",
    "roofline": "--device cpu --steps 1",
}


@pytest.mark.extended
def test_the_real_stages_need_nothing_that_a_gpu_machine_lacks(tmp_path: Path) -> None:
    """Run the plan's commands in their CPU form, from a copy like that of a build, without the packages of
    test_lean.py."""
    site, out = tmp_path / "work" / "site", tmp_path / "out"
    site.mkdir(parents=True)
    copy = "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2], dirs_exist_ok=True)"
    (site / "sitecustomize.py").write_text(runpy.run_path(str(Path(__file__).with_name("test_lean.py")))["BLOCK"])
    planned = []
    for stage in gpu.plan(site, out, "", device="cpu"):
        if stage.name == "build":
            command = [sys.executable, "-c", copy, str(ROOT / "fastgpt"), str(site / "fastgpt")]
        elif stage.name in MODEST:
            kept = stage.command[: stage.command.index("-m") + 2]
            json_to = ["--json", str(out / ("parity.jsonl" if stage.name == "parity" else FRESH))]
            command = [*kept, *MODEST[stage.name].split(), *json_to]
        elif stage.name in ("graphs", "modules"):
            command = [*stage.command, "--collect-only"]
        elif stage.name == "doctor":
            command = stage.command
        else:
            continue
        more = {"FASTGPT_EMULATED_CUDA": "", "OMP_NUM_THREADS": "1"}
        planned.append(
            dataclasses.replace(stage, command=command, limit=300, environment={**stage.environment, **more})
        )
    code = stages.run_stages(planned, out, Record("gpu", 900.0, "abc"), gpu.judge_build, gpu_table.figures)
    assert code == 0, (out / "log.txt").read_text()[-4000:]
    rows = [json.loads(line) for line in lines(out / "rows.jsonl")]
    assert {r["stage"] for r in rows} == {"throughput", "attention", "tune", "training", "layer_norm", "roofline"}
    assert {r["machine"]["commit"] for r in rows} == {"abc"} and len(lines(out / "parity.jsonl")) > 100
    table = (out / "gpu.txt").read_text()
    for part in (
        "small B 12, fastgpt (throughput)",
        "attention 1x8x2x2x16",
        "training run: 60 steps with a resume at 30",
    ):
        assert part in table, table


def test_tiles_are_timed_in_the_shape_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, every kernel is launched in every shape; a shape that cannot be launched, or is wrong, is
    red."""
    setting = Setting((1, 20, 1, 1, 16), torch.float32, torch.device("cpu"))
    launches: set[str] = set()
    usual = kernels.tile

    def tile(which: str, *rest: Any) -> dict[str, Any]:
        launches.add(which)
        return usual(which, *rest)

    monkeypatch.setattr(kernels, "tile", tile)
    monkeypatch.setattr(_harness, "CPU_SAMPLE", 0.0)
    monkeypatch.setattr(tiles, "SHAPES", {"fwd": [(), (32, 16, 4, 1)], "dq": [(), (16, 32, 4, 1), (0, 0, 4, 1)]})
    for kernel in tiles.SHAPES:
        rows = {r["mode"]: r for r in tiles.measure(kernel, setting, 0.0)}
        assert len(rows) == len(tiles.SHAPES[kernel]) and rows["in use"]["in_use"] and rows["in use"]["ms"] > 0
        assert [name for name, r in rows.items() if "red" in r] == (["0x0x4x1"] if kernel == "dq" else [])
    monkeypatch.setattr(tiles, "NEAR", -1.0)
    assert "results differ by" in {r["mode"]: r for r in tiles.measure("fwd", setting, 0.0)}["32x16x4x1"]["red"]
    assert kernels.tile is tile and launches == {"fwd", "dkdv", "dq"}
