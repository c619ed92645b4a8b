"""The other ways into a transformers model: the attention registry, the patch mapping, layers for `kernels`, and the
command that reports without weights."""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_parity import InFp64
from patched_pairs import DEVICE, NO_TOKENS, TEN, VOCAB, B, T, agree, assert_rule, make, step, tokens
from test_patching_survival import packed, padded
from torch import nn
from transformers import monkey_patching
from transformers.loss.loss_utils import ForCausalLMLoss

import fastgpt
from fastgpt.core import fallback
from fastgpt.core.errors import UserError
from fastgpt.patching import _mlp, _norm, command, hub, registries

each_kind = pytest.mark.parametrize("kind", TEN)


@pytest.fixture(autouse=True)
def registered() -> None:
    registries.register_attention()


def selected(kind: str, **extra: Any) -> Any:
    """Return an unpatched model whose attention is fastgpt's."""
    model = make(kind, **extra)
    model.set_attn_implementation("fastgpt")
    return model


@each_kind
@pytest.mark.parametrize("given", [dict, packed, padded], ids=["plain", "packed", "padded"])
def test_attention_by_its_name(kind: str, given: Any) -> None:
    """A model loaded with attn_implementation="fastgpt" obeys the rule, without a patch."""
    base, ours = step(make(kind), **given()), step(selected(kind), **given())
    wide = make(kind).double()
    with InFp64():
        truth = step(wide, **given())
    if given is padded:  # tokens that see nothing differ between transformers' implementations, too
        for found in (base, ours, truth):
            found["logits"] = found["logits"][padded()["attention_mask"].bool()]
    assert_rule(ours, base, truth)
    assert any(not torch.equal(ours[n], t) for n, t in base.items()), "it was not used"


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_loading_by_name_and_generating(kind: str, tmp_path: Path) -> None:
    make(kind).save_pretrained(tmp_path)
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path, attn_implementation="fastgpt").to(DEVICE).eval()
    plain = auto.from_pretrained(tmp_path).to(DEVICE).eval()
    settings: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, attention_mask=padded()["attention_mask"])
    for way in ({}, {"cache_implementation": "static"}):
        wanted = plain.generate(tokens(), **settings, **way, return_dict_in_generate=True, output_logits=True)
        assert agree(model.generate(tokens(), **settings, **way), wanted.sequences, wanted.logits) >= 3
    model.save_pretrained(tmp_path / "again")
    assert "fastgpt" not in (tmp_path / "again" / "config.json").read_text(encoding="utf-8")
    fastgpt.patch(model, quiet=True)  # both at once
    wanted = plain.generate(tokens(), **settings, return_dict_in_generate=True, output_logits=True)
    assert agree(model.generate(tokens(), **settings), wanted.sequences, wanted.logits) >= 3


@pytest.mark.slow
def test_attention_by_its_name_in_one_graph() -> None:
    torch._dynamo.reset()
    given = {"use_cache": False, "attention_mask": padded()["attention_mask"]}
    model = selected("llama").eval()
    with torch.no_grad():
        wanted = model(tokens(), **given).logits
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens(), **given).logits
    torch.testing.assert_close(got, wanted)


def test_masks_of_four_dimensions_and_softcap_run_on_transformers_code(caplog: pytest.LogCaptureFixture) -> None:
    fallback._reported.clear()
    seen = torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6
    seen |= torch.eye(T, dtype=torch.bool, device=DEVICE)
    lowest = torch.zeros(seen.shape, device=DEVICE).masked_fill(~seen, torch.finfo(torch.float32).min)
    for kind in ("llama", "gemma2"):  # Gemma 2 has a softcap, which PyTorch's function lacks
        plain, model = make(kind).eval(), selected(kind).eval()
        for mask in (lowest, seen if kind == "llama" else lowest):
            given = dict.fromkeys(("full_attention", "sliding_attention"), mask) if kind == "gemma2" else mask
            wanted, got = (m(tokens(), attention_mask=given).logits for m in (plain, model))
            torch.testing.assert_close(got, wanted)
    assert "a mask other than" in caplog.text


