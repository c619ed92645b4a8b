"""Other libraries as baselines: they are called with their own signatures, compute what fastgpt does, and may fail
in one line; and the command for Nsight Compute. The libraries here are fakes with the signatures of the real ones."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.bench import OPS, _command, _harness, _ncu, _op, attention_decode
from fastgpt.bench._harness import Setting
from fastgpt.core import backend
from fastgpt.core.cards import datasheet_bandwidth

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).resolve().parents[1]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


# liger-kernel 0.8.5, liger_kernel/transformers/functional.py
def liger_layer_norm(X: Tensor, W: Tensor, B: Tensor, eps: float) -> Tensor:
    return F.layer_norm(X, W.shape, W, B, eps)


def liger_fused_add_rms_norm(
    X: Tensor, R: Tensor, W: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True
) -> tuple[Tensor, Tensor]:
    assert not in_place, "it would write over a gradient that is read again"
    return rms(X + R, W, eps), X + R


def liger_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Any = None,
    unsqueeze_dim: int = 1,
    rotary_dim: Any = None,
) -> tuple[Tensor, Tensor]:
    assert cos.shape == (1, q.shape[2], q.shape[3])  # q is (B, H, T, D)
    cos, sin = cos[:, None], sin[:, None]

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    return turn(q), turn(k)


def liger_swiglu(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


def liger_cross_entropy(input: Tensor, target: Tensor, weight: Any = None, size_average: Any = None) -> Tensor:
    return F.cross_entropy(input, target)


def liger_fused_linear_cross_entropy(input: Tensor, weight: Tensor, target: Tensor, bias: Any = None) -> Tensor:
    return F.cross_entropy(input @ weight.t(), target)


class LigerEmbeddingFunction:
    @staticmethod
    def apply(embeddings: Tensor, indices: Tensor) -> Tensor:
        return F.embedding(indices, embeddings)


# flash-attn 2 and 3
def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, causal: bool = False) -> Tensor:
    assert causal
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def flash_attn_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor) -> Tensor:
    return attention_decode.masked(q, k_cache, v_cache, cache_seqlens)


def flash_attn_func_3(q: Tensor, k: Tensor, v: Tensor, softmax_scale: Any = None, causal: bool = False) -> Any:
    return flash_attn_func(q, k, v, causal=causal), torch.zeros(())


def layer_norm_fn(
    x: Tensor, weight: Tensor, bias: Any, residual: Any = None, x1: Any = None, eps: float = 1e-6, prenorm: bool = False
) -> Any:
    s = x + residual
    y = rms(s, weight, eps) if bias is None else F.layer_norm(s, weight.shape, weight, bias, eps)
    return (y, s) if prenorm else y


def cross_entropy_loss(logits: Tensor, labels: Tensor, precomputed_lse: Any = None) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits, labels, reduction="none"), torch.zeros(len(labels))


def bias_gelu_impl(input: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(input + bias, approximate="tanh")


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Any = None,
    sin_k: Any = None,
    interleaved: bool = False,
    *,
    num_heads_q: Any = None,
) -> Tensor:
    h = int(num_heads_q)
    g = (qkv.shape[2] - h) // 2
    q, k, v = qkv.split([h, g, g], dim=2)
    wide = [t.repeat(1, 2)[None] for t in (cos, sin)]
    q, k = (t.transpose(1, 2) for t in liger_rope(q.transpose(1, 2), k.transpose(1, 2), *wide))
    return torch.cat((q, k, v), 2)


# apex
def fused_layer_norm_affine(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized_shape: Any,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def fused_rms_norm_affine(
    input: Tensor, weight: Tensor, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    return F.rms_norm(input, normalized_shape, weight, eps)


class SoftmaxCrossEntropyLoss:
    @staticmethod
    def apply(logits: Tensor, labels: Tensor, smoothing: float, padding_idx: int, half_to_float: bool) -> Tensor:
        assert smoothing == 0.0 and padding_idx == -100 and not half_to_float
        return F.cross_entropy(logits, labels, reduction="none")


class FusedAdam(torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float,
        betas: Any,
        weight_decay: float,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and capturable
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)


# quack and cut-cross-entropy
def rmsnorm(
    x: Tensor, weight: Any = None, bias: Any = None, residual: Any = None, eps: float = 1e-6, prenorm: bool = False
) -> Any:
    return (rms(x + residual, weight, eps), x + residual) if prenorm else rms(x + residual, weight, eps)


def quack_cross_entropy(
    x: Tensor, target: Tensor, lse_partial: Any = None, ignore_index: int = -100, reduction: str = "none"
) -> Tensor:
    return F.cross_entropy(x, target, reduction=reduction)


def chunked_linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, chunk_size: int = 4096, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    return F.cross_entropy(x @ weight.t(), target)


def linear_cross_entropy(e: Tensor, c: Tensor, targets: Tensor, bias: Any = None, filter_eps: Any = "auto") -> Tensor:
    assert filter_eps is None, "its gradient would not be exact"
    return F.cross_entropy(e @ c.t(), targets)


LIGER = (liger_layer_norm, liger_fused_add_rms_norm, liger_rope, liger_swiglu, liger_cross_entropy)
MODULES: dict[str, dict[str, Any]] = {
    "liger_kernel": {},
    "liger_kernel.transformers": {},
    "liger_kernel.transformers.functional": {f.__name__: f for f in (*LIGER, liger_fused_linear_cross_entropy)},
    "liger_kernel.ops": {"LigerEmbeddingFunction": LigerEmbeddingFunction},
    "flash_attn": {"flash_attn_func": flash_attn_func, "flash_attn_with_kvcache": flash_attn_with_kvcache},
    "flash_attn.ops": {},
    "flash_attn.ops.triton": {},
    "flash_attn.ops.triton.layer_norm": {"layer_norm_fn": layer_norm_fn, "rms_norm_fn": layer_norm_fn},
    "flash_attn.ops.triton.cross_entropy": {"cross_entropy_loss": cross_entropy_loss},
    "flash_attn.ops.activations": {"swiglu": liger_swiglu, "bias_gelu_impl": bias_gelu_impl},
    "flash_attn.layers": {},
    "flash_attn.layers.rotary": {"apply_rotary_emb_qkv_": apply_rotary_emb_qkv_},
    "flash_attn_interface": {
        "flash_attn_func": flash_attn_func_3,
        "flash_attn_with_kvcache": flash_attn_with_kvcache,
    },
    "apex": {},
    "apex.normalization": {},
    "apex.normalization.fused_layer_norm": {f.__name__: f for f in (fused_layer_norm_affine, fused_rms_norm_affine)},
    "apex.contrib": {},
    "apex.contrib.xentropy": {"SoftmaxCrossEntropyLoss": SoftmaxCrossEntropyLoss},
    "apex.optimizers": {"FusedAdam": FusedAdam},
    "quack": {"rmsnorm": rmsnorm, "cross_entropy": quack_cross_entropy},
    "quack.linear_cross_entropy": {"chunked_linear_cross_entropy": chunked_linear_cross_entropy},
    "cut_cross_entropy": {"linear_cross_entropy": linear_cross_entropy},
}
PEERS = {
    "embedding": {"liger_kernel"},
    "layer_norm": {"liger_kernel", "flash_attn", "apex"},
    "rms_norm": {"liger_kernel", "flash_attn", "apex", "quack"},
    "rope": {"liger_kernel", "flash_attn"},
    "attention": {"flash_attn", "flash_attn_interface"},
    "attention_decode": {"flash_attn", "flash_attn_interface"},
    "bias_gelu": {"flash_attn"},
    "swiglu": {"liger_kernel", "flash_attn"},
    "cross_entropy": {"liger_kernel", "flash_attn", "apex", "quack"},
    "linear_cross_entropy": {"liger_kernel", "cut_cross_entropy", "quack"},
    "adamw": {"apex"},
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all of them importable, and visible to find_spec."""
    for name, members in MODULES.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__dict__.update(members, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)


