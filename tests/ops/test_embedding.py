"""embedding: registration, bounds, order of sums, and gradients that are written to the buffer of a weight."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops, parity
from fastgpt.core.backend import use
from fastgpt.ops.embedding import EMBEDDING_BWD, EMBEDDING_BWD_ADD, EMBEDDING_FWD, embedding_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON = pytest.mark.parametrize("name", parity.backends_here("embedding"))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
IDS = torch.tensor([[4, 0, 4, 6], [4, 1, 1, 0]], device=DEVICE)
POSITIONS = torch.tensor([[0, 1, 0, 4], [2, 2, 0, 1]], device=DEVICE)


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def raw_calls(name: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    weight, position_weight, dy = rand(7, 10), rand(5, 10, seed=1), rand(2, 4, 10, seed=2)
    return {
        "fwd": (EMBEDDING_FWD[name], (IDS, weight, position_weight, POSITIONS)),
        "fwd shared": (
            EMBEDDING_FWD[name],
            (IDS.t().contiguous().t(), weight.t().contiguous().t(), position_weight, POSITIONS[0]),
        ),
        "fwd int32": (EMBEDDING_FWD[name], (IDS.int(), weight, position_weight, None)),
        "fwd plain": (EMBEDDING_FWD[name], (IDS[0, 0], weight, None, None)),
        "bwd": (EMBEDDING_BWD[name], (dy, IDS, 7)),
        "bwd strided": (EMBEDDING_BWD[name], (dy[:, :, :1].expand(2, 4, 10), IDS.t().contiguous().t().int(), 9)),
        "bwd_add": (EMBEDDING_BWD_ADD[name], (weight.clone(), dy, IDS)),
        "bwd_add fp32": (EMBEDDING_BWD_ADD[name], (rand(7, 14)[:, 2:12], dy.half(), IDS)),
    }


@ON
@pytest.mark.parametrize("call", list(raw_calls("cpu")))
def test_opcheck(name: str, call: str) -> None:
    op, args = raw_calls(name)[call]
    torch.library.opcheck(op, args)


@ON
@DTYPES
def test_an_id_outside_the_table_is_nan_and_adds_nothing(name: str, dtype: torch.dtype) -> None:
    """The tables lie between sevens, which must be neither read nor written."""
    table, rows = (torch.full((6, 9), 7.0, dtype=dtype, device=DEVICE) for _ in range(2))
    table[1:5], rows[2:4] = rand(4, 9, dtype=dtype), rand(2, 9, dtype=dtype, seed=1)
    ids = torch.tensor([-1, 3, 4, 0, 2**40, -(2**40)], device=DEVICE)
    positions = torch.tensor([0, 1, 0, 2, 0, 1], device=DEVICE)
    y = EMBEDDING_FWD[name](ids, table[1:5], rows[2:4], positions)
    assert y[[0, 2, 3, 4, 5]].isnan().all() and not y[1].isnan().any()
    torch.testing.assert_close(y[1], table[4] + rows[3])
    torch.testing.assert_close(EMBEDDING_FWD[name](ids, table[1:5], None, None)[3], table[1])
    dy, kept = rand(6, 9, dtype=dtype, seed=2), table.clone()
    expected = torch.zeros(4, 9, dtype=dtype, device=DEVICE)
    expected[3], expected[0] = dy[1], dy[3]
    assert torch.equal(EMBEDDING_BWD[name](dy, ids, 4), expected)
    EMBEDDING_BWD_ADD[name](table[1:5], dy, ids)
    torch.testing.assert_close(table[1:5], kept[1:5] + expected)
    assert same_bits(table[[0, 2, 3, 5]], kept[[0, 2, 3, 5]]), "rows without tokens, and what lies beside the table"


@ON
@DTYPES
def test_adding_touches_only_rows_that_have_tokens(name: str, dtype: torch.dtype) -> None:
    """Use a strided table in a buffer of NaN whose bits any arithmetic would change."""
    for kept_dtype in {dtype, torch.float32}:
        wide = torch.full((7, 25), math.nan, dtype=kept_dtype, device=DEVICE)
        ints = wide.view(torch.int32 if kept_dtype == torch.float32 else torch.int16)
        ints[:] = {torch.float32: 0x7F800001, torch.bfloat16: 0x7F81, torch.float16: 0x7C01}[kept_dtype]
        before = wide.clone()
        used = [0, 1, 4, 6]
        wide[used, 3:20] = rand(4, 17, dtype=kept_dtype)
        start, dy = wide[:, 3:20].clone(), rand(2, 4, 17, dtype=dtype, seed=1)
        EMBEDDING_BWD_ADD[name](wide[:, 3:20], dy, IDS)
        exact = start.double().index_add(0, IDS.flatten(), dy.double().view(8, 17))[used]
        error = (wide[used, 3:20].double() - exact).abs().max()
        assert error <= 4 * torch.finfo(kept_dtype).eps * exact.abs().max()
        wide[used, 3:20] = before[used, 3:20]
        assert same_bits(wide, before)


@ON
def test_sums_are_fp32_and_in_order(name: str) -> None:
    """Add 1000 gradients of 0.01 in bf16 on one row: a bf16 sum would stop far below."""
    dy = torch.full((1000, 40), 0.01, dtype=torch.bfloat16, device=DEVICE)
    ids = torch.full((1000,), 3, device=DEVICE)
    got = EMBEDDING_BWD[name](dy, ids, 5)
    torch.testing.assert_close(got[3].float(), dy[0].float() * 1000, rtol=2**-8, atol=0)
    assert not got[[0, 1, 2, 4]].any()
    table = torch.zeros(5, 40, device=DEVICE)
    EMBEDDING_BWD_ADD[name](table, dy, ids)
    torch.testing.assert_close(table[3], dy[0].float() * 1000, rtol=1e-5, atol=0)


@ON
@pytest.mark.parametrize("n", [1, 31, 33, 64, 1056, 9000])
def test_runs_of_every_length(name: str, n: int) -> None:
    """Sum integers, which is exact in fp32 in any order. Few rows have most of the tokens; some ids have no row."""
    g = torch.Generator().manual_seed(n)
    ids = ((torch.rand(n, generator=g) ** 6 * 90).int() - 2).to(DEVICE)  # -2 to 87
    dy = torch.randint(-8, 9, (n, 3), generator=g).float().to(DEVICE)
    exact = torch.zeros(80, 3, device=DEVICE).index_add(0, ids.clamp(0, 79), dy * ((ids >= 0) & (ids < 80))[:, None])
    assert torch.equal(EMBEDDING_BWD[name](dy, ids, 80), exact)
    table = torch.ones(80, 3, device=DEVICE)
    EMBEDDING_BWD_ADD[name](table, dy, ids)
    assert torch.equal(table, exact + 1)


@pytest.mark.skipif("cpu" not in parity.backends_here("embedding"), reason="needs the compiled CPU kernels")
def test_the_number_of_threads_changes_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    ids = (torch.rand(64, 100, generator=g) ** 4 * 1000).long()  # few rows have most of the tokens
    dy, weight = rand(64, 100, 80), rand(1000, 80, seed=1)
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        results.append((EMBEDDING_FWD["cpu"](ids, weight, weight, None), EMBEDDING_BWD["cpu"](dy, ids, 1000)))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    exact = torch.zeros(1000, 80, dtype=torch.float64).index_add(0, ids.flatten(), dy.double().view(-1, 80))
    torch.testing.assert_close(results[0][1].double(), exact, rtol=1e-5, atol=1e-4)


@ON
def test_addresses_past_2_to_31(name: str, tmp_path: Path) -> None:
    """Put the rows of the tables and of dy so far apart that row times stride exceeds 32 bits."""
    if DEVICE == "cuda":
        pytest.skip("the sparse file is host memory")
    far = 2**30 + 64
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=4 * far, dtype=torch.bfloat16)
    x = file.as_strided((4, 12), (far, 1))
    x.copy_(rand(4, 12, dtype=torch.bfloat16))
    near, ids = x.contiguous(), torch.tensor([[3, 0, 3], [2, 3, 1]])
    assert torch.equal(EMBEDDING_FWD[name](ids, x, x, ids), EMBEDDING_FWD[name](ids, near, near, ids))
    row = ids[0, 0].expand(4)
    assert torch.equal(EMBEDDING_BWD[name](x, row, 4), EMBEDDING_BWD[name](near, row, 4))
    dy = rand(2, 3, 12, dtype=torch.bfloat16, seed=1)
    for table in (x, near):
        EMBEDDING_BWD_ADD[name](table, dy, ids)
    assert torch.equal(x, near)


def both_gradients(
    ids: Tensor, weight: Tensor, rows: Tensor, dy: Tensor, positions: Tensor | None
) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in (weight, rows)]
    return torch.autograd.grad(embedding_ref(ids, *leaves, positions=positions), leaves, dy)


@ON
@pytest.mark.parametrize("positions", [None, POSITIONS[0], POSITIONS], ids=["none", "shared", "own"])
def test_gradients_go_where_a_weight_keeps_them(name: str, positions: Tensor | None) -> None:
    """The first backward overwrites a buffer of garbage, the second adds to it."""
    weight, rows, dy = rand(7, 10).requires_grad_(), rand(5, 10, seed=1).requires_grad_(), rand(2, 4, 10, seed=2)
    buffers = []
    for t in (weight, rows):
        t.grad_buffer = torch.full_like(t, math.nan, requires_grad=False)  # type: ignore[attr-defined]
        buffers.append(t.grad_buffer)  # type: ignore[attr-defined]
    wanted = both_gradients(IDS, weight, rows, dy, positions)
    with use(strict=True, embedding=name):
        for times in (1, 2):
            ops.embedding(IDS, weight, rows, positions=positions).backward(dy)
            for t, buffer, w in zip((weight, rows), buffers, wanted):
                assert t.grad is buffer
                torch.testing.assert_close(buffer, times * w)
        weight.grad = torch.ones_like(weight)  # a gradient that is not the buffer: autograd adds as usual
        ops.embedding(IDS, weight, rows, positions=positions).backward(dy)
        torch.testing.assert_close(weight.grad, 1 + wanted[0])
        assert weight.grad is not buffers[0]
        torch.testing.assert_close(buffers[0], 2 * wanted[0])


class HeadFn(torch.autograd.Function):
    """A head that writes the gradient of its weight in place, like the LM head."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        x, weight = ctx.saved_tensors
        torch.mm(dy.flatten(0, 1).t(), x.flatten(0, 1), out=weight.grad_buffer)
        weight.grad = weight.grad_buffer
        return dy @ weight, None


