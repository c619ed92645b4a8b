// Shared by the kernels of attention for sm_90a: tiles, products of warpgroups, the way from accumulators to memory.
//
// A block has one warpgroup that loads by TMA, the producer, and two that compute, the consumers, with 64 rows each. A
// tile lies in blocks of 64 columns: all its rows of the first block, then all of the next (descriptor.cuh).
#pragma once
#include "attention/cuda.cuh"
#include "core/cuda/hopper.cuh"
#include "core/cuda/wgmma.cuh"

namespace fastgpt::cuda {

constexpr int kGroup = 128, kConsumers = 2, kThreads = kGroup * (1 + kConsumers);
constexpr int kConsumerWarps = kConsumers * kGroup / 32;
constexpr int kOwn = 64;  // rows of a consumer

template <int ROWS>
constexpr int kBlockBytes = ROWS * kLineBytes;
template <int ROWS, int D>
constexpr int kTileBytes = D / kLineValues * kBlockBytes<ROWS>;

#if defined(FASTGPT_SM90A)

// ---- stages: a ring of tiles, each with a barrier `full` that counts bytes and a barrier `empty` that counts warps ----

// The stage of one step; `parity` is that of its `full` in this round.
template <int STAGES>
struct Stage {
  int index = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++index == STAGES) index = 0, parity ^= 1;
  }
};

// Says that this warp no longer needs a stage.
__device__ __forceinline__ void release(ptx::Shared empty) {
  __syncwarp();
  if (lane_id() == 0) ptx::mbarrier_arrive(empty);
}

// Loads ROWS rows of one head from row0 on. Rows outside of the tensor become 0.
template <int D, int ROWS>
__device__ __forceinline__ void load_rows(const TensorMap& map, ptx::Shared tile, ptx::Shared full, int row0, int head,
                                          int batch) {
#pragma unroll
  for (int b = 0; b < D / kLineValues; ++b) {
    ptx::tma_load(tile + b * kBlockBytes<ROWS>, map, full, b * kLineValues, row0, head, batch);
  }
}

// ---- products; they are issued and not waited for ----

// c = a b^T: 64 rows of a tile of A_ROWS, from `a` on, and all rows of b.
template <typename T, int D, int A_ROWS, int M>
__device__ __forceinline__ void issue_rows(float (&c)[M][4], ptx::Shared a, ptx::Shared b) {
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    const int block = i / 4, column = i % 4 * 32;  // bytes
    ptx::wgmma_rows<T>(c, along_lines(a + block * kBlockBytes<A_ROWS> + column),
                       along_lines(b + block * kBlockBytes<8 * M> + column), i > 0);
  }
}

// c += a b: a (64 x 16 K) in registers, all 16 K rows of b.
template <typename T, int M, int K>
__device__ __forceinline__ void issue_columns(float (&c)[M][4], const uint32_t (&a)[K][4], ptx::Shared b) {
#pragma unroll
  for (int i = 0; i < K; ++i) {
    ptx::wgmma_columns<T>(c, a[i], across_lines(b + i * 2 * kAtomBytes, kBlockBytes<16 * K>), true);
  }
}

// Rounds the result of a product to the first operand of the next.
template <typename T, int K>
__device__ __forceinline__ void round_scores(const float (&z)[2 * K][4], uint32_t (&p)[K][4]) {
#pragma unroll
  for (int c = 0; c < K; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&tile)[4] = z[2 * c + i / 2];
      p[c][i] = pack2<T>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
    }
  }
}

// ---- from accumulators to memory, over the rows of this consumer in a tile of ROWS that no product reads any more ----

__device__ __forceinline__ void sync_group(int group) { ptx::named_sync(3 + group, kGroup); }

// Stores the consumer's rows of `tile` to `to`, the row of `tile`'s first row; `n_rows` rows exist from there on.
template <typename T, int D, int ROWS>
__device__ __forceinline__ void store_own(unsigned char* tile, const float (&x)[D / 8][4], const float (&factor)[2],
                                          int group, uint16_t* to, int64_t row_stride, int n_rows) {
  const int own = group * kOwn, row = own + warp_id() % 4 * 16 + lane_id() / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int m = 0; m < D / 8; ++m) {
      unsigned char* line = tile + m / 8 * kBlockBytes<ROWS> + (row + 8 * h) * kLineBytes;
      reinterpret_cast<uint32_t*>(line + (m % 8 ^ (row & 7)) * 16)[lane_id() % 4] =
          pack2<T>(x[m][2 * h] * factor[h], x[m][2 * h + 1] * factor[h]);
    }
  }
  sync_group(group);
#pragma unroll 1
  for (int i = threadIdx.x % kGroup; i < kOwn * D / 8; i += kGroup) {
    const int r = own + i / (D / 8), piece = i % (D / 8);
    if (r >= n_rows) break;
    const unsigned char* from = tile + piece / 8 * kBlockBytes<ROWS> + r * kLineBytes + (piece % 8 ^ (r & 7)) * 16;
    ptx::store16(to + r * row_stride + piece * 8, *reinterpret_cast<const uint4*>(from));
  }
}

#endif  // FASTGPT_SM90A

// ---- for the launchers ----

// (B, rows, heads, D) in boxes of `rows` x 64. A dimension of one element has no stride; TMA wants a valid one.
inline TensorMap heads_map(const void* x, const AttentionStrides& at, int64_t n_batch, int64_t n_rows, int64_t n_heads,
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

// Throws std::runtime_error unless the kernels for sm_90a take this call on this device.
inline void check_sm90(const AttentionArgs& a) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("fastgpt: attention: ") + cudaGetErrorString(error));
  if (major != 9 || minor != 0) {
    throw std::runtime_error("fastgpt: attention: cuda:sm_90a runs on compute capability 9.0 only, this device has " +
                             std::to_string(major) + "." + std::to_string(minor));
  }
  if (has_options(a) || a.scale < 0.0f || (a.head_dim != 64 && a.head_dim != 128)) {
    throw std::runtime_error("fastgpt: attention: cuda:sm_90a takes causal order or none without other options, head "
                             "dimensions of 64 and 128, and scales of at least 0");
  }
}

// Calls f(type, dim) with tags.
template <typename F>
void with_sm90_kernel(const AttentionArgs& a, F f) {
  const auto with_type = [&](auto type) { a.head_dim == 64 ? f(type, Dim<64>{}) : f(type, Dim<128>{}); };
  a.dtype == DType::bf16 ? with_type(bf16{}) : with_type(f16{});
}

}  // namespace fastgpt::cuda
