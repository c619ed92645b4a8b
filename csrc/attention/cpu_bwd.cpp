// Backward of attention on the CPU; formulas in fastgpt/ops/attention.py.
//
// A task computes the gradients of the keys and values of one key head. It processes the queries that see them, head by
// head, 64 x 64 entries at a time (FlashAttention-2, arXiv:2307.08691): it recomputes probabilities from lse, then
// computes five products in scratch. If there are too few key heads for many threads, their keys are cut into chunks;
// each chunk then has a separate dq, and these are added in order at the end. The chunks depend on the shape alone, so
// results are bitwise the same for any number of threads.
#if defined(__clang__)
#pragma clang fp contract(fast)  // no formula here needs a product to be rounded
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast,no-tree-loop-distribute-patterns")
#endif
#include <type_traits>

#include "attention/cpu.h"

namespace fastgpt::cpu {

// How the keys of a head are cut.
struct Chunks {
  int64_t n, tiles;  // number of chunks, and of tiles in all of them
  Span tiles_of(int64_t chunk) const { return {tiles * chunk / n, tiles * (chunk + 1) / n}; }
};

// Chooses enough tasks for many threads, but chunks of at least four tiles and at most 64 Mi floats of dq.
inline Chunks chunks_of(const AttentionArgs& a) {
  const int64_t tiles = ceil_div(a.n_keys, kTile);
  const int64_t room = (int64_t{64} << 20) / max_of(1, a.n_batch * a.n_queries * a.n_heads * a.head_dim);
  const int64_t n = min_of(min_of(ceil_div(32, a.n_batch * a.n_kv_heads), tiles / 4), room);
  return {max_of(n, 1), tiles};
}

struct BackwardArgs {
  AttentionArgs a;
  Chunks chunks;
  float* dq_parts;  // (chunks, B, T, H, D) if there is more than one chunk
};

// Memory of one thread.
struct BackwardScratch {
  Scratch memory;
  int64_t width;
  Keys keys;
  float *dk, *dv;                             // like keys.k
  float *q, *dout, *dq;                       // (64, width)
  float *q_across, *dout_across, *out_across;  // (width, 64)
  float *p, *dz;                              // (64 keys, 64 queries)
  alignas(64) float lse[kTile];
  alignas(64) float delta[kTile];  // rowsum(dout out) - dlse
  float dlse[kTile];
  Ranges ranges;
  Sight sight;

