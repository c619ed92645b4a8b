// Host version of csrc/core/cuda/ptx.cuh. ex2 is exact here (2^-22 on the device); packing rounds in the same way. mma
// adds its 16 products one after the other in fp32; the device uses another order.
#pragma once
#include <cuda_runtime.h>
#include "core/math.h"

namespace fastgpt::ptx {

inline float ex2(float x) { return exp2f(x) < 0x1p-126f ? 0.0f : exp2f(x); }
// Exact; 2^-23 on the device.
inline float rcp(float x) { return fabsf(1.0f / x) < 0x1p-126f ? 0.0f : 1.0f / x; }
__forceinline__ void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
inline uint32_t pack_bf16x2(float low, float high) {
  return to_bf16(low).bits | static_cast<uint32_t>(to_bf16(high).bits) << 16;
}
inline uint32_t pack_f16x2(float low, float high) {
  return to_f16(low).bits | static_cast<uint32_t>(to_f16(high).bits) << 16;
}
inline float f16_to_float(uint16_t bits) { return to_float(f16{bits}); }

using Shared = uintptr_t;
inline Shared shared_address(const void* p) { return reinterpret_cast<Shared>(p); }

template <bool kTransposed>
__forceinline__ void load_matrices(uint32_t (&r)[4], Shared row) {
  struct Lane {
    Shared row;
    uint32_t* r;
  } mine{row, r};
  if (row % 16 != 0) emulator::machine().misaligned = true;
  const race::Work load = emulator::machine().next_load();
  race::read_by(load, reinterpret_cast<const void*>(row), 16);
  emulator::machine().meet(kTransposed ? "ldmatrix.trans" : "ldmatrix", &mine, [](void* const* lanes) {
    uint16_t x[4][8][8];
    for (int i = 0; i < 32; ++i) {
      memcpy(x[i / 8][i % 8], reinterpret_cast<const void*>(static_cast<Lane*>(lanes[i])->row), 16);
    }
    for (int i = 0; i < 32; ++i) {
      const int row = i / 4, column = i % 4 * 2;
      for (int m = 0; m < 4; ++m) {
        const uint32_t low = kTransposed ? x[m][column][row] : x[m][row][column];
        const uint32_t high = kTransposed ? x[m][column + 1][row] : x[m][row][column + 1];
        static_cast<Lane*>(lanes[i])->r[m] = low | high << 16;
      }
    }
  });
  race::finished(load);  // the warp loads as one: what a lane does next comes after the loads of all lanes
}

__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], Shared row) { load_matrices<false>(r, row); }
__forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], Shared row) { load_matrices<true>(r, row); }

template <typename T>
inline void multiply(const char* name, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } mine{c, a, {b0, b1}};
  emulator::machine().meet(name, &mine, [](void* const* lanes) {
    float x[16][16], y[16][8];  // a, b
    const auto value = [](uint32_t word, int half) { return to_float(T{static_cast<uint16_t>(word >> 16 * half)}); };
    for (int i = 0; i < 32; ++i) {
      const Lane& l = *static_cast<Lane*>(lanes[i]);
      for (int half = 0; half < 2; ++half) {
        for (int part = 0; part < 4; ++part) {
          x[i / 4 + part % 2 * 8][i % 4 * 2 + part / 2 * 8 + half] = value(l.a[part], half);
        }
        for (int part = 0; part < 2; ++part) y[i % 4 * 2 + part * 8 + half][i / 4] = value(l.b[part], half);
      }
    }
    float sum[16][8] = {};
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) sum[row][column] += x[row][k] * y[k][column];
      }
    }
    for (int i = 0; i < 32; ++i) {
      float* to = static_cast<Lane*>(lanes[i])->c;
      for (int part = 0; part < 4; ++part) to[part] += sum[i / 4 + part / 2 * 8][i % 4 * 2 + part % 2];
    }
  });
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply<bf16>("mma.bf16", c, a, b0, b1);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply<f16>("mma.f16", c, a, b0, b1);
}

__forceinline__ void cp_async_16(Shared to, const void* from, int bytes) {
  const race::Work copy = emulator::machine().open_group();
  race::write_by(copy, reinterpret_cast<void*>(to), 16);
  race::read_by(copy, from, bytes);
  emulator::machine().copy_async(reinterpret_cast<void*>(to), from, bytes);
}
inline void cp_async_commit() { emulator::machine().close_group(); }
template <int N>
inline void cp_async_wait() {
  emulator::machine().wait_for_copies(N);
}

}  // namespace fastgpt::ptx
