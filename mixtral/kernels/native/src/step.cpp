// The decode step: every thread walks through the layers, taking its share of each part of the work and waiting for the
// others where one part needs another's whole result. A sum is never split, so the number of threads changes no bits.
#include "step.h"

#include <cmath>
#include <cstring>
#include <initializer_list>

#include "step_memory.h"

namespace mx {
namespace {

class Thread {
 public:
  Thread(const Plan &plan, const Shared &shared, const Own &own, int thread, int threads)
      : p_(plan), m_(*plan.model), sizes_(plan), shared_(shared), own_(own), thread_(thread), threads_(threads),
        alone_(plan.rows == 1) {}

  void run() {
    if (p_.tokens) embed();
    int sparse = 0;  // sparse layers of this call so far
    for (int number = p_.first_layer; number < p_.last_layer; ++number) {
      const Layer &layer = m_.layers[number];
      const bool given = p_.from_experts && number == p_.first_layer;
      if (!given) attention(number);
      feed_forward(layer, sparse, given, p_.to_router && number == p_.last_layer - 1);
      if (layer.router) ++sparse;
    }
    if (p_.logits) logits();
  }

 private:
  const Plan &p_;
  const Model &m_;
  const Sizes sizes_;
  const Shared &shared_;
  const Own &own_;
  const int thread_, threads_;
  // One row: what it needs before a product (norm, rounding, routing) every thread works out for itself, which takes no
  // longer than one thread doing it and saves the others' waiting.
  const bool alone_;

  // -- rows ------------------------------------------------------------------------------------------------------------

  Share rows_of(int count) const { return share(count, thread_, threads_); }

  // Calls body(row) for every row that this thread has to prepare; the rows are ready for all when it returns.
  template <class Body>
  void prepare(int count, const Body &body) const {
    const Share mine = alone_ ? Share{0, count} : rows_of(count);
    for (int row = mine.first; row < mine.last; ++row) body(row);
    if (!alone_) barrier();
  }

  bool active(int64_t row) const { return !p_.active || p_.active[row]; }

  // The same rows in each kind that some weights read.
  struct Activations {
    Rows kinds[kRowKinds];
    int n = 0;

    void fill(const float *x, int64_t x_stride, int row) const {
      for (int i = 0; i < n; ++i) fill_rows(kinds[i], x, x_stride, row, row + 1);
    }

    const Rows &of(const Matrix &w) const {
      int i = 0;
      while (kinds[i].kind != rows_kind(w.format)) ++i;
      return kinds[i];
    }
  };

  // Room for `count` rows of `d` inputs, of the kinds whose bits are set.
  Activations activations(int kinds, int count, int d) const {
    Activations found;
    uint8_t *memory = alone_ ? own_.activations : shared_.activations;
    for (int kind = 0; kind < kRowKinds; ++kind) {
      if (!(kinds >> kind & 1)) continue;
      found.kinds[found.n] = place_rows(memory + found.n * sizes_.activations, static_cast<RowKind>(kind), count, d);
      ++found.n;
    }
    return found;
  }

  Activations activations(const Matrix &w, int count) const { return activations(1 << rows_kind(w.format), count, w.d); }

  // own_.row = norm(row of x), and that as row number `to` of `rows`.
  void norm(int64_t row, const float *weight, const Activations &rows, int to) const {
    MX_PICK(rms_norm)(p_.x + row * m_.dim, weight, m_.dim, m_.norm_eps, own_.row);
    rows.fill(own_.row, 0, to);
  }

  void embed() const {
    const Share mine = rows_of(p_.rows);
    for (int row = mine.first; row < mine.last; ++row) {
      float *x = p_.x + static_cast<int64_t>(row) * m_.dim;
      const int64_t from = p_.tokens[row] * m_.dim * bytes_of(m_.embedding_dtype);
      if (m_.embedding)
        MX_PICK(widen)(static_cast<const uint8_t *>(m_.embedding) + from, m_.embedding_dtype, m_.dim, x);
      else
        MX_PICK(widen_packed)(m_.packed_embedding, p_.tokens[row], x);
    }
    barrier();
  }

