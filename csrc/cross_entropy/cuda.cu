// Softmax cross-entropy with its gradient; formulas in fastgpt/ops/cross_entropy.py.
//
//   m = max z, s = sum exp(z - m), lse = m + log s        online (Milakov, Gimelshein 2018, arXiv:1805.02867)
//   dz_c = exp(z_c - m) / s * p_scale - w_c * smooth - [c == y] * hit
//
// Fused: softcap, class weights, label smoothing, z-loss, padding columns, ignored rows, the factor of each row.
// fwd_bwd reads the logits from HBM once and overwrites them with the gradient. m and s are saved for a separate
// backward, which then needs only one sweep. Bytes per 16-bit logit: fwd 2, bwd 4, fwd_bwd 4. Floor of fwd_bwd for 65536
// rows of 50304 (13.2 GB): A100 6.5 ms, H100 3.9, H200 2.7; of fwd half as much.
//
// How: each row is processed by one block, and each thread has four 16-byte loads in flight. Rows that do not start at
// a 16-byte boundary (odd V) peel their first and last columns. In fwd_bwd the second sweep over a row finds it in L2:
// 512 threads at two blocks per multiprocessor keep 2 * 132 rows in flight. Of rows too long for that it finds the
// end, since it goes backwards.
//
// fwd_bwd of rows of 32 to 112 KB without softcap, weights and smoothing (GPT-2's 50257 and 50304 logits in 16 bits)
// reads a row once: a block of 1024 threads holds it in registers, in 16 bits, for the maximum, the sum and the
// gradient, while the next row of this block arrives in shared memory.
#include "core/cuda/launch.cuh"
#include "core/cuda/multiprocessors.cuh"
#include "core/cuda/reduce.cuh"
#include "core/cuda/vec.cuh"
#include "core/with_type.h"
#include "cross_entropy/op.h"

#include <algorithm>

namespace fastgpt::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 4;
constexpr int kHeldThreads = 1024;
constexpr int kHeld = 7;  // most 16-byte pieces of a held row per thread

// One row and its options. Plain: no softcap, no class weights, no smoothing.
template <typename T, bool kPlain>
struct Row {
  const CrossEntropyArgs& a;
  const T* logits;
  T* dlogits;
  int64_t index;
  int n_classes;
  int64_t target;
  float inv_softcap;

  __device__ Row(const CrossEntropyArgs& args, int64_t row) : Row(args, row, args.target[row]) {}

  __device__ Row(const CrossEntropyArgs& args, int64_t row, int64_t y)
      : a(args),
        logits(static_cast<const T*>(args.logits) + row * args.logits_row),
        dlogits(static_cast<T*>(args.dlogits) + row * args.dlogits_row),
        index(row),
        n_classes(static_cast<int>(args.n_classes)),
        target(y),
        inv_softcap(args.softcap > 0.0f ? 1.0f / args.softcap : 0.0f) {}

  __device__ bool ignored() const { return target == a.ignore_index; }
  __device__ bool counted() const { return !ignored() && target >= 0 && target < a.n_classes; }
  __device__ float weight(int64_t c) const { return kPlain || a.weight == nullptr ? 1.0f : a.weight[c]; }
  __device__ float weight_sum() const {
    return kPlain || a.weight == nullptr ? static_cast<float>(n_classes) : *a.weight_sum;
  }
  __device__ float scale() const { return a.scale[index * a.scale_step]; }

  __device__ float z(float logit) const {
    if (kPlain || a.softcap <= 0.0f) return logit;
    const float t = logit * inv_softcap;
    return a.softcap * tanh_from_exp(t, fast_exp(-2.0f * fabsf(t)));
  }
};

// Maximum and max-shifted sum of a row, and sum_c w_c (z_c - z_ref) for label smoothing (else 0).
struct Stats {
  float max, sum, weighted;
};

__device__ __forceinline__ float finite_shift(float max) { return max == -INFINITY ? 0.0f : max; }

// Sweeps over the classes once. Every thread gets the same result. scratch: 3 * kMaxWarps, unused on entry; on return
// the whole block has passed a barrier.
template <typename T, bool kPlain>
__device__ __forceinline__ Stats row_stats(const Row<T, kPlain>& row, float z_ref, float* scratch) {
  float max = -INFINITY, sum = 0.0f, weighted = 0.0f;
  const bool smoothing = !kPlain && row.a.label_smoothing > 0.0f;
  sweep<kUnroll>(row.logits, row.n_classes, [&](int c, auto& x) {
    constexpr int L = sizeof(x) / sizeof(float);
    float top = max;
#pragma unroll
    for (int l = 0; l < L; ++l) {
      x[l] = row.z(x[l]);
      top = fmaxf(top, x[l]);
    }
    const float shift = finite_shift(top);
    sum *= fast_exp(max - shift);
#pragma unroll
    for (int l = 0; l < L; ++l) sum += fast_exp(x[l] - shift);
    max = top;
    if constexpr (!kPlain) {
#pragma unroll
      for (int l = 0; l < L && smoothing; ++l) {
        const float w = row.weight(c + l);
        if (w != 0.0f) weighted += w * (x[l] - z_ref);  // a class of weight 0 may have logit -inf
      }
    }
  });
  const float top = row_max(max, scratch);
  sum *= fast_exp(max - finite_shift(top));
  sum = row_sum(sum, scratch + kMaxWarps);
  if (smoothing) weighted = row_sum(weighted, scratch + 2 * kMaxWarps);
  __syncthreads();
  return Stats{top, sum, weighted};
}

template <typename T, bool kPlain>
__device__ __forceinline__ float row_loss(const Row<T, kPlain>& row, const Stats& s, float z_y, float z_ref) {
  const CrossEntropyArgs& a = row.a;
  const float log_sum = logf(s.sum);
  const float smooth = kPlain ? 0.0f : row.weight_sum() * ((s.max - z_ref) + log_sum) - s.weighted;
  return cross_entropy_loss((s.max - z_y) + log_sum, a.label_smoothing > 0.0f ? smooth : 0.0f, row.weight(row.target),
                            s.max + log_sum, a.label_smoothing, a.z_loss, static_cast<float>(row.n_classes));
}

// Writes the loss of a row that counts and returns its statistics. scratch: as for row_stats, whose barrier ensures
// that every thread has read the logit of the target before a gradient may overwrite it.
template <typename T, bool kPlain>
__device__ __forceinline__ Stats write_loss(const Row<T, kPlain>& row, float* scratch) {
  const float z_y = row.z(widen(row.logits[row.target]));
  const float z_ref = z_y == -INFINITY ? 0.0f : z_y;
  const Stats s = row_stats(row, z_ref, scratch);
  if (threadIdx.x == 0) row.a.loss[row.index] = row_loss(row, s, z_y, z_ref);
  return s;
}

// Subtracts `hit` from the column y, if it is among the L columns from c on.
template <int L>
__device__ __forceinline__ void subtract_hit(int c, int y, float hit, float (&x)[L]) {
  if (y < c || c + L <= y) return;
#pragma unroll
  for (int l = 0; l < L; ++l) x[l] -= c + l == y ? hit : 0.0f;
}

