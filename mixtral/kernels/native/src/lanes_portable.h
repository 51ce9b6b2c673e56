// Four of a block's sixteen lanes, without instructions of any one processor: plain loops, vectorised as the compiler can.
// Included by products.isa.cpp alone, inside an unnamed namespace; lanes_avx2.h and lanes_avx512.h define the same names.

constexpr int kWidth = 4;     // lanes of what most processors have as a register
constexpr int kMostRowsBf16 = 4;  // rows that share a loaded weight
constexpr int kMostRowsQuantised = 4;
constexpr int kMostRowsFp32 = 4;

struct Floats {
  float v[kWidth];
};

struct Ints {
  int32_t v[kWidth];
};

Floats zero() { return {}; }

Floats load(const float *from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

void store(float *to, Floats x) { std::memcpy(to, &x, sizeof x); }

Floats multiply(Floats a, float b) {
  for (float &x : a.v) x *= b;
  return a;
}

// acc + a * b, rounded once.
Floats fma(Ints a, Floats b, Floats acc) {
  for (int i = 0; i < kWidth; ++i) acc.v[i] = std::fma(static_cast<float>(a.v[i]), b.v[i], acc.v[i]);
  return acc;
}

Floats splat(const uint8_t *from) {
  float x;
  std::memcpy(&x, from, sizeof x);
  return {{x, x, x, x}};
}

// a * b + c, rounded once. Where fma is slow, in fp64: the product is exact there, and the sum is rounded to odd (its last
// bit is set where anything was lost), so that the rounding to fp32 cannot fall on a tie that is none (packing.py, fma).
float fused(float a, float b, float c) {
#if defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  const double product = static_cast<double>(a) * b, total = product + c, back = total - product;
  const double lost = (product - (total - back)) + (c - back);
  int64_t bits;
  std::memcpy(&bits, &total, sizeof bits);
  // An infinite or no number has lost what is none, which is not unlike 0 in this comparison.
  const bool inexact = (lost < 0.0) | (lost > 0.0);
  bits += (inexact & !(bits & 1)) ? ((lost > 0.0) == (total > 0.0) ? 1 : -1) : 0;
  double odd;
  std::memcpy(&odd, &bits, sizeof odd);
  return static_cast<float>(odd);
#endif
}

Floats fma(Floats a, Floats b, Floats acc) {
  for (int i = 0; i < kWidth; ++i) acc.v[i] = fused(a.v[i], b.v[i], acc.v[i]);
  return acc;
}

// The bits of an fp16 number moved into place and multiplied by 2^112 have its value, subnormal numbers included; only
// infinities and what is no number (exponent 31) have to be put back.
float from_half(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
  float value;
  std::memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits |= sign | (magnitude >= 31u << 23 ? 255u << 23 : 0u);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

Floats load_halves(const uint8_t *from) {
  uint16_t halves[kWidth];
  std::memcpy(halves, from, sizeof halves);
  Floats x;
  for (int i = 0; i < kWidth; ++i) x.v[i] = from_half(halves[i]);
  return x;
}

// Blocks that go through the inputs together.
constexpr int blocks_bf16(int) { return 1; }
constexpr int blocks_fp32(int) { return 1; }
constexpr int blocks_quantised(int) { return 1; }

// -- bf16 --------------------------------------------------------------------------------------------------------------

// Both values of each pair in fp32, whose upper half they are.
struct Pair {
  float first[kWidth], second[kWidth];
};

Pair widen(const uint32_t *pairs) {
  uint32_t first[kWidth], second[kWidth];
  for (int i = 0; i < kWidth; ++i) first[i] = pairs[i] << 16, second[i] = pairs[i] & 0xffff0000u;
  Pair pair;
  std::memcpy(pair.first, first, sizeof first);
  std::memcpy(pair.second, second, sizeof second);
  return pair;
}

Pair load_pairs(const uint8_t *from) {
  uint32_t pairs[kWidth];
  std::memcpy(pairs, from, sizeof pairs);
  return widen(pairs);
}

constexpr int kPairBytes = 8;  // rows are widened when they are rounded (rows.isa.cpp)

Pair splat_pair(const uint8_t *from) {
  float x[2];
  std::memcpy(x, from, sizeof x);
  Pair pair;
  for (int i = 0; i < kWidth; ++i) pair.first[i] = x[0], pair.second[i] = x[1];
  return pair;
}

// acc + w * x, rounded once. Where fma is slow, in fp64: a product of two bf16 numbers is exact there, and the sum's two
// roundings are as one. A sum can only lie halfway between two fp32 numbers when one term reaches down to half a step of
// the other. Both then lie within 53 bits (16 of the product, 24 of acc), and the sum is exact. A product rounded to fp32
// by itself would do for most numbers, not for subnormal products and those beyond the largest number.
Floats add_product(Floats acc, const float *w, const float *x) {
  for (int i = 0; i < kWidth; ++i)
#if defined(__FP_FAST_FMAF)
    acc.v[i] = __builtin_fmaf(w[i], x[i], acc.v[i]);
#else
    acc.v[i] = static_cast<float>(static_cast<double>(w[i]) * x[i] + acc.v[i]);
#endif
  return acc;
}

Floats dot_pairs(Floats acc, const Pair &w, const Pair &x) {
  return add_product(add_product(acc, w.second, x.second), w.first, x.first);
}

// -- int8 and int4: the offset is taken from each weight ---------------------------------------------------------------

struct Quad {
  int8_t v[4];
};

Quad splat_quad(const uint8_t *from) {
  Quad x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

struct Signed {
  using Sum = Ints;

  struct Weights {
    int8_t v[4 * kWidth];
  };

  static Sum start(int32_t) { return {}; }
  static Ints finish(Sum sum, int32_t) { return sum; }

  static Sum dot(Sum sum, const Weights &w, Quad x) {
    for (int i = 0; i < kWidth; ++i)
      for (int j = 0; j < 4; ++j) sum.v[i] += w.v[4 * i + j] * x.v[j];
    return sum;
  }
};

struct Int8 : Signed {
  static Weights weights(const uint8_t *group, int quad) {
    Weights w;
    for (int i = 0; i < 4 * kWidth; ++i) w.v[i] = static_cast<int8_t>(group[64 * quad + i] - 128);
    return w;
  }
};

struct Int4 : Signed {
  static Weights weights(const uint8_t *group, int quad) {
    Weights w;
    for (int i = 0; i < 4 * kWidth; ++i)
      w.v[i] = static_cast<int8_t>((group[64 * (quad & 3) + i] >> (quad & 4) & 15) - 8);
    return w;
  }
};
