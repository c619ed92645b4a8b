"""fastgpt.patch on every Hugging Face family: small random models before and after, against the same code in fp64.

The rule is that of hf_parity; test_patching_families checks every causal language model.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import hf_parity
import pytest
import torch
import transformers
from hf_parity import InFp64, excess
from torch import Tensor
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fastgpt
from fastgpt.core import fallback
from fastgpt.ops._attention import attention_mask
from fastgpt.patching import _attention as hf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB, B, T, WINDOW = 197, 2, 12, 5
NO_TOKENS: dict[str, Any] = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
GPT: dict[str, Any] = dict(
    vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
)
LLAMA: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
NEO: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
    window_size=WINDOW, max_position_embeddings=64, attention_dropout=0.0, resid_dropout=0.0, embed_dropout=0.0,
)  # fmt: skip
NEOX: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip
GEMMA: dict[str, Any] = dict(head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name in the table: transformers' config class and its settings
    "GPT-2": ("GPT2Config", GPT),
    "GPT-Neo": ("GPTNeoConfig", NEO),
    "GPT-J": ("GPTJConfig", dict(rotary_dim=8, **GPT)),
    "GPT-NeoX": ("GPTNeoXConfig", NEOX),
    "Llama": ("LlamaConfig", LLAMA),
    "Mistral": ("MistralConfig", dict(sliding_window=WINDOW, **LLAMA)),
    "Qwen2": ("Qwen2Config", LLAMA),
    "Qwen3": ("Qwen3Config", dict(head_dim=16, **LLAMA)),
    "Gemma": ("GemmaConfig", dict(head_dim=16, **LLAMA)),
    "Gemma 2": ("Gemma2Config", GEMMA | LLAMA),
    "Gemma 3": ("Gemma3TextConfig", GEMMA | LLAMA),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def sdpa_mask(**options: Any) -> Tensor:
    """Return transformers' bool mask, always in full."""
    made = masking_utils.sdpa_mask(**{**options, "allow_is_causal_skip": False})
    assert made is not None
    return made


@functools.cache
def _made(family: str, dtype: torch.dtype, extra: tuple[tuple[str, Any], ...]) -> Any:
    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**{**settings, **NO_TOKENS, **dict(extra)})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():  # larger than initial weights, so that attention and norms matter
        for i, p in enumerate(model.parameters()):
            p += (0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))).to(p.dtype)
    return model.to(DEVICE)


