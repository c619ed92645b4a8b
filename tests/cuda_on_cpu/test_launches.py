"""Launch arithmetic of the CUDA kernels: grids, blocks, shared memory, workspaces, alignment; nothing is launched."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import shutil
from typing import Any

import pytest

if importlib.util.find_spec("pybind11") is None or shutil.which("g++") is None:
    pytest.skip("needs pybind11 and g++", allow_module_level=True)

import emulator

import fastgpt.ops  # noqa: F401  (its schemas must exist before the library registers kernels for them)
from fastgpt.bench import codegen

ALIGNED, WIDTHS = 4096, [1, 7, 33, 64, 96, 128, 300, 768, 1024, 1280, 1600, 2048, 3072, 4096, 5120, 8192, 16384, 65536]
Launch = list[int]  # grid x, y, z, block x, y, z, bytes of dynamic shared memory


@pytest.fixture(scope="module")
def kernels() -> Any:
    return emulator.load(emulator.build())


def pointers(*names: str, at: int = ALIGNED) -> dict[str, int]:
    return dict.fromkeys(names, at)


def check(launch: Launch, static: int = 4096) -> None:
    """Check that a launch is within CUDA's limits on sm_80; `static`: the most static shared memory of these
    kernels."""
    assert all(1 <= n for n in launch[:6]) and math.prod(launch[3:6]) <= 1024 and math.prod(launch[3:6]) % 32 == 0
    assert launch[0] < 2**31 and launch[1] <= 65535 and launch[2] <= 65535 and launch[6] + static <= 163 * 1024


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", [0, 1])
@pytest.mark.parametrize("multiprocessors", [108, 132])
def test_norms_cover_all_rows_and_stay_in_their_workspace(
    kernels: Any, op: str, dtype: int, multiprocessors: int
) -> None:
    given = pointers("x", "y", "dy", "h", "weight", "dweight", "partials") | {"multiprocessors": multiprocessors}
    blocks = getattr(kernels, f"{op}_bwd_blocks")
    for n_cols, n_rows, x_bias in itertools.product(WIDTHS, (1, 5, 107, 433, 4097, 2**20), (False, True)):
        sizes = {"n_rows": n_rows, "n_cols": n_cols, "dtype": dtype, "x_row": n_cols}
        (forward,) = getattr(kernels, f"{op}_fwd")(**given, **sizes)
        check(forward)
        assert forward[0] * forward[4] >= n_rows > (forward[0] - 1) * forward[4]
        more = pointers("dx_bias", "dsum") if x_bias else {}
        backward, reduce = getattr(kernels, f"{op}_bwd")(**given, **sizes, **more)
        check(backward), check(reduce)
        assert backward[0] <= blocks(n_rows, n_cols, multiprocessors=multiprocessors) <= n_rows
        assert reduce[0] * 32 >= n_cols and reduce[1] == (op == "layer_norm") + 1 + x_bias


def test_sums_over_rows_fill_the_device(kernels: Any) -> None:
    """One wave of blocks, as many as registers and 164 KB of shared memory allow; GPT-2's shapes."""
    norm = pointers("dy", "h", "weight", "dweight", "partials") | {"n_rows": 65536, "n_cols": 768, "dtype": 1}
    gelu = pointers("x", "dy", "out", "dbias", "partials") | {"n_rows": 65536, "n_cols": 3072, "dtype": 1}
    for count in (108, 132):
        at = {"multiprocessors": count}
        for more, resident in (((), (4, 5)), (("dsum",), (4, 4)), (("dsum", "dx_bias"), (3, 4))):
            for op, blocks in zip(("layer_norm", "rms_norm"), resident):
                launch = getattr(kernels, f"{op}_bwd")(**norm, **pointers(*more), **at)[0]
                assert launch[0] == blocks * count and math.prod(launch[3:6]) == 128, (op, more, count)
        launch = kernels.bias_gelu_bwd(**gelu, **at)[0]
        assert launch[0] * math.prod(launch[3:6]) == 768 * count


def test_one_launch_takes_no_shared_memory_from_anothers(kernels: Any) -> None:
    """A second thread launches the same kernel with less, just after the first has stated its request."""
    given = pointers("x", "y", "dy", "h", "weight", "dweight", "partials") | {"n_rows": 4097, "dtype": 1}
    wide, narrow = ({**given, "n_cols": n, "x_row": n} for n in (8192, 5120))
    first, second = kernels.layer_norm_bwd(**wide), kernels.layer_norm_bwd(**narrow)
    assert first[0][6] > 48 * 1024 > second[0][6] > 32 * 1024
    assert kernels.layer_norm_bwd_at_once(wide, narrow) == second + first


