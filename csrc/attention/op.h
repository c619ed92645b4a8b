// Arguments and launchers of attention; formulas in fastgpt/ops/attention.py.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace fastgpt {

// softmax(scale q k^T + mask) v; formulas in fastgpt/ops/attention.py. `*_at`: distances in elements between batches,
// rows and heads; the head dimension is contiguous. Index values are not checked: kernels clamp them to valid ones.
struct AttentionStrides {
  int64_t batch, row, head;
};

struct AttentionArgs {
  const void *q, *k, *v;  // (B, T, H, D), (B, S, Hkv, D), (B, S, Hkv, D) dtype
  const void* dout;       // (B, T, H, D) dtype; bwd only
  void* out;              // (B, T, H, D) dtype; written by fwd, read by bwd
  float* lse;             // (B, H, T) contiguous; written by fwd, read by bwd
  const float* dlse;      // (B, H, T) contiguous, or null; bwd only
  void *dq, *dk, *dv;     // like q, k, v; bwd only
  float* workspace;       // attention_bwd_workspace(B, T, H) floats; bwd only
  AttentionStrides q_at, k_at, v_at, dout_at, out_at, dq_at, dk_at, dv_at;
  const int32_t *cu_q, *cu_k;         // (n_sequences + 1) starts of packed sequences, or null
  const int32_t* doc_ids;             // (B, T), or null
  const int32_t *kv_lens, *kv_start;  // (B), or null
  const int64_t* rng;                 // (2) seed, offset; null: no dropout
  int64_t n_batch, n_queries, n_keys, n_heads, n_kv_heads, head_dim, n_sequences;
  int64_t window;  // 0: no window
  float scale, softcap;
  float keep_scale;     // 1 / (1 - dropout_p)
  uint32_t drop_below;  // an entry is dropped if its random word is less
  bool causal;
  DType dtype;
};

FASTGPT_ON_EACH_DEVICE(
  void attention_fwd(const AttentionArgs& a, Stream stream);
  void attention_bwd(const AttentionArgs& a, Stream stream);
  int64_t attention_bwd_workspace(int64_t n_batch, int64_t n_queries, int64_t n_heads, Stream stream);)

}  // namespace fastgpt
