// One multiprocessor, so that kernels which loop over rows do so at small shapes.
#pragma once

namespace fastgpt::cuda {

constexpr int kSms = 1;

}  // namespace fastgpt::cuda