  // -- products --------------------------------------------------------------------------------------------------------

  // This thread's share of w's outputs, some blocks at a time: body(first block, last block).
  template <class Body>
  void chunks(const Matrix &w, const Body &body) const {
    const Share mine = share(w.blocks(), thread_, threads_, kBlocksAtOnce);
    for (int first = mine.first; first < mine.last; first += kChunk)
      body(first, first + kChunk < mine.last ? first + kChunk : mine.last);
  }

  // matmul into the rows of own_.chunk from row `to` on; its first column is then output 16 * first.
  void into_chunk(const Matrix &w, const Rows &rows, const int32_t *index, int count, int first, int last,
                  int64_t to = 0) const {
    float *out = own_.chunk + (to * kChunk - first) * kBlock;
    matmul(w, rows, index, count, first, last, out, kChunk * kBlock);
  }

  // How many of the outputs 16 * first .. 16 * last - 1 a matrix really has.
  static int columns(const Matrix &w, int first, int last) {
    return (last * kBlock < w.n ? last * kBlock : w.n) - first * kBlock;
  }

  // -- attention -------------------------------------------------------------------------------------------------------

  void attention(int number) const {
    const Layer &layer = m_.layers[number];
    const Activations normed = activations(layer.wqkv, p_.rows);
    prepare(p_.rows, [&](int row) { norm(row, layer.attention_norm, normed, row); });
    const Share mine = share(layer.wqkv.blocks(), thread_, threads_, kBlocksAtOnce);
    matmul(layer.wqkv, normed.of(layer.wqkv), nullptr, p_.rows, mine.first, mine.last, shared_.qkv, sizes_.qkv);
    barrier();
    for (int i = 0; i < p_.n_sequences; ++i) rotate(p_.sequences[i], number);
    barrier();
    attend(number);
    barrier();
    const Activations heads = activations(layer.wo, p_.rows);
    prepare(p_.rows, [&](int row) {
      if (!active(row)) std::memset(shared_.heads + row * sizes_.heads, 0, sizeof(float) * static_cast<size_t>(sizes_.heads));
      heads.fill(shared_.heads, sizes_.heads, row);
    });
    chunks(layer.wo, [&](int first, int last) {
      into_chunk(layer.wo, heads.of(layer.wo), nullptr, p_.rows, first, last);
      for (int row = 0; row < p_.rows; ++row)
        MX_PICK(add)(residual(row, first), own_.chunk + row * kChunk * kBlock, 1.0f, columns(layer.wo, first, last));
    });
    barrier();
  }

  float *residual(int64_t row, int block) const { return p_.x + row * m_.dim + block * kBlock; }

  // Rotates the queries and keys of this thread's rows, and puts keys and values, in the cache's dtype, into their slots.
  void rotate(const Sequence &s, int layer) const {
    const int c = m_.head_dim, queries = m_.n_heads / m_.n_kv_heads;
    const Share mine = rows_of(s.n);
    for (int i = mine.first; i < mine.last; ++i) {
      const int64_t row = s.begin + i, position = s.first + i, angles = position * (c / 2);
      uint8_t *slot = p_.pages.at(s, position) + layer * p_.pages.layer_stride;
      for (int g = 0; g < m_.n_kv_heads; ++g) {
        float *head = shared_.qkv + row * sizes_.qkv + static_cast<int64_t>(g) * (queries + 2) * c;
        MX_PICK(rotate)(head, p_.cosines + angles, p_.sines + angles, c, queries + 1);
        MX_PICK(narrow)(head + queries * c, p_.cache_dtype, c, slot + g * p_.pages.head_stride);
        MX_PICK(narrow)(head + (queries + 1) * c, p_.cache_dtype, c, slot + g * p_.pages.head_stride + p_.pages.value_stride);
      }
    }
  }

