// Arguments and launchers of swiglu; formulas in fastgpt/ops/swiglu.py.
#pragma once
#include <type_traits>

#include "core/dtype.h"
#include "core/stream.h"

namespace fastgpt {

enum class Activation : int { silu = 0, gelu = 1, relu2 = 2, gelu_tanh = 3 };

// Calls fn with the activation as a constant.
template <class F>
inline void with_activation(Activation activation, const F& fn) {
  switch (activation) {
    case Activation::silu: return fn(std::integral_constant<Activation, Activation::silu>{});
    case Activation::gelu: return fn(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::relu2: return fn(std::integral_constant<Activation, Activation::relu2>{});
    case Activation::gelu_tanh: return fn(std::integral_constant<Activation, Activation::gelu_tanh>{});
  }
}

// act(gate) * up. If packed, gate and up are the halves of one tensor, so their rows are twice as far apart.
struct SwigluArgs {
  const void* dy;    // (N, C) dtype; bwd only
  const void* gate;  // (N, C) dtype
  const void* up;    // (N, C) dtype
  void* y;           // (N, C) dtype, contiguous; fwd only
  void* dgate;       // (N, C) dtype; bwd only
  void* dup;         // (N, C) dtype; bwd only
  int64_t dy_row, gate_row, up_row, grad_row;
  int64_t n_rows, n_cols;
  Activation activation;
  DType dtype;
};

FASTGPT_ON_EACH_DEVICE(
  void swiglu_fwd(const SwigluArgs& a, Stream stream);
  void swiglu_bwd(const SwigluArgs& a, Stream stream);)

}  // namespace fastgpt