def test_models_outside_the_list_get_pytorchs_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A type whose layers may change the mask runs on masks of PyTorch, causal ones on the op."""
    monkeypatch.setattr(registries, "COMPACT", frozenset())
    for given in ({}, packed(), padded()):
        base, ours = step(make("llama"), **given), step(selected("llama"), **given)
        for name, t in base.items():
            torch.testing.assert_close(ours[name], t, rtol=1e-3, atol=1e-5)


def test_a_mask_of_ours_in_full() -> None:
    """Where a call has what the op lacks, such as sinks, transformers' code gets an ordinary mask."""
    model = selected("llama").eval()
    calls: list[Any] = []

    def without(module: Any, *args: Any, **options: Any) -> Any:
        calls.append(args[3])
        return registries._library(module, *args, **options)

    x = torch.randn(B, 4, T, 16, device=DEVICE)
    made = registries.mask(
        batch_size=B, q_length=T, kv_length=T, attention_mask=padded()["attention_mask"].bool(), config=model.config,
        device=DEVICE,
    )  # fmt: skip
    assert made is not None and made.dtype == torch.int64
    layer = model.model.layers[0].self_attn
    layer.num_key_value_groups = 1
    wanted, _ = registries.attention(layer, x, x, x, made, scaling=0.3)
    got, _ = registries.attention(layer, x, x, x, made, scaling=0.3, position_bias=torch.zeros(1, 4, T, T).to(DEVICE))
    real = padded()["attention_mask"].bool()
    torch.testing.assert_close(got[real], wanted[real])


def test_models_with_code_of_their_own_say_so() -> None:
    config = transformers.CodeGenConfig(n_embd=32, n_layer=1, n_head=4, rotary_dim=8, vocab_size=VOCAB, **NO_TOKENS)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastgpt")
    with pytest.raises(ValueError, match="attention of codegen models does not use transformers' AttentionInterface"):
        model(tokens().cpu())


def test_models_patched_as_they_are_built(tmp_path: Path) -> None:
    """register_patch_mapping: from_pretrained returns a model whose layers are patched, and no other class changes."""
    plain = make("gemma")
    plain.save_pretrained(tmp_path)
    mapping = registries.patch_mapping("gemma", "llama")
    monkey_patching.register_patch_mapping(mapping)
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE)
        other = transformers.AutoModelForCausalLM.from_config(make("qwen2").config)
    finally:
        monkey_patching.unregister_patch_mapping(list(mapping))
    report = fastgpt.patch_report(loaded)
    assert {e.part for e in report.replaced} == {"norm", "mlp", "attention", "rope", "embedding"}
    assert isinstance(loaded.model, transformers.GemmaModel) and loaded.config.architectures == ["GemmaForCausalLM"]
    wide = make("gemma").double()
    with InFp64():
        truth = step(wide)
    assert_rule(step(loaded), step(make("gemma")), truth)
    with pytest.raises(ValueError, match="was not patched"):
        fastgpt.patch_report(other)
    torch.save(loaded, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert type(again.model) is transformers.GemmaModel
    fastgpt.unpatch(loaded)
    torch.testing.assert_close(loaded.eval()(tokens()).logits, plain.eval()(tokens()).logits, rtol=0, atol=0)
    with pytest.raises(UserError, match="no model of the type 'lama'"):
        registries.patch_mapping("lama")


def folder_of(kind: str, folder: Path, **settings: Any) -> str:
    config = transformers.AutoConfig.for_model(kind, **settings)
    config.save_pretrained(folder)
    return str(folder)


def test_a_report_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An 8B model, as a folder, a file and JSON."""
    large = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
    folder = folder_of("llama", tmp_path, num_key_value_heads=8, vocab_size=128256, **large)
    for name in (folder, f"{folder}/config.json"):
        assert command.main([name]) == 0
        text = capsys.readouterr().out
        assert "LlamaForCausalLM: would replace" in text and "model.layers.*.mlp (32)" in text and "left 0" in text
    assert command.main([folder, "--json", "--only", "mlp"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "LlamaForCausalLM" and len(report["replaced"]) == 32
    assert {e["part"] for e in report["replaced"]} == {"mlp"} and report["left"] == []
    assert command.main([folder_of("bert", tmp_path / "bert", num_hidden_layers=1), "--only", "rope"]) == 1


def test_what_is_no_configuration_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}', encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for name, match in (
        (str(tmp_path / "empty"), "has no configuration: expected a folder with config.json"),
        (str(tmp_path / "missing.json"), "has no configuration"),
        (str(tmp_path), "cannot read the configuration of"),
        ("nobody/nothing", "cannot read the configuration of nobody/nothing"),
    ):
        with pytest.raises(UserError, match=match) as e:
            command.main([name])
        assert "\n" not in str(e.value)


def test_a_deep_model_is_recognised_layer_by_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that are alike are run once, so patching takes no longer for more layers than visiting them does."""
    counts = []
    for depth in (2, 12):
        calls: list[int] = []
        for place, name in ((_norm, "_probe_norm"), (_mlp, "_match")):
            real = getattr(place, name)
            monkeypatch.setattr(place, name, lambda *a, real=real, calls=calls: (calls.append(1), real(*a))[1])
        config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=depth, vocab_size=32)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        fastgpt.patch(model, quiet=True)
        assert len(fastgpt.patch_report(model).replaced) > 5 * depth
        counts.append(len(calls))
        monkeypatch.undo()
    assert 0 < counts[0] == counts[1]


