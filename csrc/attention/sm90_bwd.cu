// Attention, backward, with the instructions of sm_90a: dq, and the launcher; dk and dv are in sm90_dkdv.cu. Formulas in
// cuda_bwd.cu, whose kernel also computes delta and lse; the same calls as the forward kernel (sm90.cu).
//
// They have not run on a device. tests/cuda_on_cpu runs them on the host, and checks descriptors, barriers and copies.
//
// How: as in cuda_bwd.cu, two kernels recompute the scores, and each block computes a sum in a fixed order, without
// atomics. Here a block has 128 queries of one head, 64 for each consumer. The producer loads keys and values in tiles
// of 128. Scores z = q k^T and dp = dout v^T have both operands in shared memory; dz becomes the first operand of
// dq += dz k in registers.
//
// Overlap: the sum dq of a tile runs until the scores of the next are issued, so the accumulators of z, dp and dq and
// the operand dz are never all needed at once. While a consumer computes dz, the tensor cores work for the other.
//
//            shared memory   stages   registers: producer, consumers   blocks on a multiprocessor
//   D =  64  129 KB          3        24, 240                          1
//       128  193 KB          2        24, 240                          1
#include <algorithm>

#include "attention/sm90.h"
#include "attention/sm90_bwd.cuh"

namespace fastgpt::cuda {
namespace {

template <int D>
struct DqTile {
  static constexpr int kRows = kOwn * kConsumers, kKeys = 128, kStages = D == 64 ? 3 : 2;
  static constexpr int kRowBytes = kTileBytes<kRows, D>, kKeyBytes = kTileBytes<kKeys, D>;
  static constexpr int kTiles = 2 * kRowBytes + 2 * kStages * kKeyBytes;
  static constexpr int kBarriers = 1 + 4 * kStages;
  static constexpr int kBytes = kAtomBytes + kTiles + kBarriers * 8;  // tiles start at a whole atom
};

// Addresses of tiles and barriers.
template <int D>
struct Places {
  using Tile = DqTile<D>;
  ptx::Shared tiles;

  __device__ __forceinline__ ptx::Shared q() const { return tiles; }
  __device__ __forceinline__ ptx::Shared dout() const { return tiles + Tile::kRowBytes; }
  __device__ __forceinline__ ptx::Shared k(int i) const { return tiles + 2 * Tile::kRowBytes + i * Tile::kKeyBytes; }
  __device__ __forceinline__ ptx::Shared v(int i) const { return k(Tile::kStages + i); }
  __device__ __forceinline__ ptx::Shared barrier(int i) const { return tiles + Tile::kTiles + i * 8; }
  __device__ __forceinline__ ptx::Shared rows_full() const { return barrier(0); }
  __device__ __forceinline__ ptx::Shared k_full(int i) const { return barrier(1 + i); }
  __device__ __forceinline__ ptx::Shared v_full(int i) const { return barrier(1 + Tile::kStages + i); }
  __device__ __forceinline__ ptx::Shared k_empty(int i) const { return barrier(1 + 2 * Tile::kStages + i); }
  __device__ __forceinline__ ptx::Shared v_empty(int i) const { return barrier(1 + 3 * Tile::kStages + i); }
};

#if defined(FASTGPT_SM90A)

// ---- the producer ----

// Loads a tile of keys or values, once its stage is free.
template <int D>
__device__ __forceinline__ void load_keys(const TensorMap& map, ptx::Shared tile, ptx::Shared full, ptx::Shared empty,
                                          uint32_t parity, int key0, const QueryTile& at) {
  using Tile = DqTile<D>;
  ptx::mbarrier_wait(empty, parity ^ 1);
  ptx::mbarrier_arrive_expect(full, Tile::kKeyBytes);
  load_rows<D, Tile::kKeys>(map, tile, full, key0, at.kv_head, at.batch);
}

// Loads q and dout, and all keys and values before `high`.
template <int D>
__device__ __forceinline__ void produce(const Sm90Backward& s, const Places<D>& p, const QueryTile& at, int high) {
  using Tile = DqTile<D>;
  ptx::mbarrier_arrive_expect(p.rows_full(), 2 * Tile::kRowBytes);
  load_rows<D, Tile::kRows>(s.q, p.q(), p.rows_full(), at.query0 - s.low, at.head, at.batch);
  load_rows<D, Tile::kRows>(s.dout, p.dout(), p.rows_full(), at.query0 - s.low, at.head, at.batch);
  Stage<Tile::kStages> stage;
#pragma unroll 1
  for (int key0 = 0; key0 < high; key0 += Tile::kKeys, stage.advance()) {
    const int i = stage.index;
    load_keys<D>(s.k, p.k(i), p.k_full(i), p.k_empty(i), stage.parity, key0, at);
    load_keys<D>(s.v, p.v(i), p.v_full(i), p.v_empty(i), stage.parity, key0, at);
  }
}

// ---- the consumers ----

// Everything that a consumer keeps from tile to tile; `rows`: of the two queries of this lane.
template <int D>
struct Consumer {
  float dq[D / 8][4];
  uint32_t dz[8][4];
  RowScale rows[2];
  int query;  // the first of this warp
};

// Replaces z by p.
__device__ __forceinline__ void exponentiate(const AttentionLaunch& l, const RowScale (&rows)[2], float (&z)[16][4]) {
#pragma unroll
  for (int n = 0; n < 16; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) z[n][e] = ptx::ex2(z[n][e] * l.power - rows[e / 2].lse);
  }
}

// Replaces dp by dz.
__device__ __forceinline__ void grad_scores(const RowScale (&rows)[2], const float (&p)[16][4], float (&dp)[16][4]) {
#pragma unroll
  for (int n = 0; n < 16; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) dp[n][e] = p[n][e] * (dp[n][e] - rows[e / 2].delta);
  }
}

