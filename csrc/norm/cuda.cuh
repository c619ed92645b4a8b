// Shared by LayerNorm and RMSNorm on CUDA: assigns threads to rows, loads their pieces, stores dx, launches the
// kernels.
//
// Forward: registers hold a row as it is in memory, four pieces of 16 bytes per thread, all requested before the first
// is used. Backward: dy, h (and dsum) of the next row are copied to shared memory while this row is computed, so loads
// are always in flight; registers hold little more than the sums of dweight (and dbias, and of dx, the gradient of
// x_bias). Each block writes one fp32 partial, and partials.cuh adds them. Rows of one warp (C <= 1024 of 16 bits) need
// no barrier, others one per row, LayerNorm's forward two. Rows of more than 16384 columns in forward or 8192 in
// backward (half of that in fp32; 4096 and 2048 if not aligned) do not fit: they are read again, from L2.
//
// Full bandwidth requires about 40 KB in flight to each multiprocessor of an A100 and 64 KB of an H100. Forward uses 64
// registers, so 1024 threads each have 64 bytes of each tensor: 96 KB in flight with a residual at C = 768 (three of
// four pieces), 128 from 1024 on, and half without a residual. Backward at 16 bits, blocks of 128 threads (256 above C
// = 4096), one wave:
//   C                       blocks, A100     KB in flight     blocks, H100     KB in flight
//   768                     4 (RMSNorm 5)    48 (60)          4 (5)            48 (60)
//   768 with dsum           4                72               4 (5)            72 (90)
//   ... and x_bias          3 (4)            54 (72)          3 (4)            54 (72)
//   1024, 2048, 4096        4                64               4                64
//   ... with dsum           3                72               4                96
//   ... and x_bias          3                72               3 (4)            72 (96)
//   8192                    2; 1 with dsum   64; 48           2                64; 96
#pragma once
#include "core/cuda/launch.cuh"
#include "core/cuda/multiprocessors.cuh"
#include "core/cuda/partials.cuh"
#include "core/cuda/reduce.cuh"
#include "core/cuda/vec.cuh"
#include "core/with_type.h"

#include <type_traits>
#include <utility>

namespace fastgpt::cuda {

constexpr int kFwdThreads = 512;   // maximum for one row in registers
constexpr int kWideThreads = 512;  // in a block that sweeps over the columns of a wide row
constexpr int kWideRows = 8;       // rows that a backward block of wide rows processes together
constexpr int kBwdThreads = 256;   // maximum for one row in registers
constexpr int kBwdBlock = 128;     // threads in a block of several narrow rows
constexpr int kMaxBwdBlocks = 6;  // maximum on a multiprocessor

template <int L>
constexpr int kFwdPacks = L == 1 ? 8 : 4;  // pieces per thread in forward

template <typename T>
__device__ __forceinline__ const T* at_row(const void* base, int64_t row, int64_t stride) {
  return static_cast<const T*>(base) + row * stride;
}

// Loads the pieces of a row at columns first + column(i) < n.
template <typename T, int L, int kPacks>
__device__ __forceinline__ void load_row(const T* row, int first, int n, Raw<T, L> (&x)[kPacks]) {
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = first + column<L, kPacks>(i);
    if (c < n) load_raw(row + c, x[i]);
  }
}

// Adds x_bias, which has x's dtype T or is fp32, to x; nothing if it is null.
template <typename T, int L, typename Args>
__device__ __forceinline__ void add_x_bias(const Args& a, int c, float (&x)[L]) {
  if (a.x_bias == nullptr) return;
  float bias[L];
  if (a.x_bias_dtype == DType::f32) load_const(static_cast<const float*>(a.x_bias) + c, bias);
  else load_const(static_cast<const T*>(a.x_bias) + c, bias);
#pragma unroll
  for (int l = 0; l < L; ++l) x[l] += bias[l];
}

