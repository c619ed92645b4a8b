// Shared by the kernels of backward of attention: the workspace, and the gradient of a score.
#pragma once
#include "attention/cuda.cuh"

namespace fastgpt::cuda {

constexpr int kBlock = 64;  // queries per Sight in the workspace
constexpr int kPad = 128;   // rows of the workspace are padded to a multiple of this

// lse in base 2 and delta of one query. lse is +inf without keys and after the last query, so all powers are 0.
struct RowScale {
  float lse, delta;
};

struct BackwardLaunch : AttentionLaunch {
  RowScale* rows;  // (B, H, n_padded)
  KeySpan* spans;  // (B, n_padded); with options only
  Sight* sights;   // (B, n_padded / 64); with options only
  int64_t n_padded;
};

// Replaces q k^T in z and dout v^T in dz by keep p and dz, without the factors keep_scale and scale.
template <bool Full>
__device__ __forceinline__ void grad_score(const BackwardLaunch& l, const Dropout& dropout, const RowScale& row,
                                           int query, int key, float& z, float& dz) {
  float slope = 1.0f;
  bool keep = true;
  if constexpr (Full) {
    if (l.a.softcap > 0.0f) {
      const float t = tanh_fast(z * l.inner);
      slope = 1.0f - t * t;
      z = l.a.softcap * t;
    }
    if (l.a.rng != nullptr) {
      keep = dropout.keeps(query, key);
      dz = keep ? dz * l.a.keep_scale : 0.0f;
    }
  }
  const float p = ptx::ex2(z * l.power - row.lse);
  dz = p * (dz - row.delta) * slope;
  z = keep ? p : 0.0f;
}

// Returns the argument of the kernels.
BackwardLaunch backward_launch(const AttentionArgs& a);

// Launches the kernel that sets `rows`.
void prepare_rows(const BackwardLaunch& l, Stream stream);

// Launches attention_dkdv_kernel (cuda_dkdv.cu).
void attention_dkdv(const BackwardLaunch& l, Stream stream);

}  // namespace fastgpt::cuda
