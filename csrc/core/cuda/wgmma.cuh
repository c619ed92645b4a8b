// Products of a warpgroup on the tensor cores (wgmma): 4 warps, the first a multiple of 4, all call each function.
// tests/cuda_on_cpu replaces this file for the host.
//
// A product is asynchronous: the order of a batch is fence, products, commit, wait, settle. Until the wait, nothing may
// touch the accumulators, the registers of a, or the shared memory of the operands.
//
// c is 64 x 8 M in fp32: warp w of the warpgroup holds rows 16 w to 16 w + 15, tiles of 8 columns in the order of mma
// (ptx.cuh). a in registers has 16 columns in the order of mma. Descriptors: descriptor.cuh.
#pragma once
#include <type_traits>

#include "core/cuda/descriptor.cuh"
#include "core/cuda/hopper.cuh"

namespace fastgpt::ptx {

// Orders earlier accesses to the registers of a product before it.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of products.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all groups of this warp except the last N are done.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving uses of c to before the wait above.
template <int M>
__device__ __forceinline__ void settle(float (&c)[M][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[m][i])::"memory");
  }
}

#define FASTGPT_TILE(m) "+f"(c[m][0]), "+f"(c[m][1]), "+f"(c[m][2]), "+f"(c[m][3])
#define FASTGPT_TILES_8 \
  FASTGPT_TILE(0), FASTGPT_TILE(1), FASTGPT_TILE(2), FASTGPT_TILE(3), FASTGPT_TILE(4), FASTGPT_TILE(5), \
      FASTGPT_TILE(6), FASTGPT_TILE(7)
#define FASTGPT_TILES_16 \
  FASTGPT_TILES_8, FASTGPT_TILE(8), FASTGPT_TILE(9), FASTGPT_TILE(10), FASTGPT_TILE(11), FASTGPT_TILE(12), \
      FASTGPT_TILE(13), FASTGPT_TILE(14), FASTGPT_TILE(15)
#define FASTGPT_NUMBERS_32 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15," \
  " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define FASTGPT_NUMBERS_64 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15," \
  " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31," \
  " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47," \
  " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

// m64nNk16 of type "bf16" or "f16": both operands in shared memory, their products along the lines.
#define FASTGPT_WGMMA_SHARED(N, TYPE, TILES, NUMBERS, A, B, P) \
  asm volatile( \
      "{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " " NUMBERS ", " A ", " B ", p, 1, 1, 0, 0;\n}\n" \
      : TILES \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))

// The same with a in registers; products run across the lines of b.
#define FASTGPT_WGMMA_REGISTERS(N, TYPE, TILES, NUMBERS, A, B, P) \
  asm volatile( \
      "{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " " NUMBERS ", " A ", " B ", p, 1, 1, 1;\n}\n" \
      : TILES \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))

// c = a b^T, plus c if `add`: 16 columns of a (64 rows) and of b (8 M rows), both by along_lines.
template <typename T, int M>
__device__ __forceinline__ void wgmma_rows(float (&c)[M][4], uint64_t a, uint64_t b, bool add) {
  static_assert(M == 8 || M == 16);
  if constexpr (M == 8 && std::is_same_v<T, bf16>) {
    FASTGPT_WGMMA_SHARED("64", "bf16", FASTGPT_TILES_8, FASTGPT_NUMBERS_32, "%32", "%33", "%34");
  } else if constexpr (M == 8) {
    FASTGPT_WGMMA_SHARED("64", "f16", FASTGPT_TILES_8, FASTGPT_NUMBERS_32, "%32", "%33", "%34");
  } else if constexpr (std::is_same_v<T, bf16>) {
    FASTGPT_WGMMA_SHARED("128", "bf16", FASTGPT_TILES_16, FASTGPT_NUMBERS_64, "%64", "%65", "%66");
  } else {
    FASTGPT_WGMMA_SHARED("128", "f16", FASTGPT_TILES_16, FASTGPT_NUMBERS_64, "%64", "%65", "%66");
  }
}

// c = a b, plus c if `add`: a (64 x 16) in registers, 16 rows of b (8 M columns) by across_lines.
template <typename T, int M>
__device__ __forceinline__ void wgmma_columns(float (&c)[M][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(M == 8 || M == 16);
  if constexpr (M == 8 && std::is_same_v<T, bf16>) {
    FASTGPT_WGMMA_REGISTERS("64", "bf16", FASTGPT_TILES_8, FASTGPT_NUMBERS_32, "{%32, %33, %34, %35}", "%36", "%37");
  } else if constexpr (M == 8) {
    FASTGPT_WGMMA_REGISTERS("64", "f16", FASTGPT_TILES_8, FASTGPT_NUMBERS_32, "{%32, %33, %34, %35}", "%36", "%37");
  } else if constexpr (std::is_same_v<T, bf16>) {
    FASTGPT_WGMMA_REGISTERS("128", "bf16", FASTGPT_TILES_16, FASTGPT_NUMBERS_64, "{%64, %65, %66, %67}", "%68", "%69");
  } else {
    FASTGPT_WGMMA_REGISTERS("128", "f16", FASTGPT_TILES_16, FASTGPT_NUMBERS_64, "{%64, %65, %66, %67}", "%68", "%69");
  }
}

#undef FASTGPT_TILE
#undef FASTGPT_TILES_8
#undef FASTGPT_TILES_16
#undef FASTGPT_NUMBERS_32
#undef FASTGPT_NUMBERS_64
#undef FASTGPT_WGMMA_SHARED
#undef FASTGPT_WGMMA_REGISTERS

}  // namespace fastgpt::ptx
