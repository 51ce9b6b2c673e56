// Norm, router, SwiGLU, rotary embedding, rounding and log-sum-exp of one row.
#include <math.h>

#include "step_kernels.h"
#include "step_lanes.h"

namespace mx {
namespace MX_ISA {

static float dot(const float *a, const float *b, int n) {
  Lanes total{};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) total = fma(load(a + i), load(b + i), total);
  float result = sum(total);
  for (; i < n; ++i) result += a[i] * b[i];
  return result;
}

// x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467).
void rms_norm(const float *x, const float *weight, int n, float eps, float *out) {
  const float scale = 1.0f / sqrtf(dot(x, x, n) / static_cast<float>(n) + eps);
  for (int i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

void score_experts(const float *x, const float *router, int n, int n_experts, float *out) {
  for (int e = 0; e < n_experts; ++e) out[e] = dot(x, router + static_cast<int64_t>(e) * n, n);
}

// silu(g) = g / (1 + e^-g) (arXiv 2002.05202).
void swiglu(float *gate, const float *up, int n) {
  for (int i = 0; i < n; i += kLanes) {
    const Lanes g = load(gate + i);
    store(gate + i, g / (1.0f + exponential(-g)) * load(up + i));
  }
}

// Runs of 512 are added up in fp32, their sums in fp64: the error does not grow with n.
float log_sum_exp(const float *x, int n) {
  const int whole = n - n % kLanes;
  Lanes top = splat(x[0]);
  for (int i = 0; i < whole; i += kLanes) top = larger(load(x + i), top);
  float most = largest(top);
  for (int i = whole; i < n; ++i) most = x[i] > most ? x[i] : most;
  double total = 0.0;
  for (int begin = 0; begin < whole; begin += 512) {
    const int end = begin + 512 < whole ? begin + 512 : whole;
    Lanes run{};
    for (int i = begin; i < end; i += kLanes) run += exponential(load(x + i) - most);
    total += sum(run);
  }
  for (int i = whole; i < n; ++i) total += exponential(splat(x[i] - most))[0];
  return most + static_cast<float>(log(total));
}

void add(float *to, const float *from, float weight, int n) {
  for (int i = 0; i < n; ++i) to[i] += weight * from[i];
}

// bf16 by rounding half to even; NaN stays one.
void narrow(const float *from, int32_t dtype, int n, uint8_t *to) {
  if (dtype == kFloat32) {
    std::memcpy(to, from, 4 * static_cast<size_t>(n));
    return;
  }
  for (int i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const uint16_t half = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    std::memcpy(to + 2 * i, &half, 2);
  }
}

static float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
  // The exponent is 112 too small: put right by a product, exact for subnormal numbers too. Infinity and NaN have none.
  const uint32_t bits = magnitude >= 0x7c00 ? 0x7f800000 | (magnitude & 0x3ff) << 13 : magnitude << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  if (magnitude < 0x7c00) value *= 0x1p112f;
  return sign ? -value : value;
}

void widen(const uint8_t *from, int32_t dtype, int n, float *to) {
  if (dtype == kFloat32) {
    std::memcpy(to, from, 4 * static_cast<size_t>(n));
    return;
  }
  for (int i = 0; i < n; ++i) {
    uint16_t half;
    std::memcpy(&half, from + 2 * i, 2);
    if (dtype == kFloat16) {
      to[i] = half_to_float(half);
      continue;
    }
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    std::memcpy(to + i, &bits, 4);
  }
}

// Input d of a lane: fp32 and fp16 have their lanes side by side, bf16 has them in pairs of inputs.
void widen_packed(const Matrix &w, int64_t row, float *to) {
  const int64_t lane = row % kBlock, first = row / kBlock * w.groups() * kGroup * kBlock;
  const uint8_t *data = static_cast<const uint8_t *>(w.data);
  for (int64_t d = 0; d < w.d; ++d) {
    const int64_t at = first + (w.format == kBf16 ? (d / 2 * kBlock + lane) * 2 + d % 2 : d * kBlock + lane);
    if (w.format == kFp32)
      std::memcpy(to + d, data + 4 * at, 4);
    else
      widen(data + 2 * at, w.format == kFp16 ? kFloat16 : kBfloat16, 1, to + d);
  }
}

// Pairs in the layout of two halves (arXiv 2104.09864).
void rotate(float *x, const float *cosines, const float *sines, int head_dim, int n_heads) {
  const int half = head_dim / 2;
  for (int head = 0; head < n_heads; ++head, x += head_dim)
    for (int i = 0; i < half; ++i) {
      const float first = x[i], second = x[i + half];
      x[i] = first * cosines[i] - second * sines[i];
      x[i + half] = second * cosines[i] + first * sines[i];
    }
}

}  // namespace MX_ISA
}  // namespace mx
