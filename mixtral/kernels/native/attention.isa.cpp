// Attention of some rows of one sequence over its cache, for one key/value head: softmax(q k^T / sqrt(C)) v, by tiles of
// positions with a running maximum (arXiv 2205.14135). Tiles start at multiples of kTile, so that what a row adds up, and
// in which order, follows from its own position alone: neither from the rows beside it nor from where its blocks lie.
//
// Scores have positions along the lanes (the tile's keys are transposed once for all rows and heads that read them),
// sums of values have channels along the lanes.
#include <math.h>

#include "step_kernels.h"
#include "step_lanes.h"

namespace mx {
namespace MX_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kTile = 32;  // positions

int padded(int head_dim) { return (head_dim + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes); }

// What attend works on; all in one piece of scratch.
struct Tiles {
  int width;      // C, padded to whole registers
  float *rows;    // [kTile, width] keys as they lie in the cache, then values
  float *keys;    // [width, kTile]
  float *scores;  // [heads, kTile]
  float *query;   // [kAttentionRows * heads, width], divided by sqrt(C)
  float *sums;    // [kAttentionRows * heads, width], of weight * value
  float *most;    // [kAttentionRows * heads], the largest score so far
  float *total;   // [kAttentionRows * heads], of the weights

  Tiles(float *scratch, int heads, int head_dim) : width(padded(head_dim)) {
    const int64_t queries = static_cast<int64_t>(kAttentionRows) * heads;
    rows = scratch;
    keys = rows + kTile * width;
    scores = keys + kTile * width;
    query = scores + static_cast<int64_t>(heads) * kTile;
    sums = query + queries * width;
    most = sums + queries * width;
    total = most + queries;
  }
};

// -- the cache ---------------------------------------------------------------------------------------------------------

// This head's keys (or values, `offset` bytes further) of the positions from .. to - 1 of a tile -> its rows in fp32, the
// others zeros. What came before this call lies in the blocks, the call's own rows in `fresh`.
void read(const AttentionTask &t, const uint8_t *fresh, int64_t offset, int64_t tile, int64_t from, int64_t to,
          const Tiles &w) {
  const Sequence &s = *t.sequence;
  const int64_t head_bytes = bytes_of(t.cache_dtype) * t.head_dim, row_bytes = t.n_heads * head_bytes;
  const int64_t slot = from % (static_cast<int64_t>(s.n_blocks) * s.block_size);
  int64_t block = slot / s.block_size, within = slot % s.block_size;
  for (int64_t at = tile; at < tile + kTile; ++at) {
    float *row = w.rows + (at - tile) * w.width;
    const bool there = at >= from && at < to;
    for (int c = there ? t.head_dim : 0; c < w.width; ++c) row[c] = 0.0f;
    if (!there) continue;
    const uint8_t *source = at < s.first ? s.blocks[block] + t.layer_offset + offset + within * row_bytes
                                         : fresh + (at - s.first) * row_bytes;
    widen(source + t.head * head_bytes, t.cache_dtype, t.head_dim, row);
    if (++within == s.block_size) within = 0, block = block + 1 == s.n_blocks ? 0 : block + 1;
  }
}

// 0, 1, ... kLanes - 1 as a type.
template <int... I>
struct Places {};
template <int N, int... I>
struct PlacesTo : PlacesTo<N - 1, N - 1, I...> {};
template <int... I>
struct PlacesTo<0, I...> {
  typedef Places<I...> type;
};

// a0 b0 a1 b1 ... from the first halves of a and b (start 0), or from the second halves (start kLanes / 2).
template <int start, int... I>
Lanes zip(Lanes a, Lanes b, Places<I...>) {
  return __builtin_shufflevector(a, b, (start + I / 2 + I % 2 * kLanes)...);
}

// kLanes rows of kLanes floats, `stride` apart -> their columns, `out_stride` apart. Each round of zips moves one bit of
// a row's number into the column's and back: after log2(kLanes) rounds they have changed places.
void transpose(const float *from, int stride, float *to, int out_stride) {
  const typename PlacesTo<kLanes>::type places;
  Lanes a[kLanes], b[kLanes];
  for (int i = 0; i < kLanes; ++i) a[i] = load(from + i * stride);
  for (int round = 1; round < kLanes; round *= 2) {
    for (int i = 0; i < kLanes / 2; ++i) {
      b[2 * i] = zip<0>(a[i], a[i + kLanes / 2], places);
      b[2 * i + 1] = zip<kLanes / 2>(a[i], a[i + kLanes / 2], places);
    }
    for (int i = 0; i < kLanes; ++i) a[i] = b[i];
  }
  for (int i = 0; i < kLanes; ++i) store(to + i * out_stride, a[i]);
}

// -- one tile ----------------------------------------------------------------------------------------------------------

// Q queries against the tile's keys -> scores [Q, kTile].
template <int Q>
void score(const Tiles &w, const float *query, float *scores) {
  for (int at = 0; at < kTile; at += 2 * kLanes) {
    Lanes first[Q] = {}, second[Q] = {};
    for (int c = 0; c < w.width; ++c) {
      const Lanes a = load(w.keys + c * kTile + at), b = load(w.keys + c * kTile + at + kLanes);
      for (int q = 0; q < Q; ++q) {
        const Lanes x = splat(query[q * w.width + c]);
        first[q] = fma(x, a, first[q]);
        second[q] = fma(x, b, second[q]);
      }
    }
    for (int q = 0; q < Q; ++q) {
      store(scores + q * kTile + at, first[q]);
      store(scores + q * kTile + at + kLanes, second[q]);
    }
  }
}

// Q queries' scores of positions from .. to - 1 -> their weights e^(score - most), in place; sums and totals scaled anew.
void weigh(float *scores, int from, int to, float &most, float &total, float *sums, int width) {
  for (int i = 0; i < from; ++i) scores[i] = -kInfinity;
  for (int i = to; i < kTile; ++i) scores[i] = -kInfinity;
  Lanes top = splat(most);
  for (int i = 0; i < kTile; i += kLanes) top = larger(load(scores + i), top);
  const float now = largest(top);
  const float scale = exponential(splat(most - now))[0];
  Lanes added{};
  for (int i = 0; i < kTile; i += kLanes) {
    const Lanes seen = load(scores + i);
    const Lanes weight = seen == -kInfinity ? Lanes{} : exponential(seen - now);
    store(scores + i, weight);
    added += weight;
  }
  total = total * scale + sum(added);
  most = now;
  for (int c = 0; c < width; c += kLanes) store(sums + c, load(sums + c) * scale);
}

// sums [Q, width] += weights [Q, from .. to - 1] * values.
template <int Q>
void gather(const Tiles &w, const float *weights, int from, int to, float *sums) {
  for (int c = 0; c < w.width; c += 2 * kLanes) {
    Lanes first[Q], second[Q];
    for (int q = 0; q < Q; ++q) {
      first[q] = load(sums + q * w.width + c);
      second[q] = load(sums + q * w.width + c + kLanes);
    }
    for (int i = from; i < to; ++i) {
      const Lanes a = load(w.rows + i * w.width + c), b = load(w.rows + i * w.width + c + kLanes);
      for (int q = 0; q < Q; ++q) {
        const Lanes weight = splat(weights[q * kTile + i]);
        first[q] = fma(weight, a, first[q]);
        second[q] = fma(weight, b, second[q]);
      }
    }
    for (int q = 0; q < Q; ++q) {
      store(sums + q * w.width + c, first[q]);
      store(sums + q * w.width + c + kLanes, second[q]);
    }
  }
}

// Q heads of one row, from query number `query` on, over positions from .. to - 1 of the tile.
template <int Q>
void attend_heads(const Tiles &w, int query, int from, int to) {
  float *sums = w.sums + static_cast<int64_t>(query) * w.width;
  score<Q>(w, w.query + static_cast<int64_t>(query) * w.width, w.scores);
  for (int q = 0; q < Q; ++q)
    weigh(w.scores + q * kTile, from, to, w.most[query + q], w.total[query + q], sums + q * w.width, w.width);
  gather<Q>(w, w.scores, from, to, sums);
}

// -- all tiles ---------------------------------------------------------------------------------------------------------

void start(const AttentionTask &t, const Tiles &w) {
  const float scale = 1.0f / sqrtf(static_cast<float>(t.head_dim));
  const int queries = (t.end - t.begin) * t.heads;
  for (int q = 0; q < queries; ++q) {
    const float *from = t.queries + (t.begin + q / t.heads) * t.stride + q % t.heads * t.head_dim;
    float *query = w.query + static_cast<int64_t>(q) * w.width, *sums = w.sums + static_cast<int64_t>(q) * w.width;
    for (int c = 0; c < w.width; ++c) query[c] = c < t.head_dim ? from[c] * scale : 0.0f, sums[c] = 0.0f;
    w.most[q] = -kInfinity;
    w.total[q] = 0.0f;
  }
}

void finish(const AttentionTask &t, const Tiles &w) {
  const int queries = (t.end - t.begin) * t.heads;
  for (int q = 0; q < queries; ++q) {
    float *to = t.out + (t.begin + q / t.heads) * t.out_stride + q % t.heads * t.head_dim;
    const float *sums = w.sums + static_cast<int64_t>(q) * w.width, scale = 1.0f / w.total[q];
    for (int c = 0; c < t.head_dim; ++c) to[c] = sums[c] * scale;
  }
}

int64_t first_seen(const AttentionTask &t, int64_t position) {
  return t.window && position >= t.window ? position - t.window + 1 : 0;
}

}  // namespace

