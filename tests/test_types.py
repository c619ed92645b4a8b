"""The type checker's view: exact types of the public functions, and wrong calls between the parts of fastgpt."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastgpt
from fastgpt import nn, ops, optim

ROOT = Path(fastgpt.__file__).parent.parent
PUBLIC = {f"ops.{name}": getattr(ops, name) for name in ops.__all__ if name != "use"}
PUBLIC |= {f"nn.{name}": getattr(nn, name) for name in nn.__all__ if inspect.isfunction(getattr(nn, name))}
PUBLIC |= {f"nn.{name}.forward": c.forward for name in nn.__all__ if inspect.isclass(c := getattr(nn, name))}
PUBLIC |= {f"optim.{c.__name__}.step": c.step for c in (optim.AdamW, optim.MuonAdamW)}
PUBLIC |= {"patch": fastgpt.patch, "unpatch": fastgpt.unpatch, "patch_report": fastgpt.patch_report}

EXACT = """
from typing_extensions import assert_type

import torch
from torch import Tensor

import fastgpt
from fastgpt import nn, ops, optim

Pair = tuple[Tensor, Tensor]


def uses(x: Tensor, maybe: Tensor | None, lse: bool) -> None:
    assert_type(ops.layer_norm(x), Tensor)
    assert_type(ops.layer_norm(x, x, x, 1e-5, residual=x), Pair)
    assert_type(ops.layer_norm(x, residual=maybe), Tensor | Pair)
    assert_type(ops.rms_norm(x, x), Tensor)
    assert_type(ops.rms_norm(x, residual=x, weight_offset=1.0), Pair)
    assert_type(ops.attention(x, x, x, causal=True), Tensor)
    assert_type(ops.attention(x, x, x, window=8, return_lse=True), Pair)
    assert_type(nn.LayerNorm(8).forward(x), Tensor)
    assert_type(nn.RMSNorm(8).forward(x, x), Pair)
    model = torch.nn.Linear(2, 2)
    assert_type(fastgpt.unpatch(fastgpt.patch(model)), torch.nn.Linear)
    assert_type(optim.AdamW(model.parameters()).step(lambda: 1.0), float | None)
"""
WRONG = {  # file -> lines with one wrong argument each, across a seam
    "fastgpt/checks/cuda.py": "from fastgpt.kernels import rope as _rope\n_rope.tile_meta('64')",
    "bench/tiles.py": 'kernels.attention_fwd("q")',
    "fastgpt/cli.py": "from fastgpt.bench.tune import run as _run\n_run(1)",
    "bench/tune.py": 'backend.select("layer_norm", "x")',
    "fastgpt/exact.py": EXACT + "\nops.layer_norm(1)",
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_return_a_type(name: str) -> None:
    returned = inspect.signature(PUBLIC[name], eval_str=False).return_annotation
    assert returned not in (inspect.Signature.empty, Any, "Any"), name


@pytest.mark.extended
def test_the_type_checker_sees_wrong_arguments_across_the_seams(tmp_path: Path) -> None:
    """In a copy, errors appear in the planted lines and nowhere else."""
    pytest.importorskip("mypy")
    for name in ("fastgpt", "bench", "kernels", "docs", "examples", "setup.py", "pyproject.toml", ".mypy_cache"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("*.so"))
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, tmp_path / name)
    planted = set()
    for name, lines in WRONG.items():
        file = tmp_path / name
        text = file.read_text(encoding="utf-8") if file.exists() else "from __future__ import annotations\n"
        file.write_text(f"{text}\n{lines}\n", encoding="utf-8")
        seen = f"fastgpt/{name}" if name.startswith("bench") else name
        planted.add((seen, file.read_text(encoding="utf-8").count("\n")))
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=tmp_path, capture_output=True, text=True)
    found = {(name, int(line)) for name, line in re.findall(r"^([\w/.]+):(\d+): error: ", done.stdout, re.MULTILINE)}
    assert done.returncode == 1 and found == planted, done.stdout + done.stderr
