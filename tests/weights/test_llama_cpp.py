"""Exported GGUF files in llama.cpp itself: tokens, logits, greedy text. `make test-llama` installs llama-cpp-python.

The truth is the model in fp64 with the weights that the file holds. llama.cpp rounds more than weights: the inputs of
products to the type of the weights (of q8_0: blocks of 32 with 8 bits), GELU in and out to fp16. `Rounded` does the
same to the fp64 model, and its error is the measure: llama.cpp may be three times as far from the truth.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import LLAMA3
from torch import Tensor, nn

from fastgpt.convert import exporting
from fastgpt.data import Tokenizer, train_tokenizer
from fastgpt.inference import Generator, Request
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.nn import Linear
from fastgpt.training import checkpoint

absent = importlib.util.find_spec("llama_cpp") is None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.llama_cpp,
    pytest.mark.skipif(absent, reason="llama-cpp-python is not installed"),
]
gguf = pytest.importorskip("gguf")

LLAMA: dict[str, Any] = dict(norm="rms", activation="swiglu", positions="rope", tied=False, n_kv_heads=2)
LLAMA |= dict(qkv_bias=False, proj_bias=False, mlp_bias=False, rope_theta=500.0)
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": LLAMA,
    "llama linear": LLAMA | dict(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama llama3": LLAMA | dict(rope_scaling=LLAMA3),
    "qwen2": LLAMA | dict(qkv_bias=True, tied=True),
    "qwen3": LLAMA | dict(qk_norm=True, head_dim=32),
}
KINDS = ("fp32", "fp16", "bf16", "q8_0")
TIMES = 3.0

CORPUS = (
    Path(exporting.__file__).read_text(encoding="utf-8") + "The café's naïve 1,234 users aren't here. 你好世界 🙂\n" * 9
)
TEXTS = [
    "The quick brown fox doesn't jump; it's 12345 times lazier than we'll say they've been.",
    "  def f(x):\n\treturn x ** 2  # comment\n\n\n    if x:\r\n        pass   ",
    "naïve café, Ünïcödé, Привет мир, 你好世界, こんにちは, مرحبا, 🙂👍🏽🇩🇪",
    "e\u0301 combining, \u00a0no-break\u2003em\u3000ideographic spaces, \u200bzero width",
    "½ ² Ⅷ ٣ 数字123abc x'S 'LL 'd''t",
    "<|endoftext|> is text here, and so is <|im_start|>",
    "",
    " ",
    "\n",
    "a" * 300 + " " * 70 + "\n" * 9 + "b",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([CORPUS], 600)


def model_of(name: str, tokenizer: Tokenizer) -> GPT:
    """Return a model that was trained for some seconds, so that it prefers some tokens clearly."""
    sizes = dict(n_layers=2, n_heads=4, width=64, vocab_size=tokenizer.n_vocab, vocab_multiple=64, block_size=64)
    model = GPT(ModelConfig(**{**sizes, **MODELS[name]}), generator=torch.Generator().manual_seed(4))
    data = torch.from_numpy(tokenizer.encode(CORPUS).astype("int64"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        starts = torch.randint(len(data) - 65, (8,), generator=torch.Generator().manual_seed(step)).tolist()
        batch = torch.stack([data[s : s + 65] for s in starts])
        model(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def export(model: GPT, tokenizer: Tokenizer, folder: Path, *options: str) -> Path:
    """Write a run with this model, once, and export it; return the folder."""
    run, out = folder / "run", folder / "-".join(options).strip("-")
    if not run.exists():
        state = {"progress": {}, "model": dataclasses.asdict(model.config), "tokenizer": tokenizer.fingerprint}
        checkpoint.save(run, 1, model.state_dict(), {}, {**state, "config": {}, "loader": {}}, keep=0)
        tokenizer.save(run / "tokenizer.json")
    assert exporting.main([str(run), *options, "--out", str(out)]) == 0
    return out


def opened(path: Path) -> Any:
    """Open a file in llama.cpp, with an fp32 cache."""
    llama_cpp: Any = importlib.import_module("llama_cpp")
    f32 = llama_cpp.GGML_TYPE_F32
    options: dict[str, Any] = dict(n_ctx=64, n_threads=1, n_threads_batch=1, type_k=f32, type_v=f32, verbose=False)
    return llama_cpp.Llama(str(path / "model.gguf"), logits_all=True, **options)


def stored(t: Tensor, kind: str) -> Tensor:
    """Return rows (..., C) as a file of this type holds them."""
    types = gguf.GGMLQuantizationType
    quant = {"fp32": types.F32, "fp16": types.F16, "bf16": types.BF16, "q8_0": types.Q8_0}[kind]
    data = t.detach().float().reshape(-1, t.shape[-1]).numpy()
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(data, quant), quant)).view(t.shape).to(t.dtype)


class Rounded:
    """Copies of a model in fp64 with the weights of a file: `truth`, and `like_llama_cpp` with its roundings."""

    def __init__(self, model: GPT, kind: str) -> None:
        self.kind = kind
        self.truth, self.like_llama_cpp = (GPT(model.config).double().eval() for _ in range(2))
        for copy in (self.truth, self.like_llama_cpp):
            copy.load_state_dict(model.state_dict())
            with torch.no_grad():
                for name, p in copy.named_parameters():
                    if p.dim() == 2 and name != "wpe.weight":
                        p.copy_(stored(p, kind))
        half = lambda t: t.half().to(t.dtype)  # noqa: E731
        gelu = model.config.activation == "gelu_tanh"
        for name, module in self.like_llama_cpp.named_modules():
            if isinstance(module, Linear):
                module.register_forward_pre_hook(lambda m, a: (stored(a[0], kind), *a[1:]))
                if gelu and name.endswith("mlp.up"):
                    module.register_forward_hook(lambda m, a, out: half(out))
                if gelu and name.endswith("mlp.down"):
                    module.register_forward_pre_hook(lambda m, a: (half(a[0]), *a[1:]), prepend=True)


def logits_of(model: nn.Module, ids: list[int]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(torch.tensor([ids]))[0]
    return out


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_the_model_does(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = model_of(name, tokenizer)
    for kind in KINDS:
        llama = opened(export(model, tokenizer, tmp_path, "--format", "gguf", "--dtype", kind))
        for text in TEXTS:
            ids = tokenizer.encode(text).tolist()
            assert llama.tokenize(text.encode(), add_bos=False, special=False) == ids, text
        rounded = Rounded(model, kind)
        ids = tokenizer.encode(CORPUS[500:900]).tolist()[:48]
        llama.reset()
        llama.eval(ids)
        got = torch.from_numpy(llama.scores[: len(ids)].copy()).double()
        truth, like = logits_of(rounded.truth, ids), logits_of(rounded.like_llama_cpp, ids)
        fp32 = logits_of(model, ids) if kind == "fp32" else truth
        allowed = TIMES * max(float((like - truth).abs().max()), float((fp32 - truth).abs().max()))
        error = float((got - truth).abs().max())
        assert error <= allowed, kind
        best = truth.topk(2).values
        clear = best[:, 0] - best[:, 1] > 10 * allowed
        assert clear.any(), kind
        assert torch.equal(got.argmax(-1)[clear], truth.argmax(-1)[clear])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_greedy_text_is_the_same_everywhere(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = model_of(name, tokenizer)
    llama = opened(export(model, tokenizer, tmp_path, "--format", "gguf", "--dtype", "fp32"))
    hf = export(model, tokenizer, tmp_path, "--format", "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    reader = transformers.AutoTokenizer.from_pretrained(hf)
    for prompt in ("def main(", "    parser.add_argument", "The café's naïve"):
        ours = Generator(model, tokenizer).generate([Request(prompt, 24, temperature=0, ignore_eos=True)])[0]
        ids = reader(prompt, return_tensors="pt").input_ids
        out = theirs.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        llama.reset()
        tokens = [t for _, t in zip(range(24), llama.generate(ids[0].tolist(), temp=0, repeat_penalty=1.0))]
        assert ours.ids == out[0, ids.shape[1] :].tolist() == tokens
        assert ours.text == reader.decode(out[0, ids.shape[1] :]) == llama.detokenize(tokens).decode()
