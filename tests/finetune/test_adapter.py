"""Adapters in PEFT's files: the same logits, gradients and steps in peft and here, in fp32; what is refused."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import distance, ids, logits, make
from torch import Tensor

from fastgpt.core import tensorfile
from fastgpt.core.errors import UserError
from fastgpt.finetune.adapter import adapter_state, load_adapter, save_adapter
from fastgpt.finetune.lora import Lora, add_lora, lora_layers, read_merged, remove_lora
from fastgpt.inference import Generator, Request
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.models.weights import load_pretrained, save_pretrained, write_pretrained
from fastgpt.models.weights.fingerprint import fingerprint

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
LIMIT = 1e-5  # of the logits' scale
FAMILIES = ("gpt2", "gpt_neo", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma")


def with_peft(base: Path, **options: Any) -> Any:
    """Return the model in a folder with an adapter of PEFT whose B is not 0."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = dict(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM") | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GPT-2: fan_in_fan_out is set to True
        theirs = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(0.0, 0.1)
    return theirs.eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder with the base model of each family."""
    folders = {name: tmp_path_factory.mktemp("bases") / name for name in FAMILIES}
    for name, folder in folders.items():
        make(name).save_pretrained(folder)
    return folders


def opened_by_peft(base: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of keys that are missing or unexpected PEFT only warns
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        return peft.PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_of_peft_comes_in_and_goes_out(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    theirs = with_peft(bases[name])
    theirs.save_pretrained(tmp_path / "in")
    expected = logits(theirs, ids())
    ours = load_pretrained(bases[name])
    assert distance(logits(ours, ids()), expected) > 100 * LIMIT, "the adapter changes nothing"
    load_adapter(ours, tmp_path / "in", name)
    assert distance(logits(ours, ids()), expected) < LIMIT
    save_adapter(ours, tmp_path / "out", "base", family=name, base=fingerprint(load_pretrained(bases[name])))
    sent, back = (tensorfile.load_file(tmp_path / f / "adapter_model.safetensors") for f in ("in", "out"))
    assert sent.keys() == back.keys() and all(torch.equal(sent[key], back[key]) for key in sent)
    again = opened_by_peft(bases[name], tmp_path / "out")
    assert distance(logits(again, ids()), expected) < LIMIT
    merged = again.merge_and_unload()
    write_pretrained(tmp_path, ours.config, read_merged(ours), dtype=torch.float32, model_type=name)
    mine = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for key, p in merged.state_dict().items():  # facts Q14: merging rounds
        assert distance(mine[key], p) < 1e-6, key
    assert distance(logits(remove_lora(ours), ids()), expected) < LIMIT


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["q_proj", "v_proj"]),
        dict(target_modules=r".*layers\.1\..*(k_proj|down_proj)", use_rslora=True),
        dict(target_modules=["up_proj"], lora_dropout=0.2, layers_to_transform=[1]),
        dict(target_modules=["o_proj", "model.layers.0.mlp.gate_proj"], init_lora_weights="gaussian"),
    ],
    ids=["two of three", "expression, rsLoRA", "one layer, dropout", "whole names"],
)
def test_some_modules_of_a_packed_layer(options: dict[str, Any], bases: dict[str, Path], tmp_path: Path) -> None:
    theirs = with_peft(bases["llama"], **options)
    theirs.save_pretrained(tmp_path / "in")
    ours = load_pretrained(bases["llama"])
    layers = load_adapter(ours, tmp_path / "in")
    assert all(m.dropout == options.get("lora_dropout", 0.0) for m in layers.values())
    assert distance(logits(ours, ids()), logits(theirs, ids())) < LIMIT
    save_adapter(ours, tmp_path / "out")
    again = opened_by_peft(bases["llama"], tmp_path / "out")
    assert distance(logits(again, ids()), logits(theirs, ids())) < LIMIT
    sent, back = (tensorfile.load_file(tmp_path / f / "adapter_model.safetensors") for f in ("in", "out"))
    assert sent.keys() == back.keys()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_each_row_of_a_batch_is_as_peft_with_its_adapter(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Three adapters of PEFT and none; ranks, scales and modules differ."""
    packed = {"gpt2": "c_attn", "llama": "v_proj", "gpt_neox": "query_key_value"}[name]
    kinds: dict[str, dict[str, Any]] = {
        "a": {},
        "b": dict(r=8, lora_alpha=3, use_rslora=True, target_modules=[packed], layers_to_transform=[1]),
        "c": dict(r=2, target_modules=[packed]),
    }
    theirs: dict[str | None, Any] = {key: with_peft(bases[name], **options) for key, options in kinds.items()}
    for key, model in theirs.items():
        model.save_pretrained(tmp_path / str(key))
    theirs[None] = transformers.AutoModelForCausalLM.from_pretrained(bases[name])
    asked = [
        Request(ids()[0, : 4 + 2 * i].tolist(), 6 - i % 3, temperature=0, logprobs=4, ignore_eos=True, adapter=key)
        for i, key in enumerate(["a", None, "b", "c", "a", "b", None])
    ]
    base = load_pretrained(bases[name])
    for request, result in zip(asked, Generator(base, adapters={k: tmp_path / k for k in kinds}).generate(asked)):
        start = len(request.prompt) - 1
        z = logits(theirs[request.adapter], torch.tensor([[*request.prompt, *result.ids]]))[0, start:-1]
        limit = 2 * LIMIT * float(z.abs().max())
        assert result.logprobs is not None and result.top_logprobs is not None
        for row, token, logprob, top in zip(z.log_softmax(-1), result.ids, result.logprobs, result.top_logprobs):
            assert all(abs(float(row[i]) - value) < limit for i, value in [(token, logprob), *top])
            assert float(row[token]) > float(row.max()) - limit, "the most likely token, or one that is as likely"


