// Launchers of attention_decode; formulas in fastgpt/ops/attention_decode.py.
#pragma once
#include "attention/op.h"

namespace fastgpt {

// With `pages`, k and v are a pool (n_pages, page_size, Hkv, D), and the batch strides k_at and v_at are those between
// pages. Key s of row b is in slot s % page_size of page pages[b, s / page_size]; n_keys is (pages of a row) page_size.
// Page numbers are not checked: a row that sees a key of a page outside the pool becomes NaN.
struct DecodeArgs : AttentionArgs {
  const int32_t* pages;  // (B, n_keys / page_size) contiguous, or null
  int64_t n_pages;
  int page_bits;  // page_size = 2^page_bits
};

// Takes the arguments of attention with causal = true, contiguous `out` and attention_decode_workspace(a) floats of
// `workspace`. It reads none of the fields for packed sequences, documents, dropout and gradients, and writes no lse.
FASTGPT_ON_EACH_DEVICE(
  void attention_decode_fwd(const DecodeArgs& a, Stream stream);
  int64_t attention_decode_workspace(const DecodeArgs& a, Stream stream);)

}  // namespace fastgpt