def calls_of_patch(model: Any) -> int:
    """Patch a model, and return how many functions were called."""
    events: list[str] = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        fastgpt.patch(model, quiet=True)
    finally:
        sys.setprofile(None)
    return events.count("call") + events.count("c_call")


def test_patching_an_8b_model_makes_few_calls() -> None:
    """The calls of functions grow with the depth and no faster. Unlike seconds, they do not depend on the machine."""
    counts = []
    shape = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    for depth in (2, 2, 17, 32):  # the first fills caches
        config = transformers.LlamaConfig(num_hidden_layers=depth, vocab_size=128256, **shape)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        counts.append(calls_of_patch(model))
        assert len(fastgpt.patch_report(model).replaced) > 5 * depth
    _, first, second, third = counts
    assert third - second < 1.02 * (second - first)
    assert third < 1_000_000


KERNELS = """
import os, sys
sys.path.sort(key=lambda p: os.path.exists(os.path.join(p, "kernels", "_runtime.py")))  # not fastgpt's folder
from pathlib import Path
import torch, transformers
from kernels import Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping, use_kernelized_func
from kernels._rust import Digest, DigestAlgorithm, Metadata
from transformers.activations import FastGELUActivation, GELUActivation, GELUTanh, NewGELUActivation
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as columns_once
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.nanochat.modeling_nanochat import apply_rotary_pos_emb as backwards
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm
from fastgpt.patching import hub

torch.manual_seed(0)
build = hub.write_repository("repository")
metadata = Metadata.read_from_file(build / "metadata.json")
metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))
assert metadata.id.startswith("_fastgpt_") and metadata.id != metadata.name

class Holder(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = [f]
    def forward(self, *args, **kwargs):
        return self.f[0](*args, **kwargs)

small = dict(hidden_size=8, intermediate_size=12, num_attention_heads=2)
x = lambda *shape: torch.randn(*shape, dtype=torch.float64)
angles = x(2, 5, 2).repeat(1, 1, 2)
rotated = (x(2, 3, 5, 4), x(2, 1, 5, 4), angles.cos(), angles.sin())
labels = torch.randint(9, (2, 5))
CASES = [
    ("RMSNorm", LlamaRMSNorm, (8, 1e-3), (x(3, 8),)),
    ("RMSNormZeroCentered", Qwen3_5RMSNorm, (8, 1e-3), (x(3, 8),)),
    ("SwiGLUMLP", LlamaMLP, (transformers.LlamaConfig(**small, hidden_act="silu"),), (x(3, 8),)),
    ("GeGLUMLP", GemmaMLP, (transformers.GemmaConfig(**small, hidden_act="gelu_pytorch_tanh"),), (x(3, 8),)),
    ("NewGELU", NewGELUActivation, (), (x(3, 8),)),
    ("GeluTanh", GELUTanh, (), (x(3, 8),)),
    ("FastGELU", FastGELUActivation, (), (x(3, 8),)),
    ("GeLU", GELUActivation, (), (x(3, 8),)),
    ("rotary_pos_emb", apply_rotary_pos_emb, None, rotated),
    ("rotary_pos_emb", columns_once, None, (*rotated[:2], *(t[..., :2] for t in rotated[2:]))),
    ("rotary_pos_emb", backwards, None, rotated),
    ("ForCausalLMLoss", ForCausalLMLoss, None, (x(2, 5, 9), labels, 9)),
]
assert {name for name, *_ in CASES} == set(hub.LAYERS)

def results(module, inputs, dtype):
    real = lambda v: torch.is_tensor(v) and v.is_floating_point()
    given = [v.detach().to(dtype) if real(v) else v for v in inputs]
    wanted = [v.requires_grad_() for v in given[:2] if real(v)]  # not cosines and sines
    y = module(*given)
    ys = y if isinstance(y, tuple) else (y,)
    weighted = sum((t * torch.linspace(1, 2, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in ys)
    grads = torch.autograd.grad(weighted, [*wanted, *module.parameters()])
    return [t.detach().double() for t in (*ys, *grads)]

mapping = hub.mapping("repository")
for name, own, arguments, inputs in CASES:
    theirs = use_kernel_forward_from_hub(name)(type("Own" + name, (own,), {}) if arguments is not None else own)
    if arguments is None:  # a function
        made = use_kernelized_func(theirs)(type("Holder", (Holder,), {}))(theirs)
    else:
        made = theirs(*arguments)
        with torch.no_grad():
            for p in made.parameters():
                p.add_(torch.randn_like(p))
    truth, base = results(made.double(), inputs, torch.float64), results(made.float(), inputs, torch.float32)
    before = (made if arguments is not None else theirs).forward
    with use_kernel_mapping(mapping, inherit_mapping=False):
        for mode in (Mode.TRAINING, Mode.INFERENCE, Mode.TRAINING | Mode.TORCH_COMPILE):
            kernelize(made, mode=mode, device="cpu", use_fallback=False)
    replaced = (made if arguments is not None else theirs).forward
    assert replaced != before and replaced.__module__ == "fastgpt.patching.hub", name
    for i, (ours, b, t) in enumerate(zip(results(made, inputs, torch.float32), base, truth)):
        unit = torch.finfo(torch.float32).eps * max(1, float(t.abs().max()))
        error, allowed = float((ours - t).abs().max()), 3 * float((b - t).abs().max()) + unit
        assert error <= allowed, (name, i, error, allowed)
    print("held", name)
"""


