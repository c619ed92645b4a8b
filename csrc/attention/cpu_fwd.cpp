// Forward of attention on the CPU; formulas in fastgpt/ops/attention.py.
//
// A task has some tiles of 64 queries of the heads that share one key head, and packs keys and values once. For each
// tile of keys it computes the scores, their softmax with the largest score so far (Milakov, Gimelshein 2018,
// arXiv:1805.02867) and the sum over values. It skips tiles that no query sees, and such rows of 16 queries in a tile.
#if defined(__clang__)
#pragma clang fp contract(fast)  // no formula here needs a product to be rounded
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast,no-tree-loop-distribute-patterns")
#endif
#include "attention/cpu.h"

namespace fastgpt::cpu {

// State of a tile of 64 queries: the largest score so far, the sum of exponentials shifted by it, and the sum of values
// weighted by them.
struct Softmax {
  alignas(64) float max[kTile];
  alignas(64) float sum[kTile];
  float* out;  // (64, width)
};

// Replaces z (64 keys, 64 queries) by exp(z - max) and updates max and sum.
inline void softmax_tile(const Sight& sight, float* z, int64_t width, Softmax& s) {
  alignas(64) float base[kTile], rescale[kTile];
  memcpy(base, s.max, sizeof base);
  for_groups(sight, [&](int64_t row, int64_t column) {
    const float* x = z + row * kTile + column;
    FASTGPT_SIMD
    for (int64_t n = 0; n < kLanes; ++n) {
      float max = base[column + n];
      FASTGPT_UNROLL
      for (int64_t r = 0; r < kGroup; ++r) max = x[r * kTile + n] > max ? x[r * kTile + n] : max;
      base[column + n] = max;
    }
  });
  FASTGPT_SIMD
  for (int64_t n = 0; n < kTile; ++n) {
    const float max = base[n];
    base[n] = max == -INFINITY ? 0.0f : max;  // no key yet
    rescale[n] = exp_low(s.max[n] - base[n]);
    s.max[n] = max;
  }
  for (int64_t n = 0; n < kTile; ++n) {
    if (rescale[n] == 1.0f || s.sum[n] == 0.0f) continue;
    s.sum[n] *= rescale[n];
    float* row = s.out + n * width;
    FASTGPT_SIMD
    for (int64_t d = 0; d < width; ++d) row[d] *= rescale[n];
  }
  for_groups(sight, [&](int64_t row, int64_t column) {
    float* x = z + row * kTile + column;
    FASTGPT_SIMD
    for (int64_t n = 0; n < kLanes; ++n) {
      const float max = base[column + n];
      float sum = s.sum[column + n];
      FASTGPT_UNROLL
      for (int64_t r = 0; r < kGroup; ++r) {
        x[r * kTile + n] = exp_low(x[r * kTile + n] - max);
        sum += x[r * kTile + n];
      }
      s.sum[column + n] = sum;
    }
  });
}

inline void drop_tile(const Sight& sight, const Dropout& dropout, float* p) {
  for_scores(sight, [&](int64_t row, int64_t column) {
    alignas(64) float factors[kLanes];
    keep_factors(dropout, row, column, factors);
    float* x = p + row * kTile + column;
    FASTGPT_SIMD
    for (int64_t n = 0; n < kLanes; ++n) x[n] *= factors[n];
  });
}

// Memory of one thread.
struct ForwardScratch {
  Scratch memory;
  int64_t width;
  Keys keys;
  float *queries, *z;  // (width, 64), (64, 64)
  Softmax softmax;
  Ranges ranges;
  Sight sight;

