// Which implementation serves which op. Schemas are defined once, in fastgpt/ops/<op>.py; each backend is an overload.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "fastgpt/ops.h"

// Every op for one device; `key` ends the names of its overloads.
#define FASTGPT_REGISTER(m, Device, key)                                                                    \
  m.impl("layer_norm_fwd" key, TORCH_BOX(&fastgpt::Ops<fastgpt::Device>::layer_norm_fwd));                  \
  m.impl("layer_norm_bwd" key, TORCH_BOX(&fastgpt::Ops<fastgpt::Device>::layer_norm_bwd));                  \
  m.impl("cross_entropy_fwd" key, TORCH_BOX(&fastgpt::Ops<fastgpt::Device>::cross_entropy_fwd));            \
  m.impl("cross_entropy_bwd" key, TORCH_BOX(&fastgpt::Ops<fastgpt::Device>::cross_entropy_bwd));            \
  m.impl("cross_entropy_fwd_bwd" key, TORCH_BOX(&fastgpt::Ops<fastgpt::Device>::cross_entropy_fwd_bwd));    \
  m.impl("scale_rows" key, TORCH_BOX(&fastgpt::Ops<fastgpt::Device>::scale_rows));                          \
  m.impl("adamw_prepare" key, TORCH_BOX(&fastgpt::Ops<fastgpt::Device>::adamw_prepare));                    \
  m.impl("adamw_update" key, TORCH_BOX(&fastgpt::Ops<fastgpt::Device>::adamw_update));                      \
  m.impl("rms_norm_fwd" key, TORCH_BOX(&fastgpt::RmsNormOps<fastgpt::Device>::rms_norm_fwd));               \
  m.impl("rms_norm_bwd" key, TORCH_BOX(&fastgpt::RmsNormOps<fastgpt::Device>::rms_norm_bwd));               \
  m.impl("bias_gelu_fwd" key, TORCH_BOX(&fastgpt::ActivationOps<fastgpt::Device>::bias_gelu_fwd));          \
  m.impl("bias_gelu_bwd" key, TORCH_BOX(&fastgpt::ActivationOps<fastgpt::Device>::bias_gelu_bwd));          \
  m.impl("swiglu_fwd" key, TORCH_BOX(&fastgpt::ActivationOps<fastgpt::Device>::swiglu_fwd));                \
  m.impl("swiglu_bwd" key, TORCH_BOX(&fastgpt::ActivationOps<fastgpt::Device>::swiglu_bwd));                \
  m.impl("rope_fwd" key, TORCH_BOX(&fastgpt::RopeOps<fastgpt::Device>::rope_fwd));                          \
  m.impl("rope_rows" key, TORCH_BOX(&fastgpt::RopeOps<fastgpt::Device>::rope_rows));                        \
  m.impl("rope_copy" key, TORCH_BOX(&fastgpt::RopeOps<fastgpt::Device>::rope_copy));                        \
  m.impl("embedding_fwd" key, TORCH_BOX(&fastgpt::EmbeddingOps<fastgpt::Device>::embedding_fwd));           \
  m.impl("embedding_bwd" key, TORCH_BOX(&fastgpt::EmbeddingOps<fastgpt::Device>::embedding_bwd));           \
  m.impl("embedding_bwd_add" key, TORCH_BOX(&fastgpt::EmbeddingOps<fastgpt::Device>::embedding_bwd_add));   \
  m.impl("attention_fwd" key, TORCH_BOX(&fastgpt::AttentionOps<fastgpt::Device>::fwd));                     \
  m.impl("attention_bwd" key, TORCH_BOX(&fastgpt::AttentionOps<fastgpt::Device>::bwd));                     \
  m.impl("attention_qkv_bwd" key, TORCH_BOX(&fastgpt::AttentionOps<fastgpt::Device>::qkv_bwd));

#if !defined(FASTGPT_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) { FASTGPT_REGISTER(m, Cpu, ".cpu") }
#endif

#if defined(FASTGPT_EMULATED)  // tests/cuda_on_cpu: the CUDA kernels, built for the host, take CPU tensors
STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) { FASTGPT_REGISTER(m, Cuda, ".cuda") }
#elif defined(FASTGPT_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) { FASTGPT_REGISTER(m, Cuda, ".cuda") }
#endif

#ifndef FASTGPT_EMULATED
// `import fastgpt._C` loads the library, and with it the registrations above; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
