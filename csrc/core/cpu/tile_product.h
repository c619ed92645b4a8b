// Products of fp32 tiles for one instruction set. No include guard: attention/cpu.h includes this file once per set.
// FASTGPT_SET is its name, FASTGPT_TARGET its attribute, FASTGPT_LANES the number of floats in a vector and
// FASTGPT_ROWS the number of rows in a block: rows x 2 vectors are summed in registers, from vectors of b and single
// values of a.
struct FASTGPT_SET {
  static constexpr int L = FASTGPT_LANES, R = FASTGPT_ROWS;
  static_assert(kGroup % R == 0 && kLanes % L == 0, "a block lies within a group");
  typedef float Vector __attribute__((vector_size(4 * L)));

  FASTGPT_TARGET FASTGPT_INLINE static Vector load(const float* p) {
    Vector v;
    memcpy(&v, p, sizeof v);
    return v;
  }

  // c[m][n] = factor sum_k a(m, k) b[k][n] for R rows and N vectors; += if Add. a(m, k) is at a[m * a_step + k], or at
  // a[k * a_step + m] if Across.
  template <int N, bool Across, bool Add>
  FASTGPT_TARGET FASTGPT_INLINE static void block(const float* a, int64_t a_step, const float* b, int64_t b_step,
                                                  int64_t depth, float factor, float* c, int64_t c_step) {
    Vector sum[R * N];
    FASTGPT_UNROLL
    for (int i = 0; i < R * N; ++i) sum[i] = Vector{};
    for (int64_t k = 0; k < depth; ++k) {
      Vector row[N];
      FASTGPT_UNROLL
      for (int n = 0; n < N; ++n) row[n] = load(b + k * b_step + n * L);
      FASTGPT_UNROLL
      for (int m = 0; m < R; ++m) {
        const float x = Across ? a[k * a_step + m] : a[m * a_step + k];
        FASTGPT_UNROLL
        for (int n = 0; n < N; ++n) sum[m * N + n] += x * row[n];
      }
    }
    FASTGPT_UNROLL
    for (int m = 0; m < R; ++m) {
      FASTGPT_UNROLL
      for (int n = 0; n < N; ++n) {
        float* to = c + m * c_step + n * L;
        const Vector value = Add ? load(to) + factor * sum[m * N + n] : factor * sum[m * N + n];
        memcpy(to, &value, sizeof value);
      }
    }
  }

  // c (64 keys, 64 queries) = factor keys queries, in the columns wide_of(spans[key group]). keys is (64, step), of
  // which the first `depth` columns are used; queries is (depth, 64). The depth is cut into pieces of 64, which stay in
  // the cache and reduce the error of the sums.
  FASTGPT_TARGET FASTGPT_NOINLINE static void scores(const float* keys, int64_t step, const float* queries,
                                                     int64_t depth, float factor, const Span* spans, float* c) {
    score_piece<false>(keys, step, queries, min_of(depth, kTile), factor, spans, c);
    for (int64_t d = kTile; d < depth; d += kTile) {
      score_piece<true>(keys + d, step, queries + d * kTile, min_of(depth - d, kTile), factor, spans, c);
    }
  }

  template <bool Add>
  FASTGPT_TARGET FASTGPT_INLINE static void score_piece(const float* keys, int64_t step, const float* queries,
                                                        int64_t depth, float factor, const Span* spans, float* c) {
    for (int64_t m = 0; m < kTile; m += R) {
      const Span s = wide_of(spans[m / kGroup]);
      for (int64_t n = s.begin; n < s.end; n += 2 * L) {
        const float *a = keys + m * step, *b = queries + n;
        float* to = c + m * kTile + n;
        if (n + 2 * L <= s.end) {
          block<2, false, Add>(a, step, b, kTile, depth, factor, to, kTile);
        } else {
          block<1, false, Add>(a, step, b, kTile, depth, factor, to, kTile);
        }
      }
    }
  }

  // c (64, width) += a b over the k in spans[group of the row of c]. a is (64, 64), with one row per row of c, or one
  // column if Across; b is (64, width).
  template <bool Across>
  FASTGPT_TARGET FASTGPT_NOINLINE static void add(const float* a, const float* b, int64_t width, const Span* spans,
                                                  float* c) {
    for (int64_t n = 0; n < width; n += 2 * L) {
      for (int64_t m = 0; m < kTile; m += R) {
        const Span s = spans[m / kGroup];
        if (s.begin >= s.end) continue;
        const float* first = a + (Across ? s.begin * kTile + m : m * kTile + s.begin);
        const float* rows = b + s.begin * width + n;
        float* to = c + m * width + n;
        if (n + 2 * L <= width) {
          block<2, Across, true>(first, kTile, rows, width, s.end - s.begin, 1.0f, to, width);
        } else {
          block<1, Across, true>(first, kTile, rows, width, s.end - s.begin, 1.0f, to, width);
        }
      }
    }
  }
};
#undef FASTGPT_SET
#undef FASTGPT_TARGET
#undef FASTGPT_LANES
#undef FASTGPT_ROWS
