// Shared by forward and backward of attention on the CPU: tiles of 64 queries x 64 keys in fp32 scratch, the keys of a
// tile that its queries see, and the distribution of work.
//
// Scores have one row per key and one column per query: the softmax runs across vectors, not within them, and only the
// queries (in backward also dout) must be transposed, once for all keys. Every operand is converted to fp32 in scratch:
// all strides and dtypes cost the same, rows are dense in the cache, and elements outside are 0.
#pragma once
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "attention/mask.h"
#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"

namespace fastgpt::cpu {

constexpr int64_t kTile = 64;   // number of queries, and of keys, in a tile
constexpr int64_t kGroup = 8;   // rows or columns of a tile that are skipped or computed together
constexpr int64_t kGroups = kTile / kGroup;

struct Span {
  int64_t begin, end;
};

// Extends a span to whole vectors of kLanes.
inline Span wide_of(Span s) { return {s.begin / kLanes * kLanes, (s.end + kLanes - 1) / kLanes * kLanes}; }

#if defined(FASTGPT_LEVELS)
#define FASTGPT_SET SetV4
#define FASTGPT_TARGET FASTGPT_V4
#define FASTGPT_LANES 16
#define FASTGPT_ROWS 8
#include "core/cpu/tile_product.h"
#define FASTGPT_SET SetV3
#define FASTGPT_TARGET FASTGPT_V3
#define FASTGPT_LANES 8
#define FASTGPT_ROWS 4
#include "core/cpu/tile_product.h"
#endif
#define FASTGPT_SET SetBase
#define FASTGPT_TARGET
#define FASTGPT_LANES 4
#if defined(__aarch64__)
#define FASTGPT_ROWS 8  // 32 registers
#else
#define FASTGPT_ROWS 4
#endif
#include "core/cpu/tile_product.h"

// ---- scratch ----

// Memory of one thread, uninitialised. Callers take multiples of a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t n_floats) : memory_(new float[n_floats + kLanes]) {
    next_ = memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64) / sizeof(float);
  }
  float* take(int64_t n_floats) {
    float* taken = next_;
    next_ += n_floats;
    return taken;
  }

 private:
  std::unique_ptr<float[]> memory_;
  float* next_;
};

// Returns the columns of a tile of rows: the head dimension, rounded up to whole vectors.
inline int64_t width_of(const AttentionArgs& a) { return ceil_div(a.head_dim, kLanes) * kLanes; }

// Converts rows [rows.begin, rows.end) of 64 rows of x to fp32, (64, width); the other rows and columns are 0.
inline void pack(const void* x, DType dtype, int64_t offset, int64_t row_step, Span rows, int64_t dim, int64_t width,
                 float* tile) {
  with_type(dtype, [&](auto tag) {
    const auto* from = static_cast<const decltype(tag)*>(x) + offset;
    for (int64_t r = 0; r < kTile; ++r) {
      float* row = tile + r * width;
      const bool there = r >= rows.begin && r < rows.end;
      if (there) to_floats(from + r * row_step, row, dim);
      for (int64_t d = there ? dim : 0; d < width; ++d) row[d] = 0.0f;
    }
  });
}

// Stores n rows of a tile, times `factor` or factors[row], rounded to dtype.
inline void unpack(const float* tile, int64_t width, int64_t n, int64_t dim, const float* factors, float factor,
                   DType dtype, void* x, int64_t offset, int64_t row_step) {
  with_type(dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t r = 0; r < n; ++r) {
      const float* row = tile + r * width;
      T* to = static_cast<T*>(x) + offset + r * row_step;
      const float f = factors == nullptr ? factor : factors[r];
      FASTGPT_SIMD
      for (int64_t d = 0; d < dim; ++d) to[d] = from_float<T>(row[d] * f);
    }
  });
}

#if defined(__clang__)
#define FASTGPT_MIX(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define FASTGPT_MIX(a, b, i, j, k, l) __builtin_shuffle(a, b, Picks{i, j, k, l})
#endif