def peers(op: str) -> list[_op.Provider]:
    bench = _op.bench_of(op)
    return [p for p in bench.others(Setting(bench.tiny, torch.float32, CUDA)) if p.package]


@pytest.mark.parametrize("op", OPS)
def test_installed_libraries_do_what_fastgpt_does(op: str, installed: None) -> None:
    bench, found = _op.bench_of(op), peers(op)
    setting = Setting(bench.tiny, torch.float32, CPU)
    assert {p.package for p in found} == PEERS.get(op, set())
    for p in found:
        if op == "adamw":
            bench.job(p, setting, "step", 1).run()
            continue
        ours = bench.job(_op.Provider("torch", bench.public, "torch"), setting, "both", 3).run()
        theirs = bench.job(p, setting, "both", 3).run()
        if op == "swiglu":  # over two tensors: other inputs, the same function
            continue
        torch.testing.assert_close(theirs, ours, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_imported_before_it_is_called(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_op.importlib.util, "find_spec", lambda name: object())
    assert {p.package for p in peers(op)} == PEERS.get(op, set()) and not set(MODULES) & set(sys.modules)


def test_a_library_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise ImportError("libcudart.so.11.0: cannot open shared object file\n  built for\n  another torch")

    monkeypatch.setattr(_op, "host_us", lambda *args: 1.0)
    bench = dataclasses.replace(
        _op.bench_of("swiglu"), others=lambda setting: [_op.Provider("flash_attn", broken, package="flash_attn")]
    )
    assert _command.main(bench, "--device cpu --shape 4x8 --seconds 0 --phase forward".split()) == 0
    out = capsys.readouterr().out
    (line,) = (s for s in out.splitlines() if "flash_attn" in s)
    assert line.endswith(
        "not measured: ImportError: libcudart.so.11.0: cannot open shared object file built for another torch"
    )
    assert re.search(r"forward  torch +\d", out)


def names_of_kernels(language: str) -> set[str]:
    folder, pattern = {
        "triton": (ROOT / "kernels", r"def (\w+_kernel)\("),
        "cuda": (ROOT / "csrc", r"(\w+_kernel)\("),
    }[language]
    files = [f for f in folder.rglob("*.*") if f.suffix in (".py", ".cu", ".cuh")]
    return {n for f in files for n in re.findall(pattern, f.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("op", OPS)
def test_the_command_for_nsight_compute_names_kernels_that_exist(op: str) -> None:
    bench = _op.bench_of(op)
    for phase in bench.phases:
        command = shlex.split(_ncu.command(bench, Setting(bench.shapes["cuda"][0], torch.bfloat16, CUDA), phase, None))
        pattern = command[command.index("--kernel-name") + 1].removeprefix("regex:")
        for language in {"triton", "cuda"} & backend.ops()[op].keys():
            assert any(re.search(pattern, name) for name in names_of_kernels(language)), (phase, language, pattern)


def test_the_command_that_is_printed_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = _op.bench_of("cross_entropy")
    monkeypatch.setattr(_command, "measure", lambda *args: pytest.fail("it must not be timed"))
    arguments = "--device cpu --dtype fp32 --shape 4x33 --phase both --backend cpu".split()
    assert _command.main(bench, [*arguments, "--ncu"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    command = shlex.split(line)
    assert command[0] == "ncu" and "--launch-skip" in command and sys.executable in command
    module = command.index("-m")
    assert command[module + 1] == "fastgpt.bench.cross_entropy" and command[module + 2 :] == [
        *arguments,
        "--calls",
        "3",
    ]
    assert _command.main(bench, command[module + 2 :]) == 0
    assert capsys.readouterr().out == "cross_entropy both cpu: 3 calls\ncross_entropy both cpu in place: 3 calls\n"


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("NVIDIA H100 80GB HBM3", 3350e9),
        ("NVIDIA H100 PCIe", 2000e9),
        ("NVIDIA H200", 4800e9),
        ("NVIDIA A100-SXM4-40GB", 1555e9),
        ("NVIDIA A100-SXM4-80GB", 2039e9),
        ("NVIDIA GeForce RTX 4090", 1008e9),
        ("NVIDIA A10G", None),
    ],
)
def test_bandwidth_by_name(name: str, wanted: float | None) -> None:
    assert datasheet_bandwidth(name) == wanted


def test_percent_of_the_datasheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")

    def sheet(dtype: torch.dtype, products: bool) -> float | None:
        return _harness.datasheet(Setting((1,), dtype, CUDA), products)

    assert sheet(torch.bfloat16, False) == 3350e9 and sheet(torch.bfloat16, True) == 989.5e12
    assert sheet(torch.float32, True) is None and _harness.datasheet(Setting((1,), torch.float32, CPU), False) is None
    row = _op._figures(_op.Samples([1e-3]), moved=1_675_000_000, floor=1e-3, sheet=3350e9)
    assert row["pct_of_datasheet"] == pytest.approx(50)
    row = _op._figures(_op.Samples([1e-3]), moved=1, floor=1e-3, flops=98.95e9, best=_op.GEMM, sheet=989.5e12)
    assert row["pct_of_datasheet"] == pytest.approx(10)
