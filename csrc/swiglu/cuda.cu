// act(gate) * up, forward and backward; formulas in fastgpt/ops/swiglu.py, core/math.h and activations.cuh.
//
//   y = act(gate) up;  dgate = dy up act'(gate);  dup = dy act(gate);  act: silu, gelu, gelu_tanh or relu^2
//
// Saved for backward: gate and up. Bytes per 16-bit element of y: forward 6 (read gate and up, write y),
// backward 10 (read dy, gate, up, write dgate, dup). Floor for N = 65536, C = 2048: forward (805 MB) A100 395 us, H100
// 240, H200 168; backward (1342 MB) 658, 401, 280.
//
// How: a thread has 8 columns (one 16-byte piece) of 2 rows, all requested before the first is used. Forward: 32
// registers, 2048 threads with 64 bytes each, 128 KB in flight to a multiprocessor (norm/cuda.cuh: how much is needed);
// backward: 48, 1280 threads with 96 bytes, 120 KB. Instructions per 16-bit element on sm_90: forward silu 17, gelu 30,
// relu^2 15 (an H100 has time for 51, activations.cuh), backward 27, 39, 21 (86); fp32 at most 75 (103), 84 (172).
#include "core/cuda/activations.cuh"
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

// Calls f(T{}, activation, lanes), the last two as constants. in_pieces(L): whether all rows are pieces of L columns.
template <typename P, typename F>
void with_kernel(const SwigluArgs& a, P in_pieces, F f) {
  if (a.n_rows == 0 || a.n_cols == 0) return;
  with_type(a.dtype, [&](auto t) {
    constexpr int L = kLanes<decltype(t)>;
    const bool pieces = in_pieces(L);
    with_activation(a.activation, [&](auto act) {
      pieces ? f(t, act, std::integral_constant<int, L>{}) : f(t, act, std::integral_constant<int, 1>{});
    });
  });
}

}  // namespace

void swiglu_fwd(const SwigluArgs& a, Stream stream) {
  const auto in_pieces = [&](int lanes) {
    return all_aligned({a.gate, a.up, a.y}) && (a.n_cols | a.gate_row | a.up_row) % lanes == 0;
  };
  with_kernel(a, in_pieces, [&](auto t, auto act, auto lanes) {
    launch_tiles<lanes(), kRows>("swiglu_fwd_kernel", swiglu_fwd_kernel<decltype(t), act(), lanes()>, a, stream);
  });
}

void swiglu_bwd(const SwigluArgs& a, Stream stream) {
  const auto in_pieces = [&](int lanes) {
    return all_aligned({a.dy, a.gate, a.up, a.dgate, a.dup}) &&
           (a.n_cols | a.dy_row | a.gate_row | a.up_row | a.grad_row) % lanes == 0;
  };
  with_kernel(a, in_pieces, [&](auto t, auto act, auto lanes) {
    launch_tiles<lanes(), kRows>("swiglu_bwd_kernel", swiglu_bwd_kernel<decltype(t), act(), lanes()>, a, stream);
  });
}

}  // namespace fastgpt::cuda
