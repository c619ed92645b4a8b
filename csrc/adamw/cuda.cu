// AdamW over many tensors (Loshchilov, Hutter 2019, arXiv:1711.05101) in two launches. Formulas are in
// fastgpt/ops/adamw.py, those of one element in math.h.
//
//   prepare: step counters + 1; partial sums of squares of the gradients
//   update:  norm, clip coefficient, bias corrections, moments, decay, parameter, master or remainder or rounding
//
// Every block of update adds all partials in the same order, which avoids a third launch and a host sync. Bytes per
// bf16 parameter: prepare 2 (grad); update with fp32 master and fp32 moments 30 (read grad 2, param 2, master 4, m 4, v
// 4; write param 2, master 4, m 4, v 4), with a remainder 26 (param 2, remainder 2 each way), bf16 moments and
// stochastic rounding 14. Floor for 124e6 parameters, fp32 master (4.0 GB both launches): A100 1.9 ms, H100 1.2, H200
// 0.83. The parameter is read as well as its master to detect whether it was set from outside since the last step.
//
// How: tensors are cut into chunks of 32768 elements, one block each. The table of up to 512 tensors is a parameter of
// the kernel (< 32 KB, CUDA >= 12.1), so nothing has to be copied before. A thread has 8 elements of every array in
// flight, in 16-byte pieces; a tensor that is not aligned to 16 bytes is processed element by element. Each block
// computes the bias corrections once, in double.
#include "adamw/op.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/reduce.cuh"
#include "core/cuda/vec.cuh"
#include "core/with_type.h"

#include <memory>

namespace fastgpt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTensors = 512;        // per launch
constexpr int kGroups = 64;          // per launch
constexpr int64_t kChunk = 32768;    // elements per block
constexpr int64_t kPartials = 2048;  // maximum for one call (fastgpt/ops/adamw.py allocates as many)
constexpr int kLanesOfAll = 8;       // elements per thread at a time

// Chunks of tensor i: first_chunk[i] up to first_chunk[i + 1], or n_chunks.
struct GradTable {
  const void* grad[kTensors];
  int64_t numel[kTensors];
  int32_t first_chunk[kTensors];
  int32_t step[kTensors];
  int32_t n_tensors, n_chunks;
  float* steps;
  float* partials;  // null: no norm
};

struct Group {
  AdamWGroup options;
  int64_t lr;  // index into UpdateTable::lr
};

struct UpdateTable {
  void* param[kTensors];
  const void* grad[kTensors];
  void* exp_avg[kTensors];
  void* exp_avg_sq[kTensors];
  void* master[kTensors];
  int64_t numel[kTensors];
  int32_t first_chunk[kTensors];
  int32_t step[kTensors];
  uint8_t group[kTensors];  // index into groups
  Group groups[kGroups];
  int32_t n_tensors, n_chunks, n_groups;
  const float* lr;
  float* steps;
  const float* partials;
  int64_t n_partials;
  float max_norm;
  const float* grad_scale;
  const float* found_inf;
  float* grad_norm;  // null in all launches but the first
  uint64_t seed;
};
static_assert(sizeof(UpdateTable) <= 32764 && sizeof(GradTable) <= 32764, "kernel parameters");

enum class Master { none, f32, remainder, stochastic };

// Returns the tensor of a chunk: the last one that starts at or before it.
template <typename Table>
__device__ __forceinline__ int find_tensor(const Table& table, int chunk) {
  int low = 0, high = table.n_tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_chunk[middle] <= chunk) low = middle;
    else high = middle;
  }
  return low;
}

template <typename G>
__global__ void __launch_bounds__(kThreads) adamw_prepare_kernel(const __grid_constant__ GradTable table) {
  __shared__ float scratch[kMaxWarps];
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < table.n_tensors; i += kThreads) table.steps[table.step[i]] += 1.0f;
  }
  if (table.partials == nullptr) return;
  float sum = 0.0f;
  for (int chunk = blockIdx.x; chunk < table.n_chunks; chunk += gridDim.x) {
    const int i = find_tensor(table, chunk);
    const int64_t begin = (chunk - table.first_chunk[i]) * kChunk;
    const int64_t left = table.numel[i] - begin;
    sweep<4>(static_cast<const G*>(table.grad[i]) + begin, static_cast<int>(left < kChunk ? left : kChunk),
             [&](int, auto& x) {
               for (const float g : x) sum += g * g;
             });
  }
  sum = row_sum(sum, scratch);
  if (threadIdx.x == 0) table.partials[blockIdx.x] = sum;
}

