// Attention, forward (FlashAttention-2, arXiv:2307.08691); formulas in fastgpt/ops/attention.py.
//
//   z = scale q k^T, softcapped softcap tanh(z / softcap), masked;  out = softmax(z) v,  lse = log sum exp(z)
//
// Fused: scores, masks, softmax, dropout, the sum over values; the T x S matrix is never in memory. Operations: 4 B H T
// S D, half of it with causal order. Bytes: q, k, v read, out and lse written; k and v are read again, from L2, for
// each tile of queries. Saved for backward: out, and lse in fp32. Floor for B = 64, T = S = 1024, H = 12, D = 64,
// causal, 16 bits: 103 GFLOP, A100 (312 TFLOP/s) 330 us, H100 and H200 (989) 104 us, of which mma.sync reaches 63 %
// (arXiv:2402.13499): 165 us; 406 MB, A100 199 us, H100 121, H200 85.
//
// How: a block has a tile of queries of one head and streams tiles of the keys and values that some of them see. The
// last queries start first, since they see the most keys. Values are loaded while scores are computed, the next keys
// during softmax and the sum over values. The 32 queries of a warp (16 for D = 256) share each fragment of keys and
// values that it reads: with 16, the shared memory of an A100 would be slower than its tensor cores. Probabilities stay
// in registers, rounded to 16 bits after the largest score is subtracted. exp is computed as 2^x; the factor of the
// scores includes log2 e.
//
//                     tile        registers (sm_80)   shared   blocks on a multiprocessor of an A100
//   D up to 64        128 x 64    216                 32 KB    2
//         96          128 x 64    239                 48 KB    2
//        128          128 x 48    249                 56 KB    2
//        256           64 x 32    238                 64 KB    2
//   options:  64      128 x 32    246                 26 KB    2
//            128       64 x 64    168                 49 KB    3
//            256       64 x 32    248                 65 KB    2
#include "attention/cuda.cuh"

namespace fastgpt::cuda {
namespace {

template <int D, bool Full>
struct FwdTile {
  static constexpr int kThreads = 128;
  static constexpr int kM = D > (Full ? 96 : 128) ? 1 : 2;  // 16-row pieces per warp
  static constexpr int kRows = kThreads / 32 * 16 * kM;    // queries
  static constexpr int kKeys = D > 128 || (D == 64 && Full) ? 32 : D == 128 && !Full ? 48 : 64;
  static constexpr int kBlocks = !Full ? 1 : D == 128 ? 3 : 2;  // minimum on a multiprocessor
  static constexpr int kBytes = (kRows + 2 * kKeys) * D * 2;
};

// State of the queries of one lane: the largest score (not scaled), the part of this lane in the sum of powers, and the
// sum of values weighted by the powers.
template <int M, int W>
struct Softmax {
  float top[M][2], total[M][2], out[M][W][4];
};

// Replaces z by 2^(c (z - top)) and updates top, total and out.
template <int M, int N, int W>
__device__ __forceinline__ void update(Softmax<M, W>& s, float (&z)[M][N][4], float c) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = s.top[m][h];
#pragma unroll
      for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(z[m][n][2 * h], z[m][n][2 * h + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const float base = top == -INFINITY ? 0.0f : top * c;  // no key yet: 2^-inf, not 2^(inf - inf)
      const float shrink = ptx::ex2(__fmul_rn(s.top[m][h], c) - base);  // 1 if top stays; an FMA gives 2^residue
      s.top[m][h] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        z[m][n][2 * h] = ptx::ex2(z[m][n][2 * h] * c - base);
        z[m][n][2 * h + 1] = ptx::ex2(z[m][n][2 * h + 1] * c - base);
        sum += z[m][n][2 * h] + z[m][n][2 * h + 1];
      }
      s.total[m][h] = s.total[m][h] * shrink + sum;
#pragma unroll
      for (int n = 0; n < W; ++n) s.out[m][n][2 * h] *= shrink, s.out[m][n][2 * h + 1] *= shrink;
    }
  }
}

template <int M, int N>
__device__ __forceinline__ void cap_scores(float inner, float softcap, float (&z)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) z[m][n][i] = softcap * tanh_fast(z[m][n][i] * inner);
    }
  }
}

template <int M, int N>
__device__ __forceinline__ void drop(const Dropout& dropout, int query, int key0, float (&p)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = query + 16 * m + i / 2 * 8 + lane_id() / 4, key = key0 + 8 * n + lane_id() % 4 * 2 + i % 2;
        p[m][n][i] = dropout.keeps(row, key) ? p[m][n][i] : 0.0f;
      }
    }
  }
}

// Flips the signs of the pieces of a tile that this thread has loaded.
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void negate_own(uint16_t* tile) {
  using P = Pieces<D, THREADS>;
  const P own;
  for (int i = 0; i < ROWS; i += P::kDown) {
    for (int j = 0; j < D / 8; j += P::kAcross) {
      uint16_t* piece = tile_piece<D>(tile, own.row + i, own.piece + j);
      for (int l = 0; l < 8; ++l) piece[l] ^= 0x8000u;
    }
  }
}

// Stores lse and returns the factors of the rows of out; `query`: of the first row of the warp.
template <int M, int W>
__device__ __forceinline__ void finish(const AttentionLaunch& l, Softmax<M, W>& s, int64_t head, int query,
                                       float (&factor)[M][2]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = s.total[m][h];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      factor[m][h] = total == 0.0f ? 0.0f : l.a.keep_scale / total;
      const int row = query + 16 * m + 8 * h + lane_id() / 4;
      if (lane_id() % 4 != 0 || row >= l.n_queries) continue;
      l.a.lse[head * l.n_queries + row] = total == 0.0f ? -INFINITY : s.top[m][h] * l.natural + logf(total);
    }
  }
}

