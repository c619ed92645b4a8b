import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from data.recipes import settings, shards, text, write_recipe
from data.test_build_killed import command, expected
from processes import command_line, descendants, outlive

from fastgpt.core.errors import UserError
from fastgpt.data.pipeline import engine_dask, gather, stages
from fastgpt.data.pipeline.command import build_main
from fastgpt.data.pipeline.engine_dask import LOOPBACK, DaskEngine
from fastgpt.data.pipeline.stages import build
from fastgpt.data.recipe import Recipe
from fastgpt.data.recipe_file import load_recipe

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """A cluster of two workers; yields the scheduler's address."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=LOOPBACK, memory_limit=0, silence_logs=logging.CRITICAL
    ) as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Return the recipe of a source of 20 files, in several parts and chunks."""
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text(i, 200), encoding="utf-8")
    real = gather._units
    monkeypatch.setattr(gather, "_units", lambda source, parts, size: real(source, parts, 4000))
    monkeypatch.setattr(stages, "CHUNK", 2000)
    return load_recipe(
        write_recipe(tmp_path, settings(tmp_path, sources={"texts": {"path": str(tmp_path / "texts")}}, dedup=True))
    )


def test_a_cluster_gives_the_same_bytes(texts: Recipe, scheduler: str, tmp_path: Path) -> None:
    build(texts, tmp_path / "one", show=False)
    out = tmp_path / "out"
    build(texts, out, show=False, keep=True, engine=DaskEngine(out / "work", scheduler, show=False))
    assert len(list((out / "work" / "clean").iterdir())) > 5
    assert shards(out) == shards(tmp_path / "one") and not list((out / "work").glob(".dask-*"))


def test_another_folder_than_the_workers(
    texts: Recipe, scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build(texts, "out", show=False, engine=DaskEngine(Path("out/work"), scheduler, show=False))
    assert (tmp_path / "out" / "manifest.json").is_file()


def square(i: int) -> int:
    return i * i


def test_more_tasks_than_the_scheduler_holds(scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_dask, "WAITING", 2)
    with DaskEngine(tmp_path, scheduler, show=False) as engine:
        assert engine.run("clean", square, range(9), [1] * 9) == [i * i for i in range(9)]
        assert engine.run("clean", square, [], []) == []


def refuse(i: int) -> int:
    raise UserError(f"{i} is wrong")


def test_the_error_of_a_task_is_that_of_the_build(scheduler: str, tmp_path: Path) -> None:
    with DaskEngine(tmp_path, scheduler, show=False) as engine, pytest.raises(UserError, match="^7 is wrong$"):
        engine.run("clean", refuse, [7, 7, 7], [1] * 3)


def die_once(task: tuple[Path, int]) -> int:
    folder, i = task
    if i == 2 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return i * i


def die(task: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_the_part_of_a_killed_worker_is_done_again(tmp_path: Path) -> None:
    with DaskEngine(tmp_path, count=2, show=False) as engine:
        assert engine.run("clean", die_once, [(tmp_path, i) for i in range(5)], [1] * 5) == [0, 1, 4, 9, 16]
        assert (tmp_path / "died").exists()
        with pytest.raises(UserError, match="clean: workers were killed again and again at the same part"):
            engine.run("clean", die, [1], [1])


def test_another_version_is_one_sentence(scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_dask, "__version__", "0.0")
    with DaskEngine(tmp_path, scheduler, show=False) as engine:
        with pytest.raises(UserError, match=r"^worker tcp://\S+ has fastgpt \S+, expected 0\.0, as here$"):
            engine.run("clean", square, [1], [1])
        monkeypatch.setattr(engine, "_check_workers", engine._mark.touch)  # a worker that joins after the check
        with pytest.raises(UserError, match=r"^worker tcp://\S+ has fastgpt \S+, expected 0\.0, as here$"):
            engine.run("clean", square, [1], [1])


def test_a_worker_without_fastgpt_is_one_sentence() -> None:
    with pytest.raises(UserError, match="^worker tcp://a:1 has no fastgpt, expected 1.0, as here$"):
        engine_dask._check("tcp://a:1", None, True, "1.0", Path("work"))


def test_a_folder_that_is_not_shared_is_one_sentence(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DaskEngine(tmp_path, scheduler, show=False) as engine:
        monkeypatch.setattr(Path, "touch", lambda self: None)  # as if on a disk of this machine alone
        with pytest.raises(UserError, match=f"does not see {tmp_path}, expected a folder that all machines share"):
            engine.run("clean", square, [1], [1])
        monkeypatch.setattr(engine, "_check_workers", lambda: None)
        with pytest.raises(UserError, match=f"does not see {tmp_path}, expected a folder that all machines share"):
            engine.run("clean", square, [1], [1])


def test_no_scheduler_and_no_workers_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_dask, "PATIENCE", 0.2)
    (tmp_path / "broken.json").write_text('{"id": 1}')
    (tmp_path / "wrong.json").write_text('{"address": 1}')
    files = [str(tmp_path / name) for name in ("broken.json", "wrong.json")]
    for wrong in ("tcp://127.0.0.1:1", "there", "tcp://there:x", *files):
        with pytest.raises(UserError, match=f"no Dask scheduler answers at {wrong}"), DaskEngine(tmp_path, wrong):
            pass
    with distributed.LocalCluster(
        n_workers=0,
        threads_per_worker=1,
        protocol="tcp",
        processes=False,
        dashboard_address=LOOPBACK,
        silence_logs=logging.CRITICAL,
    ) as cluster:
        file = tmp_path / "scheduler.json"
        file.write_text(json.dumps(cluster.scheduler.identity()))
        monkeypatch.setattr(engine_dask, "PATIENCE", 60.0)
        with DaskEngine(tmp_path, str(file), show=False) as engine:
            monkeypatch.setattr(engine_dask, "PATIENCE", 0.2)
            with pytest.raises(UserError, match="has no workers, expected some: dask worker"):
                engine.run("clean", square, [1], [1])
            monkeypatch.setattr(engine_dask, "POLL", 0.1)
            monkeypatch.setattr(engine, "_check_workers", lambda: None)  # all leave after the check
            with pytest.raises(UserError, match="clean: the cluster has no workers any more"):
                engine.run("clean", square, [1], [1])


def test_workers_of_several_threads_are_refused(tmp_path: Path) -> None:
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=2,
        protocol="tcp",
        processes=False,
        dashboard_address=LOOPBACK,
        silence_logs=logging.CRITICAL,
    ) as cluster:
        with DaskEngine(tmp_path, cluster.scheduler_address, show=False) as engine:
            with pytest.raises(UserError, match="has 2 threads, expected 1: start it with --nthreads 1"):
                engine.run("clean", square, [1], [1])


def test_without_dask_it_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"needs Dask, which is not installed: pip install 'fastgpt\[dask\]'"):
        DaskEngine(tmp_path).__enter__()


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--scheduler", "tcp://a:1"], "give --engine dask"),
        (["--engine", "dask", "--scheduler", "tcp://a:1", "--workers", "2"], "give one"),
    ],
)
def test_options_that_exclude_each_other(options: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=expected):
        build_main([str(write_recipe(tmp_path, settings(tmp_path))), *options])


