"""A patched model in common training environments: torch.compile, autocast, checkpointing, PEFT, the Trainer, DDP,
FSDP2."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import fastgpt
from fastgpt.bench import patching as bench
from fastgpt.core import fallback
from fastgpt.optim import AdamW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB, B, T = 97, 4, 10
SMALL: dict[str, Any] = dict(vocab_size=VOCAB, pad_token_id=None, bos_token_id=None, eos_token_id=None)


@functools.cache
def _made(family: str) -> Any:
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    configs = {
        "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, **rates, **SMALL),
        "gptj": lambda: transformers.GPTJConfig(
            n_embd=32, n_layer=2, n_head=2, n_positions=32, rotary_dim=8, **rates, **SMALL
        ),
        "llama": lambda: transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=32, **SMALL,
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configs[family]())
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.to(DEVICE)


def model_of(family: str) -> Any:
    return copy.deepcopy(_made(family)).train()


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def step(model: Any, **inputs: Any) -> dict[str, Tensor]:
    """Return the loss and the gradients of trainable parameters."""
    ids = tokens()
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    model.zero_grad()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **grads}  # type: ignore[dict-item]


def assert_rule(ours: dict[str, Tensor], base: dict[str, Tensor], truth: dict[str, Tensor], eps: float) -> None:
    """Check that the relative L2 error per tensor is at most 3 times the unpatched model's, plus a unit."""
    assert ours.keys() == base.keys() == truth.keys() and len(truth) > 3
    for name, t in truth.items():
        mine, theirs = (float((x[name].double() - t).norm() / t.norm()) for x in (ours, base))
        assert mine <= 3 * theirs + eps, f"{name}: {mine:.2e}, before {theirs:.2e}"


