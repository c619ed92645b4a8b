"""The scripts in examples/ run and show what their docstrings claim."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastgpt.core import backend

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import the script of the test's parameter as a module, in an empty folder; remove afterwards what it
    registered."""
    monkeypatch.chdir(tmp_path)
    before = set(backend.ops())
    spec = importlib.util.spec_from_file_location(request.param, EXAMPLES / f"{request.param}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for op in set(backend.ops()) - before:
        del backend.ops()[op]


def shows(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("example", [name], indirect=True)


@shows("patch_huggingface")
def test_patch_huggingface(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    losses = example.main()
    assert losses[-1] < losses[0] - 0.5
    assert "fastgpt.ops.linear_cross_entropy" in capsys.readouterr().out


@shows("ops_in_a_model")
def test_ops_in_a_model(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    losses = example.main()
    assert losses[-1] < losses[0] - 0.5
    said = capsys.readouterr().out.split()
    assert abs(float(said[-4].rstrip(",")) - float(said[-1])) < 1e-3


@shows("add_an_op")
def test_add_an_op(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 < example.main() <= 1
    kernel = "triton" if backend.interpreting() or torch.cuda.is_available() else "torch"
    assert f"layer_scale on {kernel}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"layer_scale: got x \(2, 4\), branch \(2, 4\), scale \(3,\), expected"):
        example.layer_scale(torch.ones(2, 4), torch.ones(2, 4), torch.ones(3))
    x = torch.randn(4, 8)
    torch.library.opcheck(example.layer_scale_raw, (x, x, torch.ones(8)), test_utils=("test_schema", "test_faketensor"))


@shows("custom_evaluation")
def test_custom_evaluation(example: ModuleType) -> None:
    shares = example.main("run")
    assert len(shares) == 2 and all(0 <= share <= 1 for share in shares)  # at step 6, and at the end


@shows("grpo_arithmetic")
def test_grpo_arithmetic(example: ModuleType) -> None:
    rewards = example.main()
    assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.15


@shows("resume")
def test_resume(example: ModuleType) -> None:
    whole, parts = example.main("run")
    assert len(whole) == 12 and whole == parts


@shows("classify_order")
@pytest.mark.extended
def test_classify_order(example: ModuleType) -> None:
    """20 points above chance, above the base with its new head, and above a bag of words, for each of 3 seeds."""
    found = example.main("run")
    assert len(found) == 3
    for accuracy in found:
        others = ("bag of words", "base, untrained head", "frozen base, trained head")
        assert accuracy["fine-tuned"] > 0.5 + 0.2, accuracy
        assert accuracy["fine-tuned"] > max(accuracy[name] for name in others) + 0.05, accuracy


def test_every_example_is_tested_and_listed() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    page, tests = (EXAMPLES / "README.md").read_text(encoding="utf-8"), Path(__file__).read_text(encoding="utf-8")
    for script in scripts:
        assert f"({script.name})" in page and f'@shows("{script.stem}")' in tests
        assert "Shows" in (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "")
