"""deploy/slurm.sh with stand-ins for Slurm's commands: what each process is told, the notice, the queue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "deploy" / "slurm.sh"
TASKS = 2
STAND_INS = {
    # a task for each process, as srun starts them; it ends with the worst code
    "srun": f"""
shift
for i in $(seq 0 {TASKS - 1}); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & echo $! >> tasks; done
code=0; for task in $(cat tasks); do wait $task || code=$?; done
exit $code""",
    "scontrol": 'case $1 in show) echo localhost; echo other;; requeue) echo "$2" > requeued;; esac',
    "scancel": "echo $* > cancelled; kill -TERM $(cat tasks)",
}
NEVER = "trap 'exit 0' TERM; touch began.$RANK; while :; do sleep 0.02; done"


def job(folder: Path, fastgpt: str) -> subprocess.Popen[str]:
    """Start the script in a folder, with a stand-in for fastgpt."""
    for name, text in {**STAND_INS, "fastgpt": fastgpt}.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    env |= {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "localhost,other", "SLURM_NTASKS": str(TASKS)}
    command = ["bash", str(SCRIPT), "--config", "tiny", "--out", "a b"]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_each_process_knows_the_others(tmp_path: Path) -> None:
    told = 'printf "%s\\n" "$WORLD_SIZE" "$LOCAL_RANK" "$MASTER_ADDR" "$MASTER_PORT" "$@" > "told.$RANK"'
    process = job(tmp_path, told)
    assert process.wait(60) == 0, process.communicate()
    for rank in range(TASKS):
        port, arguments = str(20000 + 41234 % 20000), ["train", "--config", "tiny", "--out", "a b"]
        expected = [str(TASKS), str(rank), "localhost", port, *arguments]
        assert (tmp_path / f"told.{rank}").read_text().splitlines() == expected
    assert not (tmp_path / "requeued").exists(), "a run that has ended is not started again"


def test_a_failure_ends_the_job(tmp_path: Path) -> None:
    process = job(tmp_path, "exit 3")
    assert process.wait(60) == 3 and not (tmp_path / "requeued").exists()


def test_the_notice_reaches_the_processes_and_the_job_is_queued_again(tmp_path: Path) -> None:
    process = job(tmp_path, NEVER)
    wait_for(process, *(tmp_path / f"began.{rank}" for rank in range(TASKS)))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, process.communicate()
    assert (tmp_path / "cancelled").read_text().split() == ["--signal=TERM", "41234"]
    assert (tmp_path / "requeued").read_text().strip() == "41234"


def wait_for(process: subprocess.Popen[str], *paths: Path) -> None:
    end = time.monotonic() + 120
    while not all(path.exists() for path in paths):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_trains_stops_and_resumes(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"{i} times {j} is {i * j}" for i in range(60) for j in range(60)))
    words = "--device cpu --model.n-layers 1 --model.n-heads 2 --model.width 32 --vocab-size 300 --block-size 32"
    words += " --micro-batch 2 --batch-tokens 128 --save-every 5 --eval-batches 1 --sample-tokens 3 --data text.txt"
    for steps in (100000, 0):
        (tmp_path / "tasks").unlink(missing_ok=True)
        newest = max((int(p.name[5:]) for p in tmp_path.glob("a b/step_*")), default=0)
        train = f'OMP_NUM_THREADS=1 exec {sys.executable} -m fastgpt.cli "$@" {words} --max-steps {steps or newest + 5}'
        process = job(tmp_path, train)
        if steps:
            wait_for(process, tmp_path / "a b" / "step_00000010")
            process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert ("to resume: " in said) == bool(steps) and (f"resumed at step {newest}" in said) != bool(steps)
