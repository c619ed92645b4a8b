// The keys that a query sees, for the CPU and the CUDA kernels. Documents restrict them further.
#pragma once
#include "attention/op.h"
#include "core/math.h"

namespace fastgpt {

// Keys [begin, end) within [0, n_keys]; none if begin >= end.
struct KeyRange {
  int64_t begin, end;
};

// sequence: the packed sequence of the query, n_sequences if it is in none; used only with cu_q.
FASTGPT_HD KeyRange key_range(const AttentionArgs& a, int64_t batch, int64_t query, int64_t sequence) {
  int64_t begin = 0, end = a.n_keys, position = 0;  // the key on the diagonal
  if (a.cu_q != nullptr) {
    if (sequence == a.n_sequences) return {0, 0};
    begin = a.cu_k[sequence], end = a.cu_k[sequence + 1];
    position = query + end - a.cu_q[sequence + 1];
  } else {
    position = query + end - a.n_queries;
    if (a.kv_lens != nullptr) end = a.kv_lens[batch];
    if (a.kv_start != nullptr) begin = a.kv_start[batch];
  }
  if (a.causal && position + 1 < end) end = position + 1;
  if (a.window > 0 && position + 1 - a.window > begin) begin = position + 1 - a.window;
  return {begin < 0 ? 0 : begin, end > a.n_keys ? a.n_keys : end};
}

}  // namespace fastgpt
