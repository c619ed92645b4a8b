// The race detector of the emulation. Kernels are compiled with -fsanitize=thread, but linked with this file instead of
// the compiler's run-time library: each access of their C++ code calls a function at the end of this file. Instructions
// call race.h.
//
// Two accesses of the same bytes, one of them a write, are a race unless one happens before the other. That follows
// from the barriers that a thread has passed, and not from the order in which the emulation ran the threads: a race is
// found in any schedule. A thread or an agent (race.h) numbers its accesses: a thread counts on when others learn of
// what it has done, an agent with every group of copies. A thread's clock holds, for each thread and agent, the number
// up to which what they did happens before what it does now (vector clocks; Flanagan, Freund: FastTrack, PLDI 2009).
//
//   __syncthreads, __syncwarp   each thread that leaves learns what all of them know
//   cp.async                    runs from its issue until this thread waits for its group; other threads learn of that
//                               behind the next barrier
//   ldmatrix                    a warp loads as one: what its lanes do next comes after the loads of all lanes
//   shuffle, mma                order nothing: they exchange registers, and CUDA promises no order of memory
//   fences                      of mbarriers and of wgmma: checked where they are used (include/hopper_state.h, products.h)
//   atomics, other fences       none: no kernel has any, and a test says so when one gets them
//   blocks of a launch          have no order
//   launches                    run one after the other
//
// After a barrier of all threads these have the same clock, so they share one, and a thread keeps only what it has
// learnt since. For each 2 bytes of memory a cell holds the last write and the reads since that are not ordered among
// themselves. Not recorded: stacks, arguments of kernels and static data, which belong to one thread or never change.
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <unordered_map>
#include <utility>

#include "race.h"