MORE_COMPILED = (("gptj", False), ("llama", False), ("gpt2", True), ("gptj", True))
EPS32, EPS16 = torch.finfo(torch.float32).eps, torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("family", "padded"),
    [("gpt2", False), ("llama", True), *(pytest.param(f, p, marks=pytest.mark.slow) for f, p in MORE_COMPILED)],
)
def test_compile_fullgraph(family: str, padded: bool) -> None:
    torch._dynamo.reset()
    model = fastgpt.patch(model_of(family))
    inputs: dict[str, Any] = {"use_cache": False}
    if padded:
        inputs["attention_mask"] = torch.ones(B, T, dtype=torch.long, device=DEVICE)
        inputs["attention_mask"][0, :3] = 0
    eager = step(model, **inputs)
    compiled = step(torch.compile(model, fullgraph=True, backend="aot_eager"), **inputs)
    for (name, t), (_, wanted) in zip(compiled.items(), eager.items()):
        torch.testing.assert_close(t, wanted, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_compile_through_inductor() -> None:
    """Compile once with the compiler's generated code between the ops."""
    torch._dynamo.reset()
    model = fastgpt.patch(model_of("llama"))
    eager, compiled = step(model), step(torch.compile(model, fullgraph=True))
    for t, wanted in zip(compiled.values(), eager.values()):
        torch.testing.assert_close(t, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_autocast(family: str) -> None:
    truth = step(model_of(family).double())
    with torch.autocast(DEVICE, torch.bfloat16):
        base, ours = step(model_of(family)), step(fastgpt.patch(model_of(family)))
    assert_rule(ours, base, truth, EPS16)
    assert all(t.dtype == torch.float32 for t in ours.values())


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    model = fastgpt.patch(model_of(family))
    wanted = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls: list[int] = []
    mlp = next(m for m in model.modules() if type(m).__name__.endswith("MLP"))
    mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    got = step(model)
    assert len(calls) == 2, "nothing was computed again"
    assert all(torch.equal(got[n], t) for n, t in wanted.items())


def lora(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(1)
    out = peft.get_peft_model(
        model, peft.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", **options)
    )
    return out.train()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lora(family: str) -> None:
    """Patch before and after adding adapters; unpatch under them and with them."""
    truth, base = step(lora(model_of(family)).double()), step(lora(model_of(family)))
    before, after = lora(fastgpt.patch(model_of(family))), fastgpt.patch(lora(model_of(family)))
    for model in (before, after):
        assert_rule(step(model), base, truth, EPS32)
        assert {e.part for e in fastgpt.patch_report(model).replaced} >= {"norm", "mlp", "attention", "loss"}
        assert model(input_ids=tokens(), labels=tokens()).logits is None
        fastgpt.unpatch(model)
        assert all(torch.equal(t, base[n]) for n, t in step(model).items())
    keys = [n for n, _ in lora(model_of(family)).named_parameters()]
    assert keys == [n for n, _ in before.named_parameters()]


def test_a_head_with_an_adapter_has_its_own_loss(caplog: pytest.LogCaptureFixture) -> None:
    fallback._reported.clear()
    model = lora(fastgpt.patch(model_of("llama")), modules_to_save=["lm_head"])
    base = step(lora(model_of("llama"), modules_to_save=["lm_head"]))
    for name, t in step(model).items():
        torch.testing.assert_close(t, base[name], rtol=1e-4, atol=1e-5)
    assert "its head was replaced after patching" in caplog.text
    late = fastgpt.patch(lora(model_of("llama"), modules_to_save=["lm_head"]))
    assert {e.op for e in fastgpt.patch_report(late).replaced if e.part == "loss"} == {"cross_entropy"}
    for name, t in step(late).items():
        torch.testing.assert_close(t, base[name], rtol=1e-4, atol=1e-5)


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(VOCAB, (T - i % 3,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def pad(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad as data collators do: right padding, an attention mask, -100."""
    width = max(len(r["input_ids"]) for r in rows)
    filled = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = [{**r, "attention_mask": torch.ones_like(r["input_ids"])} for r in rows]
    return {
        k: torch.stack([nn.functional.pad(r[k], (0, width - len(r[k])), value=v) for r in rows])
        for k, v in filled.items()
    }


def train(model: Any, folder: Path, optimizer: Any = torch.optim.AdamW, collator: Any = pad, **options: Any) -> Any:
    settings: dict[str, Any] = dict(
        output_dir=str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=DEVICE == "cpu", disable_tqdm=True, seed=0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    arguments = transformers.TrainingArguments(**settings | options)
    optimizers = (optimizer(model.parameters(), lr=1e-2, weight_decay=0.0), None)
    trainer = transformers.Trainer(
        model, arguments, data_collator=collator, train_dataset=Tokens(), eval_dataset=Tokens(), optimizers=optimizers
    )
    trainer.train()
    return trainer


def losses(trainer: Any) -> Tensor:
    return torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row])


def test_trainer_with_flattened_batches(tmp_path: Path) -> None:
    """Documents in one row, separated by position ids alone."""
    collator = transformers.DataCollatorWithFlattening()
    assert collator([Tokens()[0], Tokens()[1]])["position_ids"].tolist()[0][T : T + 2] == [0, 1]
    models = [model_of("llama"), fastgpt.patch(model_of("llama"))]
    base, ours = (losses(train(m, tmp_path, collator=collator)) for m in models)
    torch.testing.assert_close(ours, base, rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, AdamW], ids=["torch", "fastgpt"])
def test_trainer(family: str, optimizer: Any, tmp_path: Path) -> None:
    """Padded batches, accumulation normalised by num_items_in_batch, and evaluation match the unpatched model."""
    base = train(model_of(family), tmp_path)
    ours = train(fastgpt.patch(model_of(family)), tmp_path, optimizer)
    assert len(losses(base)) == 3 and losses(base).unique().numel() == 3
    torch.testing.assert_close(losses(ours), losses(base), rtol=1e-4, atol=0)
    wanted, got = base.evaluate()["eval_loss"], ours.evaluate()["eval_loss"]
    assert got == pytest.approx(wanted, rel=1e-4)
    fastgpt.unpatch(ours.model)


def test_trainer_in_bf16_with_checkpointing_and_saved_weights(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(bf16=True, gradient_checkpointing=True)
    base = train(model_of("llama"), tmp_path / "a", **options)
    ours = train(fastgpt.patch(model_of("llama")), tmp_path / "b", **options)
    torch.testing.assert_close(losses(ours), losses(base), rtol=2e-2, atol=0)
    ours.save_model(tmp_path / "c")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c").to(DEVICE)
    assert loaded.config._attn_implementation == "sdpa", "what is saved is nobody's but transformers'"
    ids = tokens()
    with pytest.raises(ValueError, match="forward was wrapped after patching; unwrap it first"):
        fastgpt.unpatch(ours.model)
    unwrapped = ours.accelerator.unwrap_model(ours.model_wrapped, keep_fp32_wrapper=False)
    own = fastgpt.unpatch(unwrapped).float().eval()
    assert torch.equal(loaded.eval()(ids).logits, own(ids).logits)


PARALLEL = """
import copy, os, sys, torch, torch.distributed as dist, transformers
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import fastgpt
sys.path.insert(0, os.environ["TESTS"])
from test_patching_integrations import B, model_of, tokens

dist.init_process_group("gloo")
rank, ids = dist.get_rank(), tokens()
half = ids.chunk(2)[rank]
for family in ("gpt2", "llama"):
    alone, one, many = fastgpt.patch(model_of(family)), fastgpt.patch(model_of(family)), fastgpt.patch(model_of(family))
    ddp = DistributedDataParallel(one)
    layers = many.transformer.h if family == "gpt2" else many.model.layers
    for block in layers:
        fully_shard(block)
    fully_shard(many)
    runs = [(m, torch.optim.SGD(m.parameters(), lr=0.1), x) for m, x in ((alone, ids), (ddp, half), (many, half))]
    for _ in range(3):
        for model, optimizer, x in runs:
            out = model(input_ids=x, labels=x)
            assert out.logits is None
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, wanted), a, b in zip(alone.named_parameters(), one.parameters(), many.parameters()):
        for got in (a, b.full_tensor()):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6, msg=lambda m: f"{family} {name}: {m}")
    fastgpt.unpatch(many)
    torch.testing.assert_close(many(input_ids=half).logits, alone.eval()(input_ids=half).logits, rtol=1e-4, atol=1e-4)
    print(f"held {family}\\n", end="", flush=True)  # in one write: two processes share the line
dist.barrier()
os._exit(0)  # threads of gloo that are still alive may abort the usual exit
"""


def run(code: str, *launcher: str, limit: int = 300, **env: str) -> str:
    """Return the standard output of Python code in separate processes, started in an empty folder."""
    here = Path(__file__).parent
    path = os.pathsep.join([p for p in sys.path if p])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TESTS": str(here), **env}
    command = [sys.executable, *launcher, *([] if launcher else ["-c"]), *([] if launcher else [code])]
    folder = env.get("FOLDER", "/")
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder, timeout=limit)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_ddp_and_fsdp2(tmp_path: Path) -> None:
    """Two processes on gloo: weights after three steps match those of one process with the whole batch."""
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL, encoding="utf-8")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
    out = run("", *launcher, FOLDER=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert out.count("held gpt2") == 2 and out.count("held llama") == 2


def test_bench_before_and_after(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """Run `python -m fastgpt.bench.patching` at a shape that takes milliseconds, with its variants in this process."""
    monkeypatch.setattr(bench, "Apart", lambda name, shape, serve: bench.Variant(name, shape))
    real = bench.figures
    monkeypatch.setattr(bench, "figures", lambda v, *rest: real(setattr(v, "peak_mb", 1.0) or v, *rest))
    command = ["--device", "cpu", "--shape", "tiny", "--steps", "2", "--ablation", "--json", str(tmp_path / "rows")]
    assert bench.main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text(encoding="utf-8").splitlines()]
    names = ["transformers", "patched", *(f"only {p}" for p in ("norm", "mlp", "attention", "loss", "embedding"))]
    assert [r["variant"] for r in rows] == names and all(r["machine"]["date"] and r["ms"] > 0 for r in rows)
    assert "losses 0.0e+00 apart" not in capsys.readouterr().out, "the variants are the same"
    assert bench.main(["--device", "cpu", "--quick", "--shape", "gemma2", "--shape", "llama"]) == 0
    assert "2 families, before / after: least" in capsys.readouterr().out
    monkeypatch.setitem(bench.TOLERANCE, "fp32", 1e-12)
    assert bench.main(command[:6]) == 1 and "no speed is shown: loss of" in capsys.readouterr().out
