// AdamW on the CPU; formulas in fastgpt/ops/adamw.py.
//
// All tensors together form one sequence of elements, cut into blocks whose length depends on the total alone. A block
// is the unit of work of the threads and of the partial sums of the norm. Every element of p, g, m, v is read once and
// p, m, v are written once. Values that are not fp32 pass through a buffer in L1, so one loop over floats serves every
// mix of dtypes.
#include <algorithm>
#include <cmath>
#include <vector>

#include "adamw/op.h"
#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"

namespace fastgpt::cpu {

constexpr int64_t kMaxBlocks = 1024;

static int64_t block_length(int64_t total) { return max_of(16384, ceil_div(total, kMaxBlocks)); }

// starts[i]: elements before tensor i; the last entry is the total
static std::vector<int64_t> starts_of(const AdamWArgs& a) {
  std::vector<int64_t> starts(a.n_tensors + 1, 0);
  for (int64_t i = 0; i < a.n_tensors; ++i) starts[i + 1] = starts[i] + a.tensors[i].numel;
  return starts;
}

// Calls fn(tensor, begin, end) for the pieces of tensors in block `block`. Tensors are cut at multiples of a vector:
// vectors across two cache lines cost a quarter of the speed.
template <class F>
inline void for_pieces(const std::vector<int64_t>& starts, int64_t block, const F& fn) {
  const int64_t length = block_length(starts.back());
  const int64_t first = block * length, last = min_of(starts.back(), first + length);
  int64_t i = std::upper_bound(starts.begin(), starts.end(), first) - starts.begin() - 1;
  for (; i + 1 < static_cast<int64_t>(starts.size()) && starts[i] < last; ++i) {
    const int64_t numel = starts[i + 1] - starts[i];
    const int64_t begin = min_of(numel, ceil_div(max_of(int64_t{0}, first - starts[i]), kLanes) * kLanes);
    const int64_t end = min_of(numel, ceil_div(last - starts[i], kLanes) * kLanes);
    if (begin < end) fn(i, begin, end);
  }
}

template <class F>
static void for_blocks(const std::vector<int64_t>& starts, const F& fn) {
  parallel_for(ceil_div(starts.back(), block_length(starts.back())), 2, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) fn(block);
  });
}

FASTGPT_CLONES static double sum_squares(const void* data, DType dtype, int64_t begin, int64_t end) {
  double total = 0.0;
  with_type(dtype, [&](auto tag) {
    const auto* x = static_cast<const decltype(tag)*>(data);
    for (int64_t first = begin; first < end; first += kChunk) {
      const int64_t last = min_of(end, first + kChunk);
      float part = 0.0f;
      FASTGPT_SUM(part)
      for (int64_t i = first; i < last; ++i) part += to_float(x[i]) * to_float(x[i]);
      total += part;
    }
  });
  return total;
}

// Returns elements [i, i + n) as floats: in place if they are fp32, else converted into `buffer`.
inline float* open(void* data, DType dtype, int64_t i, int64_t n, float* buffer) {
  if (dtype == DType::f32) return static_cast<float*>(data) + i;
  with_type(dtype, [&](auto tag) { to_floats(static_cast<decltype(tag)*>(data) + i, buffer, n); });
  return buffer;
}

inline void close(void* data, DType dtype, int64_t i, int64_t n, const float* values) {
  if (dtype == DType::f32 && static_cast<float*>(data) + i == values) return;
  with_type(dtype, [&](auto tag) { from_floats(values, static_cast<decltype(tag)*>(data) + i, n); });
}

// Copies a parameter to its master if it is not the rounded master: then it was set from outside.
inline void follow_param(const void* param, DType dtype, int64_t i, int64_t n, float* master) {
  with_type(dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* p = static_cast<const T*>(param) + i;
    FASTGPT_SIMD
    for (int64_t k = 0; k < n; ++k) {
      const float value = to_float(p[k]);
      master[k] = to_float(from_float<T>(master[k])) == value ? master[k] : value;
    }
  });
}

// Returns the fp32 values of the parameter: the master, bf16 + remainder, or the parameter itself.
inline float* open_param(const AdamWArgs& a, const AdamWTensor& t, int64_t i, int64_t n, float* buffer) {
  if (t.master == nullptr) return open(t.param, a.param_dtype, i, n, buffer);
  if (a.master_dtype == DType::f32) {
    float* master = static_cast<float*>(t.master) + i;
    follow_param(t.param, a.param_dtype, i, n, master);
    return master;
  }
  const bf16* high = static_cast<const bf16*>(t.param) + i;
  const int16_t* low = static_cast<const int16_t*>(t.master) + i;
  FASTGPT_SIMD
  for (int64_t k = 0; k < n; ++k) buffer[k] = join_remainder(high[k], low[k]);
  return buffer;
}

