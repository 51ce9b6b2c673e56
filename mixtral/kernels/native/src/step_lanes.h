// As many floats as one register of the instruction set holds, as one value of the compiler's vector extension. For files
// that are compiled once for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mx {
namespace MX_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));

inline Lanes load(const void *from) {
  Lanes value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float *to, Lanes value) { std::memcpy(to, &value, sizeof value); }

inline Lanes splat(float x) { return x - Lanes{}; }

// a * b + c, rounded once where the processor can (the build lets the compiler fuse nothing by itself).
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__FP_FAST_FMAF)
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
inline Lanes smaller(Lanes a, Lanes b) { return a < b ? a : b; }

// Of kLanes pairs of bf16, as they lie in memory, the first ones in fp32, and the second ones.
inline Lanes first_of_pair(Lanes pairs) {
  IntLanes bits;
  std::memcpy(&bits, &pairs, sizeof bits);
  bits <<= 16;
  std::memcpy(&pairs, &bits, sizeof bits);
  return pairs;
}

inline Lanes second_of_pair(Lanes pairs) {
  IntLanes bits;
  std::memcpy(&bits, &pairs, sizeof bits);
  bits &= ~0xffff;
  std::memcpy(&pairs, &bits, sizeof bits);
  return pairs;
}

// The lanes' sum, always added up in the same order.
inline float sum(Lanes value) {
  float part[kLanes];
  store(part, value);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

inline float largest(Lanes value) {
  float most = value[0];
  for (int i = 1; i < kLanes; ++i) most = value[i] > most ? value[i] : most;
  return most;
}

constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f};

// e^x to some 2e-7 of itself, x held within -87..88: 2^n times the Taylor polynomial of the rest, |rest| <= ln(2) / 2.
inline Lanes exponential(Lanes x) {
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room for fractions
  x = smaller(splat(88.0f), larger(splat(-87.0f), x));  // in this order NaN stays NaN
  const Lanes n = (x * 1.44269504f + round) - round;
  Lanes r = fma(n, splat(-0.693359375f), x);  // ln 2 in two parts, the first exact times n
  r = fma(n, splat(2.12194440e-4f), r);
  Lanes p = splat(1.0f / 5040);
  for (const float term : kTaylor) p = fma(p, r, splat(term));
  const IntLanes bits = (__builtin_convertvector(n, IntLanes) + 127) << 23;
  Lanes power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

}  // namespace MX_ISA
}  // namespace mx
