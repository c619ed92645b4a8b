// Attention of a few queries over a long cache, forward (Flash-Decoding, Dao et al. 2023); formulas in
// fastgpt/ops/attention_decode.py.
//
//   z = scale q k^T, softcapped, masked;  out = softmax(z) v, first over each split of the keys, then over the splits
//
// Fused: scores, masks, softmax, the sum over values. Bytes: the visible keys and values once (the 8 queries of a block
// share them), q read and out written, and 4 (D + 2) bytes for each query and split, written and read. Floor for B = 1,
// Hkv = 8, D = 128, S = 32768, 16 bits: 134 MB, A100 66 us, H100 40, H200 28. Saved for backward: nothing.
//
// How: a block has up to 8 queries (positions times heads of a group) of one key head and every splits-th tile of keys,
// so short rows are spread over the splits, too. LANES lanes hold a key, each 8 of its columns; they add their parts
// of a score by shuffles. Each such group of lanes has its own online softmax, so nothing waits for another warp
// before the end. There, the groups are added over the warp and over the block. Products are fp32 FMA, not tensor
// cores: with one query for each key head, loading takes longer. A split without keys writes that its sum is 0 and
// ends. The number of splits depends on the shapes and on the number of multiprocessors only.
//
// With pages, a lane looks up the page of a key one tile ahead; the rest, the order of sums included, is the same.
#include "attention_decode/op.h"

#include "attention/mask.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/multiprocessors.cuh"
#include "core/cuda/reduce.cuh"
#include "core/cuda/vec.cuh"
#include "core/with_type.h"

#include <algorithm>
#include <climits>

namespace fastgpt::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kBlocks = 4;       // on a multiprocessor: what the number of splits aims at
constexpr int kMaxSplits = 128;  // one thread of the second kernel for each

// A block's keys: `kAtOnce` groups of LANES lanes, kUnroll keys each, are loaded before the first is used.
template <typename T, int LANES, int ROWS>
struct DecodeTile {
  static constexpr int kWidth = 8 * LANES;  // columns
  static constexpr int kAtOnce = kThreads / LANES;
  static constexpr int kUnroll = ROWS > 4 || sizeof(T) == 4 ? 2 : 4;  // what the registers hold
  static constexpr int kKeys = kAtOnce * kUnroll;
};

// Argument of the kernels. A row is a query of a head: number t group + g of the T x group rows of a key head.
struct DecodeLaunch {
  DecodeArgs a;
  int n_rows, group, chunks, splits;
  float inverse_softcap;
  bool aligned;  // keys and values are whole 16-byte pieces at aligned addresses
  float* sums;   // (B Hkv n_rows, splits, D), not divided by the sum of powers
  float* stats;  // (B Hkv n_rows, splits, 2): largest score, sum of powers
};

template <typename T>
__device__ __forceinline__ float power(float x) {
  if constexpr (sizeof(T) == 4) return exp_low(x);
  else return fast_exp(x);
}

// Loads the numbers of the pages of U keys `step` apart, from `key` on, from a row of the table; -1 for keys outside
// [low, high) and for pages outside the pool.
template <int U>
__device__ __forceinline__ void load_pages(int (&page)[U], const DecodeArgs& a, const int32_t* table, int key, int step,
                                           int low, int high) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int k = key + u * step;
    page[u] = k >= low && k < high ? table[k >> a.page_bits] : -1;
    if (page[u] >= a.n_pages) page[u] = -1;
  }
}

// Sets the distances in elements of U keys `step` apart, from `key` on, from the first key of the row or of the pool;
// -1 for keys outside [low, high) and for pages outside the pool.
template <bool PAGED, int U>
__device__ __forceinline__ void place_keys(int64_t (&at)[U], const AttentionStrides& s, const int (&page)[U], int bits,
                                           int key, int step, int low, int high) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int k = key + u * step;
    if constexpr (PAGED) at[u] = page[u] >= 0 ? page[u] * s.batch + (k & ((1 << bits) - 1)) * s.row : -1;
    else at[u] = k >= low && k < high ? k * s.row : -1;
  }
}