namespace {

using Clock = std::vector<uint32_t>;

constexpr size_t kGranule = 2, kPage = 4096;
constexpr size_t kMaxPages = 4096;  // forgotten at the next launch if there are more

void anchor() {}

struct Access {
  uint32_t who = 0, number = 0;
  uint32_t block = 0;  // counts the blocks of all launches from 1; 0: none
  int32_t line = 0;    // distance of the return address from `anchor`
};

// Reads that `Cell::read` has no room for: of two other blocks, so that one of them conflicts with any writer, and of
// one block, not ordered among themselves.
struct Reads {
  Access others[2];
  std::vector<Access> same;
};

struct Cell {
  Access write, read;
  std::unique_ptr<Reads> more;
};

struct Page {
  Cell cells[kPage / kGranule];
};

struct Thread {
  std::shared_ptr<const Clock> known;       // may be shared with other threads
  std::vector<race::Work> since;            // learnt since
  uint32_t now = 1;
};

struct Named {
  const char* what;
  unsigned index;
};

bool contains(const race::Memory& m, uintptr_t p) { return p - reinterpret_cast<uintptr_t>(m.data) < m.bytes; }

void raise(Clock& clock, uint32_t who, uint32_t number) {
  if (who >= clock.size()) clock.resize(who + 1);
  clock[who] = std::max(clock[who], number);
}

void raise(Clock& clock, const Clock& other) {
  if (other.size() > clock.size()) clock.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

// ---- source lines ----

// Returns where this code is in the source, innermost first: "core/cuda/tile.cuh:66, from attention/cuda_fwd.cu:169".
std::string place(int32_t line) {
  const uintptr_t code = reinterpret_cast<uintptr_t>(&anchor) + line - 1;  // the call, not the instruction after it
  Dl_info library;
  if (dladdr(reinterpret_cast<void*>(code), &library) == 0) return "?";
  std::ostringstream command;
  command << "addr2line -i -e '" << library.dli_fname << "' 0x" << std::hex
          << code - reinterpret_cast<uintptr_t>(library.dli_fbase);
  FILE* lines = popen(command.str().c_str(), "r");
  std::string places;
  for (char text[4096]; lines != nullptr && std::fgets(text, sizeof text, lines) != nullptr;) {
    std::string at(text);
    at = at.substr(0, at.find_first_of(" \n"));
    if (at.find("cuda_on_cpu/include/") != std::string::npos || at.find("/c++/") != std::string::npos) continue;
    const size_t below = at.rfind("csrc/"), slash = at.rfind('/');
    at = below != std::string::npos ? at.substr(below + 5) : slash != std::string::npos ? at.substr(slash + 1) : at;
    places += (places.empty() ? "" : ", from ") + at;
  }
  if (lines != nullptr) pclose(lines);
  return places.empty() ? "?" : places;
}

// ---- the detector ----

class Detector {
 public:
  void launch_starts() {
    report.clear();
    first_block = block + 1;
    if (pages.size() > kMaxPages) pages.clear(), recent = {};
    find_host_memory();
  }

  void block_starts(unsigned n, race::Memory stacks_, race::Memory dynamic, race::Memory fixed, void (*stop_)()) {
    ++block;
    n_threads = n;
    agents.clear();
    stacks = stacks_, shared[0] = dynamic, shared[1] = fixed, stop = stop_;
    const auto nothing = std::make_shared<const Clock>();
    threads.assign(n, Thread{nothing, {}, 1});
  }

  race::Agent agent(const char* what, unsigned index) {
    agents.push_back({what, index});
    return n_threads + static_cast<race::Agent>(agents.size()) - 1;
  }

  void access(const void* p, size_t bytes, bool writes, const void* code) { access(p, bytes, writes, own(), code); }

  void access(const void* p, size_t bytes, bool writes, race::Work work, const void* code) {
    const auto from = reinterpret_cast<uintptr_t>(p);
    if (bytes == 0) return;
    const bool in_shared = contains(shared[0], from) || contains(shared[1], from);
    if (!in_shared && of_one_thread(from)) return;
    const race::Aside aside;
    const auto line = static_cast<int32_t>(reinterpret_cast<intptr_t>(code) - reinterpret_cast<intptr_t>(&anchor));
    const Access access{work.agent, work.number, block, line};
    for (uintptr_t at = from / kGranule; at <= (from + bytes - 1) / kGranule; ++at) {
      Cell& cell = cell_at(at);
      const Access* other = writes ? conflict_of_write(cell, in_shared) : conflict_of_read(cell, in_shared);
      if (other != nullptr) {
        tell(access, writes, *other, other == &cell.write, in_shared);
        stop();
      }
      writes ? record_write(cell, access) : record_read(cell, access);
    }
  }

  void finished(race::Work work) {
    const race::Aside aside;
    std::vector<race::Work>& since = threads[running].since;
    for (race::Work& w : since) {
      if (w.agent == work.agent) return void(w.number = std::max(w.number, work.number));
    }
    since.push_back(work);
  }

  void join(const std::vector<unsigned>& of) {
    if (of.empty()) return;
    const std::shared_ptr<const Clock> old = threads[of.front()].known;
    const auto next = std::make_shared<Clock>(*old);
    for (const unsigned i : of) {
      if (threads[i].known != old) raise(*next, *threads[i].known);
      publish(i, *next);
    }
    for (const unsigned i : of) threads[i].known = next, threads[i].since.clear();
  }

  void release(race::Order& order) {
    const race::Aside aside;
    raise(order.known, *threads[running].known);
    publish(running, order.known);
  }

  void acquire(const race::Order& order) {
    const race::Aside aside;
    const auto next = std::make_shared<Clock>(*threads[running].known);
    raise(*next, order.known);
    threads[running].known = next;
  }

  unsigned running = 0;
  std::string report;

 private:
  race::Work own() const { return {running, threads[running].now}; }

  // Adds what this thread did and learnt to the clock. What it does next is new.
  void publish(unsigned i, Clock& clock) {
    Thread& t = threads[i];
    raise(clock, i, t.now++);
    for (const race::Work& w : t.since) raise(clock, w.agent, w.number);
  }

  bool knows(const Access& a) const {
    if (a.who == running) return true;
    const Thread& t = threads[running];
    if (a.who < t.known->size() && a.number <= (*t.known)[a.who]) return true;
    for (const race::Work& w : t.since) {
      if (w.agent == a.who) return a.number <= w.number;
    }
    return false;
  }

  // Whether the running thread must not do something that conflicts with this access.
  bool unordered(const Access& a, bool in_shared) const {
    if (a.block == block) return !knows(a);
    return !in_shared && a.block >= first_block;  // of another block, or of an earlier launch
  }

  const Access* conflict_of_read(const Cell& cell, bool in_shared) const {
    return unordered(cell.write, in_shared) ? &cell.write : nullptr;
  }

  const Access* conflict_of_write(const Cell& cell, bool in_shared) const {
    if (unordered(cell.write, in_shared)) return &cell.write;
    if (unordered(cell.read, in_shared)) return &cell.read;
    if (cell.more == nullptr) return nullptr;
    for (const Access& a : cell.more->others) {
      if (a.block != block && unordered(a, in_shared)) return &a;
    }
    for (const Access& a : cell.more->same) {
      if (unordered(a, in_shared)) return &a;
    }
    return nullptr;
  }

  static void record_write(Cell& cell, const Access& access) {
    cell.write = access, cell.read = Access{};
    cell.more.reset();
  }

  void record_read(Cell& cell, const Access& access) const {
    const Access old = std::exchange(cell.read, access);
    if (old.block < first_block || (old.block == block && (old.who == access.who || knows(old)))) return;
    if (cell.more == nullptr) cell.more = std::make_unique<Reads>();
    Reads& more = *cell.more;
    if (!more.same.empty() && more.same.front().block != block) {
      keep_other(more, more.same.front());
      more.same.clear();
    }
    if (old.block != block) return keep_other(more, old);
    std::erase_if(more.same, [&](const Access& a) { return a.who == old.who || knows(a); });
    more.same.push_back(old);
  }

  void keep_other(Reads& more, const Access& a) const {
    for (Access& other : more.others) {
      if (other.block == a.block && a.block >= first_block) return;
      if (other.block < first_block) return void(other = a);
    }
  }

  // Or never written by a kernel.
  bool of_one_thread(uintptr_t p) const {
    return contains(stacks, p) || contains(library, p) || contains(host_stack, p);
  }

  void find_host_memory() {
    pthread_attr_t attributes;
    void* low = nullptr;
    size_t size = 0;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
      pthread_attr_getstack(&attributes, &low, &size);
      pthread_attr_destroy(&attributes);
    }
    host_stack = {low, size};
    dl_iterate_phdr(find_library, this);
  }

  static int find_library(dl_phdr_info* info, size_t, void* detector) {
    const auto here = reinterpret_cast<uintptr_t>(&anchor);
    uintptr_t low = UINTPTR_MAX, high = 0;
    bool ours = false;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const ElfW(Phdr)& part = info->dlpi_phdr[i];
      if (part.p_type != PT_LOAD) continue;
      const uintptr_t begin = info->dlpi_addr + part.p_vaddr;
      ours |= here - begin < part.p_memsz;
      low = std::min(low, begin), high = std::max(high, begin + part.p_memsz);
    }
    if (ours) static_cast<Detector*>(detector)->library = {reinterpret_cast<void*>(low), high - low};
    return ours;
  }

