// Shared by the CUDA kernels of attention: the keys that a query sees, scores, dropout, the order of work.
#pragma once
#include "attention/mask.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/tile.cuh"

#include <climits>

namespace fastgpt::cuda {

constexpr float kLog2e = 1.44269504f;

// Argument of the kernels: constants of a launch, which need no registers. A score is natural q k^T or, softcapped,
// natural softcap tanh(inner q k^T); as an exponent of 2 it has the factor `power` in place of `natural`.
struct AttentionLaunch {
  AttentionArgs a;
  int n_queries, n_keys, dim;
  int ahead;                  // with only causal order, query i sees the keys below i + ahead
  float power, natural, inner;
  bool aligned, out_aligned;  // all rows of inputs (outputs) are whole 16-byte pieces at aligned addresses
};

// ---- the keys that a query sees ----

// Keys [begin, end) of one query, none if begin >= end, and its document.
struct alignas(16) KeySpan {
  int begin, end, doc, unused;
};

// Keys [low, high) that some queries of a tile see, and keys [from, to) that all of them see.
struct alignas(16) Sight {
  int low, high, from, to;
};

// Returns the packed sequence of a query: the first that ends after it, or n_sequences.
__device__ __forceinline__ int64_t sequence_of(const AttentionArgs& a, int query) {
  int64_t low = 0, high = a.n_sequences;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (a.cu_q[middle + 1] <= query) low = middle + 1;
    else high = middle;
  }
  return low;
}

static __device__ KeySpan key_span(const AttentionArgs& a, int64_t batch, int query) {
  const KeyRange keys = key_range(a, batch, query, a.cu_q == nullptr ? 0 : sequence_of(a, query));
  const int doc = a.doc_ids == nullptr ? 0 : a.doc_ids[batch * a.n_queries + query];
  if (keys.begin >= keys.end) return {static_cast<int>(a.n_keys), 0, doc, 0};
  return {static_cast<int>(keys.begin), static_cast<int>(keys.end), doc, 0};
}

struct Bounds {
  int low, high;
};

// Returns the smallest `low` and largest `high` over a block; `scratch` must not be used again.
template <int THREADS>
__device__ __forceinline__ Bounds block_bounds(Bounds b, Bounds (&scratch)[THREADS / 32]) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    b.low = min(b.low, __shfl_xor_sync(0xffffffffu, b.low, mask));
    b.high = max(b.high, __shfl_xor_sync(0xffffffffu, b.high, mask));
  }
  if (lane_id() == 0) scratch[warp_id()] = b;
  __syncthreads();
  for (int w = 0; w < THREADS / 32; ++w) b = {min(b.low, scratch[w].low), max(b.high, scratch[w].high)};
  return b;
}

// Finds the spans of ROWS queries and the keys that they see together; queries after the last one see its keys. With
// documents, these are the keys between the smallest and the largest document of the queries; `hide` compares
// documents.
template <int ROWS, int THREADS>
__device__ __forceinline__ Sight find_spans(const AttentionArgs& a, int64_t batch, int query0, KeySpan* spans) {
  __shared__ Bounds scratch[4][THREADS / 32];
  const int n_keys = static_cast<int>(a.n_keys), last = static_cast<int>(a.n_queries) - 1;
  Bounds some{n_keys, 0}, every{n_keys, 0}, docs{INT_MAX, INT_MIN};
  for (int r = threadIdx.x; r < ROWS; r += THREADS) {
    const KeySpan s = key_span(a, batch, min(query0 + r, last));
    spans[r] = s;
    some = {min(some.low, s.begin), max(some.high, s.end)};
    every = {min(every.low, s.end), max(every.high, s.begin)};
    docs = {min(docs.low, s.doc), max(docs.high, s.doc)};
  }
  some = block_bounds<THREADS>(some, scratch[0]);
  every = block_bounds<THREADS>(every, scratch[1]);
  if (a.doc_ids == nullptr) return {some.low, some.high, every.high, every.low};
  docs = block_bounds<THREADS>(docs, scratch[2]);
  Bounds found{n_keys, 0};
#pragma unroll 4
  for (int key = some.low + threadIdx.x; key < some.high; key += THREADS) {
    const int doc = a.doc_ids[batch * a.n_queries + key];
    if (doc >= docs.low && doc <= docs.high) found = {min(found.low, key), max(found.high, key + 1)};
  }
  found = block_bounds<THREADS>(found, scratch[3]);
  return {found.low, found.high, n_keys, 0};
}

__device__ __forceinline__ int causal_end(const AttentionLaunch& l, int query) {
  return max(0, min(query + l.ahead, l.n_keys));
}

// Returns the keys that queries query0 .. query0 + rows see.
__device__ __forceinline__ Sight causal_sight(const AttentionLaunch& l, int query0, int rows) {
  return {0, causal_end(l, min(query0 + rows, l.n_queries) - 1), 0, causal_end(l, query0)};
}

