// Attention of some rows of one sequence over its cache, for one key/value head: softmax(q k^T / sqrt(C)) v, by tiles of
// positions with a running maximum (arXiv 2205.14135). Tiles start at multiples of kTile, so that what a row adds up, and
// in which order, follows from its own position alone: neither from the rows beside it nor from where its blocks lie.
//
// Scores have positions along the lanes (the tile's keys are transposed once for all rows and heads that read them),
// sums of values have channels along the lanes.
#include <math.h>

#include "attention_tiles.h"

namespace mx {
namespace MX_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kTogether = 4;  // queries that share each load; what one of them adds up does not depend on the others

// What attend works on; all in one piece of scratch.
struct Work {
  int width;      // C, padded to whole registers
  float *keys;    // [width, kTile]
  uint8_t *copy;  // [2, kTile, width] keys and values of a tile that cannot be read in place
  float *scores;  // [kTogether, kTile]
  float *query;   // [kAttentionRows * heads, width], divided by sqrt(C)
  float *sums;    // [kAttentionRows * heads, width], of weight * value; channels in the order of `two`
  float *total;   // [kAttentionRows * heads, kLanes], of the weights
  float *most;    // [kAttentionRows * heads], the largest score so far

  Work(float *scratch, int heads, int head_dim) : width(padded(head_dim)) {
    const int64_t queries = static_cast<int64_t>(kAttentionRows) * heads;
    keys = scratch;
    copy = reinterpret_cast<uint8_t *>(keys + kTile * width);
    scores = keys + 3 * kTile * width;
    query = scores + kTogether * kTile;
    sums = query + queries * width;
    total = sums + queries * width;
    most = total + queries * kLanes;
  }
};

// -- one tile ----------------------------------------------------------------------------------------------------------

// Q queries against the tile's keys -> scores [Q, kTile].
template <int Q>
void score(const Work &w, const float *query, float *scores, Ahead &ahead) {
  constexpr int V = 8 / Q * kLanes < kTile ? 8 / Q : kTile / kLanes;  // eight sums at once, as an fma takes four cycles
  for (int at = 0; at < kTile; at += V * kLanes) {
    ahead.fetch();
    Lanes sums[Q][V] = {};
#pragma GCC unroll 4
    for (int c = 0; c < w.width; ++c) {
      Lanes key[V];
      for (int v = 0; v < V; ++v) key[v] = load(w.keys + c * kTile + at + v * kLanes);
      for (int q = 0; q < Q; ++q) {
        const Lanes x = splat(query[q * w.width + c]);
        for (int v = 0; v < V; ++v) sums[q][v] = fma(x, key[v], sums[q][v]);
      }
    }
    for (int q = 0; q < Q; ++q)
      for (int v = 0; v < V; ++v) store(scores + q * kTile + at + v * kLanes, sums[q][v]);
  }
}

// Hides all scores but those of positions from .. to - 1. Where a query then has a new largest one, its sums and its
// total are scaled anew.
void rescale(const Work &w, float *scores, int query, int from, int to) {
  for (int i = 0; i < from; ++i) scores[i] = -kInfinity;
  for (int i = to; i < kTile; ++i) scores[i] = -kInfinity;
  Lanes top = splat(w.most[query]);
  for (int i = 0; i < kTile; i += kLanes) top = larger(load(scores + i), top);
  const float now = largest(top);
  if (now == w.most[query]) return;
  const Lanes scale = exponential(splat(w.most[query] - now));
  float *total = w.total + query * kLanes, *sums = w.sums + static_cast<int64_t>(query) * w.width;
  store(total, load(total) * scale);
  for (int c = 0; c < w.width; c += kLanes) store(sums + c, load(sums + c) * scale);
  w.most[query] = now;
}

// Scores -> weights e^(score - most), in place, and added to the totals.
void weigh(const Work &w, int query, int count, Ahead &ahead) {
  for (int q = 0; q < count; ++q) {
    ahead.fetch();
    const Lanes most = splat(w.most[query + q]);
    float *total = w.total + (query + q) * kLanes;
    Lanes added = load(total);
    for (float *scores = w.scores + q * kTile; scores < w.scores + (q + 1) * kTile; scores += kLanes) {
      const Lanes seen = load(scores);
      const Lanes weight = seen == -kInfinity ? Lanes{} : exponential(seen - most);
      store(scores, weight);
      added += weight;
    }
    store(total, added);
  }
}

// Two registers of a row of values, from channel c on: of bf16 the even ones, then the odd ones. finish undoes it.
template <Dtype dtype>
void two(const uint8_t *row, int c, Lanes &a, Lanes &b) {
  if (dtype == kBfloat16) {
    const Lanes pairs = load(row + 2 * c);
    a = first_of_pair(pairs), b = second_of_pair(pairs);
  } else {
    a = load(row + 4 * c), b = load(row + 4 * (c + kLanes));
  }
}

// sums [Q, width] += weights [Q, from .. to - 1] * values.
template <Dtype dtype, int Q>
void gather(const Tile &tile, const float *weights, int from, int to, float *sums, int width, Ahead &ahead) {
  for (int c = 0; c < width; c += 2 * kLanes) {
    ahead.fetch();
    Lanes first[Q], second[Q];
    for (int q = 0; q < Q; ++q) {
      first[q] = load(sums + q * width + c);
      second[q] = load(sums + q * width + c + kLanes);
    }
#pragma GCC unroll 4
    for (int i = from; i < to; ++i) {
      Lanes a, b;
      two<dtype>(tile.values + i * tile.stride, c, a, b);
      for (int q = 0; q < Q; ++q) {
        const Lanes weight = splat(weights[q * kTile + i]);
        first[q] = fma(weight, a, first[q]);
        second[q] = fma(weight, b, second[q]);
      }
    }
    for (int q = 0; q < Q; ++q) {
      store(sums + q * width + c, first[q]);
      store(sums + q * width + c + kLanes, second[q]);
    }
  }
}

// Q queries, from number `query` on, over positions from .. to - 1 of the tile.
template <Dtype dtype, int Q>
void attend_together(const Work &w, const Tile &tile, int query, int from, int to, Ahead &ahead) {
  const int64_t at = static_cast<int64_t>(query) * w.width;
  score<Q>(w, w.query + at, w.scores, ahead);
  for (int q = 0; q < Q; ++q) rescale(w, w.scores + q * kTile, query + q, from, to);
  weigh(w, query, Q, ahead);
  gather<dtype, Q>(tile, w.scores, from, to, w.sums + at, w.width, ahead);
}

template <Dtype dtype>
void attend_queries(const Work &w, const Tile &tile, int query, int count, int from, int to, Ahead &ahead) {
  const int end = query + count;
  for (; query + kTogether <= end; query += kTogether) attend_together<dtype, kTogether>(w, tile, query, from, to, ahead);
  for (; query + 2 <= end; query += 2) attend_together<dtype, 2>(w, tile, query, from, to, ahead);
  for (; query < end; ++query) attend_together<dtype, 1>(w, tile, query, from, to, ahead);
}

// -- all tiles ---------------------------------------------------------------------------------------------------------

void start(const AttentionTask &t, const Work &w) {
  const float scale = 1.0f / sqrtf(static_cast<float>(t.head_dim));
  const int queries = (t.end - t.begin) * t.heads;
  for (int q = 0; q < queries; ++q) {
    const float *from = t.queries + (t.begin + q / t.heads) * t.stride + q % t.heads * t.head_dim;
    float *query = w.query + static_cast<int64_t>(q) * w.width, *sums = w.sums + static_cast<int64_t>(q) * w.width;
    for (int c = 0; c < t.head_dim; ++c) query[c] = from[c] * scale;
    for (int c = t.head_dim; c < w.width; ++c) query[c] = 0.0f;
    for (int c = 0; c < w.width; ++c) sums[c] = 0.0f;
    w.most[q] = -kInfinity;
    store(w.total + q * kLanes, Lanes{});
  }
}

template <Dtype dtype>
void finish(const AttentionTask &t, const Work &w) {
  const int queries = (t.end - t.begin) * t.heads;
  for (int q = 0; q < queries; ++q) {
    float *to = t.out + (t.begin + q / t.heads) * t.out_stride + q % t.heads * t.head_dim;
    float *sums = w.sums + static_cast<int64_t>(q) * w.width;
    const float scale = 1.0f / sum(load(w.total + q * kLanes));
    for (int c = 0; c < w.width; c += 2 * kLanes) {
      const Lanes a = load(sums + c) * scale, b = load(sums + c + kLanes) * scale;
      store(sums + c, dtype == kBfloat16 ? zip<0>(a, b) : a);
      store(sums + c + kLanes, dtype == kBfloat16 ? zip<kLanes / 2>(a, b) : b);
    }
    std::memcpy(to, sums, sizeof(float) * static_cast<size_t>(t.head_dim));
  }
}

int64_t first_seen(const AttentionTask &t, int64_t position) {
  return t.window && position >= t.window ? position - t.window + 1 : 0;
}

// Rows of the call against one tile, found at position `start`.
template <Dtype dtype>
void attend_rows(const AttentionTask &t, const Work &w, const Tile &tile, int64_t start, Ahead &ahead) {
  const int64_t first = t.sequence->first + t.begin, last = t.sequence->first + t.end - 1;
  if (start >= first_seen(t, last) && start + kTile - 1 <= first) {  // every row sees all of it
    attend_queries<dtype>(w, tile, 0, (t.end - t.begin) * t.heads, 0, kTile, ahead);
    return;
  }
  for (int64_t position = first; position <= last; ++position) {
    const int64_t from = first_seen(t, position) - start, to = position - start + 1;
    const int begin = from > 0 ? static_cast<int>(from) : 0, end = to < kTile ? static_cast<int>(to) : kTile;
    const int query = static_cast<int>(position - first) * t.heads;
    if (begin < end) attend_queries<dtype>(w, tile, query, t.heads, begin, end, ahead);
  }
}

template <Dtype dtype>
void attend_all(const AttentionTask &t, const Work &w) {
  const int64_t first = t.sequence->first + t.begin, last = t.sequence->first + t.end - 1;
  const int64_t oldest = first_seen(t, first);
  start(t, w);
  for (int64_t begin = oldest / kTile * kTile; begin <= last; begin += kTile) {
    const int64_t from = begin > oldest ? begin : oldest, to = begin + kTile <= last ? begin + kTile : last + 1;
    const Tile tile = find(t, begin, from, to, w.width, w.copy);
    Ahead ahead(tile, t.head_dim * bytes_of(dtype));
    turn<dtype>(tile, w.width, w.keys, ahead);
    attend_rows<dtype>(t, w, tile, begin, ahead);
  }
  finish<dtype>(t, w);
}

}  // namespace

int64_t attention_scratch(int heads, int head_dim) {
  const int64_t width = padded(head_dim), queries = static_cast<int64_t>(kAttentionRows) * heads;
  return (3 * width + kTogether) * kTile + queries * (2 * width + kLanes + 1);
}

void attend(const AttentionTask &t, float *scratch) {
  const Work w(scratch, t.heads, t.head_dim);
  t.cache_dtype == kBfloat16 ? attend_all<kBfloat16>(t, w) : attend_all<kFloat32>(t, w);
}

}  // namespace MX_ISA
}  // namespace mx
