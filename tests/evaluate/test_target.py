"""What can be evaluated, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.convert import exporting
from fastgpt.core.errors import UserError
from fastgpt.data import Tokenizer, train_tokenizer
from fastgpt.evaluate.target import open_target
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.training import checkpoint

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = train_tokenizer(["the cat sat on the mat. "] * 9, 280)
    made.companions = {"chat_template.jinja": TEMPLATE}
    return made


def save(folder: Path, words: Tokenizer, step: int = 5, value: float | None = None, **state: Any) -> GPT:
    """Write a checkpoint and a tokenizer; `value` replaces a weight."""
    c = ModelConfig(n_layers=1, n_heads=2, width=16, vocab_size=words.n_vocab, block_size=16)
    model = GPT(c, generator=torch.Generator().manual_seed(step))
    if value is not None:
        model.wte.weight.data[0, 0] = value
    about = {"progress": {"tokens": 640}, "model": dataclasses.asdict(c), "tokenizer": words.fingerprint}
    checkpoint.save(folder, step, model.state_dict(), {}, {**about, "config": {}, "loader": {}, **state}, keep=0)
    words.save(folder / "tokenizer.json")
    return model


def test_runs_checkpoints_and_exports_open(tokenizer: Tokenizer, tmp_path: Path) -> None:
    n, model = tokenizer.n_vocab, (save(tmp_path / "run", tokenizer, 3), save(tmp_path / "run", tokenizer, 5))
    assert exporting.main([str(tmp_path / "run"), "--out", str(tmp_path / "hf")]) == 0
    run, old, hf = (open_target(str(tmp_path / name), device="cpu") for name in ("run", "run/step_00000003", "hf"))
    for target, right in ((run, model[1]), (old, model[0]), (hf, model[1])):
        assert torch.equal(target.model.wte.weight[:n], right.wte.weight[:n]) and not target.model.training
        assert target.tokenizer.fingerprint == tokenizer.fingerprint
        assert target.chat is not None and target.chat.render([{"role": "user", "content": "x"}]) == "x"
    assert (run.about["step"], run.about["tokens"], run.folder.name) == (5, 640, "step_00000005")
    assert (old.about["step"], hf.about["step"], hf.about["tokens"]) == (3, None, None)
    assert run.about["fingerprint"] == open_target(run.name, device="cpu").about["fingerprint"]
    assert run.about["fingerprint"] != old.about["fingerprint"]
    assert open_target(run.name, device="cpu", dtype="bf16").model.wte.weight.dtype == torch.bfloat16


def test_a_run_with_adapters_is_its_merged_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run, tokenizer, 3, adapters=True, base="base")
    with pytest.raises(UserError, match="step_00000003 holds adapters of base alone, expected a model, as in .*merged"):
        open_target(str(run), device="cpu")
    for step in (5, 7):
        save(run, tokenizer, step, adapters=True, base="base")
    model = save(run / "merged", tokenizer, 5)
    target = open_target(str(run), device="cpu")
    assert torch.equal(target.model.wte.weight, model.wte.weight) and target.about["step"] == 5
    assert open_target(str(run / "step_00000005"), device="cpu").folder == target.folder
    with pytest.raises(UserError, match="step_00000003 holds adapters of base alone, expected a model, as in .*merged"):
        open_target(str(run / "step_00000003"), device="cpu")


@pytest.mark.parametrize(
    "state, value, message",
    [
        ({"head": {"kind": "classification"}}, None, "has a head for classification, expected a language model"),
        ({"tokenizer": None}, None, "has no tokenizer, expected one beside the weights"),
        ({"tokenizer": "another"}, None, "is not the tokenizer that .* was trained with"),
        ({}, float("nan"), r"wte\.weight has values that are not finite"),
    ],
)
def test_models_that_cannot_be_evaluated(
    state: dict[str, Any], value: float | None, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save(tmp_path / "run", tokenizer, value=value, **state)
    with pytest.raises(UserError, match=message):
        open_target(str(tmp_path / "run"), device="cpu")


def test_paths_and_settings_that_are_wrong(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save(tmp_path / "run", tokenizer)
    assert exporting.main([str(tmp_path / "run"), "--out", str(tmp_path / "hf")]) == 0
    with pytest.raises(UserError, match="nowhere is not a folder, expected a run"):
        open_target(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="dtype is 'int8', expected one of fp32, bf16, fp16"):
        open_target(str(tmp_path / "run"), dtype="int8")
    other = shutil.copytree(tmp_path / "hf", tmp_path / "other")
    train_tokenizer(["a dog ran on and on"] * 9, 290, specials=[f"<{i}>" for i in range(12)]).save(
        other / "tokenizer.json"
    )
    with pytest.raises(UserError, match="ids and the model 269, expected the tokenizer of the model"):
        open_target(str(other))
    for file in (tmp_path / "hf").glob("*"):
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            file.unlink()
    with pytest.raises(UserError, match="hf has no tokenizer, expected one beside the weights"):
        open_target(str(tmp_path / "hf"))