  // Pieces of rows and key/value heads, dealt out in turn: later rows have more to read, so runs would be uneven. Where
  // threads would be left over, the queries of a key/value head are parted too.
  void attend(int layer) const {
    int64_t pieces = 0, piece = 0;
    for (int i = 0; i < p_.n_sequences; ++i)
      pieces += static_cast<int64_t>(m_.n_kv_heads) * ((p_.sequences[i].n + kAttentionRows - 1) / kAttentionRows);
    const int queries = m_.n_heads / m_.n_kv_heads, shares = static_cast<int>(pieces ? threads_ / pieces : 0);
    const int parts = shares < 1 ? 1 : shares < queries ? shares : queries;
    for (int i = 0; i < p_.n_sequences; ++i) {
      const Sequence &s = p_.sequences[i];
      for (int begin = 0; begin < s.n; begin += kAttentionRows)
        for (int g = 0; g < m_.n_kv_heads; ++g)
          for (int part = 0; part < parts; ++part)
            if (piece++ % threads_ == thread_) attend(s, layer, begin, g, share(queries, part, parts));
    }
  }

  void attend(const Sequence &s, int layer, int begin, int g, Share mine) const {
    const int queries = m_.n_heads / m_.n_kv_heads;
    const int64_t first = s.begin;
    AttentionTask task{};
    task.sequence = &s;
    task.pages = &p_.pages;
    task.begin = begin;
    task.end = begin + kAttentionRows < s.n ? begin + kAttentionRows : s.n;
    task.heads = mine.last - mine.first;
    task.head = g;
    task.head_dim = m_.head_dim;
    task.window = m_.window;
    task.cache_dtype = p_.cache_dtype;
    task.layer_offset = layer * p_.pages.layer_stride;
    task.queries = shared_.qkv + first * sizes_.qkv + static_cast<int64_t>(g * (queries + 2) + mine.first) * m_.head_dim;
    task.stride = sizes_.qkv;
    task.out = shared_.heads + first * sizes_.heads + static_cast<int64_t>(g * queries + mine.first) * m_.head_dim;
    task.out_stride = sizes_.heads;
    MX_PICK(attend)(task, own_.attention);
  }

  // -- feed-forward ----------------------------------------------------------------------------------------------------

  // `sparse`: the layer's number among the sparse ones of this call. `given`: its rows' experts and weights are the plan's.
  void feed_forward(const Layer &layer, int sparse, bool given, bool router_alone) const {
    const Activations normed = activations(layer.in_kinds, p_.rows, m_.dim);
    prepare(p_.rows, [&](int row) {
      norm(row, layer.ffn_norm, normed, row);
      if (layer.router && !given) route(layer, sparse, row);
    });
    if (router_alone) return;
    group(layer, sparse, given);
    for (int e = 0; e < layer.n_experts; ++e) hidden(layer.experts[e], normed, e);
    barrier();
    const int assignments = own_.groups.begin[layer.n_experts];
    const Activations rows = activations(layer.out_kinds, assignments, layer.ffn_dim);
    prepare(assignments, [&](int row) { rows.fill(shared_.hidden, sizes_.hidden, row); });
    const Share mine = share((m_.dim + kBlock - 1) / kBlock, thread_, threads_, kBlocksAtOnce);
    for (int first = mine.first; first < mine.last; first += kChunk) {
      const int last = first + kChunk < mine.last ? first + kChunk : mine.last;
      for (int e = 0; e < layer.n_experts; ++e) outputs(layer.experts[e].down, rows, e, first, last);
      combine(layer, sparse, given, first, (last * kBlock < m_.dim ? last * kBlock : m_.dim) - first * kBlock);
    }
    barrier();
  }

  // Where a row's routing lies. The plan's arrays have one writer each.
  struct Choice {
    float *logits;
    int64_t *experts;
    float *weights;
  };

  Choice choice(int sparse, bool given, int64_t row) const {
    if (alone_ && thread_ && !given) return {own_.router_logits, own_.experts, own_.weights};
    const int64_t at = static_cast<int64_t>(sparse) * p_.rows + row;
    return {p_.router_logits + at * m_.n_experts, p_.experts + at * p_.k, p_.weights + at * p_.k};
  }

