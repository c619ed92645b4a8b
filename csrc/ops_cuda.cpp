// The CUDA dispatch key: Ops<Cuda>, on the tensors' device and PyTorch's current stream there.
#include <torch/csrc/stable/accelerator.h>

#include "fastgpt/activation_ops.h"
#include "fastgpt/attention_ops.h"
#include "fastgpt/embedding_ops.h"
#include "fastgpt/ops_impl.h"
#include "fastgpt/rms_norm_impl.h"
#include "fastgpt/rope_ops.h"

#ifndef FASTGPT_EMULATED
// Lives in libtorch_cuda, which a CPU-only torch does not have: weak, so that one binary loads on both.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fastgpt {

static void* current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "fastgpt: aoti_torch_get_current_cuda_stream was not found: this torch has no CUDA support, or its "
                  "libtorch_cuda is not what libtorch loads");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cuda::Stream stream;

  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()), stream(current_stream(t.get_device_index())) {}
};

}  // namespace fastgpt
#else
namespace fastgpt {

struct OnDevice {  // tests/cuda_on_cpu: launches run on the host, before they return
  cuda::Stream stream = nullptr;

  explicit OnDevice(const Tensor&) {}
};

}  // namespace fastgpt
#endif

namespace fastgpt {

struct Cuda : OnDevice {
  using OnDevice::OnDevice;
  void layer_norm_fwd(const LayerNormFwdArgs& a) { cuda::layer_norm_fwd(a, stream); }
  void layer_norm_bwd(const LayerNormBwdArgs& a) { cuda::layer_norm_bwd(a, stream); }
  void cross_entropy_fwd(const CrossEntropyArgs& a) { cuda::cross_entropy_fwd(a, stream); }
  void cross_entropy_bwd(const CrossEntropyArgs& a) { cuda::cross_entropy_bwd(a, stream); }
  void cross_entropy_fwd_bwd(const CrossEntropyArgs& a) { cuda::cross_entropy_fwd_bwd(a, stream); }
  void scale_rows(const ScaleRowsArgs& a) { cuda::scale_rows(a, stream); }
  void adamw_prepare(const AdamWArgs& a) { cuda::adamw_prepare(a, stream); }
  void adamw_update(const AdamWArgs& a) { cuda::adamw_update(a, stream); }
  void rope(const RopeArgs& a) { cuda::rope(a, stream); }
  void embedding_fwd(const EmbeddingFwdArgs& a) { cuda::embedding_fwd(a, stream); }
  void embedding_keys(const EmbeddingBwdArgs& a, int32_t* keys) { cuda::embedding_keys(a, keys, stream); }
  int64_t embedding_partials(int64_t n_tokens) { return cuda::embedding_partials(n_tokens); }
  SortedTokens sort_tokens(EmbeddingBwdArgs& a, const Tensor& like) { return fastgpt::sort_tokens(*this, a, like); }
  void embedding_bwd_add(const EmbeddingBwdArgs& a) { cuda::embedding_bwd_add(a, stream); }
  void rms_norm_fwd(const RmsNormFwdArgs& a) { cuda::rms_norm_fwd(a, stream); }
  void rms_norm_bwd(const RmsNormBwdArgs& a) { cuda::rms_norm_bwd(a, stream); }
  void bias_gelu_fwd(const BiasGeluArgs& a) { cuda::bias_gelu_fwd(a, stream); }
  void bias_gelu_bwd(const BiasGeluArgs& a) { cuda::bias_gelu_bwd(a, stream); }
  void swiglu_fwd(const SwigluArgs& a) { cuda::swiglu_fwd(a, stream); }
  void swiglu_bwd(const SwigluArgs& a) { cuda::swiglu_bwd(a, stream); }
  int64_t layer_norm_bwd_blocks(int64_t n_rows, int64_t n_cols) { return cuda::layer_norm_bwd_blocks(n_rows, n_cols); }
  int64_t rms_norm_bwd_blocks(int64_t n_rows, int64_t n_cols) { return cuda::rms_norm_bwd_blocks(n_rows, n_cols); }
  int64_t bias_gelu_bwd_blocks(int64_t n_rows, int64_t n_cols) { return cuda::bias_gelu_bwd_blocks(n_rows, n_cols); }
  int64_t adamw_partials(const int64_t* numels, int64_t n) { return cuda::adamw_partials(numels, n); }
  void attention_fwd(const AttentionArgs& a) { cuda::attention_fwd(a, stream); }
  void attention_bwd(const AttentionArgs& a) { cuda::attention_bwd(a, stream); }
  int64_t attention_bwd_workspace(int64_t b, int64_t t, int64_t h) { return cuda::attention_bwd_workspace(b, t, h); }
};

template struct Ops<Cuda>;
template struct RopeOps<Cuda>;
template struct EmbeddingOps<Cuda>;
template struct RmsNormOps<Cuda>;
template struct ActivationOps<Cuda>;
template struct AttentionOps<Cuda>;

}  // namespace fastgpt
