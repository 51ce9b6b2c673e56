// Packed weight matrices and their products with rows of activations. mixtral/kernels/packing.py has the layouts and the
// arithmetic in plain torch; the bits of the results are the same for any number of rows, tiles and threads.
#pragma once

#include <cstdint>

#include "isa.h"

namespace mx {

constexpr int kBlock = 16;  // outputs that lie side by side: the lanes
constexpr int kGroup = 32;  // consecutive inputs that share a scale

enum Format : int32_t { kBf16, kInt8, kInt4, kFp32, kFp16 };

// W [n, d] of x W^T: ceil(n / 16) blocks of ceil(d / 32) groups.
struct Matrix {
  const void *data;
  int32_t format;
  int32_t n, d;

  int blocks() const { return (n + kBlock - 1) / kBlock; }
  int groups() const { return (d + kGroup - 1) / kGroup; }
};

// What rows of activations are rounded to: bf16 (held in fp32 where it cannot be multiplied as it is, with room for that
// everywhere), int8 by groups with a scale and a sum each, or not at all.
enum RowKind : int32_t { kBf16Rows, kInt8Rows, kFp32Rows };
constexpr int kRowKinds = 3;

// The rows that weights of a format take.
inline RowKind rows_kind(int32_t format) {
  if (format == kInt8 || format == kInt4) return kInt8Rows;
  return format == kBf16 ? kBf16Rows : kFp32Rows;
}

// Rows of activations as the products want them. `stride` is a row's bytes, odd in cache lines so that rows do not share a
// set of the cache.
struct Rows {
  int32_t kind;
  int32_t count, d;
  int64_t stride;
  uint8_t *values;  // [count, stride]: d values each, then zeros up to a whole group
  float *scales;    // [count, groups], null but for int8
  int32_t *sums;    // [count, groups]: the sum of a group's int8 values, null likewise

  int groups() const { return (d + kGroup - 1) / kGroup; }
};

// Bytes of memory that `count` rows of `d` inputs need; `place_rows` lays them out in such memory (64-byte aligned).
int64_t rows_bytes(RowKind kind, int count, int d);
Rows place_rows(void *memory, RowKind kind, int count, int d);

// Fills rows first..last-1 from those of x [count, d], `x_stride` floats apart. Rows may be shared among threads.
void fill_rows(const Rows &rows, const float *x, int64_t x_stride, int first, int last);

// out[r, 16 b + lane] = sum over d of x[index[r], d] * w[16 b + lane, d] for r < count and the blocks first <= b < last.
// `index` null: row r itself. A row of `out` has room for whole blocks and is `out_stride` floats from the next.
// Runs in the calling thread: threads share out the blocks among them, in multiples of kBlocksAtOnce where they can.
constexpr int kBlocksAtOnce = 4;
void matmul(const Matrix &w, const Rows &x, const int32_t *index, int count, int first, int last, float *out,
            int64_t out_stride);

MX_EACH_ISA(void, fill_rows, (const Rows &rows, const float *x, int64_t x_stride, int first, int last))
MX_EACH_ISA(void, matmul, (const Matrix &w, const Rows &x, const int32_t *index, int count, int first, int last,
                           float *out, int64_t out_stride))

}  // namespace mx
