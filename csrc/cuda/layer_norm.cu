// LayerNorm forward and backward, residual addition fused (Ba et al. 2016, arXiv:1607.06450).
//
//   h = x + residual, rounded to x's dtype; mean, var over C (two passes); rstd = 1 / sqrt(var + eps)
//   y = (h - mean) rstd w + b
//   dx = rstd (w dy - mean(w dy) - xhat mean(w dy xhat)) + dsum;  dw = sum_rows dy xhat;  db = sum_rows dy
//
// Saved for backward: h and (mean, rstd) in fp32. Bytes for each element of 16 bits: forward 4 (read x, write y), 8
// with a residual; backward 6 (read dy and h, write dx), 8 with dsum. Floor for N = 65536, C = 768, forward with
// residual (403 MB): A100 197 us, H100 120, H200 84; backward without dsum (302 MB): 148, 90, 63.
//
// How: a row stays in registers between its passes, so each tensor crosses HBM once, in 16-byte pieces; rows of up to
// 1024 columns (16 bits) belong to one warp and need no barrier. Backward runs 432 blocks (4 on each multiprocessor
// of an A100, about 3 of an H100), which sum dw and db of their rows in registers and write one fp32 partial each; a
// second kernel adds the partials in a fixed order: no atomics, the same bits in every run. Rows too wide for
// registers are read again from L2.
#include <fastgpt/cuda_launch.cuh>
#include <fastgpt/launch.h>
#include <fastgpt/reduce.cuh>
#include <fastgpt/vec.cuh>

namespace fastgpt::cuda {
namespace {

constexpr int kWideThreads = 512;  // of a block that walks over the columns of a wide row
constexpr int kFwdThreads = 512;   // at most, for one row in registers
constexpr int kBwdItems = 8;       // columns of a thread in backward
constexpr int kBwdThreads = 1024;  // at most, for one row in registers
constexpr int64_t kBwdBlocks = 432;
constexpr int kWideRows = 8;  // rows that a backward block of wide rows handles together

template <typename T>
constexpr int kFwdItems = sizeof(T) == 2 ? 32 : 16;  // columns of a thread in forward

template <typename T>
__device__ __forceinline__ const T* at(const void* base, int64_t row, int64_t stride) {
  return static_cast<const T*>(base) + row * stride;
}

// h of columns c..c+L; the sum is stored for backward when there is a residual.
template <typename T, int L>
__device__ __forceinline__ void load_h(const LayerNormFwdArgs& a, int64_t row, int c, float (&h)[L]) {
  load(at<T>(a.x, row, a.x_row) + c, h);
  if (a.residual == nullptr) return;
  float r[L];
  load(at<T>(a.residual, row, a.residual_row) + c, r);
#pragma unroll
  for (int l = 0; l < L; ++l) h[l] = rounded<T>(h[l] + r[l]);
  store(static_cast<T*>(a.sum) + row * a.n_cols + c, h);
}

template <typename T, typename W, int L>
__device__ __forceinline__ void store_y(const LayerNormFwdArgs& a, int64_t row, int c, float (&h)[L], float mean,
                                        float rstd) {
  float w[L], b[L];
#pragma unroll
  for (int l = 0; l < L; ++l) w[l] = 1.0f, b[l] = 0.0f;
  if (a.weight != nullptr) load(static_cast<const W*>(a.weight) + c, w);
  if (a.bias != nullptr) load(static_cast<const W*>(a.bias) + c, b);
#pragma unroll
  for (int l = 0; l < L; ++l) h[l] = layer_norm_y(h[l], mean, rstd, w[l], b[l]);
  store(static_cast<T*>(a.y) + row * a.n_cols + c, h);
}

// One row for each threadIdx.y, held in registers; more than one row in a block only where a row is one warp (no
// barrier).
template <typename T, typename W, int L>
__global__ void __launch_bounds__(kFwdThreads) layer_norm_fwd_kernel(const LayerNormFwdArgs a) {
  constexpr int kPacks = kFwdItems<T> / L;
  __shared__ float scratch[2][kMaxWarps];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int n = static_cast<int>(a.n_cols);
  if (row >= a.n_rows) return;
  float h[kPacks][L];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = (i * blockDim.x + threadIdx.x) * L;
    if (c >= n) continue;
    load_h<T>(a, row, c, h[i]);
#pragma unroll
    for (int l = 0; l < L; ++l) sum += h[i][l];
  }
  const float mean = row_sum(sum, scratch[0]) / n;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = (i * blockDim.x + threadIdx.x) * L;
    if (c >= n) continue;
#pragma unroll
    for (int l = 0; l < L; ++l) squares += (h[i][l] - mean) * (h[i][l] - mean);
  }
  const float rstd = 1.0f / sqrtf(row_sum(squares, scratch[1]) / n + a.eps);
  if (threadIdx.x == 0) {
    a.stats[row] = mean;
    a.stats[a.n_rows + row] = rstd;
  }
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = (i * blockDim.x + threadIdx.x) * L;
    if (c < n) store_y<T, W>(a, row, c, h[i], mean, rstd);
  }
}

// One block a row, three sweeps over its columns.
template <typename T, typename W, int L>
__global__ void __launch_bounds__(kWideThreads) layer_norm_fwd_wide_kernel(const LayerNormFwdArgs a) {
  __shared__ float scratch[2][kMaxWarps];
  const int64_t row = blockIdx.x;
  const int n = static_cast<int>(a.n_cols), step = blockDim.x * L;
  const T* again = a.residual != nullptr ? at<T>(a.sum, row, a.n_cols) : at<T>(a.x, row, a.x_row);
  float sum = 0.0f, squares = 0.0f, h[L];
  for (int c = threadIdx.x * L; c < n; c += step) {
    load_h<T>(a, row, c, h);
#pragma unroll
    for (int l = 0; l < L; ++l) sum += h[l];
  }
  const float mean = row_sum(sum, scratch[0]) / n;
  for (int c = threadIdx.x * L; c < n; c += step) {  // each thread reads what it stored itself
    load(again + c, h);
#pragma unroll
    for (int l = 0; l < L; ++l) squares += (h[l] - mean) * (h[l] - mean);
  }
  const float rstd = 1.0f / sqrtf(row_sum(squares, scratch[1]) / n + a.eps);
  if (threadIdx.x == 0) {
    a.stats[row] = mean;
    a.stats[a.n_rows + row] = rstd;
  }
  for (int c = threadIdx.x * L; c < n; c += step) {
    load(again + c, h);
    store_y<T, W>(a, row, c, h, mean, rstd);
  }
}

template <typename W, int L>
__device__ __forceinline__ void load_weight(const LayerNormBwdArgs& a, int c, float (&w)[L]) {
#pragma unroll
  for (int l = 0; l < L; ++l) w[l] = 1.0f;
  if (a.weight != nullptr) load(static_cast<const W*>(a.weight) + c, w);
}

// dx of columns c..c+L from w dy and xhat.
template <typename T, int L>
__device__ __forceinline__ void store_dx(const LayerNormBwdArgs& a, int64_t row, int c, float (&wdy)[L],
                                         const float (&xhat)[L], float mean_wdy, float mean_wdy_xhat, float rstd) {
  float dsum[L];
#pragma unroll
  for (int l = 0; l < L; ++l) dsum[l] = 0.0f;
  if (a.dsum != nullptr) load(at<T>(a.dsum, row, a.dsum_row) + c, dsum);
#pragma unroll
  for (int l = 0; l < L; ++l) wdy[l] = layer_norm_dx(wdy[l], xhat[l], mean_wdy, mean_wdy_xhat, rstd) + dsum[l];
  store(static_cast<T*>(a.dx) + row * a.n_cols + c, wdy);
}