  Cell& cell_at(uintptr_t granule) {
    const uintptr_t number = granule / (kPage / kGranule);
    auto& [key, page] = recent[number % std::size(recent)];
    if (page == nullptr || key != number) {
      std::unique_ptr<Page>& found = pages[number];
      if (found == nullptr) found = std::make_unique<Page>();
      key = number, page = found.get();
    }
    return page->cells[granule % (kPage / kGranule)];
  }

  std::string name(const Access& a) const {
    std::string who = "thread " + std::to_string(a.who);
    if (a.who >= n_threads) {
      const Named named = a.who - n_threads < agents.size() ? agents[a.who - n_threads] : Named{"an agent", a.who};
      who = named.what + (" " + std::to_string(named.index));
    }
    return a.block == block ? who : who + " of another block";
  }

  void tell(const Access& a, bool writes, const Access& other, bool other_writes, bool in_shared) {
    if (!report.empty()) return;
    report = std::string("race on ") + (in_shared ? "shared" : "global") + " memory: " + name(a) +
             (writes ? " writes at " : " reads at ") + place(a.line) + "; nothing orders that after " + name(other) +
             ", which " + (other_writes ? "writes at " : "reads at ") + place(other.line);
  }

  unsigned n_threads = 0;
  uint32_t block = 0, first_block = 1;
  std::vector<Thread> threads;
  std::vector<Named> agents;
  race::Memory stacks{}, library{}, host_stack{}, shared[2]{};
  void (*stop)() = nullptr;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  struct Recent {
    uintptr_t number;
    Page* page;
  };
  std::array<Recent, 64> recent{};
};

Detector& detector() {
  static Detector d;
  return d;
}

}  // namespace

namespace race {

void launch_starts() { detector().launch_starts(); }
void block_starts(unsigned n, Memory stacks, Memory dynamic, Memory fixed, void (*stop)()) {
  detector().block_starts(n, stacks, dynamic, fixed, stop);
}
void thread_runs(unsigned thread) { detector().running = thread; }
std::string found() { return detector().report; }
Agent agent(const char* what, unsigned index) { return detector().agent(what, index); }
void finished(Work work) { detector().finished(work); }
void join(const std::vector<unsigned>& threads) { detector().join(threads); }
void release(Order& order) { detector().release(order); }
void acquire(const Order& order) { detector().acquire(order); }

#define HERE __builtin_return_address(0)
void read(const void* p, size_t bytes) { detector().access(p, bytes, false, HERE); }
void write(void* p, size_t bytes) { detector().access(p, bytes, true, HERE); }
void read_by(Work work, const void* p, size_t bytes) { detector().access(p, bytes, false, work, HERE); }
void write_by(Work work, void* p, size_t bytes) { detector().access(p, bytes, true, work, HERE); }

}  // namespace race

// ---- what code compiled with -fsanitize=thread calls ----

// The detector's own containers may be linked from such code, so this comes before anything else.
#define REPORT(p, bytes, writes) \
  if (race::watching) detector().access(p, bytes, writes, HERE)
#define ACCESS(n)                                                       \
  void __tsan_read##n(void* p) { REPORT(p, n, false); }                 \
  void __tsan_write##n(void* p) { REPORT(p, n, true); }                 \
  void __tsan_unaligned_read##n(void* p) { REPORT(p, n, false); }       \
  void __tsan_unaligned_write##n(void* p) { REPORT(p, n, true); }

extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, unsigned long bytes) { REPORT(p, bytes, false); }
void __tsan_write_range(void* p, unsigned long bytes) { REPORT(p, bytes, true); }
void __tsan_init() {}
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return *p; }  // guards of static variables
}