  BackwardScratch(const AttentionArgs& a, int64_t tiles)
      : memory(width_of(a) * kTile * (4 * tiles + 6) + 2 * kTile * kTile), width(width_of(a)), keys{a} {
    for (float** x : {&keys.k, &keys.v, &dk, &dv}) *x = memory.take(width * kTile * tiles);
    for (float** x : {&q, &dout, &dq, &q_across, &dout_across, &out_across}) *x = memory.take(width * kTile);
    for (float** x : {&p, &dz}) *x = memory.take(kTile * kTile);
  }
};

// Loads q, dout, lse and delta of 64 queries of one head.
inline void load_queries(const AttentionArgs& a, int64_t batch, int64_t head, int64_t query0, BackwardScratch& w) {
  const Span rows{0, w.ranges.n};
  const int64_t at = (batch * a.n_heads + head) * a.n_queries + query0;
  const auto load = [&](const void* x, const AttentionStrides& s, float* tile, float* across) {
    pack(x, a.dtype, batch * s.batch + query0 * s.row + head * s.head, s.row, rows, a.head_dim, w.width, tile);
    for (int64_t n = 0; n < w.ranges.n; ++n) {  // a query without keys may be uninitialised
      if (a.lse[at + n] == -INFINITY) std::fill(tile + n * w.width, tile + (n + 1) * w.width, 0.0f);
    }
    transpose(tile, w.width, across);
  };
  load(a.q, a.q_at, w.q, w.q_across);
  load(a.dout, a.dout_at, w.dout, w.dout_across);
  load(a.out, a.out_at, w.dq, w.out_across);
  std::fill(w.delta, w.delta + kTile, 0.0f);
  // in the order in which `scores` sums dout v^T: if out is v of one key, their difference is 0
  for (int64_t d = 0; d < a.head_dim; ++d) {
    const float *dout = w.dout_across + d * kTile, *out = w.out_across + d * kTile;
    FASTGPT_SIMD
    for (int64_t n = 0; n < kTile; ++n) w.delta[n] += dout[n] * out[n];
  }
  for (int64_t n = 0; n < kTile; ++n) {
    const bool some = n < w.ranges.n && a.lse[at + n] != -INFINITY;
    w.lse[n] = some ? a.lse[at + n] : 0.0f;
    w.dlse[n] = n < w.ranges.n && a.dlse != nullptr ? a.dlse[at + n] : 0.0f;
    w.delta[n] -= w.dlse[n];
  }
}

// Replaces z in p and dout v^T in dz by keep p and dz, in units of 1 / scale. Ready: sum_own was called before.
template <bool Softcap, bool Dropped, bool Ready>
inline void grad_scores(const BackwardScratch& w, const Dropout& dropout, float softcap) {
  const float inv_softcap = Softcap ? 1.0f / softcap : 0.0f;
  for_scores(w.sight, [&](int64_t row, int64_t column) {
    alignas(64) float keep[kLanes];
    if (Dropped) keep_factors(dropout, row, column, keep);
    float *p = w.p + row * kTile + column, *dz = w.dz + row * kTile + column;
    const float *lse = w.lse + column, *delta = w.delta + column;
    FASTGPT_SIMD
    for (int64_t n = 0; n < kLanes; ++n) {
      const float k = Dropped ? keep[n] : 1.0f;
      const float e = Ready && !Softcap ? p[n] : exp_low(p[n] - lse[n]), g = Ready ? dz[n] : k * dz[n];
      const float slope = Softcap ? at_least(softcap_slope(p[n], inv_softcap), 0.0f) : 1.0f;  // masked scores are -inf
      dz[n] = e * (g - delta[n]) * slope;
      p[n] = k * e;
    }
  });
}

// For queries whose keys are all in this tile, computes delta = sum p keep dout v^T from this tile. With few keys the
// gradients nearly cancel, and delta from `out` would leave the rounding of `out`. p has the rounding error of lse,
// many units for scores of hundreds; delta is divided by the sum of p to remove it. Replaces dout v^T in dz by keep
// dout v^T and z in p by p, unless the slope of the softcap needs z later.
inline bool sum_own(BackwardScratch& w, const Dropout& dropout, int64_t key0, bool dropped, bool softcap) {
  alignas(64) float sum[kTile] = {}, total[kTile] = {};
  bool some = false;
  for (int64_t n = 0; n < w.ranges.n; ++n) some |= w.ranges.begin[n] >= key0 && w.ranges.end[n] <= key0 + kTile;
  if (!some) return false;
  for_scores(w.sight, [&](int64_t row, int64_t column) {
    alignas(64) float keep[kLanes];
    if (dropped) keep_factors(dropout, row, column, keep);
    float *p = w.p + row * kTile + column, *dz = w.dz + row * kTile + column;
    FASTGPT_SIMD
    for (int64_t n = 0; n < kLanes; ++n) {
      const float e = exp_low(p[n] - w.lse[column + n]);
      dz[n] *= dropped ? keep[n] : 1.0f;
      sum[column + n] += e * dz[n];
      total[column + n] += e;
      p[n] = softcap ? p[n] : e;
    }
  });
  for (int64_t n = 0; n < w.ranges.n; ++n) {
    if (w.ranges.begin[n] < key0 || w.ranges.end[n] > key0 + kTile) continue;
    w.delta[n] = (total[n] > 0.0f ? sum[n] / total[n] : 0.0f) - w.dlse[n];
  }
  return true;
}

constexpr std::true_type yes;
constexpr std::false_type no;

inline void grad_tile(const AttentionArgs& a, BackwardScratch& w, int64_t key0, const Dropout& dropout) {
  const bool dropped = a.rng != nullptr, softcap = a.softcap > 0.0f;
  if (softcap) cap_scores(w.sight, a.softcap, w.p);
  if (!w.sight.whole) mask_scores(w.ranges, w.sight, key0, w.p);
  const auto grad = [&](auto cap, auto drop, auto ready) { grad_scores<cap(), drop(), ready()>(w, dropout, a.softcap); };
  const auto pick = [&](auto cap, auto ready) { dropped ? grad(cap, yes, ready) : grad(cap, no, ready); };
  if (sum_own(w, dropout, key0, dropped, softcap)) {
    softcap ? pick(yes, yes) : pick(no, yes);
  } else {
    softcap ? pick(yes, no) : pick(no, no);
  }
  if (w.sight.whole) return;
  clear_rest(w.sight, w.p);
  clear_rest(w.sight, w.dz);
}

// Processes 64 queries of one head with the keys of this task: computes their dq and adds to dk and dv.
template <class Set>
inline void bwd_queries(const AttentionArgs& a, int64_t batch, int64_t head, int64_t query0, BackwardScratch& w) {
  const int64_t begin = max_of(w.keys.tiles.begin, w.ranges.any.begin / kTile);
  const int64_t end = min_of(w.keys.tiles.end, ceil_div(w.ranges.any.end, kTile));
  if (begin < end) load_queries(a, batch, head, query0, w);
  std::fill(w.dq, w.dq + kTile * w.width, 0.0f);
  Dropout dropout = dropout_of(a, batch * a.n_heads + head, query0);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t key0 = tile * kTile;
    if (!look(a, w.ranges, key0, w.sight)) continue;
    const int64_t at = w.keys.need(tile), width = w.width;
    Set::scores(w.keys.k + at, width, w.q_across, a.head_dim, a.scale, w.sight.queries, w.p);
    Set::scores(w.keys.v + at, width, w.dout_across, a.head_dim, 1.0f, w.sight.queries, w.dz);
    dropout.key0 = static_cast<uint32_t>(key0);
    grad_tile(a, w, key0, dropout);
    Set::template add<false>(w.p, w.dout, width, w.sight.queries, w.dv + at);
    Set::template add<false>(w.dz, w.q, width, w.sight.queries, w.dk + at);
    Set::template add<true>(w.dz, w.keys.k + at, width, w.sight.keys, w.dq);
  }
}

