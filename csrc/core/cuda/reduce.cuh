// Sums and maxima over a warp and over the threads of one threadIdx.y ("row group": blockDim.x threads, a multiple of
// 32). The order is fixed and every thread gets the same bits.
#pragma once
#include <cuda_runtime.h>
#include "core/cuda/ptx.cuh"

namespace fastgpt::cuda {

constexpr int kMaxWarps = 32;

// exp(x) for x <= 0: absolute error at most 2^-24 (relative: |x| 2^-23.5); 0 for -inf.
__device__ __forceinline__ float fast_exp(float x) { return ptx::ex2(x * 1.44269504f); }

template <typename V>  // float or double
__device__ __forceinline__ V warp_sum(V v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

// For the three functions below, `scratch` is shared memory: kMaxWarps values per reduced value, which no other
// reduction may use before the next barrier. With one warp in the row group there is no barrier.
template <typename V>
__device__ __forceinline__ V row_sum(V v, V* scratch) {
  v = warp_sum(v);
  if (blockDim.x == 32) return v;
  const int lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
  V* mine = scratch + threadIdx.y * n_warps;
  if (lane == 0) mine[threadIdx.x / 32] = v;
  __syncthreads();
  return warp_sum(lane < n_warps ? mine[lane] : V{});
}

__device__ __forceinline__ float row_max(float v, float* scratch) {
  v = warp_max(v);
  if (blockDim.x == 32) return v;
  const int lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
  float* mine = scratch + threadIdx.y * n_warps;
  if (lane == 0) mine[threadIdx.x / 32] = v;
  __syncthreads();
  return warp_max(lane < n_warps ? mine[lane] : mine[0]);
}

// Sums a and b with one barrier; scratch: 2 * kMaxWarps.
template <typename V>
__device__ __forceinline__ void row_sum2(V& a, V& b, V* scratch) {
  a = warp_sum(a);
  b = warp_sum(b);
  if (blockDim.x == 32) return;
  const int lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
  V* mine = scratch + threadIdx.y * n_warps * 2;
  if (lane == 0) {
    mine[threadIdx.x / 32] = a;
    mine[n_warps + threadIdx.x / 32] = b;
  }
  __syncthreads();
  a = warp_sum(lane < n_warps ? mine[lane] : V{});
  b = warp_sum(lane < n_warps ? mine[n_warps + lane] : V{});
}

}  // namespace fastgpt::cuda
