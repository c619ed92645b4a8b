"""Set-up for every test: Triton's interpreter and the emulation of CUDA where no GPU is, an empty cache folder, a count
of the skips."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
    if "FASTGPT_EMULATED_CUDA" not in os.environ and shutil.which("g++") and importlib.util.find_spec("pybind11"):
        import emulator

        os.environ["FASTGPT_EMULATED_CUDA"] = str(emulator.build())  # before anything imports fastgpt

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are random and small; no test asks a hub
_users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("MPLCONFIGDIR", str(_users / "matplotlib"))  # its list of fonts takes seconds to make anew
_cache = tempfile.TemporaryDirectory(prefix="fastgpt-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name  # what a developer's own `fastgpt tune` measured must not change a result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Skips are by capability: count them by reason, so that a skipped test is never silent."""
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"skipped {count}: {reason.removeprefix('Skipped: ')}")