@pytest.mark.slow
def test_a_wrong_address_does_not_hang(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, settings(tmp_path))
    run = [sys.executable, "-m", "fastgpt.cli", "data", "build", str(path), "--out", str(tmp_path / "out")]
    run += ["--engine", "dask", "--scheduler", "tcp://127.0.0.1:1x"]
    done = subprocess.run(run, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.extended
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_interrupted_build_and_a_killed_worker_lose_nothing(tmp_path: Path) -> None:
    whole = expected(tmp_path)
    out = tmp_path / "out"
    run = command(tmp_path, out, "--engine", "dask", "--workers", "2")
    for _ in range(5):
        process, workers = at_stage(run, out, "clean", lambda process, _: process.send_signal(signal.SIGINT))
        _, said = process.communicate(timeout=60)
        assert not outlive(workers)
        if process.returncode != 0:
            break
        shutil.rmtree(out)  # on a busy machine the signal may come when everything is done
    assert process.returncode == 130 and "Traceback" not in said, said
    process, _ = at_stage(run, out, "tokens", lambda _, workers: os.kill(workers[0], signal.SIGKILL))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in said, said
    assert shards(out) == whole


def heed_interrupts() -> None:
    """Heed SIGINT in a child, which a shell without a terminal lets its background jobs ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def at_stage(
    run: list[str], out: Path, stage: str, act: Callable[["subprocess.Popen[str]", list[int]], None]
) -> tuple["subprocess.Popen[str]", list[int]]:
    """Start a build and act on it and its workers once it has finished a part of a stage, while it still runs. On a
    busy machine it may end unseen; then it starts anew."""
    for _ in range(5):
        process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)
        while process.poll() is None and not list((out / "work").glob(f"{stage}/[!.]*")):
            time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)  # so that it cannot end in between
        workers = [p for p in descendants(process.pid) if "spawn_main" in command_line(p)]
        if process.poll() is None and workers and (out / "work").is_dir():
            act(process, workers)
            process.send_signal(signal.SIGCONT)
            return process, workers
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=60) and process.returncode == 0
        shutil.rmtree(out)
    pytest.fail(f"no build was seen at its stage {stage}")
