// Tiles of 16-bit rows in shared memory, and their products on tensor cores.
//
// A tile has D columns (64, 96, 128 or 256; a narrower matrix is padded with 0) and contiguous rows. The 16-byte pieces
// of a row are permuted by the number of the row (`tile_offset`): the 8 rows that ldmatrix reads at once, and the
// 16-byte stores that fill them, use all 32 banks.
#pragma once
#include "core/cuda/vec.cuh"

namespace fastgpt::cuda {

template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>) return ptx::pack_bf16x2(low, high);
  else return ptx::pack_f16x2(low, high);
}

// c (16 x 8) += a (16 x 16) b (16 x 8)
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) ptx::mma_bf16(c, a, b0, b1);
  else ptx::mma_f16(c, a, b0, b1);
}

// ---- tiles ----

// Offset in bytes of 16-byte piece `piece` of row `row` in a tile.
template <int D>
__device__ __forceinline__ int tile_offset(int row, int piece) {
  const int turn = D % 64 == 0 ? row & 7 : row >> 1 & 3;
  return row * D * 2 + ((piece ^ turn) << 4);
}

template <int D>
__device__ __forceinline__ uint16_t* tile_piece(uint16_t* tile, int row, int piece) {
  return tile + tile_offset<D>(row, piece) / 2;
}

// The pieces of a tile that a thread loads: kDown rows apart, kAcross pieces apart.
template <int D, int THREADS>
struct Pieces {
  static constexpr int kAcross = D % 64 == 0 ? 8 : 4, kDown = THREADS / kAcross;
  int row, piece;  // the first
  __device__ Pieces() : row(threadIdx.x / kAcross), piece(threadIdx.x % kAcross) {}
};

// Loads rows first .. first + ROWS of x, `step` elements apart. Rows that are not inside(row) and columns from `dim` on
// are 0. If Aligned, the copies are asynchronous and the caller commits them.
template <int D, int ROWS, int THREADS, typename Inside>
__device__ __forceinline__ void load_tile(uint16_t* tile, const void* x, int64_t offset, int64_t step, int first,
                                          int dim, bool aligned, Inside inside) {
  using P = Pieces<D, THREADS>;
  const P own;
  const uint16_t* from = static_cast<const uint16_t*>(x) + offset + (first + own.row) * step + own.piece * 8;
  uint16_t* to = tile_piece<D>(tile, own.row, own.piece);  // P::kDown is a multiple of 8: one permutation for all rows
  static_assert(ROWS % P::kDown == 0 && P::kDown % 8 == 0);
  if (aligned) {
    const ptx::Shared at = ptx::shared_address(to);
#pragma unroll
    for (int i = 0; i < ROWS; i += P::kDown, from += P::kDown * step) {
      const bool there = inside(first + own.row + i);
#pragma unroll
      for (int j = 0; j < D / 8; j += P::kAcross) {
        const bool some = there && (own.piece + j) * 8 < dim;
        ptx::cp_async_16(at + i * D * 2 + j * 16, from + j * 8, some ? 16 : 0);
      }
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < ROWS; i += P::kDown, from += P::kDown * step) {
      const bool there = inside(first + own.row + i);
#pragma unroll 1
      for (int j = 0; j < D; ++j) {
        if (j / 8 % P::kAcross != 0) continue;
        const bool some = there && own.piece * 8 + j < dim;
        to[i * D + j] = some ? from[j] : uint16_t{0};
      }
    }
  }
}

// Stores rows of a tile to rows first .. end of x.
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void store_tile(uint16_t* tile, void* x, int64_t offset, int64_t step, int first, int end,
                                           int dim, bool aligned) {
  constexpr int kPieces = D / 8;
#pragma unroll 1
  for (int at = threadIdx.x; at < ROWS * kPieces; at += THREADS) {
    const int row = at / kPieces, column = at % kPieces * 8;
    if (first + row >= end || column >= dim) continue;
    const uint16_t* from = tile_piece<D>(tile, row, column / 8);
    uint16_t* to = static_cast<uint16_t*>(x) + offset + (first + row) * step + column;
    if (aligned) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll 1
      for (int l = 0; l < 8 && column + l < dim; ++l) to[l] = from[l];
    }
  }
}

