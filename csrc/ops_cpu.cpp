// The CPU dispatch key: Ops<Cpu> and its siblings, and parallel_for on PyTorch's thread pool.
#include "fastgpt/activation_ops.h"
#include "fastgpt/attention_ops.h"
#include "fastgpt/embedding_ops.h"
#include "fastgpt/ops_impl.h"
#include "fastgpt/parallel.h"
#include "fastgpt/rms_norm_impl.h"
#include "fastgpt/rope_ops.h"

namespace fastgpt {

void parallel_ranges(int64_t n, int64_t grain, RangeFn fn, const void* context) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { fn(context, begin, end); });
}

struct Cpu {
  explicit Cpu(const Tensor&) {}
  void layer_norm_fwd(const LayerNormFwdArgs& a) { cpu::layer_norm_fwd(a); }
  void layer_norm_bwd(const LayerNormBwdArgs& a) { cpu::layer_norm_bwd(a); }
  void cross_entropy_fwd(const CrossEntropyArgs& a) { cpu::cross_entropy_fwd(a); }
  void cross_entropy_bwd(const CrossEntropyArgs& a) { cpu::cross_entropy_bwd(a); }
  void cross_entropy_fwd_bwd(const CrossEntropyArgs& a) { cpu::cross_entropy_fwd_bwd(a); }
  void scale_rows(const ScaleRowsArgs& a) { cpu::scale_rows(a); }
  void adamw_prepare(const AdamWArgs& a) { cpu::adamw_prepare(a); }
  void adamw_update(const AdamWArgs& a) { cpu::adamw_update(a); }
  void bias_gelu_fwd(const BiasGeluArgs& a) { cpu::bias_gelu_fwd(a); }
  void bias_gelu_bwd(const BiasGeluArgs& a) { cpu::bias_gelu_bwd(a); }
  void swiglu_fwd(const SwigluArgs& a) { cpu::swiglu_fwd(a); }
  void swiglu_bwd(const SwigluArgs& a) { cpu::swiglu_bwd(a); }
  void rope(const RopeArgs& a) { cpu::rope(a); }
  void embedding_fwd(const EmbeddingFwdArgs& a) { cpu::embedding_fwd(a); }
  bool sort_tokens(EmbeddingBwdArgs&, const Tensor&) { return false; }  // embedding_bwd_add does it itself
  void embedding_bwd_add(const EmbeddingBwdArgs& a) { cpu::embedding_bwd_add(a); }
  void attention_fwd(const AttentionArgs& a) { cpu::attention_fwd(a); }
  void attention_bwd(const AttentionArgs& a) { cpu::attention_bwd(a); }
  int64_t attention_bwd_workspace(int64_t b, int64_t t, int64_t h) { return cpu::attention_bwd_workspace(b, t, h); }
  int64_t bias_gelu_bwd_blocks(int64_t n_rows, int64_t n_cols) { return cpu::bias_gelu_bwd_blocks(n_rows, n_cols); }
  int64_t layer_norm_bwd_blocks(int64_t n_rows, int64_t n_cols) { return cpu::layer_norm_bwd_blocks(n_rows, n_cols); }
  int64_t adamw_partials(const int64_t* numels, int64_t n) { return cpu::adamw_partials(numels, n); }
  void rms_norm_fwd(const RmsNormFwdArgs& a) { cpu::rms_norm_fwd(a); }
  void rms_norm_bwd(const RmsNormBwdArgs& a) { cpu::rms_norm_bwd(a); }
  int64_t rms_norm_bwd_blocks(int64_t n_rows, int64_t n_cols) { return cpu::rms_norm_bwd_blocks(n_rows, n_cols); }
};

template struct Ops<Cpu>;
template struct RmsNormOps<Cpu>;
template struct ActivationOps<Cpu>;
template struct RopeOps<Cpu>;
template struct EmbeddingOps<Cpu>;
template struct AttentionOps<Cpu>;

}  // namespace fastgpt