// Adds the tile of keys from key0 on; `before`: the stage of the tile before.
template <typename T, int D>
__device__ __forceinline__ void step(const AttentionLaunch& l, const Places<D>& at, Consumer<D>& c, int group,
                                     const Stage<DqTile<D>::kStages>& stage, int before, int key0) {
  using Tile = DqTile<D>;
  const int i = stage.index, own = group * kBlockBytes<kOwn>;
  float z[16][4], dz[1][16][4];
  ptx::mbarrier_wait(at.k_full(i), stage.parity);
  ptx::wgmma_fence();
  issue_rows<T, D, Tile::kRows>(z, at.q() + own, at.k(i));
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();  // dq of the tile before
  if (key0 > 0) release(at.k_empty(before));
  ptx::mbarrier_wait(at.v_full(i), stage.parity);
  ptx::wgmma_fence();
  issue_rows<T, D, Tile::kRows>(dz[0], at.dout() + own, at.v(i));
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();
  ptx::settle(z);
  exponentiate(l, c.rows, z);
  ptx::wgmma_wait<0>();
  ptx::settle(dz[0]);
  release(at.v_empty(i));
  grad_scores(c.rows, z, dz[0]);
  if (key0 + Tile::kKeys > causal_end(l, c.query)) hide<false>(l, 0, c.query, nullptr, key0, 0.0f, dz);
  round_scores<T>(dz[0], c.dz);
  ptx::wgmma_fence();
  issue_columns<T>(c.dq, c.dz, at.k(i));
  ptx::wgmma_commit();
}

template <typename T, int D>
__device__ __forceinline__ void consume(const AttentionLaunch& l, const Places<D>& at, Consumer<D>& c, int group,
                                        int high) {
  using Tile = DqTile<D>;
  Stage<Tile::kStages> stage;
  int before = 0;
  ptx::mbarrier_wait(at.rows_full(), 0);
#pragma unroll 1
  for (int key0 = 0; key0 < high; key0 += Tile::kKeys, before = stage.index, stage.advance()) {
    step<T, D>(l, at, c, group, stage, before, key0);
  }
  ptx::wgmma_wait<0>();
  ptx::settle(c.dq);
}

// Stores dq over the queries of this consumer in shared memory and from there.
template <typename T, int D>
__device__ __forceinline__ void finish(const AttentionLaunch& l, const QueryTile& at, unsigned char* tile,
                                       Consumer<D>& c, int group) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (c.rows[h].lse != INFINITY) continue;  // NaN stays NaN