inline void close_param(const AdamWArgs& a, const AdamWTensor& t, int64_t i, int64_t n, const float* values,
                        const RandomKey& key) {
  bf16* high = static_cast<bf16*>(t.param) + i;
  if (t.master != nullptr && a.master_dtype == DType::i16) {
    int16_t* low = static_cast<int16_t*>(t.master) + i;
    FASTGPT_SIMD
    for (int64_t k = 0; k < n; ++k) {
      high[k] = remainder_high(values[k]);
      low[k] = remainder_low(values[k]);
    }
  } else if (a.stochastic) {
    FASTGPT_SIMD
    for (int64_t k = 0; k < n; ++k) {
      high[k] = round_stochastic(values[k], random_bits(key, static_cast<uint64_t>(i + k)));
    }
  } else {
    close(t.param, a.param_dtype, i, n, values);
  }
}

FASTGPT_CLONES static void update_piece(const AdamWArgs& a, const AdamWTensor& t, const AdamWScalars& scalars,
                                        const RandomKey& key, int64_t begin, int64_t end) {
  float buffers[4][kChunk];
  const AdamWScalars s = scalars;
  for (int64_t i = begin; i < end; i += kChunk) {
    const int64_t n = min_of(kChunk, end - i);
    const float* g = open(const_cast<void*>(t.grad), a.grad_dtype, i, n, buffers[0]);
    float* m = open(t.exp_avg, a.moment_dtype, i, n, buffers[1]);
    float* v = open(t.exp_avg_sq, a.moment_dtype, i, n, buffers[2]);
    float* p = open_param(a, t, i, n, buffers[3]);
    FASTGPT_SIMD
    for (int64_t k = 0; k < n; ++k) adamw_element(p[k], g[k], m[k], v[k], s);
    close(t.exp_avg, a.moment_dtype, i, n, m);
    close(t.exp_avg_sq, a.moment_dtype, i, n, v);
    close_param(a, t, i, n, p, key);
  }
}

// Writes the norm and returns clip coefficient / grad_scale; NaN or infinity if the step must be skipped.
static float grad_factor(const AdamWArgs& a) {
  const float scale = a.grad_scale == nullptr ? 1.0f : *a.grad_scale;
  float factor = 1.0f / scale;
  if (a.n_partials > 0) {
    double total = 0.0;
    for (int64_t i = 0; i < a.n_partials; ++i) total += a.partials[i];
    const float norm = static_cast<float>(std::sqrt(total) / scale);
    *a.grad_norm = norm;
    factor = std::isfinite(norm) ? factor * clip_coefficient(norm, a.max_norm) : NAN;
  }
  return a.found_inf != nullptr && *a.found_inf != 0.0f ? NAN : factor;
}

// ---- launchers ----

int64_t adamw_partials(const int64_t* numels, int64_t n_tensors, Stream) {
  int64_t total = 0;
  for (int64_t i = 0; i < n_tensors; ++i) total += numels[i];
  return ceil_div(total, block_length(total));
}

void adamw_prepare(const AdamWArgs& a, Stream) {
  for (int64_t i = 0; i < a.n_tensors; ++i) a.steps[a.tensors[i].step] += 1.0f;
  if (a.partials == nullptr) return;
  const auto starts = starts_of(a);
  for_blocks(starts, [&](int64_t block) {
    double total = 0.0;
    for_pieces(starts, block, [&](int64_t i, int64_t begin, int64_t end) {
      total += sum_squares(a.tensors[i].grad, a.grad_dtype, begin, end);
    });
    a.partials[a.offset + block] = static_cast<float>(total);
  });
}

void adamw_update(const AdamWArgs& a, Stream) {
  const float factor = grad_factor(a);
  if (std::isnan(factor)) {
    for (int64_t i = 0; i < a.n_tensors; ++i) a.steps[a.tensors[i].step] -= 1.0f;
    return;
  }
  std::vector<AdamWScalars> scalars(a.n_tensors);
  std::vector<RandomKey> keys(a.n_tensors);
  for (int64_t i = 0; i < a.n_tensors; ++i) {
    const AdamWTensor& t = a.tensors[i];
    const AdamWGroup& g = a.groups[t.group];
    const int64_t step = static_cast<int64_t>(a.steps[t.step]);
    scalars[i] = adamw_scalars(a.lr[t.group], g.beta1, g.beta2, g.eps, g.weight_decay, step, factor);
    keys[i] = random_key(a.seed, step, t.step);
  }
  const auto starts = starts_of(a);
  for_blocks(starts, [&](int64_t block) {
    for_pieces(starts, block, [&](int64_t i, int64_t begin, int64_t end) {
      update_piece(a, a.tensors[i], scalars[i], keys[i], begin, end);
    });
  });
}

}  // namespace fastgpt::cpu
