// Gradients of parameters that all rows share. Each block sums its rows in registers and writes one fp32 partial; a
// second kernel adds the partials in order. Without atomics, every run gives the same bits.
#pragma once
#include "core/column_sum.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/reduce.cuh"
#include "core/cuda/vec.cuh"

namespace fastgpt::cuda {

// First column of piece i of this thread in a row. A warp has 32 kPacks neighbouring pieces; those of a thread are a
// fixed distance apart.
template <int L, int kPacks>
__device__ __forceinline__ int column(int i) {
  return ((threadIdx.x / 32 * kPacks + i) * 32 + threadIdx.x % 32) * L;
}

// Index in shared memory of four sums, from l on, of the L that this thread has from column c on. With L = 8 every other
// four threads swap the halves of theirs: eight threads, which access memory together, would reach each bank twice.
template <int L>
__device__ __forceinline__ int four_of(int c, int l) {
  if constexpr (L == 8) return c + (l ^ (threadIdx.x & 4));
  else return c + l;
}

template <int L>
__device__ __forceinline__ void load_shared(const float* shared, int c, float (&sums)[L]) {
  if constexpr (L == 1) {
    sums[0] = shared[c];
  } else {
#pragma unroll
    for (int l = 0; l < L; l += 4) unpack<float>(*reinterpret_cast<const uint4*>(shared + four_of<L>(c, l)), sums + l);
  }
}

template <int L>
__device__ __forceinline__ void store_shared(float* shared, int c, const float (&sums)[L]) {
  if constexpr (L == 1) {
    shared[c] = sums[0];
  } else {
#pragma unroll
    for (int l = 0; l < L; l += 4) *reinterpret_cast<uint4*>(shared + four_of<L>(c, l)) = pack<float>(sums + l);
  }
}

// Adds the sums of all threads into partial (n), the row groups in the order of threadIdx.y. `shared`: n floats that
// nothing else uses, at a 16-byte boundary unless L is 1; not needed with one row group. The whole block must call this.
template <int L, int kPacks>
__device__ __forceinline__ void write_partial(const float (&sums)[kPacks][L], int n, float* shared, float* partial) {
  for (unsigned y = 0; y < blockDim.y; ++y) {
    const bool last = y + 1 == blockDim.y;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<L, kPacks>(i);
      if (c >= n || threadIdx.y != y) continue;
      float total[L] = {};
      if (y > 0) load_shared(shared, c, total);
#pragma unroll
      for (int l = 0; l < L; ++l) total[l] += sums[i][l];
      if (last) store_whole(partial + c, total);
      else store_shared(shared, c, total);
    }
    if (!last) __syncthreads();
  }
}

// Sums partials (n_blocks, gridDim.y, n) into sums[blockIdx.y] (n), of T or fp32: 32 columns per block, threadIdx.y
// strides over the partials.
struct Partials {
  const float* data;
  ColumnSum sums[3];
  int64_t n_blocks, n;
};

template <typename T>
__global__ void __launch_bounds__(1024) add_partials_kernel(const Partials p) {
  __shared__ float sums[32][33];
  const ColumnSum to = blockIdx.y == 0 ? p.sums[0] : blockIdx.y == 1 ? p.sums[1] : p.sums[2];
  if (to.out == nullptr) return;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float sum = 0.0f;
  if (c < p.n) {
#pragma unroll 8
    for (int64_t b = threadIdx.y; b < p.n_blocks; b += 32) {
      sum += __ldg(p.data + (b * gridDim.y + blockIdx.y) * p.n + c);
    }
  }
  sums[threadIdx.x][threadIdx.y] = sum;
  __syncthreads();
  const float total = warp_sum(sums[threadIdx.y][threadIdx.x]);  // warp y adds column y
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.y;
  if (threadIdx.x != 0 || column >= p.n) return;
  if (to.dtype == DType::f32) static_cast<float*>(to.out)[column] = total;
  else static_cast<T*>(to.out)[column] = narrow<T>(total);
}

// n_sums: how many of p.sums there are.
template <typename T>
void add_partials(const Partials& p, int n_sums, Stream stream) {
  launch("add_partials_kernel", add_partials_kernel<T>, Grid{(p.n + 31) / 32, n_sums}, dim3(32, 32), 0, stream, p);
}

}  // namespace fastgpt::cuda