def test_activations_cover_every_element(kernels: Any) -> None:
    for n_cols in WIDTHS:
        for n_rows in (1, 5, 4097, 2**20):
            sizes = {"n_rows": n_rows, "n_cols": n_cols, "dtype": 1}
            (forward,) = kernels.bias_gelu_fwd(**pointers("x", "out"), **sizes)
            (gated,) = kernels.swiglu_fwd(**pointers("gate", "up"), **sizes)
            check(forward), check(gated)
            assert forward[0] * math.prod(forward[3:6]) * 32 >= n_rows * n_cols / 8
            backward, reduce = kernels.bias_gelu_bwd(**pointers("x", "dy", "out", "dbias", "partials"), **sizes)
            check(backward), check(reduce)
            blocks = kernels.bias_gelu_bwd_blocks(n_rows, n_cols)
            assert backward[0] % blocks == 0, "as many blocks of rows as the workspace has partials"


def test_a_row_of_logits_is_held_where_it_fits(kernels: Any) -> None:
    """GPT-2's vocabulary in 16 bits is read once, by one block a multiprocessor with a row arriving; what is shorter,
    longer or has options takes two sweeps."""
    held = {(1, 50257), (1, 50304), (2, 50304), (1, 57344), (1, 16392), (0, 28672), (0, 8196)}
    swept = {(1, 57352), (1, 16384), (1, 128256), (0, 50304), (0, 8192), (0, 28676), (1, 61)}
    for dtype, n_classes in held | swept:
        for n_rows in (1, 107, 65536):
            sizes = {"n_rows": n_rows, "n_cols": n_classes + 47, "n_classes": n_classes, "dtype": dtype}
            (launch,) = kernels.cross_entropy_fwd_bwd(**sizes)
            check(launch, static=256)
            (with_options,) = kernels.cross_entropy_fwd_bwd(**sizes, softcap=4.0)
            assert with_options[0] == n_rows and with_options[3] <= 512 and with_options[6] == 0
            if (dtype, n_classes) in held:
                pieces = n_classes * (2 if dtype else 4) // 16
                assert launch == [min(n_rows, 108), 1, 1, 1024, 1, 1, 16 * pieces] and pieces <= 7 * 1024
            else:
                assert launch == with_options


def test_attention_has_a_block_for_every_tile(kernels: Any) -> None:
    for head_dim in (16, 64, 80, 96, 128, 160, 256):
        for t in (1, 64, 65, 1000, 8192):
            sizes = dict(
                n_batch=3, n_queries=t, n_keys=t, n_heads=8, n_kv_heads=2, head_dim=head_dim, scale=0.1, dtype=1
            )
            for options in ({"causal": True}, {"window": 5}, {"softcap": 2.0}):
                (forward,) = kernels.attention_fwd(**sizes, **options)
                check(forward)
                tiles = forward[0] // (3 * 8)
                assert forward[0] == tiles * 24 and tiles >= t / 128 and (tiles - 1) * 64 < t
                backward = kernels.attention_bwd(**sizes, **options)
                assert len(backward) == (3 if options == {"causal": True} else 4)
                for launch in backward:
                    check(launch)
    assert kernels.attention_bwd_workspace(64, 1024, 12) >= 64 * 12 * 1024 * 2


def test_splits_of_a_cache_fill_the_device(kernels: Any) -> None:
    """One long row gives blocks for all 108 multiprocessors; many rows are not split; the second launch adds up."""
    for b, heads, group, t, s, dim in ((1, 8, 4, 1, 32768, 128), (1, 1, 1, 1, 8192, 64), (64, 8, 1, 1, 4096, 128),
                                       (1, 12, 1, 1, 70, 64), (2, 1, 71, 3, 1000, 256)):  # fmt: skip
        sizes = dict(n_batch=b, n_queries=t, n_keys=s, n_kv_heads=heads, n_heads=heads * group, head_dim=dim, dtype=1)
        split, *add = kernels.attention_decode_fwd(**sizes, causal=True, scale=0.1)
        check(split, static=33 * 1024)
        rows = t * group
        chunks = math.ceil(rows / 8)
        splits = split[0] // (b * heads * chunks)
        assert split[0] == splits * b * heads * chunks and (splits == 1) == (not add)
        keys = 16 if dim > 128 else 32  # at least, that one block works on at a time
        assert split[0] >= min(4 * 108, b * heads * chunks * math.ceil(s / (4 * keys)))
        assert kernels.attention_decode_workspace(**sizes) == (splits > 1) * b * heads * rows * splits * (dim + 2)
        if add:
            check(add[0])
            assert add[0][0] == b * heads * rows and splits <= 128
        sizes |= {"causal": True, "multiprocessors": 132}
        assert kernels.attention_decode_fwd(**sizes)[0][0] >= min(
            4 * 132, b * heads * chunks * math.ceil(s / (4 * keys))
        )


