// x W^T over packed weights (packed.py has the formulas). A tile is some blocks of outputs by some rows, whose sums stay
// in registers; the lanes of an instruction set and the sizes of its tiles come from lanes_*.h.
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "packed.h"

namespace mx {
namespace MX_ISA {
namespace {

#if defined(__AVX512BF16__)
#include "lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes_avx2.h"
#else
#include "lanes_portable.h"
#endif

constexpr int kColumns = kBlock / kWidth;  // registers that a block's lanes fill, its columns
constexpr int kAhead = 1024;               // bytes between the weights in use and those asked for

struct Product {
  const Matrix &w;
  const Rows &x;
  const int32_t *index;
  float *out;
  int64_t out_stride;
};

struct Groups {
  int first, last;
};

// Formats whose weights are multiplied as numbers, a step of one or two inputs after the other.
struct Bf16Format {
  static constexpr int kBytes = 1024;  // of a group in one block
  static constexpr int kPart = 16;     // groups: 16 KiB a block (docs/log.md, 2026-11-26)
  static constexpr int kInputs = 2;    // of a step
  static constexpr int kXBytes = kPairBytes;  // of a step in a row
  static constexpr int kMostRows = kMostRowsBf16;
  static constexpr int blocks(int rows) { return blocks_bf16(rows); }
  using Values = Pair;
  static Pair weights(const uint8_t *from) { return load_pairs(from); }
  static Pair inputs(const uint8_t *from) { return splat_pair(from); }
  static Floats add(Floats acc, Pair w, Pair x) { return dot_pairs(acc, w, x); }
};

struct Fp32Format {
  static constexpr int kBytes = 2048;
  static constexpr int kPart = 8;
  static constexpr int kInputs = 1;
  static constexpr int kXBytes = 4;
  static constexpr int kMostRows = kMostRowsFp32;
  static constexpr int blocks(int rows) { return blocks_fp32(rows); }
  using Values = Floats;
  static Floats weights(const uint8_t *from) { return load(reinterpret_cast<const float *>(from)); }
  static Floats inputs(const uint8_t *from) { return splat(from); }
  static Floats add(Floats acc, Floats w, Floats x) { return fma(w, x, acc); }
};

struct Fp16Format : Fp32Format {
  static constexpr int kBytes = 1024;
  static constexpr int kPart = 16;
  static Floats weights(const uint8_t *from) { return load_halves(from); }
};

struct Quantised {
  static constexpr int kMostRows = kMostRowsQuantised;
  static constexpr int blocks(int rows) { return blocks_quantised(rows); }
};

struct Int8Format : Int8, Quantised {
  static constexpr int kBytes = 544;
  static constexpr int kPart = 7;
};

struct Int4Format : Int4, Quantised {
  static constexpr int kBytes = 288;
  static constexpr int kPart = 14;
};

// The weights of the block that a column belongs to, from a group on.
template <class F>
const uint8_t *weights_of(const Product &p, int column, int group) {
  const int64_t block = column / kColumns;
  return static_cast<const uint8_t *>(p.w.data) + (block * p.w.groups() + group) * F::kBytes;
}

int row_of(const Product &p, int row) { return p.index ? p.index[row] : row; }

// The first of a column's lanes in its block.
constexpr int lane_of(int column) { return column % kColumns * kWidth; }

// The sums of C columns by R rows, begun anew or continued from `out`.
template <int C, int R>
struct Sums {
  Floats v[C][R];

  Sums(const Product &p, int column, int row, bool begin) {
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r) v[c][r] = begin ? zero() : load(place(p, column + c, row + r));
  }

  void write(const Product &p, int column, int row) const {
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r) store(place(p, column + c, row + r), v[c][r]);
  }

