// The raw ops as C++ functions, once for every device: Ops<Cpu> in ops_cpu.cpp, Ops<Cuda> in ops_cuda.cpp. Schemas and
// meaning are in fastgpt/ops/<op>.py; bodies (checks, outputs, row strides, launch) in ops_impl.h.
#pragma once
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace fastgpt {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Doubles = std::vector<double>;

struct Cpu;
struct Cuda;

template <class Device>
struct Ops {
  static std::tuple<Tensor, OptTensor, Tensor> layer_norm_fwd(Tensor x, OptTensor residual, OptTensor weight,
                                                              OptTensor bias, double eps);
  static std::tuple<Tensor, OptTensor, OptTensor> layer_norm_bwd(Tensor dy, OptTensor dsum, Tensor h, OptTensor weight,
                                                                 OptTensor bias, Tensor stats);
  static std::tuple<Tensor, Tensor> cross_entropy_fwd(Tensor logits, Tensor target, OptTensor weight,
                                                      int64_t ignore_index, double label_smoothing, double z_loss,
                                                      double softcap, int64_t vocab_size);
  static Tensor cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor target, Tensor stats, OptTensor weight,
                                  int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                                  int64_t vocab_size);
  static void cross_entropy_fwd_bwd(Tensor logits, Tensor loss, Tensor target, OptTensor weight, Tensor scale,
                                    int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                                    int64_t vocab_size);
  static void scale_rows(Tensor x, Tensor scale);
  static void adamw_prepare(Tensors grads, Tensor steps, Ints index, Tensor partials, int64_t offset, bool norm);
  static void adamw_update(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors masters,
                           Tensor steps, Ints index, Ints group, Tensor lr, Doubles beta1, Doubles beta2, Doubles eps,
                           Doubles weight_decay, Tensor partials, double max_norm, OptTensor grad_scale,
                           OptTensor found_inf, Tensor grad_norm, bool stochastic, int64_t seed);
};

// Bodies in rms_norm_impl.h.
template <class Device>
struct RmsNormOps {
  static std::tuple<Tensor, OptTensor, Tensor> rms_norm_fwd(Tensor x, OptTensor residual, OptTensor weight, double eps,
                                                            double weight_offset);
  static std::tuple<Tensor, OptTensor> rms_norm_bwd(Tensor dy, OptTensor dsum, Tensor h, OptTensor weight, Tensor rstd,
                                                    double eps, double weight_offset);
};

// Bodies in activation_ops.h.
template <class Device>
struct ActivationOps {
  static Tensor bias_gelu_fwd(Tensor x, OptTensor bias, bool tanh);
  static std::tuple<Tensor, OptTensor> bias_gelu_bwd(Tensor dy, Tensor x, OptTensor bias, bool tanh);
  static Tensor swiglu_fwd(Tensor gate, OptTensor up, int64_t activation);
  static std::tuple<Tensor, OptTensor> swiglu_bwd(Tensor dy, Tensor gate, OptTensor up, int64_t activation);
};

// Bodies in rope_ops.h.
template <class Device>
struct RopeOps {
  static std::tuple<Tensor, Tensor> rope_fwd(Tensor q, Tensor k, Tensor cos, Tensor sin, OptTensor positions,
                                             bool interleaved, bool inverse);
  static void rope_rows(Tensor qkv, Tensor cos, Tensor sin, OptTensor positions, int64_t n_turned, bool interleaved,
                        bool inverse);
  static Tensor rope_copy(Tensor qkv, Tensor cos, Tensor sin, OptTensor positions, int64_t n_turned, bool interleaved,
                          bool inverse);
};

// Bodies in embedding_ops.h.
template <class Device>
struct EmbeddingOps {
  static Tensor embedding_fwd(Tensor ids, Tensor weight, OptTensor position_weight, OptTensor positions);
  static Tensor embedding_bwd(Tensor dy, Tensor ids, int64_t num_rows);
  static void embedding_bwd_add(Tensor dweight, Tensor dy, Tensor ids);
};

// Attention's options, in the order of its schemas.
struct AttentionOptions {
  const OptTensor &cu_seqlens_q, &cu_seqlens_k, &doc_ids, &kv_lens, &kv_start, &rng;
  bool causal;
  double scale;
  int64_t window;
  double softcap, dropout_p;
};
#define FASTGPT_ATTENTION_OPTIONS                                                                           \
  OptTensor cu_seqlens_q, OptTensor cu_seqlens_k, OptTensor doc_ids, OptTensor kv_lens, OptTensor kv_start, \
      OptTensor rng, bool causal, double scale, int64_t window, double softcap, double dropout_p
#define FASTGPT_ATTENTION_PACK \
  {cu_seqlens_q, cu_seqlens_k, doc_ids, kv_lens, kv_start, rng, causal, scale, window, softcap, dropout_p}

// Bodies in attention_ops.h.
template <class Device>
struct AttentionOps {
  static std::tuple<Tensor, Tensor> fwd(Tensor q, Tensor k, Tensor v, FASTGPT_ATTENTION_OPTIONS);
  static std::tuple<Tensor, Tensor, Tensor> bwd(Tensor dout, OptTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out,
                                                Tensor lse, FASTGPT_ATTENTION_OPTIONS);
  static Tensor qkv_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, FASTGPT_ATTENTION_OPTIONS, int64_t n_heads,
                        int64_t n_kv_heads);
};

}  // namespace fastgpt
