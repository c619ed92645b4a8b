"""fastgpt.nn in users' code: what falls back to torch, errors, adapters, DDP and FSDP2 in two processes."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import nn as fnn
from fastgpt import ops
from fastgpt.core import fallback
from fastgpt.nn import losses
from fastgpt.ops import use

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_reported", set())


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def numbers(*shape: int, below: int = 11) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


MASK = torch.ones(7, 7, dtype=torch.bool, device=DEVICE).triu(1)
PADDING = torch.zeros(2, 7, dtype=torch.bool, device=DEVICE)
PADDING[1, 5:] = True
Q, KV = floats(2, 7, 24), floats(2, 9, 24, seed=1)
QUIET = {"need_weights": False}


def mha(call: dict[str, Any], why: str, kv: Tensor = Q, **options: Any) -> tuple[Any, ...]:
    return "MultiheadAttention", (24, 4), {"batch_first": True, **options}, (Q, kv, kv), call, why


# name, constructor's arguments and keywords, inputs, the call's keywords, the logged text
UNCOVERED: dict[str, tuple[Any, ...]] = {
    "probabilities": ("CrossEntropyLoss", (), {}, (floats(5, 11), floats(5, 11).softmax(1)), {}, "probabilities"),
    "images": ("CrossEntropyLoss", (), {}, (floats(2, 11, 3), numbers(2, 3)), {}, "input of 3 dimensions"),
    "one row": ("CrossEntropyLoss", (), {}, (floats(11), numbers()), {}, "input of 1 dimensions"),
    "max_norm": ("Embedding", (11, 6), {"max_norm": 1.0}, (numbers(2, 9),), {}, "max_norm=1.0:"),
    "scale_grad": ("Embedding", (11, 6), {"scale_grad_by_freq": True}, (numbers(9),), {}, "scale_grad_by_freq=True:"),
    "sparse": ("Embedding", (11, 6), {"sparse": True}, (numbers(9),), {}, "sparse=True:"),
    "out_features": (
        "LinearCrossEntropyLoss",
        (6, 11),
        {"out_features": (2,)},
        (floats(5, 6), numbers(5, 2)),
        {},
        r"out_features=\(2,\)",
    ),
    "linear probabilities": (
        "LinearCrossEntropyLoss",
        (6, 11),
        {"bias": True},
        (floats(5, 6), floats(5, 11).softmax(1)),
        {},
        "probabilities",
    ),
    "weight of bf16": (
        "RMSNorm",
        (6,),
        {"dtype": torch.bfloat16},
        (floats(5, 6),),
        {},
        "weight of torch.bfloat16 with x",
    ),
    "weights": mha({}, "need_weights=True"),
    "mask": mha({**QUIET, "attn_mask": MASK}, "attn_mask without is_causal"),
    "causal and padded": mha(
        {**QUIET, "attn_mask": MASK, "is_causal": True, "key_padding_mask": PADDING}, "key_padding_mask with is_causal"
    ),
    "additive padding": mha({**QUIET, "key_padding_mask": -9.0 * PADDING}, "key_padding_mask of torch.float32"),
    "causal, more keys": mha(
        {**QUIET, "is_causal": True, "attn_mask": torch.ones(7, 9, dtype=torch.bool, device=DEVICE).triu(1)},
        "different numbers of keys",
        kv=KV,
    ),
    "bias_kv": mha(QUIET, "add_bias_kv", add_bias_kv=True),
    "zero attention": mha(QUIET, "add_zero_attn", add_zero_attn=True),
}


def outcome(module: nn.Module, inputs: tuple[Tensor, ...], call: dict[str, Any]) -> list[Tensor]:
    leaves = {id(t): t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs}
    out = module(*(leaves[id(t)] for t in inputs), **call)
    outs = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    sum(t.sum() for t in outs).backward()
    grads = [p.grad.to_dense() for p in module.parameters() if p.grad is not None]
    return [*outs, *grads, *(t.grad for t in leaves.values() if t.grad is not None)]


def need_torchs_own(kind: str) -> None:
    if not hasattr(nn, kind):
        pytest.skip(f"torch.nn of PyTorch {torch.__version__} has no {kind}")


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_an_op_does_not_cover_goes_to_torchs_own(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The bits are those of the stock module; two calls log one line; strict mode raises an error."""
    kind, args, options, inputs, call, why = UNCOVERED[name]
    need_torchs_own(kind)
    ours, stock = (getattr(m, kind)(*args, **options).to(DEVICE) for m in (fnn, nn))
    ours.load_state_dict(stock.state_dict())
    for _ in range(2):
        ours.zero_grad(), stock.zero_grad()
        got, wanted = outcome(ours, inputs, call), outcome(stock, inputs, call)
        assert len(got) == len(wanted) and all(torch.equal(a, b) for a, b in zip(got, wanted))
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1 and lines[0].startswith(f"{kind}: ") and "falling back to PyTorch" in lines[0]
    with use(strict=True), pytest.raises(RuntimeError, match=f"^{kind}: .*{why}.*strict mode"):
        ours(*inputs, **call)


