// Divergence between two rows of logits with its gradient; formulas in fastgpt/ops/divergence.py.
//
// Fused: temperature, both softmaxes, the divergence, padding columns, rows that do not count, the factor of each row.
// Three sweeps over both rows: maxima and sums (online, arXiv:1805.02867), the sums of the terms, the gradient in place
// of the student's logits. Logits are read from HBM once; later sweeps find them in L2. Bytes per 16-bit pair of
// logits: 4 read, 2 written.
//
// How: as in cross_entropy/cuda.cu, one block a row, with 16-byte loads where a row starts at such a boundary. A
// teacher's row that is aligned otherwise than the student's is read value by value.
#include "core/cuda/launch.cuh"
#include "core/cuda/reduce.cuh"
#include "core/cuda/vec.cuh"
#include "core/with_type.h"
#include "linear_divergence/op.h"
#include "linear_divergence/terms.h"

namespace fastgpt::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 2;

// fast_exp rounds x log2(e), which moves a small probability by |x| u: too much for fp32 logits.
template <typename T>
__device__ __forceinline__ float exp_of(float x) {
  if constexpr (sizeof(T) == 4) return exp_low(x);
  else return fast_exp(x);
}

template <typename T>
struct Exp {
  __device__ float operator()(float x) const { return exp_of<T>(x); }
};

// Maximum and max-shifted sum, added to value by value: the values of a vector in fp32, the vectors in fp64.
template <typename T>
struct Side {
  float max = -INFINITY;
  double sum = 0.0;

  __device__ __forceinline__ static float shift(float max) { return max == -INFINITY ? 0.0f : max; }

  template <int L>
  __device__ __forceinline__ void add(const float (&x)[L]) {
    float top = max, more = 0.0f;
#pragma unroll
    for (int l = 0; l < L; ++l) top = fmaxf(top, x[l]);
#pragma unroll
    for (int l = 0; l < L; ++l) more += exp_of<T>(x[l] - shift(top));
    sum = sum * exp_of<T>(max - shift(top)) + more;
    max = top;
  }

  // Combines the threads of the row; scratch: kMaxWarps each.
  __device__ __forceinline__ void reduce(float* maxima, double* sums) {
    const float top = row_max(max, maxima);
    sum = row_sum(sum * exp_of<T>(max - shift(top)), sums);
    max = top;
  }
};

// Calls f(c, x, y) with the scaled logits of both rows from column c on.
template <typename T, typename F>
__device__ __forceinline__ void sweep_both(const T* logits, const T* teacher, int n, float temperature, F f) {
  const bool aligned = (reinterpret_cast<uintptr_t>(logits) ^ reinterpret_cast<uintptr_t>(teacher)) % 16 == 0;
  sweep<kUnroll>(logits, n, [&](int c, auto& x) {
    constexpr int L = sizeof(x) / sizeof(float);
    float y[L];
    if (L > 1 && aligned) {
      load(teacher + c, y);
    } else {
#pragma unroll
      for (int l = 0; l < L; ++l) y[l] = widen(teacher[c + l]);
    }
#pragma unroll
    for (int l = 0; l < L; ++l) x[l] = x[l] / temperature, y[l] = y[l] / temperature;
    f(c, x, y);
  });
}

template <typename T, Divergence kKind>
__global__ void __launch_bounds__(kThreads) linear_divergence_rows_kernel(const LinearDivergenceArgs a) {
  __shared__ float maxima[2 * kMaxWarps];
  __shared__ double sums[4 * kMaxWarps];
  const int64_t row = blockIdx.x;
  T* logits = static_cast<T*>(a.logits) + row * a.logits_row;
  const T* teacher = static_cast<const T*>(a.teacher) + row * a.teacher_row;
  const bool counted = a.target == nullptr || a.target[row] != a.ignore_index;
  const int n = counted ? static_cast<int>(a.n_classes) : 0;
  for (int64_t c = n + threadIdx.x; c < a.n_cols; c += blockDim.x) logits[c] = T{};
  if (!counted) {
    if (threadIdx.x == 0) a.loss[row] = 0.0f;
    return;
  }
  Side<T> s, t;
  sweep_both(logits, teacher, n, a.temperature, [&](int, auto& x, auto& y) { s.add(x), t.add(y); });
  s.reduce(maxima, sums), t.reduce(maxima + kMaxWarps, sums + kMaxWarps);
  const float sum_s = static_cast<float>(s.sum), sum_t = static_cast<float>(t.sum), beta = a.beta;
  const DivergenceRow r(sum_s, sum_t, logf(sum_s / sum_t));

  double sum_of_p = 0.0, sum_of_q = 0.0;
  sweep_both(logits, teacher, n, a.temperature, [&](int, auto& x, auto& y) {
    constexpr int L = sizeof(x) / sizeof(float);
    float more_p = 0.0f, more_q = 0.0f;
#pragma unroll
    for (int l = 0; l < L; ++l) {
      const auto d = divergence_terms<kKind>(x[l] - s.max, y[l] - t.max, r, beta, Exp<T>{});
      more_p += d.of_p, more_q += d.of_q;
    }
    sum_of_p += more_p, sum_of_q += more_q;
  });
  row_sum2(sum_of_p, sum_of_q, sums + 2 * kMaxWarps);
  const float of_p = static_cast<float>(sum_of_p), of_q = static_cast<float>(sum_of_q);
  if (threadIdx.x == 0) a.loss[row] = divergence_loss<kKind>(of_p, of_q, r, beta);

  const float share = kKind == Divergence::jsd ? 1.0f - beta : 1.0f;
  const float factor = a.scale[row * a.scale_step] * share / a.temperature, mean = divergence_mean<kKind>(of_q, r);
  sweep_both(logits, teacher, n, a.temperature, [&](int c, auto& x, auto& y) {
    constexpr int L = sizeof(x) / sizeof(float);
#pragma unroll
    for (int l = 0; l < L; ++l) {
      const auto d = divergence_terms<kKind>(x[l] - s.max, y[l] - t.max, r, beta, Exp<T>{});
      x[l] = divergence_dz<kKind>(d, mean, factor);
    }
    store_any(logits + c, x, true);
  });
}

// ---- launcher ----

// Returns the threads for a row: four of the widest loads for each, at least a warp.
dim3 row_block(int64_t n_cols) {
  int threads = 32;
  while (threads < kThreads && n_cols > threads * 32) threads *= 2;
  return dim3(threads);
}

template <Divergence kKind>
void launch_rows(const LinearDivergenceArgs& a, Stream stream) {
  with_type(a.dtype, [&](auto t) {
    launch("linear_divergence_rows_kernel", linear_divergence_rows_kernel<decltype(t), kKind>, Grid{a.n_rows},
           row_block(a.n_cols), 0, stream, a);
  });
}

}  // namespace

void linear_divergence_rows(const LinearDivergenceArgs& a, Stream stream) {
  if (a.n_rows == 0) return;
  switch (static_cast<Divergence>(a.kind)) {
    case Divergence::forward_kl: return launch_rows<Divergence::forward_kl>(a, stream);
    case Divergence::reverse_kl: return launch_rows<Divergence::reverse_kl>(a, stream);
    case Divergence::jsd: return launch_rows<Divergence::jsd>(a, stream);
  }
}

}  // namespace fastgpt::cuda
