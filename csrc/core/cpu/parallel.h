// parallel_for for the CPU kernels. It hides the thread pool of PyTorch behind one function: kernel files include no
// torch header. The ranges depend on the number of threads; results must not.
#pragma once
#include <cstdint>

namespace fastgpt {

using RangeFn = void (*)(const void* context, int64_t begin, int64_t end);

// Implemented in glue/parallel.cpp.
void parallel_ranges(int64_t n, int64_t grain, RangeFn fn, const void* context);

// Calls fn(begin, end) for ranges that cover [0, n), each at least `grain` long where possible.
template <class F>
inline void parallel_for(int64_t n, int64_t grain, const F& fn) {
  parallel_ranges(
      n, grain, [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
      &fn);
}

}  // namespace fastgpt
