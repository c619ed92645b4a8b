// Token plus position embedding, and the gradient of a table.
//
//   y[n] = weight[ids[n]] + position_weight[positions[n]];   dweight[ids[n]] += dy[n], summed in fp32
//
// Bytes per 16-bit element: forward 4 (read the row, write y; position rows are read from L2); backward reads dy
// (2) and reads and writes each row of dweight that has tokens once. Floor for N = 65536, C = 768: forward (201 MB)
// A100 99 us, H100 60, H200 42; backward into a 16-bit table with 20000 rows in use (162 MB): 80, 48, 34, and the sort
// before it (PyTorch's radix sort of 32-bit keys, four passes over 786 KB, bound by its launches).
//
// How: in forward a warp has a row, and each thread has kFwdUnroll 16-byte pieces of both tables in flight. Rows of one
// position are processed side by side, so the row of that position is read into L1 once. Backward gets the tokens
// sorted by table row (stable). A block sums a tile of kTile tokens in order. If all tokens of a table row are in the
// tile, the sum is added to dweight directly. The sum of a run of tokens that crosses a border of the tile becomes a
// partial, at most two per tile, and the same kernel adds the partials, level by level (65536 tokens: 2048, 128, 8, 1
// tiles). So a row that half the tokens share costs no more than others, each row of dweight is written once, and
// without atomics every run gives the same bits. Sizes depend on shapes alone.
#include "core/cuda/launch.cuh"
#include "core/cuda/vec.cuh"
#include "core/with_type.h"
#include "embedding/op.h"

#include <algorithm>
#include <type_traits>