// Transposes (64, width) to (width, 64), in blocks of 4 x 4.
inline void transpose(const float* tile, int64_t width, float* out) {
  typedef float Four __attribute__((vector_size(16)));
  typedef int32_t Picks __attribute__((vector_size(16), unused));
  for (int64_t d = 0; d < width; d += 4) {
    for (int64_t r = 0; r < kTile; r += 4) {
      Four x[4];
      for (int i = 0; i < 4; ++i) memcpy(&x[i], tile + (r + i) * width + d, sizeof x[i]);
      const Four a = FASTGPT_MIX(x[0], x[1], 0, 4, 1, 5), b = FASTGPT_MIX(x[2], x[3], 0, 4, 1, 5);
      const Four c = FASTGPT_MIX(x[0], x[1], 2, 6, 3, 7), e = FASTGPT_MIX(x[2], x[3], 2, 6, 3, 7);
      const Four y[4] = {FASTGPT_MIX(a, b, 0, 1, 4, 5), FASTGPT_MIX(a, b, 2, 3, 6, 7), FASTGPT_MIX(c, e, 0, 1, 4, 5),
                         FASTGPT_MIX(c, e, 2, 3, 6, 7)};
      for (int i = 0; i < 4; ++i) memcpy(out + (d + i) * kTile + r, &y[i], sizeof y[i]);
    }
  }
}

// ---- the keys that queries see ----

// Keys [begin, end) of each of 64 queries, none if begin == end, and their documents if these restrict them further.
struct Ranges {
  int64_t n_keys;
  int64_t n;  // queries that exist; up to the next whole vector, others see the keys of the last one, the rest none
  int64_t begin[kTile], end[kTile];
  Span any, all;  // keys that some query sees, and that all 64 see
  const int32_t* docs;   // of the batch, or null
  int32_t doc[kTile];    // of the queries
  int32_t doc_low, doc_high;
};

// sequence: the packed sequence of an earlier query, advanced to that of this query.
inline Span range_of(const AttentionArgs& a, int64_t batch, int64_t query, int64_t& sequence) {
  while (a.cu_q != nullptr && sequence < a.n_sequences && a.cu_q[sequence + 1] <= query) ++sequence;
  const KeyRange keys = key_range(a, batch, query, sequence);
  return keys.begin < keys.end ? Span{keys.begin, keys.end} : Span{0, 0};
}

inline void find_ranges(const AttentionArgs& a, int64_t batch, int64_t query0, Ranges& r) {
  int64_t sequence = 0;
  if (a.cu_q != nullptr) sequence = std::upper_bound(a.cu_q + 1, a.cu_q + a.n_sequences + 1, query0) - (a.cu_q + 1);
  r.n_keys = a.n_keys, r.n = min_of(kTile, a.n_queries - query0);
  r.docs = a.doc_ids == nullptr ? nullptr : a.doc_ids + batch * a.n_queries;
  r.any = {a.n_keys, 0}, r.all = {0, a.n_keys};
  const int64_t n_lanes = wide_of({0, r.n}).end;
  Span s{0, 0};
  for (int64_t i = 0; i < kTile; ++i) {
    s = i < r.n ? range_of(a, batch, query0 + i, sequence) : i < n_lanes ? s : Span{0, 0};
    r.begin[i] = s.begin, r.end[i] = s.end;
    r.all = {max_of(r.all.begin, s.begin), min_of(r.all.end, s.end)};
    if (s.begin < s.end) r.any = {min_of(r.any.begin, s.begin), max_of(r.any.end, s.end)};
    if (r.docs == nullptr) continue;
    r.doc[i] = r.docs[query0 + min_of(i, r.n - 1)];
    r.doc_low = i == 0 ? r.doc[i] : std::min(r.doc_low, r.doc[i]);
    r.doc_high = i == 0 ? r.doc[i] : std::max(r.doc_high, r.doc[i]);
  }
}

// The same for one tile of keys, relative to its first key.
struct Sight {
  bool whole;                     // every query sees every key
  bool docs;                      // documents must be compared
  int32_t begin[kTile], end[kTile];  // keys of each query
  Span keys[kGroups];             // keys that some query of a group of queries sees
  Span queries[kGroups];          // queries that see some key of a group of keys
};

