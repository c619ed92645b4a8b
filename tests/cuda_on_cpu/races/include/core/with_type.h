// Replaces csrc/core/with_type.h where races are looked for: one type with fp32 parameters, which compiles in a fraction
// of the time. races.py defines FASTGPT_ELEMENT.
#pragma once
#include "core/dtype.h"
#include "core/math.h"

namespace fastgpt {

template <class F>
inline void with_type(DType, const F& fn) {
  fn(FASTGPT_ELEMENT{});
}

template <class F>
inline void with_types(DType, DType, const F& fn) {
  fn(FASTGPT_ELEMENT{}, float{});
}

}  // namespace fastgpt
