#include "packed.h"

namespace mx {
namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line

int64_t whole_lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

int64_t row_stride(RowKind kind, int groups) {
  const int64_t lines = whole_lines(static_cast<int64_t>(groups) * kGroup * (kind == kInt8Rows ? 1 : 4)) / kLine;
  return (lines | 1) * kLine;
}

}  // namespace

int64_t rows_bytes(RowKind kind, int count, int d) {
  const int64_t groups = (d + kGroup - 1) / kGroup;
  const int64_t scalars = kind == kInt8Rows ? count * groups * (sizeof(float) + sizeof(int32_t)) : 0;
  return whole_lines(count * row_stride(kind, groups) + scalars);
}

Rows place_rows(void *memory, RowKind kind, int count, int d) {
  Rows rows{kind, count, d, 0, static_cast<uint8_t *>(memory), nullptr, nullptr};
  rows.stride = row_stride(kind, rows.groups());
  if (kind == kInt8Rows) {
    rows.scales = reinterpret_cast<float *>(rows.values + count * rows.stride);
    rows.sums = reinterpret_cast<int32_t *>(rows.scales + static_cast<int64_t>(count) * rows.groups());
  }
  return rows;
}

void fill_rows(const Rows &rows, const float *x, int64_t x_stride, int first, int last) {
  MX_PICK(fill_rows)(rows, x, x_stride, first, last);
}

void matmul(const Matrix &w, const Rows &x, const int32_t *index, int count, int first, int last, float *out,
            int64_t out_stride) {
  MX_PICK(matmul)(w, x, index, count, first, last, out, out_stride);
}

}  // namespace mx