def test_the_adapter_of_a_model_with_adjacent_pairs_is_reordered_as_its_weights(tmp_path: Path) -> None:
    sizes: dict[str, Any] = dict(n_layers=2, n_heads=4, n_kv_heads=2, width=32, vocab_size=97, block_size=32)
    kind: dict[str, Any] = dict(norm="rms", tied=False, positions="rope", rope_interleaved=True, activation="swiglu")
    biases = dict(qkv_bias=False, proj_bias=False, mlp_bias=False)
    ours, g = GPT(ModelConfig(**sizes, **kind, **biases)).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    save_pretrained(ours, tmp_path / "base")
    for m in add_lora(ours, Lora(rank=3), generator=g).values():
        m.lora_B.data.normal_(0.0, 0.1, generator=g)
    save_adapter(ours, tmp_path / "adapter")
    theirs = opened_by_peft(tmp_path / "base", tmp_path / "adapter")
    assert distance(logits(theirs, ids()), logits(ours, ids())) < LIMIT
    before = {name: p.clone() for name, p in adapter_state(ours).items()}
    load_adapter(remove_lora(ours, merged=False), tmp_path / "adapter")
    assert all(torch.equal(p, before[name]) for name, p in adapter_state(ours).items())
    assert distance(logits(theirs, ids()), logits(ours, ids())) < LIMIT


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_ten_steps_are_those_of_peft(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    options = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0) if name == "gpt2" else {}
    theirs = with_peft(bases[name])
    for key, value in options.items():
        setattr(theirs.config, key, value)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(bases[name])
    load_adapter(ours, tmp_path, name)
    sides = []
    for model in (theirs, ours):
        trained = [p for p in model.parameters() if p.requires_grad]
        sides.append((model, trained, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)))
    batches = torch.randint(97, (2, 2, 17), generator=torch.Generator().manual_seed(2))
    first = 0.0
    for step in range(10):
        batch = batches[step % 2]
        losses, grads = [], []
        for model, trained, optimizer in sides:
            optimizer.zero_grad()
            inputs, labels = batch[:, :-1], batch[:, 1:]
            if model is ours:
                loss = ours(inputs, labels)
            else:
                z = theirs(inputs).logits
                loss = torch.nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            losses.append(loss.item())
            grads.append(peft_gradients(theirs) if model is theirs else our_gradients(ours, name))
            optimizer.step()
        first = first or losses[0]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert grads[0].keys() == grads[1].keys()
        for key, g in grads[0].items():
            assert float((g - grads[1][key]).norm() / g.norm()) < 1e-4, key
    assert losses[0] < 0.9 * first, "nothing was learned"
    for key, p in peft.get_peft_model_state_dict(theirs).items():
        mine = adapter_state(ours, name)[key]
        assert float((p - mine).norm() / p.norm()) < 1e-4, key


