// One multiprocessor, so kernels that loop over rows do so even at small shapes; the number in csrc where only the
// arithmetic of launches is tested (binding.cpp).
#pragma once

namespace fastgpt::cuda {

inline int kSms = 1;

}  // namespace fastgpt::cuda