namespace fastgpt::cuda {
namespace {

constexpr int kFwdRows = 8;    // in a block, one per warp
constexpr int kFwdUnroll = 4;  // pieces in flight per thread
constexpr int kKeyThreads = 256;
constexpr int kTile = 32;         // rows that a block of backward sums, one per thread of its first warp
constexpr int kBwdThreads = 256;  // maximum; wider rows are split

// Rows in flight per thread of backward: 128 bytes.
template <typename T, int L>
constexpr int kBwdUnroll = L == 1 ? 8 : 128 / static_cast<int>(sizeof(T) * L);

__device__ __forceinline__ int64_t index_at(const Indices& indices, int64_t n) {
  return indices.wide ? static_cast<const int64_t*>(indices.data)[n] : static_cast<const int32_t*>(indices.data)[n];
}

template <typename T, int L>
__global__ void __launch_bounds__(kFwdRows * 32) embedding_fwd_kernel(const EmbeddingFwdArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFwdRows + threadIdx.y;
  if (i >= a.n_tokens) return;
  const bool both = a.position_weight != nullptr;
  const int64_t period = both ? a.period : a.n_tokens, n_sequences = a.n_tokens / period;
  const int64_t t = i / n_sequences, n = (i - t * n_sequences) * period + t;  // ordered by position
  const int64_t v = index_at(a.ids, n);
  const int64_t p = a.positions.data == nullptr ? t : index_at(a.positions, t);
  const bool known = v >= 0 && v < a.n_rows && (!both || (p >= 0 && p < a.n_positions));
  const T* w = static_cast<const T*>(a.weight) + v * a.weight_row;
  const T* q = static_cast<const T*>(a.position_weight) + p * a.position_row;
  T* y = static_cast<T*>(a.y) + n * a.n_cols;
  const int n_cols = static_cast<int>(a.n_cols);
  for (int first = threadIdx.x * L; first < n_cols; first += kFwdUnroll * 32 * L) {
    Raw<T, L> w_raw[kFwdUnroll], q_raw[kFwdUnroll];
#pragma unroll
    for (int u = 0; u < kFwdUnroll; ++u) {
      const int c = first + u * 32 * L;
      if (!known || c >= n_cols) continue;
      load_raw(w + c, w_raw[u]);
      if (both) load_raw(q + c, q_raw[u]);
    }
#pragma unroll
    for (int u = 0; u < kFwdUnroll; ++u) {
      const int c = first + u * 32 * L;
      if (c >= n_cols) continue;
      float x[L], more[L];
      if (known) widen(w_raw[u], x);
      if (known && both) widen(q_raw[u], more);
#pragma unroll
      for (int l = 0; l < L; ++l) x[l] = !known ? NAN : both ? x[l] + more[l] : x[l];
      store(y + c, x);
    }
  }
}

// Writes the table row of each token, n_rows if it is outside the table.
__global__ void __launch_bounds__(kKeyThreads) embedding_keys_kernel(const EmbeddingBwdArgs a, int32_t* keys) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kKeyThreads + threadIdx.x;
  if (n >= a.n_tokens) return;
  const int64_t v = index_at(a.ids, n);
  keys[n] = static_cast<int32_t>(v >= 0 && v < a.n_rows ? v : a.n_rows);
}

// Input of one launch: the rows of dy in the sorted order of the tokens, later the partials of the previous level.
struct Level {
  const void* rows;        // (..., C): dy, or partials
  int64_t row_step;
  const int64_t* order;    // (n_rows): indices into `rows`; null: all, in order
  const int32_t* keys;     // (n_rows): table rows, equal ones adjacent; EmbeddingBwdArgs::n_rows: adds nothing
  int64_t n_rows;
  float* partials;         // (n_tiles, 2, C): sums of the run from before the tile, and of the run beyond it
  int32_t* partial_keys;   // (n_tiles, 2): the table rows of these runs
};

// Where the sum goes after a row is added to it, as one of these values or the number of a table row.
constexpr int kGoesOn = -1, kToHead = -2, kToTail = -3, kNotAdded = -4;

// Returns this for row i of a tile of n rows. A run that fills the tile and crosses both borders is split in the
// middle, with one half for each partial.
__device__ __forceinline__ int sum_goes_to(const Level& level, int64_t begin, int i, int n, int nothing,
                                           int32_t* partial_keys) {
  const auto key_at = [&](int64_t row) { return row >= 0 && row < level.n_rows ? level.keys[row] : -1; };
  const int key = key_at(begin + i), next = key_at(begin + i + 1), first = key_at(begin), last = key_at(begin + n - 1);
  const bool from_before = first != nothing && first == key_at(begin - 1);
  const bool goes_on = last != nothing && last == key_at(begin + n);
  const bool all_one = from_before && goes_on && first == last;
  if (i == 0 && partial_keys != nullptr) {
    partial_keys[0] = from_before ? first : nothing;
    partial_keys[1] = goes_on ? last : nothing;
  }
  if (i >= n || key == nothing) return kNotAdded;
  if (i + 1 < n && key == next && !(all_one && i + 1 == kTile / 2)) return kGoesOn;
  if (from_before && key == first && !(all_one && i + 1 > kTile / 2)) return kToHead;
  return goes_on && i + 1 == n ? kToTail : key;
}

// One tile per block, L columns per thread. For rows that are not added, the thread reads a row that exists instead, so
// that no branch precedes a load.
template <typename T, typename W, int L>
__global__ void __launch_bounds__(kBwdThreads) embedding_bwd_kernel(const EmbeddingBwdArgs a, const Level level) {
  constexpr int kUnroll = kBwdUnroll<T, L>;
  __shared__ int64_t rows[kTile];  // offset from level.rows in elements
  __shared__ int goes_to[kTile];
  const int64_t tile = blockIdx.x, begin = tile * kTile;
  const int n = static_cast<int>(level.n_rows - begin < kTile ? level.n_rows - begin : kTile);
  const int n_cols = static_cast<int>(a.n_cols), i = threadIdx.x;
  if (i < kTile) {
    goes_to[i] = sum_goes_to(level, begin, i, n, static_cast<int>(a.n_rows),
                             blockIdx.y == 0 ? level.partial_keys + 2 * tile : nullptr);
    const int64_t row = goes_to[i] == kNotAdded ? 0 : begin + i;
    rows[i] = (level.order == nullptr ? row : level.order[row]) * level.row_step;
  }
  __syncthreads();
  const int c = (blockIdx.y * blockDim.x + threadIdx.x) * L;
  if (c >= n_cols) return;
  const T* columns = static_cast<const T*>(level.rows) + c;
  float total[L] = {};
  for (int first = 0; first < n; first += kUnroll) {
    Raw<T, L> raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) load_raw(columns + rows[first + u], raw[u]);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int to = goes_to[first + u];
      if (to == kNotAdded) continue;
      float x[L];
      widen(raw[u], x);
#pragma unroll
      for (int l = 0; l < L; ++l) total[l] += x[l];
      if (to == kGoesOn) continue;
      if (to < 0) {
        store(level.partials + (2 * tile + (to == kToTail)) * n_cols + c, total);
      } else {
        W* row = static_cast<W*>(a.dweight) + to * a.dweight_row + c;
        load(row, x);
#pragma unroll
        for (int l = 0; l < L; ++l) total[l] += x[l];
        store(row, total);
      }
#pragma unroll
      for (int l = 0; l < L; ++l) total[l] = 0.0f;
    }
  }
}

