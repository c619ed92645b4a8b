// Attention, backward (FlashAttention-2, arXiv:2307.08691): delta, dq, and the launcher of all kernels; dk and dv are
// in cuda_dkdv.cu. Formulas in fastgpt/ops/attention.py.
//
//   p = exp(z - lse),  dp = keep / (1 - dropout_p) dout v^T,  delta = rowsum(dout out) - dlse,  dz = p (dp - delta)
//   dv = (keep / (1 - dropout_p) p)^T dout,  dk = scale dz^T q,  dq = scale dz k;  softcapped: dz (1 - (z / softcap)^2)
//
// Each of two kernels recomputes the scores, one per tile of keys (4 products), one per tile of queries (3): one block
// computes a sum, in a fixed order, without atomics and without an fp32 dq in memory. Operations: 14 B H T S D, half of
// it with causal order. Bytes: q, k, v read twice, dout three times, out once, dq, dk, dv written. Floor for B = 64, T
// = S = 1024, H = 12, D = 64, causal, 16 bits: 361 GFLOP, A100 1156 us, H100 and H200 365 us, of which mma.sync reaches
// 63 %: 580 us; 1.3 GB, A100 642 us, H100 391, H200 273.
//
// A separate pass computes delta and lse (201 MB here, 99 us on an A100) in a workspace of 8 bytes per row: summing
// dout out again for each tile of keys would read out as often as q. With options, another pass finds the keys that
// each query sees (16 bytes per query) by bisection, once instead of once per tile.
//
//                     tile (queries x keys)   registers (sm_80)   shared   blocks on a multiprocessor of an A100
//   D up to 64        128 x 48                224                 57 KB    2
//         96          128 x 32                238                 73 KB    2
//        128          128 x 32                255                 81 KB    2
//        256           64 x 32                254                 97 KB    1
//   options:  64      128 x 48                238                 59 KB    2
//            128       64 x 64                178                 66 KB    2
//            256       64 x 32                255                 98 KB    1
#include "attention/cuda_bwd.cuh"

namespace fastgpt::cuda {
namespace {

// Computes delta = rowsum(dout out) - dlse and lse for the kernels of dq and of dk and dv; 8 lanes per row.
template <typename T>
__global__ void __launch_bounds__(256) attention_rows_kernel(const __grid_constant__ BackwardLaunch l) {
  const AttentionArgs& a = l.a;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x / 8;
  const int64_t above = row / l.n_padded, query = row % l.n_padded, batch = above / a.n_heads, head = above % a.n_heads;
  const bool there = query < a.n_queries;
  const T* out = static_cast<const T*>(a.out) + offset_of(a.out_at, batch, head) + query * a.out_at.row;
  const T* dout = static_cast<const T*>(a.dout) + offset_of(a.dout_at, batch, head) + query * a.dout_at.row;
  const int dim = there ? static_cast<int>(a.head_dim) : 0, lane = threadIdx.x % 8;
  float sum = 0.0f;
  if (l.aligned) {
    for (int d = lane * 8; d < dim; d += 64) {
      float x[8], y[8];
      load(out + d, x);
      load(dout + d, y);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += x[i] * y[i];
    }
  } else {
    for (int d = lane; d < dim; d += 8) sum += widen(out[d]) * widen(dout[d]);
  }
#pragma unroll
  for (int mask = 4; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (lane != 0) return;
  const int64_t at = above * a.n_queries + query;
  const float lse = there ? a.lse[at] : -INFINITY;
  const float dlse = there && a.dlse != nullptr ? a.dlse[at] : 0.0f;
  l.rows[row] = lse == -INFINITY ? RowScale{INFINITY, 0.0f} : RowScale{lse * kLog2e, sum - dlse};
}

// Finds the keys that each query sees, and those that each 64 of them see together; one block per 64.
__global__ void __launch_bounds__(kBlock) attention_spans_kernel(const __grid_constant__ BackwardLaunch l) {
  const int64_t block = blockIdx.x, blocks = l.n_padded / kBlock;
  const int query0 = static_cast<int>(block % blocks) * kBlock;
  const Sight sight = find_spans<kBlock, kBlock>(l.a, block / blocks, query0, l.spans + block * kBlock);
  if (threadIdx.x == 0) l.sights[block] = sight;
}

template <int D, bool Full>
struct DqTile {
  static constexpr int kThreads = 128;
  static constexpr int kM = D > (Full ? 96 : 128) ? 1 : 2;  // 16-query pieces per warp
  static constexpr int kRows = kThreads / 32 * 16 * kM;
  static constexpr int kKeys = D == 64 ? 48 : D == 128 && Full ? 64 : 32;  // at a time
  static constexpr int kStages = D > 96 ? 1 : 2;
  static constexpr int kBytes = (2 * kRows + kStages * 2 * kKeys) * D * 2;
};

// Loads the spans of the queries of a tile from the workspace; returns the keys that they see together.
template <int ROWS, int THREADS>
__device__ __forceinline__ Sight load_spans(const BackwardLaunch& l, int64_t batch, int query0, KeySpan* spans) {
  const int64_t at = batch * l.n_padded + query0;
  for (int r = threadIdx.x; r < ROWS; r += THREADS) spans[r] = l.spans[at + r];
  Sight s = l.sights[at / kBlock];
  for (int i = 1; i < ROWS / kBlock; ++i) {
    const Sight more = l.sights[at / kBlock + i];
    s = {min(s.low, more.low), max(s.high, more.high), max(s.from, more.from), min(s.to, more.to)};
  }
  return s;
}

template <bool Full, int M, int N>
__device__ __forceinline__ void grad_queries(const BackwardLaunch& l, const Dropout& dropout, const RowScale* rows,
                                             int query, int key0, float (&z)[M][N][4], float (&dz)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * m + 8 * h + lane_id() / 4;
      const RowScale scale = rows[row];
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) {
        const int n = i / 2, c = i % 2;
        grad_score<Full>(l, dropout, scale, query + row, key0 + 8 * n + lane_id() % 4 * 2 + c, z[m][n][2 * h + c],
                         dz[m][n][2 * h + c]);
      }
    }
  }
}

