// Shared by bias_gelu and swiglu on CUDA: the activation functions, and the columns and rows of a block.
//
// fp32 tensors use the formulas of math.h. 16-bit tensors allow fewer instructions per element before a kernel is no
// longer memory-bound (an H100 has 132 x 128 lanes at 1.7 GHz: 34 instructions in the time of 4 bytes, 51 in that of
// 6), so they use shorter formulas with ex2.approx and rcp.approx. With u = 2^-23 and the largest errors of ex2 and
// rcp, values have an error of 3 u |x| and slopes of 3.2 u.
#pragma once
#include "core/cuda/launch.cuh"
#include "core/cuda/vec.cuh"
#include "core/with_type.h"

namespace fastgpt::cuda {

template <typename T>
constexpr bool kShort = sizeof(T) == 2;

__device__ __forceinline__ float short_sigmoid(float v) { return ptx::rcp(1.0f + ptx::ex2(v * -1.44269504f)); }

// Like normal_tail: Phi(-a) = exp(-a^2 / 2) P(a t) t, but with t = 1 / (a + 4) and P of degree 6 (relative error 1.1 u
// for a <= 6, where the tail is 1e-9).
__device__ __forceinline__ NormalTail short_tail(float x) {
  const float size = fabsf(x);
  const float a = size > 15.0f ? 15.0f : size;  // NaN stays NaN
  const float e = ptx::ex2(-0.721347520f * a * a);
  const float t = ptx::rcp(a + 4.0f);
  const float w = a * t;
  float p = -0.37476465f;
  p = p * w + 0.84116745f;
  p = p * w + 0.26592976f;
  p = p * w - 3.1895263f;
  p = p * w + 5.23388f;
  p = p * w - 4.3830914f;
  p = p * w + 2.0000002f;
  return NormalTail{a, p * t * e, 0.398942280f * e};
}

template <typename T>
__device__ __forceinline__ float gelu(float x) {
  if constexpr (!kShort<T>) return gelu_f(x);
  const NormalTail n = short_tail(x);
  return at_least(x, 0.0f) - n.a * n.tail;
}

template <typename T>
__device__ __forceinline__ ValueSlope gelu_and_slope(float x) {
  if constexpr (!kShort<T>) return gelu_both(x);
  const NormalTail n = short_tail(x);
  const float low = n.tail - n.a * n.density;
  return ValueSlope{at_least(x, 0.0f) - n.a * n.tail, x > 0.0f ? 1.0f - low : low};
}

template <typename T>
__device__ __forceinline__ float gelu_tanh(float x) {
  if constexpr (!kShort<T>) return gelu_tanh_f(x);
  return x * short_sigmoid(1.59576912f * x * (1.0f + 0.044715f * x * x));
}

template <typename T>
__device__ __forceinline__ ValueSlope gelu_tanh_and_slope(float x) {
  if constexpr (!kShort<T>) return gelu_tanh_both(x);
  const float u = clamp_to(x, 9.9f), v = 1.59576912f * u, s2 = 0.044715f * u * u;
  const float e = ptx::ex2(v * (1.0f + s2) * -1.44269504f), s = ptx::rcp(1.0f + e);
  return ValueSlope{at_least(x, -9.9f) * s, s + s * (e * s) * (v * (1.0f + 3.0f * s2))};
}

template <typename T>
__device__ __forceinline__ float silu(float x) {
  return kShort<T> ? x * short_sigmoid(x) : silu_f(x);
}

template <typename T>
__device__ __forceinline__ ValueSlope silu_and_slope(float x) {
  if constexpr (!kShort<T>) return silu_both(x);
  const float u = clamp_to(x, 86.0f), e = ptx::ex2(u * -1.44269504f), s = ptx::rcp(1.0f + e);
  return ValueSlope{at_least(x, -86.0f) * s, s + s * (e * s) * u};
}

// ---- tiles: a thread has L neighbouring columns in kRows rows, blockDim.y apart ----

constexpr int kTileThreads = 256;  // at most

struct Tiles {
  unsigned per_row;  // tiles in a row; they vary fastest in blockIdx.x
  dim3 block;
  int64_t row_blocks;  // blocks along the rows; each thread has `rows` rows
};

inline Tiles tiles_of(int64_t n_rows, int64_t n_cols, int lanes, int rows) {
  const int64_t pieces = (n_cols + lanes - 1) / lanes;
  const int64_t per_row = (pieces + kTileThreads - 1) / kTileThreads;
  const unsigned threads = static_cast<unsigned>(((pieces + per_row - 1) / per_row + 31) / 32 * 32);
  const unsigned side_by_side = kTileThreads / threads;
  const int64_t block_rows = int64_t{rows} * side_by_side;
  return Tiles{static_cast<unsigned>(per_row), dim3(threads, side_by_side), (n_rows + block_rows - 1) / block_rows};
}

// Launches kernel(a, per_row) with one block per tile; each thread has L columns and kRows rows.
template <int L, int kRows, typename Args>
void launch_tiles(const char* name, void (*kernel)(Args, unsigned), const Args& a, Stream stream) {
  const Tiles t = tiles_of(a.n_rows, a.n_cols, L, kRows);
  launch(name, kernel, Grid{t.row_blocks * t.per_row}, t.block, 0, stream, a, t.per_row);
}

// First column of this thread; n_cols or more where it has none.
template <int L>
__device__ __forceinline__ int64_t tile_column(unsigned per_row) {
  return (static_cast<int64_t>(blockIdx.x % per_row) * blockDim.x + threadIdx.x) * L;
}

}  // namespace fastgpt::cuda