  // The highest logits of own_.row, as many as the row takes experts, ties to the lower index, and the softmax over them.
  // With a share: the fewest whose probabilities among all experts sum to it.
  void route(const Layer &layer, int sparse, int row) const {
    const Choice c = choice(sparse, false, row);
    MX_PICK(score_experts)(own_.row, layer.router, m_.dim, layer.n_experts, c.logits);
    int k = !active(row) ? 0 : p_.row_k ? p_.row_k[row] : p_.k;
    const double share = p_.row_share ? p_.row_share[row] : 0.0;
    double enough = -1.0, sum = 0.0;
    float total = 0.0f;
    for (int j = 0; j < k; ++j) {
      c.experts[j] = highest(c.logits, layer.n_experts, c.experts, j);
      c.weights[j] = std::exp(c.logits[c.experts[j]] - c.logits[c.experts[0]]);
      total += c.weights[j];
      if (share <= 0.0) continue;
      if (j == 0) enough = share * all(c.logits, layer.n_experts, c.logits[c.experts[0]]);
      sum += c.weights[j];
      if (sum >= enough) k = j + 1;
    }
    for (int j = 0; j < k; ++j) c.weights[j] /= total;
    for (int j = k; j < p_.k; ++j) c.experts[j] = -1, c.weights[j] = 0.0f;
  }

  // The sum of e^(logit - most) over all experts.
  static double all(const float *logits, int n_experts, float most) {
    double sum = 0.0;
    for (int e = 0; e < n_experts; ++e) sum += std::exp(logits[e] - most);
    return sum;
  }

  static int64_t highest(const float *logits, int n_experts, const int64_t *taken, int n_taken) {
    int64_t best = -1;
    for (int64_t e = 0; e < n_experts; ++e) {
      bool free = true;
      for (int j = 0; j < n_taken; ++j) free = free && taken[j] != e;
      if (free && (best < 0 || logits[e] > logits[best])) best = e;
    }
    return best;
  }

  // How many slots for experts a row has in this layer: one when it is dense.
  int slots_of(const Layer &layer) const { return layer.router ? p_.k : 1; }

  // Every thread groups all rows for itself: the lists are short, and nobody waits.
  void group(const Layer &layer, int sparse, bool given) const {
    const Groups &g = own_.groups;
    const int k = slots_of(layer), assignments = p_.rows * k;
    const int64_t *experts = layer.router ? choice(sparse, given, 0).experts : nullptr;
    for (int i = 0; i < assignments; ++i) g.place[i] = -1;
    int place = 0;
    for (int e = 0; e < layer.n_experts; ++e) {
      g.begin[e] = place;
      for (int i = 0; i < assignments; ++i) {
        if (experts ? experts[i] != e : !active(i)) continue;
        g.row[place] = i / k;
        g.place[i] = place;
        g.count[place] = place;
        ++place;
      }
    }
    g.begin[layer.n_experts] = place;
  }

  // silu(gate x) * (up x) for the rows of expert e, this thread's columns.
  void hidden(const Expert &expert, const Activations &normed, int e) const {
    const int begin = own_.groups.begin[e], count = own_.groups.begin[e + 1] - begin;
    if (count == 0 || !expert.gate.data) return;
    float *out = shared_.hidden + begin * sizes_.hidden;
    chunks(expert.gate, [&](int first, int last) {
      matmul(expert.gate, normed.of(expert.gate), own_.groups.row + begin, count, first, last, out, sizes_.hidden);
      into_chunk(expert.up, normed.of(expert.up), own_.groups.row + begin, count, first, last);
      for (int64_t row = 0; row < count; ++row)
        MX_PICK(swiglu)(out + row * sizes_.hidden + first * kBlock, own_.chunk + row * kChunk * kBlock,
                        (last - first) * kBlock);
    });
  }

  // The outputs of expert e for its rows, in their places of own_.chunk.
  void outputs(const Matrix &down, const Activations &rows, int e, int first, int last) const {
    const int begin = own_.groups.begin[e], count = own_.groups.begin[e + 1] - begin;
    if (count == 0) return;
    float *to = own_.chunk + static_cast<int64_t>(begin) * kChunk * kBlock;
    if (down.data)
      into_chunk(down, rows.of(down), own_.groups.count + begin, count, first, last, begin);
    else
      std::memset(to, 0, sizeof(float) * static_cast<size_t>(count) * kChunk * kBlock);
  }

