// Eight of a block's sixteen lanes as one register of AVX2, with FMA and F16C. Included by products.isa.cpp alone, inside
// an unnamed namespace; lanes_avx512.h and lanes_portable.h define the same names.

constexpr int kWidth = 8;     // lanes of a register
constexpr int kMostRowsBf16 = 5;  // rows that share a loaded weight
constexpr int kMostRowsQuantised = 4;
constexpr int kMostRowsFp32 = 6;

using Floats = __m256;
using Ints = __m256i;

Floats zero() { return _mm256_setzero_ps(); }
Floats load(const float *from) { return _mm256_loadu_ps(from); }
void store(float *to, Floats x) { _mm256_storeu_ps(to, x); }
Floats multiply(Floats a, float b) { return _mm256_mul_ps(a, _mm256_set1_ps(b)); }

// acc + a * b, rounded once.
Floats fma(Ints a, Floats b, Floats acc) { return _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), b, acc); }

Floats load_halves(const uint8_t *from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
}

__m256i load_bytes(const uint8_t *from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)); }

Floats splat(const uint8_t *from) { return _mm256_broadcast_ss(reinterpret_cast<const float *>(from)); }
Floats fma(Floats a, Floats b, Floats acc) { return _mm256_fmadd_ps(a, b, acc); }

// Four bytes of activations in every lane.
__m256i splat_bytes(const uint8_t *from) {
  int32_t bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return _mm256_set1_epi32(bytes);
}

// -- bf16 --------------------------------------------------------------------------------------------------------------

// Both values of each pair in fp32, whose upper half they are.
struct Pair {
  __m256 first, second;
};

Pair widen(__m256i pairs) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), _mm256_castsi256_ps(_mm256_and_si256(pairs, upper))};
}

Pair load_pairs(const uint8_t *from) { return widen(load_bytes(from)); }

// Rows are widened once, when they are rounded (rows.isa.cpp): widening here would take as long as the products.
constexpr int kPairBytes = 8;

Pair splat_pair(const uint8_t *from) {
  float x[2];
  std::memcpy(x, from, sizeof x);
  return {_mm256_set1_ps(x[0]), _mm256_set1_ps(x[1])};
}

Floats dot_pairs(Floats acc, Pair w, Pair x) {
  return _mm256_fmadd_ps(w.first, x.first, _mm256_fmadd_ps(w.second, x.second, acc));
}

// Blocks that go through the inputs together. One row waits for memory, which gives more to four readers than to one, and
// for its own sums; more rows fill the registers with one block.
constexpr int blocks_bf16(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
constexpr int blocks_fp32(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
constexpr int blocks_quantised(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

// -- int8 and int4 -----------------------------------------------------------------------------------------------------

using Quad = __m256i;

Quad splat_quad(const uint8_t *from) { return splat_bytes(from); }

// Sums of two neighbouring 16-bit numbers.
__m256i add_neighbours(__m256i shorts) { return _mm256_madd_epi16(shorts, _mm256_set1_epi16(1)); }

// The multiplication of bytes takes unsigned by signed and sums pairs in 16 bits: |w| by x with the sign of w. Both are
// at most 127 in size, and 2 * 127 * 127 fits.
struct Int8 {
  using Sum = Ints;

  struct Weights {
    __m256i w, size;
  };

  static Sum start(int32_t) { return _mm256_setzero_si256(); }

  static Weights weights(const uint8_t *group, int quad) {
    const __m256i w = _mm256_xor_si256(load_bytes(group + 64 * quad), _mm256_set1_epi8(-128));
    return {w, _mm256_abs_epi8(w)};
  }

  static Sum dot(Sum sum, Weights weights, Quad x) {
    const __m256i products = _mm256_maddubs_epi16(weights.size, _mm256_sign_epi8(x, weights.w));
    return _mm256_add_epi32(sum, add_neighbours(products));
  }

  static Ints finish(Sum sum, int32_t) { return sum; }
};

// Unsigned w + 8 by x; the 8 comes off through the sum of x. Sixteen bits hold a whole group: 8 * 2 * 15 * 127 = 30480.
struct Int4 {
  using Sum = Ints;
  using Weights = Ints;

  static Sum start(int32_t) { return _mm256_setzero_si256(); }

  static Ints weights(const uint8_t *group, int quad) {
    const __m256i bytes = load_bytes(group + 64 * (quad & 3));
    return _mm256_and_si256(quad < 4 ? bytes : _mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
  }

  static Sum dot(Sum sum, Ints w, Quad x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)); }

  static Ints finish(Sum sum, int32_t sum_x) {
    return _mm256_sub_epi32(add_neighbours(sum), _mm256_set1_epi32(8 * sum_x));
  }
};
