// What one wave of blocks is counted in. tests/cuda_on_cpu has a second file of this name for the host.
#pragma once

namespace fastgpt::cuda {

constexpr int kSms = 108;  // multiprocessors of an A100; an H100 has 132. Grids follow from shapes, not from the device

}  // namespace fastgpt::cuda
