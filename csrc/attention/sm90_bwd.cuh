// Shared by the kernels of backward of attention for sm_90a (sm90_bwd.cu, sm90_dkdv.cu).
#pragma once
#include "attention/cuda_bwd.cuh"
#include "attention/sm90.cuh"

namespace fastgpt::cuda {

// `low`: the first query that sees any key. Those before it may be uninitialised, so the maps of q and dout begin there:
// TMA makes rows before the start of a map 0.
struct Sm90Backward {
  TensorMap q, dout, k, v;
  BackwardLaunch l;
  int low;
};

// Returns the argument of a kernel that loads queries in tiles of n_rows, keys in tiles of n_keys.
Sm90Backward sm90_backward(const BackwardLaunch& l, int n_rows, int n_keys);

// Launches attention_dkdv_sm90_kernel (sm90_dkdv.cu).
void attention_dkdv_sm90(const BackwardLaunch& l, Stream stream);

}  // namespace fastgpt::cuda
