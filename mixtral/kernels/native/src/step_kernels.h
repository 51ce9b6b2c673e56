// The step's work between the products, compiled once for each instruction set: attention.isa.cpp, step_rows.isa.cpp.
#pragma once

#include <cstdint>

#include "isa.h"
#include "step.h"

namespace mx {

// Some rows of one sequence against one key/value head, for some of its query heads.
struct AttentionTask {
  const Sequence *sequence;
  const Pages *pages;
  int32_t begin, end;  // rows of the sequence, from 0
  int32_t heads;       // how many query heads
  int32_t head;        // this key/value head
  int32_t head_dim, window, cache_dtype;
  int64_t layer_offset;  // bytes from the first layer's keys to this one's
  const float *queries;  // rotated; row 0's [heads, C], the next row's `stride` floats on
  int64_t stride;
  float *out;  // row 0's [heads, C], the next row's `out_stride` floats on
  int64_t out_stride;
};

constexpr int kAttentionRows = 16;  // rows that share one reading of keys and values

// x / sqrt(mean(x^2) + eps) * weight, n values.
MX_EACH_ISA(void, rms_norm, (const float *x, const float *weight, int n, float eps, float *out))
// out[e] = x . router[e], router [n_experts, n].
MX_EACH_ISA(void, score_experts, (const float *x, const float *router, int n, int n_experts, float *out))
// gate[i] = silu(gate[i]) * up[i], n a multiple of 16.
MX_EACH_ISA(void, swiglu, (float *gate, const float *up, int n))
// log of the sum of e^x[i]; not finite when some x[i] is NaN or +infinity.
MX_EACH_ISA(float, log_sum_exp, (const float *x, int n))
// to[i] += weight * from[i].
MX_EACH_ISA(void, add, (float *to, const float *from, float weight, int n))
// Rotates the pairs (i, i + C / 2) of n heads by one position's angles.
MX_EACH_ISA(void, rotate, (float *x, const float *cosines, const float *sines, int head_dim, int n_heads))
// n floats to a Dtype, and back; a row of a matrix packed in a format without scales (packed.py) to floats.
MX_EACH_ISA(void, narrow, (const float *from, int32_t dtype, int n, uint8_t *to))
MX_EACH_ISA(void, widen, (const uint8_t *from, int32_t dtype, int n, float *to))
MX_EACH_ISA(void, widen_packed, (const Matrix &w, int64_t row, float *to))
MX_EACH_ISA(void, attend, (const AttentionTask &task, float *scratch))
// How many floats of scratch attend needs.
MX_EACH_ISA(int64_t, attention_scratch, (int heads, int head_dim))

}  // namespace mx
