// Formulas of one class that the CPU and CUDA kernels share; see fastgpt/ops/divergence.py.
#pragma once
#include "core/math.h"

namespace fastgpt {

enum class Divergence : int64_t { forward_kl, reverse_kl, jsd };

// Sums of exponentials of the student's and the teacher's row, each shifted by its maximum, and what follows from them.
struct DivergenceRow {
  float sum_q, sum_p, inv_q, inv_p, log_ratio;  // log(sum_q / sum_p)

  FASTGPT_HD DivergenceRow(float of_q, float of_p, float log_of_ratio)
      : sum_q(of_q), sum_p(of_p), inv_q(1.0f / of_q), inv_p(1.0f / of_p), log_ratio(log_of_ratio) {}
};

// One class from its shifted logits x (student) and y (teacher): its shares of the sums over the row, and what the
// gradient weights q with.
struct DivergenceTerms {
  float of_p, of_q, gap, p, q;
};

// exp is a function of one float. log p - log q is a difference of shifted logits and one logarithm for the row, so
// little is lost where p and q are close. With m = beta p + (1 - beta) q and d = log p - log q,
//     log(q / m) = -log1p(beta (e^d - 1)),   log(p / m) = log(q / m) + d,
// which for d > 0 is taken with p and q, and beta and 1 - beta, exchanged: e^d cannot overflow.
template <Divergence kKind, typename Exp>
FASTGPT_HD DivergenceTerms divergence_terms(float x, float y, const DivergenceRow& r, float beta, const Exp& exp) {
  DivergenceTerms t{0.0f, 0.0f, 0.0f, exp(y), exp(x)};
  const float d = (y - x) + r.log_ratio;
  if (kKind == Divergence::forward_kl) {
    t.of_p = t.p == 0.0f ? 0.0f : t.p * d;
  } else if (kKind == Divergence::reverse_kl) {
    t.gap = t.q == 0.0f ? 0.0f : -d;
    t.of_q = t.q * t.gap;
  }
  t.p *= r.inv_p, t.q *= r.inv_q;
  if (kKind == Divergence::jsd) {
    const bool less = d < 0.0f;  // p is less than q
    const float low = less ? d : -d;
    const float of_larger = -log1p_low((less ? beta : 1.0f - beta) * expm1_low(low)), of_smaller = of_larger + low;
    t.gap = t.q < 1e-37f ? 0.0f : less ? of_larger : of_smaller;
    t.of_q = t.q * t.gap;
    t.of_p = t.p < 1e-37f ? 0.0f : t.p * (less ? of_smaller : of_larger);
  }
  return t;
}

// What the gradient subtracts from `gap`, and the loss of the row, from the sums of its terms.
template <Divergence kKind>
FASTGPT_HD float divergence_mean(float of_q, const DivergenceRow& r) {
  return kKind == Divergence::reverse_kl ? of_q / r.sum_q : of_q;
}

template <Divergence kKind>
FASTGPT_HD float divergence_loss(float of_p, float of_q, const DivergenceRow& r, float beta) {
  if (kKind == Divergence::forward_kl) return of_p / r.sum_p;
  if (kKind == Divergence::reverse_kl) return of_q / r.sum_q;
  return beta * of_p + (1.0f - beta) * of_q;
}

// Gradient of one class, with `factor` = scale / temperature, times 1 - beta for jsd.
template <Divergence kKind>
FASTGPT_HD float divergence_dz(const DivergenceTerms& t, float mean, float factor) {
  return (kKind == Divergence::forward_kl ? t.q - t.p : t.q * (t.gap - mean)) * factor;
}

}  // namespace fastgpt
