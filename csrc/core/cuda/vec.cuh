// Loads and stores of L values at a time as fp32, in pieces of up to 16 bytes, and sweeps over rows of any alignment.
#pragma once
#include <cuda_runtime.h>
#include "core/cuda/ptx.cuh"
#include "core/math.h"

#include <initializer_list>
#include <type_traits>

namespace fastgpt::cuda {

// Number of values in a 16-byte piece.
template <typename T>
constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

__host__ __device__ __forceinline__ bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline bool all_aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (!is_aligned(p)) return false;
  }
  return true;
}

template <typename T>
__device__ __forceinline__ float widen(T x) {
  if constexpr (std::is_same_v<T, f16>) return ptx::f16_to_float(x.bits);
  else return to_float(x);
}

template <typename T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (std::is_same_v<T, bf16>) return bf16{static_cast<uint16_t>(ptx::pack_bf16x2(x, 0.0f))};
  else if constexpr (std::is_same_v<T, f16>) return f16{static_cast<uint16_t>(ptx::pack_f16x2(x, 0.0f))};
  else return x;
}

// x rounded to T, as it would be stored in memory.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return widen(narrow<T>(x));
}

template <typename T>
__device__ __forceinline__ void unpack(const uint4& raw, float* x) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = bits_float(word[i]);
    } else {
      x[2 * i] = widen(T{static_cast<uint16_t>(word[i])});
      x[2 * i + 1] = widen(T{static_cast<uint16_t>(word[i] >> 16)});
    }
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float* x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return uint4{ptx::pack_bf16x2(x[0], x[1]), ptx::pack_bf16x2(x[2], x[3]), ptx::pack_bf16x2(x[4], x[5]),
                 ptx::pack_bf16x2(x[6], x[7])};
  } else if constexpr (std::is_same_v<T, f16>) {
    return uint4{ptx::pack_f16x2(x[0], x[1]), ptx::pack_f16x2(x[2], x[3]), ptx::pack_f16x2(x[4], x[5]),
                 ptx::pack_f16x2(x[6], x[7])};
  } else {
    return uint4{float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])};
  }
}

// L == 1: any address. Otherwise L is a multiple of kLanes<T> and p is 16-byte aligned.
template <typename T, int L>
__device__ __forceinline__ void load(const T* p, float (&x)[L]) {
  if constexpr (L == 1) {
    x[0] = widen(p[0]);
  } else {
    static_assert(L % kLanes<T> == 0);
#pragma unroll
    for (int i = 0; i < L; i += kLanes<T>) {
      const uint4 raw = *reinterpret_cast<const uint4*>(p + i);
      unpack<T>(raw, x + i);
    }
  }
}

template <typename T, int L>
__device__ __forceinline__ void store(T* p, const float (&x)[L]) {
  if constexpr (L == 1) {
    p[0] = narrow<T>(x[0]);
  } else {
    static_assert(L % kLanes<T> == 0);
#pragma unroll
    for (int i = 0; i < L; i += kLanes<T>) *reinterpret_cast<uint4*>(p + i) = pack<T>(x + i);
  }
}

// L values as they are in memory; L and p are as for load. Many loads can be in flight before the first is widened.
template <typename T, int L>
struct Raw {
  uint4 pieces[L / kLanes<T>];
};

template <typename T>
struct Raw<T, 1> {
  T value;
};

template <typename T, int L>
__device__ __forceinline__ void load_raw(const T* p, Raw<T, L>& raw) {
  if constexpr (L == 1) {
    raw.value = *p;
  } else {
    static_assert(L % kLanes<T> == 0);
#pragma unroll
    for (int i = 0; i < L; i += kLanes<T>) raw.pieces[i / kLanes<T>] = *reinterpret_cast<const uint4*>(p + i);
  }
}

template <typename T, int L>
__device__ __forceinline__ void store_raw(T* p, const Raw<T, L>& raw) {
  if constexpr (L == 1) {
    *p = raw.value;
  } else {
#pragma unroll
    for (int i = 0; i < L; i += kLanes<T>) *reinterpret_cast<uint4*>(p + i) = raw.pieces[i / kLanes<T>];
  }
}

template <typename T, int L>
__device__ __forceinline__ void widen(const Raw<T, L>& raw, float (&x)[L]) {
  if constexpr (L == 1) {
    x[0] = widen(raw.value);
  } else {
#pragma unroll
    for (int i = 0; i < L; i += kLanes<T>) unpack<T>(raw.pieces[i / kLanes<T>], x + i);
  }
}

template <typename T, int L>
__device__ __forceinline__ void narrow(const float (&x)[L], Raw<T, L>& raw) {
  if constexpr (L == 1) {
    raw.value = narrow<T>(x[0]);
  } else {
#pragma unroll
    for (int i = 0; i < L; i += kLanes<T>) raw.pieces[i / kLanes<T>] = pack<T>(x + i);
  }
}

