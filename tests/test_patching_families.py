"""fastgpt.patch on every causal language model of transformers: one type of each group with the same patterns, and
every type in the extended tests."""

from __future__ import annotations

import copy
from typing import Any

import causal_matrix
import causal_models
import matrix
import pytest
import torch
import transformers
from torch import Tensor, nn

import fastgpt
from fastgpt import ops
from fastgpt.patching import _attention, _eager, _masks, _rope
from fastgpt.patching import _replace as replace

ROWS = {row.kind: row for row in causal_matrix.recorded()}


def assert_recorded(row: matrix.Row, *names: str) -> None:
    """Check that nothing is wrong with a type and, in the version of transformers that was recorded, its results."""
    assert not row.wrong
    if transformers.__version__.startswith("5.23."):
        found, wanted = causal_matrix.record_of(row), causal_matrix.record_of(ROWS[row.kind])
        assert {n: found[n] for n in names} == {n: wanted[n] for n in names}


def check(kind: str, quick: bool = False) -> matrix.Row:
    if kind not in causal_models.types():
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    return causal_matrix.kept(kind, None, quick)


@pytest.mark.parametrize("kind", causal_matrix.groups(ROWS.values()))
def test_one_type_of_each_group(kind: str) -> None:
    row = check(kind, quick=True)
    assert row.ops and not row.uncompared
    assert_recorded(row, "model", "ops", "left", "patterns")


@pytest.mark.extended
@pytest.mark.parametrize("kind", ROWS)
def test_every_type(kind: str) -> None:
    assert_recorded(check(kind), *causal_matrix.RECORDED)


def test_the_page_and_its_aim() -> None:
    rows = list(ROWS.values())
    assert sum(row.full for row in rows) >= 120
    assert causal_matrix.page(rows) == causal_matrix.PAGE.read_text(encoding="utf-8")
    if transformers.__version__.startswith("5.23."):
        assert list(ROWS) == causal_models.types()


def half(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, ...]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return tuple(x * cos + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * sin for x in (q, k))


def backwards(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, ...]:
    return half(q, k, cos, -sin, unsqueeze_dim)


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None], sin[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def keys_only(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, ...]:
    return q, half(q, k, cos, sin, unsqueeze_dim)[1]


def last_columns(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat((x[..., :-8], half(x[..., -8:], x[..., -8:], cos, sin)[0]), -1)


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (half, dict(layout="halves", interleaved=False, sign=1)),
        (backwards, dict(layout="halves", interleaved=False, sign=-1)),
        (neighbours, dict(layout="once", interleaved=True, sign=1, heads_at=1)),
        (keys_only, None),
        (last_columns, None),
    ],
)
def test_rotations(function: Any, wanted: dict[str, Any] | None) -> None:
    r = _rope.recognise(function)
    assert (r is not None) == (wanted is not None)
    if r is not None:
        assert {n: getattr(r, n) for n in wanted or {}} == wanted


