// Products of fp32 rows with a few vectors for one instruction set. No include guard: attention_decode/cpu.cpp includes
// this file once per set. FASTGPT_SET is its name, FASTGPT_TARGET its attribute and FASTGPT_LANES the number of floats
// in a vector. A row has `width` columns, a multiple of kLanes.
struct FASTGPT_SET {
  static constexpr int L = FASTGPT_LANES, kVectors = kLanes / L;
  typedef float Vector __attribute__((vector_size(4 * L)));

  FASTGPT_TARGET FASTGPT_INLINE static Vector load(const float* p) {
    Vector v;
    memcpy(&v, p, sizeof v);
    return v;
  }

  // z[n] = x . rows[n] for n rows, `step` apart. Each sum has kLanes parts, so its order is the same for every set.
  FASTGPT_TARGET FASTGPT_NOINLINE static void products(const float* x, const float* rows, int64_t step, int64_t n,
                                                       int64_t width, float* z) {
    for (int64_t r = 0; r < n; ++r) {
      const float* row = rows + r * step;
      __builtin_prefetch(row + kAhead * step);
      __builtin_prefetch(row + kAhead * step + kLanes);
      __builtin_prefetch(row + kAhead * step + 2 * kLanes);
      __builtin_prefetch(row + kAhead * step + 3 * kLanes);
      Vector sum[kVectors] = {};
      for (int64_t d = 0; d < width; d += kLanes) {
        FASTGPT_UNROLL
        for (int i = 0; i < kVectors; ++i) sum[i] += load(x + d + i * L) * load(row + d + i * L);
      }
      alignas(64) float parts[kLanes];
      memcpy(parts, sum, sizeof parts);
      z[r] = sum_parts(parts);
    }
  }

  // c[d] = shrink c[d] + sum_n p[n] rows[n][d], in blocks of columns that fit the registers.
  FASTGPT_TARGET FASTGPT_NOINLINE static void add(const float* p, const float* rows, int64_t step, int64_t n,
                                                  int64_t width, float shrink, float* c) {
    constexpr int kWide = L == 16 ? 4 : 2;
    int64_t d = 0;
    for (; d + kWide * kLanes <= width; d += kWide * kLanes) add_block<kWide>(p, rows + d, step, n, shrink, c + d);
    for (; d < width; d += kLanes) add_block<1>(p, rows + d, step, n, shrink, c + d);
  }

  // The error of a sum grows with its length, so 16 rows are added first, then these sums.
  template <int N>
  FASTGPT_TARGET FASTGPT_INLINE static void add_block(const float* p, const float* rows, int64_t step, int64_t n,
                                                      float shrink, float* c) {
    constexpr int kSums = N * kVectors;
    Vector sum[kSums];
    FASTGPT_UNROLL
    for (int i = 0; i < kSums; ++i) sum[i] = Vector{};
    for (int64_t first = 0; first < n; first += 16) {
      Vector part[kSums];
      FASTGPT_UNROLL
      for (int i = 0; i < kSums; ++i) part[i] = Vector{};
      for (int64_t r = first; r < min_of(n, first + 16); ++r) {
        const float* row = rows + r * step;
        FASTGPT_UNROLL
        for (int i = 0; i < N; ++i) __builtin_prefetch(row + kAhead * step + i * kLanes);
        FASTGPT_UNROLL
        for (int i = 0; i < kSums; ++i) part[i] += p[r] * load(row + i * L);
      }
      FASTGPT_UNROLL
      for (int i = 0; i < kSums; ++i) sum[i] += part[i];
    }
    FASTGPT_UNROLL
    for (int i = 0; i < kSums; ++i) sum[i] += shrink * load(c + i * L);
    memcpy(c, sum, sizeof sum);
  }
};
#undef FASTGPT_SET
#undef FASTGPT_TARGET
#undef FASTGPT_LANES
