// Cross-entropy on the CPU; formulas in fastgpt/ops/cross_entropy.py.
//
// A row stays in cache: its maximum, then the sum of exponentials, then (if asked) the gradient, written over the logits
// or elsewhere. So logits are read from memory once and the gradient written once. Padding columns get gradient 0.
#include <cmath>

#include "fastgpt/parallel.h"
#include "simd.h"

namespace fastgpt::cpu {

struct RowStats {
  float max, log_sum;  // log_sum = log(sum exp(z - max)), so lse = max + log_sum without its rounding
  float smooth_sum;    // sum_c w_c (lse - z_c); 0 without smoothing
};

// z of a logit; the cap only where there is one.
template <bool Softcap, class T>
inline float z_of(T logit, float softcap, float inv_softcap) {
  return Softcap ? softcap_f(to_float(logit), softcap, inv_softcap) : to_float(logit);
}

template <bool Softcap, class T>
inline float row_max(const T* logits, const CrossEntropyArgs& a) {
  float top = -INFINITY;  // softcap is monotonic: the largest logit has the largest z
  FASTGPT_MAX(top)
  for (int64_t c = 0; c < a.n_classes; ++c) {
    const float x = to_float(logits[c]);
    top = x > top ? x : top;
  }
  return Softcap ? softcap_f(top, a.softcap, 1.0f / a.softcap) : top;
}

// sum exp(z - top) over the row
template <bool Softcap, class T>
inline double sum_exp(const T* logits, float top, const CrossEntropyArgs& a) {
  const float softcap = a.softcap, inv_softcap = Softcap ? 1.0f / softcap : 0.0f;
  double total = 0.0;
  for (int64_t first = 0; first < a.n_classes; first += kChunk) {
    const int64_t end = min_of(a.n_classes, first + kChunk);
    float part = 0.0f;
    FASTGPT_SUM(part)
    for (int64_t c = first; c < end; ++c) part += exp_f(z_of<Softcap>(logits[c], softcap, inv_softcap) - top);
    total += part;
  }
  return total;
}

// sum_c w_c (top - z_c); classes of weight 0 do not count, even at z = -inf
template <bool Softcap, class T>
inline double sum_gaps(const T* logits, float top, const CrossEntropyArgs& a) {
  const float softcap = a.softcap, inv_softcap = Softcap ? 1.0f / softcap : 0.0f;
  double total = 0.0;
  for (int64_t first = 0; first < a.n_classes; first += kChunk) {
    const int64_t end = min_of(a.n_classes, first + kChunk);
    float part = 0.0f;
    if (a.weight == nullptr) {
      FASTGPT_SUM(part)
      for (int64_t c = first; c < end; ++c) part += top - z_of<Softcap>(logits[c], softcap, inv_softcap);
    } else {
      FASTGPT_SUM(part)
      for (int64_t c = first; c < end; ++c) {
        const float w = a.weight[c], gap = top - z_of<Softcap>(logits[c], softcap, inv_softcap);
        part += w == 0.0f ? 0.0f : w * gap;
      }
    }
    total += part;
  }
  return total;
}

template <bool Softcap, class T>
inline RowStats row_stats(const T* logits, const CrossEntropyArgs& a) {
  RowStats s{row_max<Softcap>(logits, a), 0.0f, 0.0f};
  const double log_sum = std::log(sum_exp<Softcap>(logits, s.max, a));
  s.log_sum = static_cast<float>(log_sum);
  if (a.label_smoothing > 0.0f) {
    const double weight_sum = a.weight == nullptr ? static_cast<double>(a.n_classes) : *a.weight_sum;
    s.smooth_sum = static_cast<float>(sum_gaps<Softcap>(logits, s.max, a) + weight_sum * log_sum);
  }
  return s;
}

// dlogits = scale dl/dz dz/dlogit over the row; p_c = exp(z_c - max - log_sum).
template <bool Softcap, bool Weighted, class T>
inline void row_grad(const T* logits, T* dlogits, const CrossEntropyGrad& g, float max, float log_sum, int64_t y,
                     const CrossEntropyArgs& a) {
  const float softcap = a.softcap, inv_softcap = Softcap ? 1.0f / softcap : 0.0f;
  const float inv_sum = exp_f(-log_sum);
  const float z_y = z_of<Softcap>(logits[y], softcap, inv_softcap);  // before it is overwritten
  const float* weight = a.weight;
  FASTGPT_SIMD
  for (int64_t c = 0; c < a.n_classes; ++c) {
    const float z = z_of<Softcap>(logits[c], softcap, inv_softcap);
    const float d = cross_entropy_dz(g, exp_f(z - max) * inv_sum, Weighted ? weight[c] : 1.0f);
    dlogits[c] = from_float<T>(Softcap ? d * softcap_slope(z, inv_softcap) : d);
  }
  const float p_y = exp_f(z_y - max) * inv_sum;
  const float d_y = cross_entropy_dz(g, p_y, Weighted ? weight[y] : 1.0f) - g.hit;
  dlogits[y] = from_float<T>(Softcap ? d_y * softcap_slope(z_y, inv_softcap) : d_y);
  for (int64_t c = a.n_classes; c < a.n_cols; ++c) dlogits[c] = from_float<T>(0.0f);
}

template <bool Softcap, class T>
inline void store_grad(const T* logits, T* dlogits, float max, float log_sum, float lse, int64_t n, int64_t y,
                       const CrossEntropyArgs& a) {
  const float w_y = a.weight == nullptr ? 1.0f : a.weight[y];
  const float weight_sum = a.weight == nullptr ? static_cast<float>(a.n_classes) : *a.weight_sum;
  const CrossEntropyGrad g = cross_entropy_grad_row(a.scale[n * a.scale_step], w_y, weight_sum, lse, a.label_smoothing,
                                                    a.z_loss, static_cast<float>(a.n_classes));
  if (a.weight != nullptr && a.label_smoothing > 0.0f) {
    row_grad<Softcap, true>(logits, dlogits, g, max, log_sum, y, a);
  } else {
    row_grad<Softcap, false>(logits, dlogits, g, max, log_sum, y, a);
  }
}

// Row without a target to learn from: ignored, or out of range. Gradient 0.
template <class T>
inline void store_zeros(T* dlogits, int64_t n_cols) {
  for (int64_t c = 0; c < n_cols; ++c) dlogits[c] = from_float<T>(0.0f);
}

enum class Pass { fwd, bwd, fwd_bwd };

// One row of one pass. bwd has lse, but sums again: lse's own rounding would shift every p of the row.
template <Pass P, bool Softcap, class T>
inline void loss_row(const CrossEntropyArgs& a, int64_t n) {
  const T* logits = static_cast<const T*>(a.logits) + n * a.logits_row;
  T* dlogits = P == Pass::fwd ? nullptr : static_cast<T*>(a.dlogits) + n * a.dlogits_row;
  const int64_t y = a.target[n];
  const bool ignored = y == a.ignore_index, inside = y >= 0 && y < a.n_classes;
  if (P != Pass::fwd && (ignored || !inside)) store_zeros(dlogits, a.n_cols);
  if (P != Pass::bwd && (ignored || !inside)) a.loss[n] = ignored ? 0.0f : NAN;
  if (ignored || !inside) {
    if (P == Pass::fwd) a.lse[n] = 0.0f;  // not read by bwd
    return;
  }
  if constexpr (P == Pass::bwd) {
    const float max = row_max<Softcap>(logits, a);
    const float log_sum = static_cast<float>(std::log(sum_exp<Softcap>(logits, max, a)));
    store_grad<Softcap>(logits, dlogits, max, log_sum, a.lse[n], n, y, a);
    return;
  }
  const RowStats s = row_stats<Softcap>(logits, a);
  const float gap = (s.max - z_of<Softcap>(logits[y], a.softcap, Softcap ? 1.0f / a.softcap : 0.0f)) + s.log_sum;
  const float lse = s.max + s.log_sum, w_y = a.weight == nullptr ? 1.0f : a.weight[y];
  a.loss[n] = cross_entropy_loss(gap, s.smooth_sum, w_y, lse, a.label_smoothing, a.z_loss,
                                 static_cast<float>(a.n_classes));
  if constexpr (P == Pass::fwd) a.lse[n] = lse;
  if constexpr (P == Pass::fwd_bwd) store_grad<Softcap>(logits, dlogits, s.max, s.log_sum, lse, n, y, a);
}

template <Pass P>
inline void loss_rows(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto tag) {
    for (int64_t n = begin; n < end; ++n) {
      if (a.softcap > 0.0f) {
        loss_row<P, true, decltype(tag)>(a, n);
      } else {
        loss_row<P, false, decltype(tag)>(a, n);
      }
    }
  });
}

