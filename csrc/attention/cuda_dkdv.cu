// Attention, backward: dk and dv; formulas and cost at the head of cuda_bwd.cu.
//
// A block has a tile of keys of one key head and processes the queries that see them, head by head of the group, in a
// fixed order: without atomics, every run gives the same bits. The first keys start first, since the most queries see
// them. q and dout are loaded one step ahead (not for D = 256, where they would not fit in 99 KB).
//
//                     tile (keys x queries)   registers (sm_80)   shared   blocks on a multiprocessor of an A100
//   D up to 64        128 x 32                255                 49 KB    2
//         96           64 x 64                240                 73 KB    2
//        128           64 x 32                243                 65 KB    2
//        256           64 x 32, 8 warps       241                 96 KB    1
//   options:  64       64 x 64                205                 51 KB    2
//            128       64 x 32                252                 66 KB    2
//            256       64 x 32, 8 warps       252                 97 KB    1
#include "attention/cuda_bwd.cuh"

namespace fastgpt::cuda {
namespace {

template <int D, bool Full>
struct DkdvTile {
  static constexpr int kM = D > 64 || Full ? 1 : 2;  // 16-key pieces per warp
  static constexpr int kParts = D > 128 ? 2 : 1;     // warps that share the columns of dk and dv, each computing scores
  static constexpr int kWarps = 4 * kParts, kThreads = 32 * kWarps;
  static constexpr int kKeys = 4 * 16 * kM;
  static constexpr int kRows = D == 96 || (D == 64 && Full) ? 64 : 32;  // queries at a time
  static constexpr int kStages = D > 128 ? 1 : 2;
  static constexpr int kBytes = (2 * kKeys + kStages * 2 * kRows) * D * 2;
};

// Queries [begin, end), in whole tiles of ROWS, that include all queries that see the keys of a block, and the first
// query that sees any key at all.
struct QueryRange {
  int begin, end, low;
};

template <int ROWS>
__device__ __forceinline__ QueryRange causal_queries(const BackwardLaunch& l, int key0) {
  const int begin = l.a.causal ? max(0, key0 + 1 - l.ahead) : 0;  // the first query that sees key0
  return {begin / ROWS * ROWS, l.n_queries, l.a.causal ? max(0, 1 - l.ahead) : 0};
}

template <int ROWS>
__device__ __forceinline__ QueryRange seeing_queries(const BackwardLaunch& l, int64_t batch, int key0, int n_keys) {
  const int n_blocks = (l.n_queries + kBlock - 1) / kBlock;
  int first = n_blocks, last = 0;
  for (int i = lane_id(); i < n_blocks; i += 32) {
    const Sight s = l.sights[batch * (l.n_padded / kBlock) + i];
    if (s.high > key0 && s.low < key0 + n_keys) first = min(first, i), last = max(last, i + 1);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    first = min(first, __shfl_xor_sync(0xffffffffu, first, mask));
    last = max(last, __shfl_xor_sync(0xffffffffu, last, mask));
  }
  return {first * kBlock, min(last * kBlock, l.n_queries), 0};
}

// Data for a step of the loop over queries, in addition to q and dout.
template <int ROWS, bool Full>
struct alignas(16) Step {
  RowScale rows[ROWS];
  KeySpan spans[Full ? ROWS : 1];
  Sight sight;
};

// Sets z and dz to 0 where a query (column, from query0 on) does not see a key (row, of this lane from `key` on).
template <bool Full, int ROWS, int M, int N>
__device__ __forceinline__ void hide_keys(const BackwardLaunch& l, const Step<ROWS, Full>& step, int query0, int key,
                                          const int (&docs)[M][2], float (&z)[M][N][4], float (&dz)[M][N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = 8 * n + lane_id() % 4 * 2 + c;
      KeySpan s;
      if constexpr (Full) s = step.spans[column];
      else s = {0, causal_end(l, query0 + column), 0, 0};
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = key + 16 * m + 8 * h;
          const bool sees = row >= s.begin && row < s.end && (!Full || l.a.doc_ids == nullptr || docs[m][h] == s.doc);
          z[m][n][2 * h + c] = sees ? z[m][n][2 * h + c] : 0.0f;
          dz[m][n][2 * h + c] = sees ? dz[m][n][2 * h + c] : 0.0f;
        }
      }
    }
  }
}

