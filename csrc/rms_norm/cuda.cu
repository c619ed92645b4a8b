// RMSNorm forward and backward, residual addition fused (Zhang, Sennrich 2019, arXiv:1910.07467).
//
//   h = x + x_bias + residual, rounded to x's dtype; rstd = 1 / sqrt(mean(h^2) + eps); y = h rstd (w + weight_offset)
//   dx = rstd (w dy - xhat mean(w dy xhat)) + dsum with xhat = h rstd;  dw = sum_rows dy xhat;
//   dx_bias = sum_rows dx
//
// Saved for backward: h and rstd in fp32. Bytes per 16-bit element: forward 4 (read x, write y), 8 with a
// residual; backward 6 (read dy and h, write dx), 8 with dsum. Floor for N = 65536, C = 768, forward with residual
// (403 MB): A100 197 us, H100 120, H200 84; backward without dsum (302 MB): 148, 90, 63.
//
// How: see norm/cuda.cuh, also for the bytes in flight; forward and backward each need one reduction per row.
// Instructions per 16-bit element on sm_90: forward 16 without a residual (an H100 has time for 34, activations.cuh),
// 21 with (68); backward 30 without dsum (51), 35 with (68). Partials add C 8 bytes per block (2 C with x_bias): 1.1 %
// at the shape above.
#include "norm/cuda.cuh"
#include "rms_norm/op.h"

