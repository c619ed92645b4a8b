// Host spelling of csrc/include/fastgpt/ptx.cuh. ex2 is exact here (2^-22 on the device); the packing rounds the same
// way.
#pragma once
#include <fastgpt/math.h>

namespace fastgpt::ptx {

inline float ex2(float x) { return exp2f(x) < 0x1p-126f ? 0.0f : exp2f(x); }
inline uint32_t pack_bf16x2(float low, float high) {
  return to_bf16(low).bits | static_cast<uint32_t>(to_bf16(high).bits) << 16;
}
inline uint32_t pack_f16x2(float low, float high) {
  return to_f16(low).bits | static_cast<uint32_t>(to_f16(high).bits) << 16;
}
inline float f16_to_float(uint16_t bits) { return to_float(f16{bits}); }

}  // namespace fastgpt::ptx
