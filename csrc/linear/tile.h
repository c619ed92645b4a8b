// Products of a few rows with the rows of a weight, for one instruction set. No include guard: linear/cpu.cpp includes
// this file once per set. FASTGPT_SET is its name, FASTGPT_TARGET its attribute, FASTGPT_LANES the number of floats in
// a vector, FASTGPT_TILE the most input rows of a tile, and FASTGPT_BF16(p), FASTGPT_F16(p) and FASTGPT_I8(p) load a
// vector of weights as fp32.
//
// Every output has one vector of sums, over the columns in order, whatever tile computes it: its bits do not depend on
// the number of rows.
struct FASTGPT_SET {
  static constexpr int L = FASTGPT_LANES;
  typedef float Vector __attribute__((vector_size(4 * L)));

  FASTGPT_TARGET FASTGPT_INLINE static Vector load(const float* p) {
    Vector v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  FASTGPT_TARGET FASTGPT_INLINE static Vector load(const bf16* p) { return FASTGPT_BF16(p); }
  FASTGPT_TARGET FASTGPT_INLINE static Vector load(const f16* p) { return FASTGPT_F16(p); }
  FASTGPT_TARGET FASTGPT_INLINE static Vector load(const int8_t* p) { return FASTGPT_I8(p); }

  template <int R, int N, class W>
  FASTGPT_TARGET FASTGPT_INLINE static void step(const W* w, int64_t w_row, const float* x, int64_t x_row,
                                                 Vector* sum) {
    Vector a[R];
    FASTGPT_UNROLL
    for (int r = 0; r < R; ++r) a[r] = load(w + r * w_row);
    FASTGPT_UNROLL
    for (int n = 0; n < N; ++n) {
      const Vector b = load(x + n * x_row);
      FASTGPT_UNROLL
      for (int r = 0; r < R; ++r) sum[n * R + r] += a[r] * b;
    }
  }

  // sums[n][r] += the product of input row n and weight row r over n_cols columns, a multiple of L.
  template <int R, int N, class W>
  FASTGPT_TARGET FASTGPT_INLINE static void tile(const W* w, int64_t w_row, const float* x, int64_t x_row,
                                                 int64_t n_cols, Ahead ahead, Vector* sums) {
    constexpr int kLine = 64 / sizeof(W);
    Vector sum[R * N];
    FASTGPT_UNROLL
    for (int i = 0; i < R * N; ++i) sum[i] = sums[i];
    int64_t k = 0;
    for (; k + kLine <= n_cols; k += kLine) {
      if (ahead.wait == 0) {
        FASTGPT_UNROLL
        for (int r = 0; r < R; ++r) __builtin_prefetch(ahead.at + r * ahead.row);
        ahead.at += ahead.step, ahead.wait = ahead.every;
      }
      --ahead.wait;
      FASTGPT_UNROLL
      for (int i = 0; i < kLine; i += L) step<R, N>(w + k + i, w_row, x + k + i, x_row, sum);
    }
    for (; k < n_cols; k += L) step<R, N>(w + k, w_row, x + k, x_row, sum);
    FASTGPT_UNROLL
    for (int i = 0; i < R * N; ++i) sums[i] = sum[i];
  }

  // The same for n input rows, in tiles of up to FASTGPT_TILE. While they are computed, the weights at `next` are
  // prefetched, R lines that are next_row bytes apart at a time: each tile prefetches its share, which spreads the
  // traffic over the whole time. A weight has `narrow` bytes there.
  template <int R, class W>
  FASTGPT_TARGET FASTGPT_INLINE static void tiles(int64_t n, const W* w, int64_t w_row, const float* x, int64_t x_row,
                                                  int64_t n_cols, const char* next, int64_t next_row, int64_t narrow,
                                                  Vector* sums) {
    const int64_t count = ceil_div(n, FASTGPT_TILE);
    const int64_t lines = sizeof(W) / narrow;  // of w, for one of `next`
    const int64_t next_step = next_row == 64 ? 64 * R : 64;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t first = n * t / count, rows = n * (t + 1) / count - first;
      const float* from = x + first * x_row;
      Vector* to = sums + first * R;
      const Ahead early{next + t * next_step, next_row, count * next_step, count * lines, t * lines};
      if (rows == 1) tile<R, 1>(w, w_row, from, x_row, n_cols, early, to);
      if (rows == 2) tile<R, 2>(w, w_row, from, x_row, n_cols, early, to);
      if (rows == 3) tile<R, 3>(w, w_row, from, x_row, n_cols, early, to);
#if FASTGPT_TILE > 3
      if (rows == 4) tile<R, 4>(w, w_row, from, x_row, n_cols, early, to);
      if (rows == 5) tile<R, 5>(w, w_row, from, x_row, n_cols, early, to);
      if (rows == 6) tile<R, 6>(w, w_row, from, x_row, n_cols, early, to);
#endif
    }
  }