def peft_gradients(model: Any) -> dict[str, Tensor]:
    return {n.replace(".default", ""): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def our_gradients(model: GPT, family: str) -> dict[str, Tensor]:
    """Return the gradients of the adapters under PEFT's names."""
    held = {p: p.detach().clone() for m in lora_layers(model).values() for p in (m.lora_A, m.lora_B)}
    with torch.no_grad():
        for p in held:
            p.copy_(p.grad)
        found = {name: t.clone() for name, t in adapter_state(model, family).items()}
        for p, value in held.items():
            p.copy_(value)
    return found


@pytest.fixture(scope="module")
def plain(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter for the Llama."""
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    ours = load_pretrained(bases["llama"])
    add_lora(ours, Lora(rank=3))
    save_adapter(ours, folder, "llama")
    return folder


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": (dict(peft_type="IA3"), "has peft_type 'IA3', expected 'LORA'"),
    "DoRA": (dict(use_dora=True), "has use_dora, which fastgpt's adapters do not have"),
    "whole modules": (dict(modules_to_save=["lm_head"]), "has modules_to_save"),
    "ranks by module": (dict(rank_pattern={"q_proj": 4}), "has rank_pattern"),
    "biases": (dict(bias="lora_only"), "has bias 'lora_only', expected 'none'"),
    "a changed base": (dict(init_lora_weights="pissa"), "belongs to a changed base"),
    "unknown modules": (
        dict(target_modules=["c_attn"]),
        "another model: it targets c_attn, the modules here are .*q_p",
    ),
    "fewer modules": (dict(target_modules=["q_proj"]), "another model: it has beyond the model's .*down_proj.lora_A"),
    "another rank": (dict(r=4), r"another model: it has in another shape .*\[3, 32\] for \[4, 32\]"),
    "no rank": (dict(r=None), "is damaged: r is None"),
    "no expression": (dict(target_modules="("), "is damaged: target_modules is not a regular expression"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_do_not_fit(case: str, plain: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    change, said = REFUSED[case]
    config = json.loads((plain / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((plain / "adapter_model.safetensors").read_bytes())
    ours = load_pretrained(bases["llama"])
    with pytest.raises(UserError, match=said):
        load_adapter(ours, tmp_path)
    assert not lora_layers(ours) and all(p.requires_grad for p in ours.parameters())


def test_adapters_of_other_models(plain: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another model: it targets .*q_proj.* the modules here are .*c_attn"):
        load_adapter(load_pretrained(bases["gpt2"]), plain)
    deeper = GPT(ModelConfig(**{**load_pretrained(bases["llama"]).config.__dict__, "n_layers": 3}))
    with pytest.raises(UserError, match="another model: it misses .*layers.2"):
        load_adapter(deeper, plain)
    (tmp_path / "adapter_config.json").write_bytes((plain / "adapter_config.json").read_bytes())
    ours = load_pretrained(bases["llama"])
    with pytest.raises(UserError, match="has no adapter, expected adapter_model.safetensors"):
        load_adapter(ours, tmp_path)
    state = tensorfile.load_file(plain / "adapter_model.safetensors")
    state[next(iter(state))].view(-1)[0] = float("nan")
    tensorfile.save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="NaN or infinite values in base_model"):
        load_adapter(ours, tmp_path)
    with pytest.raises(UserError, match="has no adapters to save"):
        save_adapter(ours, tmp_path / "new")
    load_adapter(ours, plain)
    with pytest.raises(UserError, match="has adapters already"):
        load_adapter(ours, plain)
    with pytest.raises(UserError, match=r"expected remove_lora\(model\) first"):
        save_pretrained(ours, tmp_path / "new")


def test_the_code_of_the_page_runs(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[2] / "docs" / "adapters.md"
    shutil.copytree(bases["llama"], tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    exec("\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.S)), {})
    assert capsys.readouterr().out.strip().isdigit()
    assert type(opened_by_peft(tmp_path / "base", tmp_path / "adapter")).__name__ == "PeftModelForCausalLM"
    assert load_pretrained(tmp_path / "merged").config == load_pretrained(tmp_path / "base").config
