// The machine that runs kernels on the host: one block at a time, whose threads are fibers (cuda_runtime.h).
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

#include "cuda_types.h"
#include "fiber.h"
#include "race.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace emulator {

enum class Schedule { forward, backward, random };
enum class State { ready, at_barrier, at_collective, stopped, done };

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
  std::string waits_for;     // at a collective of sm_90a
  race::Agent copier;        // does its asynchronous copies
  unsigned loads;            // ldmatrix so far
};

struct Warp {
  void* lanes[32];
  const char* collective;
  int arrived;
  race::Agent loader;  // does its ldmatrix
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
  std::vector<unsigned> leaving;  // the threads that leave a barrier
  std::function<void()> body;
  Context scheduler;
  Fiber* current = nullptr;
  unsigned live = 0, waiting = 0;
  uint64_t block = 0;                               // number of the running block, of all launches
  std::vector<std::function<void()>> at_end;        // checks at the end of the running block
  size_t shared_bytes = 0;                          // dynamic, of the running block
  int chip = 80;                                    // compute capability of the device
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
    leaving.clear();
    for (unsigned i = 0; i < fibers.size(); ++i) {
      if (fibers[i].state != State::at_barrier) continue;
      fibers[i].state = State::ready;
      leaving.push_back(i);
    }
    race::join(leaving);
  }

  void barrier() {
    const race::Aside aside;
    ++waiting;
    Fiber* me = current;
    me->state = State::at_barrier;
    open_barrier_if_full();
    if (me->state == State::at_barrier) switch_to(me->context, scheduler);
  }

  // Each of the warp's 32 lanes contributes `mine`; the last one computes for all.
  template <typename F>
  void meet(const char* collective, void* mine, F compute) {
    const race::Aside aside;
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

  void warp_barrier() {
    const unsigned first = current->warp * 32;
    meet("__syncwarp", nullptr, [&](void* const*) {
      leaving.resize(32);
      std::iota(leaving.begin(), leaving.end(), first);
      race::join(leaving);
    });
  }

  // The next ldmatrix of this warp.
  race::Work next_load() {
    const race::Aside aside;
    return {warps[current->warp].loader, ++current->loads};
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

  // The group of this thread's asynchronous copies that is open.
  race::Work open_group() {
    const race::Aside aside;
    return {current->copier, static_cast<unsigned>(current->groups) + 1};
  }

  void close_group() {
    const race::Aside aside;
    ++current->groups;
  }

  // Alternately early and late, which exposes code that relies on either.
  void copy_async(void* to, const void* from, int bytes) {
    const race::Aside aside;
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) misaligned = true;
    const Copy copy{to, from, bytes, current->groups};
    if (current->started++ % 2 == 0) return make(copy);
    std::memset(to, kPoison, 16);
    current->copies.push_back(copy);
  }

  void wait_for_copies(int n_open) {
    const race::Aside aside;
    std::vector<Copy>& copies = current->copies;
    size_t done = 0;
    while (done < copies.size() && copies[done].group < current->groups - n_open) make(copies[done++]);
    copies.erase(copies.begin(), copies.begin() + done);
    if (current->groups > n_open) race::finished({current->copier, static_cast<unsigned>(current->groups - n_open)});
  }

  size_t most_shared() const { return (chip == 90 ? 227 : 163) * 1024; }  // of a block

  std::string deadlock() const {
    std::string text = "deadlock: " + std::to_string(waiting) + " of " + std::to_string(live);
    text += " threads wait at __syncthreads";
    std::map<std::string, int> others;
    for (const Fiber& f : fibers) {
      if (f.state == State::at_collective && !f.waits_for.empty()) ++others[f.waits_for];
    }
    for (const auto& [what, threads] : others) text += ", " + std::to_string(threads) + " for " + what;
    return text;
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
  race::watch(true);
  m.body();
  race::watch(false);
  if (!m.current->copies.empty() && m.error.empty()) m.error = "a thread ended before its asynchronous copies";
  m.current->state = State::done;
  --m.live;
  m.open_barrier_if_full();
  switch_to(m.current->context, m.scheduler);
  std::abort();
}

// After a race, so that a kernel does not go on with a wrong value.
inline void stop_thread() { machine().wait(State::stopped); }

inline void Machine::run_block() {
  const unsigned n = blockDim.x * blockDim.y * blockDim.z;
  fibers.resize(n);
  warps.assign((n + 31) / 32, Warp{});
  live = n;
  waiting = 0;
  ++block;
  at_end.clear();
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
    fibers[i].waits_for.clear();
    fibers[i].copier = race::agent("an asynchronous copy of thread", i);
    fibers[i].loads = 0;
  }
  for (unsigned w = 0; w < warps.size(); ++w) warps[w].loader = race::agent("ldmatrix of warp", w);
  while (live > 0) {
    bool progress = false;
    if (schedule == Schedule::random) std::shuffle(order.begin(), order.end(), random);
    for (const unsigned i : order) {
      if (fibers[i].state != State::ready) continue;
      progress = true;
      current = &fibers[i];
      threadIdx = current->thread;
      race::thread_runs(i);
      switch_to(scheduler, current->context);
    }
    if (progress) continue;
    if (error.empty()) error = race::found();
    if (!error.empty()) return;
    error = deadlock();
    return;
  }
  if (!error.empty()) return;
  for (const auto& check : at_end) check();
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
  race::launch_starts();
  const uint64_t n_blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t k = 0; k < n_blocks && error.empty(); ++k) {
    const uint64_t b = schedule == Schedule::backward ? n_blocks - 1 - k : k;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    void* memory = nullptr;
    if (shared_bytes > 0 && posix_memalign(&memory, 128, shared_bytes) != 0) std::abort();
    dynamic_shared.reset(memory);
    this->shared_bytes = shared_bytes;
    if (shared_bytes > 0) std::memset(dynamic_shared.get(), kPoison, shared_bytes);
    static_shared.poison();
    race::block_starts(n, {stacks, kStack * kMaxThreads}, {memory, shared_bytes},
                       {static_shared.data, static_shared.bytes}, stop_thread);
    run_block();
  }
  if (misaligned && race::found().empty()) return cudaErrorMisalignedAddress;  // after a race, addresses may be poison
  return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulator
