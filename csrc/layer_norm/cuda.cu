// LayerNorm forward and backward, residual addition fused (Ba et al. 2016, arXiv:1607.06450).
//
//   h = x + x_bias + residual, rounded to x's dtype; mean, var over C (two passes); rstd = 1 / sqrt(var + eps)
//   y = (h - mean) rstd w + b
//   dx = rstd (w dy - mean(w dy) - xhat mean(w dy xhat)) + dsum;  dw = sum_rows dy xhat;  db = sum_rows dy;
//   dx_bias = sum_rows dx
//
// Saved for backward: h and (mean, rstd) in fp32. Bytes per 16-bit element: forward 4 (read x, write y), 8
// with a residual; backward 6 (read dy and h, write dx), 8 with dsum. Floor for N = 65536, C = 768, forward with
// residual (403 MB): A100 197 us, H100 120, H200 84; backward without dsum (302 MB): 148, 90, 63.
//
// How: see norm/cuda.cuh, also for the bytes in flight. Each tensor crosses HBM once, in 16-byte pieces. Instructions
// per 16-bit element on sm_90: forward 24 without a residual (an H100 has time for 34, activations.cuh), 30 with (68);
// backward 34 without dsum (51), 40 with (68). Partials add 2 C 8 bytes per block (3 with x_bias): 1.7 % at the shape
// above.
#include "layer_norm/op.h"
#include "norm/cuda.cuh"

