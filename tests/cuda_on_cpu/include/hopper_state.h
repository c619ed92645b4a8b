// What the emulation of sm_90a keeps for the running block: mbarriers, copies in flight, named barriers, registers of
// warpgroups, products in flight (products.h). hopper.cuh and wgmma.cuh of this folder call it.
//
// Copies: every other one lands at once, the rest when somebody waits for their barrier; until then their target is NaN.
// An mbarrier counts arrivals and bytes as the device does. Where the device's behaviour is undefined, or it would hang,
// the launch fails with a sentence.
#pragma once
#include <cuda_runtime.h>

#include <deque>
#include <list>
#include <type_traits>

namespace emulator {

struct Mbarrier {
  uint32_t expected, pending;  // arrivals of a phase, those that are missing
  race::Agent copier;          // brings its bytes; its work is numbered by phases, from 1
  const Fiber* by;             // the thread that initialised it
  int64_t bytes = 0;           // announced and not yet there
  unsigned phase = 0;          // phases that have ended
  bool known = false;          // to TMA: fenced after its initialisation
  race::Order arrived, ended;  // of the present phase, of the one before
};

struct BulkCopy {
  uintptr_t barrier;
  uint32_t bytes;
  std::function<void()> land;
};

struct NamedBarrier {
  unsigned threads = 0, arrived = 0;
  std::vector<Fiber*> waiting;
  std::list<race::Order> orders = std::list<race::Order>(1);  // the last: of those that arrive until it opens
};

// Without streams: the race detector has no part for them.
template <typename Part>
std::string text_of(const Part& part) {
  if constexpr (std::is_integral_v<Part>) return std::to_string(part);
  else return std::string(part);
}

// Makes the launch fail with a sentence of these parts, unless it has failed before.
template <typename... Parts>
void fail(const Parts&... parts) {
  if (machine().error.empty()) machine().error = (text_of(parts) + ...);
}

// Also ends the thread's part in the launch: the scheduler reports the error once nothing else can run.
template <typename... Parts>
void stop(const Parts&... parts) {
  fail(parts...);
  machine().current->waits_for = "nothing: it has failed";
  machine().wait(State::at_collective);
}

struct Hopper {
  uint64_t block = 0;
  std::map<uintptr_t, Mbarrier> barriers;
  std::map<uintptr_t, std::vector<Fiber*>> waiting;  // for a phase of an mbarrier
  std::deque<BulkCopy> copies;                       // not yet landed
  unsigned started = 0;                              // copies
  NamedBarrier named[16];
  std::map<unsigned, std::pair<unsigned, unsigned>> registers;  // warpgroup -> number, threads that asked for it

  // ---- addresses ----

  static int64_t offset(uintptr_t address) {
    return static_cast<int64_t>(address - reinterpret_cast<uintptr_t>(machine().dynamic_shared.get()));
  }

  // Whether bytes from `address` on are in the dynamic shared memory of the block.
  static bool in_shared(uintptr_t address, size_t bytes) {
    const auto start = reinterpret_cast<uintptr_t>(machine().dynamic_shared.get());
    return address >= start && address + bytes <= start + machine().shared_bytes;
  }

  // ---- mbarriers ----

  void init(uintptr_t at, uint32_t arrivals) {
    if (at % 8 != 0 || !in_shared(at, 8)) stop("mbarrier.init: no 8 aligned bytes of shared memory at ", offset(at));
    if (arrivals == 0 || arrivals >= 1u << 20) stop("mbarrier.init: ", arrivals, " arrivals");
    if (barriers.count(at) > 0) stop("mbarrier.init: the barrier at ", offset(at), " is in use");
    const race::Agent copier = race::agent("TMA for mbarrier", static_cast<unsigned>(barriers.size()));
    barriers[at] = {arrivals, arrivals, copier, machine().current};
  }

  // Only for what this thread has initialised: another thread's fence does not wait for it.
  void fence_init() {
    for (auto& [at, b] : barriers) b.known |= b.by == machine().current;
  }

  Mbarrier& find(uintptr_t at, const char* who) {
    const auto found = barriers.find(at);
    if (found == barriers.end()) stop(who, ": no mbarrier was initialised at ", offset(at));
    return found->second;
  }

  void end_phase_if_complete(uintptr_t at, Mbarrier& b) {
    if (b.pending > 0 || b.bytes != 0) return;
    ++b.phase;
    b.pending = b.expected;
    b.ended = std::exchange(b.arrived, {});
    for (Fiber* f : waiting[at]) f->state = State::ready;
    waiting[at].clear();
  }

  void arrive(uintptr_t at, uint32_t bytes) {
    Mbarrier& b = find(at, "mbarrier.arrive");
    b.bytes += bytes;
    if (b.pending == 0) stop("mbarrier.arrive: more arrivals than the ", b.expected, " of a phase at ", offset(at));
    --b.pending;
    race::release(b.arrived);
    end_phase_if_complete(at, b);
  }

  bool ended(uintptr_t at, uint32_t parity) { return (find(at, "mbarrier.try_wait").phase & 1) != parity; }