// Like store and store_raw, but to global memory and always in 16-byte pieces (nvcc sometimes splits the assignment).
template <typename T, int L>
__device__ __forceinline__ void store_whole(T* p, const Raw<T, L>& raw) {
  if constexpr (L == 1) {
    *p = raw.value;
  } else {
#pragma unroll
    for (int i = 0; i < L; i += kLanes<T>) ptx::store16(p + i, raw.pieces[i / kLanes<T>]);
  }
}

template <typename T, int L>
__device__ __forceinline__ void store_whole(T* p, const float (&x)[L]) {
  Raw<T, L> raw;
  narrow(x, raw);
  store_whole(p, raw);
}

// Like load, for data that no kernel writes while this one runs: such loads may be moved ahead of stores.
template <typename T, int L>
__device__ __forceinline__ void load_const(const T* p, float (&x)[L]) {
  if constexpr (L == 1) {
    x[0] = widen(p[0]);
  } else {
    static_assert(L % kLanes<T> == 0);
#pragma unroll
    for (int i = 0; i < L; i += kLanes<T>) unpack<T>(__ldg(reinterpret_cast<const uint4*>(p + i)), x + i);
  }
}

// Copies L 16-bit words between memory and a 16-byte aligned array; L is 1, or a multiple of 8 if p is aligned.
template <int L>
__device__ __forceinline__ void load_words(const int16_t* p, int16_t (&x)[L]) {
  if constexpr (L == 1) {
    x[0] = p[0];
  } else {
#pragma unroll
    for (int i = 0; i < L; i += 8) *reinterpret_cast<uint4*>(x + i) = *reinterpret_cast<const uint4*>(p + i);
  }
}

template <int L>
__device__ __forceinline__ void store_words(int16_t* p, const int16_t (&x)[L]) {
  if constexpr (L == 1) {
    p[0] = x[0];
  } else {
#pragma unroll
    for (int i = 0; i < L; i += 8) *reinterpret_cast<uint4*>(p + i) = *reinterpret_cast<const uint4*>(x + i);
  }
}

// A row of n columns as 16-byte pieces from column `head` on, which is the first at a 16-byte boundary, and the columns
// before and after them, fewer than 2 kLanes<T>.
template <typename T>
struct Split {
  int head, n_packs, n_edges;

  __device__ __forceinline__ Split(const T* row, int n) {
    constexpr int L = kLanes<T>;
    const int to_boundary = static_cast<int>((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
    head = to_boundary < n ? to_boundary : n;
    n_packs = (n - head) / L;
    n_edges = n - n_packs * L;
  }

  // Column of an edge, i < n_edges.
  __device__ __forceinline__ int edge(int i) const { return i < head ? i : i + n_packs * kLanes<T>; }
};

// Calls f(c, x) for all columns of a row; x[0] is column c. x has kLanes<T> values, or one before the first 16-byte
// boundary and after the last. kUnroll loads are in flight at once. f may overwrite the columns that it receives.
// kBackwards: from the last round of loads to the first, so what an earlier sweep read last is still in a cache.
template <int kUnroll, bool kBackwards = false, typename T, typename F>
__device__ __forceinline__ void sweep(const T* row, int n, F f) {
  constexpr int L = kLanes<T>;
  const Split<T> split(row, n);
  const int head = split.head, n_packs = split.n_packs;
  for (int i = threadIdx.x; i < split.n_edges; i += blockDim.x) {
    const int c = split.edge(i);
    float x[1];
    load(row + c, x);
    f(c, x);
  }
  const uint4* packs = reinterpret_cast<const uint4*>(row + head);
  const int step = blockDim.x, round = kUnroll * step;
  int first = threadIdx.x;
  if constexpr (kBackwards) first += first < n_packs ? (n_packs - 1 - first) / round * round : 0;
  for (; first < n_packs && (!kBackwards || first >= 0); first += kBackwards ? -round : round) {
    uint4 raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * step < n_packs) raw[u] = packs[first + u * step];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * step < n_packs) {
        float x[L];
        unpack<T>(raw[u], x);
        f(head + (first + u * step) * L, x);
      }
    }
  }
}

// Stores x at p in one piece if `aligned`, else value by value.
template <typename T, int L>
__device__ __forceinline__ void store_any(T* p, const float (&x)[L], bool aligned) {
  if (L > 1 && aligned) {
    store(p, x);
  } else {
#pragma unroll
    for (int l = 0; l < L; ++l) p[l] = narrow<T>(x[l]);
  }
}

}  // namespace fastgpt::cuda
