// Arguments and launchers of embedding; formulas in fastgpt/ops/embedding.py.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace fastgpt {

struct Indices {
  const void* data;  // int64 if wide, else int32; null if absent
  bool wide;
};

// weight[ids] + position_weight[positions]; formulas in fastgpt/ops/embedding.py. An index outside its table
// gives a row of NaN.
struct EmbeddingFwdArgs {
  Indices ids;                  // (N)
  Indices positions;            // (period); if absent, token n has position n % period
  const void* weight;           // (n_rows, C) dtype, rows weight_row apart
  const void* position_weight;  // (n_positions, C) dtype, rows position_row apart, or null
  void* y;                      // (N, C) dtype, contiguous
  int64_t weight_row, position_row;
  int64_t n_tokens, n_cols, n_rows, n_positions, period;
  DType dtype;
};

// dweight[ids[n]] += dy[n]; an index outside the table adds nothing. Fields marked CUDA are null on the CPU.
struct EmbeddingBwdArgs {
  Indices ids;     // (N)
  const void* dy;  // (N, C) dtype, rows dy_row apart
  void* dweight;   // (n_rows, C) dweight_dtype, rows dweight_row apart
  const int32_t* sorted;   // (N): table rows of the tokens, ascending; n_rows if outside; CUDA
  const int64_t* order;    // (N): the tokens in this order; CUDA
  float* partials;         // (embedding_partials(N), C); CUDA
  int32_t* partial_keys;   // (embedding_partials(N)); CUDA
  int64_t dy_row, dweight_row;
  int64_t n_tokens, n_cols, n_rows;
  DType dtype, dweight_dtype;  // dweight_dtype: dtype or f32
};

FASTGPT_ON_EACH_DEVICE(
  void embedding_fwd(const EmbeddingFwdArgs& a, Stream stream);
  void embedding_bwd_add(const EmbeddingBwdArgs& a, Stream stream);)

namespace cuda {
void embedding_keys(const EmbeddingBwdArgs& a, int32_t* keys, Stream stream);  // (N): the keys to sort
int64_t embedding_partials(int64_t n_tokens, Stream stream);
}  // namespace cuda

}  // namespace fastgpt
