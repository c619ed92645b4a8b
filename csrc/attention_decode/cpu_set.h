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

  // z[n] = x . rows[n]. Each sum has kLanes parts, so its order is the same for every set.
  FASTGPT_TARGET FASTGPT_NOINLINE static void products(const float* x, const Rows& rows, int64_t width, float* z) {
    const int64_t step = rows.step;
    for (const Run* run = rows.runs; run < rows.last; ++run) {
      const float *row = rows.x + run->row, *ahead = rows.x + run->ahead;
      for (const float* end = z + run->n; z < end; ++z, row += step, ahead += step) {
        __builtin_prefetch(ahead);
        __builtin_prefetch(ahead + kLanes);
        __builtin_prefetch(ahead + 2 * kLanes);
        __builtin_prefetch(ahead + 3 * kLanes);
        Vector sum[kVectors] = {};
        for (int64_t d = 0; d < width; d += kLanes) {
          FASTGPT_UNROLL
          for (int i = 0; i < kVectors; ++i) sum[i] += load(x + d + i * L) * load(row + d + i * L);
        }
        alignas(64) float parts[kLanes];
        memcpy(parts, sum, sizeof parts);
        *z = sum_parts(parts);
      }
    }
  }

  // c[d] = shrink c[d] + sum_n p[n] rows[n][d], in blocks of columns that fit the registers.
  FASTGPT_TARGET FASTGPT_NOINLINE static void add(const float* p, const Rows& rows, int64_t width, float shrink,
                                                  float* c) {
    constexpr int kWide = L == 16 ? 4 : 2;
    int64_t d = 0;
    for (; d + kWide * kLanes <= width; d += kWide * kLanes) add_block<kWide>(p, rows, d, shrink, c + d);
    for (; d < width; d += kLanes) add_block<1>(p, rows, d, shrink, c + d);
  }

  // The error of a sum grows with its length, so kGroup rows are added first, then these sums.
  template <int N>
  FASTGPT_TARGET FASTGPT_INLINE static void add_block(const float* p, const Rows& rows, int64_t column, float shrink,
                                                      float* c) {
    constexpr int kSums = N * kVectors;
    const int64_t step = rows.step;
    Vector sum[kSums], part[kSums];
    FASTGPT_UNROLL
    for (int i = 0; i < kSums; ++i) sum[i] = part[i] = Vector{};
    for (const Run* run = rows.runs; run < rows.last; ++run) {
      const float *row = rows.x + run->row + column, *ahead = rows.x + run->ahead + column;
      for (const float* end = p + run->n; p < end; ++p, row += step, ahead += step) {
        FASTGPT_UNROLL
        for (int i = 0; i < N; ++i) __builtin_prefetch(ahead + i * kLanes);
        FASTGPT_UNROLL
        for (int i = 0; i < kSums; ++i) part[i] += *p * load(row + i * L);
      }
      if (!run->ends_group) continue;
      FASTGPT_UNROLL
      for (int i = 0; i < kSums; ++i) sum[i] += part[i], part[i] = Vector{};
    }
    FASTGPT_UNROLL
    for (int i = 0; i < kSums; ++i) sum[i] += shrink * load(c + i * L);
    memcpy(c, sum, sizeof sum);
  }
};
#undef FASTGPT_SET
#undef FASTGPT_TARGET
#undef FASTGPT_LANES