  // Folds a vector of sums to 4 lanes.
  FASTGPT_TARGET FASTGPT_INLINE static Four fold(Vector v) {
    Four part[L / 4];
    memcpy(part, &v, sizeof v);
    FASTGPT_UNROLL
    for (int half = L / 8; half > 0; half /= 2) {
      FASTGPT_UNROLL
      for (int i = 0; i < half; ++i) part[i] += part[i + half];
    }
    return part[0];
  }

  // The totals of 4 vectors of sums.
  FASTGPT_TARGET FASTGPT_INLINE static Four totals(const Vector* v) {
    const Four a = fold(v[0]), b = fold(v[1]), c = fold(v[2]), d = fold(v[3]);
    const Four ab = FASTGPT_MIX(a, b, 0, 4, 1, 5) + FASTGPT_MIX(a, b, 2, 6, 3, 7);
    const Four cd = FASTGPT_MIX(c, d, 0, 4, 1, 5) + FASTGPT_MIX(c, d, 2, 6, 3, 7);
    return FASTGPT_MIX(ab, cd, 0, 1, 4, 5) + FASTGPT_MIX(ab, cd, 2, 3, 6, 7);
  }

  // Outputs f to f + R - 1 of n <= kInputRows rows from `first` on; x is packed as in linear_fwd.
  template <int R, class W>
  FASTGPT_TARGET FASTGPT_INLINE static void outputs(const LinearArgs& a, const float* x, int64_t first, int64_t n,
                                                    int64_t f) {
    static_assert(R == 1 || R == 4, "totals() adds up 4 vectors");
    const W* w = static_cast<const W*>(a.weight) + f * a.weight_row;
    const int64_t row_bytes = a.weight_row * static_cast<int64_t>(sizeof(W));
    Vector sums[R * kInputRows + 4 - R];
    alignas(64) float wide[sizeof(W) == 4 ? 1 : R * kDepth];
    for (int64_t i = 0; i < R * n + 4 - R; ++i) sums[i] = Vector{};
    float rest[R * kInputRows];  // of the columns after the last whole vector
    for (int64_t i = 0; i < R * n; ++i) rest[i] = 0.0f;
    for (int64_t k = 0; k < a.n_in; k += kDepth) {
      const int64_t depth = min_of(kDepth, a.n_in - k), whole = depth / L * L;
      const float* block = x + k * n;
      const char* next = reinterpret_cast<const char*>(w + k) + R * row_bytes;
      if (n <= FASTGPT_TILE && a.weight_row == a.n_in) {  // at the speed of memory, which is highest in its order
        const char* dense = reinterpret_cast<const char*>(w + R * (a.n_in + k));
        tiles<R>(n, w + k, a.weight_row, block, depth, whole, dense, 64, sizeof(W), sums);
      } else if (sizeof(W) == 4 || n <= FASTGPT_TILE) {
        tiles<R>(n, w + k, a.weight_row, block, depth, whole, next, row_bytes, sizeof(W), sums);
      } else {  // several tiles read these weights
        for (int64_t r = 0; r < R; ++r) widen<W>(w + r * a.weight_row + k, whole, wide + r * kDepth);
        tiles<R>(n, wide, kDepth, block, depth, whole, next, row_bytes, sizeof(W), sums);
      }
      for (int64_t j = whole; j < depth; ++j) {
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t r = 0; r < R; ++r) {
            rest[i * R + r] += to_float(w[r * a.weight_row + k + j]) * block[i * depth + j];
          }
        }
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const Four sum = totals(sums + i * R);
      for (int64_t r = 0; r < R; ++r) finish(a, first + i, f + r, sum[r] + rest[i * R + r]);
    }
  }

  template <class W>
  FASTGPT_TARGET FASTGPT_INLINE static void widen(const W* w, int64_t n_cols, float* wide) {
    for (int64_t k = 0; k < n_cols; k += L) {
      const Vector v = load(w + k);
      memcpy(wide + k, &v, sizeof v);
    }
  }

  // The same for the weight rows [begin, end).
  template <class W>
  FASTGPT_TARGET FASTGPT_NOINLINE static void rows(const LinearArgs& a, const float* x, int64_t first, int64_t n,
                                                   int64_t begin, int64_t end) {
    int64_t f = begin;
    for (; f + kWeightRows <= end; f += kWeightRows) outputs<kWeightRows, W>(a, x, first, n, f);
    for (; f < end; ++f) outputs<1, W>(a, x, first, n, f);
  }
};
#undef FASTGPT_SET
#undef FASTGPT_TARGET
#undef FASTGPT_LANES
#undef FASTGPT_TILE
#undef FASTGPT_BF16
#undef FASTGPT_F16
#undef FASTGPT_I8
