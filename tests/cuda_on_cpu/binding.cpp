// Launch arithmetic, for tests: the launchers of csrc/*/*.cu as Python functions that launch nothing and return the
// launches they would make. Arguments have the names of the structs' fields; pointers are integers, dtypes the numbers
// of DType. Omitted arguments are zero or null; `multiprocessors` is 108. The same library holds the ops themselves
// (csrc/*/glue.cpp).
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <thread>

#include "adamw/op.h"
#include "attention/op.h"
#include "attention/sm90.h"
#include "attention_decode/op.h"
#include "bias_gelu/op.h"
#include "cross_entropy/op.h"
#include "embedding/op.h"
#include "layer_norm/op.h"
#include "rms_norm/op.h"
#include "rope/op.h"
#include "swiglu/op.h"

namespace py = pybind11;
using namespace fastgpt;

namespace {

template <typename T>
void set(T& field, py::handle value) {
  if constexpr (std::is_pointer_v<T>) field = reinterpret_cast<T>(value.cast<uintptr_t>());
  else if constexpr (std::is_enum_v<T>) field = static_cast<T>(value.cast<int>());
  else field = value.cast<T>();
}

#define FIELD(name) \
  if (values.contains(#name)) set(a.name, values[#name])

void fill(LayerNormFwdArgs& a, const py::dict& values) {
  FIELD(x); FIELD(residual); FIELD(weight); FIELD(y); FIELD(x_row); FIELD(n_rows); FIELD(n_cols); FIELD(dtype);
}

void fill(LayerNormBwdArgs& a, const py::dict& values) {
  FIELD(dy); FIELD(dsum); FIELD(h); FIELD(weight); FIELD(dweight); FIELD(dx_bias); FIELD(partials); FIELD(n_rows);
  FIELD(n_cols); FIELD(dtype);
}

void fill(RmsNormFwdArgs& a, const py::dict& values) {
  FIELD(x); FIELD(weight); FIELD(y); FIELD(x_row); FIELD(n_rows); FIELD(n_cols); FIELD(dtype);
}

void fill(RmsNormBwdArgs& a, const py::dict& values) {
  FIELD(dy); FIELD(dsum); FIELD(h); FIELD(weight); FIELD(dweight); FIELD(dx_bias); FIELD(partials); FIELD(n_rows);
  FIELD(n_cols); FIELD(dtype);
}

void fill(BiasGeluArgs& a, const py::dict& values) {
  FIELD(x); FIELD(dy); FIELD(out); FIELD(dbias); FIELD(partials); FIELD(n_rows); FIELD(n_cols); FIELD(dtype);
}

void fill(SwigluArgs& a, const py::dict& values) { FIELD(gate); FIELD(up); FIELD(n_rows); FIELD(n_cols); FIELD(dtype); }

void fill(CrossEntropyArgs& a, const py::dict& values) {
  FIELD(logits); FIELD(dlogits); FIELD(n_rows); FIELD(n_cols); FIELD(n_classes); FIELD(softcap); FIELD(dtype);
}

void fill(RopeArgs& a, const py::dict& values) {
  FIELD(n_batch); FIELD(n_time); FIELD(n_cols); FIELD(half); FIELD(dtype);
  if (values.contains("n_heads")) a.parts[0].n_heads = a.parts[0].n_turned = values["n_heads"].cast<int64_t>();
}

void fill(EmbeddingFwdArgs& a, const py::dict& values) { FIELD(n_tokens); FIELD(n_cols); FIELD(n_rows); FIELD(dtype); }

void fill(AttentionArgs& a, const py::dict& values) {
  FIELD(n_batch); FIELD(n_queries); FIELD(n_keys); FIELD(n_heads); FIELD(n_kv_heads); FIELD(head_dim); FIELD(window);
  FIELD(softcap); FIELD(scale); FIELD(causal); FIELD(dtype);
}

void fill(DecodeArgs& a, const py::dict& values) {
  fill(static_cast<AttentionArgs&>(a), values);
  FIELD(pages); FIELD(n_pages); FIELD(page_bits);
}

// While it exists, launchers plan for a device of so many multiprocessors and launch nothing.
struct Planning {
  explicit Planning(int multiprocessors = 108) : before(emulator::machine().multiprocessors) {
    emulator::machine().launches.clear();
    emulator::machine().dry = true, emulator::machine().multiprocessors = multiprocessors;
  }
  ~Planning() { emulator::machine().dry = false, emulator::machine().multiprocessors = before; }
  const int before;
};

int multiprocessors_of(const py::dict& values) {
  return values.contains("multiprocessors") ? values["multiprocessors"].cast<int>() : 108;
}

// Returns a launcher's launches: (grid x, y, z, block x, y, z, bytes of dynamic shared memory) each.
template <typename Args>
auto planned(void (*launcher)(const Args&, cuda::Stream)) {
  return [launcher](const py::kwargs& values) {
    Args a{};
    fill(a, values);
    const Planning planning(multiprocessors_of(values));
    launcher(a, {});
    return emulator::machine().launches;
  };
}

template <auto kSizeOf, typename... Sizes>
int64_t size(Sizes... sizes, const py::kwargs& values) {
  const Planning planning(multiprocessors_of(values));
  return kSizeOf(sizes..., {});
}

// Launches a, and b from another thread, after a's attributes are set and before a is launched.
template <typename Args>
auto at_once(void (*launcher)(const Args&, cuda::Stream)) {
  return [launcher](const py::dict& a_values, const py::dict& b_values) {
    Args a{}, b{};
    fill(a, a_values);
    fill(b, b_values);
    const Planning planning;
    emulator::machine().before_launch = [&] { std::thread([&] { launcher(b, {}); }).join(); };
    launcher(a, {});
    return emulator::machine().launches;
  };
}

// Addresses of the kernels launched since the last call.
std::vector<uintptr_t> launched() {
  std::vector<uintptr_t> found;
  for (const void* kernel : std::exchange(emulator::machine().kernels, {})) {
    found.push_back(reinterpret_cast<uintptr_t>(kernel));
  }
  return found;
}

// The kernels launched since `begin`, in order: before each launch, the machine's set holds that of the launch before.
std::vector<const void*> order;

void note_kernel() {
  emulator::Machine& m = emulator::machine();
  for (const void* kernel : std::exchange(m.kernels, {})) order.push_back(kernel);
  m.before_launch = note_kernel;
}

// Records launches from here on, for a device of so many multiprocessors. dry: nothing runs.
void begin(int multiprocessors, bool dry) {
  emulator::Machine& m = emulator::machine();
  m.launches.clear(), m.kernels.clear(), order.clear();
  m.dry = dry, m.multiprocessors = multiprocessors, m.before_launch = note_kernel;
}

// Returns the launches since `begin`: (offset of the kernel in this library, sizes) each. Kernels run again.
std::vector<std::pair<uintptr_t, std::array<uint64_t, 7>>> end() {
  emulator::Machine& m = emulator::machine();
  note_kernel();
  m.dry = false, m.multiprocessors = 1, m.before_launch = nullptr;
  Dl_info here{};
  dladdr(reinterpret_cast<const void*>(&begin), &here);
  std::vector<std::pair<uintptr_t, std::array<uint64_t, 7>>> found;
  for (size_t i = 0; i < m.launches.size(); ++i) {
    const auto at = reinterpret_cast<uintptr_t>(order[i]) - reinterpret_cast<uintptr_t>(here.dli_fbase);
    found.emplace_back(at, m.launches[i]);
  }
  return found;
}

}  // namespace

// The order in which threads run: 0 forward, 1 backward, 2 random from this seed.
extern "C" __attribute__((visibility("default"))) void fastgpt_set_schedule(int schedule, unsigned seed) {
  emulator::machine().schedule = static_cast<emulator::Schedule>(schedule);
  emulator::machine().random.seed(seed);
}

// The compute capability of the device: 80, or 90 for kernels of sm_90a.
extern "C" __attribute__((visibility("default"))) void fastgpt_set_chip(int chip) { emulator::machine().chip = chip; }

// The number of multiprocessors of the device that kernels run on, 1 if it is not set.
extern "C" __attribute__((visibility("default"))) void fastgpt_set_multiprocessors(int count) {
  emulator::machine().multiprocessors = count;
}

PYBIND11_MODULE(kernels, m) {
  m.def("layer_norm_fwd", planned(cuda::layer_norm_fwd));
  m.def("layer_norm_bwd", planned(cuda::layer_norm_bwd));
  m.def("layer_norm_bwd_blocks", size<cuda::layer_norm_bwd_blocks, int64_t, int64_t>);
  m.def("layer_norm_bwd_at_once", at_once(cuda::layer_norm_bwd));
  m.def("launched", launched);
  m.def("begin", begin);
  m.def("end", end);
  m.def("n_launches", [] { return emulator::machine().launches.size(); });
  m.def("rms_norm_fwd", planned(cuda::rms_norm_fwd));
  m.def("rms_norm_bwd", planned(cuda::rms_norm_bwd));
  m.def("rms_norm_bwd_blocks", size<cuda::rms_norm_bwd_blocks, int64_t, int64_t>);
  m.def("bias_gelu_fwd", planned(cuda::bias_gelu_fwd));
  m.def("bias_gelu_bwd", planned(cuda::bias_gelu_bwd));
  m.def("bias_gelu_bwd_blocks", size<cuda::bias_gelu_bwd_blocks, int64_t, int64_t>);
  m.def("swiglu_fwd", planned(cuda::swiglu_fwd));
  m.def("cross_entropy_fwd", planned(cuda::cross_entropy_fwd));
  m.def("cross_entropy_fwd_bwd", planned(cuda::cross_entropy_fwd_bwd));
  m.def("rope", planned(cuda::rope));
  m.def("embedding_fwd", planned(cuda::embedding_fwd));
  m.def("embedding_partials", size<cuda::embedding_partials, int64_t>);
  m.def("attention_fwd", planned(cuda::attention_fwd));
  m.def("attention_fwd_sm90", planned(cuda::attention_fwd_sm90));
  m.def("attention_bwd", planned(cuda::attention_bwd));
  m.def("attention_bwd_sm90", planned(cuda::attention_bwd_sm90));
  m.def("attention_bwd_workspace", size<cuda::attention_bwd_workspace, int64_t, int64_t, int64_t>);
  m.def("attention_decode_fwd", planned(cuda::attention_decode_fwd));
  m.def("attention_decode_workspace", [](const py::kwargs& values) {
    DecodeArgs a{};
    fill(a, values);
    const Planning planning;
    return cuda::attention_decode_workspace(a, {});
  });
  m.def("adamw_partials", [](const std::vector<int64_t>& n) { return cuda::adamw_partials(n.data(), n.size(), {}); });
}