// Values that a block needs before it reads an element.
struct Step {
  AdamWScalars scalars;
  RandomKey key;
  bool skip;
};

// Called by one thread. A skipped step decrements the step counter, which no other block reads then.
__device__ __forceinline__ Step make_step(const UpdateTable& table, int i, bool first_chunk, float sum_of_squares) {
  const float grad_scale = table.grad_scale == nullptr ? 1.0f : *table.grad_scale;
  const float norm = sqrtf(sum_of_squares) / grad_scale;
  const bool with_norm = table.n_partials > 0;
  if (with_norm && table.grad_norm != nullptr && blockIdx.x == 0) *table.grad_norm = norm;
  Step step;
  step.skip = (table.found_inf != nullptr && *table.found_inf != 0.0f) || (with_norm && !(norm < INFINITY));
  if (step.skip) {
    if (first_chunk) table.steps[table.step[i]] -= 1.0f;
    return step;
  }
  const Group& group = table.groups[table.group[i]];
  const AdamWGroup& o = group.options;
  const int64_t t = static_cast<int64_t>(table.steps[table.step[i]]);
  const float factor = (with_norm ? clip_coefficient(norm, table.max_norm) : 1.0f) / grad_scale;
  step.scalars = adamw_scalars(table.lr[group.lr], o.beta1, o.beta2, o.eps, o.weight_decay, t, factor);
  step.key = random_key(table.seed, t, table.step[i]);
  return step;
}

template <typename P, typename G, typename M, Master kMaster>
struct Tensors {
  P* param;
  const G* grad;
  M* exp_avg;
  M* exp_avg_sq;
  void* master;
};

// Updates elements e..e+L with their masters or remainders, see adamw_update in fastgpt/ops/adamw.py. L is 1, or the
// arrays are aligned to 16 bytes.
template <int L, typename P, typename G, typename M, Master kMaster>
__device__ __forceinline__ void update(const Tensors<P, G, M, kMaster>& t, int64_t e, const Step& step) {
  float p[L], g[L], m[L], v[L];
  float* const wide = static_cast<float*>(t.master) + e;
  int16_t* const low = static_cast<int16_t*>(t.master) + e;
  load(t.grad + e, g);
  load(t.exp_avg + e, m);
  load(t.exp_avg_sq + e, v);
  load(t.param + e, p);
  if constexpr (kMaster == Master::f32) {
    float master[L];
    load(wide, master);
#pragma unroll
    for (int l = 0; l < L; ++l) p[l] = rounded<P>(master[l]) == p[l] ? master[l] : p[l];  // set outside
  }
  if constexpr (kMaster == Master::remainder) {
    alignas(16) int16_t r[L];
    load_words(low, r);
#pragma unroll
    for (int l = 0; l < L; ++l) p[l] = join_remainder(bf16{static_cast<uint16_t>(float_bits(p[l]) >> 16)}, r[l]);
  }
#pragma unroll
  for (int l = 0; l < L; ++l) adamw_element(p[l], g[l], m[l], v[l], step.scalars);
  store(t.exp_avg + e, m);
  store(t.exp_avg_sq + e, v);
  if constexpr (kMaster == Master::f32) store(wide, p);
  if constexpr (kMaster == Master::remainder) {
    alignas(16) int16_t r[L];
#pragma unroll
    for (int l = 0; l < L; ++l) r[l] = remainder_low(p[l]), p[l] = to_float(remainder_high(p[l]));
    store_words(low, r);
  }
  if constexpr (kMaster == Master::stochastic) {
#pragma unroll
    for (int l = 0; l < L; ++l) p[l] = to_float(round_stochastic(p[l], random_bits(step.key, e + l)));
  }
  store(t.param + e, p);
}