  // x += the sum over a row's choices, in their order, of weight * output: columns 16 * first on, from own_.chunk.
  void combine(const Layer &layer, int sparse, bool given, int first, int n) const {
    const int k = slots_of(layer);
    for (int row = 0; row < p_.rows; ++row) {
      const float *weights = layer.router ? choice(sparse, given, row).weights : nullptr;
      float sum[kChunk * kBlock] = {};
      for (int j = 0; j < k; ++j) {
        const int64_t place = own_.groups.place[row * k + j];
        if (place < 0) continue;
        MX_PICK(add)(sum, own_.chunk + place * kChunk * kBlock, weights ? weights[j] : 1.0f, n);
      }
      MX_PICK(add)(residual(row, first), sum, 1.0f, n);
    }
  }

  // -- output ----------------------------------------------------------------------------------------------------------

  void logits() const {
    const Activations normed = activations(m_.output, p_.n_wanted);
    prepare(p_.n_wanted, [&](int i) { norm(p_.wanted[i], m_.norm, normed, i); });
    chunks(m_.output, [&](int first, int last) {
      into_chunk(m_.output, normed.of(m_.output), nullptr, p_.n_wanted, first, last);
      const size_t bytes = sizeof(float) * static_cast<size_t>(columns(m_.output, first, last));
      for (int64_t i = 0; i < p_.n_wanted; ++i)
        std::memcpy(p_.logits + i * m_.output.n + first * kBlock, own_.chunk + i * kChunk * kBlock, bytes);
    });
  }
};

}  // namespace

// out[r] = log of the sum of e^x[r, i], rows `stride` floats apart.
void log_sum_exp_rows(const float *x, int rows, int n, int64_t stride, float *out) {
  const auto some = [&](Share mine) {
    for (int row = mine.first; row < mine.last; ++row) out[row] = MX_PICK(log_sum_exp)(x + row * stride, n);
  };
  if (rows == 1) return some({0, 1});  // over before other threads are awake
  parallel([&](int thread, int threads) { some(share(rows, thread, threads)); });
}

}  // namespace mx

extern "C" int64_t mx_step_scratch(const mx::Plan *plan) {
  const mx::Sizes sizes(*plan);
  mx::Arena arena{nullptr};
  mx::Shared shared(arena, *plan, sizes);
  const int64_t common = arena.used;
  mx::Own own(arena, *plan, sizes);
  return common + (arena.used - common) * mx::threads();
}

extern "C" int32_t mx_step(const mx::Plan *plan, int64_t scratch_bytes) {
  int32_t failed = 0;
  mx::parallel([&](int thread, int threads) {
    const mx::Sizes sizes(*plan);
    mx::Arena arena{plan->scratch};
    const mx::Shared shared(arena, *plan, sizes);
    mx::Arena counted{nullptr};
    mx::Own(counted, *plan, sizes);
    if (arena.used + counted.used * threads > scratch_bytes) {
      if (thread == 0) failed = 1;
      return;
    }
    arena.used += counted.used * thread;
    const mx::Own own(arena, *plan, sizes);
    mx::Thread(*plan, shared, own, thread, threads).run();
  });
  return failed;
}

extern "C" void mx_log_sum_exp(const float *x, int32_t rows, int32_t n, int64_t stride, float *out) {
  mx::log_sum_exp_rows(x, rows, n, stride, out);
}

extern "C" void mx_step_sizes(int64_t *sizes) {
  const size_t bytes[] = {sizeof(mx::Matrix), sizeof(mx::Expert),   sizeof(mx::Layer),
                          sizeof(mx::Model),  sizeof(mx::Sequence), sizeof(mx::Plan)};
  for (size_t i = 0; i < 6; ++i) sizes[i] = static_cast<int64_t>(bytes[i]);
}
