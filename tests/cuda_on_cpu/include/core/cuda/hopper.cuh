// Host version of csrc/core/cuda/hopper.cuh.
#pragma once
#include "core/cuda/ptx.cuh"
#include "core/cuda/tensor_map.cuh"
#include "hopper_state.h"

#define FASTGPT_SM90A 1

namespace fastgpt::ptx {

// All uses of an mbarrier must come after its initialisation, and count as reads for that reason.
__forceinline__ void mbarrier_init(Shared barrier, uint32_t arrivals) {
  race::write(reinterpret_cast<void*>(barrier), 8);
  emulator::hopper_aside([&](emulator::Hopper& h) { h.init(barrier, arrivals); });
}

inline void fence_mbarrier_init() {
  emulator::hopper_aside([](emulator::Hopper& h) { h.fence_init(); });
}

__forceinline__ void mbarrier_arrive_expect(Shared barrier, uint32_t bytes) {
  race::read(reinterpret_cast<void*>(barrier), 8);
  emulator::hopper_aside([&](emulator::Hopper& h) { h.arrive(barrier, bytes); });
}
__forceinline__ void mbarrier_arrive(Shared barrier) { mbarrier_arrive_expect(barrier, 0); }

__forceinline__ void mbarrier_wait(Shared barrier, uint32_t parity) {
  race::read(reinterpret_cast<void*>(barrier), 8);
  emulator::hopper_aside([&](emulator::Hopper& h) { h.wait(barrier, parity); });
}

// Puts 16-byte piece i of line r at piece i ^ r of its atom.
inline Shared swizzled(Shared address) { return address ^ (address >> 7 & 7) << 4; }

inline void prefetch_tensor_map(const cuda::TensorMap&) {}

// Where line `line` of a box is in the tensor; null if it is outside.
inline const char* line_of(const cuda::TensorMap& map, const int64_t (&start)[4], uint32_t line) {
  const uint32_t(&box)[4] = map.box;
  const int64_t at[4] = {0, start[1] + line % box[1], start[2] + line / box[1] % box[2],
                         start[3] + line / box[1] / box[2]};
  const char* from = static_cast<const char*>(map.base);
  for (int d = 1; d < 4; ++d) {
    if (at[d] < 0 || at[d] >= static_cast<int64_t>(map.sizes[d])) return nullptr;
    from += at[d] * static_cast<int64_t>(map.strides[d - 1]);
  }
  return from;
}

inline void land_box(Shared to, const cuda::TensorMap& map, const int64_t (&start)[4]) {
  const uint32_t(&box)[4] = map.box;
  for (uint32_t line = 0; line < box[1] * box[2] * box[3]; ++line) {
    const char* from = line_of(map, start, line);
    for (uint32_t c = 0; c < box[0]; ++c) {
      const int64_t column = start[0] + c;
      const bool some = from != nullptr && column >= 0 && column < static_cast<int64_t>(map.sizes[0]);
      const Shared place = swizzled(to + line * box[0] * 2 + c * 2);
      std::memset(reinterpret_cast<void*>(place), 0, 2);
      if (some) std::memcpy(reinterpret_cast<void*>(place), from + column * 2, 2);
    }
  }
}

__forceinline__ void tma_load(Shared to, const cuda::TensorMap& map, Shared barrier, int c0, int c1, int c2, int c3) {
  const uint32_t bytes = map.box[0] * map.box[1] * map.box[2] * map.box[3] * 2;
  const race::Work copy = emulator::copies_of(barrier);
  race::read(reinterpret_cast<void*>(barrier), 8);
  race::write_by(copy, reinterpret_cast<void*>(to), bytes);
  const int64_t start[4] = {c0, c1, c2, c3}, columns = static_cast<int64_t>(map.sizes[0]);
  for (uint32_t line = 0; line < bytes / (2 * map.box[0]); ++line) {
    const char* from = line_of(map, start, line);
    const int64_t first = std::max<int64_t>(c0, 0), end = std::min(c0 + static_cast<int64_t>(map.box[0]), columns);
    if (from != nullptr && first < end) race::read_by(copy, from + first * 2, (end - first) * 2);
  }
  emulator::hopper_aside([&](emulator::Hopper& h) {
    if (to % 1024 != 0 || map.box[0] != 64) {
      emulator::stop("cp.async.bulk.tensor: the target must be a multiple of 1024 and a box 64 values wide, so that its "
                     "order is that of a descriptor");
    }
    if (!emulator::Hopper::in_shared(to, bytes)) emulator::stop("cp.async.bulk.tensor: the box leaves shared memory");
    std::memset(reinterpret_cast<void*>(to), emulator::kPoison, bytes);
    // the map is an argument of the kernel, of which each thread has a copy
    h.copy({barrier, bytes, [=] { land_box(to, map, {c0, c1, c2, c3}); }});
  });
}

__forceinline__ void bulk_load(Shared to, const void* from, uint32_t bytes, Shared barrier) {
  const race::Work copy = emulator::copies_of(barrier);
  race::read(reinterpret_cast<void*>(barrier), 8);
  race::write_by(copy, reinterpret_cast<void*>(to), bytes);
  race::read_by(copy, from, bytes);
  emulator::hopper_aside([&](emulator::Hopper& h) {
    if (to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0) {
      emulator::stop("cp.async.bulk: both addresses and the number of bytes must be multiples of 16");
    }
    if (!emulator::Hopper::in_shared(to, bytes)) emulator::stop("cp.async.bulk: the target leaves shared memory");
    std::memset(reinterpret_cast<void*>(to), emulator::kPoison, bytes);
    h.copy({barrier, bytes, [=] { std::memcpy(reinterpret_cast<void*>(to), from, bytes); }});
  });
}

inline void named_sync(int number, int threads) {
  emulator::hopper_aside([&](emulator::Hopper& h) { h.named_barrier(number, threads, true); });
}
inline void named_arrive(int number, int threads) {
  emulator::hopper_aside([&](emulator::Hopper& h) { h.named_barrier(number, threads, false); });
}

template <int N>
inline void give_registers() {
  emulator::hopper_aside([](emulator::Hopper& h) { h.set_registers(N); });
}
template <int N>
inline void take_registers() {
  give_registers<N>();
}

}  // namespace fastgpt::ptx