template <bool Full, int ROWS, int M, int N>
__device__ __forceinline__ void grad_keys(const BackwardLaunch& l, const Dropout& dropout,
                                          const Step<ROWS, Full>& step, int query0, int key, float (&z)[M][N][4],
                                          float (&dz)[M][N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int column = 8 * n + lane_id() % 4 * 2;
    const RowScale rows[2] = {step.rows[column], step.rows[column + 1]};
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        grad_score<Full>(l, dropout, rows[i % 2], query0 + column + i % 2, key + 16 * m + i / 2 * 8, z[m][n][i],
                         dz[m][n][i]);
      }
    }
  }
}

// Starts to load queries from query0 on of one head and the data of their step.
template <int D, bool Full>
__device__ __forceinline__ void load_queries(const BackwardLaunch& l, int64_t batch, int64_t head, int query0, int low,
                                             uint16_t* q_tile, uint16_t* dout_tile,
                                             Step<DkdvTile<D, Full>::kRows, Full>& step) {
  constexpr int kRows = DkdvTile<D, Full>::kRows, kThreads = DkdvTile<D, Full>::kThreads;
  const AttentionArgs& a = l.a;
  const KeySpan* spans = l.spans + batch * l.n_padded;
  const auto inside = [&](int row) {  // a query without keys may be uninitialised
    if constexpr (Full) return row < l.n_queries && spans[row].begin < spans[row].end;
    else return row >= low && row < l.n_queries;
  };
  load_tile<D, kRows, kThreads>(q_tile, a.q, offset_of(a.q_at, batch, head), a.q_at.row, query0, l.dim, l.aligned,
                                inside);
  load_tile<D, kRows, kThreads>(dout_tile, a.dout, offset_of(a.dout_at, batch, head), a.dout_at.row, query0, l.dim,
                                l.aligned, inside);
  const RowScale* rows = l.rows + (batch * a.n_heads + head) * l.n_padded + query0;
  const int i = threadIdx.x;
  if (i < kRows / 2) ptx::cp_async_16(ptx::shared_address(step.rows + 2 * i), rows + 2 * i, 16);
  if constexpr (Full) {
    if (i < kRows) ptx::cp_async_16(ptx::shared_address(step.spans + i), spans + query0 + i, 16);
    const Sight* sight = l.sights + (batch * l.n_padded + query0) / kBlock;
    if (i == 0) ptx::cp_async_16(ptx::shared_address(&step.sight), sight, 16);
  }
  ptx::cp_async_commit();
}

