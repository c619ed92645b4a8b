"""The contract of every op besides its values: registration, compile, selection, errors, unchanged inputs."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contract
import pytest
import torch
from contract import DEVICE, rand
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgpt import ops, parity
from fastgpt.core import backend, fallback
from fastgpt.core.backend import use
from fastgpt.core.errors import UserError
from fastgpt.ops.bias_gelu import bias_gelu_ref
from fastgpt.ops.cross_entropy import cross_entropy_ref
from fastgpt.ops.layer_norm import layer_norm_ref
from fastgpt.ops.rms_norm import rms_norm_ref
from fastgpt.ops.swiglu import swiglu_ref

KERNELS = [(op, name) for op in parity.SUBJECTS for name in parity.backends_here(op)]
ON = pytest.mark.parametrize("name", parity.backends_here("layer_norm"))


OPCHECKS = [
    (op, name, call)
    for op, calls in contract.gather("calls", None).items()
    if calls is not None
    for name in parity.backends_here(op)
    for call in calls(name)
]


@pytest.mark.parametrize("op,name,call", OPCHECKS)
def test_opcheck(op: str, name: str, call: str) -> None:
    raw, args = contract.gather("calls", None)[op](name)[call]
    torch.library.opcheck(raw, args)


def norm_and_loss(x: Tensor, r: Tensor, w: Tensor, b: Tensor, t: Tensor, inplace: bool = False) -> Tensor:
    y, s = ops.layer_norm(x, w, b, residual=r)
    return ops.cross_entropy(y @ w.diag() + s, t, inplace=inplace)


@ON
@pytest.mark.parametrize("inplace", [False, True])
def test_fullgraph_compile_with_dynamic_shapes(name: str, inplace: bool) -> None:
    compiled = torch.compile(norm_and_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with use(layer_norm=name, cross_entropy=name):
        for n in (4, 9):
            args = [rand(n, 33, seed=1), rand(n, 33, seed=2), rand(33, seed=3), rand(33, seed=4)]
            target = torch.arange(n, device=DEVICE)
            got: list[Any] = []
            expected: list[Any] = []
            for fn, out in ((compiled, got), (norm_and_loss, expected)):
                leaves = [a.clone().requires_grad_() for a in args]
                loss = fn(*leaves, target, inplace)
                loss.backward()
                out += [loss.detach(), *(leaf.grad for leaf in leaves)]
            for a, b in zip(got, expected):
                torch.testing.assert_close(a, b)


def test_changing_the_choice_recompiles_once() -> None:
    names = [n for n in parity.backends_here("layer_norm")] + ["torch"]
    if len(names) < 2:
        pytest.skip("needs two backends: no kernel is built")
    from torch._dynamo.testing import CompileCounter  # torch does not import it by itself

    counter = CompileCounter()
    compiled = torch.compile(lambda x: ops.layer_norm(x), fullgraph=True, backend=counter)
    x = rand(3, 8)
    for name in (names[0], names[-1], names[0], names[-1]):
        with use(layer_norm=name):
            compiled(x)
    assert counter.frame_count == 2


def test_use_inside_a_compiled_region_is_an_error() -> None:
    def inside(x: Tensor) -> Tensor:
        with use(layer_norm="torch"):
            return ops.layer_norm(x)

    with pytest.raises(Exception, match="outside"):
        torch.compile(inside, fullgraph=True, backend="eager")(rand(2, 4))


@ON
def test_torch_func_is_a_clear_error(name: str) -> None:
    with use(all="auto", layer_norm=name):
        for transform in (torch.func.grad(lambda x: ops.layer_norm(x).sum()), torch.vmap(ops.layer_norm)):
            with pytest.raises(RuntimeError, match="layer_norm.*torch.func"):
                transform(rand(3, 4))


@ON
def test_only_what_needs_a_gradient_gets_one(name: str) -> None:
    with use(layer_norm=name):
        for which in range(3):
            leaves = [rand(4, 8), rand(8, seed=1), rand(8, seed=2)]
            leaves[which].requires_grad_()
            ops.layer_norm(*leaves).sum().backward()
            assert [t.grad is not None for t in leaves] == [i == which for i in range(3)]


@ON
def test_unused_output_and_second_backward(name: str) -> None:
    """Use only one of (y, sum). Backward twice with retain_graph doubles the gradient, and inputs do not change."""
    with use(layer_norm=name):
        for pick in (0, 1):
            x, r, w = rand(4, 8), rand(4, 8, seed=1), rand(8, seed=2)
            before = [t.clone() for t in (x, r, w)]
            for t in (x, r, w):
                t.requires_grad_()
            out = ops.layer_norm(x, w, residual=r)[pick]
            g = rand(4, 8, seed=3)
            out.backward(g, retain_graph=True)
            once = x.grad.clone()
            out.backward(g)
            torch.testing.assert_close(x.grad, 2 * once, rtol=0, atol=0)
            torch.testing.assert_close(x.grad, r.grad, rtol=0, atol=0)
            assert all(torch.equal(a, b.detach()) for a, b in zip(before, (x, r, w)))


@pytest.mark.parametrize("op,name", KERNELS)
def test_runs_are_bitwise_equal(op: str, name: str) -> None:
    """Repeat runs, with any number of threads."""
    wanted = contract.gather("RUN_SHAPE", (67, 128))[op]
    case = next(c for c in parity.cases(op) if c.shape == wanted and parity.takes(name, c))
    results = []
    threads = torch.get_num_threads()
    for n in (1, 2, 1):
        torch.set_num_threads(n)
        with use(strict=True, **{op: name}):
            results.append(parity.SUBJECTS[op].run(case, parity.SUBJECTS[op].ours, parity.Inputs(case, DEVICE, False)))
    torch.set_num_threads(threads)
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]) and torch.equal(value, results[2][key]), key


@ON
def test_inplace_cross_entropy_refuses_what_it_would_destroy(name: str) -> None:
    t = torch.tensor([1, 2], device=DEVICE)
    leaf = rand(2, 5).requires_grad_()
    with use(strict=True, cross_entropy=name):
        with pytest.raises(ValueError, match="leaf"):
            ops.cross_entropy(leaf, t, inplace=True)
        with pytest.raises(ValueError, match="contiguous rows"):
            ops.cross_entropy((leaf * 1).t().contiguous().t(), t, inplace=True)
        loss = ops.cross_entropy(leaf * 1, t, inplace=True)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="inplace"):
            loss.backward()


def test_gradcheck_of_the_references() -> None:
    x, w, b = (rand(*s, dtype=torch.float64, seed=i).requires_grad_() for i, s in enumerate([(3, 5), (5,), (5,)]))
    residual = rand(3, 5, dtype=torch.float64, seed=9)
    assert torch.autograd.gradcheck(lambda *a: layer_norm_ref(*a, residual=residual), (x, w, b))
    assert torch.autograd.gradcheck(lambda *a: rms_norm_ref(*a, residual=residual, weight_offset=1.0), (x, w))
    target = torch.tensor([1, -100, 4], device=DEVICE)
    options = dict(label_smoothing=0.1, z_loss=0.1, softcap=3.0, weight=w.detach().abs(), vocab_size=5)
    for approximate in ("none", "tanh"):
        assert torch.autograd.gradcheck(lambda *a: bias_gelu_ref(*a, approximate=approximate), (x, b))  # noqa: B023
    up = residual.requires_grad_()
    for act in ("silu", "gelu", "relu2", "gelu_tanh"):
        assert torch.autograd.gradcheck(lambda *a: swiglu_ref(*a, activation=act), (x, up))  # noqa: B023
    logits = rand(3, 7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: cross_entropy_ref(z, target, **options), (logits,))


ERRORS: contract.Errors = [
    *(error for found in contract.gather("ERRORS", []).values() for error in found),
    (lambda: use(layer_norn="torch"), UserError, "there is no op 'layer_norn'"),
    (lambda: use(layer_norm="tritno"), UserError, "layer_norm='tritno': expected one of cuda"),
]


@pytest.mark.parametrize("call,kind,message", ERRORS, ids=[m for _, _, m in ERRORS])
@pytest.mark.skipif(DEVICE == "cuda", reason="these calls build CPU targets")
def test_errors_name_the_argument(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_use_restores_and_strict_raises(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "missing", lambda b: "it was taken away" if b != "torch" else None)
    monkeypatch.setattr(backend, "_cache", {})
    monkeypatch.setattr(fallback, "_reported", set())
    x = rand(2, 8)
    for _ in range(2):
        ops.layer_norm(x)
    assert len(caplog.records) == 1 and "it was taken away" in caplog.text
    with use(strict=True), pytest.raises(RuntimeError, match="it was taken away"):
        ops.layer_norm(x)
    with use(strict=True, layer_norm="triton"), pytest.raises(RuntimeError, match="triton was requested"):
        ops.layer_norm(x)
    with use(layer_norm="torch"):
        assert backend.select("layer_norm", x) == "torch"
        with use(all="auto"):
            assert backend._choice["layer_norm"] == "auto"
        assert backend._choice["layer_norm"] == "torch"


def test_environment_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGPT_KERNELS", "torch, adamw=auto")
    monkeypatch.setenv("FASTGPT_STRICT", "1")
    with use(all="auto", strict=False):
        backend.apply_environment()
        assert backend._choice["layer_norm"] == "torch" and backend._choice["adamw"] == "auto"
        assert fallback.strict_mode == [True]


def test_a_kernel_that_fails_its_self_check_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On a GPU (simulated here) each kernel is checked once; the verdict is cached and a failed kernel is reported."""
    calls: list[str] = []
    state = torch.get_rng_state()

    def check(name: str, device: torch.device) -> float:
        calls.append(name)
        torch.randn(3)
        if name == "triton":
            raise RuntimeError("no kernel image is available\nmore")
        return {"cuda": 0.5}[name]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretended")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: real_fork([]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(backend, "missing", lambda b: None)
    monkeypatch.setattr(backend, "_self_checks", {"layer_norm": check})
    monkeypatch.setattr(backend, "_verdicts", {})
    monkeypatch.setattr(fallback, "_reported", set())
    assert backend._select("layer_norm", "auto", "cuda", torch.float32, False) == "torch"
    assert calls == ["cuda", "triton"], "each once"
    assert "it is wrong on this device (relative error 5.0e-01)" in caplog.text
    assert "it fails on this device (RuntimeError: no kernel image is available)" in caplog.text
    monkeypatch.setattr(backend, "_self_checks", {"layer_norm": lambda name, device: calls.append(name) or 1e-7})
    monkeypatch.setattr(backend, "_verdicts", {})
    assert backend._select("layer_norm", "auto", "cuda", torch.float32, False) == "cuda"
    monkeypatch.setattr(backend, "_verdicts", {})
    assert backend._select("layer_norm", "auto", "cuda", torch.float32, False) == "cuda"
    assert backend.explain("layer_norm", "cuda", torch.float32) == ("cuda", "prior")
    assert calls == ["cuda", "triton", "cuda"], "what passed before is not run again, what is not used not at all"
    monkeypatch.setattr(torch.cuda, "synchronize", check)  # raises, as it does after a fault
    monkeypatch.setattr(backend, "_self_checks", {"layer_norm": check})
    monkeypatch.setattr(backend, "_verdicts", {"": None})
    with pytest.raises(UserError, match="layer_norm: the self-check of the triton .* FASTGPT_KERNELS=layer_norm=torch"):
        backend.refusal("layer_norm", "triton", "cuda", torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


real_fork = torch.random.fork_rng


@pytest.mark.parametrize("op,name", KERNELS)
def test_self_checks_pass_and_can_fail(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[f"fastgpt.ops.{op}"]
    if not {"cuda", "triton"} & set(backend.ops()[op]):  # only a GPU needs them
        return
    assert backend._self_checks[op](name, torch.device(DEVICE)) <= backend.SELF_CHECK_BOUND
    first = {"adamw": "PREPARE", "linear_qkv": "BWD"}.get(op, "FWD")
    monkeypatch.setitem(getattr(module, f"{op.upper()}_{first}"), name, lambda *args: None)
    with pytest.raises((TypeError, AttributeError)) if op != "adamw" else contextlib.nullcontext():
        assert backend._self_checks[op](name, torch.device(DEVICE)) > backend.SELF_CHECK_BOUND


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "settings",
    [torch.no_grad, torch.inference_mode, FakeTensorMode, lambda: default_dtype(torch.bfloat16)],
    ids=["no_grad", "inference_mode", "fake tensors", "default dtype"],
)
def test_self_checks_ignore_the_settings_of_the_caller(
    settings: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first call under these must not make working kernels look wrong."""
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: real_fork([]))
    for op, check in backend._self_checks.items():
        for name in sorted(parity.backends_here(op))[:1]:  # cpu, the fastest, if it is built
            with settings(), backend._default_settings(torch.device(DEVICE)):
                error = check(name, torch.device(DEVICE))
            assert error <= backend.SELF_CHECK_BOUND, op


def test_autocast_casts_products_and_keeps_norms_wide() -> None:
    """As under PyTorch's autocast, attention and the LM head use its dtype, norms that of their input, losses fp32."""
    q, x, w = rand(1, 4, 2, 8), rand(6, 16), rand(16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert ops.attention(q, q.bfloat16(), q, causal=True).dtype == torch.bfloat16
        assert ops.layer_norm(x, w).dtype == torch.float32
        assert ops.layer_norm(x.bfloat16(), w).dtype == torch.bfloat16
        head = rand(20, 16, seed=1).requires_grad_()
        loss = ops.linear_cross_entropy(x, head, torch.arange(6, device=DEVICE))
    loss.backward()
    assert loss.dtype == torch.float32 and head.grad is not None and head.grad.dtype == torch.float32
