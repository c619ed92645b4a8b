// Formulas that the CPU and CUDA kernels share, one value at a time. They have no branches and call no libm function
// unless a comment says so: g++ -O3 -fno-trapping-math -fno-math-errno can vectorise loops over them. The largest
// errors are given with u = 2^-23; tests/test_math.py checks them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTGPT_HD __host__ __device__ __forceinline__
#else
#define FASTGPT_HD inline
#endif

namespace fastgpt {

// ---- number formats: 16 bits in memory, fp32 in arithmetic ----

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

FASTGPT_HD uint32_t float_bits(float x) {
  uint32_t b;
  memcpy(&b, &x, sizeof b);
  return b;
}

FASTGPT_HD float bits_float(uint32_t b) {
  float x;
  memcpy(&x, &b, sizeof x);
  return x;
}

FASTGPT_HD float to_float(float x) { return x; }
FASTGPT_HD float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

FASTGPT_HD float to_float(f16 x) {  // rebias the exponent by an exact product, which also handles subnormals
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t finite = float_bits(bits_float(magnitude) * 0x1p112f);
  return bits_float(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

FASTGPT_HD bf16 to_bf16(float x) {  // nearest, ties to even; NaN stays NaN
  const uint32_t b = float_bits(x);
  const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  const uint32_t quiet = (b >> 16) | 0x40u;
  return bf16{static_cast<uint16_t>((b & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
}

FASTGPT_HD f16 to_f16(float x) {  // nearest, ties to even; infinity beyond 65519; NaN stays NaN
  const uint32_t sign = (float_bits(x) >> 16) & 0x8000u;
  const uint32_t b = float_bits(x) & 0x7fffffffu;
  const uint32_t special = b > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t subnormal = float_bits(bits_float(b) + 0.5f) - 0x3f000000u;  // the sum rounds to multiples of 2^-24
  const uint32_t normal = (b - 0x38000000u + 0xfffu + ((b >> 13) & 1u)) >> 13;
  const uint32_t finite = b < 0x38800000u ? subnormal : normal;
  return f16{static_cast<uint16_t>(sign | (b >= 0x47800000u ? special : finite))};
}

template <typename T>
FASTGPT_HD T from_float(float x);
template <>
FASTGPT_HD float from_float<float>(float x) {
  return x;
}
template <>
FASTGPT_HD bf16 from_float<bf16>(float x) {
  return to_bf16(x);
}
template <>
FASTGPT_HD f16 from_float<f16>(float x) {
  return to_f16(x);
}

// ---- exp, tanh ----

// exp(x) for -87.33 <= x <= 87 (and NaN): relative error 0.7 u. x = n ln 2 + r, |r| <= ln(2)/2; the result is a
// polynomial in r times 2^n, which is assembled from bits.
FASTGPT_HD float exp_near(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: n is now in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in n * part
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return ((p * r * r + r) + 1.0f) * bits_float((float_bits(shifted) + 127u) << 23);
}

// exp(x) for x <= 87 (and NaN): 0 below -87.33, no subnormal results.
FASTGPT_HD float exp_low(float x) {
  const float y = exp_near(x);
  return x < -87.33654f ? 0.0f : y;
}

// exp(x) - 1 for x <= 0: relative error 1 u, -1 below -30.
FASTGPT_HD float expm1_low(float x) {
  const float a = x < -30.0f ? -30.0f : x;
  const float shifted = a * 1.44269504f + 12582912.0f;  // as in exp_near
  const float n = shifted - 12582912.0f;
  const float r = (a - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float power = bits_float((float_bits(shifted) + 127u) << 23);  // 2^n; the result is (e^r - 1) 2^n + 2^n - 1
  return (p * r * r + r) * power + (power - 1.0f);
}

// log(1 + x) for -1 < x <= 0: relative error 1.7 u. 1 + x = 2^n m with m within a factor sqrt(2) of 1; a polynomial in
// m - 1, which for n = 0 is x, not rounded.
FASTGPT_HD float log1p_low(float x) {
  const float y = 1.0f + x;
  const int32_t n = static_cast<int32_t>(float_bits(y) - 0x3f3504f3u) >> 23;
  const float f = n == 0 ? x : bits_float(float_bits(y) - (static_cast<uint32_t>(n) << 23)) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float e = static_cast<float>(n);
  return (((p * f * f * f - e * 2.12194440e-4f) - 0.5f * f * f) + f) + e * 0.693359375f;
}

// tanh(x) from e = exp(-2|x|): a polynomial below 0.625, (1 - e) / (1 + e) above. Relative error 1.25 u if e is from
// exp_low.
FASTGPT_HD float tanh_from_exp(float x, float e) {
  const float a = bits_float(float_bits(x) & 0x7fffffffu);
  const float s = a * a;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const float near = p * s * a + a;
  const float far = (1.0f - e) / (1.0f + e);
  const float t = a < 0.625f ? near : far;
  return bits_float(float_bits(t) | (float_bits(x) & 0x80000000u));
}

FASTGPT_HD float tanh_f(float x) {
  const float a = bits_float(float_bits(x) & 0x7fffffffu);
  return tanh_from_exp(x, exp_low(-2.0f * a));
}

// ---- LayerNorm ----

// One element of y: xhat = (x - mean) rstd.
FASTGPT_HD float layer_norm_y(float x, float mean, float rstd, float weight, float bias) {
  return (x - mean) * rstd * weight + bias;
}

// One element of dx: wdy = weight dy; the two means are over the row.
FASTGPT_HD float layer_norm_dx(float wdy, float xhat, float mean_wdy, float mean_wdy_xhat, float rstd) {
  return (wdy - mean_wdy - xhat * mean_wdy_xhat) * rstd;
}

// ---- cross-entropy; formulas in fastgpt/ops/cross_entropy.py ----

FASTGPT_HD float softcap_f(float logit, float softcap, float inv_softcap) {
  return softcap * tanh_f(logit * inv_softcap);
}

// dz/dlogit from z = softcap tanh(logit / softcap).
FASTGPT_HD float softcap_slope(float z, float inv_softcap) {
  const float t = z * inv_softcap;
  return 1.0f - t * t;
}

// Loss of a row. gap = lse - z_y and smooth_sum = sum_c w_c (lse - z_c), both computed from max-shifted
// values. smooth_sum must be 0 if smoothing is 0 (it could be infinite otherwise).
FASTGPT_HD float cross_entropy_loss(float gap, float smooth_sum, float w_y, float lse, float smoothing, float z_loss,
                                    float n_classes) {
  return (1.0f - smoothing) * w_y * gap + smoothing / n_classes * smooth_sum + z_loss * lse * lse;
}

// Factors of a row's gradient: dl/dz_c = p_c * p_scale - w_c * smooth - [c == y] * hit, times the row's `scale`.
struct CrossEntropyGrad {
  float p_scale, smooth, hit;
};

FASTGPT_HD CrossEntropyGrad cross_entropy_grad_row(float scale, float w_y, float weight_sum, float lse, float smoothing,
                                                   float z_loss, float n_classes) {
  // with one class p is 1 and both terms have the same weight: omit them, since subtracting them would leave rounding
  const float hit = n_classes > 1.0f ? (1.0f - smoothing) * w_y : 0.0f;
  const float smooth = n_classes > 1.0f ? smoothing / n_classes : 0.0f;
  return CrossEntropyGrad{scale * (hit + smooth * weight_sum + 2.0f * z_loss * lse), scale * smooth, scale * hit};
}

// dl/dz_c without `hit`, which the caller subtracts for the target.
FASTGPT_HD float cross_entropy_dz(const CrossEntropyGrad& g, float p, float weight) {
  return p * g.p_scale - weight * g.smooth;
}

// ---- GELU, SiLU, squared ReLU: value and slope; bounds checked by tests/ops/test_bias_gelu.py, test_swiglu.py ----

// Clamp x from below, and |x| from above. Beyond these limits the functions below are constant or linear; NaN stays
// NaN.
FASTGPT_HD float at_least(float x, float low) { return x < low ? low : x; }

FASTGPT_HD float clamp_to(float x, float limit) {
  const float y = at_least(x, -limit);
  return y > limit ? limit : y;
}

struct NormalTail {
  float a;        // min(|x|, 13.1): in fp32 the tail is 0 from there on
  float tail;     // Phi(-a); Phi is the standard normal CDF
  float density;  // exp(-a^2 / 2) / sqrt(2 pi)
};

// Phi(-a) = exp(-a^2 / 2) P(a t) t with t = 1 / (a + 2); P is a fit of degree 9 (relative error 0.45 u). The tail
// has relative error (4 + a^2 / 2) u.
FASTGPT_HD NormalTail normal_tail(float x) {
  const float size = bits_float(float_bits(x) & 0x7fffffffu);
  const float a = size > 13.1f ? 13.1f : size;
  const float e = exp_near(-0.5f * a * a);
  const float t = 1.0f / (a + 2.0f);
  const float w = a * t;
  float p = 0.056855879724f;
  p = p * w - 0.097487188876f;
  p = p * w - 0.022045375779f;
  p = p * w + 0.045122697949f;
  p = p * w + 4.59507918e-4f;
  p = p * w + 0.120781302452f;
  p = p * w + 0.082399815321f;
  p = p * w - 0.191322669387f;
  p = p * w - 0.595775187016f;
  p = p * w + 1.0f;
  return NormalTail{a, p * t * e, 0.398942280f * e};
}

// x Phi(x) = max(x, 0) - a Phi(-a): relative error 4 u above 0, that of the tail below.
FASTGPT_HD float gelu_f(float x) {
  const NormalTail n = normal_tail(x);
  return at_least(x, 0.0f) - n.a * n.tail;
}

// x sigmoid(v) with v = 2 sqrt(2 / pi) (x + 0.044715 x^3), which is 0.5 x (1 + tanh(v / 2)): relative error
// 2 (1 + |v|) u; about 1e-36 below x = -9.9.
FASTGPT_HD float gelu_tanh_f(float x) {
  const float u = clamp_to(x, 9.9f);  // keeps |v| below 86
  return at_least(x, -9.9f) / (1.0f + exp_near(-1.59576912f * u * (1.0f + 0.044715f * u * u)));
}

// x sigmoid(x): relative error 3 u; about 1e-35 below x = -86.
FASTGPT_HD float silu_f(float x) { return at_least(x, -86.0f) / (1.0f + exp_near(-clamp_to(x, 86.0f))); }

FASTGPT_HD float relu2_f(float x) {
  const float r = at_least(x, 0.0f);
  return r * r;
}

// Value and slope of a function at one point. Slopes have an absolute error of 4 u.
struct ValueSlope {
  float value, slope;
};

FASTGPT_HD ValueSlope gelu_both(float x) {
  const NormalTail n = normal_tail(x);
  const float low = n.tail - n.a * n.density;  // the slope at -a
  return ValueSlope{at_least(x, 0.0f) - n.a * n.tail, x > 0.0f ? 1.0f - low : low};
}

FASTGPT_HD ValueSlope gelu_tanh_both(float x) {
  const float u = clamp_to(x, 9.9f), s2 = 0.044715f * u * u;
  const float e = exp_near(-1.59576912f * u * (1.0f + s2));
  const float s = 1.0f / (1.0f + e);
  return ValueSlope{at_least(x, -9.9f) * s, s + s * (e * s) * (1.59576912f * u * (1.0f + 3.0f * s2))};
}

FASTGPT_HD ValueSlope silu_both(float x) {
  const float u = clamp_to(x, 86.0f);
  const float e = exp_near(-u);
  const float s = 1.0f / (1.0f + e);
  return ValueSlope{at_least(x, -86.0f) * s, s + s * (e * s) * u};
}

FASTGPT_HD ValueSlope relu2_both(float x) {
  const float r = at_least(x, 0.0f);
  return ValueSlope{r * r, 2.0f * r};
}

// ---- AdamW ----

// 1 - base^t for t >= 0 (0 for t = 0), in double because fp32 would lose it to cancellation. Relative error of base^t:
// t 2^-52.
FASTGPT_HD double one_minus_power(double base, int64_t t) {
  double power = 1.0;
  for (; t > 0; t >>= 1) {
    power = (t & 1) ? power * base : power;
    base *= base;
  }
  return 1.0 - power;
}

// Factors that are the same for all elements of a tensor in one step.
struct AdamWScalars {
  float grad_factor;  // clip coefficient / grad_scale
  float decay;        // 1 - lr weight_decay
  float one_minus_beta1;
  float beta2, one_minus_beta2;
  float step_size;     // lr / (1 - beta1^t)
  float inv_sqrt_bc2;  // 1 / sqrt(1 - beta2^t)
  float eps;
};

// Runs once per tensor and is not vectorised (sqrt of a double).
FASTGPT_HD AdamWScalars adamw_scalars(double lr, double beta1, double beta2, double eps, double weight_decay, int64_t t,
                                      float grad_factor) {
  AdamWScalars s;
  s.grad_factor = grad_factor;
  s.decay = static_cast<float>(1.0 - lr * weight_decay);
  s.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  s.step_size = static_cast<float>(lr / one_minus_power(beta1, t));
  s.inv_sqrt_bc2 = static_cast<float>(1.0 / sqrt(one_minus_power(beta2, t)));
  s.eps = static_cast<float>(eps);
  return s;
}

// min(1, max_norm / (norm + 1e-6)), as in torch.nn.utils.clip_grad_norm_; 1 if max_norm <= 0.
FASTGPT_HD float clip_coefficient(float norm, float max_norm) {
  const float c = max_norm / (norm + 1e-6f);
  return max_norm > 0.0f && c < 1.0f ? c : 1.0f;
}

// Updates one element in place; p, m, v are fp32.
FASTGPT_HD void adamw_element(float& p, float g, float& m, float& v, const AdamWScalars& s) {
  g *= s.grad_factor;
  m += s.one_minus_beta1 * (g - m);
  v = s.beta2 * v + s.one_minus_beta2 * (g * g);
  p = p * s.decay - s.step_size * (m / (sqrtf(v) * s.inv_sqrt_bc2 + s.eps));
}

// ---- fp32 master = bf16 parameter + 16-bit remainder, exact ----

FASTGPT_HD float join_remainder(bf16 high, int16_t low) {
  // no master gives a zero with negative low bits: the parameter was set from outside, and the sum would be a NaN
  const int32_t rest = (high.bits & 0x7fffu) == 0 && low < 0 ? 0 : low;
  return bits_float((static_cast<uint32_t>(high.bits) << 16) + static_cast<uint32_t>(rest));
}

FASTGPT_HD uint32_t remainder_bits(float master) {  // replace every NaN by one that is still a NaN after rounding
  const uint32_t b = float_bits(master);
  return (b & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : b;
}

FASTGPT_HD bf16 remainder_high(float master) {  // nearest, ties away from zero
  return bf16{static_cast<uint16_t>((remainder_bits(master) + 0x8000u) >> 16)};
}

FASTGPT_HD int16_t remainder_low(float master) {
  return static_cast<int16_t>(remainder_bits(master) & 0xffffu);  // the bits that remainder_high drops, modulo 2^16
}

// ---- stochastic rounding ----

// Key of one tensor in one step: two words from the finaliser of splitmix64.
struct RandomKey {
  uint32_t a, b;
};

FASTGPT_HD uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

FASTGPT_HD RandomKey random_key(uint64_t seed, int64_t t, int32_t index) {
  const uint64_t golden = 0x9e3779b97f4a7c15ull;
  uint64_t k = mix64(seed + golden);
  k = mix64(k + golden * (static_cast<uint64_t>(t) + 1));
  k = mix64(k + golden * (static_cast<uint64_t>(static_cast<uint32_t>(index)) + 1));
  return RandomKey{static_cast<uint32_t>(k), static_cast<uint32_t>(k >> 32)};
}

// 32 random bits for one element: two rounds of a 32-bit finaliser, with one word of the key before each.
FASTGPT_HD uint32_t random_bits(const RandomKey& key, uint64_t element) {
  uint32_t x = static_cast<uint32_t>(element) ^ key.a;
  x ^= static_cast<uint32_t>(element >> 32) * 0x9e3779b9u;
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  x = (x ^ (x >> 15)) + key.b;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Rounds up with a probability equal to the discarded fraction, so the result is unbiased. NaN and infinity stay.
FASTGPT_HD bf16 round_stochastic(float x, uint32_t random) {
  const uint32_t b = float_bits(x);
  const uint32_t rounded = (b + (random >> 16)) >> 16;
  const uint32_t quiet = (b >> 16) | 0x40u;
  return bf16{static_cast<uint16_t>((b & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
}

// ---- attention; formulas in fastgpt/ops/attention.py ----

// First word of Philox4x32-7 (Salmon et al. 2011) for a counter of four words and a key of two: the random bits of
// dropout, the same as `dropout_keep` in fastgpt/ops/_attention.py.
FASTGPT_HD uint32_t philox_first(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 7; ++round) {
    const uint64_t a = static_cast<uint64_t>(c0) * 0xd2511f53u, b = static_cast<uint64_t>(c2) * 0xcd9e8d57u;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
  }
  return c0;
}

// ---- RMSNorm ----

// One element of y; `weight` includes the offset.
FASTGPT_HD float rms_norm_y(float x, float rstd, float weight) { return x * rstd * weight; }

// Computes dx of a row: dx = (wdy - xhat mean) factor, wdy = weight dy, xhat = x rstd. With one column the difference
// wdy (1 - xhat^2) = wdy eps rstd^2 would be lost to cancellation, so `factor` contains this product instead.
struct RmsNormDx {
  float mean, factor;

  FASTGPT_HD RmsNormDx(float mean_wdy_xhat, float rstd, int64_t n_cols, float eps)
      : mean(n_cols == 1 ? 0.0f : mean_wdy_xhat), factor(n_cols == 1 ? eps * rstd * rstd * rstd : rstd) {}

  FASTGPT_HD float operator()(float wdy, float xhat) const { return (wdy - xhat * mean) * factor; }
};

}  // namespace fastgpt
