// Element types of the tensors that kernels read and write. Every <op>/op.h separates the torch glue (<op>/glue.cpp)
// from the kernels (<op>/cpu.cpp, <op>/cuda.cu): it passes raw pointers, sizes and a stream, and includes no torch
// header. CPU and CUDA kernels use the same structs. The caller checks shapes and dtypes.
//
// N = n_rows is the number of rows, C = n_cols the number of columns. `*_row` is the distance between two rows in
// elements (0 for an expanded tensor); columns are contiguous. Pointers need only element alignment: kernels choose
// their vector width from it.
#pragma once
#include <cstdint>

namespace fastgpt {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, i16 = 3 };

}  // namespace fastgpt