// Sets s for the tile that begins at key0; returns false if no query sees one of its keys.
inline bool look(const AttentionArgs& a, const Ranges& r, int64_t key0, Sight& s) {
  s.docs = false;
  if (r.docs != nullptr) {
    const auto [low, high] = std::minmax_element(r.docs + key0, r.docs + min_of(key0 + kTile, a.n_keys));
    if (*low > r.doc_high || *high < r.doc_low) return false;
    s.docs = *low != *high || r.doc_low != r.doc_high;
  }
  const bool inside = r.all.begin <= key0 && r.all.end >= key0 + kTile;
  s.whole = inside && !s.docs;
  for (Span& span : s.keys) span = {0, inside ? kTile : 0};
  for (Span& span : s.queries) span = {0, inside ? kTile : 0};
  if (s.whole) return true;
  FASTGPT_SIMD
  for (int64_t i = 0; i < kTile; ++i) {
    s.begin[i] = static_cast<int32_t>(min_of(max_of(r.begin[i] - key0, 0), kTile));
    s.end[i] = static_cast<int32_t>(min_of(max_of(r.end[i] - key0, 0), kTile));
  }
  if (inside) return true;
  bool any = false;
  for (int64_t g = 0; g < kGroups; ++g) {
    Span keys{kTile, 0};
    for (int64_t i = g * kGroup; i < (g + 1) * kGroup; ++i) {
      if (s.begin[i] < s.end[i]) keys = {min_of(keys.begin, s.begin[i]), max_of(keys.end, s.end[i])};
    }
    if (keys.begin >= keys.end) continue;
    s.keys[g] = keys;
    any = true;
    for (int64_t k = keys.begin / kGroup; k < ceil_div(keys.end, kGroup); ++k) {
      const bool first = s.queries[k].end == 0;
      s.queries[k] = {first ? g * kGroup : s.queries[k].begin, (g + 1) * kGroup};
    }
  }
  return any;
}

// Calls fn(row, column) for the columns [column, column + kLanes) of the kGroup rows from `row` on of a tile of scores,
// wherever `scores` wrote to it. fn should keep values that it passes from row to row in registers: through memory,
// each row would wait for the previous one.
template <class F>
inline void for_groups(const Sight& s, const F& fn) {
  for (int64_t g = 0; g < kGroups; ++g) {
    const Span queries = wide_of(s.queries[g]);
    for (int64_t column = queries.begin; column < queries.end; column += kLanes) fn(g * kGroup, column);
  }
}

// Does the same row by row.
template <class F>
inline void for_scores(const Sight& s, const F& fn) {
  for_groups(s, [&](int64_t first, int64_t column) {
    for (int64_t row = first; row < first + kGroup; ++row) fn(row, column);
  });
}

// Sets scores to -inf where a query does not see a key.
inline void mask_scores(const Ranges& r, const Sight& s, int64_t key0, float* z) {
  for_scores(s, [&](int64_t row, int64_t column) {
    const int32_t key = static_cast<int32_t>(row);
    FASTGPT_SIMD
    for (int64_t n = column; n < column + kLanes; ++n) {
      const bool seen = (key >= s.begin[n]) & (key < s.end[n]);
      z[row * kTile + n] = seen ? z[row * kTile + n] : -INFINITY;
    }
    if (!s.docs) return;
    const int32_t doc = r.docs[min_of(key0 + row, r.n_keys - 1)];
    FASTGPT_SIMD
    for (int64_t n = column; n < column + kLanes; ++n) {
      z[row * kTile + n] = doc == r.doc[n] ? z[row * kTile + n] : -INFINITY;
    }
  });
}

// Sets entries to 0 where `scores` did not write.
inline void clear_rest(const Sight& s, float* p) {
  for (int64_t g = 0; g < kGroups; ++g) {
    const Span queries = wide_of(s.queries[g]);
    for (int64_t row = g * kGroup; row < (g + 1) * kGroup; ++row) {
      std::fill(p + row * kTile, p + row * kTile + queries.begin, 0.0f);
      std::fill(p + row * kTile + std::max(queries.begin, queries.end), p + (row + 1) * kTile, 0.0f);
    }
  }
}

inline void cap_scores(const Sight& s, float softcap, float* z) {
  const float inv_softcap = 1.0f / softcap;
  for_scores(s, [&](int64_t row, int64_t column) {
    float* x = z + row * kTile + column;
    FASTGPT_SIMD
    for (int64_t n = 0; n < kLanes; ++n) x[n] = softcap_f(x[n], softcap, inv_softcap);
  });
}

// ---- dropout ----

// The counters and keys of the random words of a tile in one head.
struct Dropout {
  uint32_t seed_low, seed_high, offset, head, query0, key0;
  uint32_t drop_below;
  float keep_scale;
};

