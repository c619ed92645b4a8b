// Where a launcher's work runs, its last argument. fastgpt::cpu and fastgpt::cuda have a Stream each and launchers of the
// same names: a template that calls `layer_norm_fwd(a, stream)` finds those of the stream's namespace.
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

// Declares an op's launchers, and the sizes of their workspaces, for both.
#define FASTGPT_ON_EACH_DEVICE(...) \
  namespace cpu {                   \
  __VA_ARGS__                       \
  }                                 \
  namespace cuda {                  \
  __VA_ARGS__                       \
  }

}  // namespace fastgpt
