// Rotary position embedding of q and k in one launch, forward and backward (Su et al. 2021, arXiv:2104.09864).
//
//   (a, b) -> (a cos - s b, b cos + s a), s = sign sin; pairs (i, i + half) or (2i, 2i + 1) of the first 2 half columns
//
// Bytes: each element is read and written once, in place only those that rotate; cos and sin (fp32) are read from L2,
// once for all heads of a thread. About 6 operations per element. Saved for backward: only the tables. Floor in place
// on a packed qkv of B = 64, T = 1024, H = 12, D = 64, 16 bits (403 MB): A100 197 us, H100 120, H200 84; out of place
// from q and k the same.
//
// How: a thread holds L pairs of up to kHeads heads of q, then of k, at one position: two 16-byte pieces per head, all
// requested before the first is rotated (128 bytes per thread, 512 threads on a multiprocessor: 64 KB), while its L
// cosines and sines stay in registers. The heads of a row are spread over threadIdx.y. What is only copied (columns
// after the pairs, heads from n_turned on) takes the same path. A thread reads all elements that it writes before it
// writes them, and none that others write, so y may be x.
#include "core/cuda/launch.cuh"
#include "core/cuda/vec.cuh"
#include "core/with_type.h"
#include "rope/op.h"

#include <algorithm>

namespace fastgpt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeads = 4;  // per thread, in flight together

// Rotates L pairs: `low` and `high` are the columns i and half + i or, if interleaved, 2 L consecutive columns. The
// sign is applied here rather than when the tables are loaded: all heads are in flight before the tables are first
// used.
template <bool kInterleaved, int L>
__device__ __forceinline__ void turn(float (&low)[L], float (&high)[L], const float (&cos)[L], const float (&sin)[L],
                                     float sign) {
#pragma unroll
  for (int l = 0; l < L; ++l) {
    float& a = !kInterleaved ? low[l] : 2 * l < L ? low[2 * l] : high[2 * l - L];
    float& b = !kInterleaved || L == 1 ? high[l] : 2 * l < L ? low[2 * l + 1] : high[2 * l + 1 - L];
    const float s = sign * sin[l];
    const float turned = a * cos[l] - b * s;
    b = b * cos[l] + a * s;
    a = turned;
  }
}

// Loads cos and sin of pairs i..i+L; NaN for a position outside the tables.
template <int L>
__device__ __forceinline__ void load_tables(const RopeArgs& a, int64_t position, int i, float (&cos)[L],
                                            float (&sin)[L]) {
  if (position >= 0 && position < a.n_positions) {
    load(a.cos + position * a.half + i, cos);
    load(a.sin + position * a.half + i, sin);
  } else {
#pragma unroll
    for (int l = 0; l < L; ++l) cos[l] = sin[l] = NAN;
  }
}

