// Converts a DType, known only at run time, into the element type that a kernel template needs.
#pragma once
#include "core/dtype.h"
#include "core/math.h"

namespace fastgpt {

// Calls fn(T{}) for the element type T of `dtype`.
template <class F>
inline void with_type(DType dtype, const F& fn) {
  switch (dtype) {
    case DType::f32: return fn(float{});
    case DType::bf16: return fn(bf16{});
    case DType::f16: return fn(f16{});
    case DType::i16: return;  // remainders of masters, which no kernel takes as elements
  }
}

// Calls fn(T{}, W{}) for the types of two tensors, the second of which has the first one's dtype or fp32.
template <class F>
inline void with_types(DType dtype, DType second, const F& fn) {
  with_type(dtype, [&](auto t) { second == DType::f32 ? fn(t, float{}) : fn(t, t); });
}

}  // namespace fastgpt
