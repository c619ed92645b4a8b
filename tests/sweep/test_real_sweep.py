"""Sweeps whose runs are real: killed with their runs, and as docs/sweeps.md types them."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import yaml

from fastgpt import cli, train
from fastgpt.core.backend import use
from fastgpt.sweep.command import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
SMALL = {
    "model": {"n_layers": 1, "n_heads": 2, "width": 32},
    "block_size": 32, "micro_batch": 4, "batch_tokens": 256, "vocab_size": 300, "max_steps": 20, "lr": 3e-3,
    "warmup_steps": 2, "eval_every": 10, "eval_batches": 1, "save_every": 20, "sample_tokens": 4, "device": "cpu",
    "log_every": 50,
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a folder with a text and a small configuration, `fastgpt` on one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copy(Path(train.__file__), "my.txt")
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    with use():
        yield tmp_path


def results(out: Path) -> list[dict[str, Any]]:
    """Return the rows without what a clock measured, and without reasons, which name folders."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in ("seconds", "tokens_per_second", "reason")} for row in rows]


@pytest.mark.extended
def test_a_killed_sweep_takes_its_runs_along_and_continues() -> None:
    Path("sweep.yaml").write_text(
        "config: small.yaml\noptions: {data: my.txt, max-steps: 400}\nsampler: grid\nparallel: 2\n"
        "variants: {base: {}, low: {lr: 1e-4}, wild: {lr: 1e12, max-steps: 20}}\n"
    )
    process = subprocess.Popen([sys.executable, "-m", "fastgpt.cli", "sweep", "sweep.yaml", "--out", "killed"])
    runs = [Path("killed", name, "seed-1") for name in ("base", "low")]
    deadline = time.monotonic() + 120
    while not all(list(run.glob("step_*")) for run in runs):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it was killed"
        time.sleep(0.01)
    children = processes.descendants(process.pid)
    assert len(children) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not processes.outlive(children)
    assert main(["sweep.yaml", "--out", "killed"]) == 0
    assert main(["sweep.yaml", "--out", "whole"]) == 0
    assert results(Path("killed")) == results(Path("whole"))
    base, low, wild = results(Path("killed"))
    assert (base["status"], base["step"], low["status"], wild["status"]) == ("complete", 400, "complete", "failed")
    assert json.loads(Path("killed/wild/seed-1/result.json").read_text())["reason"].startswith("training: 10 steps in")


def test_the_commands_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    for text in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S):
        name = text.splitlines()[0].removeprefix("# ")
        Path(name).write_text(
            text.replace("tiny", "small.yaml")
            .replace("60", "20")
            .replace("every: 20", "every: 10")
            .replace("trials: 3", "trials: 2")
        )
    for line in "".join(re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)).splitlines():
        program, command, *arguments = shlex.split(line)
        assert program == "fastgpt"
        if "--find-lr" in arguments:
            arguments = ["--config", "small.yaml", *arguments]
        assert cli.COMMANDS[command](arguments) == 0, line
    said = capsys.readouterr().out
    assert "4 of 4: trial-0001, seed 2" in said and Path("runs/small-find-lr/find_lr.json").is_file()
    assert Path("runs/best/step_00000080").is_dir()
    table = Path("mlp.md").read_text()
    assert re.search(r"^\| swiglu \| \d\.\d+ ± \d\.\d+ \| [+-]\d\.\d+ ± \d\.\d+ \|", table, re.M)
    assert_drawn(Path("runs/search/sweep.html"))


LOOK = """<script>addEventListener("load", () => setTimeout(() => {
  const pictures = [...document.images].map((i) => i.naturalWidth);
  const lines = document.querySelectorAll(".plot .line").length;
  document.title = JSON.stringify({pictures, lines});
}, 300));</script></body>"""


def assert_drawn(page: Path) -> None:
    """Open a page in Chromium: its pictures are there, and its charts have lines."""
    browser = shutil.which("chromium")
    if browser is None:
        return
    copy = page.with_name("look.html")
    copy.write_text(page.read_text().replace("</body>", LOOK))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([browser, *options, copy.resolve().as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(\{.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    said = json.loads(html.unescape(title[1]))
    assert len(said["pictures"]) == 3 and all(said["pictures"]) and said["lines"] >= 3
    assert os.stat(page).st_size < 1_000_000
