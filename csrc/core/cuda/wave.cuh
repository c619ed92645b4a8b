// The number of multiprocessors that one wave of blocks fills. tests/cuda_on_cpu replaces this file for the host.
#pragma once

namespace fastgpt::cuda {

constexpr int kSms = 108;  // of an A100; an H100 has 132. Grids depend on shapes, not on the device

}  // namespace fastgpt::cuda