// Loads h from column `first` on; with a residual, also stores h = x + x_bias + residual for backward.
template <typename T, int L, int kPacks, typename Args>
__device__ __forceinline__ void load_h(const Args& a, int64_t row, int first, Raw<T, L> (&h)[kPacks]) {
  const int n = static_cast<int>(a.n_cols);
  load_row(at_row<T>(a.x, row, a.x_row), first, n, h);
  if (a.residual == nullptr) return;
  Raw<T, L> residual[kPacks];
  load_row(at_row<T>(a.residual, row, a.residual_row), first, n, residual);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = first + column<L, kPacks>(i);
    if (c >= n) continue;
    float x[L], r[L];
    widen(h[i], x);
    add_x_bias<T>(a, c, x);
    widen(residual[i], r);
#pragma unroll
    for (int l = 0; l < L; ++l) x[l] += r[l];
    narrow(x, h[i]);
    store_whole(static_cast<T*>(a.sum) + row * a.n_cols + c, h[i]);
  }
}

// Returns the sum of term(value) over the columns from `first` on.
template <typename T, int L, int kPacks, typename F>
__device__ __forceinline__ float sum_of(const Raw<T, L> (&h)[kPacks], int first, int n, F term) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (first + column<L, kPacks>(i) >= n) continue;
    float x[L];
    widen(h[i], x);
#pragma unroll
    for (int l = 0; l < L; ++l) sum += term(x[l]);
  }
  return sum;
}

// Loads weight or bias through L1; `missing` if it is null.
template <typename W, int L>
__device__ __forceinline__ void load_affine(const void* values, int c, float missing, float (&w)[L]) {
#pragma unroll
  for (int l = 0; l < L; ++l) w[l] = missing;
  if (values != nullptr) load_const(static_cast<const W*>(values) + c, w);
}

// ---- backward ----

// Two rows in shared memory, one in use and one in flight: for each warp (3, 2, kPacks, 32) pieces of dy, h and, if
// given, dsum. Each thread reads only what it has written, so no barrier is needed.
template <typename T, int L, int kPacks>
struct Ring {
  Raw<T, L>* mine;
  bool dsum;

  __device__ __forceinline__ Ring(void* shared, bool has_dsum) : dsum(has_dsum) {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    mine = static_cast<Raw<T, L>*>(shared) + thread / 32 * ((dsum ? 3 : 2) * 2 * kPacks * 32) + thread % 32;
  }

  __device__ __forceinline__ Raw<T, L>& at(int stage, int tensor, int i) const {
    return mine[((tensor * 2 + stage) * kPacks + i) * 32];
  }

  __device__ __forceinline__ void get(int stage, int tensor, int i, float (&x)[L]) const {
    widen(at(stage, tensor, i), x);
  }

  __device__ __forceinline__ void request(int stage, int tensor, const T* row, int n) const {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<L, kPacks>(i);
      if (c >= n) continue;
      if constexpr (L == 1) load_raw(row + c, at(stage, tensor, i));
      else ptx::cp_async_16(ptx::shared_address(&at(stage, tensor, i)), row + c, 16);
    }
  }

  template <typename Args>
  __device__ __forceinline__ void request_row(const Args& a, int64_t row, int stage) const {
    const int n = row < a.n_rows ? static_cast<int>(a.n_cols) : 0;
    request(stage, 0, at_row<T>(a.dy, row, a.dy_row), n);
    request(stage, 1, at_row<T>(a.h, row, a.h_row), n);
    if (dsum) request(stage, 2, at_row<T>(a.dsum, row, a.dsum_row), n);
    ptx::cp_async_commit();
  }
};

// Adds dsum to d and stores the sum as dx.
template <typename T, int L, typename Args>
__device__ __forceinline__ void store_dx(const Args& a, int64_t row, int c, float (&d)[L], const float (&dsum)[L]) {
#pragma unroll
  for (int l = 0; l < L; ++l) d[l] += dsum[l];
  store_whole(static_cast<T*>(a.dx) + row * a.n_cols + c, d);
}