// One block per tile of keys of one key head; it also sums over the query heads that use this key head, in order.
// Scores are transposed (keys x queries), so keep p and dz can stay in their registers as first operands of the next
// products.
template <typename T, int D, bool Full>
__global__ void __launch_bounds__(DkdvTile<D, Full>::kThreads)
    attention_dkdv_kernel(const __grid_constant__ BackwardLaunch l) {
  using Tile = DkdvTile<D, Full>;
  constexpr int kThreads = Tile::kThreads, kRows = Tile::kRows, kKeys = Tile::kKeys, kM = Tile::kM;
  constexpr int kStages = Tile::kStages, kWidth = D / Tile::kParts;
  __shared__ Step<kRows, Full> steps[kStages];
  FASTGPT_DYNAMIC_SHARED(uint16_t, k_tile);
  uint16_t *const v_tile = k_tile + kKeys * D, *const q_tiles = v_tile + kKeys * D;
  const AttentionArgs& a = l.a;
  const int n_keys = l.n_keys;
  const unsigned tiles = (n_keys + kKeys - 1) / kKeys, above = blockIdx.x / tiles;
  const int kv_heads = static_cast<int>(a.n_kv_heads), group = static_cast<int>(a.n_heads) / kv_heads;
  const int batch = static_cast<int>(above) / kv_heads, kv_head = static_cast<int>(above) % kv_heads;
  const int key0 = static_cast<int>(blockIdx.x % tiles) * kKeys, own = warp_id() % 4 * 16 * kM, part = warp_id() / 4;
  QueryRange range;
  if constexpr (Full) range = seeing_queries<kRows>(l, batch, key0, kKeys);
  else range = causal_queries<kRows>(l, key0);
  const int end_head = kv_head * group + group;  // of the loop over heads, which contains one over queries
  int head = range.begin < range.end ? kv_head * group : end_head, query0 = range.begin, stage = 0;
  const auto load = [&](int next_head, int next_query, int next_stage) {
    uint16_t* tile = q_tiles + next_stage * 2 * kRows * D;
    load_queries<D, Full>(l, batch, next_head, next_query, range.low, tile, tile + kRows * D, steps[next_stage]);
  };
  const auto inside = [&](int key) { return key < n_keys; };
  load_tile<D, kKeys, kThreads>(k_tile, a.k, offset_of(a.k_at, batch, kv_head), a.k_at.row, key0, l.dim, l.aligned,
                                inside);
  load_tile<D, kKeys, kThreads>(v_tile, a.v, offset_of(a.v_at, batch, kv_head), a.v_at.row, key0, l.dim, l.aligned,
                                inside);
  ptx::cp_async_commit();
  if (head < end_head) load(head, query0, 0);
  const int first = key0 + own, key = first + lane_id() / 4;  // of the warp, and of this lane
  int docs[kM][2] = {};
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    const int row = key + i * 8;
    if (Full && a.doc_ids != nullptr) docs[i / 2][i % 2] = a.doc_ids[batch * a.n_queries + min(row, n_keys - 1)];
  }
  float dk[kM][kWidth / 8][4] = {}, dv[kM][kWidth / 8][4] = {};
  const Lane<D> k = rows_first<D>(k_tile + own * D), v = rows_first<D>(v_tile + own * D);
  while (head < end_head) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // these queries have arrived, and those of the other stage are no longer needed
    const bool last = query0 + kRows >= range.end;
    const int next_head = last ? head + 1 : head, next_query = last ? range.begin : query0 + kRows;
    if (kStages == 2 && next_head < end_head) load(next_head, next_query, stage ^ 1);
    const uint16_t *q_tile = q_tiles + stage * 2 * kRows * D, *dout_tile = q_tile + kRows * D;
    const Step<kRows, Full>& step = steps[stage];
    Sight sight;
    if constexpr (Full) sight = step.sight;
    else sight = causal_sight(l, query0, kRows);
    if (first < n_keys && first < sight.high && first + 16 * kM > sight.low) {
      float z[kM][kRows / 8][4] = {}, dz[kM][kRows / 8][4] = {};
      multiply_rows<T>(z, k, columns_first<D>(q_tile));
      multiply_rows<T>(dz, v, columns_first<D>(dout_tile));
      grad_keys<Full>(l, dropout_of(a, batch * a.n_heads + head), step, query0, key, z, dz);
      const bool whole = first >= sight.from && first + 16 * kM <= sight.to;
      if (!whole) hide_keys<Full>(l, step, query0, key, docs, z, dz);
      multiply_scores<T>(dv, z, rows_first<D>(dout_tile + part * kWidth));
      multiply_scores<T>(dk, dz, rows_first<D>(q_tile + part * kWidth));
    }
    if (kStages == 1) {
      __syncthreads();
      if (next_head < end_head) load(next_head, next_query, 0);
    }
    head = next_head, query0 = next_query, stage ^= kStages - 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // keys and values are no longer needed
  float factors[2][kM][2];
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) factors[0][i / 2][i % 2] = a.scale, factors[1][i / 2][i % 2] = a.keep_scale;
  write_tile<T, D>(k_tile, own, part * kWidth, dk, factors[0]);
  write_tile<T, D>(v_tile, own, part * kWidth, dv, factors[1]);
  __syncthreads();
  store_tile<D, kKeys, kThreads>(k_tile, a.dk, offset_of(a.dk_at, batch, kv_head), a.dk_at.row, key0, n_keys, l.dim,
                                 l.out_aligned);
  store_tile<D, kKeys, kThreads>(v_tile, a.dv, offset_of(a.dv_at, batch, kv_head), a.dv_at.row, key0, n_keys, l.dim,
                                 l.out_aligned);
}

}  // namespace

// ---- launchers ----

void attention_dkdv(const BackwardLaunch& l, Stream stream) {
  with_kernel(l.a, [&](auto type, auto dim, auto full) {
    using Tile = DkdvTile<dim(), full()>;
    const int64_t blocks = (l.a.n_keys + Tile::kKeys - 1) / Tile::kKeys * l.a.n_batch * l.a.n_kv_heads;
    if (blocks == 0) return;
    launch("attention_dkdv_kernel", attention_dkdv_kernel<decltype(type), dim(), full()>, Grid{blocks},
           dim3(Tile::kThreads), Tile::kBytes, stream, l);
  });
}

}  // namespace fastgpt::cuda
