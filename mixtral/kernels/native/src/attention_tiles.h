// Tiles of a cache: some positions of one key/value head, found in the blocks, and their keys transposed.
#pragma once

#include "step_kernels.h"
#include "step_lanes.h"

namespace mx {
namespace MX_ISA {

constexpr int kTile = 32;  // positions; tiles start at multiples of it

// A head's width in whole pairs of registers.
inline int padded(int head_dim) { return (head_dim + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes); }

// Keys and values of kTile positions in the cache's dtype, padded width, each position's `stride` bytes behind the last.
// Positions that do not count hold anything that lies there.
struct Tile {
  const uint8_t *keys, *values;
  int64_t stride;
};

// This head's keys of a position; its values lie value_stride further.
inline const uint8_t *in_blocks(const AttentionTask &t, int64_t position) {
  return t.pages->at(*t.sequence, position) + t.layer_offset + t.head * t.pages->head_stride;
}

// The tile that starts at position `start`, copied position by position, from .. to - 1.
inline Tile copied(const AttentionTask &t, int64_t start, int64_t from, int64_t to, int width, uint8_t *copy) {
  const int64_t size = bytes_of(t.cache_dtype), head_bytes = size * t.head_dim, stride = size * width;
  if (width != t.head_dim) std::memset(copy, 0, static_cast<size_t>(2 * kTile * stride));
  for (int64_t at = from; at < to; ++at) {
    const uint8_t *keys = in_blocks(t, at), *values = keys + t.pages->value_stride;
    std::memcpy(copy + (at - start) * stride, keys, static_cast<size_t>(head_bytes));
    std::memcpy(copy + (kTile + at - start) * stride, values, static_cast<size_t>(head_bytes));
  }
  return {copy, copy + kTile * stride, stride};
}

// The same, where it lies if it can be read there: in one block, and no padding to add.
inline Tile find(const AttentionTask &t, int64_t start, int64_t from, int64_t to, int width, uint8_t *copy) {
  const Pages &pages = *t.pages;
  if (width != t.head_dim || start % pages.block_size + kTile > pages.block_size)
    return copied(t, start, from, to, width, copy);
  const uint8_t *keys = in_blocks(t, start);
  return {keys, keys + pages.value_stride, pages.slot_stride};
}

constexpr int kRowsAhead = 3, kToSecondLevel = 2;  // the latter as __builtin_prefetch has it

// Asks for the rows of the tile behind this one, which most often follows it in memory; a few at a time between other work,
// because only some twenty lines can be under way at once.
class Ahead {
 public:
  Ahead(const Tile &tile, int64_t row_bytes)
      : next_(tile.keys + kTile * tile.stride), stride_(tile.stride), to_values_(tile.values - tile.keys),
        bytes_(row_bytes) {}

  void fetch() {
    for (int rows = kRowsAhead; rows && left_; --rows, --left_, next_ += stride_)
      for (int64_t b = 0; b < bytes_; b += 64) {
        __builtin_prefetch(next_ + b, 0, kToSecondLevel);
        __builtin_prefetch(next_ + b + to_values_, 0, kToSecondLevel);
      }
  }

 private:
  const uint8_t *next_;
  int64_t stride_, to_values_, bytes_;
  int left_ = kTile;
};

// 0, 1, ... kLanes - 1 as a type.
template <int... I>
struct Numbers {};
template <int N, int... I>
struct NumbersTo : NumbersTo<N - 1, N - 1, I...> {};
template <int... I>
struct NumbersTo<0, I...> {
  typedef Numbers<I...> type;
};

// a0 b0 a1 b1 ... from the first halves of a and b (half 0), or from the second ones (half kLanes / 2).
template <int half, int... I>
inline Lanes zip(Lanes a, Lanes b, Numbers<I...>) {
  return __builtin_shufflevector(a, b, (half + I / 2 + I % 2 * kLanes)...);
}
template <int half>
inline Lanes zip(Lanes a, Lanes b) {
  return zip<half>(a, b, typename NumbersTo<kLanes>::type());
}

// The same within each four lanes, whose halves have two lanes.
template <int half, int... I>
inline Lanes zip_fours(Lanes a, Lanes b, Numbers<I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 4 + half + I % 4 / 2 + I % 2 * kLanes)...);
}

// The lanes of a and b whose number lacks bit `s`, those of b moved up to where the bit is set; and the others, those of
// a moved down.
template <int s, int... I>
inline Lanes lower(Lanes a, Lanes b, Numbers<I...>) {
  return __builtin_shufflevector(a, b, (I & s ? kLanes + I - s : I)...);
}
template <int s, int... I>
inline Lanes upper(Lanes a, Lanes b, Numbers<I...>) {
  return __builtin_shufflevector(a, b, (I & s ? kLanes + I : I + s)...);
}

// Registers and lanes change places in bit `s` of their numbers, and in the higher bits. Inlined like transpose.
template <int s>
inline __attribute__((always_inline)) void exchange(Lanes *a) {
  const typename NumbersTo<kLanes>::type lanes;
  for (int i = 0; i < kLanes; ++i) {
    if (i & s) continue;
    const Lanes first = a[i], second = a[i + s];
    a[i] = lower<s>(first, second, lanes);
    a[i + s] = upper<s>(first, second, lanes);
  }
  if constexpr (2 * s < kLanes) exchange<2 * s>(a);
}

// kLanes registers -> their columns: first squares of four, then those among each other. Inlined, so that the registers
// stay in registers.
inline __attribute__((always_inline)) void transpose(Lanes *a) {
  const typename NumbersTo<kLanes>::type lanes;
  for (int i = 0; i < kLanes; i += 4) {
    const Lanes p = zip_fours<0>(a[i], a[i + 1], lanes), q = zip_fours<0>(a[i + 2], a[i + 3], lanes);
    const Lanes r = zip_fours<2>(a[i], a[i + 1], lanes), s = zip_fours<2>(a[i + 2], a[i + 3], lanes);
    a[i] = lower<2>(p, q, lanes);
    a[i + 1] = upper<2>(p, q, lanes);
    a[i + 2] = lower<2>(r, s, lanes);
    a[i + 3] = upper<2>(r, s, lanes);
  }
  if constexpr (kLanes > 4) exchange<4>(a);
}

// The tile's keys -> fp32 [width, kTile]. Two channels in bf16 move as one number.
template <Dtype dtype>
inline void turn(const Tile &tile, int width, float *keys, Ahead &ahead) {
  const int64_t bytes = width * bytes_of(dtype);
  for (int at = 0; at < kTile; at += kLanes) {
    const uint8_t *from = tile.keys + at * tile.stride;
    float *to = keys + at;
    for (int64_t b = 0; b < bytes; b += static_cast<int64_t>(sizeof(Lanes))) {
      Lanes a[kLanes];
      for (int i = 0; i < kLanes; ++i) a[i] = load(from + i * tile.stride + b);
      transpose(a);
      for (int i = 0; i < kLanes; ++i) {
        store(to, dtype == kBfloat16 ? first_of_pair(a[i]) : a[i]);
        to += kTile;
        if (dtype == kFloat32) continue;
        store(to, second_of_pair(a[i]));
        to += kTile;
      }
    }
    ahead.fetch();
  }
}

}  // namespace MX_ISA
}  // namespace mx
