// act(gate) * up, forward and backward; formulas in fastgpt/ops/swiglu.py, core/math.h and activations.cuh.
//
//   y = act(gate) up;  dgate = dy up act'(gate);  dup = dy act(gate);  act: silu, gelu, gelu_tanh or relu^2
//
// Saved for backward: gate and up. Bytes for each element of y of 16 bits: forward 6 (read gate and up, write y),
// backward 10 (read dy, gate, up, write dgate, dup). Floor for N = 65536, C = 2048: forward (805 MB) A100 395 us, H100
// 240, H200 168; backward (1342 MB) 658, 401, 280.
//
// How: a thread has 8 columns (one 16-byte piece) of 2 rows, all requested before the first is used. Forward: 32
// registers, 2048 threads with 64 bytes each, 128 KB on their way to a multiprocessor (norm/cuda.cuh says what it takes);
// backward: 48, 1280 threads with 96 bytes, 120 KB. Instructions for each element of 16 bits, sm_90: forward silu 17,
// gelu 30, relu^2 15 (an H100 has time for 51, activations.cuh), backward 27, 39, 21 (86); fp32 at most 75 (103), 84
// (172).
#include "core/cuda/activations.cuh"
#include "core/cuda/launch.cuh"
#include "swiglu/op.h"

namespace fastgpt::cuda {
namespace {

constexpr int kRows = 2;

template <typename T, Activation A>
__device__ __forceinline__ float act(float x) {
  return A == Activation::silu    ? silu<T>(x)
         : A == Activation::gelu  ? gelu<T>(x)
         : A == Activation::relu2 ? relu2_f(x)
                                  : gelu_tanh<T>(x);
}

template <typename T, Activation A>
__device__ __forceinline__ ValueSlope act_and_slope(float x) {
  return A == Activation::silu    ? silu_and_slope<T>(x)
         : A == Activation::gelu  ? gelu_and_slope<T>(x)
         : A == Activation::relu2 ? relu2_both(x)
                                  : gelu_tanh_and_slope<T>(x);
}

template <typename T, Activation A, int L>
__global__ void __launch_bounds__(kTileThreads) swiglu_fwd_kernel(const SwigluArgs a, unsigned per_row) {
  const int64_t c = tile_column<L>(per_row);
  const int64_t first = static_cast<int64_t>(blockIdx.x / per_row) * kRows * blockDim.y + threadIdx.y;
  if (c >= a.n_cols) return;
  Raw<T, L> gate[kRows], up[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r * blockDim.y;
    if (row >= a.n_rows) continue;
    load_raw(static_cast<const T*>(a.gate) + row * a.gate_row + c, gate[r]);
    load_raw(static_cast<const T*>(a.up) + row * a.up_row + c, up[r]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r * blockDim.y;
    if (row >= a.n_rows) continue;
    float y[L], u[L];
    widen(gate[r], y);
    widen(up[r], u);
#pragma unroll
    for (int l = 0; l < L; ++l) y[l] = act<T, A>(y[l]) * u[l];
    store_whole(static_cast<T*>(a.y) + row * a.n_cols + c, y);
  }
}

template <typename T, Activation A, int L>
__global__ void __launch_bounds__(kTileThreads) swiglu_bwd_kernel(const SwigluArgs a, unsigned per_row) {
  const int64_t c = tile_column<L>(per_row);
  const int64_t first = static_cast<int64_t>(blockIdx.x / per_row) * kRows * blockDim.y + threadIdx.y;
  if (c >= a.n_cols) return;
  Raw<T, L> dy[kRows], gate[kRows], up[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r * blockDim.y;
    if (row >= a.n_rows) continue;
    load_raw(static_cast<const T*>(a.dy) + row * a.dy_row + c, dy[r]);
    load_raw(static_cast<const T*>(a.gate) + row * a.gate_row + c, gate[r]);
    load_raw(static_cast<const T*>(a.up) + row * a.up_row + c, up[r]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r * blockDim.y;
    if (row >= a.n_rows) continue;
    float g[L], dgate[L], dup[L];
    widen(dy[r], g);
    widen(gate[r], dup);
    widen(up[r], dgate);
#pragma unroll
    for (int l = 0; l < L; ++l) {
      const ValueSlope s = act_and_slope<T, A>(dup[l]);
      dgate[l] = g[l] * dgate[l] * s.slope;
      dup[l] = g[l] * s.value;
    }
    store_whole(static_cast<T*>(a.dgate) + row * a.grad_row + c, dgate);
    store_whole(static_cast<T*>(a.dup) + row * a.grad_row + c, dup);
  }
}

// ---- launchers ----

// Calls f(T{}, activation as a constant).
template <typename F>
void with_activation(const SwigluArgs& a, F f) {
  with_float_type(a.dtype, [&](auto t) {
    switch (a.activation) {
      case Activation::silu: return f(t, std::integral_constant<Activation, Activation::silu>{});
      case Activation::gelu: return f(t, std::integral_constant<Activation, Activation::gelu>{});
      case Activation::relu2: return f(t, std::integral_constant<Activation, Activation::relu2>{});
      case Activation::gelu_tanh: return f(t, std::integral_constant<Activation, Activation::gelu_tanh>{});
    }
  });
}

template <typename T, Activation A, int L>
void fwd(const SwigluArgs& a, Stream stream) {
  const Tiles t = tiles_of(a.n_rows, a.n_cols, L, kRows);
  launch("swiglu_fwd_kernel", swiglu_fwd_kernel<T, A, L>, Grid{t.row_blocks * t.per_row}, t.block, 0, stream, a,
         t.per_row);
}

template <typename T, Activation A, int L>
void bwd(const SwigluArgs& a, Stream stream) {
  const Tiles t = tiles_of(a.n_rows, a.n_cols, L, kRows);
  launch("swiglu_bwd_kernel", swiglu_bwd_kernel<T, A, L>, Grid{t.row_blocks * t.per_row}, t.block, 0, stream, a,
         t.per_row);
}

}  // namespace

void swiglu_fwd(const SwigluArgs& a, Stream stream) {
  if (a.n_rows == 0 || a.n_cols == 0) return;
  with_activation(a, [&](auto t, auto act) {
    using T = decltype(t);
    constexpr int L = kLanes<T>;
    const bool vectors = all_aligned({a.gate, a.up, a.y}) && (a.n_cols | a.gate_row | a.up_row) % L == 0;
    vectors ? fwd<T, act(), L>(a, stream) : fwd<T, act(), 1>(a, stream);
  });
}

void swiglu_bwd(const SwigluArgs& a, Stream stream) {
  if (a.n_rows == 0 || a.n_cols == 0) return;
  with_activation(a, [&](auto t, auto act) {
    using T = decltype(t);
    constexpr int L = kLanes<T>;
    const bool vectors = all_aligned({a.dy, a.gate, a.up, a.dgate, a.dup}) &&
                         (a.n_cols | a.dy_row | a.gate_row | a.up_row | a.grad_row) % L == 0;
    vectors ? bwd<T, act(), L>(a, stream) : bwd<T, act(), 1>(a, stream);
  });
}

}  // namespace fastgpt::cuda
