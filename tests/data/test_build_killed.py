import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from data.recipes import built, settings, shards, write_recipe, write_source
from processes import descendants, outlive, parents

from fastgpt.core.errors import UserError
from fastgpt.data.built import MANIFEST, open_built

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

DOCUMENTS = {"big": 1000, "small": 200}


def command(folder: Path, out: Path, *options: str) -> list[str]:
    plain = settings(folder, shards={"tokens": 30_000}, dedup=True)
    for name, n in DOCUMENTS.items():
        write_source(folder, name, n)
        lines = Path(plain["sources"][name]["path"]).read_text(encoding="utf-8").splitlines(keepends=True)
        pieces = folder / name
        pieces.mkdir(exist_ok=True)
        for i in range(0, n, 50):
            (pieces / f"{i:04}.jsonl").write_text("".join(lines[i : i + 50]), encoding="utf-8")
        plain["sources"][name]["path"] = str(pieces)
    plain["sources"]["big"]["fill_in_the_middle"] = True
    path = write_recipe(folder, plain)
    return [sys.executable, "-m", "fastgpt.cli", "data", "build", str(path), "--out", str(out), *options]


def expected(folder: Path) -> dict[str, bytes]:
    (folder / "whole").mkdir()
    subprocess.run(command(folder / "whole", folder / "whole" / "out", "--workers", "1"), check=True)
    return shards(folder / "whole" / "out")


@pytest.mark.parametrize("what", [pytest.param("build", marks=pytest.mark.extended), "worker"])
def test_killed_at_any_moment_it_ends_in_the_same_shards(what: str, tmp_path: Path) -> None:
    whole = expected(tmp_path)
    out = tmp_path / "out"
    run = command(tmp_path, out, "--workers", "2")
    killed = 0
    for delay in (1.5, 2.0, 2.3, 2.6, 2.9, 3.3, 3.8, 300.0):
        process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True)
        if what == "worker":
            killed += kill_a_worker(process)
            said = process.communicate(timeout=300)[1]
            assert process.returncode == 0, said
            break
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            workers = descendants(process.pid)
            process.kill()
            process.wait()
            killed += 1
            assert not outlive(workers)
            if (out / MANIFEST).is_file():  # killed after the manifest, which makes it whole, and before the page
                assert shards(out) == whole
            else:
                with pytest.raises(UserError, match="does not exist|is not complete|has no manifest"):
                    open_built(out)
        if process.returncode == 0:
            break
    assert process.returncode == 0 and killed and shards(out) == whole
    assert {p.name for p in out.iterdir()} == {*open_built(out).manifest["files"], "manifest.json", "report.html"}


def kill_a_worker(process: "subprocess.Popen[str]") -> int:
    """Kill one process below the build's that has begun to work; return how many were killed."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        below, children = parents(), descendants(process.pid)
        for worker in children:
            if below.get(worker, process.pid) != process.pid:  # below the fork server
                with suppress(ProcessLookupError):  # it may have ended since
                    os.kill(worker, signal.SIGKILL)
                    return 1
        time.sleep(0.01)
    return 0


def small_files() -> None:
    """Let writes beyond 40 kB of a file fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def test_a_full_disk_ends_in_one_sentence(tmp_path: Path) -> None:
    whole = expected(tmp_path)
    out = tmp_path / "out"
    for workers in ("1", "2"):
        run = command(tmp_path, out, "--workers", workers)
        done = subprocess.run(run, stderr=subprocess.PIPE, text=True, preexec_fn=small_files)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "cannot write" in done.stderr and "File too large" in done.stderr
    subprocess.run(run, check=True)
    assert shards(out) == whole


@pytest.mark.extended
def test_many_workers_give_the_same_bytes(tmp_path: Path) -> None:
    whole = expected(tmp_path)
    built(tmp_path, tmp_path / "other")  # another recipe, whose results must not be mixed in
    subprocess.run(command(tmp_path, tmp_path / "out", "--workers", "5", "--keep"), check=True)
    assert shards(tmp_path / "out") == whole