// Writes the gradient of the row: p_c = exp(z_c - max) / sum. Each thread reads a column before it overwrites it. The
// sweep goes backwards, because the end of a long row is what the forward sweep left in L2.
template <typename T, bool kPlain>
__device__ __forceinline__ void write_gradient(const Row<T, kPlain>& row, float max, float sum) {
  const CrossEntropyArgs& a = row.a;
  CrossEntropyGrad g = cross_entropy_grad_row(row.scale(), row.weight(row.target), row.weight_sum(), max + logf(sum),
                                              a.label_smoothing, a.z_loss, static_cast<float>(row.n_classes));
  g.p_scale *= 1.0f / sum;  // so it is the factor of exp(z - max)
  const bool aligned = (reinterpret_cast<uintptr_t>(row.logits) ^ reinterpret_cast<uintptr_t>(row.dlogits)) % 16 == 0;
  const int y = static_cast<int>(row.target);
  sweep<kUnroll, true>(row.logits, row.n_classes, [&](int c, auto& x) {
    constexpr int L = sizeof(x) / sizeof(float);
#pragma unroll
    for (int l = 0; l < L; ++l) {
      const float z = row.z(x[l]);
      float d = cross_entropy_dz(g, fast_exp(z - max), row.weight(c + l));
      if constexpr (!kPlain) d -= c + l == y ? g.hit : 0.0f;
      x[l] = kPlain || a.softcap <= 0.0f ? d : d * softcap_slope(z, row.inv_softcap);
    }
    if constexpr (kPlain) subtract_hit(c, y, g.hit, x);
    store_any(row.dlogits + c, x, aligned);
  });
  for (int64_t c = row.n_classes + threadIdx.x; c < a.n_cols; c += blockDim.x) row.dlogits[c] = T{};
}

// Writes loss and gradient of a row that does not count: ignored, or with a target that is not a class.
template <typename T, bool kPlain>
__device__ __forceinline__ void write_uncounted(const Row<T, kPlain>& row, bool loss, bool gradient) {
  if (loss && threadIdx.x == 0) row.a.loss[row.index] = row.ignored() ? 0.0f : NAN;
  if (!gradient) return;
  sweep<1>(row.dlogits, static_cast<int>(row.a.n_cols), [&](int c, auto& x) {
    for (float& v : x) v = 0.0f;
    store_any(row.dlogits + c, x, true);
  });
}

template <typename T, bool kPlain>
__global__ void __launch_bounds__(kThreads) cross_entropy_fwd_kernel(const CrossEntropyArgs a) {
  __shared__ float scratch[3 * kMaxWarps];
  const Row<T, kPlain> row(a, blockIdx.x);
  if (!row.counted()) {
    if (threadIdx.x == 0) a.max[row.index] = a.sum_exp[row.index] = 0.0f;  // not read
    write_uncounted(row, true, false);
    return;
  }
  const Stats s = write_loss(row, scratch);
  if (threadIdx.x == 0) {
    a.max[row.index] = s.max;
    a.sum_exp[row.index] = s.sum;
  }
}

template <typename T, bool kPlain>
__global__ void __launch_bounds__(kThreads) cross_entropy_bwd_kernel(const CrossEntropyArgs a) {
  const Row<T, kPlain> row(a, blockIdx.x);
  if (!row.counted()) return write_uncounted(row, false, true);
  write_gradient(row, a.max[row.index], a.sum_exp[row.index]);
}

template <typename T, bool kPlain>
__global__ void __launch_bounds__(kThreads) cross_entropy_fwd_bwd_kernel(const CrossEntropyArgs a) {
  __shared__ float scratch[3 * kMaxWarps];
  const Row<T, kPlain> row(a, blockIdx.x);
  if (!row.counted()) {
    write_uncounted(row, true, true);
    return;
  }
  const Stats s = write_loss(row, scratch);
  write_gradient(row, s.max, s.sum);
}

// Requests the row into `arriving`, where each thread will read the pieces that it requested, and returns the thread's
// edge. Reads nothing of a row that does not count.
template <typename T>
__device__ __forceinline__ T request(const Row<T, true>& row, uint4* arriving) {
  if (!row.counted()) return T{};
  const Split<T> split(row.logits, row.n_classes);
  const uint4* packs = reinterpret_cast<const uint4*>(row.logits + split.head) + threadIdx.x;
  const ptx::Shared to = ptx::shared_address(arriving + threadIdx.x);
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    const int step = u * kHeldThreads;
    if (static_cast<int>(threadIdx.x) + step < split.n_packs) ptx::cp_async_16(to + step * 16, packs + step, 16);
  }
  ptx::cp_async_commit();
  return static_cast<int>(threadIdx.x) < split.n_edges ? row.logits[split.edge(threadIdx.x)] : T{};
}