namespace fastgpt::cuda {
namespace {

// Loads weight + offset, or ones if weight is null.
template <typename W, typename Args, int L>
__device__ __forceinline__ void load_weight(const Args& a, int c, float (&w)[L]) {
  load_affine<W>(a.weight, c, 1.0f, w);
#pragma unroll
  for (int l = 0; l < L; ++l) w[l] += a.weight != nullptr ? a.weight_offset : 0.0f;
}

template <typename W, typename T, int L, int kPacks>
__device__ __forceinline__ void store_y(const RmsNormFwdArgs& a, int64_t row, int first, const Raw<T, L> (&h)[kPacks],
                                        float rstd) {
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = first + column<L, kPacks>(i);
    if (c >= a.n_cols) continue;
    float y[L], w[L];
    widen(h[i], y);
    load_weight<W>(a, c, w);
#pragma unroll
    for (int l = 0; l < L; ++l) y[l] = rms_norm_y(y[l], rstd, w[l]);
    store_whole(static_cast<T*>(a.y) + row * a.n_cols + c, y);
  }
}

// One row per threadIdx.y, held in registers. A block has more than one row only if a row is one warp (no barrier).
template <typename T, typename W, int L>
__global__ void __launch_bounds__(kFwdThreads) rms_norm_fwd_kernel(const RmsNormFwdArgs a) {
  __shared__ float scratch[kMaxWarps];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int n = static_cast<int>(a.n_cols);
  if (row >= a.n_rows) return;
  Raw<T, L> h[kFwdPacks<L>];
  load_h(a, row, 0, h);
  const float squares = row_sum(sum_of(h, 0, n, [](float x) { return x * x; }), scratch);
  const float rstd = 1.0f / sqrtf(squares / n + a.eps);
  if (threadIdx.x == 0) a.rstd[row] = rstd;
  store_y<W>(a, row, 0, h, rstd);
}

// One block per row, two sweeps over its columns.
template <typename T, typename W, int L>
__global__ void __launch_bounds__(kWideThreads) rms_norm_fwd_wide_kernel(const RmsNormFwdArgs a) {
  constexpr int kPacks = kFwdPacks<L>;
  __shared__ float scratch[kMaxWarps];
  const int64_t row = blockIdx.x;
  const int n = static_cast<int>(a.n_cols), step = kPacks * blockDim.x * L;
  const T* again = a.residual != nullptr ? at_row<T>(a.sum, row, a.n_cols) : at_row<T>(a.x, row, a.x_row);
  float squares = 0.0f;
  Raw<T, L> h[kPacks];
  for (int first = 0; first < n; first += step) {
    load_h(a, row, first, h);
    squares += sum_of(h, first, n, [](float x) { return x * x; });
  }
  const float rstd = 1.0f / sqrtf(row_sum(squares, scratch) / n + a.eps);
  if (threadIdx.x == 0) a.rstd[row] = rstd;
  for (int first = 0; first < n; first += step) {  // each thread reads what it has stored
    load_row(again, first, n, h);
    store_y<W>(a, row, first, h, rstd);
  }
}

// One row per threadIdx.y at a time; a thread has the same columns in all its rows.
template <typename T, typename W, int kPacks, bool kXBias, int L>
__global__ void __launch_bounds__(bwd_threads(kPacks, L, 1 + kXBias), bwd_blocks(kPacks, L, 1 + kXBias))
    rms_norm_bwd_kernel(const RmsNormBwdArgs a) {
  __shared__ float scratch[2][kMaxWarps];  // two sets, used alternately: one barrier per row
  FASTGPT_DYNAMIC_SHARED(float, shared);
  const Ring<T, L, kPacks> ring(shared, a.dsum != nullptr);
  const int n = static_cast<int>(a.n_cols);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  float dw[kPacks][L] = {}, dx_bias[kXBias ? kPacks : 1][L] = {};
  ring.request_row(a, row, 0);
  float next_rstd = row < a.n_rows ? a.rstd[row] : 0.0f;
  int set = 0;  // index of the set of scratch and of the stage of the ring
  for (int64_t first = row - threadIdx.y; first < a.n_rows; first += step, row += step, set ^= 1) {
    ring.request_row(a, row + step, set ^ 1);
    ptx::cp_async_wait<1>();  // this row has arrived, the next may be in flight
    const int end = row < a.n_rows ? n : 0;
    const float rstd = next_rstd;
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<L, kPacks>(i);
      if (c >= end) continue;
      float dy[L], h[L], w[L];
      ring.get(set, 0, i, dy);
      ring.get(set, 1, i, h);
      load_weight<W>(a, c, w);
#pragma unroll
      for (int l = 0; l < L; ++l) {
        const float dy_xhat = dy[l] * (h[l] * rstd);
        dw[i][l] += dy_xhat;
        dot += w[l] * dy_xhat;
      }
    }
    if (row + step < a.n_rows) next_rstd = a.rstd[row + step];
    const RmsNormDx dx(row_sum(dot, scratch[set]) / n, rstd, n, a.eps);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<L, kPacks>(i);
      if (c >= end) continue;
      float d[L], h[L], w[L], dsum[L] = {};
      ring.get(set, 0, i, d);
      ring.get(set, 1, i, h);
      if (ring.dsum) ring.get(set, 2, i, dsum);
      load_weight<W>(a, c, w);
#pragma unroll
      for (int l = 0; l < L; ++l) d[l] = dx(w[l] * d[l], h[l] * rstd);
      store_dx<T>(a, row, c, d, dsum);
      if constexpr (kXBias) {
#pragma unroll
        for (int l = 0; l < L; ++l) dx_bias[i][l] += d[l];
      }
    }
  }
  if (a.partials == nullptr) return;
  __syncthreads();  // the ring is no longer in use
  float* partial = a.partials + static_cast<int64_t>(blockIdx.x) * (a.dx_bias == nullptr ? 1 : 2) * n;
  write_partial(dw, n, shared, partial);
  if constexpr (kXBias) {
    if (a.dx_bias != nullptr) write_partial(dx_bias, n, shared + n, partial + n);
  }
}