  static float *place(const Product &p, int column, int row) { return p.out + row * p.out_stride + column * kWidth; }
};

// One row or two wait for memory, and ask for lines kAhead bytes further in each block; where a block ends, for the first
// ones of the block that comes after it. More rows compute for as long as the processor's own look-ahead takes.
template <int R>
constexpr bool waits = R <= 2;

// From the place `at` in one of `blocks` blocks of `length` bytes that go past at once.
inline int64_t ahead_of(int64_t at, int64_t length, int blocks) {
  return at + kAhead < length ? kAhead : kAhead + (blocks - 1) * length;
}

// C columns by R rows of one step of inputs; the fewer of weights and activations wait in registers for the others.
template <class F, int C, int R>
Sums<C, R> add_step(Sums<C, R> sums, const uint8_t *const *w, const uint8_t *const *x, int64_t step, int64_t ahead) {
  constexpr int kWeights = F::kBytes / kGroup * F::kInputs;  // bytes of a step in one block
  if constexpr (waits<R>) {
    typename F::Values inputs[R];
    for (int r = 0; r < R; ++r) inputs[r] = F::inputs(x[r] + F::kXBytes * step);
    for (int c = 0; c < C; ++c) {
      const typename F::Values weights = F::weights(w[c] + kWeights * step);
      if (lane_of(c) == 0) __builtin_prefetch(w[c] + kWeights * step + ahead);
      for (int r = 0; r < R; ++r) sums.v[c][r] = F::add(sums.v[c][r], weights, inputs[r]);
    }
  } else {
    typename F::Values weights[C];
    for (int c = 0; c < C; ++c) weights[c] = F::weights(w[c] + kWeights * step);
    for (int r = 0; r < R; ++r) {
      const typename F::Values inputs = F::inputs(x[r] + F::kXBytes * step);
      for (int c = 0; c < C; ++c) sums.v[c][r] = F::add(sums.v[c][r], weights[c], inputs);
    }
  }
  return sums;
}

// Numbers: a chain of steps for each sum.
template <class F, int C, int R>
void number_tile(const Product &p, int column, int row, Groups groups) {
  constexpr int kSteps = kGroup / F::kInputs, kLaneBytes = F::kBytes / kGroup / kBlock * F::kInputs;
  const uint8_t *x[R], *w[C];
  for (int r = 0; r < R; ++r) x[r] = p.x.values + row_of(p, row + r) * p.x.stride;
  for (int c = 0; c < C; ++c) w[c] = weights_of<F>(p, column + c, 0) + kLaneBytes * lane_of(column + c);
  Sums<C, R> begun(p, column, row, groups.first == 0);
  Sums<C, R> sums = begun;  // a copy whose address nobody takes stays in registers
  const int64_t length = int64_t{p.w.groups()} * F::kBytes;
  for (int64_t group = groups.first; group < groups.last; ++group) {
    const int64_t ahead = waits<R> ? ahead_of(group * F::kBytes, length, C / kColumns) : 0;
#pragma GCC unroll 2
    for (int64_t step = group * kSteps; step < (group + 1) * kSteps; ++step) sums = add_step<F>(sums, w, x, step, ahead);
  }
  Sums<C, R>(sums).write(p, column, row);
}

template <int C, int R>
void tile(Bf16Format, const Product &p, int column, int row, Groups groups) {
  number_tile<Bf16Format, C, R>(p, column, row, groups);
}

template <int C, int R>
void tile(Fp32Format, const Product &p, int column, int row, Groups groups) {
  number_tile<Fp32Format, C, R>(p, column, row, groups);
}

template <int C, int R>
void tile(Fp16Format, const Product &p, int column, int row, Groups groups) {
  number_tile<Fp16Format, C, R>(p, column, row, groups);
}

// The exact integer dot products of one group of a block, for R rows; x of row r is at x[r] + at.
template <class F, int R>
struct Dots {
  Ints v[kColumns][R];

  Dots(const uint8_t *w, const uint8_t *const *x, int64_t at, const int32_t *sums_x) {
    typename F::Sum sum[kColumns][R];
    for (int c = 0; c < kColumns; ++c)
      for (int r = 0; r < R; ++r) sum[c][r] = F::start(sums_x[r]);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const int quad = (i & 1) * 4 + (i >> 1);  // 0, 4, 1, 5, ...: int4 has two such in one register
      typename F::Weights weights[kColumns];
      for (int c = 0; c < kColumns; ++c) weights[c] = F::weights(w + 4 * lane_of(c), quad);
      for (int r = 0; r < R; ++r) {
        const Quad inputs = splat_quad(x[r] + at + 4 * quad);
        for (int c = 0; c < kColumns; ++c) sum[c][r] = F::dot(sum[c][r], weights[c], inputs);
      }
    }
    for (int c = 0; c < kColumns; ++c)
      for (int r = 0; r < R; ++r) v[c][r] = F::finish(sum[c][r], sums_x[r]);
  }
};

