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
#include "attention/cuda.cuh"
#include "attention/sm90.h"
#include "core/cuda/hopper.cuh"
#include "core/cuda/wgmma.cuh"

namespace fastgpt::cuda {
namespace {

struct Sm90Launch {
  TensorMap q, k, v;
  AttentionLaunch l;
};

template <int D>
struct Sm90Tile {
  static constexpr int kGroup = 128, kConsumers = 2, kThreads = kGroup * (1 + kConsumers);
  static constexpr int kOwn = 64, kRows = kOwn * kConsumers;  // queries of a warpgroup, of a block
  static constexpr int kKeys = 128, kStages = 2;
  static constexpr int kBlocks = D / kLineValues;  // of 64 columns; a tile has all its rows of one block, then the next
  static constexpr int kQBlock = kRows * kLineBytes, kKeyBlock = kKeys * kLineBytes;
  static constexpr int kQBytes = kBlocks * kQBlock, kKeyBytes = kBlocks * kKeyBlock;
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
#pragma unroll
  for (int b = 0; b < Tile::kBlocks; ++b) {
    ptx::tma_load(tile + b * Tile::kKeyBlock, map, full, b * kLineValues, key0, at.kv_head, at.batch);
  }
}

// Loads the queries, and n tiles of keys and values in the order in which the consumers use them.
template <int D>
__device__ __forceinline__ void produce(const Sm90Launch& s, const Places<D>& p, const QueryTile& at, int n) {
  using Tile = Sm90Tile<D>;
  ptx::mbarrier_arrive_expect(p.q_full(), Tile::kQBytes);
#pragma unroll
  for (int b = 0; b < Tile::kBlocks; ++b) {
    ptx::tma_load(p.q() + b * Tile::kQBlock, s.q, p.q_full(), b * kLineValues, at.query0, at.head, at.batch);
  }
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

// z = q k^T of the i-th tile of keys; issues and does not wait.
template <typename T, int D>
__device__ __forceinline__ void issue_scores(float (&z)[16][4], ptx::Shared q, ptx::Shared k) {
  using Tile = Sm90Tile<D>;
#pragma unroll
  for (int c = 0; c < D / 16; ++c) {
    const int block = c / 4, column = c % 4 * 32;  // bytes
    ptx::wgmma_rows<T>(z, along_lines(q + block * Tile::kQBlock + column),
                       along_lines(k + block * Tile::kKeyBlock + column), c > 0);
  }
}

// out += p v; issues and does not wait.
template <typename T, int D>
__device__ __forceinline__ void issue_values(float (&out)[D / 8][4], const uint32_t (&p)[8][4], ptx::Shared v) {
  using Tile = Sm90Tile<D>;
#pragma unroll
  for (int c = 0; c < Tile::kKeys / 16; ++c) {
    ptx::wgmma_columns<T>(out, p[c], across_lines(v + c * 2 * kAtomBytes, Tile::kKeyBlock), true);
  }
}

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

// Rounds probabilities to the first operand of the sum over values.
template <typename T>
__device__ __forceinline__ void round_scores(const float (&z)[16][4], uint32_t (&p)[8][4]) {
#pragma unroll
  for (int c = 0; c < 8; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&tile)[4] = z[2 * c + i / 2];
      p[c][i] = pack2<T>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
    }
  }
}

// Says that this warp no longer needs a stage.
__device__ __forceinline__ void release(ptx::Shared empty) {
  if (lane_id() == 0) ptx::mbarrier_arrive(empty);
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
  issue_scores<T, D>(s.z[0], at.q() + group * Tile::kOwn * kLineBytes, at.k(stage));
  ptx::wgmma_commit();
  ptx::mbarrier_wait(at.v_full(before), (i - 1) / Tile::kStages & 1);
  ptx::wgmma_fence();
  issue_values<T, D>(s.out, s.p, at.v(before));
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
  issue_scores<T, D>(s.z[0], at.q() + group * Tile::kOwn * kLineBytes, at.k(0));
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
  issue_values<T, D>(s.out, s.p, at.v(last));
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::settle(s.out);
  if (group == 0 && n > 1) take_turn(group);  // as many as were passed
}

// Stores lse, and out over the queries of this warpgroup in shared memory and from there.
template <typename T, int D>
__device__ __forceinline__ void finish(const AttentionLaunch& l, const QueryTile& at, unsigned char* tile,
                                       Consumer<D>& s, int group) {
  using Tile = Sm90Tile<D>;
  const int64_t head = static_cast<int64_t>(at.batch) * l.a.n_heads + at.head;
  const int own = group * Tile::kOwn, row = own + warp_id() % 4 * 16 + lane_id() / 4;
  ptx::named_sync(3 + group, Tile::kGroup);  // no warp needs the queries any more
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float total = s.rows.total[h];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const float factor = total == 0.0f ? 0.0f : 1.0f / total;
    const int query = at.query0 + row + 8 * h;
    if (lane_id() % 4 == 0 && query < l.n_queries) {
      l.a.lse[head * l.n_queries + query] = total == 0.0f ? -INFINITY : s.rows.top[h] * l.natural + logf(total);
    }
#pragma unroll
    for (int m = 0; m < D / 8; ++m) {
      unsigned char* line = tile + m / 8 * Tile::kQBlock + (row + 8 * h) * kLineBytes;
      reinterpret_cast<uint32_t*>(line + (m % 8 ^ (row & 7)) * 16)[lane_id() % 4] =
          pack2<T>(s.out[m][2 * h] * factor, s.out[m][2 * h + 1] * factor);
    }
  }
  ptx::named_sync(3 + group, Tile::kGroup);
  uint16_t* out = static_cast<uint16_t*>(l.a.out) + offset_of(l.a.out_at, at.batch, at.head);
#pragma unroll 1
  for (int i = threadIdx.x % Tile::kGroup; i < Tile::kOwn * D / 8; i += Tile::kGroup) {
    const int r = own + i / (D / 8), piece = i % (D / 8), query = at.query0 + r;
    if (query >= l.n_queries) break;
    const unsigned char* from = tile + piece / 8 * Tile::kQBlock + r * kLineBytes + (piece % 8 ^ (r & 7)) * 16;
    ptx::store16(out + query * l.a.out_at.row + piece * 8, *reinterpret_cast<const uint4*>(from));
  }
}