// Loads the columns of this lane of U keys, at these distances from x; keys at -1 and columns from `dim` on are 0.
template <typename T, int LANES, int U>
__device__ __forceinline__ void load_keys(uint4 (&raw)[U][8 / kLanes<T>], const T* x, const int64_t (&at)[U], int dim,
                                          bool aligned) {
  const int lane = threadIdx.x % LANES;
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int p = 0; p < 8 / kLanes<T>; ++p) raw[u][p] = uint4{0, 0, 0, 0};
  }
  if (aligned) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int p = 0; p < 8 / kLanes<T>; ++p) {
        const int column = (p * LANES + lane) * kLanes<T>;
        if (at[u] >= 0 && column < dim) raw[u][p] = *reinterpret_cast<const uint4*>(x + at[u] + column);
      }
    }
  } else {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (at[u] < 0) continue;
#pragma unroll
      for (int p = 0; p < 8 / kLanes<T>; ++p) {
        const int column = (p * LANES + lane) * kLanes<T>;
        float values[kLanes<T>];
#pragma unroll
        for (int l = 0; l < kLanes<T>; ++l) values[l] = column + l < dim ? widen(x[at[u] + column + l]) : 0.0f;
        raw[u][p] = pack<T>(values);  // exact: the values were of type T
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void widen_key(const uint4 (&raw)[8 / kLanes<T>], float (&x)[8]) {
#pragma unroll
  for (int p = 0; p < 8 / kLanes<T>; ++p) unpack<T>(raw[p], x + p * kLanes<T>);
}

__device__ __forceinline__ void store_stats(const DecodeLaunch& l, int64_t part, float top, float total) {
  l.stats[2 * part] = top, l.stats[2 * part + 1] = total;
}

// Softmax of the rows so far, in this lane's columns.
template <int ROWS>
struct DecodeSums {
  float top[ROWS], total[ROWS], acc[ROWS][8];
};

// Replaces `top` by the larger of two largest scores; sets the factors of the sums that belong to them.
template <typename T>
__device__ __forceinline__ void merge_tops(float& top, float other, float& own_factor, float& other_factor) {
  const float most = fmaxf(top, other), base = most == -INFINITY ? 0.0f : most;
  own_factor = power<T>(top - base), other_factor = power<T>(other - base);
  top = most;
}

template <typename T, int LANES, int ROWS, bool PAGED>
__global__ void __launch_bounds__(kThreads) attention_decode_fwd_kernel(const __grid_constant__ DecodeLaunch l) {
  using Tile = DecodeTile<T, LANES, ROWS>;
  constexpr int U = Tile::kUnroll, kPieces = 8 / kLanes<T>;
  __shared__ float tops[kWarps][ROWS], totals[kWarps][ROWS], accs[kWarps][ROWS][Tile::kWidth];
  const DecodeArgs& a = l.a;
  const int split = static_cast<int>(blockIdx.x % l.splits), chunk = static_cast<int>(blockIdx.x / l.splits % l.chunks);
  const int head = static_cast<int>(blockIdx.x / l.splits / l.chunks);  // among B Hkv
  const int64_t batch = head / a.n_kv_heads, kv_head = head % a.n_kv_heads;
  const int lane = threadIdx.x % LANES, dim = static_cast<int>(a.head_dim), n_rows = min(ROWS, l.n_rows - chunk * ROWS);
  int begin[ROWS], end[ROWS], low = INT_MAX, high = 0;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const KeyRange keys = r < n_rows ? key_range(a, batch, (chunk * ROWS + r) / l.group, 0) : KeyRange{0, 0};
    begin[r] = static_cast<int>(keys.begin), end[r] = static_cast<int>(keys.end);
    if (begin[r] < end[r]) low = min(low, begin[r]), high = max(high, end[r]);
  }
  const int first = high == 0 ? 0 : (low / Tile::kKeys + split) * Tile::kKeys;
  const int64_t row0 = static_cast<int64_t>(head) * l.n_rows + chunk * ROWS;  // among B Hkv n_rows
  if (l.splits > 1 && first >= high) {
    const int r = static_cast<int>(threadIdx.x);
    if (r < n_rows) store_stats(l, (row0 + r) * l.splits + split, -INFINITY, 0.0f);
    return;
  }
  DecodeSums<ROWS> s;
  float q[ROWS][8];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int number = chunk * ROWS + r, query = number / l.group;
    const int64_t at = batch * a.q_at.batch + query * a.q_at.row + (kv_head * l.group + number % l.group) * a.q_at.head;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int column = (e / kLanes<T> * LANES + lane) * kLanes<T> + e % kLanes<T>;
      q[r][e] = r < n_rows && column < dim ? widen(static_cast<const T*>(a.q)[at + column]) : 0.0f;
      s.acc[r][e] = 0.0f;
    }
    s.top[r] = -INFINITY, s.total[r] = 0.0f;
  }
  const T* k = static_cast<const T*>(a.k) + (PAGED ? 0 : batch * a.k_at.batch) + kv_head * a.k_at.head;
  const T* v = static_cast<const T*>(a.v) + (PAGED ? 0 : batch * a.v_at.batch) + kv_head * a.v_at.head;
  const int32_t* table = PAGED ? a.pages + batch * (a.n_keys >> a.page_bits) : nullptr;
  const int group = static_cast<int>(threadIdx.x) / LANES;
  int page[U] = {};
  if constexpr (PAGED) load_pages(page, a, table, first + group, Tile::kAtOnce, low, high);
  for (int tile = first; tile < high; tile += Tile::kKeys * l.splits) {
    const int key = tile + group;
    uint4 k_raw[U][kPieces], v_raw[U][kPieces];
    int64_t k_place[U], v_place[U];
    place_keys<PAGED>(k_place, a.k_at, page, a.page_bits, key, Tile::kAtOnce, low, high);
    place_keys<PAGED>(v_place, a.v_at, page, a.page_bits, key, Tile::kAtOnce, low, high);
    load_keys<T, LANES>(k_raw, k, k_place, dim, l.aligned);
    load_keys<T, LANES>(v_raw, v, v_place, dim, l.aligned);
    if constexpr (PAGED) load_pages(page, a, table, key + Tile::kKeys * l.splits, Tile::kAtOnce, low, high);
    float z[ROWS][U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float x[8];
      widen_key<T>(k_raw[u], x);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float sum = q[r][0] * x[0];
#pragma unroll
        for (int e = 1; e < 8; ++e) sum += q[r][e] * x[e];
        z[r][u] = sum;
      }
    }
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int u = 0; u < U; ++u) z[r][u] += __shfl_xor_sync(0xffffffffu, z[r][u], mask);
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float top = s.top[r];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int at = key + u * Tile::kAtOnce;
        z[r][u] *= a.scale;
        if (a.softcap > 0.0f) z[r][u] = softcap_f(z[r][u], a.softcap, l.inverse_softcap);
        if (PAGED && k_place[u] < 0) z[r][u] = NAN;  // if it is seen: a page outside the pool
        if (at < begin[r] || at >= end[r]) z[r][u] = -INFINITY;
        top = fmaxf(top, z[r][u]);
      }
      const float base = top == -INFINITY ? 0.0f : top;  // no key yet
      const float shrink = power<T>(s.top[r] - base);
      s.top[r] = top, s.total[r] *= shrink;