template <int C, int R, class F>
void tile(F, const Product &p, int column, int row, Groups groups) {
  constexpr int kBlocks = C / kColumns;
  const uint8_t *x[R], *w[kBlocks];
  const float *scales[R];
  const int32_t *sums_x[R];
  for (int r = 0; r < R; ++r) {
    const int64_t at = row_of(p, row + r);
    x[r] = p.x.values + at * p.x.stride;
    scales[r] = p.x.scales + at * p.x.groups();
    sums_x[r] = p.x.sums + at * p.x.groups();
  }
  for (int b = 0; b < kBlocks; ++b) w[b] = weights_of<F>(p, column + b * kColumns, 0);
  Sums<C, R> sums(p, column, row, groups.first == 0);
  const int64_t length = int64_t{p.w.groups()} * F::kBytes;
  for (int64_t group = groups.first; group < groups.last; ++group) {
    const int64_t ahead = ahead_of(group * F::kBytes, length, kBlocks);
    int32_t sum_x[R];
    for (int r = 0; r < R; ++r) sum_x[r] = sums_x[r][group];
    for (int b = 0; b < kBlocks; ++b) {
      const uint8_t *weights = w[b] + group * F::kBytes;
      if constexpr (waits<R>)
        for (int line = 0; line < F::kBytes; line += 64) __builtin_prefetch(weights + line + ahead);
      const Dots<F, R> dots(weights, x, group * kGroup, sum_x);
      for (int c = 0; c < kColumns; ++c) {
        const Floats scale = load_halves(weights + F::kBytes - 2 * kBlock + 2 * lane_of(c));
        for (int r = 0; r < R; ++r) {
          Floats &sum = sums.v[b * kColumns + c][r];
          sum = fma(dots.v[c][r], multiply(scale, scales[r][group]), sum);
        }
      }
    }
  }
  sums.write(p, column, row);
}

// R rows by some blocks, as many at once as there are registers for.
template <class F, int R>
void rows_by_blocks(const Product &p, int block, int last, int row, Groups groups) {
  constexpr int B = F::blocks(R);
  for (; block + B <= last; block += B) tile<B * kColumns, R>(F{}, p, block * kColumns, row, groups);
  if constexpr (B > 1)
    for (; block < last; ++block) tile<kColumns, R>(F{}, p, block * kColumns, row, groups);
}

template <class F, int R = F::kMostRows>
void some_rows(int count, const Product &p, int block, int last, int row, Groups groups) {
  if (count == R)
    rows_by_blocks<F, R>(p, block, last, row, groups);
  else if constexpr (R > 1)
    some_rows<F, R - 1>(count, p, block, last, row, groups);
}

// Many rows: the weights of a few blocks are cut into parts of kPart groups that stay in the cache while all rows go past
// them; the sums wait in `out`, in the same order as if they had never left their registers.
template <class F>
void product(const Product &p, int count, int first, int last) {
  constexpr int kRows = F::kMostRows;
  const int tiles = (count + kRows - 1) / kRows, groups = p.w.groups();
  const int part = tiles > 1 ? F::kPart : groups;
  for (int block = first; block < last; block += kBlocksAtOnce) {
    const int end = block + kBlocksAtOnce < last ? block + kBlocksAtOnce : last;
    for (int group = 0; group < groups; group += part) {
      const Groups span{group, group + part < groups ? group + part : groups};
      for (int t = 0; t < tiles; ++t) {  // of nearly equal size
        const int row = static_cast<int>(int64_t{count} * t / tiles);
        const int next = static_cast<int>(int64_t{count} * (t + 1) / tiles);
        some_rows<F>(next - row, p, block, end, row, span);
      }
    }
  }
}

}  // namespace

void matmul(const Matrix &w, const Rows &x, const int32_t *index, int count, int first, int last, float *out,
            int64_t out_stride) {
  const Product p{w, x, index, out, out_stride};
  if (w.format == kBf16)
    product<Bf16Format>(p, count, first, last);
  else if (w.format == kInt8)
    product<Int8Format>(p, count, first, last);
  else if (w.format == kInt4)
    product<Int4Format>(p, count, first, last);
  else if (w.format == kFp32)
    product<Fp32Format>(p, count, first, last);
  else
    product<Fp16Format>(p, count, first, last);
}

}  // namespace MX_ISA
}  // namespace mx
