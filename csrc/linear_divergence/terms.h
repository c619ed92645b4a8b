// Formulas of one class that the CPU and CUDA kernels share; see fastgpt/ops/divergence.py.
#pragma once
#include "core/math.h"

namespace fastgpt {

// log(x) for normal x > 0: relative error 1 u away from 1, absolute error 0.3 u around 1. x = 2^n m with m within a
// factor sqrt(2) of 1; a polynomial in m - 1.
FASTGPT_HD float log_near(float x) {
  const int32_t n = static_cast<int32_t>(float_bits(x) - 0x3f3504f3u) >> 23;
  const float f = bits_float(float_bits(x) - (static_cast<uint32_t>(n) << 23)) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float e = static_cast<float>(n);
  return (((p * f * f * f - e * 2.12194440e-4f) - 0.5f * f * f) + f) + e * 0.693359375f;
}

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

// exp and log are functions of one float. log p - log q is a difference of shifted logits and one logarithm for the row,
// or the logarithm of a ratio, so little is lost where p and q are close.
template <Divergence kKind, typename Exp, typename Log>
FASTGPT_HD DivergenceTerms divergence_terms(float x, float y, const DivergenceRow& r, float beta, const Exp& exp,
                                            const Log& log) {
  DivergenceTerms t{0.0f, 0.0f, 0.0f, exp(y), exp(x)};
  if (kKind == Divergence::forward_kl) {
    t.of_p = t.p == 0.0f ? 0.0f : t.p * ((y - x) + r.log_ratio);
  } else if (kKind == Divergence::reverse_kl) {
    t.gap = t.q == 0.0f ? 0.0f : (x - y) - r.log_ratio;
    t.of_q = t.q * t.gap;
  }
  t.p *= r.inv_p, t.q *= r.inv_q;
  if (kKind == Divergence::jsd) {
    const float m = beta * t.p + (1.0f - beta) * t.q;
    t.gap = t.q < 1e-37f ? 0.0f : log(t.q / m);
    t.of_q = t.q * t.gap;
    t.of_p = t.p < 1e-37f ? 0.0f : t.p * log(t.p / m);  // beta p could be 0 for a smaller p
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
