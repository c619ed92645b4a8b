"""fastgpt.patch on encoders and encoder-decoders of transformers: attention in both directions, losses, MLPs that cast;
types of each recognised pattern here, all types and docs/encoders.md in the extended test."""

from __future__ import annotations

import copy
from typing import Any

import encoder_matrix
import encoder_models
import pytest
import torch
from matrix import Row
from patched_pairs import DEVICE
from torch import Tensor, nn

import fastgpt
from fastgpt import ops
from fastgpt.patching import _attention

T, S = 7, 9


@pytest.mark.parametrize("kind", encoder_matrix.GROUPS)
def test_one_type_of_each_group(kind: str) -> None:
    row = encoder_matrix.check(kind, quick=True)
    assert row.ops and not row.wrong and not row.notes, (row.wrong, row.notes)


def test_the_page_is_what_was_recorded() -> None:
    rows = encoder_matrix.recorded()
    assert [r.kind for r in rows] == encoder_models.types()
    assert encoder_matrix.page(rows) == encoder_matrix.PAGE.read_text(encoding="utf-8")


@pytest.mark.extended
@pytest.mark.parametrize("recorded", encoder_matrix.recorded(), ids=lambda row: row.kind)
def test_every_type(recorded: Row) -> None:
    row = encoder_matrix.kept(recorded.kind, None, recorded.quick)
    assert not row.wrong and encoder_matrix.record_of(row) == encoder_matrix.record_of(recorded)


def padding(kind: str, keys: int) -> Tensor | None:
    """Return which keys are real: (2, keys) bool."""
    seen = torch.ones(2, keys, dtype=torch.bool)
    if kind == "none":
        return None
    hidden = {"right": slice(keys - 3, None), "left": slice(0, 3), "between": slice(2, 4), "row": slice(0, None)}
    seen[1, hidden[kind]] = False
    return seen


@pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["none", "right", "left", "between", "row"])
@pytest.mark.parametrize(("queries", "window"), [(S, 0), (T, 0), (S, 2), (S, S - 1)])
def test_attention_in_both_directions(queries: int, window: int, kind: str, eager: bool) -> None:
    """Every query sees what it sees under the mask of transformers; only padding between keys needs that mask."""
    from transformers import masking_utils
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.bert.modeling_bert import eager_attention_forward

    own_mask = masking_utils.eager_mask if eager else masking_utils.sdpa_mask
    own: Any = eager_attention_forward if eager else sdpa_attention_forward
    which = masking_utils.sliding_window_bidirectional_mask_function(window)
    given: dict[str, Any] = dict(batch_size=2, q_length=queries, kv_length=S, attention_mask=padding(kind, S))
    given |= dict(mask_function=which if window else masking_utils.bidirectional_mask_function)
    given |= dict(local_size=window or None, allow_is_causal_skip=False, allow_is_bidirectional_skip=True)
    theirs, ours = own_mask(**given), _attention.mask(own_mask, **given)
    assert (ours is None) == (theirs is None)
    assert ours is None or _attention.is_ours(ours) == (kind != "between")

    torch.manual_seed(0)
    module: Any = nn.Module().eval()
    module.is_causal = False
    q, k, v = (torch.randn(2, 4, n, 16, requires_grad=True) for n in (queries, S, S))
    options: dict[str, Any] = dict(scaling=0.3, dropout=0.0)
    wanted = own(module, q, k, v, theirs, **options)[0]
    with ops.use(strict=kind != "between"):
        got = _attention.attention(own, eager, module, q, k, v, ours, **options)[0]
    torch.testing.assert_close(got, wanted)
    dy = torch.randn_like(wanted)
    if kind == "row" or (window and eager):  # queries that see nothing: autograd does not see their rounding
        return
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), dy) for y in (got, wanted))):
        torch.testing.assert_close(a, b)


def test_padding_that_cannot_be_read_is_left_to_transformers_in_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention, "_unreadable", lambda x: True)
    seen = padding("right", S)
    assert _attention._both_ways(seen, 2, S, S, 2, "cpu") is None
    assert _attention._both_ways(seen, 2, T, S, 0, "cpu") is None
    whole = _attention._both_ways(seen, 2, S, S, 0, "cpu")
    assert whole is not None and whole.shape == (2, 2 + S) and whole.dtype == torch.int32


class Casting(nn.Module):
    """MLP that casts to the dtype of its last weight, as in T5."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8)
        self.gate = nn.Linear(8, 6) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        if isinstance(self.down.weight, torch.Tensor) and y.dtype != self.down.weight.dtype:
            y = y.to(self.down.weight.dtype)
        return self.down(y)


class Doubling(Casting):
    """MLP that doubles what is not of the dtype of its last weight."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.up(x))
        if y.dtype != self.down.weight.dtype:
            y = 2 * y.to(self.down.weight.dtype)
        return self.down(y)


