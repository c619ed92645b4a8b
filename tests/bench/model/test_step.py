"""The model of a training step: bytes and products of three kernels by hand, the recorded launches against those that
run, sums, comparisons and the page."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.bench.model import command, library, tables

pytest.importorskip("triton")

from fastgpt.bench.model.cuda_launches import CudaLaunch, Planner  # noqa: E402
from fastgpt.bench.model.recording import Call, Part  # noqa: E402
from fastgpt.bench.model.step import ROOT, Step, chip_named, config_of, record, total  # noqa: E402
from fastgpt.bench.model.traffic import keys_masked, keys_seen, queries_masked, queries_seen, work_of  # noqa: E402
from fastgpt.core import backend  # noqa: E402


def part(*shape: int, itemsize: int = 2) -> Part:
    elements = 1
    for n in shape:
        elements *= n
    return Part(shape, itemsize, elements)


def launch(kernel: str, blocks: int, threads: int = 128) -> CudaLaunch:
    return CudaLaunch(kernel, (blocks, 1, 1), (threads, 1, 1), 0)


def test_attention_by_hand() -> None:
    """256 queries and keys in tiles of 128 by 64: the first block sees 2 tiles of keys, the second 4."""
    forward = launch("attention_fwd_kernel<bf16, 64, false>", 2 * 3 * 2)
    q = part(2, 256, 3, 64)
    call = Call("attention_fwd", {"q": q, "k": q, "v": q}, {}, own=True, launches=[forward], options={"causal": True})
    work = work_of(call, forward)
    heads, size = 2 * 3, 2 * 256 * 3 * 64 * 2
    assert work.flop == heads * (128 * 128 + 128 * 256) * 2 * 2 * 64
    assert work.read == 3 * size and work.written == size + heads * 256 * 4
    assert work.l2 == size + heads * (128 + 256) * 2 * 64 * 2
    assert work.slowest == pytest.approx(256 / 192)


def test_tiles_of_causal_order() -> None:
    from fastgpt.bench.model.traffic import Heads

    heads = Heads(1, 200, 200, 1, 1, 64, 2, True)
    assert keys_seen(heads, 128, 64) == [128, 256]
    assert queries_seen(heads, 64, 128) == [256, 128], "the second block of keys begins at query 128"
    full = dataclasses.replace(heads, causal=False)
    assert keys_seen(full, 128, 64) == [256, 256]
    # queries 0 to 127 need a mask for both tiles of keys, queries 128 to 255 for those from key 128 on
    assert keys_masked(heads, 128, 64) == pytest.approx(4 / 6) and keys_masked(full, 128, 64) == 0
    # keys 0 to 127: queries 0 to 127 of 256; keys 128 to 199: all
    assert queries_masked(heads, 64, 128) == pytest.approx(4 / 6) and queries_masked(full, 64, 128) == 0


def test_a_backward_and_its_sums_by_hand() -> None:
    """LayerNorm of 4,096 rows of 768: dy and h in, dx out, 2 x 768 fp32 sums from each of 132 blocks."""
    main, sums = launch("layer_norm_bwd_kernel<bf16, bf16, 3, 8>", 132), launch("add_partials_kernel<bf16>", 48)
    rows, one = part(4096, 768), part(768)
    read = {"dy": rows, "h": rows, "weight": one, "bias": one, "stats": part(2, 4096, itemsize=4)}
    call = Call("layer_norm_bwd", read, {"out0": rows, "out1": one, "out2": one}, own=True, launches=[main, sums])
    size = 4096 * 768 * 2
    assert work_of(call, main).read == 2 * size + 2 * 768 * 2 + 2 * 4096 * 4
    assert work_of(call, main).written == size + 2 * 768 * 2
    assert work_of(call, sums).l2 == 132 * 2 * 768 * 4 and work_of(call, sums).read == 0


def test_a_loss_by_hand() -> None:
    """Logits are requested twice, the second time from L2 if it holds the rows that are under way."""
    kernel = launch("cross_entropy_fwd_bwd_kernel<bf16, true>", 512, threads=512)
    logits, loss = part(512, 50304), part(512, itemsize=4)
    read = {"logits": logits, "loss": loss, "target": part(512, itemsize=8), "scale": part(1, itemsize=4)}
    call = Call("cross_entropy_fwd_bwd", read, {"logits": logits, "loss": loss}, own=True, launches=[kernel])
    work = work_of(call, kernel)
    assert work.read == logits.bytes + 512 * 12 + 4 and work.written == logits.bytes + 512 * 4
    assert work.l2 == work.read + logits.bytes and work.again == logits.bytes and work.held == 50304 * 2


def test_a_product_by_hand() -> None:
    """(512, 256) x (256, 1024) in tiles of 128 x 64; backward also writes fp32 sums of each row tile. No faster than a
    product of PyTorch's."""
    from fastgpt.bench.model.triton_launches import TritonLaunch

    class Kernel:
        __name__ = "gelu_mlp_bwd_kernel"

    numbers = {"M": 512, "N": 1024, "K": 256, "BLOCK_M": 128, "BLOCK_N": 64}
    partials = torch.empty(4, 1, 1024, device="meta")
    launched = TritonLaunch(Kernel(), (64, 1, 1), {**numbers, "partials_ptr": partials}, {"num_warps": 8})
    read = {"dy": part(512, 256), "weight": part(256, 1024), "u": part(512, 1024)}
    call = Call("gelu_mlp_bwd", read, {"out0": part(512, 1024)}, own=True, launches=[launched])
    work = work_of(call, launched)
    assert work.flop == 2 * 512 * 256 * 1024 and work.product
    assert work.read == call.bytes_read and work.written == 512 * 1024 * 2 + 4 * 1024 * 4
    assert work.l2 == 512 * 1024 * 2 + 64 * (128 + 64) * 256 * 2
    chip = chip_named("H200")
    assert library.product_seconds(650e12, chip) == pytest.approx(1.0, rel=0.01)