template <typename P, typename G, typename M, Master kMaster>
__global__ void __launch_bounds__(kThreads) adamw_update_kernel(const __grid_constant__ UpdateTable table) {
  __shared__ float scratch[kMaxWarps];
  __shared__ Step shared;
  constexpr int L = kLanesOfAll;
  const int i = find_tensor(table, blockIdx.x);
  const int64_t begin = (static_cast<int>(blockIdx.x) - table.first_chunk[i]) * kChunk;
  float sum = 0.0f;
  for (int64_t k = threadIdx.x; k < table.n_partials; k += kThreads) sum += table.partials[k];
  sum = row_sum(sum, scratch);
  if (threadIdx.x == 0) shared = make_step(table, i, begin == 0, sum);
  __syncthreads();
  const Step step = shared;
  if (step.skip) return;
  const Tensors<P, G, M, kMaster> t = {static_cast<P*>(table.param[i]), static_cast<const G*>(table.grad[i]),
                                       static_cast<M*>(table.exp_avg[i]), static_cast<M*>(table.exp_avg_sq[i]),
                                       table.master[i]};
  const int64_t end = begin + kChunk < table.numel[i] ? begin + kChunk : table.numel[i];
  const bool aligned = is_aligned(t.param) && is_aligned(t.grad) && is_aligned(t.exp_avg) && is_aligned(t.exp_avg_sq) &&
                       is_aligned(t.master);
  const int64_t in_pieces = aligned ? begin + (end - begin) / L * L : begin;
  for (int64_t e = begin + threadIdx.x * L; e < in_pieces; e += kThreads * L) update<L>(t, e, step);
  for (int64_t e = in_pieces + threadIdx.x; e < end; e += kThreads) update<1>(t, e, step);
}

// ---- launchers ----

int64_t n_chunks(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

int64_t n_launches(int64_t n_tensors) { return (n_tensors + kTensors - 1) / kTensors; }

// Returns the number of partials of one launch of prepare.
int64_t launch_partials(int64_t chunks, int64_t launches) {
  const int64_t room = kPartials / launches > 1 ? kPartials / launches : 1;
  return chunks < room ? chunks : room;
}

template <typename G>
void launch_prepare(const GradTable& table, int64_t blocks, Stream stream) {
  launch("adamw_prepare_kernel", adamw_prepare_kernel<G>, Grid{blocks}, dim3(kThreads), 0, stream, table);
}

template <typename P, typename G, typename M, Master kMaster>
void launch_update(const UpdateTable& table, Stream stream) {
  launch("adamw_update_kernel", adamw_update_kernel<P, G, M, kMaster>, Grid{table.n_chunks}, dim3(kThreads), 0, stream,
         table);
}

template <typename P, typename G, Master kMaster>
void with_moments(const AdamWArgs& a, const UpdateTable& table, Stream stream) {
  if (a.moment_dtype == DType::f32) launch_update<P, G, float, kMaster>(table, stream);
  else if (a.moment_dtype == DType::bf16) launch_update<P, G, bf16, kMaster>(table, stream);
  else throw std::runtime_error("fastgpt: adamw_update: moments must be fp32 or bf16");
}

template <typename P, Master kMaster>
void with_grads(const AdamWArgs& a, const UpdateTable& table, Stream stream) {
  if (a.grad_dtype == DType::f32) with_moments<P, float, kMaster>(a, table, stream);
  else if (a.grad_dtype == a.param_dtype) with_moments<P, P, kMaster>(a, table, stream);
  else throw std::runtime_error("fastgpt: adamw_update: gradients must have the parameters' dtype or fp32");
}

void with_params(const AdamWArgs& a, const UpdateTable& table, Stream stream) {
  bool master = false;  // of any tensor: one without elements may have a null pointer
  for (int k = 0; k < table.n_tensors; ++k) master = master || table.master[k] != nullptr;
  const bool wide = master && a.master_dtype == DType::f32;
  if (a.param_dtype == DType::f32 && !master) with_grads<float, Master::none>(a, table, stream);
  else if (a.param_dtype == DType::f16 && wide) with_grads<f16, Master::f32>(a, table, stream);
  else if (a.param_dtype == DType::f16 && !master) with_grads<f16, Master::none>(a, table, stream);
  else if (a.param_dtype == DType::bf16 && wide) with_grads<bf16, Master::f32>(a, table, stream);
  else if (a.param_dtype == DType::bf16 && master) with_grads<bf16, Master::remainder>(a, table, stream);
  else if (a.param_dtype == DType::bf16 && a.stochastic) with_grads<bf16, Master::stochastic>(a, table, stream);
  else if (a.param_dtype == DType::bf16) with_grads<bf16, Master::none>(a, table, stream);
  else throw std::runtime_error("fastgpt: adamw_update: this dtype of parameters takes no such masters");
}

// Returns the index of a group in the table, and adds it if it is new; -1 if the table is full.
int find_group(UpdateTable& table, const AdamWArgs& a, int32_t group) {
  for (int k = 0; k < table.n_groups; ++k) {
    if (table.groups[k].lr == group) return k;
  }
  if (table.n_groups == kGroups) return -1;
  table.groups[table.n_groups] = Group{a.groups[group], group};
  return table.n_groups++;
}

}  // namespace

