// Blocks of a product of matrices in fp32, for one instruction set. No include guard: linear/cpu_product.cpp includes this
// file once per set. FASTGPT_SET is its name, FASTGPT_TARGET its attribute, FASTGPT_LANES the number of floats in a
// vector, and FASTGPT_ROWS the number of rows in a block: rows x 2 vectors are summed in registers, from vectors of b and
// single values of a.
struct FASTGPT_SET {
  static constexpr int L = FASTGPT_LANES, R = FASTGPT_ROWS, W = 2 * L;
  typedef float Vector __attribute__((vector_size(4 * L)));

  FASTGPT_TARGET FASTGPT_INLINE static Vector load(const float* p) {
    Vector v;
    memcpy(&v, p, sizeof v);
    return v;
  }

  // Packs depth x n values of b, n <= W, as rows of W; missing columns are 0.
  FASTGPT_TARGET static void pack_b(const float* b, int64_t k_step, int64_t n_step, int64_t depth, int64_t n, float* to) {
    int64_t k = 0;
    if (n == W && n_step == 1) {
      for (; k < depth; ++k) memcpy(to + k * W, b + k * k_step, W * sizeof(float));
    } else if (n == W && k_step == 1) {
      for (; k + 4 <= depth; k += 4) {
        FASTGPT_UNROLL
        for (int c = 0; c < W; c += 4) transpose_four(b + c * n_step + k, n_step, to + k * W + c, W);
      }
    }
    for (; k < depth; ++k) {
      for (int64_t c = 0; c < W; ++c) to[k * W + c] = c < n ? b[k * k_step + c * n_step] : 0.0f;
    }
  }