namespace fastgpt::cuda {
namespace {

template <typename W, typename T, int L, int kPacks>
__device__ __forceinline__ void store_y(const LayerNormFwdArgs& a, int64_t row, int first,
                                        const Raw<T, L> (&h)[kPacks], float mean, float rstd) {
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = first + column<L, kPacks>(i);
    if (c >= a.n_cols) continue;
    float y[L], w[L], b[L];
    widen(h[i], y);
    load_affine<W>(a.weight, c, 1.0f, w);
    load_affine<W>(a.bias, c, 0.0f, b);
#pragma unroll
    for (int l = 0; l < L; ++l) y[l] = layer_norm_y(y[l], mean, rstd, w[l], b[l]);
    store_whole(static_cast<T*>(a.y) + row * a.n_cols + c, y);
  }
}

__device__ __forceinline__ void store_stats(const LayerNormFwdArgs& a, int64_t row, float mean, float rstd) {
  if (threadIdx.x != 0) return;
  a.stats[row] = mean;
  a.stats[a.n_rows + row] = rstd;
}

// One row per threadIdx.y, held in registers. A block has more than one row only if a row is one warp (no barrier).
template <typename T, typename W, int L>
__global__ void __launch_bounds__(kFwdThreads) layer_norm_fwd_kernel(const LayerNormFwdArgs a) {
  __shared__ float scratch[2][kMaxWarps];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int n = static_cast<int>(a.n_cols);
  if (row >= a.n_rows) return;
  Raw<T, L> h[kFwdPacks<L>];
  load_h(a, row, 0, h);
  const float mean = row_sum(sum_of(h, 0, n, [](float x) { return x; }), scratch[0]) / n;
  const float squares = sum_of(h, 0, n, [&](float x) { return (x - mean) * (x - mean); });
  const float rstd = 1.0f / sqrtf(row_sum(squares, scratch[1]) / n + a.eps);
  store_stats(a, row, mean, rstd);
  store_y<W>(a, row, 0, h, mean, rstd);
}

// One block per row, three sweeps over its columns.
template <typename T, typename W, int L>
__global__ void __launch_bounds__(kWideThreads) layer_norm_fwd_wide_kernel(const LayerNormFwdArgs a) {
  constexpr int kPacks = kFwdPacks<L>;
  __shared__ float scratch[2][kMaxWarps];
  const int64_t row = blockIdx.x;
  const int n = static_cast<int>(a.n_cols), step = kPacks * blockDim.x * L;
  const T* again = a.residual != nullptr ? at_row<T>(a.sum, row, a.n_cols) : at_row<T>(a.x, row, a.x_row);
  float sum = 0.0f, squares = 0.0f;
  Raw<T, L> h[kPacks];
  for (int first = 0; first < n; first += step) {
    load_h(a, row, first, h);
    sum += sum_of(h, first, n, [](float x) { return x; });
  }
  const float mean = row_sum(sum, scratch[0]) / n;
  for (int first = 0; first < n; first += step) {  // each thread reads what it has stored
    load_row(again, first, n, h);
    squares += sum_of(h, first, n, [&](float x) { return (x - mean) * (x - mean); });
  }
  const float rstd = 1.0f / sqrtf(row_sum(squares, scratch[1]) / n + a.eps);
  store_stats(a, row, mean, rstd);
  for (int first = 0; first < n; first += step) {
    load_row(again, first, n, h);
    store_y<W>(a, row, first, h, mean, rstd);
  }
}

// One row per threadIdx.y at a time; a thread has the same columns in all its rows.
template <typename T, typename W, int kPacks, bool kXBias, int L>
__global__ void __launch_bounds__(bwd_threads(kPacks, L, 2 + kXBias), bwd_blocks(kPacks, L, 2 + kXBias))
    layer_norm_bwd_kernel(const LayerNormBwdArgs a) {
  __shared__ float scratch[2][2 * kMaxWarps];  // two sets, used alternately: one barrier per row
  FASTGPT_DYNAMIC_SHARED(float, shared);
  const Ring<T, L, kPacks> ring(shared, a.dsum != nullptr);
  const int n = static_cast<int>(a.n_cols);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  float dw[kPacks][L] = {}, db[kPacks][L] = {}, dx_bias[kXBias ? kPacks : 1][L] = {};
  ring.request_row(a, row, 0);
  float next_mean = row < a.n_rows ? a.stats[row] : 0.0f, next_rstd = row < a.n_rows ? a.stats[a.n_rows + row] : 0.0f;
  int set = 0;  // index of the set of scratch and of the stage of the ring
  for (int64_t first = row - threadIdx.y; first < a.n_rows; first += step, row += step, set ^= 1) {
    ring.request_row(a, row + step, set ^ 1);
    ptx::cp_async_wait<1>();  // this row has arrived, the next may be in flight
    const int end = row < a.n_rows ? n : 0;
    // with one column dx is 0, but wdy - mean_wdy is not if an FMA uses one of the two unrounded
    const float mean = next_mean, rstd = n == 1 ? 0.0f : next_rstd;
    float sum = 0.0f, dot = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<L, kPacks>(i);
      if (c >= end) continue;
      float dy[L], xhat[L], w[L];
      ring.get(set, 0, i, dy);
      ring.get(set, 1, i, xhat);
      load_affine<W>(a.weight, c, 1.0f, w);
#pragma unroll
      for (int l = 0; l < L; ++l) {
        xhat[l] = (xhat[l] - mean) * rstd;
        dw[i][l] += dy[l] * xhat[l];
        db[i][l] += dy[l];
        sum += w[l] * dy[l];
        dot += w[l] * dy[l] * xhat[l];
      }
    }
    if (row + step < a.n_rows) next_mean = a.stats[row + step], next_rstd = a.stats[a.n_rows + row + step];
    row_sum2(sum, dot, scratch[set]);
    sum /= n, dot /= n;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<L, kPacks>(i);
      if (c >= end) continue;
      float d[L], h[L], w[L], dsum[L] = {};
      ring.get(set, 0, i, d);
      ring.get(set, 1, i, h);
      if (ring.dsum) ring.get(set, 2, i, dsum);
      load_affine<W>(a.weight, c, 1.0f, w);
#pragma unroll
      for (int l = 0; l < L; ++l) d[l] = layer_norm_dx(w[l] * d[l], (h[l] - mean) * rstd, sum, dot, rstd);
      store_dx<T>(a, row, c, d, dsum);
      if constexpr (kXBias) {
#pragma unroll
        for (int l = 0; l < L; ++l) dx_bias[i][l] += d[l];
      }
    }
  }
  if (a.partials == nullptr) return;
  __syncthreads();  // the ring is no longer in use
  float* partial = a.partials + static_cast<int64_t>(blockIdx.x) * (a.dx_bias == nullptr ? 2 : 3) * n;
  write_partial(dw, n, shared, partial);
  write_partial(db, n, shared + n, partial + n);
  if constexpr (kXBias) {
    if (a.dx_bias != nullptr) write_partial(dx_bias, n, shared + 2 * n, partial + 2 * n);
  }
}