// Unit u (threadIdx.x) of a head is L pairs, or 2 L columns to copy. threadIdx.y: heads, threadIdx.z: positions.
template <typename T, bool kInterleaved, int L>
__global__ void __launch_bounds__(kThreads) rope_kernel(const RopeArgs a) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  if (n >= a.n_batch * a.n_time) return;
  const int64_t b = n / a.n_time, t = n - b * a.n_time;
  const int64_t position = a.positions == nullptr ? t : a.positions[b * a.positions_batch + t];
  const int half = static_cast<int>(a.half), n_cols = static_cast<int>(a.n_cols);
  for (int u = threadIdx.x; 2 * u * L < n_cols; u += blockDim.x) {
    const bool paired = u * L < half;
    float cos[L] = {}, sin[L] = {};
    if (paired) load_tables(a, position, u * L, cos, sin);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const RopePart& p = a.parts[part];
      const T* x = static_cast<const T*>(p.x) + b * p.x_batch + t * p.x_time;
      T* y = static_cast<T*>(p.y) + b * p.y_batch + t * p.y_time;
      const int n_heads = static_cast<int>(p.n_heads), n_turned = paired ? static_cast<int>(p.n_turned) : 0;
      const bool copies = p.x != p.y;
      const auto touched = [&](int h) { return h < n_heads && (h < n_turned || copies); };
      const auto column = [&](int h) { return h < n_turned && !kInterleaved ? u * L : 2 * u * L; };
      const auto beside = [&](int h) { return h < n_turned && !kInterleaved ? half + u * L : (2 * u + 1) * L; };
      for (int first = threadIdx.y; first < n_heads; first += kHeads * blockDim.y) {
        Raw<T, L> low[kHeads], high[kHeads];
#pragma unroll
        for (int j = 0; j < kHeads; ++j) {
          const int h = first + j * blockDim.y;
          if (!touched(h)) continue;
          load_raw(x + h * p.x_head + column(h), low[j]);
          if (beside(h) < n_cols) load_raw(x + h * p.x_head + beside(h), high[j]);
        }
#pragma unroll
        for (int j = 0; j < kHeads; ++j) {
          const int h = first + j * blockDim.y;
          if (!touched(h)) continue;
          T* to = y + h * p.y_head;
          if (h < n_turned) {
            float v[L], w[L];
            widen(low[j], v);
            widen(high[j], w);
            turn<kInterleaved>(v, w, cos, sin, a.sign);
            store(to + column(h), v);
            store(to + beside(h), w);
          } else {
            store_raw(to + column(h), low[j]);
            if (beside(h) < n_cols) store_raw(to + beside(h), high[j]);
          }
        }
      }
    }
  }
}

// ---- launchers ----

// Returns whether every piece of L values that the kernel accesses is 16-byte aligned.
template <typename T>
bool in_pieces(const RopeArgs& a) {
  constexpr int L = kLanes<T>;
  bool whole = is_aligned(a.cos) && is_aligned(a.sin) && (a.n_cols | a.half) % L == 0;
  for (const RopePart& p : a.parts) {
    if (p.n_heads == 0) continue;
    whole = whole && is_aligned(p.x) && is_aligned(p.y) && (p.x_batch | p.x_time | p.x_head) % L == 0 &&
            (p.y_batch | p.y_time | p.y_head) % L == 0;
  }
  return whole;
}

template <typename T, bool kInterleaved, int L>
void rope_of(const RopeArgs& a, Stream stream) {
  const bool in_place = a.parts[0].x == a.parts[0].y && a.parts[1].x == a.parts[1].y;
  const int64_t n_units = in_place ? a.half / L : (a.n_cols + 2 * L - 1) / (2 * L);
  const int64_t n_heads = std::max(a.parts[0].n_heads, a.parts[1].n_heads), n = a.n_batch * a.n_time;
  if (n_units == 0 || n_heads == 0 || n == 0) return;
  const int64_t x = std::min<int64_t>(n_units, kThreads);
  const int64_t y = std::min<int64_t>((n_heads + kHeads - 1) / kHeads, kThreads / x);
  const int64_t z = std::min<int64_t>({kThreads / (x * y), n, 64});
  launch("rope_kernel", rope_kernel<T, kInterleaved, L>, Grid{(n + z - 1) / z}, dim3(x, y, z), 0, stream, a);
}

template <typename T>
void rope_of(const RopeArgs& a, Stream stream) {
  const bool pieces = in_pieces<T>(a);
  if (a.interleaved) pieces ? rope_of<T, true, kLanes<T>>(a, stream) : rope_of<T, true, 1>(a, stream);
  else pieces ? rope_of<T, false, kLanes<T>>(a, stream) : rope_of<T, false, 1>(a, stream);
}

}  // namespace

void rope(const RopeArgs& a, Stream stream) {
  with_type(a.dtype, [&](auto t) { rope_of<decltype(t)>(a, stream); });
}

}  // namespace fastgpt::cuda
