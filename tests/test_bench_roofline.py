"""Shares of a step: names are assigned to classes, overlaps count once, shares add up, and a real step has products
in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastgpt.bench import _harness, roofline, throughput, variants
from fastgpt.bench.roofline import Event
from fastgpt.training.config import load_config

CPU = torch.device("cpu")
MICRO = variants.Shape(layers=2, heads=2, width=32, vocab=65, block=16, batch=4, steps=3)


@pytest.mark.parametrize(
    "kind, names",
    [
        (
            "gemm",
            "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute "
            "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_nt nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN "
            "cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128_32x3_nn_align8 gemvNSP_kernel "
            "cublasLt::splitKreduce_kernel triton_tem_fused_mm_3_gemm aten::mm aten::addmm aten::bmm",
        ),
        (
            "attention",
            "attention_fwd_kernel attention_dkdv_kernel pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel "
            "fmha_cutlassF_bf16_aligned_64x64_rf_sm80 cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16 "
            "aten::_scaled_dot_product_flash_attention_for_cpu fastgpt::attention_qkv_bwd",
        ),
        (
            "memory",
            "layer_norm_fwd_kernel adamw_update_kernel cross_entropy_fwd_bwd_kernel bias_gelu_bwd_kernel Memset "
            "vectorized_elementwise_kernel multi_tensor_apply_kernel cunn_SoftMaxForward Memcpy aten::copy_ "
            "triton_poi_fused_gelu_4 triton_red_fused_native_layer_norm_7 embedding_bwd_kernel aten::gelu",
        ),
    ],
)
def test_kernels_are_classified(kind: str, names: str) -> None:
    assert {roofline.classify(name) for name in names.split()} == {kind}, [
        name for name in names.split() if roofline.classify(name) != kind
    ]


def test_kernels_of_fastgpt_are_listed_with_all_their_instances() -> None:
    space = "void fastgpt::cuda::(anonymous namespace)::"
    names = [(f"{space}layer_norm_fwd_kernel<bf16, 8>(Args)", 4000.0, 8), ("layer_norm_fwd_kernel", 2000.0, 2)]
    names.append(("void at::native::vectorized_elementwise_kernel<4>(int)", 100.0, 1))
    assert roofline.own_kernels(names, 2) == [{"name": "layer_norm_fwd_kernel", "ms": 3.0, "calls": 5.0}]


def test_overlaps_count_once() -> None:
    events = [Event("a", 0, 10), Event("b", 5, 12), Event("c", 6, 8), Event("d", 20, 25), Event("e", 25, 26)]
    assert roofline.busy(events) == 12 + 6
    assert roofline.busy([]) == 0


def test_shares_add_up() -> None:
    events = [Event("gemm", 0, 40), Event("flash_fwd", 40, 60), Event("adamw", 70, 80), Event("gemm", 80, 100)]
    row = roofline.shares(roofline.by_name(events), 100.0, roofline.busy(events), 2)
    assert [row[f"{kind}_ms"] for kind in roofline.CLASSES] == pytest.approx([0.03, 0.01, 0.005, 0.055])
    assert sum(row[f"{kind}_pct"] for kind in roofline.CLASSES) == pytest.approx(100)
    assert row["slowest"][0] == {"name": "gemm", "class": "gemm", "ms": 0.03, "calls": 1.0}
    rates = roofline.rates(row, {"gemm": 6e6, "attention": 1e6}, tokens=50, peak=20e12)
    assert rates["gemm_tflop_s"] == pytest.approx(10) and rates["gemm_pct_of_peak"] == pytest.approx(50)
    assert rates["attention_tflop_s"] == pytest.approx(5)


def test_flops_of_products_and_attention() -> None:
    cfg = load_config(["--config", "gpt2-124m", "--model.vocab-size", "50304", "--micro-batch", "4"], "tiny")
    flops = roofline.model_flops(cfg)
    layer = 12 * 768 * 768  # qkv, proj, up, down
    assert flops["gemm"] == pytest.approx(6 * (12 * layer + 50304 * 768), rel=2e-3)  # and biases and norms
    assert flops["attention"] == 6 * 12 * 768 * 1024


class Events:
    """A profile of a GPU: kernels, their launches, and an annotation around them."""

    def __init__(self, **options: object) -> None:
        pass

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def events(self) -> list[object]:
        from types import SimpleNamespace as Space

        from torch.autograd import DeviceType

        def event(name: str, start: float, end: float, device: object, marked: bool = False) -> object:
            times = Space(start=start, end=end)
            return Space(name=name, time_range=times, device_type=device, is_user_annotation=marked)

        return [
            event("cudaLaunchKernel", 0, 3, DeviceType.CPU),
            event("adamw_update_kernel", 9, 12, DeviceType.CUDA),
            event("nvjet_tst", 1, 6, DeviceType.CUDA),
            event("Optimizer.step#AdamW.step", 0, 20, DeviceType.CUDA, True),
        ]


def test_only_what_the_device_did_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "profile", Events)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    found = roofline.device_events(lambda: None, torch.device("cuda"))
    assert found == [Event("nvjet_tst", 1, 6), Event("adamw_update_kernel", 9, 12)]


def test_a_step_on_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setitem(variants.SHAPES, "small", MICRO)
    monkeypatch.setattr(variants, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(roofline, "peak_flops", lambda *args: (1e12, "measured"))
    file = tmp_path / "rows.jsonl"
    assert roofline.main(["--device", "cpu", "--steps", "2", "--json", str(file)]) == 0
    rows = {r["variant"]: r for r in (json.loads(line) for line in file.read_text().splitlines())}
    assert set(rows) == {"torch", "fastgpt"}
    for r in rows.values():
        assert all(r[f"{kind}_ms"] > 0 for kind in ("gemm", "attention", "memory"))
        assert sum(r[f"{kind}_pct"] for kind in roofline.CLASSES) == pytest.approx(100)
        assert r["gemm_tflop_s"] > 0 and r["batch"] == 4 and all(r["machine"][k] for k in _harness.PROVENANCE)
    assert any(k["name"].startswith("fastgpt::") for k in rows["fastgpt"]["slowest"])
    assert not any("Backward" in k["name"] for r in rows.values() for k in r["slowest"])
    assert "% of peak" in capsys.readouterr().out


def test_a_red_op_has_no_shares(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(throughput, "red_ops", lambda *args: ["attention on cpu: off"])
    assert roofline.main(["--device", "cpu"]) == 1
    assert "no figure is shown: attention on cpu: off" in capsys.readouterr().out


def test_a_variant_that_fails_leaves_the_others_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(name: str, *args: object) -> dict[str, float]:
        if name == "torch":
            raise RuntimeError("no such kernel")
        return {"ms": 1.0}

    monkeypatch.setattr(roofline, "measure", measure)
    monkeypatch.setattr(throughput, "red_ops", lambda *args: [])
    rows = roofline.rows_of(["torch", "fastgpt"], "small", variants.SHAPES["small"], torch.device("cpu"))
    assert rows[0]["red"] == "RuntimeError: no such kernel" and rows[1]["ms"] == 1.0
