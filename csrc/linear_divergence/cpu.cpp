// Divergence of rows on the CPU; formulas in fastgpt/ops/divergence.py.
//
// Three passes over a row in chunks of 1024 columns, of both logits: the largest and the sum of exponentials shifted by
// it (online, arXiv:1805.02867); the sums of the terms; the gradient, in place of the student's logits. Both rows stay
// in the L2 cache between the passes up to about 100 KB. Padding columns get gradient 0.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")  // no formula here needs a product to be rounded
#endif
#include <cmath>

#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"
#include "linear_divergence/op.h"
#include "linear_divergence/terms.h"

namespace fastgpt::cpu {

// Maximum and max-shifted sum of one side's scaled logits.
struct Side {
  float max = -INFINITY;
  double sum = 0.0;
};

struct LinearDivergenceScratch {
  alignas(64) float x[kChunk], y[kChunk];  // shifted logits of the student and the teacher
};

struct ExpLow {
  float operator()(float x) const { return exp_low(x); }
};

// Stores logits / temperature - max of n columns.
template <class T>
inline void load_side(const T* logits, float temperature, float max, float* out, int64_t n) {
  FASTGPT_SIMD
  for (int64_t c = 0; c < n; ++c) out[c] = to_float(logits[c]) / temperature - max;
}

inline void add_side(Side& s, const float* x, int64_t n) {
  float top = -INFINITY;
  FASTGPT_MAX(top)
  for (int64_t c = 0; c < n; ++c) top = x[c] > top ? x[c] : top;
  if (top > s.max) {
    s.sum *= exp_low(s.max - top);
    s.max = top;
  }
  const float shift = s.max == -INFINITY ? 0.0f : s.max;
  double sum = 0.0;
  FASTGPT_SUM(sum)
  for (int64_t c = 0; c < n; ++c) sum += exp_low(x[c] - shift);
  s.sum += sum;
}

// The sums of a row's terms; of_p and of_q as in DivergenceTerms.
struct TermSums {
  double of_p = 0.0, of_q = 0.0;
};

template <Divergence kKind>
inline void add_terms(TermSums& s, const LinearDivergenceScratch& b, const DivergenceRow& r, float beta, int64_t n) {
  double of_p = 0.0, of_q = 0.0;
  FASTGPT_SUM(of_p, of_q)
  for (int64_t c = 0; c < n; ++c) {
    const DivergenceTerms t = divergence_terms<kKind>(b.x[c], b.y[c], r, beta, ExpLow{});
    of_p += t.of_p, of_q += t.of_q;
  }
  s.of_p += of_p, s.of_q += of_q;
}

template <Divergence kKind, class T>
inline void store_gradient(const LinearDivergenceScratch& b, T* out, const DivergenceRow& r, float mean, float factor,
                           float beta, int64_t n) {
  FASTGPT_SIMD
  for (int64_t c = 0; c < n; ++c) {
    const DivergenceTerms t = divergence_terms<kKind>(b.x[c], b.y[c], r, beta, ExpLow{});
    out[c] = from_float<T>(divergence_dz<kKind>(t, mean, factor));
  }
}

template <Divergence kKind, class T>
inline void divergence_row(const LinearDivergenceArgs& a, int64_t row) {
  T* logits = static_cast<T*>(a.logits) + row * a.logits_row;
  const T* teacher = static_cast<const T*>(a.teacher) + row * a.teacher_row;
  const bool counted = a.target == nullptr || a.target[row] != a.ignore_index;
  const int64_t n_classes = counted ? a.n_classes : 0;
  LinearDivergenceScratch b;
  Side student, other;
  const auto load = [&](int64_t first, int64_t n, float max, float max_other) {
    load_side(logits + first, a.temperature, max, b.x, n);
    load_side(teacher + first, a.temperature, max_other, b.y, n);
  };
  for (int64_t first = 0; first < n_classes; first += kChunk) {
    const int64_t n = min_of(kChunk, n_classes - first);
    load(first, n, 0.0f, 0.0f);
    add_side(student, b.x, n), add_side(other, b.y, n);
  }
  const DivergenceRow r(static_cast<float>(student.sum), static_cast<float>(other.sum),
                        static_cast<float>(std::log(student.sum / other.sum)));
  TermSums sums;
  for (int64_t first = 0; first < n_classes; first += kChunk) {
    const int64_t n = min_of(kChunk, n_classes - first);
    load(first, n, student.max, other.max);
    add_terms<kKind>(sums, b, r, a.beta, n);
  }
  const float of_q = static_cast<float>(sums.of_q), mean = divergence_mean<kKind>(of_q, r);
  a.loss[row] = counted ? divergence_loss<kKind>(static_cast<float>(sums.of_p), of_q, r, a.beta) : 0.0f;
  const float share = kKind == Divergence::jsd ? 1.0f - a.beta : 1.0f;
  const float factor = a.scale[row * a.scale_step] * share / a.temperature;
  for (int64_t first = 0; first < n_classes; first += kChunk) {
    const int64_t n = min_of(kChunk, n_classes - first);
    if (n_classes > kChunk) load(first, n, student.max, other.max);  // else the row is still in the buffers
    store_gradient<kKind>(b, logits + first, r, mean, factor, a.beta, n);
  }
  for (int64_t c = n_classes; c < a.n_cols; ++c) logits[c] = from_float<T>(0.0f);
}

FASTGPT_CLONES static void divergence_rows(const LinearDivergenceArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t n = begin; n < end; ++n) {
      switch (static_cast<Divergence>(a.kind)) {
        case Divergence::forward_kl: divergence_row<Divergence::forward_kl, T>(a, n); break;
        case Divergence::reverse_kl: divergence_row<Divergence::reverse_kl, T>(a, n); break;
        case Divergence::jsd: divergence_row<Divergence::jsd, T>(a, n); break;
      }
    }
  });
}

// ---- launcher ----

void linear_divergence_rows(const LinearDivergenceArgs& a, Stream) {
  parallel_for(a.n_rows, row_grain(a.n_cols), [&](int64_t begin, int64_t end) { divergence_rows(a, begin, end); });
}

}  // namespace fastgpt::cpu
