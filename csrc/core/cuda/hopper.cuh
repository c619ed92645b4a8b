// Functions for the instructions of sm_90a: barriers in shared memory that count bytes (mbarrier), tensor copies (TMA),
// barriers of some threads, registers that move between warpgroups. Products are in wgmma.cuh. FASTGPT_SM90A is defined
// where they exist. tests/cuda_on_cpu replaces this file for the host.
#pragma once
#include "core/cuda/ptx.cuh"
#include "core/cuda/tensor_map.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTGPT_SM90A 1
#endif

namespace fastgpt::ptx {

// ---- mbarrier: 8 bytes of shared memory. A phase ends when all arrivals and all announced bytes are there ----

__device__ __forceinline__ void mbarrier_init(Shared barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to TMA; other threads learn of them by a barrier of the block afterwards.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Shared barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes that copies will bring in this phase.
__device__ __forceinline__ void mbarrier_arrive_expect(Shared barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Returns whether the phase of this parity has ended; may wait for a while first. Phases count from 0, so parity 1 is
// true on a new barrier.
__device__ __forceinline__ bool mbarrier_try_wait(Shared barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(ended)
      : "r"(barrier), "r"(parity)
      : "memory");
  return ended != 0;
}

__device__ __forceinline__ void mbarrier_wait(Shared barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// ---- TMA ----

__device__ __forceinline__ void prefetch_tensor_map(const cuda::TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the box of `map` that starts at these coordinates (innermost first) to `to`, a multiple of 1024, and brings
// its bytes to the barrier. What is outside of the tensor becomes 0 and counts as well. One thread calls this.
__device__ __forceinline__ void tma_load(Shared to, const cuda::TensorMap& map, Shared barrier, int c0, int c1, int c2,
                                         int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(to), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// Copies `bytes` bytes to shared memory and brings them to the barrier; all three are multiples of 16. One thread calls
// this.
__device__ __forceinline__ void bulk_load(Shared to, const void* from, uint32_t bytes, Shared barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
      "r"(bytes), "r"(barrier)
      : "memory");
}

// ---- barriers of `threads` threads, a multiple of 32; number 0 is __syncthreads ----

__device__ __forceinline__ void named_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Counts as an arrival, and does not wait.
__device__ __forceinline__ void named_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- registers per thread of this warpgroup, a multiple of 8 from 24 to 256 ----

template <int N>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// Waits until other warpgroups have given enough.
template <int N>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

}  // namespace fastgpt::ptx
