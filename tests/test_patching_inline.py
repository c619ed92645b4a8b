"""fastgpt.patch on attention that a forward of transformers writes out: types whose source is recognised, and forwards
that do something else with the scores or the mask, which are not."""

from __future__ import annotations

import copy
import math
from typing import Any

import encoder_models
import pytest
import torch
from patched_pairs import DEVICE
from torch import Tensor, nn

import fastgpt
from fastgpt import ops
from fastgpt.patching import _inline

KINDS = ("megatron-bert", "roformer", "tapas", "pvt_v2")


def pair(kind: str, **extra: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return a model, the same one patched, and inputs, padded on the right if they are tokens."""
    model = encoder_models.make(kind, **extra).to(DEVICE)
    given = encoder_models.inputs_of(model, "right padding")
    return model, fastgpt.patch(copy.deepcopy(model), quiet=True), {n: t.to(DEVICE) for n, t in given.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_that_are_never_computed(kind: str) -> None:
    model, patched, given = pair(kind)
    assert not [e for e in fastgpt.patch_report(patched).left if e.part == "attention"]
    with ops.use(strict=True):
        got = patched(**given).logits
    torch.testing.assert_close(got, model(**given).logits, atol=1e-4, rtol=1e-4)


def test_dropout_of_the_weights() -> None:
    """Dropout of weights leaves the mean over many rows as it is; without it, nothing is random."""
    model, patched, given = pair("megatron-bert", attention_probs_dropout_prob=0.5)
    block = patched.bert.encoder.layer[0].attention.self
    x = torch.randn(1, 8, 64, device=DEVICE).expand(2000, -1, -1)
    kept = block.eval()(x)[0]
    dropped = block.train()(x)[0]
    assert torch.equal(kept, block.eval()(x)[0]) and not torch.allclose(dropped, kept, atol=1e-3)
    assert float((dropped.mean(0) - kept[0]).norm() / kept[0].norm()) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_requested_weights_are_the_model_s_own(kind: str) -> None:
    """PVT has no mask, whose own form would lead to PyTorch."""
    model, patched, given = pair(kind)
    wanted, got = (m(**given, output_attentions=True).attentions for m in (model, patched))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["megatron-bert", "tapas"])
def test_masks_of_the_caller(kind: str) -> None:
    """A 4D mask runs on PyTorch, which is an error in strict mode."""
    model, patched, given = pair(kind)
    seen = given["attention_mask"]
    given["attention_mask"] = torch.where(seen[:, None, None, :] > 0, 0.0, torch.finfo(torch.float32).min).expand(
        -1, -1, seen.shape[1], -1
    )
    torch.testing.assert_close(patched(**given).logits, model(**given).logits, atol=1e-4, rtol=1e-4)
    with ops.use(strict=True), pytest.raises(RuntimeError, match="attention: a mask other than"):
        patched(**given)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["megatron-bert", "pvt_v2"])
def test_compiled_whole(kind: str) -> None:
    model, patched, given = pair(kind)
    with torch.no_grad():
        got = torch.compile(patched, fullgraph=True, backend="eager")(**given).logits
        torch.testing.assert_close(got, model(**given).logits, atol=1e-4, rtol=1e-4)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.other = nn.Dropout(0.1), nn.Identity()


def usual(self: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None) -> Any:
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores = scores / math.sqrt(16)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1)
    weights = self.dropout(weights)
    return torch.matmul(weights, v), weights


def nested(self: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None) -> Any:
    weights = nn.functional.softmax(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(16), dim=-1)
    return self.dropout(weights) @ v


def masked_first(self: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Any:
    scores = torch.matmul(q, k.transpose(-1, -2)) + attention_mask
    scores = scores / math.sqrt(16)
    return torch.matmul(nn.functional.softmax(scores, dim=-1), v)


def biased(self: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    scores = torch.matmul(q, k.transpose(-1, -2)) + bias
    return torch.matmul(nn.functional.softmax(scores, dim=-1), v)


def biased_in_place(self: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores += bias
    return torch.matmul(nn.functional.softmax(scores, dim=-1), v)


def own_mask(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    mask = torch.ones(q.shape[2], k.shape[2]).triu(1) * -1e9
    scores = torch.matmul(q, k.transpose(-1, -2)) + mask
    return torch.matmul(nn.functional.softmax(scores, dim=-1), v)


def weighted(self: Any, q: Tensor, k: Tensor, v: Tensor, heads: Tensor) -> Any:
    weights = nn.functional.softmax(torch.matmul(q, k.transpose(-1, -2)), dim=-1)
    weights = weights * heads
    return torch.matmul(weights, v)


def over_queries(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.matmul(nn.functional.softmax(torch.matmul(q, k.transpose(-1, -2)), dim=-2), v)


def softmax_of_values(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = nn.functional.softmax(torch.matmul(q, k.transpose(-1, -2)), dim=-1)
    return torch.matmul(weights, nn.functional.softmax(v, dim=-1))


def looked_at(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = torch.matmul(q, k.transpose(-1, -2))
    weights = nn.functional.softmax(scores, dim=-1)
    return torch.matmul(weights, v) * scores.amax()


def other_module(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = nn.functional.softmax(torch.matmul(q, k.transpose(-1, -2)), dim=-1)
    return torch.matmul(self.other(weights), v)


def mask_twice(self: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Any:
    scores = torch.matmul(q, k.transpose(-1, -2)) + attention_mask
    return torch.matmul(nn.functional.softmax(scores, dim=-1), v) * attention_mask.amax()


@pytest.mark.parametrize("forward", [usual, nested])
def test_forwards_that_write_attention_out(forward: Any) -> None:
    assert _inline.writes_attention(forward, Attention())


@pytest.mark.parametrize(
    "forward",
    [
        masked_first,
        biased,
        biased_in_place,
        weighted,
        over_queries,
        softmax_of_values,
        looked_at,
        other_module,
        mask_twice,
    ],
)
def test_forwards_that_do_more(forward: Any) -> None:
    assert not _inline.writes_attention(forward, Attention())