def test_attention_with_sinks_and_values_of_another_width() -> None:
    """A sink is one more score without a value; keys and values may differ in width."""
    torch.manual_seed(0)
    q, k, v, sinks = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 24), torch.randn(4)
    y = _attention.attend(q, k, v, sinks=sinks, causal=True)
    scores = q @ k.repeat_interleave(2, 1).mT / 8**0.5
    scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    p = torch.cat((scores, sinks[None, :, None, None].expand(2, 4, 5, 1)), -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(y, (p @ v.repeat_interleave(2, 1)).transpose(1, 2))


def passes_on(self: Any, x: Tensor, attention_mask: Any = None) -> Any:
    mask = attention_mask if attention_mask is not None else None
    return self.layer(x, mask=mask, other=attention_mask)


def slices(self: Any, x: Tensor, attention_mask: Any = None) -> Any:
    return self.layer(x, attention_mask[:, :, :, :3])


def adds(self: Any, x: Tensor, causal_mask: Any = None) -> Any:
    return x + causal_mask


def test_who_computes_with_a_mask() -> None:
    assert not _masks.computes(passes_on)  # type: ignore[arg-type]
    assert _masks.computes(slices) and _masks.computes(adds)  # type: ignore[arg-type]


def plain_eager(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **rest: Any) -> Any:
    p = (query @ key.mT * scaling + mask).softmax(-1)
    return (p @ value).transpose(1, 2), p


def squared_eager(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **rest: Any
) -> Any:
    p = (query @ key.mT * scaling + mask).softmax(-1).square()
    return (p @ value).transpose(1, 2), p


def test_eager_functions_are_judged_by_what_they_compute() -> None:
    assert _eager._usual(plain_eager, False)
    assert not _eager._usual(squared_eager, False)
    assert not _eager._usual(plain_eager, True), "it does not read its module's sinks"


class OwnAttention(nn.Module):
    """Eager attention in a method, as in GPT-J and CodeGen."""

    def __init__(self, dropped: str = "weights", later: float = 1.0) -> None:
        super().__init__()
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.5), nn.Dropout(0.1)
        self.layer_idx, self.scale_attn, self.dropped, self.later = 3, 3.0, dropped, later

    def _attn(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> tuple[Tensor, Tensor]:
        scores = query @ key.mT / self.scale_attn
        p = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
        if self.training:
            p = p * self.later
        y = (self.attn_dropout(p) if self.dropped == "weights" else p) @ value
        return self.attn_dropout(y) if self.dropped == "result" else y, p


def test_methods_are_judged_by_what_they_compute() -> None:
    assert _eager.method(OwnAttention()) == _eager.Method("scale_attn", True, "attn_dropout")
    assert _eager.method(OwnAttention("nothing")) == _eager.Method("scale_attn", True)
    assert _eager.method(OwnAttention("result")) is None, "dropout of the result is not dropout of the weights"
    assert _eager.method(OwnAttention(later=2.0)) is None, "it differs in training"
    other = OwnAttention()
    other.scale_attn = torch.tensor(5.0)  # type: ignore[assignment]
    assert _eager.method(other) is None, "no number of the module explains its scale"


def test_a_method_reads_its_numbers_at_every_call() -> None:
    torch.manual_seed(0)
    module, (q, k, v) = OwnAttention().eval(), torch.randn(3, 2, 4, 5, 16)
    how = _eager.method(module)
    assert how is not None
    module.scale_attn = 0.5
    added = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)
    nothing = torch.zeros(2, 0, 1, dtype=torch.long)  # causal order, without padding
    torch.testing.assert_close(_eager.attend(module, how, q, k, v, nothing)[0], module._attn(q, k, v, added)[0])
    with pytest.raises(RuntimeError, match="mask"), ops.use(strict=True):
        _eager.attend(module, how, q, k, v, added)


class Scaled(nn.Module):
    """MLP with numbers before its activation and behind its last layer, dropout as a function, and casts."""

    def __init__(self, gated: bool, narrow: bool = True) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(8, 12), nn.Linear(12, 8), nn.SiLU() if gated else nn.GELU()
        self.gate, self.p, self.first, self.last = nn.Linear(8, 12) if gated else None, 0.0, 0.7, 1.3
        self.narrow = narrow

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            y = self.act(self.up(x) * self.first)
        else:
            gate = self.gate(x)
            y = self.act(gate.float()) * self.up(x).float()
            y = y.to(gate.dtype) if self.narrow else y
        return nn.functional.dropout(self.down(y), p=self.p, training=self.training) * self.last


@pytest.mark.parametrize("gated", [False, True])
def test_mlps_with_numbers_and_dropout(gated: bool) -> None:
    torch.manual_seed(0)
    model, x = Scaled(gated), torch.randn(3, 8)
    wanted = model(x)
    fastgpt.patch(model, quiet=True)
    report = fastgpt.patch_report(model)
    assert [e.op for e in report.replaced] == ["swiglu" if gated else "bias_gelu"] and not report.left
    with ops.use(strict=True):
        torch.testing.assert_close(model(x), wanted)
    model.p = 1.0
    assert not model(x).any() and model.eval()(x).any()
    model.last = 0.0
    assert not model(x).any()


def test_mlps_that_stay_in_fp32_are_left() -> None:
    model = Scaled(True, narrow=False)
    fastgpt.patch(model, quiet=True, dry_run=True)
    assert [e.op for e in fastgpt.patch_report(model).left] == [""]


