// One product as a call of its own: rows of fp32 in, rows of fp32 out, on all threads of the pool.
#include <cstdlib>

#include "packed.h"
#include "pool.h"

extern "C" {

// out[r, i] = sum over d of x[r, d] * w[i, d]; strides in floats, that of `out` with room for whole blocks.
// Returns 0, or 1 when there is no memory for the rounded rows.
int mx_linear(const mx::Matrix *w, const float *x, int64_t x_stride, int rows, float *out, int64_t out_stride) {
  const mx::RowKind kind = mx::rows_kind(w->format);
  void *memory = std::aligned_alloc(64, mx::rows_bytes(kind, rows, w->d));
  if (!memory) return 1;
  const mx::Rows input = mx::place_rows(memory, kind, rows, w->d);
  mx::parallel([&](int thread, int threads) {
    const mx::Share mine = mx::share(rows, thread, threads);
    mx::fill_rows(input, x, x_stride, mine.first, mine.last);
    mx::barrier();
    const mx::Share blocks = mx::share(w->blocks(), thread, threads, mx::kBlocksAtOnce);
    mx::matmul(*w, input, nullptr, rows, blocks.first, blocks.last, out, out_stride);
  });
  std::free(memory);
  return 0;
}
}
