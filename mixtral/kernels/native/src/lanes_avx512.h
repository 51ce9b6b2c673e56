// All sixteen lanes of a block as one register of AVX-512, with BF16 and VNNI. Included by products.isa.cpp alone, inside
// an unnamed namespace; lanes_avx2.h and lanes_portable.h define the same names.

constexpr int kWidth = 16;    // lanes of a register
constexpr int kMostRowsBf16 = 6;  // rows that share a loaded weight
constexpr int kMostRowsQuantised = 6;
constexpr int kMostRowsFp32 = 6;

using Floats = __m512;
using Ints = __m512i;

Floats zero() { return _mm512_setzero_ps(); }
Floats load(const float *from) { return _mm512_loadu_ps(from); }
void store(float *to, Floats x) { _mm512_storeu_ps(to, x); }
Floats multiply(Floats a, float b) { return _mm512_mul_ps(a, _mm512_set1_ps(b)); }

// acc + a * b, rounded once.
Floats fma(Ints a, Floats b, Floats acc) { return _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), b, acc); }

Floats load_halves(const uint8_t *from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}

Floats splat(const uint8_t *from) { return _mm512_set1_ps(*reinterpret_cast<const float *>(from)); }
Floats fma(Floats a, Floats b, Floats acc) { return _mm512_fmadd_ps(a, b, acc); }

// Four bytes of activations in every lane.
__m512i splat_bytes(const uint8_t *from) {
  int32_t bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return _mm512_set1_epi32(bytes);
}

// -- bf16 --------------------------------------------------------------------------------------------------------------

using Pair = __m512bh;

Pair load_pairs(const uint8_t *from) { return (__m512bh)_mm512_loadu_si512(from); }
constexpr int kPairBytes = 4;
Pair splat_pair(const uint8_t *from) { return (__m512bh)splat_bytes(from); }
Floats dot_pairs(Floats acc, Pair w, Pair x) { return _mm512_dpbf16_ps(acc, w, x); }

// Blocks that go through the inputs together: a row's sums wait for each other, memory gives more to several readers,
// and all save loads of x. 4 x 6 sums, 4 weights and an x fit the 32 registers, as do 2 x 6 integer and 2 x 6 float sums.
constexpr int blocks_bf16(int) { return 4; }
constexpr int blocks_fp32(int) { return 4; }
constexpr int blocks_quantised(int rows) { return rows <= 2 ? 4 : 2; }

// -- int8 and int4: unsigned by signed bytes; the offset of w comes off through the sum of x ---------------------------

using Quad = __m512i;

Quad splat_quad(const uint8_t *from) { return splat_bytes(from); }

struct Int8 {
  using Sum = Ints;
  using Weights = Ints;
  static Sum start(int32_t sum_x) { return _mm512_set1_epi32(-128 * sum_x); }
  static Ints weights(const uint8_t *group, int quad) { return _mm512_loadu_si512(group + 64 * quad); }
  static Sum dot(Sum sum, Ints w, Quad x) { return _mm512_dpbusd_epi32(sum, w, x); }
  static Ints finish(Sum sum, int32_t) { return sum; }
};

struct Int4 {
  using Sum = Ints;
  using Weights = Ints;
  static Sum start(int32_t sum_x) { return _mm512_set1_epi32(-8 * sum_x); }

  static Ints weights(const uint8_t *group, int quad) {
    const Ints bytes = _mm512_loadu_si512(group + 64 * (quad & 3));
    return _mm512_and_si512(quad < 4 ? bytes : _mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
  }

  static Sum dot(Sum sum, Ints w, Quad x) { return _mm512_dpbusd_epi32(sum, w, x); }
  static Ints finish(Sum sum, int32_t) { return sum; }
};
