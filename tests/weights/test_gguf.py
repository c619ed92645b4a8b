"""GGUF files, read back with gguf's own reader and by transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import LLAMA3, distance, ids, logits

from fastgpt.convert import exporting
from fastgpt.core.errors import UserError
from fastgpt.data import Tokenizer, train_tokenizer
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.models.weights import gguf as ours
from fastgpt.training import checkpoint

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

LLAMA: dict[str, Any] = dict(norm="rms", activation="swiglu", positions="rope", tied=False, n_kv_heads=2)
LLAMA |= dict(qkv_bias=False, proj_bias=False, mlp_bias=False)
MODELS: dict[str, dict[str, Any]] = {
    # transformers builds GPT-2 with no other context and MLP, and Qwen3 with no other head, from a GGUF
    "gpt2": dict(block_size=1024, mlp_width=128),
    "llama": LLAMA | dict(rope_theta=500.0),
    "qwen2": LLAMA | dict(qkv_bias=True, tied=True),
    "qwen3": LLAMA | dict(qk_norm=True, head_dim=128),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat " * 20], 270)


def model_of(name: str, tokenizer: Tokenizer, **options: Any) -> GPT:
    sizes = dict(n_layers=2, n_heads=4, width=32, mlp_width=64, vocab_size=tokenizer.n_vocab + 3, block_size=32)
    model = GPT(ModelConfig(**{**sizes, **MODELS[name], **options}), generator=torch.Generator().manual_seed(4)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def write(model: GPT, folder: Path, kind: str, tokenizer: Tokenizer) -> Any:
    """Write a model and return gguf's reader of the file."""
    named = dict(model.named_parameters())
    ours.write(folder, model.config, lambda name: named[name].detach(), kind, tokenizer.text, tokenizer.eot)
    return gguf.GGUFReader(folder / "model.gguf")


@pytest.mark.parametrize("bos", [None, 3])
def test_a_bos_is_in_the_file(bos: int | None, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = model_of("gpt2", tokenizer)
    named = dict(model.named_parameters())
    ours.write(tmp_path, model.config, lambda name: named[name].detach(), "fp16", tokenizer.text, tokenizer.eot, bos)
    fields = {n: f.contents() for n, f in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["tokenizer.ggml.add_bos_token"] is (bos is not None)
    assert fields["tokenizer.ggml.bos_token_id"] == (tokenizer.eot if bos is None else bos)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_from_the_file(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = model_of(name, tokenizer)
    write(model, tmp_path, "fp32", tokenizer)
    options: dict[str, Any] = dict(gguf_file="model.gguf", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    assert theirs.config.model_type == name
    assert distance(logits(theirs, ids()), logits(model, ids())) < 1e-5


@pytest.mark.parametrize("kind", ours.TYPES)
def test_tensors_read_back_within_their_type(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = model_of("qwen2", tokenizer)
    reader = write(model, tmp_path, kind, tokenizer)
    tensors = {t.name: t for t in reader.tensors}
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == ours.TYPES[kind][0]
    assert tensors["blk.0.attn_q.bias"].tensor_type.name == "F32"
    up = model.blocks[0].mlp.up.weight.detach()[64:]
    found = tensors["blk.0.ffn_up.weight"]
    got = torch.tensor(gguf.quants.dequantize(found.data, found.tensor_type))
    # half a unit of the type: of the largest value of 32 for q8_0, of each value for the floats
    unit = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8}
    if kind == "q8_0":
        scale = up.view(64, 1, 32).abs().amax(-1, keepdim=True).expand(64, 1, 32).reshape(64, 32)
        bound = scale / 127 * (0.5 + 0.1)  # the scale is itself fp16
    else:
        bound = up.abs() * unit[kind]
    assert bool(((got - up).abs() <= bound).all())


def test_the_tokenizer_is_in_the_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    reader = write(
        model_of("llama", tokenizer, rope_scaling=LLAMA3 | {"original_max_position_embeddings": 64}),
        tmp_path,
        "q8_0",
        tokenizer,
    )
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == tokenizer.n_vocab + 3 and tokens[tokenizer.eot] == "<|endoftext|>"
    assert kinds[tokenizer.eot] == ours.CONTROL and kinds[-3:] == [ours.UNUSED] * 3
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eot
    assert fields["llama.context_length"] == 32 and fields["llama.attention.head_count_kv"] == 2
    freqs = next(t for t in reader.tensors if t.name == "rope_freqs.weight").data
    assert freqs[0] == 1.0 and freqs[-1] == pytest.approx(4.0)


def test_a_run_goes_out_as_gguf(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = model_of("llama", tokenizer)
    state = {"progress": {}, "model": dataclasses.asdict(model.config), "tokenizer": tokenizer.fingerprint}
    checkpoint.save(tmp_path / "run", 1, model.state_dict(), {}, {**state, "config": {}, "loader": {}}, keep=0)
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    exporting.main([str(tmp_path / "run"), "--format", "gguf", "--dtype", "q8_0", "--out", str(tmp_path / "out")])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"README.md", "model.gguf"}
    with pytest.raises(UserError, match="--dtype q8_0 needs --format gguf"):
        exporting.main([str(tmp_path / "run"), "--dtype", "q8_0", "--out", str(tmp_path / "no")])


@pytest.mark.parametrize("options", [dict(window=8), dict(activation="geglu"), dict(parallel="shared")])
def test_what_llama_cpp_does_not_host_is_refused(options: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gguf does not host this model, expected one of gpt2, llama"):
        write(model_of("llama", tokenizer, **options), tmp_path, "fp32", tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    """llama.cpp: "cannot find tokenizer merges in model file"."""
    bytes_only = train_tokenizer(["text"], 257)
    with pytest.raises(UserError, match="the tokenizer has no merges"):
        write(model_of("gpt2", bytes_only), tmp_path, "fp32", bytes_only)
    assert not list(tmp_path.iterdir())