@ON
def test_a_tied_weight_gets_the_sum_in_its_buffer(name: str) -> None:
    weight, dy = rand(7, 10).requires_grad_(), rand(2, 4, 7, seed=3)
    (F.embedding(IDS, weight) @ weight.t()).backward(dy)
    wanted, weight.grad = weight.grad, None
    weight.grad_buffer = buffer = torch.full((7, 10), math.nan, device=DEVICE)  # type: ignore[attr-defined]
    with use(strict=True, embedding=name):
        HeadFn.apply(ops.embedding(IDS, weight), weight).backward(dy)
    assert weight.grad is buffer
    torch.testing.assert_close(buffer, wanted)


@ON
def test_only_what_needs_a_gradient_gets_one_and_backward_repeats(name: str) -> None:
    """Check also after an optimizer has changed the weight: backward does not need its values."""
    with use(strict=True, embedding=name):
        for positions in (None, POSITIONS):
            for which in range(2):
                tables = [rand(7, 10), rand(5, 10, seed=1)]
                tables[which].requires_grad_()
                before = [t.detach().clone() for t in tables]
                y = ops.embedding(IDS, *tables, positions=positions)
                y.sum().backward(retain_graph=True)
                once = tables[which].grad
                assert once is not None and tables[1 - which].grad is None
                once = once.clone()
                assert all(torch.equal(a, b.detach()) for a, b in zip(before, tables))
                with torch.no_grad():
                    tables[which].mul_(2)
                y.sum().backward()
                torch.testing.assert_close(tables[which].grad, 2 * once, rtol=0, atol=0)


