// The launchers of the kernels for sm_90a; a caller chooses them as cuda:sm_90a (fastgpt/ops/_attention_sm90.py).
#pragma once
#include "attention/op.h"

namespace fastgpt::cuda {

// Returns whether TMA can read a (B, rows, heads, D) tensor as it is: 16-byte aligned, with strides of whole 16 bytes.
bool sm90_takes_layout(const void* x, const AttentionStrides& s, int64_t n_batch, int64_t n_rows, int64_t n_heads);

// Like attention_fwd, for tensors of such a layout. Throws std::runtime_error for other head dimensions than 64 and 128,
// other options than causal order, and other devices than those of compute capability 9.0.
void attention_fwd_sm90(const AttentionArgs& a, Stream stream);

// Like attention_bwd, with the same workspace, for the same calls; q, k, v and dout have such a layout.
void attention_bwd_sm90(const AttentionArgs& a, Stream stream);

}  // namespace fastgpt::cuda
