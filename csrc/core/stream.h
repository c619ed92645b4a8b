// The last argument of every launcher says where the work runs. fastgpt::cpu and fastgpt::cuda each have a Stream, and
// launchers of the same names: a template that calls `layer_norm_fwd(a, stream)` finds the one in the namespace of its
// stream.
#pragma once

namespace fastgpt {

namespace cpu {
struct Stream {};  // the work is done when the launcher returns
}  // namespace cpu

namespace cuda {
struct Stream {
  void* handle = nullptr;  // a cudaStream_t
};
}  // namespace cuda

// Declares the launchers of an op, and the functions that give workspace sizes, in both namespaces.
#define FASTGPT_ON_EACH_DEVICE(...) \
  namespace cpu {                   \
  __VA_ARGS__                       \
  }                                 \
  namespace cuda {                  \
  __VA_ARGS__                       \
  }

}  // namespace fastgpt