inline Dropout dropout_of(const AttentionArgs& a, int64_t batch_head, int64_t query0) {
  Dropout d{};
  if (a.rng == nullptr) return d;
  const uint64_t seed = static_cast<uint64_t>(a.rng[0]);
  d.seed_low = static_cast<uint32_t>(seed), d.seed_high = static_cast<uint32_t>(seed >> 32);
  d.offset = static_cast<uint32_t>(a.rng[1]), d.head = static_cast<uint32_t>(batch_head);
  d.query0 = static_cast<uint32_t>(query0);
  d.drop_below = a.drop_below, d.keep_scale = a.keep_scale;
  return d;
}

// Stores the factors by which dropout multiplies kLanes entries of a row of scores.
inline void keep_factors(const Dropout& d, int64_t row, int64_t column, float* factors) {
  const uint32_t key = d.key0 + static_cast<uint32_t>(row), query = d.query0 + static_cast<uint32_t>(column);
  FASTGPT_SIMD
  for (int64_t n = 0; n < kLanes; ++n) {
    const uint32_t word =
        philox_first(key, query + static_cast<uint32_t>(n), d.head, d.offset, d.seed_low, d.seed_high);
    factors[n] = word >= d.drop_below ? d.keep_scale : 0.0f;
  }
}

// ---- work ----

// Hands out items [0, n) one by one, since causal items differ in size. No result depends on which thread gets an item.
class Items {
 public:
  explicit Items(int64_t n) : n_(n) {}
  bool take(int64_t& item) {
    item = next_.fetch_add(1, std::memory_order_relaxed);
    return item < n_;
  }

 private:
  std::atomic<int64_t> next_{0};
  int64_t n_;
};

template <class Work>
inline void share(int64_t n_items, const Work& work) {
  Items items(n_items);
  parallel_for(n_items, 1, [&](int64_t, int64_t) { work(items); });
}

// Defines name(args, items), which calls of<Set>(args, items) for the best set that this CPU supports.
#if defined(FASTGPT_LEVELS)
#define FASTGPT_VERSIONS(name, of, Args)                                                                 \
  FASTGPT_FLAT FASTGPT_V4 static void name##_v4(const Args& a, Items& items) { of<SetV4>(a, items); }    \
  FASTGPT_FLAT FASTGPT_V3 static void name##_v3(const Args& a, Items& items) { of<SetV3>(a, items); }    \
  FASTGPT_FLAT static void name##_base(const Args& a, Items& items) { of<SetBase>(a, items); }           \
  static void name(const Args& a, Items& items) {                                                        \
    return level() == 4 ? name##_v4(a, items) : level() == 3 ? name##_v3(a, items) : name##_base(a, items); \
  }
#else
#define FASTGPT_VERSIONS(name, of, Args) \
  FASTGPT_FLAT static void name(const Args& a, Items& items) { of<SetBase>(a, items); }
#endif

// ---- keys and values ----

// Keys and values of a head in the tiles [tiles.begin, tiles.end), as rows in fp32; each tile is packed on first use.
struct Keys {
  const AttentionArgs& a;
  float *k = nullptr, *v = nullptr;  // (tiles * 64, width)
  Span tiles{0, 0};
  int64_t batch = 0, head = 0;
  Span valid{0, 0};  // keys of the batch; others may be uninitialised
  std::vector<uint8_t> packed{};

  void start(int64_t new_batch, int64_t new_head, Span new_tiles) {
    batch = new_batch, head = new_head, tiles = new_tiles;
    valid = {0, a.n_keys};
    if (a.kv_start != nullptr) valid.begin = max_of(a.kv_start[batch], 0);
    if (a.kv_lens != nullptr) valid.end = min_of(a.kv_lens[batch], a.n_keys);
    if (a.cu_k != nullptr) valid.end = min_of(a.cu_k[a.n_sequences], a.n_keys);
    packed.assign(tiles.end - tiles.begin, 0);
  }

  // Packs the tile if needed and returns its offset in k and v.
  int64_t need(int64_t tile) {
    const int64_t width = width_of(a), at = (tile - tiles.begin) * kTile * width, key0 = tile * kTile;
    if (packed[tile - tiles.begin]) return at;
    packed[tile - tiles.begin] = 1;
    const Span rows = {valid.begin - key0, valid.end - key0};
    const auto offset = [&](const AttentionStrides& s) { return batch * s.batch + key0 * s.row + head * s.head; };
    pack(a.k, a.dtype, offset(a.k_at), a.k_at.row, rows, a.head_dim, width, k + at);
    pack(a.v, a.dtype, offset(a.v_at), a.v_at.row, rows, a.head_dim, width, v + at);
    return at;
  }
};

}  // namespace fastgpt::cpu
