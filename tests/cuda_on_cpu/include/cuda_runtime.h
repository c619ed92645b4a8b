// CUDA kernels on the host, for tests: this file replaces the toolkit's cuda_runtime.h, so g++ compiles csrc/*/*.cu
// unchanged. Blocks run one after the other. The threads of a block are fibers that run until they wait, in an order
// that set_schedule picks. Barriers and warp collectives are rendezvous; a thread that never arrives is reported as a
// deadlock. Of a thread's asynchronous copies every other one is done at once, the rest at its wait. Each 16-byte access
// is checked for alignment, each launch for CUDA's limits. AddressSanitizer covers shared memory as well, because
// dynamic shared memory is allocated to its exact size. Shared memory is NaN when a block starts, and so is the target
// of an asynchronous copy from its issue to its wait: no kernel may rely on the earlier contents.
//
// What it cannot show: races between threads that run at the same time (it shows those that occur in some order of
// whole sections between barriers), memory ordering, the device's rounding of ex2, which products nvcc contracts to an
// FMA (gcc's choice is similar: emulator.py), registers, spills, occupancy, speed, and anything about streams and
// devices.
#pragma once
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static  // blocks run one at a time; red zones surround it
#else
#define __shared__ static __thread  // so all of it is one piece of memory (StaticShared)
#endif
#define FASTGPT_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(emulator::machine().dynamic_shared.get())

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the running fiber; the scheduler sets them.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorIllegalAddress = 700,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
using cudaStream_t = struct CUstream_st*;

namespace emulator {

enum class Schedule { forward, backward, random };
enum class State { ready, at_barrier, at_collective, done };

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Fiber {
  Context context;
  State state;
  uint3 thread;
  unsigned warp, lane;
  std::vector<Copy> copies;  // not yet done
  int groups, started;       // groups of copies: closed, started
};

struct Warp {
  void* lanes[32];
  const char* collective;
  int arrived;
};

constexpr size_t kStack = 256 * 1024;
constexpr unsigned kMaxThreads = 1024;

constexpr int kPoison = 0xff;  // bytes of a NaN, and of an index that no tensor has

// The static shared memory of this library's kernels: this thread's copy of its thread-local variables.
struct StaticShared {
  void* data = nullptr;
  size_t bytes = 0;

  StaticShared() {
    static __thread volatile char any;
    any = any;  // no copy exists before one of its variables is used
    dl_iterate_phdr(find, this);
  }

  static int find(dl_phdr_info* library, size_t, void* found) {
    const auto here = reinterpret_cast<uintptr_t>(&find);
    bool ours = false;
    const ElfW(Phdr)* variables = nullptr;
    for (int i = 0; i < library->dlpi_phnum; ++i) {
      const ElfW(Phdr)& part = library->dlpi_phdr[i];
      if (part.p_type == PT_LOAD) ours |= here - library->dlpi_addr - part.p_vaddr < part.p_memsz;
      if (part.p_type == PT_TLS) variables = &part;
    }
    if (!ours) return 0;
    auto& shared = *static_cast<StaticShared*>(found);
    if (variables != nullptr) shared.data = library->dlpi_tls_data, shared.bytes = variables->p_memsz;
    return 1;
  }

  void poison() const { std::memset(data, kPoison, bytes); }
};

// One running block. It holds all state of the emulation.
struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::function<void()> body;
  Context scheduler;
  Fiber* current = nullptr;
  unsigned live = 0, waiting = 0;
  Schedule schedule = Schedule::forward;
  std::mt19937 random{0};
  int multiprocessors = 1;                          // so one block computes several pieces of even a small tensor
  bool misaligned = false, dry = false;             // dry: launches are recorded, and nothing runs
  std::vector<std::array<uint64_t, 7>> launches;    // grid, block, bytes of dynamic shared memory
  std::set<const void*> kernels;                    // the launched ones
  std::function<void()> before_launch;              // runs once, in another thread, just before a launch
  std::string error;
  std::map<const void*, size_t> shared_limits;  // of kernels that requested more than 48 KB
  std::unique_ptr<void, void (*)(void*)> dynamic_shared{nullptr, std::free};
  char* stacks = static_cast<char*>(
      mmap(nullptr, kStack* kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));

  void wait(State state) {
    Fiber* me = current;
    me->state = state;
    switch_to(me->context, scheduler);
  }

  void open_barrier_if_full() {
    if (live == 0 || waiting < live) return;
    waiting = 0;
    for (Fiber& f : fibers) {
      if (f.state == State::at_barrier) f.state = State::ready;
    }
  }

  void barrier() {
    ++waiting;
    Fiber* me = current;
    me->state = State::at_barrier;
    open_barrier_if_full();
    if (me->state == State::at_barrier) switch_to(me->context, scheduler);
  }

  // Each of the warp's 32 lanes contributes `mine`; the last one computes for all.
  template <typename F>
  void meet(const char* collective, void* mine, F compute) {
    Fiber* me = current;
    Warp& warp = warps[me->warp];
    if (warp.arrived == 0) warp.collective = collective;
    if (std::strcmp(warp.collective, collective) != 0) {
      if (error.empty()) error = std::string("deadlock: a warp is at ") + warp.collective + " and at " + collective;
      wait(State::at_collective);
    }
    warp.lanes[me->lane] = mine;
    if (++warp.arrived < 32) return wait(State::at_collective);
    warp.arrived = 0;
    compute(warp.lanes);
    for (unsigned i = me->warp * 32; i < me->warp * 32 + 32; ++i) {
      if (&fibers[i] != me) fibers[i].state = State::ready;
    }
  }