#endif  // FASTGPT_SM90A

template <typename T, int D>
__global__ void __launch_bounds__(Sm90Tile<D>::kThreads, 1)
    attention_fwd_sm90_kernel(const __grid_constant__ Sm90Launch s) {
#if defined(FASTGPT_SM90A)
  using Tile = Sm90Tile<D>;
  FASTGPT_DYNAMIC_SHARED(unsigned char, bytes);
  const ptx::Shared start = ptx::shared_address(bytes);
  const Places<D> places{(start + kAtomBytes - 1) / kAtomBytes * kAtomBytes};
  const QueryTile at(s.l, Tile::kRows);
  const Sight sight = causal_sight(s.l, at.query0, Tile::kRows);
  const int n = (sight.high + Tile::kKeys - 1) / Tile::kKeys, group = static_cast<int>(threadIdx.x) / Tile::kGroup - 1;
  if (threadIdx.x == 0) {
    const int warps = Tile::kConsumers * Tile::kGroup / 32;
    ptx::prefetch_tensor_map(s.q), ptx::prefetch_tensor_map(s.k), ptx::prefetch_tensor_map(s.v);
    for (int i = 0; i < 1 + 4 * Tile::kStages; ++i) {
      ptx::mbarrier_init(places.barrier(i), i < 1 + 2 * Tile::kStages ? 1 : warps);
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
    state.query = at.query0 + group * Tile::kOwn + warp_id() % 4 * 16;
    if (n > 0) consume<T, D>(s.l, places, state, group, n, n - sight.to / Tile::kKeys);
    finish<T, D>(s.l, at, bytes + (places.tiles - start), state, group);
  }
#else
  __trap();  // the launcher takes this kernel to devices of sm_90a only
#endif
}

// (B, rows, heads, D) in boxes of `rows` x 64. A dimension of one element has no stride; TMA wants a valid one.
TensorMap heads_map(const void* x, const AttentionStrides& at, int64_t n_batch, int64_t n_rows, int64_t n_heads,
                    int64_t dim, int box_rows, DType dtype) {
  const auto bytes = [&](int64_t size, int64_t stride) {
    return static_cast<uint64_t>(size == 1 ? dim : stride) * 2;
  };
  return tensor_map({x,
                     {static_cast<uint64_t>(dim), static_cast<uint64_t>(n_rows), static_cast<uint64_t>(n_heads),
                      static_cast<uint64_t>(n_batch)},
                     {bytes(n_rows, at.row), bytes(n_heads, at.head), bytes(n_batch, at.batch)},
                     {kLineValues, static_cast<uint32_t>(box_rows), 1, 1},
                     dtype == DType::bf16});
}

void check_device() {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("fastgpt: attention: ") + cudaGetErrorString(error));
  if (major == 9 && minor == 0) return;
  throw std::runtime_error("fastgpt: attention: cuda:sm_90a runs on compute capability 9.0 only, this device has " +
                           std::to_string(major) + "." + std::to_string(minor));
}

}  // namespace

// ---- launchers ----

bool sm90_takes_layout(const void* x, const AttentionStrides& s, int64_t n_batch, int64_t n_rows, int64_t n_heads) {
  const auto fits = [](int64_t size, int64_t stride) { return size == 1 || (stride > 0 && stride % 8 == 0); };
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && fits(n_batch, s.batch) && fits(n_rows, s.row) &&
         fits(n_heads, s.head);
}

void attention_fwd_sm90(const AttentionArgs& a, Stream stream) {
  check_device();
  if (has_options(a) || a.scale < 0.0f || (a.head_dim != 64 && a.head_dim != 128)) {
    throw std::runtime_error("fastgpt: attention: cuda:sm_90a takes causal order or none without other options, head "
                             "dimensions of 64 and 128, and scales of at least 0");
  }
  Sm90Launch s{};
  s.l = attention_launch(a, true);
  const auto with_dim = [&](auto type, auto dim) {
    using Tile = Sm90Tile<dim()>;
    const int64_t blocks = (a.n_queries + Tile::kRows - 1) / Tile::kRows * a.n_batch * a.n_heads;
    if (blocks == 0) return;
    s.q = heads_map(a.q, a.q_at, a.n_batch, a.n_queries, a.n_heads, dim(), Tile::kRows, a.dtype);
    if (a.n_keys > 0) {
      s.k = heads_map(a.k, a.k_at, a.n_batch, a.n_keys, a.n_kv_heads, dim(), Tile::kKeys, a.dtype);
      s.v = heads_map(a.v, a.v_at, a.n_batch, a.n_keys, a.n_kv_heads, dim(), Tile::kKeys, a.dtype);
    }
    launch("attention_fwd_sm90_kernel", attention_fwd_sm90_kernel<decltype(type), dim()>, Grid{blocks},
           dim3(Tile::kThreads), Tile::kBytes, stream, s);
  };
  const auto with_type = [&](auto type) { a.head_dim == 64 ? with_dim(type, Dim<64>{}) : with_dim(type, Dim<128>{}); };
  a.dtype == DType::bf16 ? with_type(bf16{}) : with_type(f16{});
}

}  // namespace fastgpt::cuda
