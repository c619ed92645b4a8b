// Registers a raw op from its glue.cpp: FASTGPT_REGISTER(name) registers the function template fastgpt::name as the
// overloads name.cpu and, if this build has CUDA kernels, name.cuda; FASTGPT_REGISTER_CPU(name) only as name.cpu,
// FASTGPT_REGISTER_CUDA(name) only as name.cuda. Schemas are in fastgpt/ops/<op>.py.
#pragma once
#include <torch/csrc/stable/library.h>

#include "glue/device.h"

#define FASTGPT_REGISTER_FOR(name, key, Device, overload) \
  STABLE_TORCH_LIBRARY_IMPL(fastgpt, key, m) { m.impl(#name overload, TORCH_BOX(&fastgpt::name<fastgpt::Device>)); }

#if defined(FASTGPT_EMULATED)  // tests/cuda_on_cpu: the CUDA kernels, built for the host, run on CPU tensors
#define FASTGPT_REGISTER(name) FASTGPT_REGISTER_FOR(name, CPU, Cuda, ".cuda")
#define FASTGPT_REGISTER_CPU(name)
#define FASTGPT_REGISTER_CUDA(name) FASTGPT_REGISTER_FOR(name, CPU, Cuda, ".cuda")
#elif defined(FASTGPT_WITH_CUDA)
#define FASTGPT_REGISTER(name)                   \
  FASTGPT_REGISTER_FOR(name, CPU, Cpu, ".cpu") \
  FASTGPT_REGISTER_FOR(name, CUDA, Cuda, ".cuda")
#define FASTGPT_REGISTER_CUDA(name) FASTGPT_REGISTER_FOR(name, CUDA, Cuda, ".cuda")
#else
#define FASTGPT_REGISTER(name) FASTGPT_REGISTER_FOR(name, CPU, Cpu, ".cpu")
#define FASTGPT_REGISTER_CUDA(name)
#endif
#if !defined(FASTGPT_EMULATED)
#define FASTGPT_REGISTER_CPU(name) FASTGPT_REGISTER_FOR(name, CPU, Cpu, ".cpu")
#endif