  // Lands the copies that this barrier waits for.
  void land(uintptr_t at) {
    for (size_t i = 0; i < copies.size();) {
      if (copies[i].barrier != at) {
        ++i;
        continue;
      }
      const BulkCopy copy = copies[i];
      copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(i));
      complete(copy);
    }
  }

  void complete(const BulkCopy& copy) {
    copy.land();
    Mbarrier& b = barriers.at(copy.barrier);
    b.bytes -= copy.bytes;
    end_phase_if_complete(copy.barrier, b);
  }

  void wait(uintptr_t at, uint32_t parity) {
    if (parity > 1) stop("mbarrier.try_wait: parity ", parity, ", expected 0 or 1");
    if (!ended(at, parity)) land(at);
    while (!ended(at, parity)) {
      Fiber* me = machine().current;
      me->waits_for = "parity " + std::to_string(parity) + " of the mbarrier at " + std::to_string(offset(at));
      waiting[at].push_back(me);
      machine().wait(State::at_collective);
      if (!ended(at, parity)) land(at);
    }
    machine().current->waits_for.clear();
    const Mbarrier& b = barriers.at(at);
    race::acquire(b.ended);
    if (b.phase > 0) race::finished({b.copier, b.phase});
  }

  // The copies that bring bytes in the present phase.
  race::Work copies_of(uintptr_t at) {
    const Mbarrier& b = find(at, "cp.async.bulk.tensor");
    return {b.copier, b.phase + 1};
  }

  // ---- copies ----

  void copy(BulkCopy c) {
    const Mbarrier& b = find(c.barrier, "cp.async.bulk.tensor");
    if (!b.known) {
      stop("cp.async.bulk.tensor: the mbarrier at ", offset(c.barrier), " was not fenced after its initialisation");
    }
    // at once for threads that wait already: nothing else would wake them
    if (started++ % 2 == 0 || !waiting[c.barrier].empty()) return complete(c);
    copies.push_back(std::move(c));
  }

  // ---- named barriers ----

  void named_barrier(int number, unsigned threads, bool waits) {
    if (number < 1 || number > 15 || threads == 0 || threads % 32 != 0 || threads > fibers()) {
      stop("bar: number ", number, " with ", threads, " threads, expected 1 to 15 and whole warps of the block");
    }
    NamedBarrier& b = named[number];
    if (b.arrived == 0) b.threads = threads;
    if (b.threads != threads) {
      stop("bar: barrier ", number, " is used with ", b.threads, " and with ", threads, " threads");
    }
    ++b.arrived;
    race::Order& order = b.orders.back();
    race::release(order);
    Fiber* me = machine().current;
    if (waits) {
      me->waits_for = "the named barrier " + std::to_string(number);
      me->state = State::at_collective;
      b.waiting.push_back(me);
    }
    if (b.arrived == b.threads) {
      for (Fiber* f : b.waiting) f->state = State::ready;
      b.waiting.clear();
      b.arrived = 0;
      b.orders.emplace_back();
    }
    if (!waits) return;
    if (me->state != State::ready) switch_to(me->context, machine().scheduler);
    me->waits_for.clear();
    race::acquire(order);
  }

  static unsigned fibers() { return static_cast<unsigned>(machine().fibers.size()); }

  // ---- registers ----

  void set_registers(unsigned n) {
    if (n % 8 != 0 || n < 24 || n > 256) stop("setmaxnreg: ", n, " registers, expected a multiple of 8 from 24 to 256");
    auto& [number, threads] = registers[machine().current->warp / 4];
    if (threads % 128 != 0 && number != n) stop("setmaxnreg: a warpgroup asks for ", number, " and for ", n);
    number = n, ++threads;
  }

  // ---- the end of a block ----

  void check_end() {
    for (const BulkCopy& c : copies) fail("a block ended before a copy had landed for the mbarrier at ", offset(c.barrier));
    for (const auto& [at, b] : barriers) {
      if (b.bytes != 0) fail("a block ended with bytes that the mbarrier at ", offset(at), " expects");
    }
    for (int i = 1; i < 16; ++i) {
      const unsigned arrived = named[i].arrived;
      if (arrived > 0) fail("a block ended with ", arrived, " threads at the named barrier ", i);
    }
    unsigned total = 0;
    for (const auto& [group, r] : registers) {
      if (r.second % 128 != 0) fail("setmaxnreg: only a part of warpgroup ", group, " executes it");
      total += 128 * r.first;
    }
    if (total > 65536) fail("deadlock: setmaxnreg asks for ", total, " registers, a multiprocessor has 65536");
  }
};

// Of the running block.
inline Hopper& hopper() {
  static Hopper h;
  Machine& m = machine();
  if (h.block != m.block) {
    h = Hopper{};
    h.block = m.block;
    m.at_end.push_back([] { hopper().check_end(); });
  }
  return h;
}

// For programs that include no CUDA: lets the device be of this compute capability, as in 90.
__attribute__((used)) inline void set_chip(int chip) { machine().chip = chip; }

// Calls f(hopper()); what it does with memory is no access of the kernel.
template <typename F>
void hopper_aside(F f) {
  const race::Aside aside;
  f(hopper());
}

inline race::Work copies_of(uintptr_t barrier) {
  const race::Aside aside;
  return hopper().copies_of(barrier);
}

}  // namespace emulator
