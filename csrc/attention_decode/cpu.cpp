// Attention of a few queries over a long cache on the CPU; formulas in fastgpt/ops/attention_decode.py.
//
// A task is one key head of one batch and kSplit keys, whatever the number of threads. It goes through tiles of kTile
// keys: scores of all queries that share the head, online softmax, the sum over values. Keys and values in fp32 are read
// where they are; others are converted to fp32, once per tile. A second pass adds the splits of a head. Tiles have the
// same keys and sums the same order with pages as without.
#if defined(__clang__)
#pragma clang fp contract(fast)  // no formula here needs a product to be rounded
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast,no-tree-loop-distribute-patterns")
#endif
#include <algorithm>
#include <memory>

#include "attention/mask.h"
#include "attention_decode/op.h"
#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"

namespace fastgpt::cpu {
namespace {

constexpr int64_t kSplit = 512, kTile = 64;
constexpr int64_t kGrain = 131072;  // products that a task has at least: fewer cost more to schedule
constexpr int64_t kGroup = 16;  // rows that are added before their sum is added to others; divides kTile
constexpr int64_t kAhead = 8;   // rows between the one that is read and the one that is prefetched

// Adds kLanes parts by halves.
FASTGPT_INLINE float sum_parts(const float* parts) {
  float eight[8], four[4];
  FASTGPT_SIMD
  for (int i = 0; i < 8; ++i) eight[i] = parts[i] + parts[i + 8];
  FASTGPT_SIMD
  for (int i = 0; i < 4; ++i) four[i] = eight[i] + eight[i + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// n rows of one group, and the first to prefetch: distances of `row` and `ahead` from some address.
struct Run {
  int64_t row, ahead, n;
  bool ends_group;
};

// Runs [runs, last) of rows that are `step` apart, by their distances from x.
struct Rows {
  const float* x;
  const Run *runs, *last;
  int64_t step;
};

#if defined(FASTGPT_LEVELS)
#define FASTGPT_SET DecodeV4
#define FASTGPT_TARGET FASTGPT_V4
#define FASTGPT_LANES 16
#include "attention_decode/cpu_set.h"
#define FASTGPT_SET DecodeV3
#define FASTGPT_TARGET FASTGPT_V3
#define FASTGPT_LANES 8
#include "attention_decode/cpu_set.h"
#endif
#define FASTGPT_SET DecodeBase
#define FASTGPT_TARGET
#define FASTGPT_LANES 4
#include "attention_decode/cpu_set.h"

// Sizes of a call. A row is a query of a head: number t group + g of the T x group rows of a key head. A part has the
// sums of a row: `width` columns, then the largest score and the sum of powers.
struct Sizes {
  int64_t group, n_rows, width, heads, splits, part;

  explicit Sizes(const DecodeArgs& a)
      : group(a.n_heads / a.n_kv_heads),
        n_rows(a.n_queries * group),
        width(ceil_div(a.head_dim, kLanes) * kLanes),
        heads(a.n_batch * a.n_kv_heads),
        splits(max_of(1, ceil_div(a.n_keys, kSplit))),
        part(width + kLanes) {}
};

// Memory of a task: the queries of a head, a tile of keys or values in fp32, and for each row kTile scores and the factor
// of its earlier sums; the runs of a tile.
struct DecodeScratch {
  std::unique_ptr<float[]> memory;
  float *q, *rows, *z, *shrink;
  Run runs[kTile];

  explicit DecodeScratch(const Sizes& s)
      : memory(new float[(s.n_rows + kTile) * s.width + s.n_rows * (kTile + 1) + 2 * kLanes]) {
    q = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) / sizeof(float);
    rows = q + s.n_rows * s.width, z = rows + kTile * s.width, shrink = z + s.n_rows * kTile;
  }
};

// Converts n rows of x to fp32; columns from dim on are 0.
template <class T>
inline void widen_rows(const T* x, int64_t step, int64_t n, int64_t dim, int64_t width, float* out) {
  for (int64_t r = 0; r < n; ++r) {
    to_floats(x + r * step, out + r * width, dim);
    for (int64_t d = dim; d < width; ++d) out[r * width + d] = 0.0f;
  }
}

// The keys or the values of a head of one batch.
template <class T>
struct HeadRows {
  const T* x;
  int64_t step, page;  // distances between rows and, with `pages`, between pages
  const int32_t* pages;
  int bits;

  // Returns the distance of a row from x.
  FASTGPT_INLINE int64_t at(int64_t key) const {
    if (pages == nullptr) return key * step;
    return pages[key >> bits] * page + (key & ((int64_t{1} << bits) - 1)) * step;
  }

  // Returns how many rows from `key` on are `step` apart.
  FASTGPT_INLINE int64_t even(int64_t key) const {
    return pages == nullptr ? INT64_MAX : (((key >> bits) + 1) << bits) - key;
  }
};

// Returns n rows of keys or values from `first` on, in place if possible. Rows from `end` on are not read. known: the end
// of the runs in w.runs if they are right for these rows, too; else null.
template <class T>
inline Rows rows_of(const HeadRows<T>& x, int64_t first, int64_t n, int64_t end, int64_t dim, int64_t width,
                    const Run* known, DecodeScratch& w) {
  Run* run = w.runs;
  if constexpr (sizeof(T) == 4) {
    if (dim == width) {
      if (known != nullptr) return {x.x, w.runs, known, x.step};
      for (int64_t i = 0; i < n; ++run) {
        const int64_t key = first + i, ahead = x.pages == nullptr || key + kAhead < end ? key + kAhead : key;
        const int64_t left = min_of(kGroup - i % kGroup, n - i), count = min_of(left, min_of(x.even(key), x.even(ahead)));
        *run = {x.at(key), x.at(ahead), count, count == left};
        i += count;
      }
      return {x.x, w.runs, run, x.step};
    }
  }
  for (int64_t i = 0; i < n;) {
    const int64_t count = min_of(n - i, x.even(first + i));
    widen_rows(x.x + x.at(first + i), x.step, count, dim, width, w.rows + i * width);
    i += count;
  }
  for (int64_t i = 0; i < n; i += kGroup, ++run) {
    *run = {i * width, (i + kAhead) * width, min_of(kGroup, n - i), true};
  }
  return {w.rows, w.runs, run, width};
}

// Returns the rows of the keys or values x of a batch and a head.
template <class T>
inline HeadRows<T> head_rows(const DecodeArgs& a, const void* x, const AttentionStrides& at, int64_t batch,
                             int64_t kv_head) {
  const T* first = static_cast<const T*>(x) + kv_head * at.head;
  if (a.pages == nullptr) return {first + batch * at.batch, at.row, 0, nullptr, 0};
  return {first, at.row, at.batch, a.pages + batch * (a.n_keys >> a.page_bits), a.page_bits};
}

// Returns whether the keys [low, high) of a row are in pages of the pool.
template <class T>
inline bool in_pool(const DecodeArgs& a, const HeadRows<T>& x, int64_t low, int64_t high) {
  if (x.pages == nullptr || low >= high) return true;
  const int32_t *first = x.pages + (low >> x.bits), *last = x.pages + ((high - 1) >> x.bits);
  return std::all_of(first, last + 1, [&](int32_t page) { return page >= 0 && page < a.n_pages; });
}

// Computes the powers of n scores z and returns their factor for the earlier sums. The keys [begin, end) are seen. z has
// whole vectors; what follows the scores becomes 0.
inline float softmax(const DecodeArgs& a, float* z, int64_t n, int64_t begin, int64_t end, float& top, float& total) {
  const int64_t whole = ceil_div(n, kLanes) * kLanes;
  FASTGPT_SIMD
  for (int64_t i = 0; i < n; ++i) z[i] *= a.scale;
  if (a.softcap > 0.0f) {
    const float inverse = 1.0f / a.softcap;
    FASTGPT_SIMD
    for (int64_t i = 0; i < n; ++i) z[i] = softcap_f(z[i], a.softcap, inverse);
  }
  for (int64_t i = 0; i < begin; ++i) z[i] = -INFINITY;
  for (int64_t i = end; i < whole; ++i) z[i] = -INFINITY;
  float most = top;
  FASTGPT_MAX(most)
  for (int64_t i = 0; i < whole; ++i) most = z[i] > most ? z[i] : most;
  const float base = most == -INFINITY ? 0.0f : most;  // no key yet
  alignas(64) float sums[kLanes] = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    FASTGPT_SIMD
    for (int64_t l = 0; l < kLanes; ++l) {
      z[i + l] = exp_low(z[i + l] - base);
      sums[l] += z[i + l];
    }
  }
  const float shrink = exp_low(top - base);
  top = most, total = total * shrink + sum_parts(sums);
  return shrink;
}

// Stores the sums of a row, divided by their total.
template <class T>
inline void store_row(const DecodeArgs& a, const Sizes& s, int64_t head, int64_t row, const float* sums,
                      float total) {
  const int64_t batch = head / a.n_kv_heads, first = head % a.n_kv_heads * s.group, query = row / s.group;
  T* out = static_cast<T*>(a.out) + ((batch * a.n_queries + query) * a.n_heads + first + row % s.group) * a.head_dim;
  const float divisor = total == 0.0f ? 1.0f : total;  // the sums of a row without keys are 0
  FASTGPT_SIMD
  for (int64_t d = 0; d < a.head_dim; ++d) out[d] = from_float<T>(sums[d] / divisor);
}

// Returns the keys of a split that any query of a batch sees; none if begin >= end.
inline KeyRange seen_keys(const DecodeArgs& a, int64_t batch, int64_t split) {
  KeyRange seen{(split + 1) * kSplit, split * kSplit};
  for (int64_t t = 0; t < a.n_queries; ++t) {
    const KeyRange keys = key_range(a, batch, t, 0);
    if (keys.begin >= keys.end) continue;
    seen.begin = min_of(seen.begin, max_of(keys.begin, split * kSplit));
    seen.end = max_of(seen.end, min_of(keys.end, (split + 1) * kSplit));
  }
  return seen;
}

// Computes the part of each row of a head for the keys of a split: parts (n_rows, splits, part).
template <class Set, class T>
inline void split_of(const DecodeArgs& a, const Sizes& s, int64_t item, DecodeScratch& w, float* parts) {
  const int64_t head = item / s.splits, split = item % s.splits;
  const int64_t batch = head / a.n_kv_heads, kv_head = head % a.n_kv_heads;
  const KeyRange seen = seen_keys(a, batch, split);
  const HeadRows<T> k = head_rows<T>(a, a.k, a.k_at, batch, kv_head), v = head_rows<T>(a, a.v, a.v_at, batch, kv_head);
  const bool alike = k.step == v.step && k.page == v.page;
  const bool readable = in_pool(a, k, seen.begin, seen.end);
  for (int64_t r = 0; r < s.n_rows; ++r) {
    const int64_t at = batch * a.q_at.batch + r / s.group * a.q_at.row + (kv_head * s.group + r % s.group) * a.q_at.head;
    if (seen.begin < seen.end) widen_rows(static_cast<const T*>(a.q) + at, 0, 1, a.head_dim, s.width, w.q + r * s.width);
    float* part = parts + r * s.splits * s.part;
    std::fill(part, part + s.width, 0.0f);
    part[s.width] = -INFINITY, part[s.width + 1] = readable ? 0.0f : NAN;
  }
  if (!readable) return;
  for (int64_t key = seen.begin, n; key < seen.end; key += n) {
    n = min_of(kTile - key % kTile, seen.end - key);  // whole tiles start at whole groups of a page
    Rows rows = rows_of(k, key, n, seen.end, a.head_dim, s.width, nullptr, w);
    for (int64_t r = 0; r < s.n_rows; ++r) {
      const KeyRange keys = key_range(a, batch, r / s.group, 0);
      const int64_t begin = min_of(n, max_of(keys.begin - key, 0)), end = max_of(begin, min_of(n, keys.end - key));
      float *z = w.z + r * kTile, *part = parts + r * s.splits * s.part;
      Set::products(w.q + r * s.width, rows, s.width, z);
      w.shrink[r] = softmax(a, z, n, begin, end, part[s.width], part[s.width + 1]);
    }
    rows = rows_of(v, key, n, seen.end, a.head_dim, s.width, alike ? rows.last : nullptr, w);
    for (int64_t r = 0; r < s.n_rows; ++r) {
      Set::add(w.z + r * kTile, rows, s.width, w.shrink[r], parts + r * s.splits * s.part);
    }
  }
}

// Adds the splits of the rows [begin, end) among heads x n_rows.
template <class T>
inline void add_splits(const DecodeArgs& a, const Sizes& s, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float* parts = a.workspace + row * s.splits * s.part;
    float top = -INFINITY, total = 0.0f;
    for (int64_t i = 0; i < s.splits; ++i) top = std::max(top, parts[i * s.part + s.width]);
    const float base = top == -INFINITY ? 0.0f : top;
    for (int64_t i = 0; i < s.splits; ++i) {
      const float* part = parts + i * s.part;
      const float factor = exp_low(part[s.width] - base);
      total += factor * part[s.width + 1];
      FASTGPT_SIMD
      for (int64_t d = 0; d < s.width; ++d) parts[d] = (i == 0 ? 0.0f : parts[d]) + factor * part[d];
    }
    store_row<T>(a, s, row / s.n_rows, row % s.n_rows, parts, total);
  }
}

template <class Set>
inline void splits_of(const DecodeArgs& a, int64_t begin, int64_t end) {
  const Sizes s(a);
  DecodeScratch w(s);
  for (int64_t item = begin; item < end; ++item) {
    float* parts = a.workspace + (item / s.splits * s.n_rows * s.splits + item % s.splits) * s.part;
    with_type(a.dtype, [&](auto tag) {
      split_of<Set, decltype(tag)>(a, s, item, w, parts);
      if (s.splits == 1) add_splits<decltype(tag)>(a, s, item * s.n_rows, (item + 1) * s.n_rows);
    });
  }
}

#if defined(FASTGPT_LEVELS)
FASTGPT_FLAT FASTGPT_V4 void splits_v4(const DecodeArgs& a, int64_t begin, int64_t end) {
  splits_of<DecodeV4>(a, begin, end);
}
FASTGPT_FLAT FASTGPT_V3 void splits_v3(const DecodeArgs& a, int64_t begin, int64_t end) {
  splits_of<DecodeV3>(a, begin, end);
}
#endif
FASTGPT_FLAT void splits_base(const DecodeArgs& a, int64_t begin, int64_t end) {
  splits_of<DecodeBase>(a, begin, end);
}

FASTGPT_CLONES void add_rows(const DecodeArgs& a, int64_t begin, int64_t end) {
  const Sizes s(a);
  with_type(a.dtype, [&](auto tag) { add_splits<decltype(tag)>(a, s, begin, end); });
}

}  // namespace

// ---- launchers ----

int64_t attention_decode_workspace(const DecodeArgs& a, Stream) {
  const Sizes s(a);
  return s.heads * s.n_rows * s.splits * s.part;
}

void attention_decode_fwd(const DecodeArgs& a, Stream) {
  const Sizes s(a);
  const int64_t keys = min_of(a.n_keys, kSplit);
  const int64_t grain = max_of(1, kGrain / max_of(1, 2 * keys * s.width * s.n_rows));
  parallel_for(s.heads * s.splits, grain, [&](int64_t begin, int64_t end) {
#if defined(FASTGPT_LEVELS)
    if (level() == 4) return splits_v4(a, begin, end);
    if (level() == 3) return splits_v3(a, begin, end);
#endif
    splits_base(a, begin, end);
  });
  if (s.splits == 1) return;
  parallel_for(s.heads * s.n_rows, row_grain(s.splits * s.width),
               [&](int64_t begin, int64_t end) { add_rows(a, begin, end); });
}

}  // namespace fastgpt::cpu
