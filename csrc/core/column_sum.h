// A gradient that is a sum over rows.
#pragma once
#include "core/dtype.h"

namespace fastgpt {

struct ColumnSum {
  void* out;  // (C), or null if it is not needed
  DType dtype;
};

}  // namespace fastgpt