template <class Set>
inline void bwd_items(const BackwardArgs& args, Items& items) {
  const AttentionArgs& a = args.a;
  const int64_t heads = a.n_batch * a.n_kv_heads, group = a.n_heads / a.n_kv_heads;
  BackwardScratch w(a, ceil_div(args.chunks.tiles, args.chunks.n));
  for (int64_t item; items.take(item);) {
    const int64_t chunk = item / heads, batch = item % heads / a.n_kv_heads, kv_head = item % a.n_kv_heads;
    const Span tiles = args.chunks.tiles_of(chunk);
    const int64_t size = (tiles.end - tiles.begin) * kTile * w.width;
    w.keys.start(batch, kv_head, tiles);
    std::fill(w.dk, w.dk + size, 0.0f);
    std::fill(w.dv, w.dv + size, 0.0f);
    for (int64_t query0 = 0; query0 < a.n_queries; query0 += kTile) {
      find_ranges(a, batch, query0, w.ranges);
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        bwd_queries<Set>(a, batch, head, query0, w);
        if (args.dq_parts == nullptr) {
          unpack(w.dq, w.width, w.ranges.n, a.head_dim, nullptr, a.scale, a.dtype, a.dq,
                 batch * a.dq_at.batch + query0 * a.dq_at.row + head * a.dq_at.head, a.dq_at.row);
        } else {
          const int64_t row = (chunk * a.n_batch + batch) * a.n_queries + query0;
          unpack(w.dq, w.width, w.ranges.n, a.head_dim, nullptr, a.scale, DType::f32, args.dq_parts,
                 (row * a.n_heads + head) * a.head_dim, a.n_heads * a.head_dim);
        }
      }
    }
    const int64_t key0 = tiles.begin * kTile, n = min_of(tiles.end * kTile, a.n_keys) - key0;
    unpack(w.dk, w.width, n, a.head_dim, nullptr, a.scale, a.dtype, a.dk,
           batch * a.dk_at.batch + key0 * a.dk_at.row + kv_head * a.dk_at.head, a.dk_at.row);
    unpack(w.dv, w.width, n, a.head_dim, nullptr, 1.0f, a.dtype, a.dv,
           batch * a.dv_at.batch + key0 * a.dv_at.row + kv_head * a.dv_at.head, a.dv_at.row);
  }
}

FASTGPT_VERSIONS(bwd_items_of, bwd_items, BackwardArgs)

// Sums dq of rows [begin, end) of B T H over the chunks, in order.
FASTGPT_CLONES static void add_parts(const BackwardArgs& args, int64_t begin, int64_t end) {
  const AttentionArgs& a = args.a;
  const int64_t size = a.n_batch * a.n_queries * a.n_heads * a.head_dim;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i % a.n_heads, query = i / a.n_heads % a.n_queries, batch = i / a.n_heads / a.n_queries;
    float* sum = args.dq_parts + i * a.head_dim;
    for (int64_t chunk = 1; chunk < args.chunks.n; ++chunk) {
      const float* part = sum + chunk * size;
      FASTGPT_SIMD
      for (int64_t d = 0; d < a.head_dim; ++d) sum[d] += part[d];
    }
    with_type(a.dtype, [&](auto tag) {
      auto* dq = static_cast<decltype(tag)*>(a.dq) + batch * a.dq_at.batch + query * a.dq_at.row + head * a.dq_at.head;
      from_floats(sum, dq, a.head_dim);
    });
  }
}

// ---- launchers ----

int64_t attention_bwd_workspace(int64_t, int64_t, int64_t, Stream) { return 0; }  // each thread allocates its scratch

void attention_bwd(const AttentionArgs& a, Stream) {
  BackwardArgs args{a, chunks_of(a), nullptr};
  const int64_t n_rows = a.n_batch * a.n_queries * a.n_heads;
  std::unique_ptr<float[]> parts;
  if (args.chunks.n > 1) parts.reset(new float[args.chunks.n * n_rows * a.head_dim]);
  args.dq_parts = parts.get();
  share(a.n_batch * a.n_kv_heads * args.chunks.n, [&](Items& items) { bwd_items_of(args, items); });
  if (args.chunks.n > 1) {
    parallel_for(n_rows, row_grain(a.head_dim * args.chunks.n),
                 [&](int64_t begin, int64_t end) { add_parts(args, begin, end); });
  }
}

}  // namespace fastgpt::cpu
