// CUDA kernels on the host, for tests: this file replaces the toolkit's cuda_runtime.h, so g++ compiles csrc/*/*.cu
// unchanged. Blocks run one after the other. The threads of a block are fibers that run until they wait, in an order
// that set_schedule picks. Barriers and warp collectives are rendezvous; a thread that never arrives is reported as a
// deadlock. Of a thread's asynchronous copies every other one is done at once, the rest at its wait. Each 16-byte access
// is checked for alignment, each launch for CUDA's limits. AddressSanitizer covers shared memory as well, because
// dynamic shared memory is allocated to its exact size. Shared memory is NaN when a block starts, and so is the target
// of an asynchronous copy from its issue to its wait: no kernel may rely on the earlier contents.
//
// Built with FASTGPT_RACES, it reports each two accesses without an order, whatever the order of threads was: race.h.
// Otherwise it shows only races that change a result in some order of whole sections between barriers.
//
// What it cannot show: the device's rounding of ex2, which products nvcc contracts to an FMA (gcc's choice is similar:
// emulator.py), registers, spills, occupancy, speed, and anything about streams and devices.
#pragma once
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "machine.h"

#define __host__
#define __device__
#define __global__
#if defined(FASTGPT_RACES)
#define __forceinline__ inline __attribute__((always_inline))  // so the line of the kernel is known
#else
#define __forceinline__ inline
#endif
#define __launch_bounds__(...)
#define __grid_constant__
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static  // blocks run one at a time; red zones surround it
#else
#define __shared__ static __thread  // so all of it is one piece of memory (StaticShared)
#endif
#define FASTGPT_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(emulator::machine().dynamic_shared.get())

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// 16 bytes; an access through a misaligned pointer fails the launch, as on the device.
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
  uint4() = default;
  uint4(uint32_t x_, uint32_t y_, uint32_t z_, uint32_t w_) : x(x_), y(y_), z(z_), w(w_) {}
  __forceinline__ uint4(const uint4& o) { *this = o; }
  __forceinline__ uint4& operator=(const uint4& o) {
    uintptr_t to = reinterpret_cast<uintptr_t>(this), from = reinterpret_cast<uintptr_t>(&o);
    asm("" : "+r"(to), "+r"(from));  // the compiler must not assume their alignment
    if ((to | from) % 16 != 0) emulator::machine().misaligned = true;
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), 16);
    return *this;
  }
};

// A product that is never contracted with a sum to an FMA.
inline float __fmul_rn(float a, float b) {
  float product = a * b;
  asm("" : "+m"(product));
  return product;
}

template <typename T>
__forceinline__ T __ldg(const T* p) {
  return *p;
}

inline void __syncthreads() { emulator::machine().barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulator::machine().warp_barrier(); }

template <typename T>
T __shfl_xor_sync(unsigned, T v, int lane_mask) {
  static_assert(sizeof(T) % 4 == 0);  // a value of 8 bytes takes two shuffles, on the device as well
  uint32_t bits[sizeof(T) / 4];
  std::memcpy(bits, &v, sizeof v);
  for (uint32_t& word : bits) word = emulator::machine().shuffle_xor(word, lane_mask);
  std::memcpy(&v, bits, sizeof v);
  return v;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// Like a device of sm_80 on which every kernel has this much static shared memory.
constexpr int kStaticShared = 4096;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulator::Machine& m = emulator::machine();
  if (attribute == cudaDevAttrMultiProcessorCount) *value = m.multiprocessors;
  else if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) *value = static_cast<int>(m.most_shared());
  else *value = attribute == cudaDevAttrComputeCapabilityMajor ? m.chip / 10 : m.chip % 10;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, const void*) {
  return of->sharedSizeBytes = kStaticShared, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes + kStaticShared) > emulator::machine().most_shared()) {
    return cudaErrorInvalidValue;
  }
  emulator::machine().shared_limits[kernel] = bytes;
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  if (error == cudaErrorInvalidValue) return "invalid argument";
  if (error == cudaErrorMisalignedAddress) return "misaligned address";
  return emulator::machine().error.c_str();
}

// Runs to completion before it returns.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  emulator::Machine& m = emulator::machine();
  if (const auto other = std::exchange(m.before_launch, nullptr)) other();
  m.kernels.insert(reinterpret_cast<const void*>(kernel));
  const auto asked = m.shared_limits.find(reinterpret_cast<const void*>(kernel));
  const std::tuple<Arguments...> given(arguments...);  // on the host's stack, which is no memory of the device
  return m.run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
               asked == m.shared_limits.end() ? 48 * 1024 - kStaticShared : asked->second,
               [&] { std::apply(kernel, given); });
}
