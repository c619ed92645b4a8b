// Linear layer for few rows on the CPU; formulas in fastgpt/ops/linear.py.
//
// At one row the time is that of reading the weight once. With more rows, 4 weight rows and up to 6 input rows form a
// tile whose sums stay in registers, over blocks of columns that stay in the first-level cache. The weight keeps its
// layout, so PyTorch's product can read it, too.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")  // no formula here needs a product to be rounded
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own AVX-512 header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <memory>

#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"
#include "linear/op.h"
#if defined(FASTGPT_LEVELS)
#include <immintrin.h>
#endif

namespace fastgpt::cpu {

constexpr int64_t kWeightRows = 4;   // of a tile
constexpr int64_t kInputRows = 64;   // per pass over the weight
constexpr int64_t kDepth = 384;      // columns of a block
constexpr int64_t kTaskBytes = 65536;  // of weights: fewer would cost more to schedule than to read

inline float to_float(int8_t x) { return static_cast<float>(x); }
using fastgpt::to_float;

// y[n][f] = sum, scaled, with the bias added.
FASTGPT_INLINE void finish(const LinearArgs& a, int64_t n, int64_t f, float sum) {
  if (a.scale != nullptr) sum *= a.scale[f];
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (a.bias != nullptr) sum += to_float(static_cast<const T*>(a.bias)[f]);
    static_cast<T*>(a.y)[n * a.n_out + f] = from_float<T>(sum);
  });
}

// Cache lines that a tile prefetches: one of each row in every `every` steps, after `wait` steps.
struct Ahead {
  const char* at;
  int64_t row, step;  // bytes between the rows, and between the lines of a row
  int64_t every, wait;
};

typedef float Four __attribute__((vector_size(16)));
typedef int32_t Picks __attribute__((vector_size(16), unused));
#if defined(__clang__)
#define FASTGPT_MIX(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define FASTGPT_MIX(a, b, i, j, k, l) __builtin_shuffle(a, b, Picks{i, j, k, l})
#endif

// Loads a vector of weights, one at a time.
template <class Vector, class W>
FASTGPT_INLINE Vector widen_each(const W* p) {
  Vector v;
  for (size_t i = 0; i < sizeof v / sizeof(float); ++i) v[i] = to_float(p[i]);
  return v;
}

#if defined(FASTGPT_LEVELS)  // by intrinsics: GCC 12 builds conversions of vectors from single elements
#define FASTGPT_LOAD(type, p) _mm##type(reinterpret_cast<const __m128i*>(p))
#define FASTGPT_SET SetV4
#define FASTGPT_TARGET FASTGPT_V4
#define FASTGPT_LANES 16
#define FASTGPT_TILE 6
#define FASTGPT_BF16(p) \
  reinterpret_cast<Vector>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))
#define FASTGPT_F16(p) reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))))
#define FASTGPT_I8(p) reinterpret_cast<Vector>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))))
#include "linear/tile.h"
#define FASTGPT_SET SetV3
#define FASTGPT_TARGET FASTGPT_V3
#define FASTGPT_LANES 8
#define FASTGPT_TILE 3
#define FASTGPT_BF16(p) reinterpret_cast<Vector>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16))
#define FASTGPT_F16(p) reinterpret_cast<Vector>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))
#define FASTGPT_I8(p) reinterpret_cast<Vector>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))))
#include "linear/tile.h"
#undef FASTGPT_LOAD
#endif
#define FASTGPT_SET SetBase
#define FASTGPT_TARGET
#define FASTGPT_LANES 4
#if defined(__aarch64__)
#define FASTGPT_TILE 6  // 32 registers
#else
#define FASTGPT_TILE 3
#endif
#define FASTGPT_BF16(p) widen_each<Vector>(p)
#define FASTGPT_F16(p) widen_each<Vector>(p)
#define FASTGPT_I8(p) widen_each<Vector>(p)
#include "linear/tile.h"

template <class W>
inline void rows_of(const LinearArgs& a, const float* x, int64_t first, int64_t n, int64_t begin, int64_t end) {
#if defined(FASTGPT_LEVELS)
  if (level() == 4) return SetV4::rows<W>(a, x, first, n, begin, end);
  if (level() == 3) return SetV3::rows<W>(a, x, first, n, begin, end);
#endif
  SetBase::rows<W>(a, x, first, n, begin, end);
}

template <class F>
inline void with_weight(WeightType type, const F& fn) {
  switch (type) {
    case WeightType::f32: return fn(float{});
    case WeightType::bf16: return fn(bf16{});
    case WeightType::f16: return fn(f16{});
    case WeightType::i8: return fn(int8_t{});
  }
}

// Packs n rows of x from `first` on in blocks of columns, each (n, depth), in fp32: the rows of a block are dense in the
// cache, however far apart they are in x.
FASTGPT_CLONES static void pack(const LinearArgs& a, int64_t first, int64_t n, float* packed) {
  with_type(a.dtype, [&](auto tag) {
    for (int64_t i = 0; i < n; ++i) {
      const auto* row = static_cast<const decltype(tag)*>(a.x) + (first + i) * a.x_row;
      for (int64_t k = 0; k < a.n_in; k += kDepth) {
        const int64_t depth = min_of(kDepth, a.n_in - k);
        to_floats(row + k, packed + k * n + i * depth, depth);
      }
    }
  });
}

// ---- launcher ----

void linear_fwd(const LinearArgs& a, Stream) {
  std::unique_ptr<float[]> packed;
  const bool as_is = a.dtype == DType::f32 && a.n_rows == 1;
  if (!as_is) packed.reset(new float[min_of(kInputRows, a.n_rows) * a.n_in]);
  with_weight(a.weight_type, [&](auto tag) {
    using W = decltype(tag);
    const int64_t tile_bytes = kWeightRows * a.n_in * static_cast<int64_t>(sizeof(W));
    for (int64_t first = 0; first < a.n_rows; first += kInputRows) {
      const int64_t n = min_of(kInputRows, a.n_rows - first);
      if (!as_is) pack(a, first, n, packed.get());
      const float* x = as_is ? static_cast<const float*>(a.x) : packed.get();
      parallel_for(ceil_div(a.n_out, kWeightRows), ceil_div(kTaskBytes, tile_bytes), [&](int64_t begin, int64_t end) {
        rows_of<W>(a, x, first, n, begin * kWeightRows, min_of(end * kWeightRows, a.n_out));
      });
    }
  });
}

}  // namespace fastgpt::cpu
