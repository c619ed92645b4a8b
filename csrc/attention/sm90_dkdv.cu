// Attention, backward, with the instructions of sm_90a: dk and dv; dq and the launcher are in sm90_bwd.cu. It has not
// run on a device.
//
// How: a block has 128 keys of one key head, 64 for each consumer, and processes the queries that see them, head by head
// of the group, in a fixed order. The producer loads q, dout and their rows' lse and delta into the stages of a ring.
// Scores are transposed, z = k q^T and dp = v dout^T, so that p and dz become first operands of dv += p dout and
// dk += dz q in registers.
//
// Overlap: the sums dv and dk of a tile run until the scores of the next are issued. While one consumer computes p and
// dz, the tensor cores work for the other. Both are packed into registers while no product is in flight: ptxas would
// serialize all products otherwise (C7513).
//
//            tile (keys x queries)   shared memory   stages   registers: producer, consumers   blocks on a multiprocessor
//   D =  64  128 x 128               132 KB          3        24, 240                          1
//       128  128 x  64               163 KB          3        24, 240                          1
#include "attention/sm90_bwd.cuh"

namespace fastgpt::cuda {
namespace {

template <int D>
struct DkdvTile {
  static constexpr int kKeys = kOwn * kConsumers, kRows = D == 64 ? 128 : 64, kStages = 3;
  static constexpr int kKeyBytes = kTileBytes<kKeys, D>, kRowBytes = kTileBytes<kRows, D>;
  static constexpr int kScaleBytes = kRows * static_cast<int>(sizeof(RowScale));
  static constexpr int kScales = 2 * kKeyBytes + kStages * 2 * kRowBytes;
  static constexpr int kTiles = kScales + kStages * kScaleBytes, kBarriers = 1 + 2 * kStages;
  static constexpr int kBytes = kAtomBytes + kTiles + kBarriers * 8;  // tiles start at a whole atom
};

// Addresses of tiles and barriers.
template <int D>
struct Places {
  using Tile = DkdvTile<D>;
  ptx::Shared tiles;

  __device__ __forceinline__ ptx::Shared k() const { return tiles; }
  __device__ __forceinline__ ptx::Shared v() const { return tiles + Tile::kKeyBytes; }
  __device__ __forceinline__ ptx::Shared q(int i) const { return tiles + 2 * Tile::kKeyBytes + i * 2 * Tile::kRowBytes; }
  __device__ __forceinline__ ptx::Shared dout(int i) const { return q(i) + Tile::kRowBytes; }
  __device__ __forceinline__ ptx::Shared scales(int i) const { return tiles + Tile::kScales + i * Tile::kScaleBytes; }
  __device__ __forceinline__ ptx::Shared barrier(int i) const { return tiles + Tile::kTiles + i * 8; }
  __device__ __forceinline__ ptx::Shared keys_full() const { return barrier(0); }
  __device__ __forceinline__ ptx::Shared full(int i) const { return barrier(1 + i); }
  __device__ __forceinline__ ptx::Shared empty(int i) const { return barrier(1 + Tile::kStages + i); }
};

// Keys of a block, and the queries from `begin` on, whole tiles, that see any of them.
template <int D>
struct KeyTile {
  int batch, kv_head, heads, key0, begin;

  __device__ explicit KeyTile(const Sm90Backward& s) {
    using Tile = DkdvTile<D>;
    const unsigned tiles = static_cast<unsigned>(s.l.n_keys + Tile::kKeys - 1) / Tile::kKeys;
    const unsigned kv_heads = static_cast<unsigned>(s.l.a.n_kv_heads), above = blockIdx.x / tiles;
    batch = static_cast<int>(above / kv_heads), kv_head = static_cast<int>(above % kv_heads);
    heads = static_cast<int>(s.l.a.n_heads) / static_cast<int>(kv_heads);
    key0 = static_cast<int>(blockIdx.x % tiles) * Tile::kKeys;
    begin = (s.l.a.causal ? max(0, key0 + 1 - s.l.ahead) : 0) / Tile::kRows * Tile::kRows;
  }