template <typename T, int D, bool Full>
__global__ void __launch_bounds__(FwdTile<D, Full>::kThreads, FwdTile<D, Full>::kBlocks)
    attention_fwd_kernel(const __grid_constant__ AttentionLaunch l) {
  using Tile = FwdTile<D, Full>;
  constexpr int kThreads = Tile::kThreads, kRows = Tile::kRows, kKeys = Tile::kKeys, kM = Tile::kM;
  __shared__ KeySpan spans[Full ? kRows : 1];
  FASTGPT_DYNAMIC_SHARED(uint16_t, q_tile);
  uint16_t *const k_tile = q_tile + kRows * D, *const v_tile = k_tile + kKeys * D;
  const AttentionArgs& a = l.a;
  const QueryTile at(l, kRows);
  const int own = warp_id() * 16 * kM, query = at.query0 + own;
  Sight sight;
  if constexpr (Full) sight = find_spans<kRows, kThreads>(a, at.batch, at.query0, spans);
  else sight = causal_sight(l, at.query0, kRows);
  const int64_t k_from = offset_of(a.k_at, at.batch, at.kv_head), v_from = offset_of(a.v_at, at.batch, at.kv_head);
  const auto seen = [&](int key) { return key >= sight.low && key < sight.high; };  // others may be uninitialised
  const int first = sight.low / kKeys * kKeys;
  if (first < sight.high) {
    load_tile<D, kRows, kThreads>(q_tile, a.q, offset_of(a.q_at, at.batch, at.head), a.q_at.row, at.query0, l.dim,
                                  l.aligned, [&](int row) { return row < l.n_queries; });
    load_tile<D, kKeys, kThreads>(k_tile, a.k, k_from, a.k_at.row, first, l.dim, l.aligned, seen);
    ptx::cp_async_commit();
    if (a.scale < 0.0f) {  // the largest score is found before scaling
      ptx::cp_async_wait<0>();
      negate_own<D, kRows, kThreads>(q_tile);
    }
  }
  // a warp stops after the last key that its queries see
  const int high = query >= l.n_queries ? 0 : Full ? sight.high : causal_end(l, query + 16 * kM - 1);
  Softmax<kM, D / 8> s = {};
#pragma unroll
  for (int m = 0; m < kM; ++m) s.top[m][0] = s.top[m][1] = -INFINITY;
  const Lane<D> q = rows_first<D>(q_tile + own * D), k = columns_first<D>(k_tile), v = rows_first<D>(v_tile);
  for (int key0 = first; key0 < sight.high; key0 += kKeys) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // these keys have arrived, and the previous values are no longer needed
    load_tile<D, kKeys, kThreads>(v_tile, a.v, v_from, a.v_at.row, key0, l.dim, l.aligned, seen);
    ptx::cp_async_commit();
    float z[kM][kKeys / 8][4] = {};
    if (key0 < high) multiply_rows<T>(z, q, k);
    ptx::cp_async_wait<0>();
    __syncthreads();  // these values have arrived, and the keys are no longer needed
    if (key0 + kKeys < sight.high) {
      load_tile<D, kKeys, kThreads>(k_tile, a.k, k_from, a.k_at.row, key0 + kKeys, l.dim, l.aligned, seen);
      ptx::cp_async_commit();
    }
    if (key0 >= high) continue;
    if (Full && a.softcap > 0.0f) cap_scores(l.inner, a.softcap, z);
    const bool whole = key0 >= sight.from && key0 + kKeys <= sight.to;
    if (!whole) hide<Full>(l, at.batch, query, spans + (Full ? own : 0), key0, -INFINITY, z);
    update(s, z, l.power);
    if (Full && a.rng != nullptr) drop(dropout_of(a, at.batch * a.n_heads + at.head), query, key0, z);
    multiply_scores<T>(s.out, z, v);
  }
  float factor[kM][2];
  finish(l, s, at.batch * a.n_heads + at.head, query, factor);
  write_tile<T, D>(q_tile, own, 0, s.out, factor);  // overwrites only the queries of this warp
  __syncthreads();
  store_tile<D, kRows, kThreads>(q_tile, a.out, offset_of(a.out_at, at.batch, at.head), a.out_at.row, at.query0,
                                 l.n_queries, l.dim, l.out_aligned);
}

}  // namespace

// ---- launchers ----

void attention_fwd(const AttentionArgs& a, Stream stream) {
  AttentionLaunch l = attention_launch(a, true);
  l.out_aligned = pieces_aligned(a.out, a.out_at, a.head_dim);
  l.aligned = pieces_aligned(a.q, a.q_at, a.head_dim) && pieces_aligned(a.k, a.k_at, a.head_dim) &&
              pieces_aligned(a.v, a.v_at, a.head_dim);
  with_kernel(a, [&](auto type, auto dim, auto full) {
    using Tile = FwdTile<dim(), full()>;
    const int64_t blocks = (a.n_queries + Tile::kRows - 1) / Tile::kRows * a.n_batch * a.n_heads;
    if (blocks == 0) return;
    launch("attention_fwd_kernel", attention_fwd_kernel<decltype(type), dim(), full()>, Grid{blocks},
           dim3(Tile::kThreads), Tile::kBytes, stream, l);
  });
}

}  // namespace fastgpt::cuda