def small_step(**kernels: str) -> Step:
    """Two layers of GPT-2's shape at 64 columns, 2 x 64 tokens."""
    cfg = config_of("gpt2-124m", 2, 64, layers=2)
    model = dataclasses.replace(cfg.model, width=64, n_heads=2, vocab_size=128, block_size=64)
    return Step("small", dataclasses.replace(cfg, model=model), chip_named("H200"), kernels)


@pytest.mark.skipif(not os.environ.get("FASTGPT_EMULATED_CUDA"), reason="needs the emulation of CUDA")
def test_the_recorded_launches_are_those_that_run() -> None:
    """The same step runs in the emulation: kernels, grids, blocks and shared memory are equal, in order."""
    from fastgpt.bench.variants import train_step
    from fastgpt.training.build import build_model, build_optimizer

    step = small_step(attention="cuda")
    planner = Planner(Path(os.environ["FASTGPT_EMULATED_CUDA"]), 1)
    calls = record(step, planner)
    planned = [x for call in calls for x in call.launches]
    assert planned and all(isinstance(x, CudaLaunch) for x in planned)
    cpu = torch.device("cpu")
    vocab = step.cfg.model.vocab_size or 0
    model = build_model(dataclasses.replace(step.cfg, device="cpu"), vocab, cpu)
    optimizer = build_optimizer(step.cfg, model)
    ids = torch.randint(vocab, (2, 64), generator=torch.Generator().manual_seed(0))
    with backend.use(all="cuda", strict=True):
        for _ in range(2):
            planner.begin(dry=False)
            train_step(model, optimizer, iter([(ids, ids)]), 1)
            ran = planner.end()
    assert ran == planned


def test_a_step_has_the_kernels_of_a_layer() -> None:
    """What is launched for each layer grows with the number of layers, and nothing waits for the device."""
    one, two = (record(dataclasses.replace(small_step(attention="cuda"), cfg=cfg), None) for cfg in (
        dataclasses.replace(small_step().cfg, model=dataclasses.replace(small_step().cfg.model, n_layers=n))
        for n in (1, 2)
    ))  # fmt: skip
    count = lambda calls, name: sum(c.name == name for c in calls)  # noqa: E731
    for name in ("layer_norm_bwd", "bias_gelu_fwd", "bias_gelu_bwd", "attention_fwd", "attention_qkv_bwd"):
        assert count(two, name) - count(one, name) == (2 if name == "layer_norm_bwd" else 1), name
    for name in ("embedding_fwd", "cross_entropy_fwd_bwd", "adamw_update"):
        assert count(one, name) == count(two, name) == 1, name
    products = [sum(c.flop for c in calls if library.kind(c) == "product") for calls in (one, two)]
    assert products[1] - products[0] == 3 * 2 * 2 * 64 * 12 * 64 * 64, "a layer has 12 C^2 weights"


ROW: dict[str, Any] = {"bench": "model", "chip": "H200", "model": "gpt2-124m", "kernels": "auto", "batch": 64}
ROW |= {"block": 1024, "machine": {"commit": "abc", "sources": "123"}}
KERNEL = {"figure": "kernel", "op": "layer_norm", "kernel": "layer_norm_fwd_kernel", "class": "own", "variant": "x"}
KERNEL |= {"attention": False, "limit": "dram", "us": 50.0, "count": 24, "ms": 1.2, "gb": 0.2, "tflop": 0.0}
KERNEL |= {"waves": 1.0, "blocks_per_sm": 4, "conflicts": 1.0, "instructions": 1e7}


