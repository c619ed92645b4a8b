// Linear on the CPU, given exactly the memory it may access. test_linear_cpu.py builds it with AddressSanitizer; it
// prints the largest error of each run against sums in double, relative to the sum of magnitudes.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/cpu/parallel.h"
#include "core/math.h"
#include "linear/op.h"

using namespace fastgpt;

int highest_level = 4;

namespace fastgpt {
void parallel_ranges(int64_t n, int64_t, RangeFn fn, const void* context) {
  for (int64_t i = 0; i < n; i += 3) fn(context, i, i + 3 < n ? i + 3 : n);
}
}  // namespace fastgpt

static uint64_t state;

static int64_t below(int64_t n) {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(n));
}

// Memory that ends at the last element of n elements.
struct Numbers {
  WeightType type;
  char* data;

  Numbers(WeightType type, int64_t n) : type(type), data(static_cast<char*>(malloc(n * size()))) {
    for (int64_t i = 0; i < n; ++i) put(i, static_cast<float>(below(255) - 127));  // exact in every type
  }
  Numbers(const Numbers&) = delete;
  ~Numbers() { free(data); }

  int64_t size() const { return type == WeightType::f32 ? 4 : type == WeightType::i8 ? 1 : 2; }
  void put(int64_t i, float x) {
    const bf16 b = to_bf16(x);
    const f16 h = to_f16(x);
    const int8_t c = static_cast<int8_t>(x);
    const void* from = type == WeightType::f32   ? static_cast<const void*>(&x)
                       : type == WeightType::i8  ? static_cast<const void*>(&c)
                       : type == WeightType::f16 ? static_cast<const void*>(&h)
                                                 : static_cast<const void*>(&b);
    memcpy(data + i * size(), from, size());
  }
  float get(int64_t i) const {
    if (type == WeightType::i8) return static_cast<float>(reinterpret_cast<const int8_t*>(data)[i]);
    if (type == WeightType::f16) return to_float(reinterpret_cast<const f16*>(data)[i]);
    if (type == WeightType::bf16) return to_float(reinterpret_cast<const bf16*>(data)[i]);
    return reinterpret_cast<const float*>(data)[i];
  }
};

static double run_once() {
  const WeightType type = static_cast<WeightType>(below(4));
  const int64_t n = below(4) == 0 ? 1 + below(140) : 1 + below(20), c = 1 + below(below(3) == 0 ? 900 : 60);
  const int64_t f = 1 + below(30), x_gap = below(3), w_gap = below(3);
  LinearArgs a{};
  a.dtype = static_cast<DType>(below(3)), a.weight_type = type;
  a.n_rows = n, a.n_in = c, a.n_out = f, a.x_row = c + x_gap, a.weight_row = c + w_gap;
  const WeightType own = static_cast<WeightType>(a.dtype);  // the types of x, bias and y
  const Numbers x(own, n * a.x_row - x_gap), w(type, f * a.weight_row - w_gap), bias(own, f), scale(WeightType::f32, f);
  Numbers y(own, n * f);
  a.x = x.data, a.weight = w.data, a.y = y.data;
  if (below(2)) a.bias = bias.data;
  if (type == WeightType::i8) a.scale = reinterpret_cast<const float*>(scale.data);
  for (int64_t i = 0; i < n * f; ++i) y.put(i, NAN);
  cpu::linear_fwd(a, {});
  double worst = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < f; ++j) {
      double sum = 0.0, size = 1.0;
      for (int64_t k = 0; k < c; ++k) {
        const double product = static_cast<double>(x.get(i * a.x_row + k)) * w.get(j * a.weight_row + k);
        sum += product, size += std::fabs(product);
      }
      if (a.scale != nullptr) sum *= scale.get(j), size *= std::fabs(scale.get(j)) + 1.0;
      if (a.bias != nullptr) sum += bias.get(j), size += 127.0;
      if (own == WeightType::f16 && std::fabs(sum) > 6e4) continue;  // overflows
      const double error = std::fabs(y.get(i * f + j) - sum) / size;
      worst = error <= worst ? worst : error;  // NaN stays
    }
  }
  return worst / (own == WeightType::f32 ? 1.0 : own == WeightType::bf16 ? 65536.0 : 8192.0);
}

// The product of training, of matrices in either order.
static double run_product() {
  const int64_t n = 1 + below(below(4) == 0 ? 400 : 20), c = 1 + below(below(3) == 0 ? 600 : 40), f = 1 + below(150);
  const bool a_across = below(2), b_across = below(2);
  const int64_t a_gap = below(3), b_gap = below(3), out_gap = below(3);
  ProductArgs p{};
  p.n_rows = n, p.n_inner = c, p.n_cols = f, p.out_row = f + out_gap, p.add = below(2);
  p.a_row = a_across ? 1 : c + a_gap, p.a_col = a_across ? n + a_gap : 1;
  p.b_row = b_across ? 1 : f + b_gap, p.b_col = b_across ? c + b_gap : 1;
  const WeightType f32 = WeightType::f32;
  const Numbers a(f32, (n - 1) * p.a_row + (c - 1) * p.a_col + 1), b(f32, (c - 1) * p.b_row + (f - 1) * p.b_col + 1);
  const Numbers bias(f32, f), before(f32, n * f);
  Numbers out(f32, n * p.out_row - out_gap);
  for (int64_t i = 0; i < n * f; ++i) out.put(i / f * p.out_row + i % f, p.add ? before.get(i) : NAN);
  p.a = reinterpret_cast<const float*>(a.data), p.b = reinterpret_cast<const float*>(b.data);
  p.out = reinterpret_cast<float*>(out.data);
  if (below(2)) p.bias = reinterpret_cast<const float*>(bias.data);
  cpu::linear_product(p, {});
  double worst = 0.0;
  for (int64_t i = 0; i < n * f; ++i) {
    double sum = p.add ? before.get(i) : 0.0, size = 255.0;
    if (p.bias != nullptr) sum += bias.get(i % f);
    for (int64_t k = 0; k < c; ++k) {
      const double product =
          static_cast<double>(a.get(i / f * p.a_row + k * p.a_col)) * b.get(k * p.b_row + i % f * p.b_col);
      sum += product, size += std::fabs(product);
    }
    const double error = std::fabs(out.get(i / f * p.out_row + i % f) - sum) / size;
    worst = error <= worst ? worst : error;
  }
  return worst;
}

int main(int, char** argv) {
  highest_level = atoi(argv[2]);
  for (int run = 0; run < atoi(argv[1]); ++run) {
    state = run * 7919 + 12345;
    printf("%g\n", run % 3 == 0 ? run_product() : run_once());
  }
}
