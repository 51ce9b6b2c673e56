// Activations as they are, rounded to bf16, or to int8 by groups (packing.py has the formulas). Plain loops over a group, which the
// compiler turns into the instruction set's vectors.
#include <cstring>

#include "packed.h"

namespace mx {
namespace MX_ISA {
namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Half to even; a number that is none stays none, which the carry of the rounding might undo.
uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : 0x7fc0);
}

// Rounded to bf16, which only AVX-512 multiplies as it is: for the others each is widened here, once, and not in every
// product.
void round_group(const float *x, uint8_t *to) {
#if defined(__AVX512BF16__)
  uint16_t values[kGroup];
  for (int i = 0; i < kGroup; ++i) values[i] = to_bf16(x[i]);
#else
  uint32_t values[kGroup];
  for (int i = 0; i < kGroup; ++i) values[i] = static_cast<uint32_t>(to_bf16(x[i])) << 16;
#endif
  std::memcpy(to, values, sizeof values);
}

#if defined(__AVX512BF16__)
constexpr int kBf16Bytes = 2;
#else
constexpr int kBf16Bytes = 4;
#endif

// The sizes are compared as integers, which their bits order alike, but for infinities and what is no number: those come
// last, so that they reach the scale, and with it the product.
float largest_size(const float *x) {
  int32_t most = 0;
  for (int i = 0; i < kGroup; ++i) {
    const int32_t size = static_cast<int32_t>(bits_of(x[i]) & 0x7fffffff);
    most = size > most ? size : most;
  }
  return float_of(static_cast<uint32_t>(most));
}

void quantise_group(const float *x, uint8_t *to, float *scale, int32_t *sum) {
  *scale = largest_size(x) / 127.0f;
  const float divisor = *scale == 0.0f ? 1.0f : *scale;
  int8_t values[kGroup];
  int32_t total = 0;
  for (int i = 0; i < kGroup; ++i) {
    float value = x[i] / divisor;
    value = value > -127.0f ? value : -127.0f;
    value = value < 127.0f ? value : 127.0f;
    // 1.5 * 2^23 leaves no bits for fractions: the sum is rounded half to even, and ends with the integer's bits.
    values[i] = static_cast<int8_t>(bits_of(value + 12582912.0f));
    total += values[i];
  }
  std::memcpy(to, values, sizeof values);
  *sum = total;
}

// A whole group of a row; past its end zeros.
void copy_group(const float *row, int d, int group, float *to) {
  const int begin = group * kGroup, n = d - begin < kGroup ? d - begin : kGroup;
  std::memcpy(to, row + begin, n * sizeof(float));
  for (int i = n; i < kGroup; ++i) to[i] = 0.0f;
}

}  // namespace

void fill_rows(const Rows &rows, const float *x, int64_t x_stride, int first, int last) {
  const int groups = rows.groups();
  for (int row = first; row < last; ++row) {
    uint8_t *to = rows.values + row * rows.stride;
    if (rows.kind == kFp32Rows) {
      const size_t bytes = rows.d * sizeof(float);
      std::memcpy(to, x + row * x_stride, bytes);
      std::memset(to + bytes, 0, groups * kGroup * sizeof(float) - bytes);
      continue;
    }
    for (int group = 0; group < groups; ++group) {
      float values[kGroup];
      copy_group(x + row * x_stride, rows.d, group, values);
      const int64_t at = static_cast<int64_t>(row) * groups + group;
      if (rows.kind == kInt8Rows)
        quantise_group(values, to + group * kGroup, rows.scales + at, rows.sums + at);
      else
        round_group(values, to + group * kGroup * kBf16Bytes);
    }
  }
}

}  // namespace MX_ISA
}  // namespace mx