  __device__ __forceinline__ bool seen(const AttentionLaunch& l) const { return heads > 0 && begin < l.n_queries; }
};

#if defined(FASTGPT_SM90A)

// ---- the producer ----

// Loads the queries from query0 on of one head into a stage, once it is free.
template <int D>
__device__ __forceinline__ void load_queries(const Sm90Backward& s, const Places<D>& p, int batch, int head, int query0,
                                             const Stage<DkdvTile<D>::kStages>& stage) {
  using Tile = DkdvTile<D>;
  const int i = stage.index;
  const RowScale* scales = s.l.rows + (batch * s.l.a.n_heads + head) * s.l.n_padded + query0;
  ptx::mbarrier_wait(p.empty(i), stage.parity ^ 1);
  ptx::mbarrier_arrive_expect(p.full(i), 2 * Tile::kRowBytes + Tile::kScaleBytes);
  load_rows<D, Tile::kRows>(s.q, p.q(i), p.full(i), query0 - s.low, head, batch);
  load_rows<D, Tile::kRows>(s.dout, p.dout(i), p.full(i), query0 - s.low, head, batch);
  ptx::bulk_load(p.scales(i), scales, Tile::kScaleBytes, p.full(i));
}

template <int D>
__device__ __forceinline__ void produce(const Sm90Backward& s, const Places<D>& p, const KeyTile<D>& at) {
  using Tile = DkdvTile<D>;
  ptx::mbarrier_arrive_expect(p.keys_full(), 2 * Tile::kKeyBytes);
  load_rows<D, Tile::kKeys>(s.k, p.k(), p.keys_full(), at.key0, at.kv_head, at.batch);
  load_rows<D, Tile::kKeys>(s.v, p.v(), p.keys_full(), at.key0, at.kv_head, at.batch);
  Stage<Tile::kStages> stage;
#pragma unroll 1
  for (int head = at.kv_head * at.heads; head < (at.kv_head + 1) * at.heads; ++head) {
#pragma unroll 1
    for (int query0 = at.begin; query0 < s.l.n_queries; query0 += Tile::kRows, stage.advance()) {
      load_queries<D>(s, p, at.batch, head, query0, stage);
    }
  }
}

// ---- the consumers ----

// Everything that a consumer keeps from tile to tile.
template <int D>
struct Consumer {
  static constexpr int kChunks = DkdvTile<D>::kRows / 16;
  float dk[D / 8][4], dv[D / 8][4];
  uint32_t p[kChunks][4], dz[kChunks][4];
  int first, key;  // the first key of this consumer, and of this lane
};

// Returns the first of the two columns of this lane in tile n.
__device__ __forceinline__ int column_of(int n) { return 8 * n + lane_id() % 4 * 2; }

// Sets x to 0 where a query (column, from query0 on) does not see a key (row, from `key` on).
template <int N>
__device__ __forceinline__ void hide_keys(const AttentionLaunch& l, int query0, int key, float (&x)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int end = causal_end(l, query0 + column_of(n) + e % 2);
      x[n][e] = key + e / 2 * 8 < end ? x[n][e] : 0.0f;
    }
  }
}

// Replaces z by p.
template <int N>
__device__ __forceinline__ void exponentiate(const AttentionLaunch& l, const RowScale* scales, float (&z)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) z[n][e] = ptx::ex2(z[n][e] * l.power - scales[column_of(n) + e % 2].lse);
  }
}

// Replaces dp by dz.
template <int N>
__device__ __forceinline__ void grad_scores(const RowScale* scales, const float (&p)[N][4], float (&dp)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) dp[n][e] = p[n][e] * (dp[n][e] - scales[column_of(n) + e % 2].delta);
  }
}

// Adds the queries of a stage, from query0 on; `before`: the stage of the step before, -1 if there is none.
template <typename T, int D>
__device__ __forceinline__ void step(const AttentionLaunch& l, const Places<D>& at, const unsigned char* tiles,
                                     Consumer<D>& c, const Stage<DkdvTile<D>::kStages>& stage, int before, int own,
                                     int query0) {
  using Tile = DkdvTile<D>;
  const int i = stage.index;
  const auto* scales = reinterpret_cast<const RowScale*>(tiles + (at.scales(i) - at.tiles));
  const bool masked = c.first + kOwn > causal_end(l, query0);
  float z[Tile::kRows / 8][4], dz[Tile::kRows / 8][4];
  ptx::mbarrier_wait(at.full(i), stage.parity);
  ptx::wgmma_fence();
  issue_rows<T, D, Tile::kKeys>(z, at.k() + own, at.q(i));
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();  // dk and dv of the step before
  if (before >= 0) release(at.empty(before));
  ptx::wgmma_fence();
  issue_rows<T, D, Tile::kKeys>(dz, at.v() + own, at.dout(i));
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();
  ptx::settle(z);
  exponentiate(l, scales, z);
  if (masked) hide_keys(l, query0, c.key, z);
  ptx::wgmma_wait<0>();
  ptx::settle(dz);
  grad_scores(scales, z, dz);
  if (masked) hide_keys(l, query0, c.key, dz);
  round_scores<T>(z, c.p);
  round_scores<T>(dz, c.dz);
  ptx::wgmma_fence();
  issue_columns<T>(c.dv, c.p, at.dout(i));
  issue_columns<T>(c.dk, c.dz, at.q(i));
  ptx::wgmma_commit();
}