// Wide rows, kWideRows at a time: first the two means of each row, then, column by column, dx and the sums over the
// rows. Between two groups of rows the partial of the block holds the sums; each thread has its own columns there. dy
// and h are read twice.
template <typename T, typename W, int L>
__global__ void __launch_bounds__(kWideThreads) layer_norm_bwd_wide_kernel(const LayerNormBwdArgs a) {
  __shared__ float scratch[2][2 * kMaxWarps];
  __shared__ float means[2][kWideRows][2];
  const int n = static_cast<int>(a.n_cols), step = blockDim.x * L;
  const int n_sums = a.dx_bias == nullptr ? 2 : 3;
  float* partial = a.partials == nullptr ? nullptr : a.partials + static_cast<int64_t>(blockIdx.x) * n_sums * n;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kWideRows;
  int set = 0;
  for (int64_t first = begin; first < a.n_rows; first += static_cast<int64_t>(gridDim.x) * kWideRows, set ^= 1) {
    const int n_rows = static_cast<int>(a.n_rows - first < kWideRows ? a.n_rows - first : kWideRows);
    for (int r = 0; r < n_rows; ++r) {
      const float mean = a.stats[first + r], rstd = a.stats[a.n_rows + first + r];
      float sum = 0.0f, dot = 0.0f;
      for (int c = threadIdx.x * L; c < n; c += step) {
        float dy[L], h[L], w[L];
        load(at_row<T>(a.dy, first + r, a.dy_row) + c, dy);
        load(at_row<T>(a.h, first + r, a.h_row) + c, h);
        load_affine<W>(a.weight, c, 1.0f, w);
#pragma unroll
        for (int l = 0; l < L; ++l) sum += w[l] * dy[l], dot += w[l] * dy[l] * ((h[l] - mean) * rstd);
      }
      row_sum2(sum, dot, scratch[r % 2]);
      if (threadIdx.x == 0) means[set][r][0] = sum / n, means[set][r][1] = dot / n;
    }
    __syncthreads();
    for (int c = threadIdx.x * L; c < n; c += step) {
      float dw[L] = {}, db[L] = {}, dx_bias[L] = {};
#pragma unroll 1
      for (int r = 0; r < n_rows; ++r) {
        const float mean = a.stats[first + r], rstd = a.stats[a.n_rows + first + r];
        float wdy[L], xhat[L], dsum[L] = {}, w[L];
        load(at_row<T>(a.dy, first + r, a.dy_row) + c, wdy);
        load(at_row<T>(a.h, first + r, a.h_row) + c, xhat);
        load_affine<W>(a.weight, c, 1.0f, w);  // for each row, from L1: kept in registers, it would make them spill
#pragma unroll
        for (int l = 0; l < L; ++l) {
          xhat[l] = (xhat[l] - mean) * rstd;
          dw[l] += wdy[l] * xhat[l];
          db[l] += wdy[l];
          wdy[l] = layer_norm_dx(wdy[l] * w[l], xhat[l], means[set][r][0], means[set][r][1], rstd);
        }
        if (a.dsum != nullptr) load(at_row<T>(a.dsum, first + r, a.dsum_row) + c, dsum);
        store_dx<T>(a, first + r, c, wdy, dsum);
#pragma unroll
        for (int l = 0; l < L; ++l) dx_bias[l] += wdy[l];
      }
      if (partial == nullptr) continue;
      add_group(partial + c, dw, first == begin);
      add_group(partial + n + c, db, first == begin);
      if (n_sums == 3) add_group(partial + 2 * n + c, dx_bias, first == begin);
    }
  }
}

}  // namespace

// ---- launchers ----

int64_t layer_norm_bwd_blocks(int64_t n_rows, int64_t, Stream) { return max_bwd_blocks(n_rows); }

void layer_norm_fwd(const LayerNormFwdArgs& a, Stream stream) {
  const auto kernels = [](auto t, auto w, auto lanes) {
    using T = decltype(t);
    using W = decltype(w);
    return std::make_pair(layer_norm_fwd_kernel<T, W, lanes()>, layer_norm_fwd_wide_kernel<T, W, lanes()>);
  };
  launch_fwd("layer_norm_fwd_kernel", "layer_norm_fwd_wide_kernel", kernels, a,
             all_aligned({a.x, a.residual, a.x_bias, a.weight, a.bias, a.y, a.sum}), stream);
}

void layer_norm_bwd(const LayerNormBwdArgs& a, Stream stream) {
  const auto kernel_of = [](auto t, auto w, auto lanes, auto packs, auto x_bias) {
    using T = decltype(t);
    using W = decltype(w);
    if constexpr (packs() == 0) return layer_norm_bwd_wide_kernel<T, W, lanes()>;
    else return layer_norm_bwd_kernel<T, W, packs(), x_bias(), lanes()>;
  };
  const ColumnSum sums[] = {{a.dweight, a.weight_dtype}, {a.dbias, a.weight_dtype}, {a.dx_bias, a.x_bias_dtype}};
  launch_bwd("layer_norm_bwd_kernel", "layer_norm_bwd_wide_kernel", kernel_of, a, sums, stream);
}

}  // namespace fastgpt::cuda