@pytest.mark.parametrize("name", ["probabilities", "scale_grad", "out_features", "mask"])
def test_torchs_own_compiles_whole_and_is_logged(name: str, caplog: pytest.LogCaptureFixture) -> None:
    kind, args, options, inputs, call, _ = UNCOVERED[name]
    need_torchs_own(kind)
    ours = getattr(fnn, kind)(*args, **options).to(DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(*inputs, **call), ours(*inputs, **call)
    assert len([r for r in caplog.records if r.name == "fastgpt"]) == 1
    torch.testing.assert_close(got, wanted)
    with use(strict=True), pytest.raises(Exception, match="strict mode"):
        compiled(*inputs, **call)


def test_options_beyond_torchs() -> None:
    """z_loss and softcap in both losses match the formula; chunks change nothing; what torch lacks is an error."""
    x, y = floats(9, 6), numbers(9)
    linear = fnn.LinearCrossEntropyLoss(6, 11, bias=True, z_loss=0.01, softcap=2.0, chunk=4, ignore_index=3).to(DEVICE)
    plain = fnn.CrossEntropyLoss(z_loss=0.01, softcap=2.0, ignore_index=3)
    z = 2 * torch.tanh(linear.linear(x) / 2)
    wanted = F.cross_entropy(z, y, ignore_index=3) + 0.01 * z.logsumexp(1)[y != 3].square().mean()
    torch.testing.assert_close(linear(x, y), wanted)
    torch.testing.assert_close(plain(linear.linear(x), y), wanted)
    for loss, bad in ((linear, x), (plain, floats(9, 11))):
        with pytest.raises(ValueError, match=r"class probabilities as target, with z_loss or softcap: expected input"):
            loss(bad, floats(9, 11).softmax(1))


def test_linear_loss_without_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before PyTorch 2.13 the module is the same, but has no fallback for what the op does not cover."""
    monkeypatch.delattr(nn, "LinearCrossEntropyLoss", raising=False)
    spec = importlib.util.spec_from_file_location("older", losses.__file__)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(older := importlib.util.module_from_spec(spec))
    options: dict[str, Any] = dict(bias=True, weight=torch.linspace(0.5, 1.5, 11), label_smoothing=0.1)
    loss, newer = (m.LinearCrossEntropyLoss(6, 11, **options).to(DEVICE) for m in (older, fnn))
    loss.load_state_dict(newer.state_dict())
    assert torch.equal(loss(floats(9, 6), numbers(9)), newer(floats(9, 6), numbers(9)))
    with pytest.raises(ValueError, match="class probabilities as target: torch.nn supports it from PyTorch 2.13 on"):
        loss(floats(9, 6), floats(9, 11).softmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_class_weights_may_be_of_the_logits_dtype(dtype: torch.dtype) -> None:
    w, x, y = torch.linspace(0.5, 1.5, 11, device=DEVICE).to(dtype), floats(9, 6).to(dtype), numbers(9)
    head = floats(11, 6).to(dtype)
    loss = ops.cross_entropy(x @ head.t(), y, weight=w)
    torch.testing.assert_close(loss, ops.cross_entropy(x @ head.t(), y, weight=w.float()), rtol=0, atol=0)
    torch.testing.assert_close(loss, F.cross_entropy((x @ head.t()).float(), y, w.float()))
    torch.testing.assert_close(ops.linear_cross_entropy(x, head, y, weight=w), loss)


def test_losses_keep_16_bit_class_weights_and_all_ignored() -> None:
    loss, stock = (m.CrossEntropyLoss(torch.linspace(0.5, 1.5, 11)).to(DEVICE, torch.bfloat16) for m in (fnn, nn))
    z, y = floats(9, 11).bfloat16(), numbers(9)
    assert loss.weight.dtype == torch.bfloat16 and loss(z, y).dtype == torch.float32
    torch.testing.assert_close(loss(z, y).bfloat16(), stock(z, y))
    assert loss(z, torch.full_like(y, -100)).isnan() and stock(z, torch.full_like(y, -100)).isnan()


def test_tied_embedding_and_head_get_one_gradient() -> None:
    table, loss = fnn.Embedding(11, 6).to(DEVICE), fnn.LinearCrossEntropyLoss(6, 11).to(DEVICE)
    loss.linear.weight = table.weight
    with torch.no_grad():
        table.weight.copy_(floats(11, 6))
    loss(table(numbers(9)), numbers(9).flip(0)).backward()
    weight = floats(11, 6).requires_grad_()
    F.cross_entropy(F.linear(F.embedding(numbers(9), weight), weight), numbers(9).flip(0)).backward()
    torch.testing.assert_close(table.weight.grad, weight.grad)


def test_embedding_from_pretrained() -> None:
    table = fnn.Embedding.from_pretrained(floats(11, 6))
    assert type(table) is fnn.Embedding and not table.weight.requires_grad
    assert torch.equal(table(numbers(2, 3)), table.weight[numbers(2, 3)])


def test_attention_whose_keys_are_all_masked_is_the_bias() -> None:
    ours = fnn.Attention(24, 4, batch_first=True).to(DEVICE)
    nn.init.ones_(ours.out_proj.bias)
    x = floats(2, 7, 24).requires_grad_()
    padding = PADDING.clone()
    padding[1] = True
    y, _ = ours(x, x, x, key_padding_mask=padding, need_weights=False)
    assert torch.equal(y[1], torch.ones_like(y[1])) and not (y[0] == 1).any()
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and not x.grad[1].any()


def test_attention_refuses_a_padding_mask_of_another_shape() -> None:
    """Having as many values as there are keys is not enough: (S, B) is not (B, S)."""
    m, x = fnn.MultiheadAttention(8, 2).to(DEVICE), floats(4, 7, 8)
    with pytest.raises(AssertionError, match="key_padded_mask.shape"):
        m(x, x, x, torch.zeros(4, 7, dtype=torch.bool, device=DEVICE), need_weights=False)


def test_attention_takes_shapes_without_values() -> None:
    x = torch.empty(4, 7, 8, device="meta")
    assert fnn.MultiheadAttention(8, 2, device="meta")(x, x, x, need_weights=False)[0].shape == x.shape


def test_attention_drops_in_training_only() -> None:
    ours = fnn.Attention(24, 4, dropout=0.5, batch_first=True).to(DEVICE)
    a, b = (ours(Q, Q, Q, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(a, b)
    ours.eval()
    a, b = (ours(Q, Q, Q, need_weights=False)[0] for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("norm_first", [False, True])
def test_in_torchs_transformer_encoder(norm_first: bool) -> None:
    """Put the modules into torch.nn.TransformerEncoderLayer: padded, causal, in training and evaluation."""
    stock = nn.TransformerEncoderLayer(24, 4, 32, 0.0, "gelu", batch_first=True, norm_first=norm_first).to(DEVICE)
    ours = copy.deepcopy(stock)
    ours.self_attn = fnn.MultiheadAttention(24, 4, batch_first=True).to(DEVICE)
    ours.norm1, ours.norm2 = fnn.LayerNorm(24).to(DEVICE), fnn.LayerNorm(24).to(DEVICE)
    ours.load_state_dict(stock.state_dict())
    for options in ({}, {"src_key_padding_mask": PADDING}, {"src_mask": MASK, "is_causal": True}):
        for train in (True, False):
            got, wanted = (m.train(train)(Q, **options) for m in (ours, stock))
            torch.testing.assert_close(got, wanted)


class Doubled(nn.Module):
    """An adapter around a layer, like PEFT's."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


def test_mlp_calls_what_was_put_into_it() -> None:
    mlp, x = fnn.MLP(6, 8).to(DEVICE), floats(3, 6)
    wanted = mlp[2](F.gelu(2 * mlp[0](x)))
    seen: list[int] = []
    hook = mlp[0].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(mlp(x), mlp[2](F.gelu(mlp[0](x))))
    hook.remove()
    assert seen == [1, 1]
    mlp[0] = Doubled(mlp[0])
    torch.testing.assert_close(mlp(x), wanted)


def test_linear_loss_calls_a_layer_that_was_put_into_it_or_hooked() -> None:
    loss, x, y = fnn.LinearCrossEntropyLoss(6, 11).to(DEVICE), floats(9, 6), numbers(9)
    wanted = F.cross_entropy(loss.linear(x) / 2, y)
    handle = loss.linear.register_forward_hook(lambda m, args, z: z / 2)
    torch.testing.assert_close(loss(x, y), wanted)
    handle.remove()
    loss.linear = nn.Sequential(loss.linear, nn.Tanh())
    torch.testing.assert_close(loss(x, y), F.cross_entropy(loss.linear(x), y))


def test_rotary_tables_stay_exact_and_take_positions() -> None:
    turn = fnn.RotaryEmbedding(8, 9, theta=500.0).to(DEVICE).bfloat16()
    assert turn.cos.dtype == torch.float32 and not turn.state_dict()
    q, k = floats(1, 9, 2, 8), floats(1, 9, 1, 8, seed=1)
    whole = turn(q, k)
    last = turn(q[:, 5:], k[:, 5:], torch.arange(5, 9, device=DEVICE))
    assert all(torch.equal(a[:, 5:], b) for a, b in zip(whole, last))
    stretched = fnn.RotaryEmbedding(8, 9, theta=500.0, scaling={"rope_type": "linear", "factor": 2.0})
    torch.testing.assert_close(stretched.cos[::2], turn.cos.cpu()[:5])
    with pytest.raises(ValueError, match="rope_type is 'longrope', expected one of linear, dynamic"):
        fnn.RotaryEmbedding(8, 9, scaling={"rope_type": "longrope"})


WRONG: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: fnn.LayerNorm((3, 4))(torch.zeros(5, 2, 6)),
        r"LayerNorm: x has shape \(5, 2, 6\), expected \(..., 3, 4\)",
    ),
    (lambda: fnn.LayerNorm(4, elementwise_affine=False)(torch.zeros(2, 6)), r"expected \(..., 4\)"),
    (lambda: fnn.LayerNorm(4)(torch.zeros(2, 6)), r"layer_norm: weight has shape \(4,\), expected \(6,\)"),
    (lambda: fnn.LayerNorm(4)(torch.zeros(2, 4), torch.zeros(4)), r"layer_norm: residual has shape \(4,\)"),
    (lambda: fnn.RMSNorm((3, 4))(torch.zeros(4)), r"RMSNorm: x has shape \(4,\), expected \(..., 3, 4\)"),
    (lambda: fnn.SwiGLU(4, 8, activation="tanh")(torch.zeros(2, 4)), "swiglu: activation is 'tanh'"),
    (lambda: fnn.CrossEntropyLoss()(torch.zeros(3, 5), torch.zeros(4).long()), r"target has shape \(4,\)"),
    (lambda: fnn.Embedding(4, 2)(torch.tensor([4])), "ids reach from 4 to 4, expected 0 to 3"),
]