template <typename T, int D>
__device__ __forceinline__ void consume(const AttentionLaunch& l, const Places<D>& places, const unsigned char* tiles,
                                        const KeyTile<D>& at, Consumer<D>& c, int group) {
  using Tile = DkdvTile<D>;
  Stage<Tile::kStages> stage;
  int before = -1;
  ptx::mbarrier_wait(places.keys_full(), 0);
#pragma unroll 1
  for (int head = 0; head < at.heads; ++head) {
#pragma unroll 1
    for (int query0 = at.begin; query0 < l.n_queries; query0 += Tile::kRows) {
      step<T, D>(l, places, tiles, c, stage, before, group * kBlockBytes<kOwn>, query0);
      before = stage.index;
      stage.advance();
    }
  }
  ptx::wgmma_wait<0>();
  ptx::settle(c.dk);
  ptx::settle(c.dv);
}

// Stores dk and dv over the keys and values of this consumer in shared memory and from there.
template <typename T, int D>
__device__ __forceinline__ void finish(const AttentionLaunch& l, const KeyTile<D>& at, unsigned char* tiles,
                                       const Consumer<D>& c, int group) {
  using Tile = DkdvTile<D>;
  const AttentionArgs& a = l.a;
  const float scale[2] = {a.scale, a.scale}, one[2] = {1.0f, 1.0f};
  uint16_t* dk = static_cast<uint16_t*>(a.dk) + offset_of(a.dk_at, at.batch, at.kv_head) + at.key0 * a.dk_at.row;
  uint16_t* dv = static_cast<uint16_t*>(a.dv) + offset_of(a.dv_at, at.batch, at.kv_head) + at.key0 * a.dv_at.row;
  sync_group(group);  // no warp needs the keys and values any more
  store_own<T, D, Tile::kKeys>(tiles, c.dk, scale, group, dk, a.dk_at.row, l.n_keys - at.key0);
  store_own<T, D, Tile::kKeys>(tiles + Tile::kKeyBytes, c.dv, one, group, dv, a.dv_at.row, l.n_keys - at.key0);
}

#endif  // FASTGPT_SM90A

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 1) attention_dkdv_sm90_kernel(const __grid_constant__ Sm90Backward s) {
#if defined(FASTGPT_SM90A)
  using Tile = DkdvTile<D>;
  FASTGPT_DYNAMIC_SHARED(unsigned char, bytes);
  const ptx::Shared start = ptx::shared_address(bytes);
  const Places<D> places{(start + kAtomBytes - 1) / kAtomBytes * kAtomBytes};
  unsigned char* tiles = bytes + (places.tiles - start);
  const KeyTile<D> at(s);
  const int group = static_cast<int>(threadIdx.x) / kGroup - 1;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kBarriers; ++i) {
      ptx::mbarrier_init(places.barrier(i), i < 1 + Tile::kStages ? 1 : kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (group < 0) {
    ptx::give_registers<24>();
    if (threadIdx.x == 0 && at.seen(s.l)) produce<D>(s, places, at);
  } else {
    ptx::take_registers<240>();
    Consumer<D> state = {};
    state.first = at.key0 + group * kOwn, state.key = state.first + warp_id() % 4 * 16 + lane_id() / 4;
    if (at.seen(s.l)) consume<T, D>(s.l, places, tiles, at, state, group);
    finish<T, D>(s.l, at, tiles, state, group);
  }
#else
  __trap();  // the launcher takes this kernel to devices of sm_90a only
#endif
}

}  // namespace

// ---- launchers ----

void attention_dkdv_sm90(const BackwardLaunch& l, Stream stream) {
  with_sm90_kernel(l.a, [&](auto type, auto dim) {
    using Tile = DkdvTile<dim()>;
    const int64_t blocks = (l.a.n_keys + Tile::kKeys - 1) / Tile::kKeys * l.a.n_batch * l.a.n_kv_heads;
    if (blocks == 0) return;
    launch("attention_dkdv_sm90_kernel", attention_dkdv_sm90_kernel<decltype(type), dim()>, Grid{blocks},
           dim3(kThreads), Tile::kBytes, stream, sm90_backward(l, Tile::kRows, Tile::kKeys));
  });
}

}  // namespace fastgpt::cuda