FASTGPT_CLONES static void fwd_rows(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  loss_rows<Pass::fwd>(a, begin, end);
}

FASTGPT_CLONES static void bwd_rows(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  loss_rows<Pass::bwd>(a, begin, end);
}

FASTGPT_CLONES static void fwd_bwd_rows(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  loss_rows<Pass::fwd_bwd>(a, begin, end);
}

FASTGPT_CLONES static void scale_some_rows(const ScaleRowsArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t n = begin; n < end; ++n) {
      const float scale = a.scale[n * a.scale_step];
      if (scale == 1.0f) continue;
      T* x = static_cast<T*>(a.x) + n * a.x_row;
      FASTGPT_SIMD
      for (int64_t c = 0; c < a.n_cols; ++c) x[c] = from_float<T>(to_float(x[c]) * scale);
    }
  });
}

// ---- launchers ----

void cross_entropy_fwd(const CrossEntropyArgs& a) {
  parallel_for(a.n_rows, row_grain(a.n_cols), [&](int64_t begin, int64_t end) { fwd_rows(a, begin, end); });
}

void cross_entropy_bwd(const CrossEntropyArgs& a) {
  parallel_for(a.n_rows, row_grain(a.n_cols), [&](int64_t begin, int64_t end) { bwd_rows(a, begin, end); });
}

void cross_entropy_fwd_bwd(const CrossEntropyArgs& a) {
  parallel_for(a.n_rows, row_grain(a.n_cols), [&](int64_t begin, int64_t end) { fwd_bwd_rows(a, begin, end); });
}

void scale_rows(const ScaleRowsArgs& a) {
  parallel_for(a.n_rows, row_grain(a.n_cols), [&](int64_t begin, int64_t end) { scale_some_rows(a, begin, end); });
}

}  // namespace fastgpt::cpu