@ON
def test_fullgraph_compile_with_dynamic_shapes(name: str) -> None:
    def both(ids: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        return ops.embedding(ids, weight, rows) * ops.embedding(ids, weight, rows, positions=ids.flip(-1) % 5)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    with use(strict=True, embedding=name):
        for t in (3, 4):
            results = []
            for fn in (compiled, both):
                leaves = [rand(7, 10).requires_grad_(), rand(5, 10, seed=1).requires_grad_()]
                out = fn(IDS[:, :t], *leaves)
                out.sum().backward()
                results.append([out.detach(), *(leaf.grad for leaf in leaves)])
            for a, b in zip(*results):
                torch.testing.assert_close(a, b)


@ON
def test_runs_are_bitwise_equal(name: str) -> None:
    dy = rand(2, 4, 10)
    runs = [(EMBEDDING_BWD[name](dy, IDS, 7), EMBEDDING_FWD[name](IDS, rand(7, 10), None, None)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_gradcheck_of_the_reference() -> None:
    tables = [rand(7, 3).double().requires_grad_(), rand(5, 3, seed=1).double().requires_grad_()]
    for positions in (None, POSITIONS):
        assert torch.autograd.gradcheck(lambda *a: embedding_ref(IDS, *a, positions=positions), tables)  # noqa: B023


def test_autocast_leaves_dtypes_alone() -> None:
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert ops.embedding(IDS, rand(7, 10), rand(5, 10)).dtype == torch.float32


def test_positions_are_not_read_without_position_weight() -> None:
    assert torch.equal(ops.embedding(IDS, rand(7, 10), positions=99 + POSITIONS), rand(7, 10)[IDS])


W, P = rand(7, 10), rand(5, 10)
ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.embedding(IDS.float(), W), TypeError, "embedding: ids is torch.float32, expected torch.int64"),
    (lambda: ops.embedding([1, 2], W), TypeError, r"embedding: ids is \[1, 2\], expected"),  # type: ignore[arg-type]
    (lambda: ops.embedding(IDS, W.long()), TypeError, "embedding: weight is torch.int64, expected a floating-point"),
    (lambda: ops.embedding(IDS, W[0]), ValueError, r"weight has shape \(10,\), expected \(V, C\)"),
    (
        lambda: ops.embedding(IDS, W, P[:, :9]),
        ValueError,
        r"position_weight has shape \(5, 9\), expected \(T_max, 10\)",
    ),
    (lambda: ops.embedding(IDS, W, P.half()), TypeError, "position_weight is torch.float16, expected torch.float32"),
    (lambda: ops.embedding(IDS, W[:6]), ValueError, "ids reach from 0 to 6, expected 0 to 5"),
    (lambda: ops.embedding(-IDS, W), ValueError, "ids reach from -6 to 0, expected 0 to 6"),
    (lambda: ops.embedding(IDS, W, P[:3]), ValueError, "ids have 4 positions, position_weight only 3 rows"),
    (lambda: ops.embedding(IDS, W, P, positions=IDS), ValueError, "positions reach from 0 to 6, expected 0 to 4"),
    (
        lambda: ops.embedding(IDS, W, P, positions=IDS[:, :3]),
        ValueError,
        r"positions has shape \(2, 3\), expected \(4,\)",
    ),
    (lambda: ops.embedding(IDS[0, 0], W, P), ValueError, r"ids has shape \(\), expected \(..., T\)"),
]


@pytest.mark.parametrize("call,kind,message", ERRORS, ids=[m for _, _, m in ERRORS])
@pytest.mark.skipif(DEVICE == "cuda", reason="values are checked on CPU")
def test_errors_name_the_argument(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