  uint32_t shuffle_xor(uint32_t value, int lane_mask) {
    struct Lane {
      uint32_t value, result;
      int mask;
    } mine{value, 0, lane_mask};
    meet("shuffle", &mine, [](void* const* lanes) {
      for (int lane = 0; lane < 32; ++lane) {
        Lane& l = *static_cast<Lane*>(lanes[lane]);
        l.result = static_cast<Lane*>(lanes[lane ^ l.mask])->value;
      }
    });
    return mine.result;
  }

  void make(const Copy& c) {
    std::memset(c.to, 0, 16);
    if (c.bytes > 0) std::memcpy(c.to, c.from, c.bytes);
  }

  // Alternately early and late, which exposes code that relies on either.
  void copy_async(void* to, const void* from, int bytes) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) misaligned = true;
    const Copy copy{to, from, bytes, current->groups};
    if (current->started++ % 2 == 0) return make(copy);
    std::memset(to, kPoison, 16);
    current->copies.push_back(copy);
  }

  void wait_for_copies(int n_open) {
    std::vector<Copy>& copies = current->copies;
    size_t done = 0;
    while (done < copies.size() && copies[done].group < current->groups - n_open) make(copies[done++]);
    copies.erase(copies.begin(), copies.begin() + done);
  }

  void run_block();
  cudaError_t run(dim3 grid, dim3 block_size, size_t shared_bytes, size_t limit, std::function<void()> kernel);
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline void fiber_main() {
  Machine& m = machine();
  m.body();
  if (!m.current->copies.empty() && m.error.empty()) m.error = "a thread ended before its asynchronous copies";
  m.current->state = State::done;
  --m.live;
  m.open_barrier_if_full();
  switch_to(m.current->context, m.scheduler);
  std::abort();
}

inline void Machine::run_block() {
  const unsigned n = blockDim.x * blockDim.y * blockDim.z;
  fibers.resize(n);
  warps.assign((n + 31) / 32, Warp{});
  live = n;
  waiting = 0;
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule == Schedule::backward) std::reverse(order.begin(), order.end());
  for (unsigned i = 0; i < n; ++i) {
    char* stack = stacks + i * kStack;
    ASAN_UNPOISON_MEMORY_REGION(stack, kStack);
    start_at(fibers[i].context, stack, kStack, fiber_main);
    fibers[i].state = State::ready;
    fibers[i].thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    fibers[i].warp = i / 32;
    fibers[i].lane = i % 32;
    fibers[i].copies.clear();
    fibers[i].groups = fibers[i].started = 0;
  }
  while (live > 0) {
    bool progress = false;
    if (schedule == Schedule::random) std::shuffle(order.begin(), order.end(), random);
    for (const unsigned i : order) {
      if (fibers[i].state != State::ready) continue;
      progress = true;
      current = &fibers[i];
      threadIdx = current->thread;
      switch_to(scheduler, current->context);
    }
    if (progress) continue;
    if (!error.empty()) return;
    error = "deadlock: " + std::to_string(waiting) + " of " + std::to_string(live) + " threads wait at __syncthreads";
    return;
  }
}

inline cudaError_t Machine::run(dim3 grid, dim3 block_size, size_t shared_bytes, size_t limit,
                                std::function<void()> kernel) {
  const uint64_t n = uint64_t{block_size.x} * block_size.y * block_size.z;
  if (n == 0 || n > kMaxThreads || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 || shared_bytes > limit) {
    return cudaErrorInvalidConfiguration;
  }
  launches.push_back({grid.x, grid.y, grid.z, block_size.x, block_size.y, block_size.z, shared_bytes});
  if (dry) return cudaSuccess;
  gridDim = grid;
  blockDim = block_size;
  body = std::move(kernel);
  misaligned = false;
  error.clear();
  const StaticShared static_shared;
  const uint64_t n_blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t k = 0; k < n_blocks && error.empty(); ++k) {
    const uint64_t b = schedule == Schedule::backward ? n_blocks - 1 - k : k;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    void* memory = nullptr;
    if (shared_bytes > 0 && posix_memalign(&memory, 128, shared_bytes) != 0) std::abort();
    dynamic_shared.reset(memory);
    if (shared_bytes > 0) std::memset(dynamic_shared.get(), kPoison, shared_bytes);
    static_shared.poison();
    run_block();
  }
  if (misaligned) return cudaErrorMisalignedAddress;
  return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulator

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// 16 bytes; an access through a misaligned pointer fails the launch, as on the device.
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
  uint4() = default;
  uint4(uint32_t x_, uint32_t y_, uint32_t z_, uint32_t w_) : x(x_), y(y_), z(z_), w(w_) {}
  uint4(const uint4& o) { *this = o; }
  uint4& operator=(const uint4& o) {
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
inline T __ldg(const T* p) {
  return *p;
}

inline void __syncthreads() { emulator::machine().barrier(); }

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
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::machine().multiprocessors : 163 * 1024;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, const void*) {
  return of->sharedSizeBytes = kStaticShared, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes + kStaticShared > 163 * 1024) return cudaErrorInvalidValue;
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
  return m.run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
               asked == m.shared_limits.end() ? 48 * 1024 - kStaticShared : asked->second, [&] { kernel(arguments...); });
}
