// Attention, forward, with the instructions of sm_90a (FlashAttention-3, arXiv:2407.08608): causal order or none, grouped
// heads, head dimensions of 64 and 128, 16 bits. Formulas in fastgpt/ops/attention.py; other options: cuda_fwd.cu.
//
// It has not run on a device. tests/cuda_on_cpu runs it on the host, and checks descriptors, barriers and copies there.
//
// How: a block has 128 queries of one head. One thread of the first warpgroup, the producer, loads queries, and keys and
// values in tiles of 128, by TMA into two stages each; the other two warpgroups have 64 queries each. Keys come from the
// last to the first, so masked tiles come first and the loop over whole tiles has no mask. Scores and the sum over
// values are products of warpgroups (wgmma); probabilities are their first operand in registers.
//
// Overlap: a warpgroup issues the scores of the next keys and the sum over the present values together, and computes
// softmax of the scores while the sum is running. Both warpgroups take turns at issuing, so that one computes softmax
// while the tensor cores work for the other.
//
// A tile of keys is 4 x 128 x 128 x D operations: with D = 128, 2048 cycles of the tensor cores and 1024 of the units
// of ex2, both at their peak rates (4096 operations and 16 values in a cycle).
//
//            shared memory   registers: producer, consumers   blocks on a multiprocessor
//   D =  64   81 KB           24, 240                          1
//       128  161 KB           24, 240                          1
#include "attention/sm90.cuh"
#include "attention/sm90.h"

namespace fastgpt::cuda {
namespace {

struct Sm90Launch {
  TensorMap q, k, v;
  AttentionLaunch l;
};

template <int D>
struct Sm90Tile {
  static constexpr int kRows = kOwn * kConsumers, kKeys = 128, kStages = 2;
  static constexpr int kQBytes = kTileBytes<kRows, D>, kKeyBytes = kTileBytes<kKeys, D>;
  static constexpr int kTiles = kQBytes + 2 * kStages * kKeyBytes;
  static constexpr int kBytes = kAtomBytes + kTiles + (1 + 4 * kStages) * 8;  // tiles start at a whole atom
};

// Addresses of tiles and barriers. The barriers of a stage: `full` counts the bytes of a copy, `empty` the warps that no
// longer need them.
template <int D>
struct Places {
  using Tile = Sm90Tile<D>;
  ptx::Shared tiles;

