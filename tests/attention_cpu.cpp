// Attention and attention_decode on the CPU, given exactly the memory they may access, with arbitrary index values.
// test_attention_cpu.py builds it with AddressSanitizer; it prints one line of sums per run, or what was not written.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "attention/op.h"
#include "attention_decode/op.h"
#include "core/cpu/parallel.h"

using namespace fastgpt;

int highest_level = 4;

namespace fastgpt {
void parallel_ranges(int64_t n, int64_t, RangeFn fn, const void* context) {
  if (n > 0) fn(context, 0, n);
}
}  // namespace fastgpt

static uint64_t state;

static int64_t below(int64_t n) {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(n));
}

// (B, rows, heads, D) in one of several layouts; its memory ends at its last element.
struct Heads {
  int64_t b, rows, heads, dim, element;
  AttentionStrides at;
  char* data;

  Heads(int64_t b, int64_t rows, int64_t heads, int64_t dim, int64_t element, bool output, bool dense = false)
      : b(b), rows(rows), heads(heads), dim(dim), element(element) {
    const int64_t gap = dense ? 0 : below(3), order = dense ? 0 : below(output ? 2 : 4);
    if (order == 0) at = {rows * (heads * dim + gap), heads * dim + gap, dim};
    if (order == 1) at = {heads * rows * (dim + gap), dim + gap, rows * (dim + gap)};
    if (order == 2) at = {0, heads * dim, dim};
    if (order == 3) at = {dim, 0, 0};
    const bool none = b * rows * heads == 0;
    const int64_t n = none ? 0 : (b - 1) * at.batch + (rows - 1) * at.row + (heads - 1) * at.head + dim;
    data = static_cast<char*>(malloc(n * element));
    for (int64_t i = 0; i < n; ++i) put(i, output ? NAN : static_cast<float>(below(2001) - 1000) / 500.0f);
  }
  Heads(const Heads&) = delete;
  ~Heads() { free(data); }

  void put(int64_t i, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint16_t half = std::isnan(x) ? 0x7ed5 : static_cast<uint16_t>(bits >> 16);
    memcpy(data + element * i, element == 4 ? static_cast<void*>(&bits) : static_cast<void*>(const_cast<uint16_t*>(&half)),
           element);
  }

  // Sum of the elements (of 16-bit ones: of their bits, roughly), NaN if one was not written.
  double sum() const {
    double total = 0.0;
    for (int64_t i = 0; i < b * rows * heads * dim; ++i) {
      const int64_t row = i / dim / heads;
      const int64_t place = row / rows * at.batch + row % rows * at.row + i / dim % heads * at.head + i % dim;
      float x;
      uint16_t half;
      memcpy(&x, data + 4 * place, element == 4 ? 4 : 0);
      memcpy(&half, data + 2 * place, element == 2 ? 2 : 0);
      total += element == 4 ? x : half == 0x7ed5 ? NAN : 0.0;
    }
    return total;
  }
};

// n indices up to top, some of them arbitrary.
static std::vector<int32_t> indices(int64_t n, int64_t top) {
  std::vector<int32_t> x(n);
  const bool wild = below(2);
  for (int32_t& i : x) {
    i = static_cast<int32_t>(wild && below(4) == 0 ? below(4294967296) - 2147483648 : below(top + 1));
  }
  return x;
}

// Sum of the output of attention_decode for the same queries and keys, with causal order and the lengths of `a`.
static double decode(DecodeArgs a, int64_t element) {
  a.causal = true, a.rng = nullptr, a.cu_q = a.cu_k = nullptr, a.doc_ids = nullptr;
  Heads out(a.n_batch, a.n_queries, a.n_heads, a.head_dim, element, true, true);
  std::vector<float> workspace(cpu::attention_decode_workspace(a, {}));
  a.out = out.data, a.out_at = out.at, a.workspace = workspace.data();
  cpu::attention_decode_fwd(a, {});
  return out.sum();
}