def model_of(family: str, dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    """Return a small random model of this family, in training mode."""
    return copy.deepcopy(_made(family, dtype, tuple(extra.items()))).train()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape or (B, T), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def labels_of(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[1, 3:6] = -100
    return labels


def outcome(model: Any, ids: Tensor, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
    """Return logits, losses of several sets of labels, and every gradient of the first one."""
    return hf_parity.outcome(model, ids, labels, 8, VOCAB, **inputs)


def exact(model: Any, ids: Tensor, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
    return hf_parity.exact(model, ids, labels, 8, VOCAB, **inputs)


INPUTS = ("plain", "left padding", "right padding", "holes", "packed")


def inputs_of(kind: str) -> dict[str, Tensor]:
    """Return keyword arguments of a model's forward."""
    seen = torch.ones(B, T, dtype=torch.long, device=DEVICE)
    if kind == "left padding":
        seen[0, :4] = 0
        return {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)}
    if kind == "right padding":
        seen[1, 7:] = 0
        return {"attention_mask": seen}
    if kind == "holes":
        seen[0, 5:7] = 0
        return {"attention_mask": seen}
    if kind == "packed":
        places = torch.cat([torch.arange(5), torch.arange(T - 5)])
        return {"position_ids": places.expand(B, -1).to(DEVICE), "use_cache": False}  # type: ignore[dict-item]
    return {}


def labels_for(kind: str, eager: bool) -> Tensor:
    """Return labels of tokens(), padding included, but none where a token of an eager family sees no key.

    The output there is the mean of the values, which does not depend on the scores. Autograd through the eager code
    still gives scores a gradient, as if adding the most negative number had not absorbed them; with fastgpt it is 0.
    """
    labels = labels_of(tokens())
    if eager and kind == "left padding":
        labels[:, 1:] = labels[:, 1:].masked_fill(inputs_of(kind)["attention_mask"][:, :-1] == 0, -100)
    return labels


@functools.cache
def compared(family: str, dtype: torch.dtype, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the unpatched model's outcome, and its outcome in fp64."""
    model = model_of(family, dtype)
    given = (model, tokens(), labels_for(kind, model.config._attn_implementation == "eager"))
    return outcome(*given, **inputs_of(kind)), exact(*given, **inputs_of(kind))


def broken(family: str, dtype: torch.dtype, kind: str, **options: Any) -> dict[str, float]:
    """Return what in a patched model breaks the rule."""
    base, truth = compared(family, dtype, kind)
    model = model_of(family, dtype)
    labels = labels_for(kind, model.config._attn_implementation == "eager")
    ours = outcome(fastgpt.patch(model, **options), tokens(), labels, **inputs_of(kind))
    return excess(ours, base, truth, torch.finfo(dtype).eps)


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_losses_and_every_gradient(family: str, dtype: torch.dtype) -> None:
    assert not broken(family, dtype, "plain")
    assert not broken(family, dtype, "plain", keep_logits=True)


@each_family
@pytest.mark.parametrize("kind", INPUTS[1:])
def test_padding_and_packed_documents(family: str, kind: str) -> None:
    assert not broken(family, torch.float32, kind)


@each_family
def test_unpatched_is_bitwise_what_it_was(family: str) -> None:
    model, ids = model_of(family), tokens()
    config, keys = copy.deepcopy(vars(model.config)), list(model.state_dict())
    places = {n: (type(m), set(m.__dict__)) for n, m in model.named_modules()}
    before = outcome(model, ids, labels_of(ids))
    assert fastgpt.patch(model) is model
    assert list(model.state_dict()) == keys
    during = outcome(model, ids, labels_of(ids))
    assert any(not torch.equal(during[n], t) for n, t in before.items()), "nothing was computed by other kernels"
    assert fastgpt.unpatch(model) is model
    after = outcome(model, ids, labels_of(ids))
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert vars(model.config) == config
    assert {n: (type(m), set(m.__dict__)) for n, m in model.named_modules()} == places


@each_family
def test_generation(family: str) -> None:
    """Greedy generation with the KV cache gives the unpatched model's tokens, with and without left padding."""
    model, seen = model_of(family).eval(), torch.ones(B, T, dtype=torch.long, device=DEVICE)
    seen[0, :9] = 0
    runs: list[dict[str, Any]] = [{}, {"attention_mask": seen}, {"use_cache": False}]
    settings: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    wanted = [model.generate(tokens(), **settings, **r) for r in runs]
    assert (wanted[1].logits[-1] - wanted[0].logits[-1]).abs().max() > 1e-3, "padding changed nothing"
    fastgpt.patch(model)
    for r, out in zip(runs, wanted):
        assert torch.equal(model.generate(tokens(), **settings, **r).sequences, out.sequences), r


def trained(model: Any) -> dict[str, Tensor]:
    """Return parameters after ten steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.1)  # less of a sign function
    for step in range(10):
        ids = tokens(seed=step)
        model(input_ids=ids, labels=labels_of(ids)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {f"d{n}": p.detach() for n, p in model.named_parameters()}  # d: the rule for gradients


@each_family
def test_ten_optimizer_steps(family: str) -> None:
    wide = model_of(family).double()
    with InFp64():
        truth = trained(wide)
    start = dict(model_of(family).named_parameters())
    assert all((truth[f"d{n}"] - p.double()).norm() > 1e-3 * p.norm() for n, p in start.items()), "weights did not move"
    eps = torch.finfo(torch.float32).eps
    assert not excess(trained(fastgpt.patch(model_of(family))), trained(model_of(family)), truth, eps)


@pytest.mark.parametrize("family", ["GPT-2", "Llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(family: str, tied: bool) -> None:
    model = model_of(family, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    ids = tokens()
    base, truth = (f(model, ids, labels_of(ids)) for f in (outcome, exact))
    ours = outcome(fastgpt.patch(model), ids, labels_of(ids))
    assert not excess(ours, base, truth, torch.finfo(torch.float32).eps)


def test_the_trainers_conventions() -> None:
    """num_items_in_batch (a number or a tensor), shift_labels, ignore_index; no logits in training with labels."""
    model, patched = model_of("Llama"), fastgpt.patch(model_of("Llama"))
    ids = tokens()
    labels = labels_of(ids)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    given: list[dict[str, Any]] = [
        {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(9)}, {"shift_labels": shifted.roll(1, 0)},
        {"ignore_index": int(labels[1, 2])},
    ]  # fmt: skip
    losses = []
    for kwargs in given:
        if "ignore_index" in kwargs:  # -100 is then a class like any other
            labels = ids
        theirs, ours = (m(input_ids=ids, labels=labels, **kwargs).loss for m in (model, patched))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
        losses.append(float(ours.detach()))
    assert len(set(losses)) == len(given), "an argument was not read"
    assert patched(input_ids=ids, labels=labels).logits is None
    assert patched(input_ids=ids).logits is not None
    assert patched.eval()(input_ids=ids, labels=labels).logits is not None
    kept = fastgpt.patch(model_of("Llama"), keep_logits=True)(input_ids=ids, labels=labels)
    torch.testing.assert_close(kept.logits, model(input_ids=ids).logits)


def test_a_hook_on_the_head_sees_logits_in_training_and_counts() -> None:
    plain, ids, seen = model_of("Llama").train(), tokens(1, 8), []

    def halved(module: Any, args: Any, logits: Tensor) -> Tensor:
        seen.append(logits.shape)
        return logits / 2

    losses = []
    for model in (plain, fastgpt.patch(copy.deepcopy(plain))):
        model.lm_head.register_forward_hook(halved)
        losses.append(model(ids, labels=ids).loss)
    torch.testing.assert_close(*losses)
    assert seen == [(1, 8, VOCAB)] * 2


def test_positional_arguments_tuples_and_own_losses_are_honoured() -> None:
    ids = tokens()
    for family in ("GPT-2", "Llama", "GPT-J"):
        model, patched = model_of(family), fastgpt.patch(model_of(family))
        seen = inputs_of("left padding")["attention_mask"]
        order = (None, seen) if family != "Llama" else (seen,)  # GPT-2's second parameter is the cache
        labels = labels_of(ids)
        torch.testing.assert_close(patched(ids, *order, labels=labels).loss, model(ids, *order, labels=labels).loss)
        assert isinstance(patched(ids, labels=ids, return_dict=False), tuple)
        model.loss_function = patched.loss_function = lambda logits, labels, **kw: logits.square().mean()
        torch.testing.assert_close(patched(ids, labels=ids).loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("names", [("attn_pdrop",), ("attn_pdrop", "resid_pdrop", "embd_pdrop")])
def test_dropout_of_gpt2_is_the_same_in_distribution(names: tuple[str, ...]) -> None:
    """Compare mean and variance of the logits over many draws of the dropout masks; attention's masks are drawn by
    fastgpt."""
    model = model_of("GPT-2", **dict.fromkeys(names, 0.1))
    chunks, draws = 10, 20
    means, variances = [], []
    for seed, m in enumerate((model, fastgpt.patch(copy.deepcopy(model)))):
        torch.manual_seed(seed)
        with torch.no_grad():
            z = torch.stack([m(input_ids=tokens()).logits.double() for _ in range(chunks * draws)])
        means.append(z.mean(0))
        variances.append(z.unflatten(0, (chunks, draws)).var(1).sum((1, 2, 3)))  # (chunks,), of all logits together
    theirs, ours = variances
    spread = ((theirs.var() + ours.var()) / chunks).sqrt()
    assert (ours.mean() - theirs.mean()).abs() < 4 * spread, "the variance differs by four standard errors"
    assert spread < 0.1 * theirs.mean(), "too few draws to tell"
    expected = (theirs.mean() + ours.mean()) / (chunks * draws)
    assert (means[0] - means[1]).square().sum() < 2 * expected, "the means are further apart than chance puts them"


def seen_by(mask: Tensor, t: int, s: int) -> Tensor:
    """Return which keys each token sees under a mask, whether it is fastgpt's or a bool one of transformers: (B, T,
    S)."""
    if not hf.is_ours(mask):
        return mask[:, 0]
    which: dict[str, Any] = dict.fromkeys(("cu_seqlens_q", "doc_ids", "kv_lens", "kv_start"))
    if mask.shape[1] >= 2:
        which |= dict(kv_start=mask[:, 0, 0], kv_lens=mask[:, 1, 0])
        which["doc_ids"] = mask[:, 2:, 0] if mask.shape[1] > 2 else None
    q, k = torch.zeros(len(mask), t, 1, 1), torch.zeros(len(mask), s, 1, 1)
    seen = attention_mask(q, k, dict(causal=True, window=mask.shape[2] - 1 or None, **which))
    assert seen is not None
    return seen.expand(len(mask), 1, t, s)[:, 0]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("compiling", [False, True])
def test_our_masks_say_what_transformers_masks_say(
    window: int | None, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every padding of six keys and one to six queries, check the keys that each token sees, padding tokens too;
    where no value can be read, except padding tokens between real ones."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    s, ours = 6, 0
    padding = torch.tensor([[bool(n >> i & 1) for i in range(s)] for n in range(1, 2**s)])
    holes = ~padding & (padding.cumsum(1) > 0) & (padding.flip(1).cumsum(1).flip(1) > 0)
    overlay = (
        masking_utils.sliding_window_causal_mask_function(window) if window else masking_utils.causal_mask_function
    )
    options: dict[str, Any] = dict(mask_function=overlay, local_size=window)
    for t in range(1, s + 1):
        for seen, hole in [*zip(padding[:, None], holes[:, None]), (padding, holes)]:
            given = dict(batch_size=len(seen), q_length=t, kv_length=s, q_offset=s - t, attention_mask=seen, **options)
            exact = functools.partial(sdpa_mask, **given)
            got, wanted = hf.mask(exact, **given), exact()
            assert got is not None
            ours += hf.is_ours(got)
            alike = ~hole[:, s - t :] if compiling else torch.ones_like(hole[:, s - t :])
            assert torch.equal(seen_by(got, t, s)[alike], wanted[:, 0][alike]), (t, seen)
    assert ours == (64 if compiling else 21 * s), "compiled: as many queries as keys; else: where no hole is"


def test_other_masks_fall_to_pytorch(caplog: pytest.LogCaptureFixture) -> None:
    """A caller's own 4D mask, with softcap (Gemma 2) and without, gives the right result and one message."""
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    mask[:, 2] = False
    mask[2, 2] = True
    fallback._reported.clear()
    for family in ("Gemma 2", "Llama"):
        model, patched = (m.eval() for m in (model_of(family), fastgpt.patch(model_of(family))))
        added = torch.zeros(T, T).masked_fill(~mask, torch.finfo(torch.float32).min).expand(B, 1, T, T)
        given = {k: added for k in ("full_attention", "sliding_attention")} if family == "Gemma 2" else added
        torch.testing.assert_close(
            patched(tokens(), attention_mask=given).logits, model(tokens(), attention_mask=given).logits
        )
    assert sum("a mask other than" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("family", ["GPT-Neo", "Llama", "Mistral", "Gemma 2"])
def test_caches_and_ways_of_decoding(family: str) -> None:
    """Static caches with left padding, several tokens at once after a cache, an assistant, beams."""
    model, ids = model_of(family).eval(), tokens()
    seen = torch.ones_like(ids)
    seen[0, :4] = 0
    runs: list[dict[str, Any]] = [
        {"inputs": ids, "attention_mask": seen, "cache_implementation": "static"},
        {"inputs": ids[:1], "prompt_lookup_num_tokens": 3},
        {"inputs": ids, "attention_mask": seen, "num_beams": 2},
    ]
    patched = fastgpt.patch(copy.deepcopy(model))
    for r in runs:
        wanted, got = (m.generate(max_new_tokens=6, do_sample=False, **r) for m in (model, patched))
        assert torch.equal(got, wanted), r
    if family == "GPT-Neo":
        wanted = model.generate(ids[:1], max_new_tokens=6, do_sample=False, assistant_model=model)
        for assistant in (patched, model):
            got = patched.generate(ids[:1], max_new_tokens=6, do_sample=False, assistant_model=assistant)
            assert torch.equal(got, wanted)


@each_family
def test_a_mask_of_four_dimensions_means_what_it_meant(family: str) -> None:
    """Float and bool masks, whatever their values, use the family's own attention."""
    model, patched = (m.eval() for m in (model_of(family), fastgpt.patch(model_of(family))))
    seen = torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6
    seen |= torch.eye(T, dtype=torch.bool, device=DEVICE)
    for mask in (seen, torch.zeros(seen.shape, device=DEVICE).masked_fill(~seen, torch.finfo(torch.float32).min)):
        given = mask
        if family.startswith("Gemma "):
            given = dict.fromkeys(("full_attention", "sliding_attention"), mask)  # type: ignore[assignment]
        elif "layer_types" in vars(model.config):
            given = dict.fromkeys(model.config.layer_types, mask)  # type: ignore[assignment]
        wanted, got = (m(tokens(), attention_mask=given).logits for m in (model, patched))
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("family", ["GPT-Neo", "GPT-J", "Llama"])
def test_a_config_is_nobodys_but_its_owners(family: str, tmp_path: Path) -> None:
    """Patching a model affects neither models of the same config, nor new ones from it, nor pickled ones."""
    model = model_of(family).eval()
    patched = fastgpt.patch(copy.deepcopy(model))
    patched.config = patched.base_model.config = model.config
    sibling = type(model)(model.config).eval()
    sibling.load_state_dict(model.state_dict())
    padded = inputs_of("left padding")
    wanted = model(tokens(), **padded).logits
    torch.testing.assert_close(patched(tokens(), **padded).logits, wanted)
    assert torch.equal(sibling(tokens(), **padded).logits, wanted)
    torch.save(patched, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(loaded(tokens(), **padded).logits, wanted)
    copied = copy.deepcopy(patched)
    assert torch.equal(copied(tokens(), **padded).logits, patched(tokens(), **padded).logits)
    fastgpt.unpatch(patched)
    assert torch.equal(patched(tokens(), **padded).logits, wanted)
    torch.testing.assert_close(copied(tokens(), **padded).logits, wanted)


def test_an_implementation_that_is_set_later_counts() -> None:
    """'sdpa' and 'eager' use the op, each with its own results for padding; any other implementation gets its call
    unchanged, masks included."""
    model, patched, padded = (
        model_of("Llama").eval(),
        fastgpt.patch(model_of("Llama")).eval(),
        inputs_of("left padding"),
    )
    for name in ("eager", "sdpa", "eager"):
        for m in (model, patched):
            m.set_attn_implementation(name)
        wanted, got = model(tokens(), **padded), patched(tokens(), **padded)
        torch.testing.assert_close(got.logits, wanted.logits)
        assert not torch.equal(got.logits, wanted.logits)
        wanted, got = (m(tokens(), output_attentions=True, **padded).attentions for m in (model, patched))
        assert len(got) == len(wanted) == (2 if name == "eager" else 0)
        torch.testing.assert_close(got, wanted)
    calls: list[Any] = []

    def own(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        calls.append(mask)
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    transformers.AttentionInterface.register("own", own)
    transformers.AttentionMaskInterface.register("own", masking_utils.sdpa_mask)
    for m in (model, patched):
        m.set_attn_implementation("own")
    # the rest of the model runs on the ops, so results are close and not equal
    torch.testing.assert_close(patched(tokens(), **padded).logits, model(tokens(), **padded).logits)
    assert len(calls) == 4 and all(m.dtype == torch.bool and m.dim() == 4 for m in calls)


def test_a_window_that_is_set_later_counts() -> None:
    models = [model_of("Mistral").eval(), fastgpt.patch(model_of("Mistral")).eval()]
    before = models[0](tokens()).logits
    for m in models:
        m.config.sliding_window = 3
    wanted, got = (m(tokens()).logits for m in models)
    torch.testing.assert_close(got, wanted)
    assert not torch.allclose(wanted, before)


def test_continuous_batching() -> None:
    """Test GPT-J, whose positions are int32 here; a paged cache is left to the library's attention."""
    settings = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=VOCAB, pad_token_id=0)
    batches = []
    for m in (model_of("GPT-J").eval(), fastgpt.patch(model_of("GPT-J")).eval()):
        made = m.generate_batch(inputs=[[5, 6, 7, 8], [9, 10]], generation_config=settings, progress_bar=False)
        batches.append([made[k].generated_tokens for k in sorted(made)])
    assert batches[0] == batches[1] and [len(x) for x in batches[0]] == [3, 3]
    given: dict[str, Any] = {"cache": object(), "scaling": 0.5}
    x = torch.zeros(1, 1, 2, 4)
    got = hf.attention(lambda *a, **options: (a, options), False, torch.nn.Module(), x, x, x, None, **given)
    assert got[0][1] is x and got[0][4] is None and got[1] == given


def test_attention_in_fp32_of_gpt2() -> None:
    """reorder_and_upcast_attn is a separate method in eager attention."""
    models = [model_of("GPT-2", reorder_and_upcast_attn=True, attn_implementation="eager") for _ in range(2)]
    fastgpt.patch(models[1])
    for kind in ("plain", "left padding"):
        wanted, got = (m(tokens(), **inputs_of(kind)).logits for m in models)
        torch.testing.assert_close(got, wanted)
        assert not torch.equal(got, wanted)


def test_what_no_op_computes_is_left() -> None:
    """A model whose MLP has ReLU and whose attention has its own code keeps both, with a reason."""
    sizes = dict(d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=96, vocab_size=VOCAB)
    config = transformers.TrOCRConfig(**sizes, activation_function="relu", **{**NO_TOKENS, "pad_token_id": 1})
    model = fastgpt.patch(transformers.TrOCRForCausalLM(config))
    left = {e.part: e.why for e in fastgpt.patch_report(model).left if e.part != "embedding"}
    assert "computes attention in its own way" in left["attention"] and left["mlp"] == "the ops have no ReLU"
    with pytest.raises(ValueError, match="strict, but .* the ops have no ReLU"):
        fastgpt.patch(fastgpt.unpatch(model), strict=True)


def test_attention_of_another_class_keeps_its_masks() -> None:
    """A custom attention among the family's would not understand fastgpt's masks, so no module receives them."""
    model = model_of("GPT-J")
    model.transformer.h[1].attn._attn = lambda *args: None
    with pytest.raises(
        ValueError, match="attention transformer.h.1.attn: _attn of this instance is not that of its class"
    ):
        fastgpt.patch(model, only="attention", strict=True)
    fastgpt.patch(model)
    left = {e.name: e.why for e in fastgpt.patch_report(model).left if e.part == "attention"}
    assert left["transformer"] == "h.1.attn (GPTJAttention) has its own attention"
    masks: list[Any] = []
    model.transformer.h[1].attn._attn = lambda q, k, v, mask=None: (masks.append(mask), (v, None))[1]
    model(tokens())
    assert masks[0].dim() == 4


def test_cross_attention_and_classifiers() -> None:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(add_cross_attention=True, **GPT, **NO_TOKENS)).eval()
    memory, seen = torch.randn(B, 7, 64), torch.ones(B, 7, dtype=torch.long)
    seen[0, 4:] = 0
    patched = fastgpt.patch(copy.deepcopy(model))
    for mask in (None, seen):
        inputs = dict(input_ids=tokens().cpu(), encoder_hidden_states=memory, encoder_attention_mask=mask)
        torch.testing.assert_close(patched(**inputs).logits, model(**inputs).logits)
    config = transformers.LlamaConfig(**{**LLAMA, **NO_TOKENS, "pad_token_id": 0})
    judge = transformers.LlamaForSequenceClassification(config).eval()
    shown = inputs_of("right padding")["attention_mask"].cpu()
    given = {"input_ids": tokens().cpu().clamp(min=1) * shown, "attention_mask": shown}  # it reads the last real token
    wanted = judge(**given, labels=torch.tensor([0, 1]))
    got = fastgpt.patch(judge)(**given, labels=torch.tensor([0, 1]))
    torch.testing.assert_close((got.loss, got.logits), (wanted.loss, wanted.logits))


class OwnForCausalLM(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.loss = out.loss + 1
        return out


def test_a_subclass_with_a_forward_of_its_own_keeps_it() -> None:
    torch.manual_seed(0)
    model, ids = OwnForCausalLM(transformers.LlamaConfig(**LLAMA, **NO_TOKENS)).train(), tokens()
    before = model(ids, labels=ids)
    fastgpt.patch(model)
    assert [e.why for e in fastgpt.patch_report(model).left] == ["it has its own forward"]
    torch.testing.assert_close(model(ids, labels=ids).loss, before.loss)
