// Fibers: separate stacks and a switch between them. x86-64 and aarch64 save the callee-saved registers by hand
// (about 10 ns a switch); elsewhere ucontext.
#pragma once
#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__) && !defined(__aarch64__)
#define FASTGPT_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emulator {

#if defined(FASTGPT_UCONTEXT)

using Context = ucontext_t;
inline void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
inline void start_at(Context& c, char* stack, size_t size, void (*entry)()) {
  getcontext(&c);
  c.uc_stack.ss_sp = stack;
  c.uc_stack.ss_size = size;
  c.uc_link = nullptr;
  makecontext(&c, entry, 0);
}

#else

struct Context {
  void* sp = nullptr;
};

extern "C" void fastgpt_switch(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
  .text
  .local fastgpt_switch
  .type fastgpt_switch, @function
fastgpt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr int kSaved = 6, kReturn = 6, kFrame = 8;  // words: registers, place of the return address, whole frame
#else
asm(R"(
  .text
  .local fastgpt_switch
  .type fastgpt_switch, %function
fastgpt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
constexpr int kSaved = 20, kReturn = 11, kFrame = 20;
#endif

inline void switch_to(Context& from, Context& to) { fastgpt_switch(&from.sp, to.sp); }

// The first switch pops zeros and "returns" to entry, with the stack aligned as after a call.
inline void start_at(Context& c, char* stack, size_t size, void (*entry)()) {
  uint64_t* top = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t{15});
  uint64_t* sp = top - kFrame;
  for (int i = 0; i < kFrame; ++i) sp[i] = 0;
  sp[kReturn] = reinterpret_cast<uint64_t>(entry);
  c.sp = sp;
}

#endif

}  // namespace emulator
