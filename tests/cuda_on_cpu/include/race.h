// What the emulation tells its race detector. Only builds with FASTGPT_RACES contain one (races/detector.cpp, which
// explains how it decides); in all others these functions do nothing.
//
// The compiler reports the accesses of a kernel's C++ code. An instruction of ptx.cuh reports its own:
//   - At once, by the running thread: read(p, bytes), write(p, bytes).
//   - In the background (cp.async, TMA, wgmma): whatever does the work is an Agent and numbers its pieces of work 1, 2,
//     ... A thread that starts one calls read_by(work, p, bytes) and write_by(work, p, bytes). A thread whose wait ends
//     calls finished(work): from now on it may rely on the work of this agent up to this number. cp.async has an agent
//     for each thread, whose groups are the numbers; ldmatrix one for each warp. For TMA it is one for each mbarrier,
//     whose phases are the numbers; for wgmma one for each warpgroup, whose groups are the numbers.
//   - Order between threads: join(threads) when the last of these threads has arrived at a barrier that all of them
//     leave together; otherwise release(order) in each thread that arrives and acquire(order) in each whose wait ends.
//     An mbarrier has an Order for each phase.
// read, write, read_by and write_by take the source line from their return address, so they are called from functions
// that are __forceinline__. What the emulation itself does with memory is in a scope of Aside, where nothing is
// reported.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace race {

using Agent = unsigned;

struct Work {
  Agent agent;
  unsigned number;
};

// What a thread that acquires it knows: the number up to which it may rely on each thread and agent.
struct Order {
  std::vector<uint32_t> known;
};

struct Memory {
  const void* data;
  size_t bytes;
};

#if defined(FASTGPT_RACES)

inline bool watching = false;  // the code of a kernel runs, so accesses count

// The compiler inserts its reports late, when it has already moved accesses and removed stores: not across this.
inline void watch(bool on) {
  asm volatile("" ::: "memory");
  watching = on;
  asm volatile("" ::: "memory");
}

struct Aside {
  const bool was = watching;
  Aside() { watch(false); }
  ~Aside() { watch(was); }
};

void launch_starts();
// `stop` ends the running thread after a race; it is called at most once per thread and does not return.
void block_starts(unsigned n_threads, Memory stacks, Memory dynamic_shared, Memory static_shared, void (*stop)());
void thread_runs(unsigned thread);
std::string found();                               // the first race of the launch, or ""
Agent agent(const char* what, unsigned index);     // a new one of this block, reported as "`what` `index`"

void read(const void* p, size_t bytes);
void write(void* p, size_t bytes);
void read_by(Work work, const void* p, size_t bytes);
void write_by(Work work, void* p, size_t bytes);
void finished(Work work);
void join(const std::vector<unsigned>& threads);
void release(Order& order);
void acquire(const Order& order);

#else

struct Aside {
  Aside() {}  // so that no compiler warns of an unused variable
};

inline void watch(bool) {}
inline void launch_starts() {}
inline void block_starts(unsigned, Memory, Memory, Memory, void (*)()) {}
inline void thread_runs(unsigned) {}
inline std::string found() { return ""; }
inline Agent agent(const char*, unsigned) { return 0; }
inline void read(const void*, size_t) {}
inline void write(void*, size_t) {}
inline void read_by(Work, const void*, size_t) {}
inline void write_by(Work, void*, size_t) {}
inline void finished(Work) {}
inline void join(const std::vector<unsigned>&) {}
inline void release(Order&) {}
inline void acquire(const Order&) {}

#endif

}  // namespace race
