// One multiprocessor, so that kernels which loop over rows do so at small shapes; csrc's number where only the
// arithmetic of launches is looked at (binding.cpp).
#pragma once

namespace fastgpt::cuda {

inline int kSms = 1;

}  // namespace fastgpt::cuda
