// Small kernels for test_hopper.py. `fault` breaks one thing; 0 is right. Each function returns the error of the launch.
#include <cuda_runtime.h>
#include "core/cuda/hopper.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/wgmma.cuh"

using namespace fastgpt;
using namespace fastgpt::cuda;

namespace {

enum Fault {
  kNone,
  // barriers and copies
  kUninitialised, kUnfenced, kWrongParity, kNoArrival, kTooManyArrivals, kTooManyBytes, kTooFewBytes, kMisplaced,
  kLandsAfterwards, kFencedElsewhere,
  // products
  kNoFence, kNoWait, kReadEarly, kOverwrite, kOperandRegister, kDivergent,
  // descriptors
  kSwizzle, kBaseOffset, kAddress, kStride, kLeading, kOutside
};

struct Problem {
  TensorMap a, b;
  float* out;
};

uint64_t broken(uint64_t word, int fault) {
  if (fault == kSwizzle) return word & ~(uint64_t{3} << 62);
  if (fault == kBaseOffset) return word | uint64_t{1} << 49;
  if (fault == kAddress) return word + 1;  // 16 bytes
  if (fault == kStride) return word - (uint64_t{512} >> 4 << 32);
  if (fault == kLeading) return word - (uint64_t{512} >> 4 << 16);
  if (fault == kOutside) return word + (uint64_t{16384} >> 4 << 32);
  return word;
}

// Tiles of a and b, then a barrier; everything has landed when it returns.
struct Tiles {
  ptx::Shared a, b, full;
};

Tiles load(const Problem& s, unsigned char* bytes, int a_bytes, int b_bytes, int fault) {
  const ptx::Shared start = (ptx::shared_address(bytes) + 1023) / 1024 * 1024;
  const Tiles t{start, start + a_bytes, start + a_bytes + b_bytes};
  if (threadIdx.x == 0 && fault != kUninitialised) {
    ptx::mbarrier_init(t.full, fault == kNoArrival ? 2 : 1);
    if (fault != kUnfenced && fault != kFencedElsewhere) ptx::fence_mbarrier_init();
  }
  if (fault == kFencedElsewhere && threadIdx.x == 1) ptx::fence_mbarrier_init();
  __syncthreads();
  if (threadIdx.x == 0) {
    const int more = fault == kTooManyBytes ? 16 : fault == kTooFewBytes ? -16 : 0;
    ptx::mbarrier_arrive_expect(t.full, a_bytes + b_bytes + more);
    if (fault == kTooManyArrivals) ptx::mbarrier_arrive(t.full);
    if (a_bytes > 0) ptx::tma_load(t.a, s.a, t.full, 0, 0, 0, 0);
    for (int i = 0; i * 8192 < b_bytes; ++i) {
      ptx::tma_load(t.b + i * 8192 + (fault == kMisplaced ? 128 : 0), s.b, t.full, i % 2 * 64, i / 2 * 64, 0, 0);
    }
  }
  if (fault != kLandsAfterwards) ptx::mbarrier_wait(t.full, 0);
  if (fault == kWrongParity) ptx::mbarrier_wait(t.full, 1);
  return t;
}

void store(const Problem& s, const float (&c)[16][4]) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int m = 0; m < 16; ++m) {
    for (int e = 0; e < 4; ++e) s.out[(row + e / 2 * 8) * 128 + 8 * m + column + e % 2] = c[m][e];
  }
}

// out (64, 128) = a (64, 64) b (128, 64)^T
__global__ void rows_kernel(const Problem s, int fault) {
  FASTGPT_DYNAMIC_SHARED(unsigned char, bytes);
  const Tiles t = load(s, bytes, 8192, 0, fault);
  const ptx::Shared b = t.a + 9216, full = t.a + 8200;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(full, 16384);
    for (int i = 0; i < 2; ++i) ptx::tma_load(b + i * 8192, s.b, full, 0, i * 64, 0, 0);
  }
  ptx::mbarrier_wait(full, 0);
  float c[16][4] = {};
  if (fault != kNoFence) ptx::wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    const uint64_t word = broken(along_lines(t.a + k * 32), fault);
    ptx::wgmma_rows<bf16>(c, word + (fault == kDivergent && threadIdx.x == 77), along_lines(b + k * 32), k > 0);
  }
  ptx::wgmma_commit();
  const float early = c[3][1];
  if (fault == kOverwrite && threadIdx.x == 5) bytes[t.a - ptx::shared_address(bytes) + 700] ^= 1;
  __syncthreads();
  if (fault != kNoWait) ptx::wgmma_wait<0>();
  ptx::settle(c);
  if (fault == kReadEarly) c[3][1] = early;
  store(s, c);
}

// out (64, 128) = a (64, 64), in registers, b (64, 128)
__global__ void columns_kernel(const Problem s, const float* a, int fault) {
  FASTGPT_DYNAMIC_SHARED(unsigned char, bytes);
  const Tiles t = load(s, bytes, 0, 16384, fault);
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  uint32_t x[4][4];
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < 4; ++i) {
      const float* pair = a + (row + i % 2 * 8) * 64 + 16 * k + column + i / 2 * 8;
      x[k][i] = ptx::pack_bf16x2(pair[0], pair[1]);
    }
  }
  float c[16][4] = {};
  ptx::wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    ptx::wgmma_columns<bf16>(c, x[k], broken(across_lines(t.b + k * 2048, 8192), fault), true);
  }
  ptx::wgmma_commit();
  if (fault == kOperandRegister) x[2][1] = 0;
  ptx::wgmma_wait<0>();
  ptx::settle(c);
  store(s, c);
}

