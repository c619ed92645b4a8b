// Arguments and launchers of AdamW; formulas in fastgpt/ops/adamw.py.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace fastgpt {

struct AdamWTensor {
  void* param;       // (numel) param_dtype
  const void* grad;  // (numel) grad_dtype
  void* exp_avg;     // (numel) moment_dtype
  void* exp_avg_sq;  // (numel) moment_dtype
  void* master;      // (numel) fp32 master or int16 remainder, or null
  int64_t numel;
  int32_t group;     // index into AdamWArgs::groups and lr
  int32_t step;      // index into AdamWArgs::steps
};

struct AdamWGroup {
  double beta1, beta2, eps, weight_decay;
};

struct AdamWArgs {
  const AdamWTensor* tensors;  // host memory
  int64_t n_tensors;
  const AdamWGroup* groups;    // host memory
  int64_t n_groups;
  const float* lr;             // (n_groups), on the device
  float* steps;                // on the device, indexed by AdamWTensor::step
  float* partials;             // on the device: prepare writes adamw_partials() at offset, update reads n_partials
  int64_t offset, n_partials;  // n_partials == 0: no norm, no clipping
  float max_norm;              // <= 0: compute the norm, but do not clip
  const float* grad_scale;     // (1) on the device, or null
  const float* found_inf;      // (1) on the device, or null
  float* grad_norm;            // (1) on the device
  bool stochastic;             // stochastic rounding of bf16 parameters without master
  uint64_t seed;
  DType param_dtype, grad_dtype, moment_dtype, master_dtype;  // master_dtype: f32 or i16, used if master is set
};

FASTGPT_ON_EACH_DEVICE(
  void adamw_prepare(const AdamWArgs& a, Stream stream);  /* grad, numel, step of each tensor; steps, partials */
  void adamw_update(const AdamWArgs& a, Stream stream);
  int64_t adamw_partials(const int64_t* numels, int64_t n_tensors, Stream stream);)

}  // namespace fastgpt
