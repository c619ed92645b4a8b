"""llm.c and nanoGPT by path: their output is parsed, their data has their format, a failure is a reason; and the
shapes and sweeps of the comparison in which they appear."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt.bench import plain, rivals, throughput, variants
from fastgpt.core.errors import UserError
from fastgpt.models.gpt import GPT
from fastgpt.training import graphs
from fastgpt.training.config import load_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GPT2 = variants.Shape(layers=12, heads=12, width=768, vocab=50304, block=64, batch=2, steps=3)
# the lines that llm.c's train_gpt2.cu and nanoGPT's train.py print
LLMC = """allocated 474 MiB for master copy of params
step    1/8 | loss 11.009463 (+nanz)| norm 15.3607 (+nanz)| lr 8.57e-07 | 3056.36 ms | 42.6% bf16 MFU | 171539 tok/s
step    2/8 | loss 10.968462 (+nanz)| norm 15.3241 (+nanz)| lr 1.71e-06 | 140.50 ms | 37.6% bf16 MFU | 466440 tok/s
step    3/8 | loss 9.519217 (-1.52z)| norm 2.3212 (-0.06z)| lr 1.00e-04 | 139.82 ms | 37.9% bf16 MFU | 468712 tok/s
step    4/8 | loss 9.519217 (-1.52z)| norm 2.3212 (-0.06z)| lr 1.00e-04 | 139.84 ms | 37.9% bf16 MFU | 468712 tok/s
step    5/8 | loss 9.519217 (-1.52z)| norm 2.3212 (-0.06z)| lr 1.00e-04 | 139.86 ms | 37.9% bf16 MFU | 468712 tok/s
step    6/8 | loss 8.519217 (-1.52z)| norm 2.3212 (-0.06z)| lr 1.00e-04 | 100.00 ms | 37.9% bf16 MFU | 468712 tok/s
step    7/8 | loss 8.119217 (-1.52z)| norm 2.3212 (-0.06z)| lr 1.00e-04 | 110.00 ms | -100.0% bf16 MFU | 468712 tok/s
step    8/8 | loss 7.519217 (-1.52z)| norm 2.3212 (-0.06z)| lr 1.00e-04 | 120.00 ms | 37.9% bf16 MFU | 468712 tok/s
total average iteration time: 140.012 ms
"""
NANOGPT = (
    "number of parameters: 123.69M\ncompiling the model... (takes a ~minute)\nstep 0: train loss 10.9, val loss 10.9\n"
)
NANOGPT += "".join(
    f"iter {i}: loss {10.9 - i:.4f}, time {150.5 + i if i else 31728.83:.2f}ms, mfu {39.21 if i > 4 else -100:.2f}%\n"
    for i in range(8)
)


def test_steps_are_read_without_the_first_ones() -> None:
    assert rivals.milliseconds(rivals.LLMC_LINE, LLMC) == [100.0, 110.0, 120.0]
    assert rivals.milliseconds(rivals.NANOGPT_LINE, NANOGPT) == [155.5, 156.5, 157.5]
    assert rivals.milliseconds(rivals.LLMC_LINE, "CUDA error: out of memory\n") == []


def test_llmc_gets_its_format_and_settings(tmp_path: Path) -> None:
    command = rivals.llmc_command(Path("/llmc"), tmp_path, GPT2, 8)
    options = dict(zip(command[1::2], command[2::2]))
    assert command[0] == "/llmc/train_gpt2cu"
    wanted = {"-e": "d12", "-b": "2", "-t": "64", "-d": "128", "-x": "8", "-v": "0", "-s": "0", "-h": "0", "-n": "0"}
    assert wanted.items() <= options.items() and options["-i"] == options["-j"]
    data = Path(options["-i"]).read_bytes()
    header = np.frombuffer(data[:1024], np.int32)
    ids = np.frombuffer(data[1024:], np.uint16)
    assert header[:3].tolist() == [20240520, 1, ids.size] and not header[3:].any()
    assert ids.size > GPT2.batch * GPT2.block + 1 and ids.max() < 50257 and len(set(ids.tolist())) > 50


def test_nanogpt_gets_the_same_sizes(tmp_path: Path) -> None:
    command = rivals.nanogpt_command(Path("/nanogpt"), tmp_path, GPT2, 8, CUDA)
    assert command[:2] == [sys.executable, "train.py"]
    wanted = "n_layer=12 n_head=12 n_embd=768 block_size=64 batch_size=2 gradient_accumulation_steps=1 compile=True"
    assert {f"--{option}" for option in f"{wanted} dtype=bfloat16 device=cuda log_interval=1".split()} <= set(command)
    assert f"--dataset={tmp_path}" in command and np.fromfile(tmp_path / "val.bin", np.uint16).max() < 50257
    assert "--compile=False" in rivals.nanogpt_command(Path("/nanogpt"), tmp_path, GPT2, 8, CPU)


def test_a_trainer_runs_in_its_folder_and_gives_a_row(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(f"import os\nassert os.path.exists('train.py')\nprint({NANOGPT!r})")
    binary = tmp_path / "train_gpt2cu"
    binary.write_text(f"#!{sys.executable}\nprint({LLMC!r})")
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    about = {"bench": "throughput", "shape": "x", "batch": 2, "block": 64, "dtype": "bf16", "machine": {"a": 1}}
    about |= {"losses": [1.0], "kernels": {}, "loss_gap": 0.0}
    llmc, nanogpt = rivals.rows(about, GPT2, CUDA, llmc=tmp_path, nanogpt=tmp_path)
    assert (llmc["variant"], llmc["ms"], llmc["samples"]) == ("llm.c", 110.0, 3)
    assert llmc["tokens_per_s"] == pytest.approx(2 * 64 / 0.110) and llmc["machine"] == {"a": 1} and llmc["rival"]
    assert nanogpt["ms"] == 156.5 and "losses" not in nanogpt and "kernels" not in nanogpt
    assert rivals.rows(about, GPT2, CUDA) == []


def test_a_trainer_that_cannot_run_says_why(tmp_path: Path) -> None:
    def reason(name: str, shape: variants.Shape = GPT2, device: torch.device = CUDA) -> str:
        return rivals.measure(name, tmp_path, shape, device)["red"]

    assert "has no train_gpt2cu, which `make train_gpt2cu` builds" in reason("llm.c")
    assert reason("nanoGPT").endswith("has no train.py")
    (tmp_path / "train.py").write_text("raise SystemExit('no such dataset')")
    (tmp_path / "train_gpt2cu").touch()
    assert reason("nanoGPT") == "exit code 1, 0 steps: no such dataset"
    assert reason("nanoGPT", variants.GPU_SHAPES["llama-125m"]) == "it trains GPT-2 only"
    assert "on a GPU" in reason("llm.c", GPT2, CPU) and "on a GPU" in reason("llm.c", variants.SHAPES["small"])
    assert "PermissionError" in reason("llm.c")


def test_the_table_has_the_rivals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = throughput.provenance(CPU)
    about = {"bench": "throughput", "batch": 4, "dtype": "fp32", "machine": machine, "kernels": {}, "peak_flops": 1e12}
    about |= {"peak_flops_from": "measured", "loss_gap": 0.0, "loss_tolerance": 1e-4, "peak_mb": 1.0, "ms_q20": 1.0}
    row = {**about, "ms": 1.0, "ms_q80": 1.0, "tokens_per_s": 10.0, "mfu_full": 0.1, "mfu_causal": 0.1}
    monkeypatch.setattr(throughput, "compare", lambda *args: [{**row, "variant": v} for v in ("torch", "fastgpt")])
    assert throughput.main(["--device", "cpu", "--nanogpt", str(tmp_path)]) == 0, (
        "a rival that is not there is no failure"
    )
    assert "nanoGPT: " in (out := capsys.readouterr().out) and "has no train.py" in out
    (tmp_path / "train.py").write_text(f"print({NANOGPT!r})")
    file = tmp_path / "rows.jsonl"
    assert throughput.main(["--device", "cpu", "--nanogpt", str(tmp_path), "--json", str(file)]) == 0
    assert "nanoGPT                 156.5 (155.9 .. 157.1)" in capsys.readouterr().out
    last = json.loads(file.read_text().splitlines()[-1])
    assert last["variant"] == "nanoGPT" and last["mfu_full"] == pytest.approx(0.1 * last["tokens_per_s"] / 10)


def test_a_sweep_doubles_until_memory_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    machine, seen = throughput.provenance(CPU), []

    def compare(names: list[str], name: str, shape: variants.Shape, device: torch.device) -> list[dict[str, Any]]:
        seen.append((name, shape.batch, shape.layers))
        row = {"bench": "throughput", "dtype": "bf16", "machine": machine}
        return [{**row, "variant": "torch", "red": "out of memory" if shape.batch > 8 else "not timed here"}]

    monkeypatch.setattr(throughput, "compare", compare)
    monkeypatch.setattr(throughput, "variant_names", lambda *args: ["torch", "fastgpt"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    command = ["--device", "cuda", "--shape", "gpt2-774m", "--shape", "gpt2-124m", "--sweep"]
    assert throughput.main(command) == 1  # "not timed here" is a failure, running out of memory is not
    assert [b for name, b, _ in seen if name == "gpt2-774m"] == [1, 2, 4, 8, 16]
    assert {(name, layers) for name, _, layers in seen} == {("gpt2-774m", 36), ("gpt2-124m", 12)}
    for arguments, says in ((["--sweep"], "--sweep needs a GPU"), (["--shape", "gpt2-1.5b"], "gpt2-1.5b needs a GPU")):
        with pytest.raises(UserError, match=says):
            throughput.main(["--device", "cpu", *arguments])


def test_joules_per_token_are_the_counters_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    class Trained:
        steps = 0

        def train(self, cfg: object, steps: int) -> None:
            self.steps += steps

    v, cfg = Trained(), throughput.settings(variants.SHAPES["small"], CPU)
    monkeypatch.setattr(throughput, "ENERGY_SECONDS", 0.01)
    monkeypatch.setattr(throughput, "energy_joules", lambda device: 100.0 + 3.0 * v.steps)
    assert throughput.joules_per_token(v, cfg, CUDA, 12) == pytest.approx(3.0 / 12) and v.steps > 1
    monkeypatch.setattr(throughput, "energy_joules", lambda device: None)
    assert throughput.joules_per_token(v, cfg, CUDA, 12) is None


@pytest.mark.parametrize("name", variants.GPU_SHAPES)
def test_shapes_are_those_of_the_configurations(name: str) -> None:
    ours = variants.settings(variants.GPU_SHAPES[name], CUDA).model
    theirs = load_config(["--config", name], "tiny").model
    sizes = (
        "n_layers n_heads kv_heads width d_mlp norm activation positions qkv_bias proj_bias mlp_bias tied block_size"
    )
    assert [getattr(ours, key) for key in sizes.split()] == [getattr(theirs, key) for key in sizes.split()]
    assert ours.padded_vocab_size == theirs.padded_vocab_size


@pytest.mark.parametrize("name", ["small", "llama-small"])
def test_plain_pytorch_is_the_same_function(name: str) -> None:
    cfg = variants.settings(variants.SHAPES[name], CPU)
    model = GPT(cfg.model, generator=torch.Generator().manual_seed(0)).double()
    like = plain.PlainGPT(cfg.model).double()
    like.load_state_dict(model.state_dict())
    ids = torch.randint(65, (2, 33), generator=torch.Generator().manual_seed(1))
    found, wanted = like(ids[:, :-1], ids[:, 1:]), model(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(found, wanted[1] if isinstance(wanted, tuple) else wanted, rtol=1e-6, atol=0)


def test_steps_from_graphs_have_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a recorder that, like a graph, returns every result at one address."""
    replays: list[str] = []

    def record(function: Any, inputs: list[torch.Tensor], pool: object) -> tuple[Any, torch.Tensor, None]:
        out = torch.zeros({"forward_backward": 1, "optimizer_step": 3}[function.func.__name__])

        def replay() -> None:
            replays.append(function.func.__name__)
            out.copy_(function(*inputs).detach())

        return replay, out, None

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(variants, "keep_freed_memory", lambda: None)
    cfg, data = (f(variants.SHAPES["small"], CPU) for f in (variants.settings, variants.batches))
    found, wanted = (variants.build(name, cfg, data) for name in ("fastgpt graphs", "fastgpt"))
    for v in (found, wanted):
        v.train(cfg, graphs.WARM_STEPS + 3)
    assert replays == 3 * ["forward_backward", "optimizer_step"] and variants.GPU_WARM_STEPS > graphs.WARM_STEPS + 1
    assert torch.stack(found.losses).equal(torch.stack(wanted.losses))
    monkeypatch.setattr(graphs, "record", lambda *args: 1 / 0)
    with pytest.raises(RuntimeError, match="fastgpt graphs: not recorded: forward_backward: division by zero"):
        variants.build("fastgpt graphs", cfg, data).train(cfg, graphs.WARM_STEPS + 1)
