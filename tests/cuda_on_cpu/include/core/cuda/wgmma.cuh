// Host version of csrc/core/cuda/wgmma.cuh. A product adds its 16 terms one after the other in fp32; the device uses
// another order.
#pragma once
#include "core/cuda/descriptor.cuh"
#include "core/cuda/hopper.cuh"
#include "products.h"

namespace fastgpt::ptx {

inline void wgmma_fence() {
  emulator::products_aside([](emulator::Products& p) { p.fence(); });
}
inline void wgmma_commit() {
  emulator::products_aside([](emulator::Products& p) { p.commit(); });
}
template <int N>
inline void wgmma_wait() {
  emulator::products_aside([](emulator::Products& p) { p.wait(N); });
}
template <int M>
inline void settle(float (&)[M][4]) {}

template <typename T>
inline float value_of(uint16_t bits) {
  return to_float(T{bits});
}

// One lane of each warp reports what the product reads from shared memory.
__forceinline__ void report_along(uint64_t word, int rows) {
  if (emulator::machine().current->lane != 0) return;
  const race::Work product = emulator::open_group();
  const emulator::Layout layout = emulator::decoded(word);
  for (int r = 0; r < rows; ++r) {
    for (int half = 0; half < 2; ++half) race::read_by(product, reinterpret_cast<void*>(layout.along(r, half)), 16);
  }
}

__forceinline__ void report_across(uint64_t word, int columns) {
  if (emulator::machine().current->lane != 0) return;
  const race::Work product = emulator::open_group();
  const emulator::Layout layout = emulator::decoded(word);
  for (int k = 0; k < 16; ++k) {
    for (int c = 0; c < columns; c += 8) race::read_by(product, reinterpret_cast<void*>(layout.across(k, c)), 16);
  }
}

template <typename T, int M>
__forceinline__ void wgmma_rows(float (&c)[M][4], uint64_t a, uint64_t b, bool add) {
  report_along(a, 64);
  report_along(b, 8 * M);
  emulator::products_aside([&](emulator::Products& p) {
    p.issue("wgmma of rows", 8 * M, value_of<T>, {c[0], nullptr, a, b, add, 0});
  });
}

template <typename T, int M>
__forceinline__ void wgmma_columns(float (&c)[M][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  report_across(b, 8 * M);
  emulator::products_aside([&](emulator::Products& p) {
    p.issue("wgmma of columns", 8 * M, value_of<T>, {c[0], a, 0, b, add, 0});
  });
}

}  // namespace fastgpt::ptx
