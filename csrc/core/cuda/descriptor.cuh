// Matrix descriptors: how wgmma finds an operand in shared memory. The emulation in tests/cuda_on_cpu decodes the same
// words.
//
// An operand lies in lines of 128 bytes: 64 values of 16 bits. Eight lines are an atom of 1024 bytes at an address that
// is a multiple of 1024. Within it, the 16-byte piece i of line r is at piece i ^ r: TMA writes this order
// (CU_TENSOR_MAP_SWIZZLE_128B), and neither the copies nor wgmma meet bank conflicts.
//
//   bits  0-13  address / 16, of 18 bits
//        16-29  leading offset / 16
//        32-45  stride offset / 16
//        62-63  1: the order above
//
// Source: PTX ISA, "Matrix Descriptor Format" and "Strides" of wgmma.
#pragma once
#include <cstdint>

#include "core/math.h"

namespace fastgpt::cuda {

constexpr int kAtomBytes = 1024, kLineBytes = 128, kLineValues = 64;

FASTGPT_HD uint64_t matrix_descriptor(uint64_t address, uint64_t leading, uint64_t stride) {
  return (address & 0x3ffff) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | uint64_t{1} << 62;
}

// The products run along the lines. `address`: of the first row, 32 bytes further for each 16 values along it. The atoms
// of eight rows follow each other.
FASTGPT_HD uint64_t along_lines(uint64_t address) { return matrix_descriptor(address, 16, kAtomBytes); }

// The products run across the lines, from line to line. `block`: bytes between the 64 columns of one line and the next
// 64. `address`: 2 kAtomBytes further for each 16 lines.
FASTGPT_HD uint64_t across_lines(uint64_t address, uint64_t block) {
  return matrix_descriptor(address, block, kAtomBytes);
}

}  // namespace fastgpt::cuda
