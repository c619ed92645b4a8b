"""Set-up for every test: Triton's interpreter and the emulation of CUDA where there is no GPU, an empty cache
folder, a time limit, and a count of the skips."""

import importlib.util
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import draws
import processes
import pytest
import torch


def _patch_triton_once() -> None:
    """Make Triton's interpreter a third faster. It searches triton.language for functions to replace at every call
    of a device function, though the kernel's launch has already replaced them: skip the search if it would find
    nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    search, scope = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if search is None or scope is None:  # another version of Triton: slower but still correct
        return

    def patch_lang(fn: Any) -> Any:
        languages = [m for m in (tl, tl.core) if any(value is m for value in fn.__globals__.values())]
        done = languages and not any(tl.core.is_builtin(m.load) for m in (tl, *languages))
        return scope() if done else search(fn)

    interpreter._patch_lang = patch_lang


def _refuse_integer_masks() -> None:
    """Make older Triton interpreters refuse masks of integers, as Triton 3.9's does."""
    from triton.runtime.interpreter import InterpreterBuilder

    def with_check(method: Callable[..., Any], place: int) -> Callable[..., Any]:
        def checked(*arguments: Any) -> Any:
            if arguments[place].data.dtype != bool:
                raise ValueError(f"mask has unsupported dtype {arguments[place].data.dtype}")
            return method(*arguments)

        return checked

    for name, place in (("create_masked_load", 2), ("create_masked_store", 3)):
        setattr(InterpreterBuilder, name, with_check(getattr(InterpreterBuilder, name), place))


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
    if "FASTGPT_EMULATED_CUDA" not in os.environ and shutil.which("g++") and importlib.util.find_spec("pybind11"):
        import emulator

        os.environ["FASTGPT_EMULATED_CUDA"] = str(emulator.build())  # before anything imports fastgpt

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    _patch_triton_once()
    _refuse_integer_masks()

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are random and small; no test contacts a hub
_users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("MPLCONFIGDIR", str(_users / "matplotlib"))  # rebuilding its list of fonts takes seconds
_cache = tempfile.TemporaryDirectory(prefix="fastgpt-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name  # a developer's own `fastgpt tune` must not change a result


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="which values the numeric tests draw")
    parser.addoption("--every", type=int, default=1, help="of the cases of parity take every n-th, from --seed on")


def pytest_configure(config: pytest.Config) -> None:
    draws.seed = config.getoption("--seed")


@pytest.hookimpl(tryfirst=True)  # before pytest reads the markers for -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("extended"):
            item.add_marker("slow")
    every, seed = config.getoption("--every"), config.getoption("--seed")
    cases = [item for item in items if item.name.startswith("test_parity[")]
    left_out = {id(item) for i, item in enumerate(cases) if i % every != seed % every}
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
        items[:] = [item for item in items if id(item) not in left_out]
    # tests of a minute or two begin first, else one worker runs them at the end while the others have nothing to do
    items.sort(key=lambda item: not item.name.startswith("test_fastgpt_commands["))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Return the seed of the values that a numeric test draws; 0 unless pytest was called with --seed."""
    return int(request.config.getoption("--seed"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test that hangs fail a minute before `faulthandler_timeout`, which ends the whole process, and end what it
    started. The signal does not reach a test that hangs outside Python; faulthandler does."""
    limit = float(item.config.getini("faulthandler_timeout") or 0) - 60
    in_main = threading.current_thread() is threading.main_thread()
    if limit <= 0 or not in_main or item.config.getoption("usepdb") or not hasattr(signal, "setitimer"):
        return (yield)

    def stop(*_: object) -> None:
        for pid in processes.descendants(os.getpid()):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        pytest.fail(f"{item.nodeid} has not ended after {limit:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit, 30)  # again: what tears the test down may hang too
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count skips by reason (a missing capability), so a skipped test is never silent."""
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"skipped {count}: {reason.removeprefix('Skipped: ')}")