// Adds the sums over a group of rows to the partial of the block, which the first group sets.
template <int L>
__device__ __forceinline__ void add_group(float* partial, const float (&sums)[L], bool first) {
  float total[L] = {};
  if (!first) load(partial, total);
#pragma unroll
  for (int l = 0; l < L; ++l) total[l] += sums[l];
  store_whole(partial, total);
}

// Returns the threads of a backward kernel that the registers of a multiprocessor allow. Each has `sums` sums over its
// rows, of `lanes` columns in each of `packs` pieces, and in all 96, 128 or 168 registers.
constexpr int bwd_resident(int packs, int lanes, int sums) {
  return packs * lanes * sums > 64 ? 384 : packs == 3 && sums == 1 ? 640 : 512;
}

// Launch bounds that give the compiler these numbers of registers: threads in a block, at most, and blocks.
constexpr int bwd_threads(int packs, int lanes, int sums) {
  const int resident = bwd_resident(packs, lanes, sums);
  return resident < 512 ? resident : packs == 3 ? kBwdBlock : kBwdThreads;
}
constexpr int bwd_blocks(int packs, int lanes, int sums) {
  return bwd_resident(packs, lanes, sums) / bwd_threads(packs, lanes, sums);
}

// ---- launchers ----

// Returns the threads for one row, a multiple of 32: each has `packs` pieces of `lanes` columns.
inline int row_threads(int64_t n_cols, int packs, int lanes) {
  const int64_t columns = int64_t{32} * packs * lanes;
  return static_cast<int>((n_cols + columns - 1) / columns * 32);
}

// How a backward kernel covers rows: `packs` pieces per thread, 0 if a row is too wide for registers; `rows` at the
// same time in a block; n_blocks is at most one wave.
struct BwdShape {
  int packs, threads, rows;
  size_t smem;
  int64_t n_blocks;
};

// Chooses 3 or 4 pieces per thread (8 single values if L is 1), whichever leaves fewer threads idle. n_sums: the sums
// over rows that a block has.
template <typename T, int L>
BwdShape bwd_shape(int64_t n_rows, int64_t n_cols, bool dsum, int n_sums) {
  BwdShape s{L == 1 ? 8 : 4, 0, 1, 0, 0};
  s.threads = row_threads(n_cols, s.packs, L);
  const int of_three = row_threads(n_cols, 3, L);
  if (L > 1 && of_three <= kBwdBlock && of_three * 3 < s.threads * 4) s.packs = 3, s.threads = of_three;
  int64_t wave = int64_t{4} * multiprocessors();
  if (s.threads > kBwdThreads) {
    s.packs = 0, s.threads = kWideThreads, s.rows = kWideRows;
  } else {
    s.rows = s.threads < kBwdBlock ? kBwdBlock / s.threads : 1;
    const int block = s.threads * s.rows;
    const size_t ring = sizeof(Raw<T, L>) * (dsum ? 6 : 4) * s.packs * block, sums = sizeof(float) * n_sums * n_cols;
    s.smem = s.rows > 1 && sums > ring ? sums : ring;
    const int by_registers = bwd_resident(s.packs, L, n_sums) / block;
    const int by_shared = static_cast<int>(shared_memory() / (s.smem + 2048));
    const int blocks = by_registers < by_shared ? by_registers : by_shared;
    wave = int64_t{multiprocessors()} * (blocks > 1 ? blocks : 1);
  }
  const int64_t groups = (n_rows + s.rows - 1) / s.rows;
  s.n_blocks = groups < wave ? groups : wave;
  return s;
}

template <int N>
using Constant = std::integral_constant<int, N>;