  __device__ __forceinline__ ptx::Shared q() const { return tiles; }
  __device__ __forceinline__ ptx::Shared k(int stage) const { return tiles + Tile::kQBytes + stage * Tile::kKeyBytes; }
  __device__ __forceinline__ ptx::Shared v(int stage) const { return k(Tile::kStages + stage); }
  __device__ __forceinline__ ptx::Shared barrier(int i) const { return tiles + Tile::kTiles + i * 8; }
  __device__ __forceinline__ ptx::Shared q_full() const { return barrier(0); }
  __device__ __forceinline__ ptx::Shared k_full(int stage) const { return barrier(1 + stage); }
  __device__ __forceinline__ ptx::Shared v_full(int stage) const { return barrier(1 + Tile::kStages + stage); }
  __device__ __forceinline__ ptx::Shared k_empty(int stage) const { return barrier(1 + 2 * Tile::kStages + stage); }
  __device__ __forceinline__ ptx::Shared v_empty(int stage) const { return barrier(1 + 3 * Tile::kStages + stage); }
};

#if defined(FASTGPT_SM90A)

// ---- the producer ----

// Loads one tile of keys or values, the i-th, once its stage is free.
template <int D>
__device__ __forceinline__ void load_keys(const TensorMap& map, ptx::Shared tile, ptx::Shared full, ptx::Shared empty,
                                          int i, int key0, const QueryTile& at) {
  using Tile = Sm90Tile<D>;
  ptx::mbarrier_wait(empty, (i / Tile::kStages & 1) ^ 1);
  ptx::mbarrier_arrive_expect(full, Tile::kKeyBytes);
  load_rows<D, Tile::kKeys>(map, tile, full, key0, at.kv_head, at.batch);
}

// Loads the queries, and n tiles of keys and values in the order in which the consumers use them.
template <int D>
__device__ __forceinline__ void produce(const Sm90Launch& s, const Places<D>& p, const QueryTile& at, int n) {
  using Tile = Sm90Tile<D>;
  ptx::mbarrier_arrive_expect(p.q_full(), Tile::kQBytes);
  load_rows<D, Tile::kRows>(s.q, p.q(), p.q_full(), at.query0, at.head, at.batch);
#pragma unroll 1
  for (int i = 0; i <= n; ++i) {
    const int stage = i % Tile::kStages, before = (i + Tile::kStages - 1) % Tile::kStages;
    if (i < n) {
      load_keys<D>(s.k, p.k(stage), p.k_full(stage), p.k_empty(stage), i, (n - 1 - i) * Tile::kKeys, at);
    }
    if (i > 0) {
      load_keys<D>(s.v, p.v(before), p.v_full(before), p.v_empty(before), i - 1, (n - i) * Tile::kKeys, at);
    }
  }
}

// ---- the consumers ----

// State of the two queries of a lane, rows lane / 4 and lane / 4 + 8 of its warp; `total` is the part of this lane.
struct Rows {
  float top[2], total[2];
};

// Replaces z by 2^(c (z - top)), updates top and total, and sets the factors by which earlier sums shrink.
__device__ __forceinline__ void exponentiate(Rows& rows, float (&z)[16][4], float (&shrink)[2], float c) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top = rows.top[h];
#pragma unroll
    for (int n = 0; n < 16; ++n) top = fmaxf(top, fmaxf(z[n][2 * h], z[n][2 * h + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    const float base = top == -INFINITY ? 0.0f : top * c;  // no key yet: 2^-inf, not 2^(inf - inf)
    shrink[h] = ptx::ex2(__fmul_rn(rows.top[h], c) - base);  // 1 if top stays; an FMA gives 2^residue
    rows.top[h] = top;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      z[n][2 * h] = ptx::ex2(z[n][2 * h] * c - base);
      z[n][2 * h + 1] = ptx::ex2(z[n][2 * h + 1] * c - base);
      sum += z[n][2 * h] + z[n][2 * h + 1];
    }
    rows.total[h] = rows.total[h] * shrink[h] + sum;
  }
}

// Turns of the two warpgroups at issuing products: named barriers 1 and 2.
__device__ __forceinline__ void take_turn(int group) { ptx::named_sync(1 + group, 256); }
__device__ __forceinline__ void pass_turn(int group) { ptx::named_arrive(2 - group, 256); }

// Everything that a consumer keeps from tile to tile.
template <int D>
struct Consumer {
  float z[1][16][4], out[D / 8][4];
  uint32_t p[8][4];
  Rows rows;
  int query;  // the first of this warp
};

// Computes the i-th tile's scores and adds the values of the tile before.
template <typename T, int D, bool Masked>
__device__ __forceinline__ void step(const AttentionLaunch& l, const Places<D>& at, Consumer<D>& s, int group, int i,
                                     int n) {
  using Tile = Sm90Tile<D>;
  const int stage = i % Tile::kStages, before = (i + Tile::kStages - 1) % Tile::kStages;
  ptx::mbarrier_wait(at.k_full(stage), i / Tile::kStages & 1);
  take_turn(group);
  ptx::wgmma_fence();
  issue_rows<T, D, Tile::kRows>(s.z[0], at.q() + group * kBlockBytes<kOwn>, at.k(stage));
  ptx::wgmma_commit();
  ptx::mbarrier_wait(at.v_full(before), (i - 1) / Tile::kStages & 1);
  ptx::wgmma_fence();
  issue_columns<T>(s.out, s.p, at.v(before));
  ptx::wgmma_commit();
  pass_turn(group);
  ptx::wgmma_wait<1>();
  ptx::settle(s.z[0]);
  release(at.k_empty(stage));
  if constexpr (Masked) hide<false>(l, 0, s.query, nullptr, (n - 1 - i) * Tile::kKeys, -INFINITY, s.z);
  float shrink[2];
  exponentiate(s.rows, s.z[0], shrink, l.power);
  ptx::wgmma_wait<0>();
  ptx::settle(s.out);
  release(at.v_empty(before));
  round_scores<T>(s.z[0], s.p);
#pragma unroll
  for (int m = 0; m < D / 8; ++m) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s.out[m][e] *= shrink[e / 2];
  }
}

// Adds up all n > 0 tiles; all keys before tile `masked` from the end are seen by all queries.
template <typename T, int D>
__device__ __forceinline__ void consume(const AttentionLaunch& l, const Places<D>& at, Consumer<D>& s, int group, int n,
                                        int masked) {
  using Tile = Sm90Tile<D>;
  if (group == 1 && n > 1) pass_turn(group);  // the first warpgroup begins
  ptx::mbarrier_wait(at.q_full(), 0);
  ptx::mbarrier_wait(at.k_full(0), 0);
  ptx::wgmma_fence();
  issue_rows<T, D, Tile::kRows>(s.z[0], at.q() + group * kBlockBytes<kOwn>, at.k(0));
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::settle(s.z[0]);
  release(at.k_empty(0));
  hide<false>(l, 0, s.query, nullptr, (n - 1) * Tile::kKeys, -INFINITY, s.z);
  float shrink[2];
  exponentiate(s.rows, s.z[0], shrink, l.power);
  round_scores<T>(s.z[0], s.p);
  int i = 1;
#pragma unroll 1
  for (; i < masked; ++i) step<T, D, true>(l, at, s, group, i, n);
#pragma unroll 1
  for (; i < n; ++i) step<T, D, false>(l, at, s, group, i, n);
  const int last = (n - 1) % Tile::kStages;
  ptx::mbarrier_wait(at.v_full(last), (n - 1) / Tile::kStages & 1);
  ptx::wgmma_fence();
  issue_columns<T>(s.out, s.p, at.v(last));
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::settle(s.out);
  if (group == 0 && n > 1) take_turn(group);  // as many as were passed
}

// Stores lse, and out over the queries of this warpgroup in shared memory and from there.
template <typename T, int D>
__device__ __forceinline__ void finish(const AttentionLaunch& l, const QueryTile& at, unsigned char* tile,
                                       Consumer<D>& s, int group) {
  const int64_t head = static_cast<int64_t>(at.batch) * l.a.n_heads + at.head;
  float factor[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float total = s.rows.total[h];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    factor[h] = total == 0.0f ? 0.0f : 1.0f / total;
    const int query = s.query + lane_id() / 4 + 8 * h;
    if (lane_id() % 4 == 0 && query < l.n_queries) {
      l.a.lse[head * l.n_queries + query] = total == 0.0f ? -INFINITY : s.rows.top[h] * l.natural + logf(total);
    }
  }
  uint16_t* out = static_cast<uint16_t*>(l.a.out) + offset_of(l.a.out_at, at.batch, at.head);
  sync_group(group);  // no warp needs the queries any more
  store_own<T, D, Sm90Tile<D>::kRows>(tile, s.out, factor, group, out + at.query0 * l.a.out_at.row, l.a.out_at.row,
                                      l.n_queries - at.query0);
}

#endif  // FASTGPT_SM90A

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    attention_fwd_sm90_kernel(const __grid_constant__ Sm90Launch s) {
#if defined(FASTGPT_SM90A)
  using Tile = Sm90Tile<D>;
  FASTGPT_DYNAMIC_SHARED(unsigned char, bytes);
  const ptx::Shared start = ptx::shared_address(bytes);
  const Places<D> places{(start + kAtomBytes - 1) / kAtomBytes * kAtomBytes};
  const QueryTile at(s.l, Tile::kRows);
  const Sight sight = causal_sight(s.l, at.query0, Tile::kRows);
  const int n = (sight.high + Tile::kKeys - 1) / Tile::kKeys, group = static_cast<int>(threadIdx.x) / kGroup - 1;
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(s.q), ptx::prefetch_tensor_map(s.k), ptx::prefetch_tensor_map(s.v);
    for (int i = 0; i < 1 + 4 * Tile::kStages; ++i) {
      ptx::mbarrier_init(places.barrier(i), i < 1 + 2 * Tile::kStages ? 1 : kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (group < 0) {
    ptx::give_registers<24>();
    if (threadIdx.x == 0 && n > 0) produce<D>(s, places, at, n);
  } else {
    ptx::take_registers<240>();
    Consumer<D> state = {};
    state.rows = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    state.query = at.query0 + group * kOwn + warp_id() % 4 * 16;
    if (n > 0) consume<T, D>(s.l, places, state, group, n, n - sight.to / Tile::kKeys);
    finish<T, D>(s.l, at, bytes + (places.tiles - start), state, group);
  }
#else
  __trap();  // the launcher takes this kernel to devices of sm_90a only
#endif
}

}  // namespace

// ---- launchers ----

bool sm90_takes_layout(const void* x, const AttentionStrides& s, int64_t n_batch, int64_t n_rows, int64_t n_heads) {
  const auto fits = [](int64_t size, int64_t stride) { return size == 1 || (stride > 0 && stride % 8 == 0); };
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && fits(n_batch, s.batch) && fits(n_rows, s.row) &&
         fits(n_heads, s.head);
}

void attention_fwd_sm90(const AttentionArgs& a, Stream stream) {
  check_sm90(a);
  Sm90Launch s{};
  s.l = attention_launch(a, true);
  with_sm90_kernel(a, [&](auto type, auto dim) {
    using Tile = Sm90Tile<dim()>;
    const int64_t blocks = (a.n_queries + Tile::kRows - 1) / Tile::kRows * a.n_batch * a.n_heads;
    if (blocks == 0) return;
    s.q = heads_map(a.q, a.q_at, a.n_batch, a.n_queries, a.n_heads, dim(), Tile::kRows, a.dtype);
    if (a.n_keys > 0) {
      s.k = heads_map(a.k, a.k_at, a.n_batch, a.n_keys, a.n_kv_heads, dim(), Tile::kKeys, a.dtype);
      s.v = heads_map(a.v, a.v_at, a.n_batch, a.n_keys, a.n_kv_heads, dim(), Tile::kKeys, a.dtype);
    }
    launch("attention_fwd_sm90_kernel", attention_fwd_sm90_kernel<decltype(type), dim()>, Grid{blocks}, dim3(kThreads),
           Tile::kBytes, stream, s);
  });
}

}  // namespace fastgpt::cuda
