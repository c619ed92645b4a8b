// A tile of 64 x 64 of a bf16 product: four warps, 32 columns of the operands a step, the next step copied meanwhile.
#include <cuda_runtime.h>

constexpr int kStep = 32, kRow = 2 * kStep;  // bytes of a row of a tile in shared memory

__device__ __forceinline__ void read(unsigned (&r)[4], unsigned from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from));
}

__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Sixteen bytes in a row of 64 that is shifted so that eight rows are in different banks.
__device__ __forceinline__ unsigned place(int row, int piece) { return row * kRow + ((piece ^ row / 2 % 4) * 16); }

__global__ void __launch_bounds__(128) product_kernel(const uint4* a, const uint4* b, float* c, int steps) {
  __shared__ uint4 tiles[2][2][64 * kRow / 16];
  const unsigned base = static_cast<unsigned>(__cvta_generic_to_shared(tiles));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sums[8][4] = {};
  auto copy = [&](int step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * 32 + threadIdx.x / 4, piece = threadIdx.x % 4;
      const unsigned to = base + step % 2 * 2 * 64 * kRow + place(row, piece);
      const long from = (static_cast<long>(row) * steps + step) * 4 + piece;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(a + from));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + 64 * kRow), "l"(b + from));
    }
    asm volatile("cp.async.commit_group;");
  };
  copy(0);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy(step + 1);
    asm volatile("cp.async.wait_group 1;");
    __syncthreads();
    const unsigned left = base + step % 2 * 2 * 64 * kRow, right = left + 64 * kRow;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      unsigned rows[4], columns[4];
      read(rows, left + place(warp * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        read(columns, right + place(n * 16 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
        multiply(sums[2 * n], rows, columns[0], columns[1]);
        multiply(sums[2 * n + 1], rows, columns[2], columns[3]);
      }
    }
    __syncthreads();
  }
  for (int n = 0; n < 8; ++n)
    for (int i = 0; i < 4; ++i) c[(blockIdx.x * 128 + threadIdx.x) * 32 + n * 4 + i] = sums[n][i];
}