// Launches forward. kernels(T{}, W{}, lanes) returns the kernel for rows of up to kFwdThreads threads, which has four
// rows in a block if a row is one warp, and the kernel for wider rows. `aligned`: all pointers are at 16-byte
// boundaries.
template <typename Args, typename F>
void launch_fwd(const char* name, const char* wide_name, F kernels, const Args& a, bool aligned, Stream stream) {
  if (a.n_rows == 0 || a.n_cols == 0) return;
  with_types(a.dtype, a.weight_dtype, [&](auto t, auto w) {
    const auto run = [&](auto lanes) {
      const auto [kernel, wide] = kernels(t, w, lanes);
      const int threads = row_threads(a.n_cols, kFwdPacks<lanes()>, lanes()), rows = threads == 32 ? 4 : 1;
      if (threads > kFwdThreads) launch(wide_name, wide, Grid{a.n_rows}, dim3(kWideThreads), 0, stream, a);
      else launch(name, kernel, Grid{(a.n_rows + rows - 1) / rows}, dim3(threads, rows), 0, stream, a);
    };
    constexpr int L = kLanes<decltype(t)>;
    const bool pieces = aligned && (a.n_cols | a.x_row | (a.residual ? a.residual_row : 0)) % L == 0;
    pieces ? run(Constant<L>{}) : run(Constant<1>{});
  });
}

// Launches backward and the sums of the gradients of parameters; the last is that of x_bias. kernel_of(T{}, W{}, lanes,
// packs, x_bias) returns the kernel for `packs` pieces per thread, or for wide rows if packs is 0; it sums the gradient
// of x_bias if x_bias() is true. Kernels that have registers to spare always can: fewer kernels to compile.
template <int kSums, typename Args, typename F>
void launch_bwd(const char* name, const char* wide_name, F kernel_of, const Args& a, const ColumnSum (&sums)[kSums],
                Stream stream) {
  if (a.n_rows == 0 || a.n_cols == 0) return;
  with_types(a.dtype, a.weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    const auto run = [&](auto lanes) {
      const bool x_bias = a.dx_bias != nullptr;
      const int n_sums = x_bias ? kSums : kSums - 1;
      const BwdShape s = bwd_shape<T, lanes()>(a.n_rows, a.n_cols, a.dsum != nullptr, n_sums);
      const auto rows = [&](auto packs, auto with) {
        launch(name, kernel_of(t, w, lanes, packs, with), Grid{s.n_blocks}, dim3(s.threads, s.rows), s.smem, stream, a);
      };
      if (s.packs == 0) {
        const auto kernel = kernel_of(t, w, lanes, Constant<0>{}, std::true_type{});
        launch(wide_name, kernel, Grid{s.n_blocks}, dim3(s.threads), 0, stream, a);
      } else if constexpr (lanes() == 1) {
        rows(Constant<8>{}, std::true_type{});
      } else if (x_bias) {
        s.packs == 3 ? rows(Constant<3>{}, std::true_type{}) : rows(Constant<4>{}, std::true_type{});
      } else {
        s.packs == 3 ? rows(Constant<3>{}, std::false_type{}) : rows(Constant<4>{}, std::false_type{});
      }
      if (a.partials == nullptr) return;
      Partials p{a.partials, {}, s.n_blocks, a.n_cols};
      for (int i = 0; i < n_sums; ++i) p.sums[i] = sums[i];
      add_partials<T>(p, n_sums, stream);
    };
    constexpr int L = kLanes<T>;
    const bool pieces = all_aligned({a.dy, a.dsum, a.h, a.weight, a.dx, a.partials}) &&
                        (a.n_cols | a.dy_row | a.h_row | (a.dsum ? a.dsum_row : 0)) % L == 0;
    pieces ? run(Constant<L>{}) : run(Constant<1>{});
  });
}

inline int64_t max_bwd_blocks(int64_t n_rows) {
  const int64_t most = int64_t{kMaxBwdBlocks} * multiprocessors();
  return n_rows < most ? n_rows : most;
}

}  // namespace fastgpt::cuda