// Calls f(c, x) for the pieces that this thread holds; x[0] is column c.
template <typename T, typename F>
__device__ __forceinline__ void for_held(const Split<T>& split, const uint4 (&held)[kHeld], F f) {
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    const int i = threadIdx.x + u * kHeldThreads;
    if (i >= split.n_packs) break;
    float x[kLanes<T>];
    unpack<T>(held[u], x);
    f(split.head + i * kLanes<T>, x);
  }
}

// Writes loss and gradient of a row that counts, held in registers. scratch: 2 * kMaxWarps.
template <typename T>
__device__ __forceinline__ void process_held(const Row<T, true>& row, const uint4 (&held)[kHeld], T edge,
                                             float* scratch) {
  const CrossEntropyArgs& a = row.a;
  const Split<T> split(row.logits, row.n_classes);
  const int y = static_cast<int>(row.target);
  const bool has_edge = static_cast<int>(threadIdx.x) < split.n_edges;
  const float z_edge = has_edge ? widen(edge) : -INFINITY, scale = row.scale();
  float z_y = 0.0f;
  if (threadIdx.x == 0) z_y = widen(row.logits[y]);  // before the barriers, so before the gradient overwrites it

  float max = z_edge;
  for_held<T>(split, held, [&](int, const auto& x) {
    for (const float z : x) max = fmaxf(max, z);
  });
  max = row_max(max, scratch);
  const float shift = finite_shift(max);
  float sum = fast_exp(z_edge - shift);
  for_held<T>(split, held, [&](int, const auto& x) {
    for (const float z : x) sum += fast_exp(z - shift);
  });
  sum = row_sum(sum, scratch + kMaxWarps);
  if (threadIdx.x == 0) a.loss[row.index] = row_loss(row, Stats{max, sum, 0.0f}, z_y, 0.0f);

  const CrossEntropyGrad g = cross_entropy_grad_row(scale, 1.0f, 0.0f, max + logf(sum), 0.0f, a.z_loss,
                                                    static_cast<float>(row.n_classes));
  const float factor = g.p_scale * (1.0f / sum);
  for_held<T>(split, held, [&](int c, auto& x) {
    for (float& z : x) z = fast_exp(z - shift) * factor;
    subtract_hit(c, y, g.hit, x);
    store_whole(row.dlogits + c, x);
  });
  if (has_edge) {
    const int c = split.edge(threadIdx.x);
    row.dlogits[c] = narrow<T>(fast_exp(z_edge - shift) * factor - (c == y ? g.hit : 0.0f));
  }
  for (int64_t c = row.n_classes + threadIdx.x; c < a.n_cols; c += kHeldThreads) row.dlogits[c] = T{};
}

// Block b processes rows b, b + blocks, ...; in place. A row's target is known one row before the row is requested.
template <typename T>
__global__ void __launch_bounds__(kHeldThreads) cross_entropy_held_kernel(const CrossEntropyArgs a) {
  FASTGPT_DYNAMIC_SHARED(uint4, arriving);
  __shared__ float scratch[2 * kMaxWarps];
  const int64_t step = gridDim.x;
  const auto target_of = [&](int64_t index) { return index < a.n_rows ? a.target[index] : a.ignore_index; };
  int64_t target = target_of(blockIdx.x), next_target = target_of(blockIdx.x + step);
  T next_edge = request(Row<T, true>(a, blockIdx.x, target), arriving);
  for (int64_t index = blockIdx.x; index < a.n_rows; index += step) {
    const Row<T, true> row(a, index, target), next(a, index + step, next_target);
    target = next_target, next_target = target_of(index + 2 * step);
    const T edge = next_edge;
    uint4 held[kHeld];
    if (row.counted()) {
      const int n_packs = Split<T>(row.logits, row.n_classes).n_packs;
      ptx::cp_async_wait<0>();
#pragma unroll
      for (int u = 0; u < kHeld; ++u) {
        const int i = threadIdx.x + u * kHeldThreads;
        if (i < n_packs) held[u] = arriving[i];
      }
    }
    next_edge = request(next, arriving);
    if (row.counted()) process_held(row, held, edge, scratch);
    else write_uncounted(row, true, true);
  }
}