// Adds the row groups' sums (dw and db of their own rows) in the order of threadIdx.y and writes the block's partial.
// `shared`: (blockDim.y, 2, C).
__device__ __forceinline__ void write_partial(const LayerNormBwdArgs& a, const float* shared) {
  const int64_t n = a.n_cols;
  float* partial = a.partials + static_cast<int64_t>(blockIdx.x) * 2 * n;
  for (int64_t i = threadIdx.y * blockDim.x + threadIdx.x; i < 2 * n; i += blockDim.x * blockDim.y) {
    float total = 0.0f;
    for (unsigned y = 0; y < blockDim.y; ++y) total += shared[y * 2 * n + i];
    partial[i] = total;
  }
}

// One row for each threadIdx.y at a time; the columns of a thread are the same in all its rows.
template <typename T, typename W, int L>
__global__ void __launch_bounds__(kBwdThreads) layer_norm_bwd_kernel(const LayerNormBwdArgs a) {
  constexpr int kPacks = kBwdItems / L;
  __shared__ float scratch[2][2 * kMaxWarps];  // two sets, used in turn: one barrier a row
  FASTGPT_DYNAMIC_SHARED(float, shared);       // (blockDim.y, 2, C) if blockDim.y > 1
  const int n = static_cast<int>(a.n_cols);
  float dw[kPacks][L] = {}, db[kPacks][L] = {};
  int set = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < a.n_rows;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y, set ^= 1) {
    const int64_t row = first + threadIdx.y;
    const bool live = row < a.n_rows;
    const float mean = live ? a.stats[row] : 0.0f, rstd = live ? a.stats[a.n_rows + row] : 0.0f;
    float wdy[kPacks][L] = {}, xhat[kPacks][L] = {};
    float sum = 0.0f, dot = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = (i * blockDim.x + threadIdx.x) * L;
      if (c >= n || !live) continue;
      load(at<T>(a.h, row, a.h_row) + c, xhat[i]);
      load(at<T>(a.dy, row, a.dy_row) + c, wdy[i]);
      float w[L];  // from L1: registers are short
      load_weight<W>(a, c, w);
#pragma unroll
      for (int l = 0; l < L; ++l) {
        xhat[i][l] = (xhat[i][l] - mean) * rstd;
        dw[i][l] += wdy[i][l] * xhat[i][l];
        db[i][l] += wdy[i][l];
        wdy[i][l] *= w[l];
        sum += wdy[i][l];
        dot += wdy[i][l] * xhat[i][l];
      }
    }
    row_sum2(sum, dot, scratch[set]);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = (i * blockDim.x + threadIdx.x) * L;
      if (c < n && live) store_dx<T>(a, row, c, wdy[i], xhat[i], sum / n, dot / n, rstd);
    }
  }
  if (a.partials == nullptr) return;
  float* mine = blockDim.y > 1 ? shared + threadIdx.y * 2 * n : a.partials + static_cast<int64_t>(blockIdx.x) * 2 * n;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = (i * blockDim.x + threadIdx.x) * L;
    if (c >= n) continue;
#pragma unroll
    for (int l = 0; l < L; ++l) mine[c + l] = dw[i][l], mine[n + c + l] = db[i][l];
  }
  if (blockDim.y == 1) return;
  __syncthreads();
  write_partial(a, shared);
}

