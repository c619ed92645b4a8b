"""Every configuration of the Triton kernels compiles for sm_80 and sm_90 without spilling, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def _check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "fastgpt.triton_check", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)


def test_every_configuration_compiles_without_spills(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = _check("--json", str(out))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    reports = json.loads(out.read_text())
    assert {r["arch"] for r in reports} == {80, 90}
    kernels = ("layer_norm_fwd", "layer_norm_bwd", "cross_entropy_fwd_bwd", "adamw_prepare", "adamw_update")
    for kernel in (*kernels, "rms_norm_fwd", "rms_norm_bwd"):
        assert any(r["name"].startswith(f"{kernel}_kernel[") for r in reports), f"{kernel} was not checked"
    assert all(r["registers"] > 0 for r in reports)


def test_interpreter_is_refused() -> None:
    done = _check(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def test_problems_are_found() -> None:
    from fastgpt.triton_check import Report, problem

    assert problem(Report("k[x] bfloat16", 90, 4, registers=64, stack=0, shared=1024)) == ""
    assert "8 bytes of stack" in problem(Report("k[x] bfloat16", 90, 4, registers=64, stack=8))
    assert "99 KB" in problem(Report("k[x] bfloat16", 89, 4, registers=64, shared=100 * 1024))
    assert problem(Report("k[x] bfloat16", 90, 4, error="PTXASError: no")) == "PTXASError: no"