class Packed(nn.Module):
    """A gated MLP whose gate is one half of a linear layer's output."""

    def __init__(self, second: bool) -> None:
        super().__init__()
        self.up, self.down, self.act, self.second = nn.Linear(8, 12), nn.Linear(6, 8), nn.SiLU(), second

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, dim=-1)
        return self.down(b * self.act(a) if not self.second else a * self.act(b))


@pytest.mark.parametrize("second", [False, True])
def test_packed_gates(second: bool) -> None:
    torch.manual_seed(0)
    model, x = Packed(second), torch.randn(3, 8)
    wanted = model(x)
    fastgpt.patch(model)
    (entry,) = fastgpt.patch_report(model).replaced
    assert entry.op == "swiglu" and not fastgpt.patch_report(model).left
    with ops.use(strict=True):
        torch.testing.assert_close(model(x), wanted)
    model.act = nn.Tanh()  # type: ignore[assignment]
    assert not torch.allclose(model(x), wanted)


class Gated(nn.Module):
    """RMSNorm in two groups of x silu(gate)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps, self.group_size = nn.Parameter(torch.randn(12)), 1e-3, 6

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        y = (x * nn.functional.silu(gate)).unflatten(-1, (2, 6))
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight


def test_norms_with_a_gate_and_without_weights() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"gated": Gated(), "plain": nn.RMSNorm(8, elementwise_affine=False)})
    x, gate = torch.randn(3, 12), torch.randn(3, 12)
    wanted = model["gated"](x, gate)
    fastgpt.patch(model)
    assert {e.name: e.op for e in fastgpt.patch_report(model).replaced} == {"gated": "rms_norm", "plain": "rms_norm"}
    torch.testing.assert_close(model["gated"](x, gate), wanted)
    model["gated"].group_size = 12  # its code does not read it: nothing changes
    torch.testing.assert_close(model["gated"](x, gate), wanted)


class Shifted(nn.Embedding):
    """Positions from 2 on, from the shape of the input."""

    def forward(self, ids: Tensor, past: int = 0) -> Tensor:  # type: ignore[override]
        return super().forward(torch.arange(past, past + ids.shape[1]).expand(len(ids), -1) + 2)


class Halved(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) / 2


def test_embeddings_that_compute_their_rows() -> None:
    model, ids = nn.ModuleList([Shifted(9, 4), Halved(9, 4)]), torch.randint(9, (2, 5))
    wanted = [model[0](ids), model[0](ids, past=2), model[1](ids)]
    fastgpt.patch(model)
    report = fastgpt.patch_report(model)
    assert [e.name for e in report.replaced] == ["0"] and [e.why for e in report.left] == ["it has its own forward"]
    for got, want in zip([model[0](ids), model[0](ids, past=2), model[1](ids)], wanted):
        assert torch.equal(got, want)


def test_squared_relu_alone() -> None:
    act = transformers.activations.ReLUSquaredActivation()
    x = torch.randn(4, 6, requires_grad=True)
    wanted = torch.autograd.grad(act(x).sum(), x)[0]
    assert replace.activation(act) == "relu2"
    got = torch.autograd.grad(replace.activate(act, x).sum(), x)[0]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", ["cohere", "granite", "gemma2", "minicpm3"])
def test_heads_that_scale_or_softcap(kind: str) -> None:
    """What a forward does around its head is found by running it, and counts at every call."""
    model = causal_models.make(kind).train()
    patched = fastgpt.patch(copy.deepcopy(model))
    ids = causal_models.tokens()
    assert any(e.op == "linear_cross_entropy" for e in fastgpt.patch_report(patched).replaced)
    ours, theirs = (m(input_ids=ids, labels=ids) for m in (patched, model))
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert ours.logits is None and type(ours) is type(theirs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_last_queries_of_layers_that_share_keys(packed: bool, keep: int) -> None:
    """Gemma 4 keeps only the last queries, and their masks, in layers that use the keys and values of others."""
    if "gemma4_text" not in causal_models.types():
        pytest.skip(f"transformers {transformers.__version__} has no gemma4_text")
    model, ids = causal_models.make("gemma4_text"), causal_models.tokens()
    assert model.config.num_kv_shared_layers
    patched = fastgpt.patch(copy.deepcopy(model), quiet=True)
    given = causal_matrix.inputs_of("packed") if packed else {}
    ours, theirs = (m(input_ids=ids, logits_to_keep=keep, **given).logits for m in (patched, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
