// Launchers of attention_decode; formulas in fastgpt/ops/attention_decode.py.
#pragma once
#include "attention/op.h"

namespace fastgpt {

// Takes the arguments of attention with causal = true, contiguous `out` and attention_decode_workspace(a) floats of
// `workspace`. It reads none of the fields for packed sequences, documents, dropout and gradients, and writes no lse.
FASTGPT_ON_EACH_DEVICE(
  void attention_decode_fwd(const AttentionArgs& a, Stream stream);
  int64_t attention_decode_workspace(const AttentionArgs& a, Stream stream);)

}  // namespace fastgpt
