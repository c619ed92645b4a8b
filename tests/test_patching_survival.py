"""What a patched transformers model must survive: being saved, copied, cast, resized, tied, checkpointed, adapted,
exported and compiled; one test per way, over ten families and, in the extended tests, over one type of each group
with the same patterns."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_parity import InFp64, experts_one_by_one, in_fp64
from patched_pairs import (
    DEVICE,
    TEN,
    VOCAB,
    B,
    T,
    Trial,
    agree,
    hold,
    kinds,
    make,
    obey,
    patched,
    step,
    tokens,
    unpatched,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgpt


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(tokens()).logits
    return found


@kinds("gpt2", "gemma2")
def test_saving_and_loading(kind: str, tmp_path: Path) -> None:
    """What is saved has no trace of the patch, and can be patched again."""
    import transformers

    plain, model = make(kind), patched(make(kind))
    model.save_pretrained(tmp_path)
    assert "fastgpt" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    loads = transformers.AutoModelForCausalLM if kind in TEN else type(plain)
    loaded = loads.from_pretrained(tmp_path).to(DEVICE)
    found, wanted = loaded.state_dict(), plain.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], t) for n, t in wanted.items())
    torch.testing.assert_close(logits(loaded), logits(plain))  # products may round in another way at other addresses
    torch.testing.assert_close(logits(patched(loaded)), logits(model))


@kinds("llama")
def test_copies_and_pickled_states(kind: str) -> None:
    """A copy computes with its own weights, and a state loads into patched and unpatched models."""
    model = patched(make(kind))
    wanted, twin = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(twin), wanted)
    for p in twin.parameters():
        p.data.mul_(0.5)
    halved = logits(twin)
    assert not torch.allclose(halved, wanted) and torch.equal(logits(model), wanted)
    state = pickle.loads(pickle.dumps(twin.state_dict()))
    for other in (make(kind), patched(make(kind))):
        other.load_state_dict(state)
        torch.testing.assert_close(logits(other), halved)
    unpatched(twin)
    assert torch.equal(logits(model), wanted)


@kinds("gpt2", "gemma3_text")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_another_dtype_after_patching(kind: str, dtype: torch.dtype) -> None:
    """Casting a patched model equals patching a cast one."""

    def new() -> Any:
        return experts_one_by_one(make(kind)) if dtype == torch.float64 else make(kind)

    late, early = step(patched(new().to(dtype))), step(patched(new()).to(dtype))
    for name, t in late.items():
        assert torch.equal(early[name], t) and t.isfinite().all(), name


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("width", [16, 8], ids=["", "narrower values"])
def test_models_may_view_the_output_of_attention(backend: str, width: int) -> None:
    """It is contiguous, as that of transformers' own functions is, with every backend and after padding."""
    from fastgpt.patching import _attention

    q, k, v = (torch.randn(B, h, T, d, device=DEVICE) for h, d in ((4, 16), (2, 16), (2, width)))
    with fastgpt.ops.use(attention=backend):
        for start in (0, 4):
            seen = torch.tensor([[start, T], [0, T]], device=DEVICE)[..., None]
            for mask in (None, seen):
                y, _ = _attention.attention(print, True, nn.Module(), q, k, v, mask)
                assert y.shape == (B, T, 4, width) and y.is_contiguous()


@kinds("llama", "gpt2")
@pytest.mark.parametrize("tied", [True, False])
def test_more_tokens(kind: str, tied: bool) -> None:
    """resize_token_embeddings after patching."""

    def resized(model: Any) -> dict[str, Tensor]:
        model.resize_token_embeddings(VOCAB + 11, mean_resizing=False)
        with torch.no_grad():  # new rows are drawn at random, in the model's dtype
            for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                table[VOCAB:] = 0.01
        ids = tokens() + 11
        ids[:, 0] = VOCAB + 10
        return step(model, input_ids=ids, labels=tokens(seed=1) + 11)

    model = hold(kind, resized, tie_word_embeddings=tied)
    assert logits(model).shape[-1] == VOCAB + 11


@kinds("qwen3")
def test_tied_weights(kind: str) -> None:
    """Tied before patching, tied after it, and untied after it."""

    def tie(model: Any) -> dict[str, Tensor]:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
        return step(model)

    def untie(model: Any) -> dict[str, Tensor]:
        table = model.get_output_embeddings().weight
        model.get_output_embeddings().weight = nn.Parameter(table.detach() * 0.5)
        return step(model)

    hold(kind, step, tie_word_embeddings=True)
    hold(kind, tie, tie_word_embeddings=False)
    hold(kind, untie, tie_word_embeddings=True)


@kinds("gemma2")
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    model = patched(make(kind))
    wanted = step(model)
    model.gradient_checkpointing_enable()
    got = step(model)
    assert all(torch.equal(got[n], t) for n, t in wanted.items())


def packed() -> dict[str, Any]:
    places = torch.cat([torch.arange(5), torch.arange(T - 5)])
    return {"position_ids": places.expand(B, -1).to(DEVICE), "use_cache": False}