template <typename T, int D, bool Full>
__global__ void __launch_bounds__(DqTile<D, Full>::kThreads)
    attention_dq_kernel(const __grid_constant__ BackwardLaunch l) {
  using Tile = DqTile<D, Full>;
  constexpr int kThreads = Tile::kThreads, kRows = Tile::kRows, kKeys = Tile::kKeys, kM = Tile::kM;
  constexpr int kStages = Tile::kStages;
  __shared__ KeySpan spans[Full ? kRows : 1];
  __shared__ RowScale rows[kRows];
  FASTGPT_DYNAMIC_SHARED(uint16_t, q_tile);
  uint16_t *const dout_tile = q_tile + kRows * D, *const k_tiles = dout_tile + kRows * D;
  const AttentionArgs& a = l.a;
  const QueryTile at(l, kRows);
  const int own = warp_id() * 16 * kM, query = at.query0 + own;
  Sight sight;
  if constexpr (Full) sight = load_spans<kRows, kThreads>(l, at.batch, at.query0, spans);
  else sight = causal_sight(l, at.query0, kRows);
  const int first = sight.low / kKeys * kKeys;
  const auto seen = [&](int key) { return key >= sight.low && key < sight.high; };  // others may be uninitialised
  const auto inside = [&](int row) { return row < l.n_queries; };
  const auto load = [&](int key0, int stage) {
    uint16_t* tile = k_tiles + stage * 2 * kKeys * D;
    load_tile<D, kKeys, kThreads>(tile, a.k, offset_of(a.k_at, at.batch, at.kv_head), a.k_at.row, key0, l.dim,
                                  l.aligned, seen);
    load_tile<D, kKeys, kThreads>(tile + kKeys * D, a.v, offset_of(a.v_at, at.batch, at.kv_head), a.v_at.row, key0,
                                  l.dim, l.aligned, seen);
    ptx::cp_async_commit();
  };
  if (first < sight.high) {
    load_tile<D, kRows, kThreads>(q_tile, a.q, offset_of(a.q_at, at.batch, at.head), a.q_at.row, at.query0, l.dim,
                                  l.aligned, inside);
    load_tile<D, kRows, kThreads>(dout_tile, a.dout, offset_of(a.dout_at, at.batch, at.head), a.dout_at.row, at.query0,
                                  l.dim, l.aligned, inside);
    load(first, 0);
  }
  const int high = query >= l.n_queries ? 0 : Full ? sight.high : causal_end(l, query + 16 * kM - 1);
  for (int r = threadIdx.x; r < kRows; r += kThreads) {
    rows[r] = l.rows[(at.batch * a.n_heads + at.head) * l.n_padded + at.query0 + r];
  }
  __syncthreads();
  float dq[kM][D / 8][4] = {};
  const Lane<D> q = rows_first<D>(q_tile + own * D), dout = rows_first<D>(dout_tile + own * D);
  int stage = 0;
  for (int key0 = first; key0 < sight.high; key0 += kKeys, stage ^= kStages - 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // these keys have arrived, and those of the other stage are no longer needed
    if (kStages == 2 && key0 + kKeys < sight.high) load(key0 + kKeys, stage ^ 1);
    const uint16_t *k_tile = k_tiles + stage * 2 * kKeys * D, *v_tile = k_tile + kKeys * D;
    if (key0 < high) {
      float z[kM][kKeys / 8][4] = {}, dz[kM][kKeys / 8][4] = {};
      multiply_rows<T>(z, q, columns_first<D>(k_tile));
      multiply_rows<T>(dz, dout, columns_first<D>(v_tile));
      grad_queries<Full>(l, dropout_of(a, at.batch * a.n_heads + at.head), rows + own, query, key0, z, dz);
      const bool whole = key0 >= sight.from && key0 + kKeys <= sight.to;
      if (!whole) hide<Full>(l, at.batch, query, spans + (Full ? own : 0), key0, 0.0f, dz);
      multiply_scores<T>(dq, dz, rows_first<D>(k_tile));
    }
    if (kStages > 1) continue;
    __syncthreads();
    if (key0 + kKeys < sight.high) load(key0 + kKeys, 0);
  }
  float factor[kM][2];
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    factor[i / 2][i % 2] = a.scale;
    if (rows[own + i * 8 + lane_id() / 4].lse != INFINITY) continue;  // NaN stays NaN
#pragma unroll
    for (int n = 0; n < D / 8; ++n) dq[i / 2][n][i % 2 * 2] = dq[i / 2][n][i % 2 * 2 + 1] = 0.0f;  // even if it is NaN
  }
  write_tile<T, D>(q_tile, own, 0, dq, factor);  // overwrites only the queries of this warp
  __syncthreads();
  store_tile<D, kRows, kThreads>(q_tile, a.dq, offset_of(a.dq_at, at.batch, at.head), a.dq_at.row, at.query0,
                                 l.n_queries, l.dim, l.out_aligned);
}

}  // namespace