@pytest.mark.parametrize("gated", [False, True])
def test_mlps_that_cast(gated: bool) -> None:
    torch.manual_seed(0)
    model = Casting(gated).to(torch.bfloat16)
    model.down.float()
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    wanted = model(x)
    fastgpt.patch(model)
    assert {e.op for e in fastgpt.patch_report(model).replaced} == {"swiglu" if gated else "bias_gelu"}
    with ops.use(strict=True):
        got = model(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, atol=2e-2, rtol=2e-2)


def test_mlps_that_compute_by_dtype_are_left() -> None:
    model = Doubling(False)
    fastgpt.patch(model, quiet=True, dry_run=True)
    assert [e.why for e in fastgpt.patch_report(model).left] == ["its forward depends on dtypes"]


@pytest.mark.parametrize("problem", ["single_label_classification", "regression", "multi_label_classification"])
def test_losses_of_classes(problem: str) -> None:
    """Cross-entropy is ours in the losses of transformers that call it; others are computed as before."""
    import transformers

    shape: dict[str, Any] = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    shape |= dict(num_labels=3, problem_type=problem)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=8, **shape))
    x = torch.randn(4, 3, 16, 16)
    labels = torch.randint(3, (4,)) if problem.startswith("single") else torch.rand(4, 3)
    wanted = model(x, labels=labels).loss
    patched = fastgpt.patch(copy.deepcopy(model), quiet=True)
    assert [e.op for e in fastgpt.patch_report(patched).replaced if e.part == "loss"] == ["cross_entropy"]
    again = copy.deepcopy(patched)
    for m in (patched, again):
        torch.testing.assert_close(m(x, labels=labels).loss, wanted)
        fastgpt.unpatch(m)
        assert torch.equal(m(x, labels=labels).loss, wanted)


@pytest.mark.parametrize("kind", ["bart", "mt5", "whisper"])
def test_beams_and_a_static_cache(kind: str) -> None:
    """Generation of an encoder-decoder, with the keys of the encoder in the cache."""
    model = encoder_models.make(kind).to(DEVICE)
    given = {n: t.to(DEVICE) for n, t in encoder_models.inputs_of(model, "right padding").items()}
    settings: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    for more in (dict(num_beams=3), dict(cache_implementation="static")):
        wanted = model.generate(**given, **settings, **more)
        got = fastgpt.patch(copy.deepcopy(model), quiet=True).generate(**given, **settings, **more)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_attention_weights_without_padding(kind: str) -> None:
    """Eager attention without a mask returns its weights if they are requested."""
    model = encoder_models.make(kind).to(DEVICE)
    model.set_attn_implementation("eager")
    given = {n: t.to(DEVICE) for n, t in encoder_models.inputs_of(model, "plain").items()}
    patched = fastgpt.patch(copy.deepcopy(model), quiet=True)
    wanted, got = (m(**given, output_attentions=True).attentions for m in (model, patched))
    assert len(wanted) == len(got) == model.config.num_hidden_layers
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    with ops.use(strict=True):
        patched(**given)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "bart", "modernbert"])
def test_compiled_whole(kind: str) -> None:
    """A compiler sees one graph with padding, whose values it cannot read."""
    model = encoder_models.make(kind).to(DEVICE)
    given = {n: t.to(DEVICE) for n, t in encoder_models.inputs_of(model, "right padding").items()}
    given |= {n: t.to(DEVICE) for n, t in encoder_matrix.decoder_inputs(model, 0).items()}
    patched = fastgpt.patch(copy.deepcopy(model), quiet=True)
    with torch.no_grad():
        wanted = model(**given).logits
        got = torch.compile(patched, fullgraph=True, backend="eager")(**given).logits
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "bart"])
def test_checkpointing_and_attention_weights(kind: str) -> None:
    model = encoder_models.make(kind)
    given = encoder_models.inputs_of(model, "right padding")
    labels = encoder_models.labels_of(model)
    patched = fastgpt.patch(copy.deepcopy(model), quiet=True)
    grads = []
    for m in (model, patched):
        m.gradient_checkpointing_enable()
        more = dict(use_cache=False) if kind == "bart" else {}
        loss = m.train()(**given, labels=labels, **more).loss
        grads.append(torch.autograd.grad(loss, [p for p in m.parameters() if p.requires_grad], allow_unused=True))
    for a, b in zip(*grads):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for m in (model, patched):
        m.eval().set_attn_implementation("eager")
    decoder = encoder_matrix.decoder_inputs(model, 0)
    a, b = (m(**given, **decoder, output_attentions=True) for m in (model, patched))
    names = [n for n in a if "attentions" in n]
    assert names
    for n in names:
        for x, y in zip(a[n], b[n]):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