#pragma unroll
      for (int u = 0; u < U; ++u) z[r][u] = power<T>(z[r][u] - base), s.total[r] += z[r][u];
#pragma unroll
      for (int e = 0; e < 8; ++e) s.acc[r][e] *= shrink;
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float x[8];
      widen_key<T>(v_raw[u], x);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int e = 0; e < 8; ++e) s.acc[r][e] += z[r][u] * x[e];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int mask = LANES; mask < 32; mask *= 2) {
      float own, other;
      const float total = __shfl_xor_sync(0xffffffffu, s.total[r], mask);
      merge_tops<T>(s.top[r], __shfl_xor_sync(0xffffffffu, s.top[r], mask), own, other);
      s.total[r] = s.total[r] * own + total * other;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        s.acc[r][e] = s.acc[r][e] * own + __shfl_xor_sync(0xffffffffu, s.acc[r][e], mask) * other;
      }
    }
    if (threadIdx.x % 32 < LANES) {
      const int warp = threadIdx.x / 32;
      if (lane == 0) tops[warp][r] = s.top[r], totals[warp][r] = s.total[r];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        accs[warp][r][(e / kLanes<T> * LANES + lane) * kLanes<T> + e % kLanes<T>] = s.acc[r][e];
      }
    }
  }
  __syncthreads();  // the sums of all warps are in shared memory
  for (int i = threadIdx.x; i < n_rows * Tile::kWidth; i += kThreads) {
    const int r = i / Tile::kWidth, column = i % Tile::kWidth;
    if (column >= dim) continue;
    float top = tops[0][r], total = 0.0f, sum = 0.0f;
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, tops[w][r]);
    for (int w = 0; w < kWarps; ++w) {
      const float factor = power<T>(tops[w][r] - (top == -INFINITY ? 0.0f : top));
      total += totals[w][r] * factor, sum += accs[w][r][column] * factor;
    }
    if (l.splits > 1) {
      const int64_t part = (row0 + r) * l.splits + split;
      l.sums[part * dim + column] = sum;
      if (column == 0) store_stats(l, part, top, total);
    } else {
      const int number = chunk * ROWS + r;
      const int64_t at = (batch * a.n_queries + number / l.group) * a.n_heads + kv_head * l.group + number % l.group;
      static_cast<T*>(a.out)[at * dim + column] = narrow<T>(total == 0.0f ? 0.0f : sum / total);
    }
  }
}