def test_every_layer_in_the_kernels_library(tmp_path: Path) -> None:
    """kernelize() replaces transformers' own layers, forward and backward by the rule; the hashes are right."""
    from test_patching_integrations import run

    assert run(KERNELS, FOLDER=str(tmp_path)).count("held") == len(hub.LAYERS) + 2


def test_layers_keep_the_rules_of_the_hub(tmp_path: Path) -> None:
    """No constructor, no attribute but two, the metadata with hashes; the binary is one for the stable ABI."""
    plain = {name for name, _ in inspect.getmembers(nn.Module)}
    for name in hub.LAYERS:
        layer = getattr(hub, name)
        assert layer.__init__ is nn.Module.__init__
        assert {n for n, _ in inspect.getmembers(layer)} - plain <= {"has_backward", "can_torch_compile"}, name
    build = hub.write_repository(tmp_path)
    about = json.loads((build / "metadata.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256((build / "__init__.py").read_bytes()).digest()
    assert about["digest"] == {"algorithm": "sha256", "files": {"__init__.py": base64.b64encode(digest).decode()}}
    assert hub.write_repository(tmp_path) == build, "it may be written again"


def test_the_loss_layer_counts_tokens_as_transformers_does() -> None:
    logits, labels = torch.randn(2, 5, 9, device=DEVICE), torch.randint(9, (2, 5), device=DEVICE)
    labels[0, 2] = -100
    for given in (
        {}, {"num_items_in_batch": 4}, {"num_items_in_batch": torch.tensor(3)}, {"ignore_index": 2},
        {"shift_labels": labels.roll(1, 1)},
    ):  # fmt: skip
        if "ignore_index" in given:
            labels = labels.clamp(min=0)
        wanted = ForCausalLMLoss(logits, labels, 9, **given)  # type: ignore[arg-type]
        torch.testing.assert_close(hub.ForCausalLMLoss()(logits, labels, 9, **given), wanted)


def source_of(name: str) -> list[tuple[str, str]]:
    """Return (module, name) of every class or function of transformers that is registered under this name."""
    import ast

    found, models = [], Path(transformers.__file__).parent / "models"
    for path in sorted(models.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if f'use_kernel_forward_from_hub("{name}")' not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                if any(f"use_kernel_forward_from_hub('{name}')" in ast.unparse(d) for d in node.decorator_list):
                    found.append((f"transformers.models.{path.parent.name}.{path.stem}", node.name))
    return found


def as_layer(function: Any) -> nn.Module:
    """Return a layer made from a function, as `kernels` makes it."""

    class Made(nn.Module):
        def forward(self, *args: Any) -> Any:
            return function(*args)

    return Made()


def test_the_rotation_that_is_replaced_decides_on_the_columns() -> None:
    """gpt-oss registers one with a column for each pair; compiled, too. One that the op lacks runs as it is."""
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as once

    g = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(2, *s, generator=g) for s in ((4, 3, 8), (2, 3, 8), (3, 4), (3, 4)))
    layer, wanted = as_layer(once), once(q, k, cos, sin)
    layer.forward = types.MethodType(hub.RotaryPosEmb.forward, layer)  # type: ignore[method-assign]
    for call in (layer, torch.compile(layer, fullgraph=True, backend="eager")):
        for ours, theirs in zip(call(q, k, cos, sin), wanted):
            torch.testing.assert_close(ours, theirs)
    other = as_layer(lambda q, k, cos, sin, unsqueeze_dim=1: (q + cos[:, None].sum(), k))
    ours, theirs = hub.RotaryPosEmb.forward(other, q, k, cos, sin), other(q, k, cos, sin)  # type: ignore[arg-type]
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.extended
@pytest.mark.parametrize("name", ["RMSNorm", "RMSNormZeroCentered", "rotary_pos_emb"])
def test_layers_fit_everything_that_transformers_registers_under_their_names(name: str) -> None:
    """A mapping by name reaches every family: what each registers must be what the layer computes."""
    import importlib

    wrong, places = [], source_of(name)
    g = torch.Generator().manual_seed(0)
    q, k, x = (torch.randn(2, h, 3, 8, generator=g) for h in (4, 2, 1))
    angles = torch.randn(2, 3, 4, generator=g).repeat(1, 1, 2)
    for module, member in places:
        theirs = getattr(importlib.import_module(module), member)
        layer = getattr(hub, name)
        if name == "rotary_pos_emb":
            turns = angles.cos(), angles.sin()
            try:
                wanted = theirs(q, k, *turns)
            except RuntimeError:  # it takes a column for each pair
                turns = angles.cos()[..., :4], angles.sin()[..., :4]
                wanted = theirs(q, k, *turns)
            got = layer.forward(as_layer(theirs), q, k, *turns)
        else:
            own = theirs(8)
            nn.init.normal_(own.weight)
            wanted, got = (own(x),), (layer.forward(own, x),)
        if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted)):
            wrong.append(f"{module}.{member}")
    assert len(places) >= 2 and not wrong