// Wide rows, kWideRows at a time: first the two means of each row, then, column by column, dx and the sums over the
// rows, which are kept in the block's partial between two groups of rows (each thread its own columns). dy and h are
// read twice.
template <typename T, typename W, int L>
__global__ void __launch_bounds__(kWideThreads) layer_norm_bwd_wide_kernel(const LayerNormBwdArgs a) {
  __shared__ float scratch[2][2 * kMaxWarps];
  __shared__ float means[2][kWideRows][2];
  const int n = static_cast<int>(a.n_cols), step = blockDim.x * L;
  float* partial = a.partials == nullptr ? nullptr : a.partials + static_cast<int64_t>(blockIdx.x) * 2 * n;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kWideRows;
  int set = 0;
  for (int64_t first = begin; first < a.n_rows; first += static_cast<int64_t>(gridDim.x) * kWideRows, set ^= 1) {
    const int n_rows = static_cast<int>(a.n_rows - first < kWideRows ? a.n_rows - first : kWideRows);
    for (int r = 0; r < n_rows; ++r) {
      const float mean = a.stats[first + r], rstd = a.stats[a.n_rows + first + r];
      float sum = 0.0f, dot = 0.0f;
      for (int c = threadIdx.x * L; c < n; c += step) {
        float dy[L], h[L], w[L];
        load(at<T>(a.dy, first + r, a.dy_row) + c, dy);
        load(at<T>(a.h, first + r, a.h_row) + c, h);
        load_weight<W>(a, c, w);
#pragma unroll
        for (int l = 0; l < L; ++l) sum += w[l] * dy[l], dot += w[l] * dy[l] * ((h[l] - mean) * rstd);
      }
      row_sum2(sum, dot, scratch[r % 2]);
      if (threadIdx.x == 0) means[set][r][0] = sum / n, means[set][r][1] = dot / n;
    }
    __syncthreads();
    for (int c = threadIdx.x * L; c < n; c += step) {
      float w[L], dw[L] = {}, db[L] = {};
      load_weight<W>(a, c, w);
      for (int r = 0; r < n_rows; ++r) {
        const float mean = a.stats[first + r], rstd = a.stats[a.n_rows + first + r];
        float wdy[L], xhat[L];
        load(at<T>(a.dy, first + r, a.dy_row) + c, wdy);
        load(at<T>(a.h, first + r, a.h_row) + c, xhat);
#pragma unroll
        for (int l = 0; l < L; ++l) {
          xhat[l] = (xhat[l] - mean) * rstd;
          dw[l] += wdy[l] * xhat[l];
          db[l] += wdy[l];
          wdy[l] *= w[l];
        }
        store_dx<T>(a, first + r, c, wdy, xhat, means[set][r][0], means[set][r][1], rstd);
      }
      if (partial == nullptr) continue;
#pragma unroll
      for (int l = 0; l < L; ++l) {
        partial[c + l] = first == begin ? dw[l] : partial[c + l] + dw[l];
        partial[n + c + l] = first == begin ? db[l] : partial[n + c + l] + db[l];
      }
    }
  }
}

// partials (n_blocks, 2, C) -> dweight (blockIdx.y 0), dbias (1): 32 columns a block, threadIdx.y strides over the
// partials.
template <typename W>
__global__ void __launch_bounds__(1024) layer_norm_bwd_reduce_kernel(const LayerNormBwdArgs a, int64_t n_blocks) {
  __shared__ float sums[32][33];
  void* out = blockIdx.y == 0 ? a.dweight : a.dbias;
  if (out == nullptr) return;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float sum = 0.0f;
  for (int64_t b = threadIdx.y; b < n_blocks && c < a.n_cols; b += 32)
    sum += a.partials[(b * 2 + blockIdx.y) * a.n_cols + c];
  sums[threadIdx.x][threadIdx.y] = sum;
  __syncthreads();
  const float total = warp_sum(sums[threadIdx.y][threadIdx.x]);  // warp y adds column y
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.y;
  if (threadIdx.x == 0 && column < a.n_cols) static_cast<W*>(out)[column] = narrow<W>(total);
}

// ---- launchers ----

// Threads of one row, a multiple of 32: each takes `items` columns in pieces of `lanes`.
int row_threads(int64_t n_cols, int items, int lanes) {
  const int64_t packs = (n_cols + lanes - 1) / lanes, per_warp = 32 * (items / lanes);
  return static_cast<int>((packs + per_warp - 1) / per_warp * 32);
}

template <typename T, typename W, int L>
void fwd(const LayerNormFwdArgs& a, Stream stream) {
  if (a.n_cols > static_cast<int64_t>(kFwdThreads) * kFwdItems<T>) {
    launch("layer_norm_fwd_wide_kernel", layer_norm_fwd_wide_kernel<T, W, L>, dim3(a.n_rows), dim3(kWideThreads), 0,
           stream, a);
    return;
  }
  const int threads = row_threads(a.n_cols, kFwdItems<T>, L);
  const int rows = threads == 32 ? 4 : 1;
  launch("layer_norm_fwd_kernel", layer_norm_fwd_kernel<T, W, L>, dim3((a.n_rows + rows - 1) / rows),
         dim3(threads, rows), 0, stream, a);
}

