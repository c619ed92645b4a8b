// Vector code for the CPU kernels without -march=native and without -ffast-math.
//
// FASTGPT_CLONES: compile the function for AVX-512, AVX2 and the baseline; the library picks a copy when it loads.
// `flatten` inlines the templates and formulas that it calls into each copy. FASTGPT_SUM, FASTGPT_MAX: the loop may
// reduce in several accumulators; no other reordering is allowed. The number of lanes depends on the CPU, never on the
// number of threads.
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/math.h"
#include "core/with_type.h"

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTGPT_CLONES __attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__GNUC__)
#define FASTGPT_CLONES __attribute__((flatten))
#else
#define FASTGPT_CLONES
#endif

// For code whose block sizes depend on the number of registers: the kernel is compiled once per level, and level()
// picks one. `flatten` is as above. Functions that use explicit vector types must carry the attribute of the level
// themselves, since the compiler splits vectors for the target of the function before it inlines.
#if defined(__GNUC__)
#define FASTGPT_FLAT __attribute__((flatten))
#define FASTGPT_INLINE __attribute__((always_inline)) inline
#define FASTGPT_NOINLINE __attribute__((noinline))
#define FASTGPT_UNROLL FASTGPT_PRAGMA(GCC unroll 32)
#else
#define FASTGPT_FLAT
#define FASTGPT_INLINE inline
#define FASTGPT_NOINLINE
#define FASTGPT_UNROLL
#endif
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTGPT_LEVELS
#define FASTGPT_V4 __attribute__((target("arch=x86-64-v4")))
#define FASTGPT_V3 __attribute__((target("arch=x86-64-v3")))
#endif

#define FASTGPT_PRAGMA(x) _Pragma(#x)
#define FASTGPT_SIMD FASTGPT_PRAGMA(omp simd)
#define FASTGPT_SUM(...) FASTGPT_PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#define FASTGPT_MAX(name) FASTGPT_PRAGMA(omp simd reduction(max : name))

namespace fastgpt::cpu {

constexpr int64_t kChunk = 1024;  // floats that a pass keeps in L1; the sums of chunks are added in double
constexpr int64_t kLanes = 16;    // floats in the widest vector

#if defined(FASTGPT_LEVELS)
#if !defined(FASTGPT_HIGHEST_LEVEL)
#define FASTGPT_HIGHEST_LEVEL 4  // tests set lower ones
#endif
inline int level() {
  static const int found = __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 0;
  return found < FASTGPT_HIGHEST_LEVEL ? found : FASTGPT_HIGHEST_LEVEL;
}
#endif

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Minimum number of rows in a task: fewer would cost more to schedule than to compute.
inline int64_t row_grain(int64_t n_cols) { return max_of(1, 32768 / max_of(1, n_cols)); }

// Calls fn(slot, column) for each of the whole vectors in a buffer that hold the columns [0, n), n >= kLanes; slots are
// kLanes apart. The last vector holds the last kLanes columns, some of them a second time: no column is left for slow
// scalar code, and every later load of a vector reads exactly one earlier store (with two it would stall).
template <class F>
inline void for_vectors(int64_t n, const F& fn) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) fn(c, c);
  if (c < n) fn(c, n - kLanes);
}

// The slot of column c of n in such a buffer.
inline int64_t slot_of(int64_t c, int64_t n) {
  const int64_t whole = n / kLanes * kLanes;
  return c < whole ? c : c + whole + kLanes - n;
}

// Returns the combination of kLanes values, which it overwrites. Written by hand: the reduction of a compiler adds the
// lanes one after another, which takes half the time of a short row. Arrays, not vector types: gcc compares vectors that
// are wider than a register one lane at a time.
template <class Combine>
inline float combine_lanes(float* lanes, const Combine& combine) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    FASTGPT_SIMD
    for (int64_t k = 0; k < half; ++k) lanes[k] = combine(lanes[k], lanes[k + half]);
  }
  return lanes[0];
}

// Returns the sum of n columns in such a buffer.
inline float sum_of(const float* x, int64_t n) {
  float lanes[kLanes] = {};
  for_vectors(n, [&](int64_t slot, int64_t column) {
    FASTGPT_SIMD
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += k >= slot - column ? x[slot + k] : 0.0f;  // each column once
  });
  return combine_lanes(lanes, [](float a, float b) { return a + b; });
}

// Returns the maximum of n columns in such a buffer. Ignores NaN unless it is in the first vector.
inline float max_of(const float* x, int64_t n) {
  float lanes[kLanes];
  memcpy(lanes, x, sizeof lanes);
  for_vectors(n, [&](int64_t slot, int64_t) {
    FASTGPT_SIMD
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] = x[slot + k] > lanes[k] ? x[slot + k] : lanes[k];
  });
  return combine_lanes(lanes, [](float a, float b) { return b > a ? b : a; });
}

template <class T>
inline void to_floats(const T* in, float* out, int64_t n) {
  FASTGPT_SIMD
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
}

template <class T>
inline void from_floats(const float* in, T* out, int64_t n) {
  FASTGPT_SIMD
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(in[i]);
}

}  // namespace fastgpt::cpu
