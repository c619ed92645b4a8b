// Replaces csrc/core/with_type.h where races are looked for: bf16 with fp32 parameters only, which compiles in a
// fraction of the time. The other types take the same branches.
#pragma once
#include "core/dtype.h"
#include "core/math.h"

namespace fastgpt {

template <class F>
inline void with_type(DType, const F& fn) {
  fn(bf16{});
}

template <class F>
inline void with_types(DType, DType, const F& fn) {
  fn(bf16{}, float{});
}

}  // namespace fastgpt
