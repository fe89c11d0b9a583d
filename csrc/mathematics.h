// The mathematics that the CPU and the CUDA operators share: counter-based randomness, paths, times, AdamW, roundings.
//
// Everything is compiled without contraction to fused multiply-adds (-ffp-contract=off, -fmad=false), in the order of
// operations of the PyTorch references, so that the two sides and the references differ in library functions alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SITFAST_SHARED __host__ __device__ __forceinline__
#define SITFAST_UNROLL _Pragma("unroll")
#else
#define SITFAST_UNROLL _Pragma("GCC unroll 10")
#define SITFAST_SHARED inline __attribute__((always_inline))
#endif

namespace sitfast {

// Numbers -------------------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};

SITFAST_SHARED uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

SITFAST_SHARED float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

SITFAST_SHARED float widen(bf16 x) { return float_of(uint32_t(x.bits) << 16); }

/// To the nearest, ties to even; a NaN stays one.
SITFAST_SHARED bf16 nearest_bf16(float x) {
  uint32_t bits = bits_of(x);
  uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return bf16{uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
}

/// Up with the probability of the share that is cut off; `random` holds 16 random bits. Infinities and NaNs stay.
SITFAST_SHARED bf16 stochastic_bf16(float x, uint32_t random) {
  uint32_t bits = bits_of(x);
  uint32_t rounded = (bits + (random & 0xFFFFu)) >> 16;
  uint32_t special = (bits >> 16) | ((bits & 0x7FFFFFu) != 0 ? 0x40u : 0u);
  return bf16{uint16_t((bits & 0x7F800000u) == 0x7F800000u ? special : rounded)};
}

// Randomness ----------------------------------------------------------------------------------------------------------

/// What a draw is for; the numbers of sitfast.philox.Stream.
enum Stream : uint32_t { kNoise = 0, kTime = 1, kLabelDrop = 2, kFlip = 3, kVae = 4, kRounding = 8 };

struct Words {
  uint32_t word[4];

  SITFAST_SHARED uint32_t at(int64_t i) const {  // not word[i]: that would send them through memory on a GPU
    return i % 4 < 2 ? (i % 4 == 0 ? word[0] : word[1]) : (i % 4 == 2 ? word[2] : word[3]);
  }
};

/// Ten rounds of Philox 4×32: words 4 block … 4 block + 3 of the sample `index`.
SITFAST_SHARED Words philox(uint64_t seed, uint64_t index, uint32_t stream, uint32_t block) {
  uint32_t c0 = block, c1 = stream, c2 = uint32_t(index), c3 = uint32_t(index >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  SITFAST_UNROLL
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    uint32_t next = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c0 = next, c1 = uint32_t(p1), c3 = uint32_t(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return Words{{c0, c1, c2, c3}};
}

/// Strictly inside (0, 1), exact.
SITFAST_SHARED float uniform(uint32_t word) { return (float(word >> 9) + 0.5f) * 0x1p-23f; }

/// Two standard normals of two words, by Box–Muller in fp64, rounded once.
SITFAST_SHARED void normals(uint32_t radius_word, uint32_t angle_word, float& first, float& second) {
  double radius = sqrt(-2.0 * log((double(radius_word) + 0.5) * 0x1p-32));
  double angle = (double(angle_word) + 0.5) * 0x1p-32 * 6.283185307179586;
  double sine, cosine;
#ifdef __CUDA_ARCH__
  sincos(angle, &sine, &cosine);
#else
  sine = std::sin(angle), cosine = std::cos(angle);
#endif
  first = float(radius * cosine), second = float(radius * sine);
}

/// Values 4 block … 4 block + 3 of the sample `index`.
SITFAST_SHARED void four_normals(uint64_t seed, uint64_t index, uint32_t stream, uint32_t block, float (&value)[4]) {
  Words words = philox(seed, index, stream, block);
  normals(words.word[0], words.word[1], value[0], value[1]);
  normals(words.word[2], words.word[3], value[2], value[3]);
}

// Paths and times -----------------------------------------------------------------------------------------------------

enum Path : int64_t { kLinear = 0, kGvp = 1, kVp = 2 };
enum TimeSampling : int64_t { kUniform = 0, kLogitNormal = 1, kShifted = 2 };
enum Prediction : int64_t { kVelocity = 0, kNoisePrediction = 1, kScore = 2 };
enum LossWeight : int64_t { kNone = 0, kVelocityWeight = 1, kLikelihood = 2 };

/// Functions of fp32: on the GPU those that PyTorch calls, so that nothing differs; on the CPU to half a unit of the last
/// place, where PyTorch's vectorised ones keep within one.
#ifdef __CUDA_ARCH__
SITFAST_SHARED float sin32(float x) { return sinf(x); }
SITFAST_SHARED float exp32(float x) { return expf(x); }
SITFAST_SHARED float expm1_32(float x) { return expm1f(x); }
#else
SITFAST_SHARED float sin32(float x) { return float(std::sin(double(x))); }
SITFAST_SHARED float exp32(float x) { return float(std::exp(double(x))); }
SITFAST_SHARED float expm1_32(float x) { return float(std::expm1(double(x))); }
#endif

struct Coefficients {
  float alpha, sigma, d_alpha, d_sigma, drift_variance;
};

/// What a path is at time t, as in sitfast.interpolant.
SITFAST_SHARED Coefficients coefficients(int64_t path, float t) {
  float rest = 1.0f - t;
  if (path == kLinear) return {t, rest, 1.0f, -1.0f, rest / t};
  if (path == kGvp) {
    const float rate = float(3.141592653589793 / 2);
    float alpha = sin32(rate * t), sigma = sin32(rate * rest);
    return {alpha, sigma, rate * sigma, -rate * alpha, rate * (sigma / alpha)};
  }
  const float low = float(0.1), range = float(20.0 - 0.1);
  float log_alpha = -0.25f * (rest * rest) * range - 0.5f * rest * low;
  float rate = 0.5f * (rest * range + low);
  float alpha = exp32(log_alpha);
  float sigma = sqrtf(-expm1_32(2.0f * log_alpha));
  return {alpha, sigma, rate * alpha, -rate * (alpha * alpha) / sigma, rate};
}

/// How training draws t: `start` and `span` are the training interval.
struct TimeLaw {
  int64_t sampling;
  float start, span, logit_mean, logit_std, shift;
};

SITFAST_SHARED float draw_time(const TimeLaw& law, uint64_t seed, uint64_t index) {
  Words words = philox(seed, index, kTime, 0);
  float unit;
  if (law.sampling == kLogitNormal) {
    float value, unused;
    normals(words.word[0], words.word[1], value, unused);
    unit = 1.0f / (1.0f + exp32(-(law.logit_mean + law.logit_std * value)));
  } else {
    unit = uniform(words.word[0]);
    if (law.sampling == kShifted) unit = unit / (unit + law.shift * (1.0f - unit));
  }
  const float edge = 0x1p-24f;
  unit = unit < edge ? edge : unit > 1.0f - edge ? 1.0f - edge : unit;
  return law.start + law.span * unit;
}

/// The factor of the mean squared error where it has a weight, as in sitfast.loss.
SITFAST_SHARED float loss_factor(int64_t weight, const Coefficients& c) {
  if (weight == kLikelihood) return c.drift_variance / (c.sigma * c.sigma);
  float ratio = c.drift_variance / c.sigma;
  return ratio * ratio;
}

// AdamW ---------------------------------------------------------------------------------------------------------------

/// What all elements of one tensor share in one update.
struct AdamW {
  float lr_decay, one_minus_beta1, one_minus_beta2, step_size, root_correction2, eps;
};

/// The scalars of the k-th update, k = `step`.
SITFAST_SHARED AdamW adamw_scalars(double lr, double beta1, double beta2, double eps, double decay, double step) {
  double correction1 = 1.0 - pow(beta1, step), correction2 = 1.0 - pow(beta2, step);
  return {float(lr * decay),        float(1.0 - beta1),         float(1.0 - beta2),
          float(lr / correction1), float(sqrt(correction2)), float(eps)};
}

/// The moments move by a share of what they lack: β m + (1 − β) g would sum β rounded to fp32 over 1 / (1 − β) steps.
SITFAST_SHARED void adamw(float& p, float g, float& m, float& v, const AdamW& a) {
  p = p - a.lr_decay * p;
  m = m + a.one_minus_beta1 * (g - m);
  v = v + a.one_minus_beta2 * (g * g - v);
  p = p - a.step_size * m / (sqrtf(v) / a.root_correction2 + a.eps);
}

}  // namespace sitfast