// Rows that a backward block works on side by side.
int bwd_rows(int threads) { return threads >= 256 ? 1 : 256 / threads; }

template <typename T, typename W, int L>
void bwd(const LayerNormBwdArgs& a, Stream stream) {
  const int64_t n_blocks = layer_norm_bwd_blocks(a.n_rows, a.n_cols);
  if (a.n_rows > 0 && a.n_cols > static_cast<int64_t>(kBwdThreads) * kBwdItems) {
    launch("layer_norm_bwd_wide_kernel", layer_norm_bwd_wide_kernel<T, W, L>, dim3(n_blocks), dim3(kWideThreads), 0,
           stream, a);
  } else if (a.n_rows > 0) {
    const int threads = row_threads(a.n_cols, kBwdItems, L), rows = bwd_rows(threads);
    const size_t smem = rows > 1 ? sizeof(float) * rows * 2 * a.n_cols : 0;
    launch("layer_norm_bwd_kernel", layer_norm_bwd_kernel<T, W, L>, dim3(n_blocks), dim3(threads, rows), smem, stream,
           a);
  }
  if (a.dweight == nullptr && a.dbias == nullptr) return;
  launch("layer_norm_bwd_reduce_kernel", layer_norm_bwd_reduce_kernel<W>, dim3((a.n_cols + 31) / 32, 2), dim3(32, 32),
         0, stream, a, n_blocks);
}

// Calls f(T{}, W{}) for the dtype of x and of the weights.
template <typename F>
void with_types(DType dtype, DType weight_dtype, F f) {
  const bool wide = weight_dtype == DType::f32;
  if (dtype == DType::f32) f(float{}, float{});
  else if (dtype == DType::bf16 && wide) f(bf16{}, float{});
  else if (dtype == DType::bf16) f(bf16{}, bf16{});
  else if (wide) f(f16{}, float{});
  else f(f16{}, f16{});
}

bool all_aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (!is_aligned(p)) return false;
  }
  return true;
}

}  // namespace

int64_t layer_norm_bwd_blocks(int64_t n_rows, int64_t n_cols) {
  const bool in_registers = n_cols <= static_cast<int64_t>(kBwdThreads) * kBwdItems;
  const int64_t rows = in_registers ? bwd_rows(row_threads(n_cols, kBwdItems, 1)) : kWideRows;
  const int64_t groups = (n_rows + rows - 1) / rows;
  return groups < kBwdBlocks ? groups : kBwdBlocks;
}

void layer_norm_fwd(const LayerNormFwdArgs& a, Stream stream) {
  if (a.n_rows == 0 || a.n_cols == 0) return;
  with_types(a.dtype, a.weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    constexpr int L = kLanes<T>;
    const bool vectors = all_aligned({a.x, a.residual, a.weight, a.bias, a.y, a.sum}) &&
                         (a.n_cols | a.x_row | (a.residual ? a.residual_row : 0)) % L == 0;
    vectors ? fwd<T, W, L>(a, stream) : fwd<T, W, 1>(a, stream);
  });
}

void layer_norm_bwd(const LayerNormBwdArgs& a, Stream stream) {
  if (a.n_cols == 0) return;
  with_types(a.dtype, a.weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    constexpr int L = kLanes<T>;
    const bool vectors = all_aligned({a.dy, a.dsum, a.h, a.weight, a.dx}) &&
                         (a.n_cols | a.dy_row | a.h_row | (a.dsum ? a.dsum_row : 0)) % L == 0;
    vectors ? bwd<T, W, L>(a, stream) : bwd<T, W, 1>(a, stream);
  });
}

}  // namespace fastgpt::cuda