  // Packs m x depth values of a, m <= R, as columns of R; missing rows are 0.
  FASTGPT_TARGET static void pack_a(const float* a, int64_t m_step, int64_t k_step, int64_t depth, int64_t m, float* to) {
    if (m == R && m_step == 1) {
      for (int64_t k = 0; k < depth; ++k) memcpy(to + k * R, a + k * k_step, R * sizeof(float));
      return;
    }
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t r = 0; r < R; ++r) to[k * R + r] = r < m ? a[r * m_step + k * k_step] : 0.0f;
    }
  }

  // Stores the sums of a block of p's output, or adds them to it.
  template <int Rows>
  FASTGPT_TARGET FASTGPT_INLINE static void store(const ProductArgs& p, const Vector* sum, int64_t m, int64_t n,
                                                  int64_t n_rows, int64_t n_cols, bool add, bool bias) {
    float* to = p.out + m * p.out_row + n;
    if (n_rows == Rows && n_cols == W) {
      const Vector low = bias ? load(p.bias + n) : Vector{}, high = bias ? load(p.bias + n + L) : Vector{};
      FASTGPT_UNROLL
      for (int r = 0; r < Rows; ++r) {
        Vector x = sum[2 * r] + low, y = sum[2 * r + 1] + high;
        if (add) x += load(to + r * p.out_row), y += load(to + r * p.out_row + L);
        memcpy(to + r * p.out_row, &x, sizeof x);
        memcpy(to + r * p.out_row + L, &y, sizeof y);
      }
      return;
    }
    for (int64_t r = 0; r < n_rows; ++r) {
      float row[W];
      memcpy(row, sum + 2 * r, sizeof row);
      for (int64_t c = 0; c < n_cols; ++c) {
        const float x = row[c] + (bias ? p.bias[n + c] : 0.0f);
        to[r * p.out_row + c] = add ? to[r * p.out_row + c] + x : x;
      }
    }
  }

  // Rows [m, m + n_rows), n_rows <= Rows, of W columns. a(r, k) is at a[r * a_row + k], or packed at a[k * R + r].
  template <int Rows, bool Packed>
  FASTGPT_TARGET FASTGPT_INLINE static void block(const ProductArgs& p, const float* a, const float* b, int64_t depth,
                                                  int64_t m, int64_t n, int64_t n_rows, int64_t n_cols, bool add,
                                                  bool bias) {
    Vector sum[2 * Rows];
    FASTGPT_UNROLL
    for (int i = 0; i < 2 * Rows; ++i) sum[i] = Vector{};
    for (int64_t k = 0; k < depth; ++k) {
      const Vector low = load(b + k * W), high = load(b + k * W + L);
      FASTGPT_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const float x = Packed ? a[k * R + r] : a[r * p.a_row + k];
        sum[2 * r] += x * low;
        sum[2 * r + 1] += x * high;
      }
    }
    store<Rows>(p, sum, m, n, n_rows, n_cols, add, bias);
  }

  // The last rows of a without a packed copy: each number of rows has its own block, which reads no row behind them.
  template <int Rows>
  FASTGPT_TARGET FASTGPT_INLINE static void last_rows(const ProductArgs& p, const float* a, const float* b,
                                                      int64_t depth, int64_t m, int64_t n, int64_t n_rows,
                                                      int64_t n_cols, bool add, bool bias) {
    if constexpr (Rows > 0) {
      if (n_rows == Rows) return block<Rows, false>(p, a, b, depth, m, n, n_rows, n_cols, add, bias);
      last_rows<Rows - 1>(p, a, b, depth, m, n, n_rows, n_cols, add, bias);
    }
  }

  // Adds columns [k, k + depth) of a times these rows of b to the outputs [rows) x [cols).
  FASTGPT_TARGET static void piece(const ProductArgs& p, Range rows, Range cols, int64_t k, int64_t depth, float* a_pack,
                                   const float* b_pack) {
    const bool add = p.add || k > 0, bias = p.bias != nullptr && k == 0, packed = p.a_col != 1;
    for (int64_t m = rows.begin; packed && m < rows.end; m += R) {
      pack_a(p.a + m * p.a_row + k * p.a_col, p.a_row, p.a_col, depth, min_of(R, rows.end - m),
             a_pack + (m - rows.begin) * depth);
    }
    for (int64_t n = cols.begin; n < cols.end; n += W) {
      const float* b = b_pack + (n - cols.begin) * depth;
      const int64_t n_cols = min_of(W, cols.end - n);
      for (int64_t m = rows.begin; m < rows.end; m += R) {
        const int64_t n_rows = min_of(R, rows.end - m);
        const float* a = p.a + m * p.a_row + k;
        if (packed) {
          block<R, true>(p, a_pack + (m - rows.begin) * depth, b, depth, m, n, n_rows, n_cols, add, bias);
        } else if (n_rows == R) {
          block<R, false>(p, a, b, depth, m, n, R, n_cols, add, bias);
        } else {
          last_rows<R - 1>(p, a, b, depth, m, n, n_rows, n_cols, add, bias);
        }
      }
    }
  }

  // Computes the outputs [rows) x [cols), in steps of `depth` columns of a.
  FASTGPT_TARGET static void outputs(const ProductArgs& p, Range rows, Range cols, int64_t depth, float* a_pack,
                                     float* b_pack) {
    for (int64_t k = 0; k < p.n_inner; k += depth) {
      const int64_t d = min_of(depth, p.n_inner - k);
      for (int64_t n = cols.begin; n < cols.end; n += W) {
        pack_b(p.b + k * p.b_row + n * p.b_col, p.b_row, p.b_col, d, min_of(W, cols.end - n),
               b_pack + (n - cols.begin) * d);
      }
      for (int64_t m = rows.begin; m < rows.end; m += kPackedRows) {
        piece(p, {m, min_of(rows.end, m + kPackedRows)}, cols, k, d, a_pack, b_pack);
      }
    }
  }
};
#undef FASTGPT_SET
#undef FASTGPT_TARGET
#undef FASTGPT_LANES
#undef FASTGPT_ROWS