// Sum of its output for the first 2^n keys of each batch as the pages of a pool.
static double decode_paged(const AttentionArgs& of_attention, int64_t element) {
  DecodeArgs a{of_attention, nullptr, of_attention.n_batch, 0};
  if (a.n_keys == 0) return 0.0;
  while (2 << a.page_bits <= a.n_keys && below(4)) ++a.page_bits;
  const int64_t of_row = below(40);
  a.n_keys = of_row << a.page_bits;
  std::vector<int32_t> pages(a.n_batch * of_row), wild = indices(a.n_batch * of_row, a.n_batch);
  for (int32_t& page : pages) page = static_cast<int32_t>(below(a.n_batch));
  a.pages = wild.data();
  decode(a, element);  // rows become NaN, and nothing outside the pool is read
  a.pages = pages.data();
  return decode(a, element);
}

static void run_once() {
  const int64_t b = 1 + below(2), kv = 1 + below(2), h = kv * (1 + below(3)), d = 1 + below(70);
  const int64_t t = below(150), s = below(2) ? t : below(200), element = below(2) ? 4 : 2;
  AttentionArgs a{};
  a.dtype = element == 4 ? DType::f32 : below(2) ? DType::bf16 : DType::f16;
  a.n_batch = b, a.n_queries = t, a.n_keys = s, a.n_heads = h, a.n_kv_heads = kv, a.head_dim = d;
  a.causal = below(2), a.window = below(3) ? 0 : 1 + below(100), a.scale = 0.1f, a.softcap = below(3) ? 0.0f : 3.0f;
  const int64_t rng[2] = {7, 9};
  a.rng = below(4) ? nullptr : rng, a.keep_scale = 2.0f, a.drop_below = 1u << 31;
  std::vector<int32_t> cu_q, cu_k, lens, start, docs;
  if (b == 1 && below(2)) {
    a.n_sequences = below(5);
    cu_q = indices(a.n_sequences + 1, t), cu_k = indices(a.n_sequences + 1, s);
    a.cu_q = cu_q.data(), a.cu_k = cu_k.data();
  } else {
    lens = indices(b, s), start = indices(b, s), docs = indices(b * t, 3);
    a.kv_lens = below(2) ? lens.data() : nullptr, a.kv_start = below(2) ? start.data() : nullptr;
    a.doc_ids = t == s && below(2) ? docs.data() : nullptr;
  }
  Heads q(b, t, h, d, element, false), k(b, s, kv, d, element, false), v(b, s, kv, d, element, false);
  Heads out(b, t, h, d, element, true), dout(b, t, h, d, element, false);
  Heads dq(b, t, h, d, element, true), dk(b, s, kv, d, element, true), dv(b, s, kv, d, element, true);
  std::vector<float> lse(b * h * t), dlse(b * h * t);
  a.q = q.data, a.k = k.data, a.v = v.data, a.out = out.data, a.dout = dout.data;
  a.dq = dq.data, a.dk = dk.data, a.dv = dv.data, a.lse = lse.data(), a.dlse = below(2) ? dlse.data() : nullptr;
  a.q_at = q.at, a.k_at = k.at, a.v_at = v.at, a.out_at = out.at, a.dout_at = dout.at;
  a.dq_at = dq.at, a.dk_at = dk.at, a.dv_at = dv.at;
  cpu::attention_fwd(a, {});
  cpu::attention_bwd(a, {});
  const double decoded = decode(DecodeArgs{a, nullptr, 0, 0}, element), paged = decode_paged(a, element);
  printf("%.6f %.6f %.6f %.6f %.6f %.6f\n", out.sum(), dq.sum(), dk.sum(), dv.sum(), decoded, paged);
}

int main(int, char** argv) {
  highest_level = atoi(argv[2]);
  for (int run = 0; run < atoi(argv[1]); ++run) {
    state = run * 7919 + 12345;
    run_once();
  }
}
