// bias + GELU, forward and backward; formulas in fastgpt/ops/bias_gelu.py, core/math.h and activations.cuh.
//
//   y = gelu(x + bias);  dx = dy gelu'(x + bias);  dbias = sum_rows dx, before dx is rounded
//
// Saved for backward: x and bias. Bytes per 16-bit element: forward 4 (read x, write y), backward 6 (read dy
// and x, write dx). Floor for N = 65536, C = 3072: forward (805 MB) A100 395 us, H100 240, H200 168; backward (1208 MB)
// 592, 361, 252.
//
// How: a thread has 8 columns (one 16-byte piece; their bias stays in registers) and 4 rows at a time, all requested
// before the first is used. Forward: 48 registers, 1280 threads with 64 bytes each, 80 KB in flight to a multiprocessor
// (norm/cuda.cuh: how much is needed). Backward: 80 registers, 768 threads with 128 bytes each, 96 KB; one wave of
// blocks goes down the rows of their columns with dbias in registers and writes one fp32 partial each (partials.cuh).
// Instructions per 16-bit element on sm_90: forward erf 26, tanh 17 (an H100 has time for 34, activations.cuh),
// backward 34 and 31 (51); fp32 at most 67 (69) and 86 (103).
#include "bias_gelu/op.h"
#include "core/cuda/activations.cuh"
#include "core/cuda/multiprocessors.cuh"
#include "core/cuda/partials.cuh"

namespace fastgpt::cuda {
namespace {

constexpr int kRows = 4;
constexpr int kResident = 768;  // threads on a multiprocessor in backward: 80 registers each

template <typename T, int L>
__device__ __forceinline__ void load_bias(const BiasGeluArgs& a, int64_t c, float (&bias)[L]) {
#pragma unroll
  for (int l = 0; l < L; ++l) bias[l] = 0.0f;
  if (a.bias == nullptr) return;
  if (a.bias_dtype == DType::f32) load_const(static_cast<const float*>(a.bias) + c, bias);
  else load_const(static_cast<const T*>(a.bias) + c, bias);
}

template <typename T, bool kTanh, int L>
__global__ void __launch_bounds__(kTileThreads) bias_gelu_fwd_kernel(const BiasGeluArgs a, unsigned per_row) {
  const int64_t c = tile_column<L>(per_row);
  const int64_t first = static_cast<int64_t>(blockIdx.x / per_row) * kRows * blockDim.y + threadIdx.y;
  if (c >= a.n_cols) return;
  Raw<T, L> x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r * blockDim.y;
    if (row < a.n_rows) load_raw(static_cast<const T*>(a.x) + row * a.x_row + c, x[r]);
  }
  float bias[L];
  load_bias<T>(a, c, bias);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r * blockDim.y;
    if (row >= a.n_rows) continue;
    float y[L];
    widen(x[r], y);
#pragma unroll
    for (int l = 0; l < L; ++l) y[l] = kTanh ? gelu_tanh<T>(y[l] + bias[l]) : gelu<T>(y[l] + bias[l]);
    store_whole(static_cast<T*>(a.out) + row * a.n_cols + c, y);
  }
}

