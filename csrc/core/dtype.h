// Element types of the tensors that kernels read and write. Every <op>/op.h is a boundary between the torch glue
// (<op>/glue.cpp) and the kernels (<op>/cpu.cpp, <op>/cuda.cu): raw pointers, sizes and a stream, no torch header. CPU
// and CUDA take the same structs. Shapes and dtypes are checked by the caller.
//
// Rows are N = n_rows, columns C = n_cols. `*_row` is the distance between two rows in elements (0 for an expanded
// tensor); columns are contiguous. Pointers need only element alignment: kernels choose their vector width from it.
#pragma once
#include <cstdint>

namespace fastgpt {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, i16 = 3 };

}  // namespace fastgpt