constexpr int kBytes = 1024 + 9216 + 16384 + 64;

// Copies a box from anywhere in a tensor to out (64, 64), in the order of its lines.
__global__ void box_kernel(const Problem s, int c0, int c1) {
  FASTGPT_DYNAMIC_SHARED(unsigned char, bytes);
  unsigned char* tile = bytes + (1024 - ptx::shared_address(bytes) % 1024) % 1024;
  const ptx::Shared full = ptx::shared_address(tile + 8192);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(full, 8192);
    ptx::tma_load(ptx::shared_address(tile), s.a, full, c0, c1, 0, 0);
    ptx::mbarrier_wait(full, 0);
    for (int i = 0; i < 4096; ++i) {
      const int row = i / 64, at = (i % 64 / 8 ^ row % 8) * 16 + i % 8 * 2;
      s.out[i] = to_float(bf16{*reinterpret_cast<uint16_t*>(tile + row * 128 + at)});
    }
  }
}

// Copies 256 bytes of x to out.
__global__ void bulk_kernel(const float* x, float* out, int fault) {
  FASTGPT_DYNAMIC_SHARED(unsigned char, bytes);
  const ptx::Shared full = ptx::shared_address(bytes + 512);
  if (threadIdx.x != 0) return;
  ptx::mbarrier_init(full, 1);
  ptx::fence_mbarrier_init();
  ptx::mbarrier_arrive_expect(full, 256);
  const int off = fault == kOutside ? kBytes : fault == kMisplaced ? 8 : 0;
  ptx::bulk_load(ptx::shared_address(bytes) + off, x, fault == kTooFewBytes ? 248 : 256, full);
  ptx::mbarrier_wait(full, 0);
  for (int i = 0; i < 64; ++i) out[i] = reinterpret_cast<const float*>(bytes)[i];
}

__global__ void turns_kernel(float* out, int arrivals) {
  const int group = static_cast<int>(threadIdx.x) / 128;
  if (group == 1) ptx::named_arrive(1, 256);
  for (int i = 0; i < 3; ++i) {
    ptx::named_sync(1 + group, 256);
    if (threadIdx.x % 128 == 0) *out = *out * 10 + 1 + group;
    if (group == 0 || i < arrivals) ptx::named_arrive(2 - group, 256);
  }
}

template <int P, int C>
__global__ void registers_kernel(int part) {
  if (threadIdx.x < 128) ptx::give_registers<P>();
  else if (threadIdx.x < 384 - static_cast<unsigned>(part)) ptx::take_registers<C>();
}

template <typename F>
const char* attempt(F f) {
  static std::string said;
  said.clear();
  try {
    f();
  } catch (const std::exception& e) {
    said = e.what();
  }
  return said.c_str();
}

TensorMap map_of(const void* x, uint64_t rows, uint64_t columns) {
  return tensor_map({x, {columns, rows, 1, 1}, {columns * 2, columns * 2, columns * 2}, {64, 64, 1, 1}, true});
}

}  // namespace

extern "C" const char* set_schedule(int schedule) {
  emulator::machine().schedule = static_cast<emulator::Schedule>(schedule);
  return "";
}

extern "C" const char* rows(const void* a, const void* b, float* out, int fault) {
  return attempt([&] {
    launch("rows", rows_kernel, {1}, 128, kBytes, {}, Problem{map_of(a, 64, 64), map_of(b, 128, 64), out}, fault);
  });
}

extern "C" const char* columns(const float* a, const void* b, float* out, int fault) {
  return attempt([&] {
    launch("columns", columns_kernel, {1}, 128, kBytes, {}, Problem{{}, map_of(b, 64, 128), out}, a, fault);
  });
}

extern "C" const char* box(const void* x, float* out, int rows, int columns, int c0, int c1) {
  return attempt([&] {
    launch("box", box_kernel, {1}, 32, kBytes, {}, Problem{map_of(x, rows, columns), {}, out}, c0, c1);
  });
}

extern "C" const char* bulk(const float* x, float* out, int fault) {
  return attempt([&] { launch("bulk", bulk_kernel, {1}, 32, kBytes, {}, x, out, fault); });
}

extern "C" const char* turns(float* out, int arrivals) {
  return attempt([&] { launch("turns", turns_kernel, {1}, 256, 0, {}, out, arrivals); });
}

extern "C" const char* registers(int producer, int part) {
  return attempt([&] {
    if (producer == 24) launch("registers", registers_kernel<24, 240>, {1}, 384, 0, {}, part);
    else if (producer == 40) launch("registers", registers_kernel<40, 240>, {1}, 384, 0, {}, part);
    else launch("registers", registers_kernel<20, 240>, {1}, 384, 0, {}, part);
  });
}