def rows_of(us: float) -> list[dict[str, Any]]:
    kernel = {**ROW, **KERNEL, "us": us, "ms": 24 * us / 1e3}
    other = {**kernel, "kernel": "attention_fwd_kernel", "attention": True, "ms": 10.0, "count": 12}
    step = Step("gpt2-124m", config_of("gpt2-124m", None, None), chip_named("H200"), {})
    return [kernel, other, {**ROW, **total([kernel, other], step)}]


def test_settings_of_the_trainer() -> None:
    assert command.settings_of(["graphs=false", "kernels=all=torch"]) == {"graphs": False, "kernels": "all=torch"}
    step = config_of("gpt2-124m", 2, 64, graphs=False)
    assert not step.graphs and step.block_size == 64
    assert tables.title({**ROW, "settings": "graphs=False"}).endswith("H200, graphs=False")


def test_the_sum_of_a_step() -> None:
    """24 kernels of 50 us, 10 ms of attention, 36 gaps of 1 us; attention with its gaps is left out at the end."""
    step = rows_of(50.0)[-1]
    assert step["ms"] == pytest.approx(1.2 + 10.0 + 0.036) and step["launches"] == 36
    assert step["ms_without_attention"] == pytest.approx(1.2 + 0.024)
    assert step["tokens_per_s"] == pytest.approx(65536 / 11.236e-3)


def test_texts_and_page_say_that_nothing_was_measured() -> None:
    rows = rows_of(50.0)
    page = tables.page_of(rows)
    assert "model, not measured" in tables.text(rows) and page.count("model, not measured") >= 3
    assert "layer_norm_fwd_kernel" in page and "data:image/png" in page
    only = tables.text(rows, "attention")
    assert "attention_fwd_kernel" in only and "layer_norm_fwd_kernel" not in only
    told = tables.compared(rows, rows_of(25.0))
    assert "-49.0%" in told, "0.624 ms of 1.224 without attention"
    assert "-0.600" in told and "attention_fwd" not in told, "only what differs is listed"


@pytest.mark.parametrize(
    "argv, wrong",
    [
        (["--shape", "8x"], "--shape is '8x', expected gpt2-124m, llama-1b"),
        (["--shape", "8x64", "8x32"], "--shape is '8x64 8x32'"),
        (["--only", "("], "--only is '('"),
        (["--set", "graphs=no"], "--set is 'graphs=no', expected NAME=VALUE"),
        (["--set", "lr=1"], "--set is 'lr=1', expected NAME=VALUE"),
        (["--source", "/nowhere", "--set", "of_its_own=true"], "--source is /nowhere, expected a checkout"),
        (["--only", "norm"], "TRITON_INTERPRET is set"),
        (["--json", "/nowhere/x.jsonl"], "/nowhere/x.jsonl is in no folder"),
    ],
)
def test_wrong_arguments_are_found_before_the_work(argv: list[str], wrong: str) -> None:
    from fastgpt.core.errors import UserError

    with pytest.raises(UserError, match=wrong.replace("(", r"\(")):
        command.main(argv)


def test_a_file_of_other_rows_is_refused(tmp_path: Path) -> None:
    from fastgpt.core.errors import UserError

    file = tmp_path / "rows.jsonl"
    file.write_text('{"bench": "codegen"}\n')
    with pytest.raises(UserError, match="could not be read"):
        command.read(file)


@pytest.mark.extended
def test_the_command_models_a_step(tmp_path: Path) -> None:
    """With Triton's kernels alone, which compile here in seconds; of this checkout as of another one."""
    json_to, page = tmp_path / "rows.jsonl", tmp_path / "model.html"
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTGPT_EMULATED_CUDA")}
    argv = ["--chip", "H200", "--shape", "gpt2-124m", "1x128", "--kernels", "all=triton", "--source", str(ROOT)]
    done = subprocess.run(
        [sys.executable, "-m", "fastgpt.cli", "bench", "model", *argv, "--json", str(json_to), "--page", str(page)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = command.read(json_to)
    kernels = {r["kernel"]: r for r in rows if r["figure"] == "kernel" and r["class"] == "own"}
    assert {"layer_norm_fwd_kernel", "attention_dkdv_kernel", "adamw_update_kernel"} <= set(kernels)
    assert all(r["limit"] != "bytes alone" and r["us"] > 0 for r in kernels.values())
    assert kernels["bias_gelu_fwd_kernel"]["count"] == 12
    assert "model, not measured" in page.read_text() and "model, not measured" in done.stdout
