// Rotary embedding on the CPU; formulas in fastgpt/ops/rope.py.
//
// A task has some (batch, time) rows: it looks up their cos and sin once for all heads of q and k. Each element is read
// and written once; in place, only the columns that rotate are accessed.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")  // no formula here needs a product to be rounded
#endif
#include <cmath>
#include <type_traits>
#include <vector>

#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"
#include "rope/op.h"

namespace fastgpt::cpu {

// Rotates the pairs of one head, (i, i + half) or (2i, 2i + 1); y may be x.
template <bool Interleaved, class T>
inline void turn_head(const T* x, T* y, const float* cos, const float* sin, float sign, int64_t half) {
  FASTGPT_SIMD
  for (int64_t i = 0; i < half; ++i) {
    const int64_t at = Interleaved ? 2 * i : i, beside = Interleaved ? 2 * i + 1 : half + i;
    const float a = to_float(x[at]), b = to_float(x[beside]);
    const float c = cos[i], s = sign * sin[i];
    y[at] = from_float<T>(a * c - b * s);
    y[beside] = from_float<T>(b * c + a * s);
  }
}

template <bool Interleaved, class T>
inline void turn_part(const RopeArgs& a, const RopePart& p, const float* cos, const float* sin, int64_t b, int64_t t) {
  for (int64_t h = 0; h < p.n_heads; ++h) {
    const T* x = static_cast<const T*>(p.x) + b * p.x_batch + t * p.x_time + h * p.x_head;
    T* y = static_cast<T*>(p.y) + b * p.y_batch + t * p.y_time + h * p.y_head;
    const int64_t turned = h < p.n_turned ? 2 * a.half : 0;
    if (turned > 0) turn_head<Interleaved>(x, y, cos, sin, a.sign, a.half);
    if (y != x) memcpy(y + turned, x + turned, (a.n_cols - turned) * sizeof(T));
  }
}

FASTGPT_CLONES static void turn_rows(const RopeArgs& a, const float* unknown, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / a.n_time, t = n % a.n_time;
      const int64_t at = a.positions == nullptr ? t : a.positions[b * a.positions_batch + t];
      const bool known = at >= 0 && at < a.n_positions;
      const float* cos = known ? a.cos + at * a.half : unknown;
      const float* sin = known ? a.sin + at * a.half : unknown;
      for (const RopePart& p : a.parts) {
        if (a.interleaved) {
          turn_part<true, T>(a, p, cos, sin, b, t);
        } else {
          turn_part<false, T>(a, p, cos, sin, b, t);
        }
      }
    }
  });
}

// ---- launchers ----

void rope(const RopeArgs& a, Stream) {
  const std::vector<float> unknown(a.half, NAN);  // cos and sin of a position outside the tables
  const int64_t width = (a.parts[0].n_heads + a.parts[1].n_heads) * a.n_cols;
  parallel_for(a.n_batch * a.n_time, row_grain(width),
               [&](int64_t begin, int64_t end) { turn_rows(a, unknown.data(), begin, end); });
}

}  // namespace fastgpt::cpu