  explicit ForwardScratch(const AttentionArgs& a)
      : memory(width_of(a) * kTile * (2 * ceil_div(a.n_keys, kTile) + 2) + kTile * kTile),
        width(width_of(a)),
        keys{a, memory.take(width * kTile * ceil_div(a.n_keys, kTile)),
             memory.take(width * kTile * ceil_div(a.n_keys, kTile)), {0, 0}} {
    queries = memory.take(width * kTile), softmax.out = memory.take(width * kTile);
    z = memory.take(kTile * kTile);
  }
};

inline void store_queries(const AttentionArgs& a, int64_t batch, int64_t head, int64_t query0, ForwardScratch& w) {
  const Softmax& s = w.softmax;
  float inverse[kTile];
  float* lse = a.lse + (batch * a.n_heads + head) * a.n_queries + query0;
  for (int64_t n = 0; n < w.ranges.n; ++n) {
    inverse[n] = s.sum[n] == 0.0f ? 0.0f : 1.0f / s.sum[n];
    lse[n] = s.sum[n] == 0.0f ? -INFINITY : s.max[n] + std::log(s.sum[n]);
  }
  const int64_t offset = batch * a.out_at.batch + query0 * a.out_at.row + head * a.out_at.head;
  unpack(s.out, w.width, w.ranges.n, a.head_dim, inverse, 1.0f, a.dtype, a.out, offset, a.out_at.row);
}

// Processes 64 queries of one head.
template <class Set>
inline void fwd_queries(const AttentionArgs& a, int64_t batch, int64_t head, int64_t query0, ForwardScratch& w) {
  find_ranges(a, batch, query0, w.ranges);
  Softmax& s = w.softmax;
  pack(a.q, a.dtype, batch * a.q_at.batch + query0 * a.q_at.row + head * a.q_at.head, a.q_at.row, {0, w.ranges.n},
       a.head_dim, w.width, s.out);
  transpose(s.out, w.width, w.queries);
  std::fill(s.out, s.out + kTile * w.width, 0.0f);
  std::fill(s.max, s.max + kTile, -INFINITY);
  std::fill(s.sum, s.sum + kTile, 0.0f);
  Dropout dropout = dropout_of(a, batch * a.n_heads + head, query0);
  for (int64_t tile = w.ranges.any.begin / kTile; tile * kTile < w.ranges.any.end; ++tile) {
    const int64_t key0 = tile * kTile;
    if (!look(a, w.ranges, key0, w.sight)) continue;
    const int64_t at = w.keys.need(tile);
    Set::scores(w.keys.k + at, w.width, w.queries, a.head_dim, a.scale, w.sight.queries, w.z);
    if (a.softcap > 0.0f) cap_scores(w.sight, a.softcap, w.z);
    if (!w.sight.whole) mask_scores(w.ranges, w.sight, key0, w.z);
    softmax_tile(w.sight, w.z, w.width, s);
    if (!w.sight.whole) clear_rest(w.sight, w.z);
    dropout.key0 = static_cast<uint32_t>(key0);
    if (a.rng != nullptr) drop_tile(w.sight, dropout, w.z);
    Set::template add<true>(w.z, w.keys.v + at, w.width, w.sight.keys, s.out);
  }
  store_queries(a, batch, head, query0, w);
}

// Returns the number of parts into which the queries of the heads of one key head are cut: enough tasks for many
// threads, but at least four tiles of queries each, so packing their keys costs little in comparison.
inline int64_t fwd_parts(const AttentionArgs& a) {
  const int64_t tiles = ceil_div(a.n_queries, kTile) * (a.n_heads / a.n_kv_heads);
  return max_of(1, min_of(ceil_div(256, a.n_batch * a.n_kv_heads), tiles / 4));
}

template <class Set>
inline void fwd_items(const AttentionArgs& a, Items& items) {
  const int64_t heads = a.n_batch * a.n_kv_heads, group = a.n_heads / a.n_kv_heads, parts = fwd_parts(a);
  const int64_t tiles = ceil_div(a.n_queries, kTile) * group;
  ForwardScratch w(a);
  for (int64_t item; items.take(item);) {
    const int64_t part = parts - 1 - item / heads;  // last queries first, since they see the most keys
    const int64_t batch = item % heads / a.n_kv_heads, kv_head = item % a.n_kv_heads;
    w.keys.start(batch, kv_head, {0, ceil_div(a.n_keys, kTile)});
    for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
      fwd_queries<Set>(a, batch, kv_head * group + tile % group, tile / group * kTile, w);
    }
  }
}

FASTGPT_VERSIONS(fwd_items_of, fwd_items, AttentionArgs)

// ---- launchers ----

void attention_fwd(const AttentionArgs& a, Stream) {
  share(a.n_batch * a.n_kv_heads * fwd_parts(a), [&](Items& items) { fwd_items_of(a, items); });
}

}  // namespace fastgpt::cpu
