// Cross-entropy on the CPU; formulas in fastgpt/ops/cross_entropy.py.
//
// A row is processed in chunks of 1024 columns: the largest z so far and the sum of exponentials shifted by it
// (Milakov, Gimelshein 2018, arXiv:1805.02867), then, if needed, the gradient while the row is still in cache, in place
// of the logits or elsewhere. Logits are read from memory once and the gradient is written once. Padding columns get
// gradient 0.
//
// fwd_bwd computes each exponential once, except with softcap: those of a row are kept, shifted by the largest z that
// was known then, and rescaled for the gradient. In fp32 they lie in place of the gradient.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")  // no formula here needs a product to be rounded
#endif
#include <cmath>
#include <memory>
#include <type_traits>

#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"
#include "cross_entropy/op.h"

namespace fastgpt::cpu {

// Statistics for the loss and gradient of a row, collected chunk by chunk and shifted by the largest z so far.
struct RowStats {
  float max = -INFINITY;
  double sum_exp = 0.0;   // sum exp(z - max)
  double sum_gap = 0.0;   // sum_c w_c (max - z_c), with label smoothing only
  double sum_weight = 0.0;
};

template <bool Softcap, class T>
inline float z_of(T logit, float softcap, float inv_softcap) {
  return Softcap ? softcap_f(to_float(logit), softcap, inv_softcap) : to_float(logit);
}

// Returns z of n logits in the layout of for_vectors: the logits themselves where they are that already, else `z`.
// Fewer than a vector are padded to one with -inf.
template <bool Softcap, class T>
inline const float* load_chunk(const T* logits, int64_t n, float softcap, float* z) {
  if constexpr (std::is_same_v<T, float> && !Softcap) {
    if (n % kLanes == 0) return logits;
  }
  const float inv_softcap = Softcap ? 1.0f / softcap : 0.0f;
  if (n < kLanes) {
    for (int64_t c = 0; c < kLanes; ++c) z[c] = c < n ? z_of<Softcap>(logits[c], softcap, inv_softcap) : -INFINITY;
    return z;
  }
  for_vectors(n, [&](int64_t slot, int64_t column) {
    FASTGPT_SIMD
    for (int64_t k = 0; k < kLanes; ++k) z[slot + k] = z_of<Softcap>(logits[column + k], softcap, inv_softcap);
  });
  return z;
}

// Memory of a task.
struct Scratch {
  alignas(64) float z[kChunk];   // of a chunk
  alignas(64) float e[kChunk];   // exp(z - max) of a chunk
  std::unique_ptr<float[]> row;  // exp(z - tops[i]) of every chunk i except the last; fp32 needs none
  std::unique_ptr<float[]> tops;
};

// Asks for the cache line at an address, which may lie outside any array.
inline void prefetch(uintptr_t address) {
#if defined(__GNUC__)
  __builtin_prefetch(reinterpret_cast<const void*>(address));
#endif
}

// Stores exp(z - max) of n columns to e in the layout of for_vectors. The next chunk's logits, whether there is one or
// not, come into the cache meanwhile.
template <class T>
inline void exp_chunk(const float* z, float* e, float max, int64_t n, const T* logits) {
  const uintptr_t next = reinterpret_cast<uintptr_t>(logits) + kChunk * sizeof(T);
  for_vectors(max_of(n, kLanes), [&](int64_t slot, int64_t) {
    prefetch(next + slot * sizeof(T));
    FASTGPT_SIMD
    for (int64_t k = slot; k < slot + kLanes; ++k) e[k] = exp_low(z[k] - max);
  });
}

// Raises the largest z so far to that of a chunk.
inline void raise_max(RowStats& s, float top) {
  if (!(top > s.max)) return;
  const float step = top - s.max;  // infinite for the first chunk, when there is nothing to rescale
  if (s.sum_exp != 0.0) s.sum_exp *= exp_low(-step);
  if (s.sum_weight > 0.0) s.sum_gap += s.sum_weight * step;
  s.max = top;
}

// Adds the terms of label smoothing for n columns. weight is 1 if null; classes of weight 0 do not count, even at z =
// -inf.
inline void add_gaps(RowStats& s, const float* z, const float* weight, int64_t n) {
  const float max = s.max;
  float part = 0.0f, weights = 0.0f;
  if (weight == nullptr) {
    FASTGPT_SUM(part)
    for (int64_t c = 0; c < n; ++c) part += max - z[c];
    weights = static_cast<float>(n);
  } else {
    FASTGPT_SUM(part, weights)
    for (int64_t c = 0; c < n; ++c) {
      part += weight[c] == 0.0f ? 0.0f : weight[c] * (max - z[c]);
      weights += weight[c];
    }
  }
  s.sum_gap += part;
  s.sum_weight += weights;
}

// Returns the statistics of a row; a NaN in z makes sum_exp NaN. b.e holds the exponentials of the last chunk afterwards
// (and b.z its z with softcap); kept and b.tops receive those of the others unless kept is null. kept may be the logits.
template <bool Softcap, class T>
inline RowStats row_stats(const T* logits, const CrossEntropyArgs& a, bool smooth, Scratch& b, float* kept) {
  RowStats s;
  for (int64_t first = 0; first < a.n_classes; first += kChunk) {
    const int64_t n = min_of(kChunk, a.n_classes - first), padded = max_of(n, kLanes);
    const float* z = load_chunk<Softcap>(logits + first, n, a.softcap, b.z);
    raise_max(s, max_of(z, padded));
    if (smooth) {
      const int64_t whole = n < kLanes ? n : n / kLanes * kLanes;  // columns that are in order; the rest follows
      const float* weight = a.weight == nullptr ? nullptr : a.weight + first;
      add_gaps(s, z, weight, whole);
      if (whole < n) add_gaps(s, z + slot_of(whole, n), weight == nullptr ? nullptr : weight + whole, n - whole);
    }
    const bool keep = kept != nullptr && first + kChunk < a.n_classes;
    float* e = keep ? kept + first : b.e;
    if (keep) b.tops[first / kChunk] = s.max;
    exp_chunk(z, e, s.max == -INFINITY ? 0.0f : s.max, n, logits + first);
    s.sum_exp += sum_of(e, padded);
  }
  return s;
}

// Stores dlogits of n columns: scale dl/dz dz/dlogit with p_c = e_c * factor, without `hit` of the target. z: with
// softcap only.
template <bool Softcap, bool Weighted, class T>
inline void store_chunk(const float* z, const float* e, const float* weight, T* dlogits, const CrossEntropyGrad& g,
                        float factor, float inv_softcap, int64_t n) {
  const auto store = [&](int64_t slot, int64_t column, int64_t count) {
    FASTGPT_SIMD
    for (int64_t k = 0; k < count; ++k) {
      const float d = cross_entropy_dz(g, e[slot + k] * factor, Weighted ? weight[column + k] : 1.0f);
      dlogits[column + k] = from_float<T>(Softcap ? d * softcap_slope(z[slot + k], inv_softcap) : d);
    }
  };
  if (n < kLanes) return store(0, 0, n);
  for_vectors(n, [&](int64_t slot, int64_t column) { store(slot, column, kLanes); });
}

// Stores the gradient of row n with target y. kept: as row_stats left it, or null. loaded: b is as row_stats left it.
template <bool Softcap, class T>
inline void store_grad(const T* logits, T* dlogits, float max, float sum_exp, int64_t n, int64_t y,
                       const CrossEntropyArgs& a, Scratch& b, const float* kept, bool loaded) {
  const float w_y = a.weight == nullptr ? 1.0f : a.weight[y];
  const float weight_sum = a.weight == nullptr ? static_cast<float>(a.n_classes) : *a.weight_sum;
  const CrossEntropyGrad g = cross_entropy_grad_row(a.scale[n * a.scale_step], w_y, weight_sum, max + std::log(sum_exp),
                                                    a.label_smoothing, a.z_loss, static_cast<float>(a.n_classes));
  const bool weighted = a.weight != nullptr && a.label_smoothing > 0.0f;
  const float inv_sum = 1.0f / sum_exp, inv_softcap = Softcap ? 1.0f / a.softcap : 0.0f;
  const int64_t last = (a.n_classes - 1) / kChunk * kChunk;
  float d_y = 0.0f;
  for (int64_t first = 0; first < a.n_classes; first += kChunk) {
    const int64_t n_chunk = min_of(kChunk, a.n_classes - first);
    const bool from_kept = kept != nullptr && first < last;
    const float* e = from_kept ? kept + first : b.e;
    const float factor = from_kept ? exp_low(b.tops[first / kChunk] - max) * inv_sum : inv_sum;
    if (!from_kept && !(loaded && first == last)) {
      exp_chunk(load_chunk<Softcap>(logits + first, n_chunk, a.softcap, b.z), b.e, max, n_chunk, logits + first);
    }
    if (y >= first && y < first + n_chunk) {
      const int64_t slot = n_chunk < kLanes ? y - first : slot_of(y - first, n_chunk);
      d_y = cross_entropy_dz(g, e[slot] * factor, weighted ? w_y : 1.0f) - g.hit;
      d_y = Softcap ? d_y * softcap_slope(b.z[slot], inv_softcap) : d_y;
    }
    if (weighted) {
      store_chunk<Softcap, true>(b.z, e, a.weight + first, dlogits + first, g, factor, inv_softcap, n_chunk);
    } else {
      store_chunk<Softcap, false>(b.z, e, nullptr, dlogits + first, g, factor, inv_softcap, n_chunk);
    }
  }
  dlogits[y] = from_float<T>(d_y);
  for (int64_t c = a.n_classes; c < a.n_cols; ++c) dlogits[c] = from_float<T>(0.0f);
}

enum class Pass { fwd, bwd, fwd_bwd };

// Handles a row without a valid target: ignored (loss 0), or out of range (loss NaN).
template <Pass P, class T>
inline void empty_row(const CrossEntropyArgs& a, T* dlogits, int64_t n, bool ignored) {
  if (P != Pass::bwd) a.loss[n] = ignored ? 0.0f : NAN;
  if (P == Pass::fwd) a.max[n] = a.sum_exp[n] = 0.0f;  // not read by bwd
  for (int64_t c = 0; P != Pass::fwd && c < a.n_cols; ++c) dlogits[c] = from_float<T>(0.0f);
}

// Returns the memory for the exponentials of a row that fwd_bwd keeps, or null.
template <Pass P, bool Softcap, class T>
inline float* kept_of(T* dlogits, Scratch& b) {
  if constexpr (P != Pass::fwd_bwd || Softcap) {
    return nullptr;
  } else if constexpr (std::is_same_v<T, float>) {
    return dlogits;
  } else {
    return b.row.get();
  }
}

// Processes one row in one pass.
template <Pass P, bool Softcap, class T>
inline void loss_row(const CrossEntropyArgs& a, int64_t n, Scratch& b) {
  const T* logits = static_cast<const T*>(a.logits) + n * a.logits_row;
  T* dlogits = P == Pass::fwd ? nullptr : static_cast<T*>(a.dlogits) + n * a.dlogits_row;
  const int64_t y = a.target[n];
  if (y == a.ignore_index || y < 0 || y >= a.n_classes) return empty_row<P>(a, dlogits, n, y == a.ignore_index);
  if constexpr (P == Pass::bwd) {
    store_grad<Softcap>(logits, dlogits, a.max[n], a.sum_exp[n], n, y, a, b, nullptr, false);
  } else {
    float* kept = kept_of<P, Softcap>(dlogits, b);
    const float z_y = z_of<Softcap>(logits[y], a.softcap, Softcap ? 1.0f / a.softcap : 0.0f);
    const RowStats s = row_stats<Softcap>(logits, a, a.label_smoothing > 0.0f, b, kept);
    const float sum_exp = static_cast<float>(s.sum_exp), log_sum = std::log(sum_exp);
    const float smooth_sum = static_cast<float>(s.sum_gap + s.sum_weight * log_sum);
    const float w_y = a.weight == nullptr ? 1.0f : a.weight[y];
    a.loss[n] = cross_entropy_loss((s.max - z_y) + log_sum, smooth_sum, w_y, s.max + log_sum, a.label_smoothing,
                                   a.z_loss, static_cast<float>(a.n_classes));
    if constexpr (P == Pass::fwd) {
      a.max[n] = s.max, a.sum_exp[n] = sum_exp;
    } else {
      store_grad<Softcap>(logits, dlogits, s.max, sum_exp, n, y, a, b, kept,
                          kept != nullptr || a.n_classes <= kChunk);
    }
  }
}

template <Pass P>
inline void loss_rows(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  Scratch b;
  const bool keeps = P == Pass::fwd_bwd && !(a.softcap > 0.0f) && a.n_classes > kChunk;
  if (keeps) b.tops.reset(new float[a.n_classes / kChunk]);
  if (keeps && a.dtype != DType::f32) b.row.reset(new float[a.n_classes]);
  with_type(a.dtype, [&](auto tag) {
    for (int64_t n = begin; n < end; ++n) {
      if (a.softcap > 0.0f) {
        loss_row<P, true, decltype(tag)>(a, n, b);
      } else {
        loss_row<P, false, decltype(tag)>(a, n, b);
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

void cross_entropy_fwd(const CrossEntropyArgs& a, Stream) {
  parallel_for(a.n_rows, row_grain(a.n_cols), [&](int64_t begin, int64_t end) { fwd_rows(a, begin, end); });
}

void cross_entropy_bwd(const CrossEntropyArgs& a, Stream) {
  parallel_for(a.n_rows, row_grain(a.n_cols), [&](int64_t begin, int64_t end) { bwd_rows(a, begin, end); });
}

void cross_entropy_fwd_bwd(const CrossEntropyArgs& a, Stream) {
  parallel_for(a.n_rows, row_grain(a.n_cols), [&](int64_t begin, int64_t end) { fwd_bwd_rows(a, begin, end); });
}

void scale_rows(const ScaleRowsArgs& a, Stream) {
  parallel_for(a.n_rows, row_grain(a.n_cols), [&](int64_t begin, int64_t end) { scale_some_rows(a, begin, end); });
}

}  // namespace fastgpt::cpu