// ---- launchers ----

static int64_t padded(int64_t n_queries) { return (n_queries + kPad - 1) / kPad * kPad; }

int64_t attention_bwd_workspace(int64_t n_batch, int64_t n_queries, int64_t n_heads, Stream) {
  const int64_t bytes = sizeof(RowScale) * n_heads * kBlock + sizeof(KeySpan) * kBlock + sizeof(Sight);
  return n_batch * padded(n_queries) / kBlock * bytes / static_cast<int64_t>(sizeof(float));
}

BackwardLaunch backward_launch(const AttentionArgs& a) {
  BackwardLaunch l{attention_launch(a, false), nullptr, nullptr, nullptr, padded(a.n_queries)};
  const auto aligned = [&](const void* x, const AttentionStrides& s) { return pieces_aligned(x, s, a.head_dim); };
  l.aligned = aligned(a.q, a.q_at) && aligned(a.k, a.k_at) && aligned(a.v, a.v_at) && aligned(a.dout, a.dout_at) &&
              aligned(a.out, a.out_at);
  l.out_aligned = aligned(a.dq, a.dq_at) && aligned(a.dk, a.dk_at) && aligned(a.dv, a.dv_at);
  l.rows = reinterpret_cast<RowScale*>(a.workspace);
  l.spans = reinterpret_cast<KeySpan*>(l.rows + a.n_batch * a.n_heads * l.n_padded);
  l.sights = reinterpret_cast<Sight*>(l.spans + a.n_batch * l.n_padded);
  return l;
}

void prepare_rows(const BackwardLaunch& l, Stream stream) {
  const Grid rows{l.a.n_batch * l.a.n_heads * l.n_padded / 32};
  if (l.a.dtype == DType::bf16) {
    launch("attention_rows_kernel", attention_rows_kernel<bf16>, rows, dim3(256), 0, stream, l);
  } else {
    launch("attention_rows_kernel", attention_rows_kernel<f16>, rows, dim3(256), 0, stream, l);
  }
}

static void prepare_spans(const BackwardLaunch& l, Stream stream) {
  if (!has_options(l.a)) return;
  launch("attention_spans_kernel", attention_spans_kernel, Grid{l.a.n_batch * l.n_padded / kBlock}, dim3(kBlock), 0,
         stream, l);
}

void attention_bwd(const AttentionArgs& a, Stream stream) {
  const BackwardLaunch l = backward_launch(a);
  const bool queries = a.n_batch * a.n_heads * a.n_queries > 0;
  if (queries) prepare_rows(l, stream), prepare_spans(l, stream);
  attention_dkdv(l, stream);
  if (!queries) return;
  with_kernel(a, [&](auto type, auto dim, auto full) {
    using Tile = DqTile<dim(), full()>;
    const int64_t blocks = (a.n_queries + Tile::kRows - 1) / Tile::kRows * a.n_batch * a.n_heads;
    launch("attention_dq_kernel", attention_dq_kernel<decltype(type), dim(), full()>, Grid{blocks},
           dim3(Tile::kThreads), Tile::kBytes, stream, l);
  });
}

}  // namespace fastgpt::cuda