// ---- launchers ----

int64_t tiles_of(int64_t n_rows) { return (n_rows + kTile - 1) / kTile; }

template <typename T, typename W, int L>
void add_level(const EmbeddingBwdArgs& a, const Level& level, Stream stream) {
  const int64_t n_pieces = (a.n_cols + L - 1) / L;
  const int64_t threads = std::min<int64_t>((n_pieces + 31) / 32 * 32, kBwdThreads);
  launch("embedding_bwd_kernel", embedding_bwd_kernel<T, W, L>,
         Grid{tiles_of(level.n_rows), (n_pieces + threads - 1) / threads}, dim3(threads), 0, stream, a, level);
}

template <typename T, typename W, bool kPieces>
void add_levels(const EmbeddingBwdArgs& a, Stream stream) {
  constexpr int kPartialLanes = kPieces ? kLanes<W> : 1, kDyLanes = kPieces ? std::max(kLanes<T>, kLanes<W>) : 1;
  Level level{a.dy, a.dy_row, a.order, a.sorted, a.n_tokens, a.partials, a.partial_keys};
  add_level<T, W, kDyLanes>(a, level, stream);
  while (tiles_of(level.n_rows) > 1) {
    const int64_t n = 2 * tiles_of(level.n_rows);
    level = {level.partials, a.n_cols, nullptr, level.partial_keys, n, level.partials + n * a.n_cols,
             level.partial_keys + n};
    add_level<float, W, kPartialLanes>(a, level, stream);
  }
}

}  // namespace

void embedding_fwd(const EmbeddingFwdArgs& a, Stream stream) {
  if (a.n_tokens == 0 || a.n_cols == 0) return;
  const Grid grid{(a.n_tokens + kFwdRows - 1) / kFwdRows};
  const dim3 block(32, kFwdRows);
  with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int L = kLanes<T>;
    const bool pieces = is_aligned(a.weight) && is_aligned(a.position_weight) && is_aligned(a.y) &&
                        (a.n_cols | a.weight_row | (a.position_weight ? a.position_row : 0)) % L == 0;
    launch("embedding_fwd_kernel", pieces ? embedding_fwd_kernel<T, L> : embedding_fwd_kernel<T, 1>, grid, block, 0,
           stream, a);
  });
}

void embedding_keys(const EmbeddingBwdArgs& a, int32_t* keys, Stream stream) {
  if (a.n_tokens == 0) return;
  launch("embedding_keys_kernel", embedding_keys_kernel, Grid{(a.n_tokens + kKeyThreads - 1) / kKeyThreads},
         dim3(kKeyThreads), 0, stream, a, keys);
}

int64_t embedding_partials(int64_t n_tokens, Stream) {
  int64_t total = 2;  // for the single tile of the last level
  for (int64_t n = n_tokens; tiles_of(n) > 1; total += n) n = 2 * tiles_of(n);
  return total;
}

void embedding_bwd_add(const EmbeddingBwdArgs& a, Stream stream) {
  if (a.n_tokens == 0 || a.n_cols == 0) return;
  with_types(a.dtype, a.dweight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    const bool pieces = is_aligned(a.dy) && is_aligned(a.dweight) && is_aligned(a.partials) &&
                        (a.n_cols | a.dy_row | a.dweight_row) % std::max(kLanes<T>, kLanes<W>) == 0;
    pieces ? add_levels<T, W, true>(a, stream) : add_levels<T, W, false>(a, stream);
  });
}

}  // namespace fastgpt::cuda
