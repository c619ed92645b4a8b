// Which implementation serves which op. Schemas are defined once, in fastgpt/ops/<op>.py; each backend is an overload.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "fastgpt/ops.h"

#ifdef FASTGPT_EMULATED  // tests/cuda_on_cpu: the CUDA kernels, built for the host, take CPU tensors
#define FASTGPT_CUDA_KEY CPU
#else
#define FASTGPT_CUDA_KEY CUDA

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  using Op = fastgpt::Ops<fastgpt::Cpu>;
  m.impl("layer_norm_fwd.cpu", TORCH_BOX(&Op::layer_norm_fwd));
  m.impl("layer_norm_bwd.cpu", TORCH_BOX(&Op::layer_norm_bwd));
  m.impl("cross_entropy_fwd.cpu", TORCH_BOX(&Op::cross_entropy_fwd));
  m.impl("cross_entropy_bwd.cpu", TORCH_BOX(&Op::cross_entropy_bwd));
  m.impl("cross_entropy_fwd_bwd.cpu", TORCH_BOX(&Op::cross_entropy_fwd_bwd));
  m.impl("scale_rows.cpu", TORCH_BOX(&Op::scale_rows));
  m.impl("adamw_prepare.cpu", TORCH_BOX(&Op::adamw_prepare));
  m.impl("adamw_update.cpu", TORCH_BOX(&Op::adamw_update));
  using RmsNorm = fastgpt::RmsNormOps<fastgpt::Cpu>;
  m.impl("rms_norm_fwd.cpu", TORCH_BOX(&RmsNorm::rms_norm_fwd));
  m.impl("rms_norm_bwd.cpu", TORCH_BOX(&RmsNorm::rms_norm_bwd));
  using Act = fastgpt::ActivationOps<fastgpt::Cpu>;
  m.impl("bias_gelu_fwd.cpu", TORCH_BOX(&Act::bias_gelu_fwd));
  m.impl("bias_gelu_bwd.cpu", TORCH_BOX(&Act::bias_gelu_bwd));
  m.impl("swiglu_fwd.cpu", TORCH_BOX(&Act::swiglu_fwd));
  m.impl("swiglu_bwd.cpu", TORCH_BOX(&Act::swiglu_bwd));
  using Rope = fastgpt::RopeOps<fastgpt::Cpu>;
  m.impl("rope_fwd.cpu", TORCH_BOX(&Rope::rope_fwd));
  m.impl("rope_rows.cpu", TORCH_BOX(&Rope::rope_rows));
  m.impl("rope_copy.cpu", TORCH_BOX(&Rope::rope_copy));
  using Embedding = fastgpt::EmbeddingOps<fastgpt::Cpu>;
  m.impl("embedding_fwd.cpu", TORCH_BOX(&Embedding::embedding_fwd));
  m.impl("embedding_bwd.cpu", TORCH_BOX(&Embedding::embedding_bwd));
  m.impl("embedding_bwd_add.cpu", TORCH_BOX(&Embedding::embedding_bwd_add));
  using Attention = fastgpt::AttentionOps<fastgpt::Cpu>;
  m.impl("attention_fwd.cpu", TORCH_BOX(&Attention::fwd));
  m.impl("attention_bwd.cpu", TORCH_BOX(&Attention::bwd));
  m.impl("attention_qkv_bwd.cpu", TORCH_BOX(&Attention::qkv_bwd));
}

#endif

#ifdef FASTGPT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastgpt, FASTGPT_CUDA_KEY, m) {
  using Op = fastgpt::Ops<fastgpt::Cuda>;
  m.impl("layer_norm_fwd.cuda", TORCH_BOX(&Op::layer_norm_fwd));
  m.impl("layer_norm_bwd.cuda", TORCH_BOX(&Op::layer_norm_bwd));
  m.impl("cross_entropy_fwd.cuda", TORCH_BOX(&Op::cross_entropy_fwd));
  m.impl("cross_entropy_bwd.cuda", TORCH_BOX(&Op::cross_entropy_bwd));
  m.impl("cross_entropy_fwd_bwd.cuda", TORCH_BOX(&Op::cross_entropy_fwd_bwd));
  m.impl("scale_rows.cuda", TORCH_BOX(&Op::scale_rows));
  m.impl("adamw_prepare.cuda", TORCH_BOX(&Op::adamw_prepare));
  m.impl("adamw_update.cuda", TORCH_BOX(&Op::adamw_update));
  using Rope = fastgpt::RopeOps<fastgpt::Cuda>;
  m.impl("rope_fwd.cuda", TORCH_BOX(&Rope::rope_fwd));
  m.impl("rope_rows.cuda", TORCH_BOX(&Rope::rope_rows));
  m.impl("rope_copy.cuda", TORCH_BOX(&Rope::rope_copy));
  using Embedding = fastgpt::EmbeddingOps<fastgpt::Cuda>;
  m.impl("embedding_fwd.cuda", TORCH_BOX(&Embedding::embedding_fwd));
  m.impl("embedding_bwd.cuda", TORCH_BOX(&Embedding::embedding_bwd));
  m.impl("embedding_bwd_add.cuda", TORCH_BOX(&Embedding::embedding_bwd_add));
  using RmsNorm = fastgpt::RmsNormOps<fastgpt::Cuda>;
  m.impl("rms_norm_fwd.cuda", TORCH_BOX(&RmsNorm::rms_norm_fwd));
  m.impl("rms_norm_bwd.cuda", TORCH_BOX(&RmsNorm::rms_norm_bwd));
  using Act = fastgpt::ActivationOps<fastgpt::Cuda>;
  m.impl("bias_gelu_fwd.cuda", TORCH_BOX(&Act::bias_gelu_fwd));
  m.impl("bias_gelu_bwd.cuda", TORCH_BOX(&Act::bias_gelu_bwd));
  m.impl("swiglu_fwd.cuda", TORCH_BOX(&Act::swiglu_fwd));
  m.impl("swiglu_bwd.cuda", TORCH_BOX(&Act::swiglu_bwd));
  using Attention = fastgpt::AttentionOps<fastgpt::Cuda>;
  m.impl("attention_fwd.cuda", TORCH_BOX(&Attention::fwd));
  m.impl("attention_bwd.cuda", TORCH_BOX(&Attention::bwd));
  m.impl("attention_qkv_bwd.cuda", TORCH_BOX(&Attention::qkv_bwd));
}
#endif

#ifndef FASTGPT_EMULATED
// `import fastgpt._C` loads the library, and with it the registrations above; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