// A tensor without elements has one empty chunk, so its step is counted, and decremented if skipped, like all others.
int64_t adamw_partials(const int64_t* numels, int64_t n_tensors, Stream) {
  int64_t total = 0;
  for (int64_t first = 0; first < n_tensors; first += kTensors) {
    int64_t chunks = 0;
    for (int64_t i = first; i < n_tensors && i < first + kTensors; ++i)
      chunks += numels[i] > 0 ? n_chunks(numels[i]) : 1;
    total += launch_partials(chunks, n_launches(n_tensors));
  }
  return total;
}

void adamw_prepare(const AdamWArgs& a, Stream stream) {
  const auto table = std::make_unique<GradTable>();
  int64_t offset = a.offset;
  const bool norm = a.partials != nullptr && a.n_partials > 0;
  for (int64_t first = 0; first < a.n_tensors; first += kTensors) {
    *table = GradTable{};
    table->steps = a.steps;
    table->partials = norm ? a.partials + offset : nullptr;
    for (int64_t i = first; i < a.n_tensors && i < first + kTensors; ++i) {
      const int k = table->n_tensors++;
      const AdamWTensor& t = a.tensors[i];
      table->grad[k] = t.grad, table->numel[k] = t.numel, table->step[k] = t.step;
      table->first_chunk[k] = table->n_chunks;
      table->n_chunks += t.numel > 0 ? n_chunks(t.numel) : 1;
    }
    const int64_t blocks = norm ? launch_partials(table->n_chunks, n_launches(a.n_tensors)) : 1;
    offset += blocks;
    with_type(a.grad_dtype, [&](auto t) { launch_prepare<decltype(t)>(*table, blocks, stream); });
  }
}

void adamw_update(const AdamWArgs& a, Stream stream) {
  const auto table = std::make_unique<UpdateTable>();
  for (int64_t i = 0; i < a.n_tensors;) {
    *table = UpdateTable{};
    table->lr = a.lr, table->steps = a.steps, table->partials = a.partials, table->n_partials = a.n_partials;
    table->max_norm = a.max_norm, table->grad_scale = a.grad_scale, table->found_inf = a.found_inf,
    table->seed = a.seed;
    table->grad_norm = i == 0 ? a.grad_norm : nullptr;
    for (; i < a.n_tensors && table->n_tensors < kTensors; ++i) {
      const AdamWTensor& t = a.tensors[i];
      const int group = find_group(*table, a, t.group);
      if (group < 0) break;
      const int k = table->n_tensors++;
      table->param[k] = t.param, table->grad[k] = t.grad, table->exp_avg[k] = t.exp_avg;
      table->exp_avg_sq[k] = t.exp_avg_sq, table->master[k] = t.master, table->numel[k] = t.numel;
      table->step[k] = t.step, table->group[k] = static_cast<uint8_t>(group);
      table->first_chunk[k] = table->n_chunks;
      table->n_chunks += t.numel > 0 ? n_chunks(t.numel) : 1;
    }
    with_params(a, *table, stream);
  }
}

}  // namespace fastgpt::cuda
