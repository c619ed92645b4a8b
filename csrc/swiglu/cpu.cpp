// act(gate) * up on the CPU; formulas in fastgpt/ops/swiglu.py and core/math.h.
//
// Forward reads gate and up and writes y once; backward reads dy, gate and up and writes both gradients once.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")  // no formula here needs a product to be rounded
#endif
#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"
#include "swiglu/op.h"

namespace fastgpt::cpu {

template <Activation A>
inline float value_of(float x) {
  return A == Activation::silu    ? silu_f(x)
         : A == Activation::gelu  ? gelu_f(x)
         : A == Activation::relu2 ? relu2_f(x)
                                  : gelu_tanh_f(x);
}

template <Activation A>
inline ValueSlope both_of(float x) {
  return A == Activation::silu    ? silu_both(x)
         : A == Activation::gelu  ? gelu_both(x)
         : A == Activation::relu2 ? relu2_both(x)
                                  : gelu_tanh_both(x);
}

template <Activation A, class T>
inline void fwd_rows_of(const SwigluArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const T* gate = static_cast<const T*>(a.gate) + n * a.gate_row;
    const T* up = static_cast<const T*>(a.up) + n * a.up_row;
    T* y = static_cast<T*>(a.y) + n * a.n_cols;
    FASTGPT_SIMD
    for (int64_t c = 0; c < a.n_cols; ++c) y[c] = from_float<T>(value_of<A>(to_float(gate[c])) * to_float(up[c]));
  }
}

template <Activation A, class T>
inline void bwd_rows_of(const SwigluArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const T* dy = static_cast<const T*>(a.dy) + n * a.dy_row;
    const T* gate = static_cast<const T*>(a.gate) + n * a.gate_row;
    const T* up = static_cast<const T*>(a.up) + n * a.up_row;
    T* dgate = static_cast<T*>(a.dgate) + n * a.grad_row;
    T* dup = static_cast<T*>(a.dup) + n * a.grad_row;
    FASTGPT_SIMD
    for (int64_t c = 0; c < a.n_cols; ++c) {
      const ValueSlope act = both_of<A>(to_float(gate[c]));
      const float g = to_float(dy[c]);
      dgate[c] = from_float<T>(g * to_float(up[c]) * act.slope);
      dup[c] = from_float<T>(g * act.value);
    }
  }
}

FASTGPT_CLONES static void fwd_rows(const SwigluArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto tag) {
    with_activation(a.activation, [&](auto act) { fwd_rows_of<act(), decltype(tag)>(a, begin, end); });
  });
}

FASTGPT_CLONES static void bwd_rows(const SwigluArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto tag) {
    with_activation(a.activation, [&](auto act) { bwd_rows_of<act(), decltype(tag)>(a, begin, end); });
  });
}

// ---- launchers ----

void swiglu_fwd(const SwigluArgs& a, Stream) {
  parallel_for(a.n_rows, row_grain(a.n_cols), [&](int64_t begin, int64_t end) { fwd_rows(a, begin, end); });
}

void swiglu_bwd(const SwigluArgs& a, Stream) {
  parallel_for(a.n_rows, row_grain(a.n_cols), [&](int64_t begin, int64_t end) { bwd_rows(a, begin, end); });
}

}  // namespace fastgpt::cpu