def test_one_line_says_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    fastgpt.patch(make("llama"))
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err == "fastgpt.patch: LlamaForCausalLM: replaced norm 5, mlp 2, attention 3, rope 2, loss 2, embedding 1\n"
    fastgpt.patch(nn.ModuleList([nn.LayerNorm(8), nn.Embedding(4, 8, max_norm=1.0)]))
    assert "left embedding 1 (fastgpt.patch_report(model) says why)" in capsys.readouterr().err
    model = fastgpt.patch(make("llama"), quiet=True)
    fastgpt.patch(fastgpt.patch(model))  # it is patched already
    fastgpt.patch(make("gpt2"), dry_run=True)
    assert capsys.readouterr().err == ""


def test_nothing_to_patch_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    """It points at the caller's line, and the model can be patched and unpatched as any other."""
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="nothing to patch in Sequential") as caught:
        assert fastgpt.patch(model, only="norm", quiet=True) is model
    assert caught[0].filename == __file__
    assert str(fastgpt.patch_report(model)).startswith("replaced 0, left 0")
    model.append(nn.LayerNorm(2))
    fastgpt.patch(model)
    assert "replaced norm 1" in capsys.readouterr().err
    assert "forward" not in fastgpt.unpatch(model)[1].__dict__
    with pytest.warns(UserWarning):
        fastgpt.patch(model, only="rope")
    fastgpt.unpatch(model)
    with pytest.raises(ValueError, match="is not patched"):
        fastgpt.unpatch(model)


def test_the_command_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install fastgpt\[hf\]"):
        command.main(["a/b"])