int64_t attention_scratch(int heads, int head_dim) {
  const int64_t width = padded(head_dim), queries = static_cast<int64_t>(kAttentionRows) * heads;
  return 2 * kTile * width + static_cast<int64_t>(heads) * kTile + queries * (2 * width + 2);
}

void attend(const AttentionTask &t, float *scratch) {
  const Tiles w(scratch, t.heads, t.head_dim);
  const int64_t first = t.sequence->first + t.begin, last = t.sequence->first + t.end - 1;
  const int64_t oldest = first_seen(t, first);
  start(t, w);
  for (int64_t tile = oldest / kTile * kTile; tile <= last; tile += kTile) {
    const int64_t from = tile > oldest ? tile : oldest, to = tile + kTile <= last ? tile + kTile : last + 1;
    read(t, t.new_keys, 0, tile, from, to, w);
    for (int at = 0; at < kTile; at += kLanes)
      for (int c = 0; c < w.width; c += kLanes) transpose(w.rows + at * w.width + c, w.width, w.keys + c * kTile + at, kTile);
    read(t, t.new_values, t.sequence->value_stride, tile, from, to, w);
    for (int64_t position = first; position <= last; ++position) {
      const int64_t seen = first_seen(t, position);
      const int begin = seen > tile ? static_cast<int>(seen - tile) : 0;
      const int end = position - tile + 1 < kTile ? static_cast<int>(position - tile + 1) : kTile;
      if (begin >= end) continue;
      const int query = static_cast<int>(position - first) * t.heads;
      int h = 0;  // four heads at a time share each load; what one head adds up does not depend on the others
      for (; h + 4 <= t.heads; h += 4) attend_heads<4>(w, query + h, begin, end);
      for (; h + 2 <= t.heads; h += 2) attend_heads<2>(w, query + h, begin, end);
      for (; h < t.heads; ++h) attend_heads<1>(w, query + h, begin, end);
    }
  }
  finish(t, w);
}

}  // namespace MX_ISA
}  // namespace mx
