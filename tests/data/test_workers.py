import logging
import multiprocessing.context
from pathlib import Path

import pytest
from data.worker_tasks import die, die_later_once, die_once, divide

from fastgpt.core.errors import UserError
from fastgpt.data.pipeline.workers import Workers


def test_the_part_of_a_killed_worker_is_done_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Workers(2, show=False) as workers, caplog.at_level(logging.WARNING, "fastgpt"):
        assert workers.run("clean", die_once, [(tmp_path, i) for i in range(5)], [1] * 5) == [0, 1, 4, 9, 16]
    assert "clean: a worker was killed; its parts are done again" in caplog.messages


def test_workers_that_die_again_and_again_are_one_sentence() -> None:
    with Workers(2, show=False) as workers, pytest.raises(UserError, match="workers were killed 3 times"):
        workers.run("clean", die, [1, 2], [1, 1])


def test_a_worker_may_be_killed_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt.data.pipeline.workers.DEATHS", 100)
    with Workers(2, show=False) as workers:
        for stage in ("clean", "tokenize"):  # one that dies when a stage has ended leaves the next one alone
            (tmp_path / stage).mkdir()
            found = workers.run(stage, die_later_once, [(tmp_path / stage, i) for i in range(12)], [1] * 24)
            assert found == [bytes([i]) * 4_000_000 for i in range(12)]


def test_a_worker_killed_before_it_has_begun_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = multiprocessing.context.ForkServerProcess.start, []

    def start_and_kill(process: multiprocessing.context.ForkServerProcess) -> None:
        start(process)
        started.append(process)
        if len(started) < 3:
            process.kill()

    monkeypatch.setattr(multiprocessing.context.ForkServerProcess, "start", start_and_kill)
    with Workers(2, show=False) as workers:
        assert workers.run("clean", abs, [-1, -2, -3], [1] * 3) == [1, 2, 3]
    assert len(started) >= 3  # 4, unless the third has done everything before the death of the second was noticed


def test_an_error_in_a_worker_brings_its_traceback() -> None:
    with Workers(2, show=False) as workers, pytest.raises(ZeroDivisionError) as caught:
        workers.run("clean", divide, [1, 0], [1, 1])
    assert "in divide" in str(caught.value.__cause__)
