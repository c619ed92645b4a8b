// One kernel with inefficiencies that test_planted.py switches on one by one. Loads and stores are written as PTX so that
// the compiler neither merges nor drops them.
#include <cuda_runtime.h>

enum Plant { kNone, kDoubledLoad, kUncoalesced, kConflict, kBarrier };

__device__ __forceinline__ float load(const float* from) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(from));
  return value;
}

// Volatile: ptxas drops other loads whose result nobody uses, inside `asm volatile` as well.
__device__ __forceinline__ void again(const float* from) {
  asm volatile("{ .reg .f32 unused; ld.volatile.global.f32 unused, [%0]; }" ::"l"(from));
}

template <int P>
__global__ void __launch_bounds__(256) planted_kernel(const float* __restrict__ x, float* y, int rounds) {
  __shared__ float tile[256 * 40];
  const unsigned base = static_cast<unsigned>(__cvta_generic_to_shared(tile));
  const unsigned slot = base + threadIdx.x * (P == kConflict ? 160 : 132), free_of_conflicts = base + threadIdx.x * 132;
  const float* from = x + threadIdx.x * (P == kUncoalesced ? 32 : 1);
  float total = 0;
#pragma unroll 1
  for (int i = 0; i < rounds; ++i) {  // the same address, so that no address arithmetic differs
    const float value = load(from);
    if (P == kDoubledLoad) again(from);
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(slot), "f"(value));
    __syncthreads();
    if (P == kBarrier) __syncthreads();
    float other;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(other) : "r"(free_of_conflicts));
    total = fmaf(other, value, total);
    __syncthreads();
  }
  y[blockIdx.x * 256 + threadIdx.x] = total;
}

template __global__ void planted_kernel<kNone>(const float*, float*, int);
template __global__ void planted_kernel<kDoubledLoad>(const float*, float*, int);
template __global__ void planted_kernel<kUncoalesced>(const float*, float*, int);
template __global__ void planted_kernel<kConflict>(const float*, float*, int);
template __global__ void planted_kernel<kBarrier>(const float*, float*, int);