// A row whose scale is exactly 1 costs one load.
template <typename T>
__global__ void __launch_bounds__(kThreads) scale_rows_kernel(const ScaleRowsArgs a) {
  const int64_t index = blockIdx.x;
  const float scale = a.scale[index * a.scale_step];
  if (scale == 1.0f) return;
  T* row = static_cast<T*>(a.x) + index * a.x_row;
  sweep<kUnroll>(row, static_cast<int>(a.n_cols), [&](int c, auto& x) {
    for (float& v : x) v *= scale;
    store_any(row + c, x, true);
  });
}

// ---- launchers ----

// Returns the threads for a row: four of the widest loads for each, at least a warp.
dim3 row_block(int64_t n_cols) {
  int threads = 32;
  while (threads < kThreads && n_cols > threads * 32) threads *= 2;
  return dim3(threads);
}

bool is_plain(const CrossEntropyArgs& a) {
  return a.weight == nullptr && a.softcap <= 0.0f && a.label_smoothing <= 0.0f;
}

// Launches the instance of a kernel for dtype and options; K is the kernel, a template with two parameters.
#define FASTGPT_LAUNCH_CROSS_ENTROPY(K)                                                              \
  if (a.n_rows == 0) return;                                                                         \
  with_type(a.dtype, [&](auto t) {                                                                   \
    using T = decltype(t);                                                                           \
    const auto kernel = is_plain(a) ? K<T, true> : K<T, false>;                                      \
    launch(#K, kernel, Grid{a.n_rows}, row_block(a.n_cols), 0, stream, a);                           \
  })

// Launches the kernel that reads a row once and overwrites it, if the row and its options suit; returns whether it did.
template <typename T>
bool launch_held(const CrossEntropyArgs& a, Stream stream) {
  const int64_t n_packs = a.n_classes / kLanes<T>, shared = n_packs * 16;  // at most: an edge takes pieces away
  const bool fits = n_packs > 2 * kHeldThreads && n_packs <= kHeld * kHeldThreads;
  if (!fits || !is_plain(a) || a.dlogits != a.logits) return false;
  const auto kernel = cross_entropy_held_kernel<T>;
  if (shared > most_shared_memory(reinterpret_cast<const void*>(kernel))) return false;
  const Grid grid{std::min<int64_t>(a.n_rows, multiprocessors())};
  launch("cross_entropy_held_kernel", kernel, grid, dim3(kHeldThreads), shared, stream, a);
  return true;
}

}  // namespace

void cross_entropy_fwd(const CrossEntropyArgs& a, Stream stream) {
  FASTGPT_LAUNCH_CROSS_ENTROPY(cross_entropy_fwd_kernel);
}

void cross_entropy_bwd(const CrossEntropyArgs& a, Stream stream) {
  FASTGPT_LAUNCH_CROSS_ENTROPY(cross_entropy_bwd_kernel);
}

void cross_entropy_fwd_bwd(const CrossEntropyArgs& a, Stream stream) {
  bool done = a.n_rows == 0;
  if (!done) with_type(a.dtype, [&](auto t) { done = launch_held<decltype(t)>(a, stream); });
  if (done) return;
  FASTGPT_LAUNCH_CROSS_ENTROPY(cross_entropy_fwd_bwd_kernel);
}

void scale_rows(const ScaleRowsArgs& a, Stream stream) {
  if (a.n_rows == 0) return;
  with_type(a.dtype, [&](auto t) {
    launch("scale_rows_kernel", scale_rows_kernel<decltype(t)>, Grid{a.n_rows}, row_block(a.n_cols), 0, stream, a);
  });
}

}  // namespace fastgpt::cuda