@pytest.mark.parametrize("call, message", WRONG, ids=[m for _, m in WRONG])
def test_errors_say_what_came_and_what_was_expected(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_repr_names_the_settings() -> None:
    assert repr(fnn.LayerNorm(8)) == repr(nn.LayerNorm(8))
    assert repr(fnn.RMSNorm(8, 1e-6, weight_offset=1.0)) == (
        "RMSNorm((8,), eps=1e-06, elementwise_affine=True, weight_offset=1.0)"
    )
    assert repr(fnn.BiasGELU(8, "tanh")) == "BiasGELU(8, approximate='tanh')"
    assert "activation='gelu'" in repr(fnn.SwiGLU(4, 8, activation="gelu"))
    assert "reduction='sum', label_smoothing=0.0, z_loss=0.5" in repr(fnn.CrossEntropyLoss(reduction="sum", z_loss=0.5))
    assert "num_classes=11, out_features=()" in repr(fnn.LinearCrossEntropyLoss(6, 11))
    assert "theta=500.0" in repr(fnn.RotaryEmbedding(8, 4, theta=500.0))


PROCESS = """
import copy, os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from fastgpt import nn as fnn
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.ops import use
from fastgpt.optim import AdamW

rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
torch.manual_seed(0)
body = torch.nn.Sequential(  # shards of unequal size: 3 and 2 blocks of partial sums, one without any element
    fnn.Embedding(3, 9000), fnn.LayerNorm(9000), fnn.Linear(9000, 5), fnn.RMSNorm(5), fnn.SwiGLU(5, 7),
    fnn.Linear(5, 1), fnn.MLP(1, 8, 11),
)
ids, loss = torch.randint(3, (4, 9)), fnn.CrossEntropyLoss()

def step(model, optimizer, rows):
    loss(model(ids[rows, :-1]).flatten(0, 1), ids[rows, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer.grad_norm.clone()

def train(model, rows):
    optimizer = AdamW(model.parameters(), lr=1e-2, max_norm=0.05)
    return [step(model, optimizer, rows) for _ in range(3)], optimizer

alone = copy.deepcopy(body)
wanted, _ = train(alone, slice(0, 4))
mine = slice(2 * rank, 2 * rank + 2)
ddp = DistributedDataParallel(copy.deepcopy(body))
norms, _ = train(ddp, mine)
torch.testing.assert_close(norms, wanted)
for p, q in zip(ddp.parameters(), alone.parameters()):
    torch.testing.assert_close(p, q)

for name in ("cpu", "torch"):
    with use(adamw=name):
        sharded = copy.deepcopy(body)
        for m in sharded:
            fully_shard(m)
        fully_shard(sharded)
        norms, optimizer = train(sharded, mine)
    torch.testing.assert_close(norms, wanted)
    for (key, p), q in zip(sharded.named_parameters(), alone.parameters()):
        assert isinstance(p, DTensor) and isinstance(optimizer.state[p]["exp_avg"], DTensor), key
        torch.testing.assert_close(p.full_tensor(), q)

shape = dict(n_layers=1, n_heads=2, width=32, vocab_size=60, vocab_multiple=2, positions="rope", block_size=16)
alone = GPT(ModelConfig(**shape, tied=False), generator=torch.Generator().manual_seed(0))
sharded = copy.deepcopy(alone)
for m in list(sharded.modules())[1:]:  # every embedding, norm and linear layer by itself
    if any(True for _ in m.parameters(recurse=False)):
        fully_shard(m)
fully_shard(sharded)
rows = torch.randint(60, (2, 17))
alone(rows[:, :-1], rows[:, 1:]).backward()
sharded(rows[rank : rank + 1, :-1], rows[rank : rank + 1, 1:]).backward()
for p, q in zip(sharded.parameters(), alone.parameters()):
    torch.testing.assert_close(p.grad.full_tensor(), q.grad)
dist.barrier()
print("both hold", flush=True)
os._exit(0)  # threads of gloo that are still alive may abort the usual exit
"""


def test_ddp_and_fsdp2_train_as_one_process_does(tmp_path: Path) -> None:
    """Two processes over gloo: after three steps, parameters and clipped norms match one process on all rows; also
    with a GPT whose layers are sharded one by one."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", PROCESS]
    started = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stdout=-1, stderr=-1, text=True, env=env)
        for rank in range(2)
    ]
    for process in started:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0 and "both hold" in out, err[-3000:]