#pragma unroll
    for (int m = 0; m < D / 8; ++m) c.dq[m][2 * h] = c.dq[m][2 * h + 1] = 0.0f;  // even if it is NaN
  }
  const float factor[2] = {l.a.scale, l.a.scale};
  uint16_t* dq = static_cast<uint16_t*>(l.a.dq) + offset_of(l.a.dq_at, at.batch, at.head);
  sync_group(group);  // no warp needs the queries any more
  store_own<T, D, DqTile<D>::kRows>(tile, c.dq, factor, group, dq + at.query0 * l.a.dq_at.row, l.a.dq_at.row,
                                    l.n_queries - at.query0);
}

#endif  // FASTGPT_SM90A

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 1) attention_dq_sm90_kernel(const __grid_constant__ Sm90Backward s) {
#if defined(FASTGPT_SM90A)
  using Tile = DqTile<D>;
  FASTGPT_DYNAMIC_SHARED(unsigned char, bytes);
  const ptx::Shared start = ptx::shared_address(bytes);
  const Places<D> places{(start + kAtomBytes - 1) / kAtomBytes * kAtomBytes};
  const QueryTile at(s.l, Tile::kRows);
  const int high = causal_sight(s.l, at.query0, Tile::kRows).high;
  const int group = static_cast<int>(threadIdx.x) / kGroup - 1;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kBarriers; ++i) {
      ptx::mbarrier_init(places.barrier(i), i < 1 + 2 * Tile::kStages ? 1 : kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (group < 0) {
    ptx::give_registers<24>();
    if (threadIdx.x == 0 && high > 0) produce<D>(s, places, at, high);
  } else {
    ptx::take_registers<240>();
    Consumer<D> state = {};
    state.query = at.query0 + group * kOwn + warp_id() % 4 * 16;
    const RowScale* rows = s.l.rows + (at.batch * s.l.a.n_heads + at.head) * s.l.n_padded;
    for (int h = 0; h < 2; ++h) state.rows[h] = rows[state.query + lane_id() / 4 + 8 * h];
    if (high > 0) consume<T, D>(s.l, places, state, group, high);
    finish<T, D>(s.l, at, bytes + (places.tiles - start), state, group);
  }
#else
  __trap();  // the launcher takes this kernel to devices of sm_90a only
#endif
}

}  // namespace

// ---- launchers ----

Sm90Backward sm90_backward(const BackwardLaunch& l, int n_rows, int n_keys) {
  Sm90Backward s{};
  const AttentionArgs& a = l.a;
  s.l = l, s.low = a.causal ? std::max(0, 1 - l.ahead) : 0;
  const auto from_low = [&](const void* x, const AttentionStrides& at) {
    const auto* first = static_cast<const uint16_t*>(x) + s.low * at.row;
    return heads_map(first, at, a.n_batch, a.n_queries - s.low, a.n_heads, a.head_dim, n_rows, a.dtype);
  };
  const auto of_keys = [&](const void* x, const AttentionStrides& at) {
    return heads_map(x, at, a.n_batch, a.n_keys, a.n_kv_heads, a.head_dim, n_keys, a.dtype);
  };
  if (s.low < a.n_queries && a.n_keys > 0) {
    s.q = from_low(a.q, a.q_at), s.dout = from_low(a.dout, a.dout_at);
    s.k = of_keys(a.k, a.k_at), s.v = of_keys(a.v, a.v_at);
  }
  return s;
}

void attention_bwd_sm90(const AttentionArgs& a, Stream stream) {
  check_sm90(a);
  const BackwardLaunch l = backward_launch(a);
  const bool queries = a.n_batch * a.n_heads * a.n_queries > 0;
  if (queries) prepare_rows(l, stream);
  attention_dkdv_sm90(l, stream);
  if (!queries) return;
  with_sm90_kernel(a, [&](auto type, auto dim) {
    using Tile = DqTile<dim()>;
    const int64_t blocks = (a.n_queries + Tile::kRows - 1) / Tile::kRows * a.n_batch * a.n_heads;
    launch("attention_dq_sm90_kernel", attention_dq_sm90_kernel<decltype(type), dim()>, Grid{blocks}, dim3(kThreads),
           Tile::kBytes, stream, sm90_backward(l, Tile::kRows, Tile::kKeys));
  });
}

}  // namespace fastgpt::cuda
