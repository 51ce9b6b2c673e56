// The AVX-512 intrinsics that the kernels use, in plain C++: for tests of that form on processors that lack it. Included
// before every source that is compiled as "avx512" (tools/stand_in/build.py), with the compiler's flags for AVX2.
//
// Lane for lane what Intel's manual says (Software Developer's Manual, volume 2): VDPBF16PS adds the second product of a
// pair first, rounds each sum to nearest, and takes numbers below 2^-126 for zero whatever the control register says.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BF16__ 1

namespace stand_in {

constexpr int kLanes = 16;

template <class To, class From>
To bits_as(const From &from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class Lane, class Vector, class Function>
Vector each_lane(Function function) {
  Lane lanes[sizeof(Vector) / sizeof(Lane)];
  for (unsigned i = 0; i < sizeof(Vector) / sizeof(Lane); ++i) lanes[i] = function(i);
  return bits_as<Vector>(lanes);
}

template <class Lane, class Vector>
Lane lane(const Vector &vector, unsigned i) {
  Lane value;
  std::memcpy(&value, reinterpret_cast<const char *>(&vector) + i * sizeof value, sizeof value);
  return value;
}

template <class Vector>
Vector loaded(const void *from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector>
void stored(void *to, const Vector &vector) {
  std::memcpy(to, &vector, sizeof vector);
}

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float bf16(uint16_t bits) { return flushed(bits_as<float>(static_cast<uint32_t>(bits) << 16)); }

inline __m512 splat(float x) {
  return each_lane<float, __m512>([&](unsigned) { return x; });
}

inline __m512i splat32(int32_t x) {
  return each_lane<int32_t, __m512i>([&](unsigned) { return x; });
}

inline __m512i splat8(int8_t x) {
  return each_lane<int8_t, __m512i>([&](unsigned) { return x; });
}

inline __m512 multiply(__m512 a, __m512 b) {
  return each_lane<float, __m512>([&](unsigned i) { return lane<float>(a, i) * lane<float>(b, i); });
}

inline __m512 fma(__m512 a, __m512 b, __m512 c) {
  return each_lane<float, __m512>(
      [&](unsigned i) { return __builtin_fmaf(lane<float>(a, i), lane<float>(b, i), lane<float>(c, i)); });
}

inline __m512 to_floats(__m512i x) {
  return each_lane<float, __m512>([&](unsigned i) { return static_cast<float>(lane<int32_t>(x, i)); });
}

// By the processor's own conversion, four numbers at a time: every processor with AVX2 has it.
inline __m512 halves_to_floats(__m256i x) {
  float lanes[kLanes];
  for (unsigned i = 0; i < 4; ++i)
    _mm_storeu_ps(lanes + 4 * i, _mm_cvtph_ps(_mm_cvtsi64_si128(lane<int64_t>(x, i))));
  return bits_as<__m512>(lanes);
}

inline __m512i bits_and(__m512i a, __m512i b) {
  return each_lane<uint64_t, __m512i>([&](unsigned i) { return lane<uint64_t>(a, i) & lane<uint64_t>(b, i); });
}

inline __m512i shift_right_16(__m512i x, unsigned count) {
  return each_lane<uint16_t, __m512i>([&](unsigned i) { return static_cast<uint16_t>(lane<uint16_t>(x, i) >> count); });
}

// sum + four products of unsigned by signed bytes, in each lane, modulo 2^32.
inline __m512i dot_bytes(__m512i sum, __m512i a, __m512i b) {
  return each_lane<int32_t, __m512i>([&](unsigned i) {
    uint32_t total = lane<uint32_t>(sum, i);
    for (unsigned j = 4 * i; j < 4 * i + 4; ++j)
      total += static_cast<uint32_t>(int32_t{lane<uint8_t>(a, j)} * int32_t{lane<int8_t>(b, j)});
    return static_cast<int32_t>(total);
  });
}

inline __m512 dot_bf16(__m512 sum, __m512bh a, __m512bh b) {
  return each_lane<float, __m512>([&](unsigned i) {
    const auto add = [&](float total, unsigned j) {
      return flushed(__builtin_fmaf(bf16(lane<uint16_t>(a, j)), bf16(lane<uint16_t>(b, j)), total));
    };
    return add(add(flushed(lane<float>(sum, i)), 2 * i + 1), 2 * i);
  });
}

}  // namespace stand_in

#define _mm512_setzero_ps() stand_in::splat(0.0f)
#define _mm512_set1_ps stand_in::splat
#define _mm512_set1_epi32 stand_in::splat32
#define _mm512_set1_epi8 stand_in::splat8
#define _mm512_loadu_ps stand_in::loaded<__m512>
#define _mm512_loadu_si512 stand_in::loaded<__m512i>
#define _mm512_storeu_ps stand_in::stored
#define _mm512_mul_ps stand_in::multiply
#define _mm512_fmadd_ps stand_in::fma
#define _mm512_cvtepi32_ps stand_in::to_floats
#define _mm512_cvtph_ps stand_in::halves_to_floats
#define _mm512_and_si512 stand_in::bits_and
#define _mm512_srli_epi16 stand_in::shift_right_16
#define _mm512_dpbusd_epi32 stand_in::dot_bytes
#define _mm512_dpbf16_ps stand_in::dot_bf16