// Adds the splits of a row: a block for each.
template <typename T>
__global__ void __launch_bounds__(kThreads) attention_decode_fwd_add_kernel(const __grid_constant__ DecodeLaunch l) {
  __shared__ float scratch[2][kMaxWarps], factors[kMaxSplits];
  const DecodeArgs& a = l.a;
  const int64_t row = blockIdx.x, head = row / l.n_rows, number = row % l.n_rows;
  const int split = static_cast<int>(threadIdx.x);
  const float* stats = l.stats + 2 * (row * l.splits + split);
  const float own_top = split < l.splits ? stats[0] : -INFINITY, own_total = split < l.splits ? stats[1] : 0.0f;
  const float top = row_max(own_top, scratch[0]);
  const float factor = own_total == 0.0f ? 0.0f : power<T>(own_top - (top == -INFINITY ? 0.0f : top));
  factors[split] = factor;
  const float total = row_sum(own_total * factor, scratch[1]);  // behind its barrier, all factors are there
  const float divisor = total == 0.0f ? 1.0f : total;  // the sums of a row without keys are 0
  const int64_t batch = head / a.n_kv_heads, kv_head = head % a.n_kv_heads;
  const int64_t at = (batch * a.n_queries + number / l.group) * a.n_heads + kv_head * l.group + number % l.group;
  for (int column = threadIdx.x; column < a.head_dim; column += kThreads) {
    const float* sums = l.sums + row * l.splits * a.head_dim + column;
    float sum = 0.0f;
#pragma unroll 4
    for (int s = 0; s < l.splits; ++s) {
      if (factors[s] != 0.0f) sum += factors[s] * sums[s * a.head_dim];  // others were not written
    }
    static_cast<T*>(a.out)[at * a.head_dim + column] = narrow<T>(sum / divisor);
  }
}

// ---- launchers ----

template <int N>
using Number = std::integral_constant<int, N>;