// Sets z to `value` where a query (row, from `query` on) does not see a key (column, from `key0` on). spans: of the
// queries from `query` on; used only if Full.
template <bool Full, int M, int N>
__device__ __forceinline__ void hide(const AttentionLaunch& l, int64_t batch, int query, const KeySpan* spans, int key0,
                                     float value, float (&z)[M][N][4]) {
  KeySpan seen[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * m + 8 * h + lane_id() / 4;
      if constexpr (Full) seen[m][h] = spans[row];
      else seen[m][h] = {0, causal_end(l, query + row), 0, 0};
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int key = key0 + 8 * n + lane_id() % 4 * 2 + c;
      const bool docs = Full && l.a.doc_ids != nullptr && key < l.n_keys;
      const int doc = docs ? l.a.doc_ids[batch * l.n_queries + key] : 0;
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const bool sees = key >= seen[m][h].begin && key < seen[m][h].end && (!docs || doc == seen[m][h].doc);
          z[m][n][2 * h + c] = sees ? z[m][n][2 * h + c] : value;
        }
      }
    }
  }
}

// ---- scores ----

__device__ __forceinline__ float tanh_fast(float x) { return tanh_from_exp(x, ptx::ex2(-2.0f * kLog2e * fabsf(x))); }

// Counters and keys of the random words of one head.
struct Dropout {
  uint32_t seed_low, seed_high, offset, head, below;
  __device__ __forceinline__ bool keeps(int query, int key) const {
    return philox_first(key, query, head, offset, seed_low, seed_high) >= below;
  }
};

__device__ __forceinline__ Dropout dropout_of(const AttentionArgs& a, int64_t head) {
  if (a.rng == nullptr) return {};
  const uint64_t seed = static_cast<uint64_t>(a.rng[0]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(a.rng[1]),
          static_cast<uint32_t>(head), a.drop_below};
}

// Queries of a block: head after head, the last queries of a head first, since they see the most keys.
struct QueryTile {
  int batch, head, kv_head, query0;
  __device__ QueryTile(const AttentionLaunch& l, int rows) {
    const unsigned tiles = static_cast<unsigned>(l.n_queries + rows - 1) / rows;
    const unsigned heads = static_cast<unsigned>(l.a.n_heads), above = blockIdx.x / tiles;
    const unsigned group = heads / static_cast<unsigned>(l.a.n_kv_heads);
    query0 = static_cast<int>((tiles - 1 - blockIdx.x % tiles) * rows);
    batch = static_cast<int>(above / heads), head = static_cast<int>(above % heads);
    kv_head = static_cast<int>(above % heads / group);
  }
};

__device__ __forceinline__ int64_t offset_of(const AttentionStrides& s, int64_t batch, int64_t head) {
  return batch * s.batch + head * s.head;
}

// ---- for the launchers ----

inline bool pieces_aligned(const void* x, const AttentionStrides& s, int64_t dim) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && (s.batch | s.row | s.head | dim) % 8 == 0;
}

// Sets everything except the alignment. `largest`: the kernel subtracts the largest score before it takes powers, so
// their factor must be positive (the kernel flips the signs of the queries) and not 0 (-inf must stay -inf).
inline AttentionLaunch attention_launch(const AttentionArgs& a, bool largest) {
  if (a.n_queries > INT_MAX / 4 || a.n_keys > INT_MAX / 4) {  // keep sums of both within 32 bits
    throw std::runtime_error("fastgpt: attention: more than 2^29 queries or keys in a sequence");
  }
  if (a.dtype == DType::f32 || a.head_dim > 256) {
    throw std::runtime_error("fastgpt: attention: the CUDA kernels take bf16 and fp16, head dimensions up to 256");
  }
  AttentionLaunch l{};
  l.a = a;
  l.n_queries = static_cast<int>(a.n_queries), l.n_keys = static_cast<int>(a.n_keys);
  l.dim = static_cast<int>(a.head_dim), l.ahead = a.causal ? l.n_keys - l.n_queries + 1 : l.n_keys;
  const float scale = largest ? std::fabs(a.scale) : a.scale;
  l.natural = a.softcap > 0.0f ? 1.0f : scale;
  l.power = largest ? std::fmax(l.natural * kLog2e, 1e-37f) : l.natural * kLog2e;
  l.inner = a.softcap > 0.0f ? scale / a.softcap : 0.0f;
  return l;
}

// Returns whether any option other than causal order and grouped heads is used.
inline bool has_options(const AttentionArgs& a) {
  return a.window > 0 || a.softcap > 0.0f || a.rng != nullptr || a.cu_q != nullptr || a.doc_ids != nullptr ||
         a.kv_lens != nullptr || a.kv_start != nullptr;
}

template <int D>
using Dim = std::integral_constant<int, D>;

// Calls f(type, dim, full) with tags: the type, the tile for the head dimension, and whether there are options.
template <typename F>
void with_kernel(const AttentionArgs& a, F f) {
  const bool full = has_options(a);
  const auto with_dim = [&](auto type, auto dim) {
    full ? f(type, dim, std::true_type{}) : f(type, dim, std::false_type{});
  };
  const auto with_tile = [&](auto type) {
    if (a.head_dim <= 64) with_dim(type, Dim<64>{});
    else if (a.head_dim <= 96 && !full) f(type, Dim<96>{}, std::false_type{});
    else if (a.head_dim <= 128) with_dim(type, Dim<128>{});
    else with_dim(type, Dim<256>{});
  };
  a.dtype == DType::bf16 ? with_tile(bf16{}) : with_tile(f16{});
}

}  // namespace fastgpt::cuda
