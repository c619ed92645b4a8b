"""Every family round-trips: the same logits in transformers and in fastgpt, read and written, in fp32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import CASES, distance, ids, logits, make

from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.models.weights import load_pretrained, save_pretrained
from fastgpt.models.weights.family import settled

transformers = pytest.importorskip("transformers")
LIMIT = 1e-5  # of the logits' scale


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_transformers_comes_in_and_goes_out(name: str, tmp_path: Path) -> None:
    theirs = make(name)
    theirs.save_pretrained(tmp_path / "in")
    ours = load_pretrained(tmp_path / "in")
    expected = logits(theirs, ids())
    assert distance(logits(ours, ids()), expected) < LIMIT
    save_pretrained(ours, tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(back) is type(theirs) or name == "mistral without window"
    assert next(back.parameters()).dtype == torch.float32
    assert distance(logits(back, ids()), expected) < LIMIT
    sent = dict(theirs.state_dict())
    assert all(torch.equal(p, sent[key]) for key, p in back.state_dict().items()), "a weight has changed"
    assert getattr(transformers, json.loads((tmp_path / "out" / "config.json").read_text())["architectures"][0])
    again = load_pretrained(tmp_path / "out")
    assert settled(again.config) == settled(ours.config)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    if ours.config.positions == "rope" and "rope_parameters" in config:  # GPT-J has no base to choose
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == ours.config.rope_theta
        assert (config["rope_scaling"] or {"type": "default"})["type"] == config["rope_parameters"]["rope_type"]


def test_gemmas_embedding_is_scaled_as_bf16_rounds_it(tmp_path: Path) -> None:
    theirs = make("gemma").bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert ours.wte.weight.dtype == torch.bfloat16
    assert torch.equal(ours._tokens(ids()), theirs.model.embed_tokens(ids()))
    config = json.loads((tmp_path / "config.json").read_text())
    for act in ("gelu", None):  # the first releases say so, and mean tanh's
        (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": act}))
        assert load_pretrained(tmp_path).config.activation == "geglu_tanh"


@pytest.mark.parametrize("length", [12, 17, 31])
def test_dynamic_scaling_follows_the_length_past_the_context(length: int, tmp_path: Path) -> None:
    make("llama dynamic").save_pretrained(tmp_path / "in")
    ours = load_pretrained(tmp_path / "in")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32)
    for n in (length, 8, length):  # their tables keep a state; ours depend on the sequence alone
        assert distance(logits(ours, ids(n)), logits(theirs, ids(n))) < LIMIT


def test_both_styles_of_rope_settings_are_read_and_the_new_one_wins(tmp_path: Path) -> None:
    make("llama linear").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    new = config.pop("rope_parameters")
    olds: list[dict[str, Any]] = [
        {"rope_theta": new["rope_theta"], "rope_scaling": {"type": "linear", "factor": new["factor"]}},
        {"rope_parameters": new, "rope_theta": 7.0},
    ]
    for old in olds:
        (tmp_path / "config.json").write_text(json.dumps(config | old))
        c = load_pretrained(tmp_path).config
        assert (c.rope_theta, c.rope_scaling) == (500.0, {"rope_type": "linear", "factor": 4.0})


def test_a_model_with_adjacent_pairs_goes_out_as_a_llama(tmp_path: Path) -> None:
    c = ModelConfig(n_layers=2, n_heads=4, n_kv_heads=2, width=32, vocab_size=97, block_size=32, norm="rms", tied=False)
    options = dict(positions="rope", rope_interleaved=True, activation="swiglu", qk_norm=True)
    biases = dict(qkv_bias=False, proj_bias=False, mlp_bias=False)
    ours = GPT(dataclasses.replace(c, **options, **biases), generator=torch.Generator().manual_seed(1)).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    save_pretrained(ours, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    assert distance(logits(theirs, ids()), logits(ours, ids())) < LIMIT


def test_a_model_that_no_family_has_names_what_differs(tmp_path: Path) -> None:
    c = ModelConfig(n_layers=1, n_heads=2, width=8, vocab_size=9, block_size=8, norm_placement="post")
    with pytest.raises(UserError, match="nearest, gpt2, differs in model.norm_placement 'post'"):
        save_pretrained(GPT(c), tmp_path / "out")
    assert not list(tmp_path.iterdir())