// Calls f(type, lanes, rows) with the tags of the kernel for this dtype, head dimension and number of queries.
template <typename F>
void with_kernel(const DecodeArgs& a, F f) {
  if (a.n_keys > INT_MAX / 4 || a.n_queries > INT_MAX / 4 || a.head_dim > 256) {  // keep numbers of keys in 32 bits
    throw std::runtime_error("fastgpt: attention_decode: more than 2^29 keys or queries, or over 256 columns");
  }
  const int64_t rows = a.n_queries * (a.n_heads / a.n_kv_heads);
  const auto with_rows = [&](auto type, auto lanes) {
    if (rows == 1) f(type, lanes, Number<1>{});
    else if (rows <= 4) f(type, lanes, Number<4>{});
    else f(type, lanes, Number<8>{});
  };
  with_type(a.dtype, [&](auto type) {
    if (a.head_dim <= 64) with_rows(type, Number<8>{});
    else if (a.head_dim <= 128) with_rows(type, Number<16>{});
    else with_rows(type, Number<32>{});
  });
}

// Sets everything except the alignment.
template <typename T, int LANES, int ROWS>
DecodeLaunch decode_launch(const DecodeArgs& a) {
  constexpr int64_t kKeys = DecodeTile<T, LANES, ROWS>::kKeys;
  DecodeLaunch l{};
  l.a = a;
  l.group = static_cast<int>(a.n_heads / a.n_kv_heads), l.n_rows = static_cast<int>(a.n_queries * l.group);
  l.chunks = (l.n_rows + ROWS - 1) / ROWS;
  const int64_t blocks = a.n_batch * a.n_kv_heads * l.chunks;
  const int64_t most = std::min<int64_t>(kMaxSplits, (a.n_keys + kKeys - 1) / kKeys);
  const int64_t wanted = blocks == 0 ? 1 : (int64_t{kBlocks} * multiprocessors() + blocks - 1) / blocks;
  l.splits = static_cast<int>(std::max<int64_t>(1, std::min(most, wanted)));
  l.inverse_softcap = a.softcap > 0.0f ? 1.0f / a.softcap : 0.0f;
  const int64_t parts = a.n_batch * a.n_kv_heads * l.n_rows * l.splits;
  l.stats = a.workspace, l.sums = a.workspace + 2 * parts;
  return l;
}

}  // namespace

int64_t attention_decode_workspace(const DecodeArgs& a, Stream) {
  int64_t size = 0;
  with_kernel(a, [&](auto type, auto lanes, auto rows) {
    const DecodeLaunch l = decode_launch<decltype(type), lanes(), rows()>(a);
    if (l.splits > 1) size = a.n_batch * a.n_kv_heads * l.n_rows * l.splits * (a.head_dim + 2);
  });
  return size;
}

void attention_decode_fwd(const DecodeArgs& a, Stream stream) {
  with_kernel(a, [&](auto type, auto lanes, auto rows) {
    using T = decltype(type);
    DecodeLaunch l = decode_launch<T, lanes(), rows()>(a);
    const auto pieces = [&](const void* x, const AttentionStrides& s) {
      return is_aligned(x) && (s.batch | s.row | s.head | a.head_dim) % kLanes<T> == 0;
    };
    l.aligned = pieces(a.k, a.k_at) && pieces(a.v, a.v_at);
    const int64_t heads = a.n_batch * a.n_kv_heads;
    const auto run = [&](auto kernel) {
      launch("attention_decode_fwd_kernel", kernel, Grid{heads * l.chunks * l.splits}, dim3(kThreads), 0, stream, l);
    };
    if (a.pages == nullptr) run(attention_decode_fwd_kernel<T, lanes(), rows(), false>);
    else run(attention_decode_fwd_kernel<T, lanes(), rows(), true>);
    if (l.splits == 1) return;
    launch("attention_decode_fwd_add_kernel", attention_decode_fwd_add_kernel<T>, Grid{heads * l.n_rows}, dim3(kThreads), 0,
           stream, l);
  });
}

}  // namespace fastgpt::cuda