def padded() -> dict[str, Any]:
    seen = torch.ones(B, T, dtype=torch.long, device=DEVICE)
    seen[0, :4] = 0
    labels = tokens(seed=1).masked_fill(seen == 0, -100)
    labels[0, 4] = -100
    return {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0), "labels": labels}


@kinds("llama", "gemma3_text")
@pytest.mark.parametrize("given", [packed, padded], ids=["packed", "padded"])
def test_packed_and_padded_inputs(kind: str, given: Callable[[], dict[str, Any]]) -> None:
    hold(kind, lambda model: step(model, **given()))


@kinds("gpt2", "mistral")
def test_embeddings_and_hidden_states(kind: str) -> None:
    """inputs_embeds instead of tokens, and every hidden state."""

    def run(model: Any) -> dict[str, Tensor]:
        width = model.get_input_embeddings().weight.shape[1]
        embeds = 0.3 * torch.randn(B, T, width, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        embeds = embeds.to(next(model.parameters()).dtype)
        states = model.eval()(tokens(), output_hidden_states=True).hidden_states
        return {**step(model, inputs_embeds=embeds), **{f"state {i}": s.detach() for i, s in enumerate(states)}}

    hold(kind, run)


DECODING: dict[str, dict[str, Any]] = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "left padding": {"attention_mask": padded()["attention_mask"]},
    "static cache, left padding": {"cache_implementation": "static", "attention_mask": padded()["attention_mask"]},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


GREEDY: dict[str, Any] = dict(max_new_tokens=7, do_sample=False)
WITH_LOGITS: dict[str, Any] = dict(return_dict_in_generate=True, output_logits=True, **GREEDY)


@kinds("llama", "gemma2")
@pytest.mark.parametrize("way", DECODING)
def test_ways_of_decoding(kind: str, way: str) -> None:
    """Greedy tokens are those of the unpatched model."""
    plain, model = make(kind).eval(), patched(make(kind)).eval()
    ids = tokens(1, T) if way == "prompt lookup" else tokens()
    wanted = plain.generate(ids, **WITH_LOGITS, **DECODING[way])
    got = model.generate(ids, **GREEDY, **DECODING[way])
    seen = wanted.logits if way != "prompt lookup" else plain.generate(ids, **WITH_LOGITS).logits
    assert agree(got, wanted.sequences, seen) >= 3


@kinds("llama", "gemma2")
def test_assisted_decoding(kind: str) -> None:
    """The model has an assistant or is one, patched or not."""
    plain, model, ids = make(kind).eval(), patched(make(kind)).eval(), tokens(1, T)
    wanted = plain.generate(ids, **WITH_LOGITS)
    for one, assistant in ((model, plain), (plain, model), (model, copy.deepcopy(model))):
        assert agree(one.generate(ids, **GREEDY, assistant_model=assistant), wanted.sequences, wanted.logits) >= 3


@kinds("llama", "gemma2")
def test_beams(kind: str) -> None:
    """Beams have the scores of the unpatched model."""
    plain, model = make(kind).eval(), patched(make(kind)).eval()
    beams: dict[str, Any] = dict(num_beams=3, return_dict_in_generate=True, output_scores=True, **GREEDY)
    theirs, ours = (m.generate(tokens(), **beams).sequences_scores for m in (plain, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def lora(model: Any, **options: Any) -> Any:
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", **options)
    adapted = peft.get_peft_model(model.float(), config)  # weights drawn in fp32, so that fp64 has the same
    return adapted.to(next(model.parameters()).dtype)


@kinds("gemma", "qwen2")
@pytest.mark.parametrize("head", [False, True], ids=["all linear layers", "and the head"])
def test_adapters_before_and_after(kind: str, head: bool) -> None:
    """LoRA added before and after patching, with a head of its own or not; merged; unpatched under it."""
    untied, options = {"tie_word_embeddings": False}, dict[str, Any]()
    if head:
        model = make(kind, **untied)
        name = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
        options["modules_to_save"] = [name.rpartition(".")[2]]

    def base() -> Any:
        return lora(make(kind, **untied), **options)

    def truth() -> dict[str, Tensor]:
        wide = in_fp64(base())
        with InFp64():
            return step(wide)

    wanted = truth()["logits"].float()
    for adapted in (lambda: lora(patched(make(kind, **untied)), **options), lambda: patched(base())):
        obey(kind, functools.partial(stepped, adapted), functools.partial(stepped, base), truth)
        merged = adapted().merge_and_unload()
        torch.testing.assert_close(logits(merged), wanted, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(logits(unpatched(merged)), wanted, rtol=1e-3, atol=1e-4)


def stepped(make_model: Callable[[], Any]) -> dict[str, Tensor]:
    return step(make_model())


@kinds("llama")
def test_prompt_tuning(kind: str) -> None:
    """Virtual tokens arrive as inputs_embeds with a mask that is longer than the labels."""
    import peft

    def run(model: Any) -> dict[str, Tensor]:
        sizes = {"num_attention_heads": 1, "num_layers": 1}  # unused, but some configs have them under other names
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes)
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for p in adapted.prompt_encoder.parameters():
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
        adapted = adapted.to(next(model.base_model.parameters()).dtype)
        return step(adapted, attention_mask=torch.ones_like(tokens()))

    hold(kind, run)


@kinds("llama")
def test_quantised_linear_layers_stay(kind: str) -> None:
    """Linear layers of bitsandbytes run as they are between the ops, and the report counts them."""
    bnb = pytest.importorskip("bitsandbytes")

    def quantised(model: Any) -> Any:
        head = model.get_output_embeddings()
        places = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and m is not head]
        for name, linear in places:
            small = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None)
            small.load_state_dict(linear.state_dict())
            model.set_submodule(name, small.to(DEVICE))
        return model.requires_grad_(False), len(places)

    wider = {"intermediate_size": 128} if kind != "gpt2" else {}  # rows of whole blocks
    (plain, _), (model, n) = quantised(make(kind, **wider)), quantised(make(kind, **wider))
    if n == 0:  # GPT-2 and some others have layers of their own, which bitsandbytes does not replace
        pytest.skip(f"{kind} has no nn.Linear but its head")
    patched(model)
    if Trial.patching:
        assert f"{n} quantised Linear4bit modules stay as they are" in str(fastgpt.patch_report(model))
    unit = torch.finfo(torch.bfloat16).eps  # the products of bitsandbytes round to 16 bits
    assert (logits(model) - logits(plain)).norm() <= unit * logits(plain).norm()
    theirs, ours = (m.train()(tokens(), labels=tokens(seed=1)).loss for m in (plain, model))
    torch.testing.assert_close(ours, theirs, rtol=unit, atol=0)


class Coded(Tensor):
    """A tensor whose class decides what a product with it means, as quantised tensors are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(t: Any) -> Any:
            return 2 * t.as_subclass(Tensor) if isinstance(t, Coded) else t

        if func is nn.functional.linear:
            return func(*map(plain, args), **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_head_with_a_quantised_tensor_computes_its_own_product() -> None:
    plain, model = make("llama"), patched(make("llama"))
    losses = []
    for m in (plain, model):
        head = m.get_output_embeddings()
        del head.weight
        head.weight = (torch.randn(VOCAB, 64, generator=torch.Generator().manual_seed(0)) / 8).as_subclass(Coded)
        losses.append(m(tokens(), labels=tokens(seed=1)).loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return found


class Called(TorchDispatchMode):
    """Remembers the names of fastgpt's operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastgpt":
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@kinds("gpt2")
def test_export(kind: str) -> None:
    """The graph has the ops that the model calls, but for those whose results nothing uses, which export drops."""
    model = Logits(patched(make(kind)).eval())
    program = torch.export.export(model, (tokens(),), strict=False)
    # code under torch.no_grad in a forward, as Reformer's layers are, has a graph within the graph
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    names = {str(node.target) for graph in graphs for node in graph.nodes if "fastgpt" in str(node.target)}
    with torch.no_grad(), Called() as called:
        wanted = model(tokens())
    if Trial.patching:
        parts = ("norm", "mlp", "rope", "embedding")
        replaced = [e for e in fastgpt.patch_report(model).replaced if e.part in parts]
        ops_in = lambda found: {e.op for e in replaced if any(e.op in name for name in found)}  # noqa: E731
        assert ops_in(called.names)
        dropped = [e.name for e in replaced if e.op in ops_in(called.names) - ops_in(names)]
        for name in dropped:
            model.get_submodule(name).register_forward_hook(lambda m, given, y: y * float("nan"))
        assert torch.equal(model(tokens()), wanted), dropped
    other = tokens(seed=5)
    torch.testing.assert_close(program.module()(other), model(other))


@kinds(others=pytest.mark.extended)  # test_patching_integrations compiles gpt2 and llama, with padding, too
def test_compiled_in_one_graph(kind: str) -> None:
    """One graph in training and one in evaluation, which serve other tokens, too."""
    torch._dynamo.reset()
    model = patched(make(kind))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in (0, 2):
        given: dict[str, Any] = dict(input_ids=tokens(seed=seed), use_cache=False)
        wanted = step(model, **given)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            got = step(compiled, **given)
        for name, t in wanted.items():
            torch.testing.assert_close(got[name.replace("d", "d_orig_mod.", 1) if name[0] == "d" else name], t)


@kinds("llama")
def test_accelerate(kind: str) -> None:
    import accelerate
    from accelerate.state import AcceleratorState

    plain, model = patched(make(kind)), patched(make(kind))
    AcceleratorState._reset_state(True)  # of a trainer in bf16 before
    accelerator = accelerate.Accelerator(cpu=DEVICE == "cpu", mixed_precision="no")
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(wrapped(input_ids=tokens(), labels=tokens()).loss)
    plain(input_ids=tokens(), labels=tokens()).loss.backward()
    wanted, got = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (plain, model))
    assert wanted and got.keys() == wanted.keys() and all(torch.equal(got[n], g) for n, g in wanted.items())
    optimizer.step()
    unpatched(accelerator.unwrap_model(wrapped))


def test_a_report_of_a_patched_model_is_json() -> None:
    """A report is plain data."""
    report = fastgpt.patch_report(patched(make("llama")))
    assert json.dumps([vars(e) for e in report.replaced])