// Wide rows, kWideRows at a time: first the mean of each row, then, column by column, dx and the sum over the rows.
// Between two groups of rows the partial of the block holds the sum; each thread has its own columns there. dy and h
// are read twice.
template <typename T, typename W, int L>
__global__ void __launch_bounds__(kWideThreads) rms_norm_bwd_wide_kernel(const RmsNormBwdArgs a) {
  __shared__ float scratch[2][kMaxWarps];
  __shared__ float means[2][kWideRows];
  const int n = static_cast<int>(a.n_cols), step = blockDim.x * L;
  const int n_sums = a.dx_bias == nullptr ? 1 : 2;
  float* partial = a.partials == nullptr ? nullptr : a.partials + static_cast<int64_t>(blockIdx.x) * n_sums * n;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kWideRows;
  int set = 0;
  for (int64_t first = begin; first < a.n_rows; first += static_cast<int64_t>(gridDim.x) * kWideRows, set ^= 1) {
    const int n_rows = static_cast<int>(a.n_rows - first < kWideRows ? a.n_rows - first : kWideRows);
    for (int r = 0; r < n_rows; ++r) {
      const float rstd = a.rstd[first + r];
      float dot = 0.0f;
      for (int c = threadIdx.x * L; c < n; c += step) {
        float dy[L], h[L], w[L];
        load(at_row<T>(a.dy, first + r, a.dy_row) + c, dy);
        load(at_row<T>(a.h, first + r, a.h_row) + c, h);
        load_weight<W>(a, c, w);
#pragma unroll
        for (int l = 0; l < L; ++l) dot += w[l] * dy[l] * (h[l] * rstd);
      }
      dot = row_sum(dot, scratch[r % 2]);
      if (threadIdx.x == 0) means[set][r] = dot / n;
    }
    __syncthreads();
    for (int c = threadIdx.x * L; c < n; c += step) {
      float w[L], dw[L] = {}, dx_bias[L] = {};
      load_weight<W>(a, c, w);
#pragma unroll 1
      for (int r = 0; r < n_rows; ++r) {
        const float rstd = a.rstd[first + r];
        const RmsNormDx dx(means[set][r], rstd, n, a.eps);
        float d[L], xhat[L], dsum[L] = {};
        load(at_row<T>(a.dy, first + r, a.dy_row) + c, d);
        load(at_row<T>(a.h, first + r, a.h_row) + c, xhat);
        if (a.dsum != nullptr) load(at_row<T>(a.dsum, first + r, a.dsum_row) + c, dsum);
#pragma unroll
        for (int l = 0; l < L; ++l) {
          xhat[l] *= rstd;
          dw[l] += d[l] * xhat[l];
          d[l] = dx(w[l] * d[l], xhat[l]);
        }
        store_dx<T>(a, first + r, c, d, dsum);
#pragma unroll
        for (int l = 0; l < L; ++l) dx_bias[l] += d[l];
      }
      if (partial == nullptr) continue;
      add_group(partial + c, dw, first == begin);
      if (n_sums == 2) add_group(partial + n + c, dx_bias, first == begin);
    }
  }
}

}  // namespace

// ---- launchers ----

int64_t rms_norm_bwd_blocks(int64_t n_rows, int64_t, Stream) { return max_bwd_blocks(n_rows); }

void rms_norm_fwd(const RmsNormFwdArgs& a, Stream stream) {
  const auto kernels = [](auto t, auto w, auto lanes) {
    using T = decltype(t);
    using W = decltype(w);
    return std::make_pair(rms_norm_fwd_kernel<T, W, lanes()>, rms_norm_fwd_wide_kernel<T, W, lanes()>);
  };
  launch_fwd("rms_norm_fwd_kernel", "rms_norm_fwd_wide_kernel", kernels, a,
             all_aligned({a.x, a.residual, a.x_bias, a.weight, a.y, a.sum}), stream);
}

void rms_norm_bwd(const RmsNormBwdArgs& a, Stream stream) {
  const auto kernel_of = [](auto t, auto w, auto lanes, auto packs, auto x_bias) {
    using T = decltype(t);
    using W = decltype(w);
    if constexpr (packs() == 0) return rms_norm_bwd_wide_kernel<T, W, lanes()>;
    else return rms_norm_bwd_kernel<T, W, packs(), x_bias(), lanes()>;
  };
  const ColumnSum sums[] = {{a.dweight, a.weight_dtype}, {a.dx_bias, a.x_bias_dtype}};
  launch_bwd("rms_norm_bwd_kernel", "rms_norm_bwd_wide_kernel", kernel_of, a, sums, stream);
}

}  // namespace fastgpt::cuda