// A block has the columns of one tile and every n-th group of rows, where n is the number of such blocks.
template <typename T, bool kTanh, int L>
__global__ void __launch_bounds__(kTileThreads) bias_gelu_bwd_kernel(const BiasGeluArgs a, unsigned per_row) {
  FASTGPT_DYNAMIC_SHARED(float, shared);  // (blockDim.x L) if blockDim.y > 1
  const int64_t c = tile_column<L>(per_row);
  const int64_t n_rows = c < a.n_cols ? a.n_rows : 0, group = kRows * blockDim.y, step = gridDim.x / per_row * group;
  float bias[L] = {}, dbias[1][L] = {};
  if (c < a.n_cols) load_bias<T>(a, c, bias);
  for (int64_t first = blockIdx.x / per_row * group + threadIdx.y; first < n_rows; first += step) {
    Raw<T, L> x[kRows], dy[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * blockDim.y;
      if (row >= n_rows) continue;
      load_raw(static_cast<const T*>(a.x) + row * a.x_row + c, x[r]);
      load_raw(static_cast<const T*>(a.dy) + row * a.dy_row + c, dy[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * blockDim.y;
      if (row >= n_rows) continue;
      float u[L], d[L];
      widen(x[r], u);
      widen(dy[r], d);
#pragma unroll
      for (int l = 0; l < L; ++l) {
        u[l] += bias[l];
        d[l] *= (kTanh ? gelu_tanh_and_slope<T>(u[l]) : gelu_and_slope<T>(u[l])).slope;
        dbias[0][l] += d[l];
      }
      store_whole(static_cast<T*>(a.out) + row * a.n_cols + c, d);
    }
  }
  if (a.partials == nullptr) return;
  const int64_t tile = static_cast<int64_t>(blockIdx.x % per_row) * blockDim.x * L, left = a.n_cols - tile;
  const int n = static_cast<int>(left < blockDim.x * L ? left : blockDim.x * L);
  write_partial(dbias, n, shared, a.partials + static_cast<int64_t>(blockIdx.x / per_row) * a.n_cols + tile);
}

// ---- launchers ----

template <typename T, bool kTanh, int L>
void fwd(const BiasGeluArgs& a, Stream stream) {
  launch_tiles<L, kRows>("bias_gelu_fwd_kernel", bias_gelu_fwd_kernel<T, kTanh, L>, a, stream);
}

template <typename T, bool kTanh, int L>
void bwd(const BiasGeluArgs& a, Stream stream) {
  const Tiles t = tiles_of(a.n_rows, a.n_cols, L, kRows);
  const int64_t n_blocks = bias_gelu_bwd_blocks(a.n_rows, a.n_cols, stream);
  const size_t smem = t.block.y > 1 ? sizeof(float) * t.block.x * L : 0;
  launch("bias_gelu_bwd_kernel", bias_gelu_bwd_kernel<T, kTanh, L>, Grid{n_blocks * t.per_row}, t.block, smem, stream,
         a, t.per_row);
  if (a.dbias == nullptr) return;
  add_partials<T>({a.partials, {{a.dbias, a.bias_dtype}}, n_blocks, a.n_cols}, 1, stream);
}

}  // namespace

// At most one wave, with tiles of 16-bit elements.
int64_t bias_gelu_bwd_blocks(int64_t n_rows, int64_t n_cols, Stream) {
  if (n_rows == 0 || n_cols == 0) return 0;
  const Tiles t = tiles_of(n_rows, n_cols, kLanes<bf16>, kRows);
  const int64_t wave = int64_t{multiprocessors()} * (kResident / (t.block.x * t.block.y)) / t.per_row;
  const int64_t blocks = wave < 1 ? 1 : wave;
  return t.row_blocks < blocks ? t.row_blocks : blocks;
}

void bias_gelu_fwd(const BiasGeluArgs& a, Stream stream) {
  if (a.n_rows == 0 || a.n_cols == 0) return;
  with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int L = kLanes<T>;
    if (all_aligned({a.x, a.bias, a.out}) && (a.n_cols | a.x_row) % L == 0) {
      a.tanh ? fwd<T, true, L>(a, stream) : fwd<T, false, L>(a, stream);
    } else {
      a.tanh ? fwd<T, true, 1>(a, stream) : fwd<T, false, 1>(a, stream);
    }
  });
}

void bias_gelu_bwd(const BiasGeluArgs& a, Stream stream) {
  if (a.n_rows == 0 || a.n_cols == 0) return;
  with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int L = kLanes<T>;
    if (all_aligned({a.dy, a.x, a.bias, a.out, a.partials}) && (a.n_cols | a.x_row | a.dy_row) % L == 0) {
      a.tanh ? bwd<T, true, L>(a, stream) : bwd<T, false, L>(a, stream);
    } else {
      a.tanh ? bwd<T, true, 1>(a, stream) : bwd<T, false, 1>(a, stream);
    }
  });
}

}  // namespace fastgpt::cuda