def test_shared_memory_of_attention_is_what_codegen_counts_with(kernels: Any) -> None:
    """Also, what a block of dq for D = 128 uses leaves room for two of them on an A100, to the last byte."""
    names, found = emulator.kernel_names(emulator.build()), dict[str, int]()
    for dtype, dim, options in itertools.product((1, 2), (64, 96, 128, 256), ({"causal": True}, {"window": 5})):
        sizes = dict(n_batch=1, n_queries=64, n_keys=64, n_heads=1, n_kv_heads=1, head_dim=dim, scale=0.1, dtype=dtype)
        for launcher in (kernels.attention_fwd, kernels.attention_bwd):
            kernels.launched()
            bytes_ = sorted(launch[6] for launch in launcher(**sizes, **options) if launch[6])
            tiled = sorted(n for k in kernels.launched() if re.search("_(fwd|dkdv|dq)_kernel", n := names[k]))
            wanted = {name: codegen.launched_shared(name) for name in tiled}
            assert sorted(n or 0 for n in wanted.values()) == bytes_, (wanted, bytes_)
            found.update((name, n or 0) for name, n in wanted.items())
    assert len(found) == 2 * 3 * (4 + 3), "each instance once: D = 96 has none of its own with options"
    static = 128 * 8  # RowScale of a query
    for more, blocks in ((0, 2), (4, 1)):
        shared = found["attention_dq_kernel<bf16, 128, false>"] + static + more
        assert codegen.occupancy(80, 128, 255, shared)["blocks_per_sm"] == blocks


def test_embedding_and_rope(kernels: Any) -> None:
    for n in (1, 31, 33, 65536, 2**31 + 5):
        (launch,) = kernels.embedding_fwd(n_tokens=n, n_cols=768, n_rows=5, dtype=1)
        check(launch)
        assert launch[0] * launch[4] >= n
        levels = kernels.embedding_partials(n)
        assert 2 * math.ceil(n / 32) <= levels <= 2.2 * math.ceil(n / 32) + 8
    for heads in (1, 3, 36, 300):
        for dim in (2, 30, 64, 256):
            (launch,) = kernels.rope(n_batch=3, n_time=70, n_cols=dim, half=dim // 2, n_heads=heads, dtype=1)
            assert launch[0] * launch[5] >= 210 and math.prod(launch[3:6]) <= 1024


def test_a_grid_that_cuda_does_not_take_is_an_error(kernels: Any) -> None:
    """The number is not silently taken modulo 2^32."""
    with pytest.raises(RuntimeError, match="layer_norm_fwd_kernel: a grid of 2147483648 x 1 x 1 blocks"):
        kernels.layer_norm_fwd(n_rows=2**33, n_cols=1)
    with pytest.raises(RuntimeError, match=rf"cross_entropy_fwd_kernel: a grid of {2**32 + 1} x"):
        kernels.cross_entropy_fwd(n_rows=2**32 + 1, n_cols=8, n_classes=8)
    with pytest.raises(RuntimeError, match="attention_fwd_kernel: a grid of"):
        kernels.attention_fwd(
            n_batch=2**20, n_queries=2**17, n_keys=1, n_heads=64, n_kv_heads=1, head_dim=64, scale=0.1, dtype=1
        )


def test_planning_launches_nothing_and_ends(kernels: Any) -> None:
    """The pointers above are invalid; after a plan, kernels run again."""
    import torch

    from fastgpt import ops
    from fastgpt.core import backend

    if not backend.simulated("cuda"):
        pytest.skip("the emulation is not this process's backend")
    kernels.layer_norm_fwd(**pointers("x", "y"), n_rows=10, n_cols=64, dtype=0)
    with backend.use(layer_norm="cuda", strict=True):
        x = torch.randn(3, 64)
        torch.testing.assert_close(ops.layer_norm(x), torch.nn.functional.layer_norm(x, (64,)))
