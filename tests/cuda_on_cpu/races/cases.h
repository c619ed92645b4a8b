// For the programs <op>.cpp, which run the kernels of an op on small tensors under the race detector: a line for each
// case, "NAME: clean" or "NAME: " and the error of the launch, which ends the program.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <initializer_list>
#include <type_traits>

#include "core/dtype.h"
#include "core/math.h"

namespace cases {

using fastgpt::bf16;
using fastgpt::DType;
using fastgpt::f16;
using Element = FASTGPT_ELEMENT;  // of tensors, and of the kernels that the program is linked with (races.py)
constexpr DType k16 = std::is_same_v<Element, f16> ? DType::f16 : DType::bf16;
constexpr DType kDtype = std::is_same_v<Element, float> ? DType::f32 : k16;

// Aligned memory, which is not freed: the process ends soon.
template <typename T>
T* room(int64_t n) {
  return static_cast<T*>(std::aligned_alloc(128, (n * sizeof(T) + 127) / 128 * 128));
}

// Values in [-1, 1), the same in every run.
inline float next_value() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
}

inline float* floats(int64_t n) {
  float* x = room<float>(n);
  for (int64_t i = 0; i < n; ++i) x[i] = next_value();
  return x;
}

// `off` elements after an aligned address, so that kernels take their path for unaligned rows.
inline Element* elements(int64_t n, int off = 0) {
  Element* x = room<Element>(n + off) + off;
  for (int64_t i = 0; i < n; ++i) x[i] = fastgpt::from_float<Element>(next_value());
  return x;
}

template <typename T>
T* values(std::initializer_list<T> given) {
  T *x = room<T>(given.size()), *to = x;
  for (const T v : given) *to++ = v;
  return x;
}

template <typename F>
void run(const char* name, F launch) {
  try {
    launch();
    std::printf("%s: clean\n", name);
  } catch (const std::exception& e) {
    std::printf("%s: %s\n", name, e.what());
    std::exit(1);
  }
}

}  // namespace cases