// ---- fragments of 16 x 8: lane l of a warp holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and 2 (l % 4) + 1 ----

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x / 32); }

// The address from which this lane reads 16 x 16 pieces of a tile with ldmatrix.
template <int D>
struct Lane {
  ptx::Shared at;
  // Rows from `row` on (a multiple of 16), columns from 16 `k` on. The permutation moves whole pieces, so a step along
  // the columns is an exclusive or.
  __device__ __forceinline__ ptx::Shared operator()(int row, int k) const {
    constexpr int kTurned = D % 64 == 0 ? 127 : 63;
    return (at ^ (32 * k & kTurned)) + (32 * k & ~kTurned) + row * D * 2;
  }
};

// Pieces in the order of the first operand of mma or, transposed, of the second.
template <int D>
__device__ __forceinline__ Lane<D> rows_first(const uint16_t* tile) {
  return {ptx::shared_address(tile) + tile_offset<D>(lane_id() & 15, lane_id() >> 4)};
}

// Pieces in the order of the second operand of mma, whose columns are the rows of the tile.
template <int D>
__device__ __forceinline__ Lane<D> columns_first(const uint16_t* tile) {
  return {ptx::shared_address(tile) + tile_offset<D>((lane_id() & 7) + (lane_id() >> 4) * 8, lane_id() >> 3 & 1)};
}

// c (16 M x 8 N) += a b^T over D columns; a is read by rows_first, b by columns_first.
template <typename T, int D, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&c)[M][N][4], Lane<D> a, Lane<D> b) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t x[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) ptx::ldmatrix_x4(x[m], a(16 * m, k));
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t y[4];
      ptx::ldmatrix_x4(y, b(8 * n, k));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(c[m][n], x[m], y[0], y[1]);
        mma<T>(c[m][n + 1], x[m], y[2], y[3]);
      }
    }
  }
}

// c (16 M x 8 W) += p (16 M x 8 N, rounded to T) b; b is the first 8 W columns of 8 N rows of a tile, read by
// rows_first.
template <typename T, int D, int M, int N, int W>
__device__ __forceinline__ void multiply_scores(float (&c)[M][W][4], const float (&p)[M][N][4], Lane<D> b) {
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
    uint32_t x[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      x[m][0] = pack2<T>(p[m][2 * k][0], p[m][2 * k][1]);
      x[m][1] = pack2<T>(p[m][2 * k][2], p[m][2 * k][3]);
      x[m][2] = pack2<T>(p[m][2 * k + 1][0], p[m][2 * k + 1][1]);
      x[m][3] = pack2<T>(p[m][2 * k + 1][2], p[m][2 * k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < W; n += 2) {
      uint32_t y[4];
      ptx::ldmatrix_x4_trans(y, b(16 * k, n / 2));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(c[m][n], x[m], y[0], y[1]);
        mma<T>(c[m][n + 1], x[m], y[2], y[3]);
      }
    }
  }
}

// Stores c (16 M x 8 W) times a factor per row, rounded to T, at rows from `row` and columns from `column` on of a
// tile.
template <typename T, int D, int M, int W>
__device__ __forceinline__ void write_tile(uint16_t* tile, int row, int column, const float (&c)[M][W][4],
                                           const float (&factor)[M][2]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int n = 0; n < W; ++n) {
        uint16_t* piece = tile_piece<D>(tile, row + 16 * m + 8 * h + lane_id() / 4, column / 8 + n);
        const float f = factor[m][h];
        reinterpret_cast<uint32_t*>(piece)[lane_id() % 4] = pack2<T>(c[m][n][2 * h] * f, c[m][n][2 * h + 1] * f);
      }
    }
  }
}

}  // namespace fastgpt::cuda
