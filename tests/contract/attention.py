"""Data of attention for the tests that run on every op."""

from contract import Errors, Far, Mutations, Race, Races, heads, rand
from fastgpt import ops

RUN_SHAPE = (2, 70, 70, 4, 2, 16)
FAR: Far = {
    "attention": lambda x: ops.attention(*[heads(x, 2)] * 3, causal=True),
    "attention packed": lambda x: ops.attention_qkv(heads(x, 4), n_heads=2, n_kv_heads=1, causal=True),
}
ERRORS: Errors = [
    (lambda: ops.attention(rand(1, 3, 3, 4), rand(1, 3, 2, 4), rand(1, 3, 2, 4)), ValueError, "multiple of k's 2"),
]
MUTATIONS: Mutations = {
    "barrier before the scores": (
        "attention/cuda_fwd.cu",
        "    __syncthreads();  // these keys have arrived, and the previous values are no longer needed\n",
        "",
    ),
    "barrier before the values": (
        "attention/cuda_fwd.cu",
        "    __syncthreads();  // these values have arrived, and the keys are no longer needed\n",
        "",
    ),
    "copies that nobody waits for": (
        "attention/cuda_fwd.cu",
        "    ptx::cp_async_wait<0>();\n    __syncthreads();  // these values",
        "    __syncthreads();  // these values",
    ),
    "barrier of the queries' stages": (
        "attention/cuda_dkdv.cu",
        "    __syncthreads();  // these queries have arrived, and those of the other stage are no longer needed\n",
        "",
    ),
    "barrier of the keys' stages": (
        "attention/cuda_bwd.cu",
        "    __syncthreads();  // these keys have arrived, and those of the other stage are no longer needed\n",
        "",
    ),
    "causal mask": (
        "attention/cuda_fwd.cu",
        "const bool whole = key0 >= sight.from && key0 + kKeys <= sight.to;",
        "const bool whole = true;",
    ),
    "mask of the keys' gradients": (
        "attention/cuda_dkdv.cu",
        "const bool whole = first >= sight.from && first + 16 * kM <= sight.to;",
        "const bool whole = true;",
    ),
    "window": ("attention/mask.h", "begin = position + 1 - a.window;", "begin = position - a.window;"),
    "last key": ("attention/cuda.cuh", "min(query + l.ahead,", "min(query + l.ahead + 1,"),
    "permutation of a tile on one side": (
        "core/cuda/tile.cuh",
        "(at ^ (32 * k & kTurned))",
        "(at + (32 * k & kTurned))",
    ),
}
RACES: Races = {
    "forward: barrier before the scores": Race(
        "attention_fwd_kernel",
        "attention/cuda_fwd.cu",
        "    __syncthreads();  // these keys have arrived, and the previous values are no longer needed\n",
        "",
        ("multiply_rows<T>(z, q, k);", "load_tile<D, kRows, kThreads>(q_tile, a.q,"),
    ),
    "forward: wait group one too high": Race(
        "attention_fwd_kernel",
        "attention/cuda_fwd.cu",
        "    ptx::cp_async_wait<0>();\n    __syncthreads();  // these values",
        "    ptx::cp_async_wait<1>();\n    __syncthreads();  // these values",
        ("multiply_scores<T>(s.out, z, v);", "load_tile<D, kKeys, kThreads>(v_tile, a.v,"),
    ),
    "forward: keys loaded one step early": Race(
        "attention_fwd_kernel",
        "attention/cuda_fwd.cu",
        "    ptx::cp_async_wait<0>();\n"
        "    __syncthreads();  // these values have arrived, and the keys are no longer needed\n"
        "    if (key0 + kKeys < sight.high) {\n"
        "      load_tile<D, kKeys, kThreads>(k_tile, a.k, k_from, a.k_at.row, key0 + kKeys, l.dim, l.aligned, seen);\n"
        "      ptx::cp_async_commit();\n"
        "    }\n",
        "    if (key0 + kKeys < sight.high) {\n"
        "      load_tile<D, kKeys, kThreads>(k_tile, a.k, k_from, a.k_at.row, key0 + kKeys, l.dim, l.aligned, seen);\n"
        "      ptx::cp_async_commit();\n"
        "    }\n"
        "    ptx::cp_async_wait<0>();\n    __syncthreads();\n",
        ("multiply_rows<T>(z, q, k);", "key0 + kKeys, l.dim, l.aligned, seen);"),
    ),
    "forward: barrier before the output": Race(
        "attention_fwd_kernel",
        "attention/cuda_fwd.cu",
        "s.out, factor);  // overwrites only the queries of this warp\n  __syncthreads();",
        "s.out, factor);",
        ("  write_tile<T, D>(q_tile, own, 0, s.out, factor);", "  store_tile<D, kRows, kThreads>(q_tile, a.out,"),
        slow=True,
    ),
    "forward: barrier of the spans": Race(
        "attention_fwd_kernel",
        "attention/cuda.cuh",
        "  if (lane_id() == 0) scratch[warp_id()] = b;\n  __syncthreads();\n",
        "  if (lane_id() == 0) scratch[warp_id()] = b;\n",
        (
            "  if (lane_id() == 0) scratch[warp_id()] = b;",
            "b = {min(b.low, scratch[w].low), max(b.high, scratch[w].high)};",
        ),
        options=True,
        slow=True,
    ),
    "dk and dv: barrier of the stages": Race(
        "attention_dkdv_kernel",
        "attention/cuda_dkdv.cu",
        "    __syncthreads();  // these queries have arrived, and those of the other stage are no longer needed\n",
        "",
        ("multiply_rows<T>(z, k, columns_first<D>(q_tile));", "load_tile<D, kKeys, kThreads>(k_tile, a.k,"),
    ),
    "dk and dv: wait group one too high": Race(
        "attention_dkdv_kernel",
        "attention/cuda_dkdv.cu",
        "  while (head < end_head) {\n    ptx::cp_async_wait<0>();",
        "  while (head < end_head) {\n    ptx::cp_async_wait<1>();",
        ("multiply_rows<T>(z, k, columns_first<D>(q_tile));", "load_tile<D, kRows, kThreads>(q_tile, a.q,"),
    ),
    "dk and dv: stage reused one step early": Race(
        "attention_dkdv_kernel",
        "attention/cuda_dkdv.cu",
        "load(next_head, next_query, stage ^ 1);",
        "load(next_head, next_query, stage);",
        ("multiply_rows<T>(z, k, columns_first<D>(q_tile));", "load_tile<D, kRows, kThreads>(q_tile, a.q,"),
    ),
    "dk and dv: barrier before the output": Race(
        "attention_dkdv_kernel",
        "attention/cuda_dkdv.cu",
        "  ptx::cp_async_wait<0>();\n  __syncthreads();  // keys and values are no longer needed\n",
        "  ptx::cp_async_wait<0>();\n",
        ("write_tile<T, D>(k_tile, own, part * kWidth, dk, factors[0]);", "load_tile<D, kKeys, kThreads>(k_tile, a.k,"),
        options=True,
        slow=True,
    ),
    "dq: barrier of the stages": Race(
        "attention_dq_kernel",
        "attention/cuda_bwd.cu",
        "    __syncthreads();  // these keys have arrived, and those of the other stage are no longer needed\n",
        "",
        ("write_tile<T, D>(q_tile, own, 0, dq, factor);", "load_tile<D, kRows, kThreads>(q_tile, a.q,"),
    ),
    "dq: wait group one too high": Race(
        "attention_dq_kernel",
        "attention/cuda_bwd.cu",
        "    ptx::cp_async_wait<0>();\n    __syncthreads();  // these keys have arrived, and those",
        "    ptx::cp_async_wait<1>();\n    __syncthreads();  // these keys have arrived, and those",
        ("multiply_rows<T>(z, q, columns_first<D>(k_tile));", "load_tile<D, kRows, kThreads>(q_tile, a.q,"),
    ),
    "dq: stage reused one step early": Race(
        "attention_dq_kernel",
        "attention/cuda_bwd.cu",
        "load(key0 + kKeys, stage ^ 1);",
        "load(key0 + kKeys, stage);",
        ("multiply_rows<T>(z, q, columns_first<D>(k_tile));", "load_tile<D, kKeys, kThreads>(tile, a.k,"),
    ),
    "dq: barrier after the scales of the rows": Race(
        "attention_dq_kernel",
        "attention/cuda_bwd.cu",
        "  __syncthreads();\n  float dq[kM][D / 8][4] = {};",
        "  float dq[kM][D / 8][4] = {};",
        ("rows[r] = l.rows[(at.batch", "if (rows[own + i * 8 + lane_id() / 4].lse != INFINITY) continue;"),
        slow=True,
    ),
    "spans: sight that every thread writes": Race(
        "attention_spans_kernel",
        "attention/cuda_bwd.cu",
        "  if (threadIdx.x == 0) l.sights[block] = sight;",
        "  l.sights[block] = sight;",
        ("  l.sights[block] = sight;", "  l.sights[block] = sight;"),
        options=True,
        slow=True,
    ),
}
