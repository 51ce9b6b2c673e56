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
    for (int layer = p_.first_layer; layer < p_.last_layer; ++layer) {
      attention(layer);
      feed_forward(layer);
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

  Rows activations(const Matrix &w, int count) const {
    return place_rows(alone_ ? own_.activations : shared_.activations, rows_kind(w.format), count, w.d);
  }

  // own_.row = norm(row of x), and that rounded as row number `to` of `rows`.
  void norm(int64_t row, const float *weight, const Rows &rows, int to) const {
    MX_PICK(rms_norm)(p_.x + row * m_.dim, weight, m_.dim, m_.norm_eps, own_.row);
    fill_rows(rows, own_.row, 0, to, to + 1);
  }

  void embed() const {
    const Share mine = rows_of(p_.rows);
    for (int row = mine.first; row < mine.last; ++row) {
      float *x = p_.x + static_cast<int64_t>(row) * m_.dim;
      const int64_t from = p_.tokens[row] * m_.dim;
      const uint8_t *embedding = static_cast<const uint8_t *>(m_.embedding);
      MX_PICK(widen)(embedding + from * bytes_of(m_.embedding_dtype), m_.embedding_dtype, m_.dim, x);
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
    const Rows normed = activations(layer.wqkv, p_.rows);
    prepare(p_.rows, [&](int row) { norm(row, layer.attention_norm, normed, row); });
    const Share mine = share(layer.wqkv.blocks(), thread_, threads_, kBlocksAtOnce);
    matmul(layer.wqkv, normed, nullptr, p_.rows, mine.first, mine.last, shared_.qkv, sizes_.qkv);
    barrier();
    for (int i = 0; i < p_.n_sequences; ++i) rotate(p_.sequences[i]);
    barrier();
    attend(number);
    barrier();
    for (int i = 0; i < p_.n_sequences; ++i) remember(p_.sequences[i], number);
    const Rows heads = activations(layer.wo, p_.rows);
    prepare(p_.rows, [&](int row) { fill_rows(heads, shared_.heads, sizes_.heads, row, row + 1); });
    chunks(layer.wo, [&](int first, int last) {
      into_chunk(layer.wo, heads, nullptr, p_.rows, first, last);
      for (int row = 0; row < p_.rows; ++row)
        MX_PICK(add)(residual(row, first), own_.chunk + row * kChunk * kBlock, 1.0f, columns(layer.wo, first, last));
    });
    barrier();
  }

  float *residual(int64_t row, int block) const { return p_.x + row * m_.dim + block * kBlock; }

  // Rotates the queries and keys of this thread's rows, and rounds keys and values to the cache's dtype.
  void rotate(const Sequence &s) const {
    const int c = m_.head_dim, queries = m_.n_heads / m_.n_kv_heads;
    const int64_t head_bytes = sizes_.kv_bytes / m_.n_kv_heads;
    const Share mine = rows_of(s.n);
    for (int i = mine.first; i < mine.last; ++i) {
      const int64_t row = s.begin + i, angles = (s.first + i) * (c / 2);
      for (int g = 0; g < m_.n_kv_heads; ++g) {
        float *head = shared_.qkv + row * sizes_.qkv + static_cast<int64_t>(g) * (queries + 2) * c;
        MX_PICK(rotate)(head, p_.cosines + angles, p_.sines + angles, c, queries + 1);
        const int64_t to = row * sizes_.kv_bytes + g * head_bytes;
        MX_PICK(narrow)(head + queries * c, p_.cache_dtype, c, shared_.keys + to);
        MX_PICK(narrow)(head + (queries + 1) * c, p_.cache_dtype, c, shared_.values + to);
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
    task.begin = begin;
    task.end = begin + kAttentionRows < s.n ? begin + kAttentionRows : s.n;
    task.heads = mine.last - mine.first;
    task.head = g;
    task.n_heads = m_.n_kv_heads;
    task.head_dim = m_.head_dim;
    task.window = m_.window;
    task.cache_dtype = p_.cache_dtype;
    task.layer_offset = layer * s.layer_stride;
    task.queries = shared_.qkv + first * sizes_.qkv + static_cast<int64_t>(g * (queries + 2) + mine.first) * m_.head_dim;
    task.stride = sizes_.qkv;
    task.new_keys = shared_.keys + first * sizes_.kv_bytes;
    task.new_values = shared_.values + first * sizes_.kv_bytes;
    task.out = shared_.heads + first * sizes_.heads + static_cast<int64_t>(g * queries + mine.first) * m_.head_dim;
    task.out_stride = sizes_.heads;
    MX_PICK(attend)(task, own_.attention);
  }

  // Writes the rows' keys and values into their slots, only now that no row reads what they replace. Of rows that fall
  // into the same slot the last one stays.
  void remember(const Sequence &s, int layer) const {
    const int64_t slots = static_cast<int64_t>(s.n_blocks) * s.block_size, head_bytes = sizes_.kv_bytes / m_.n_kv_heads;
    const Share mine = rows_of(s.n);
    for (int i = mine.first; i < mine.last; ++i) {
      if (i + slots < s.n) continue;
      const int64_t slot = (s.first + i) % slots;
      uint8_t *block = s.blocks[slot / s.block_size] + layer * s.layer_stride + slot % s.block_size * s.slot_stride;
      for (int g = 0; g < m_.n_kv_heads; ++g) {
        const int64_t from = (s.begin + i) * sizes_.kv_bytes + g * head_bytes;
        std::memcpy(block + g * s.head_stride, shared_.keys + from, static_cast<size_t>(head_bytes));
        std::memcpy(block + g * s.head_stride + s.value_stride, shared_.values + from, static_cast<size_t>(head_bytes));
      }
    }
  }

  // -- feed-forward ----------------------------------------------------------------------------------------------------

  void feed_forward(int number) const {
    const Layer &layer = m_.layers[number];
    const Rows normed = activations(layer.experts[0].gate, p_.rows);
    prepare(p_.rows, [&](int row) {
      norm(row, layer.ffn_norm, normed, row);
      if (layer.gate) route(layer, number - p_.first_layer, row);
    });
    group(layer, number - p_.first_layer);
    for (int e = 0; e < m_.n_experts; ++e) hidden(layer.experts[e], normed, e);
    barrier();
    const int assignments = static_cast<int>(sizes_.assignments);
    const Rows rows = activations(layer.experts[0].down, assignments);
    prepare(assignments, [&](int row) { fill_rows(rows, shared_.hidden, sizes_.hidden, row, row + 1); });
    chunks(layer.experts[0].down, [&](int first, int last) {
      for (int e = 0; e < m_.n_experts; ++e) {
        const int begin = own_.groups.begin[e], count = own_.groups.begin[e + 1] - begin;
        if (count) into_chunk(layer.experts[e].down, rows, own_.groups.count + begin, count, first, last, begin);
      }
      combine(number - p_.first_layer, first, columns(layer.experts[0].down, first, last));
    });
    barrier();
  }

  // Where a row's routing lies. The plan's arrays have one writer each.
  struct Choice {
    float *logits;
    int64_t *experts;
    float *weights;
  };

  Choice choice(int layer, int64_t row) const {
    if (alone_ && thread_) return {own_.router_logits, own_.experts, own_.weights};
    const int64_t at = static_cast<int64_t>(layer) * p_.rows + row;
    return {p_.router_logits + at * m_.n_experts, p_.experts + at * p_.k, p_.weights + at * p_.k};
  }

  // The k highest logits of own_.row, ties to the lower index, and the softmax over them.
  void route(const Layer &layer, int number, int row) const {
    const Choice c = choice(number, row);
    MX_PICK(gate)(own_.row, layer.gate, m_.dim, m_.n_experts, c.logits);
    float total = 0.0f;
    for (int j = 0; j < p_.k; ++j) {
      c.experts[j] = highest(c.logits, c.experts, j);
      c.weights[j] = std::exp(c.logits[c.experts[j]] - c.logits[c.experts[0]]);
      total += c.weights[j];
    }
    for (int j = 0; j < p_.k; ++j) c.weights[j] /= total;
  }

  int64_t highest(const float *logits, const int64_t *taken, int n_taken) const {
    int64_t best = -1;
    for (int64_t e = 0; e < m_.n_experts; ++e) {
      bool free = true;
      for (int j = 0; j < n_taken; ++j) free = free && taken[j] != e;
      if (free && (best < 0 || logits[e] > logits[best])) best = e;
    }
    return best;
  }

  // Every thread groups all rows for itself: the lists are short, and nobody waits.
  void group(const Layer &layer, int number) const {
    const Groups &g = own_.groups;
    const int assignments = static_cast<int>(sizes_.assignments);
    const int64_t *experts = layer.gate ? choice(number, 0).experts : nullptr;
    int place = 0;
    for (int e = 0; e < m_.n_experts; ++e) {
      g.begin[e] = place;
      for (int i = 0; i < assignments; ++i) {
        if (experts && experts[i] != e) continue;
        g.row[place] = i / p_.k;
        g.place[i] = place;
        g.count[place] = place;
        ++place;
      }
    }
    g.begin[m_.n_experts] = place;
  }

  // silu(gate x) * (up x) for the rows of expert e, this thread's columns.
  void hidden(const Expert &expert, const Rows &normed, int e) const {
    const int begin = own_.groups.begin[e], count = own_.groups.begin[e + 1] - begin;
    if (count == 0) return;
    float *out = shared_.hidden + begin * sizes_.hidden;
    chunks(expert.gate, [&](int first, int last) {
      matmul(expert.gate, normed, own_.groups.row + begin, count, first, last, out, sizes_.hidden);
      into_chunk(expert.up, normed, own_.groups.row + begin, count, first, last);
      for (int64_t row = 0; row < count; ++row)
        MX_PICK(swiglu)(out + row * sizes_.hidden + first * kBlock, own_.chunk + row * kChunk * kBlock,
                        (last - first) * kBlock);
    });
  }

  // x += the sum over a row's choices, in their order, of weight * output: columns 16 * first on, from own_.chunk.
  void combine(int number, int first, int n) const {
    for (int row = 0; row < p_.rows; ++row) {
      const float *weights = m_.layers[number + p_.first_layer].gate ? choice(number, row).weights : nullptr;
      float sum[kChunk * kBlock] = {};
      for (int j = 0; j < p_.k; ++j) {
        const int64_t place = own_.groups.place[row * p_.k + j];
        MX_PICK(add)(sum, own_.chunk + place * kChunk * kBlock, weights ? weights[j] : 1.0f, n);
      }
      MX_PICK(add)(residual(row, first), sum, 1.0f, n);
    }
  }

  // -- output ----------------------------------------------------------------------------------------------------------

  void logits() const {
    const Rows normed = activations(m_.output, p_.n_wanted);
    prepare(p_.n_wanted, [&](int i) { norm(p_.wanted[i], m_.norm, normed, i); });
    chunks(m_.output, [&](int first, int last) {
      into_chunk(m_.output, normed, nullptr, p_.n_wanted, first, last);
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
  mx::Shared shared(arena, sizes);
  const int64_t common = arena.used;
  mx::Own own(arena, *plan, sizes);
  return common + (arena.used - common) * mx::threads();
}

extern "C" int32_t mx_step(const mx::Plan *plan, int64_t scratch_bytes) {
  int32_t failed = 0;
  mx::parallel([&](int thread, int threads) {
    const mx::Sizes sizes(*plan);
    mx::Arena arena{plan->scratch};
    const mx::Shared shared(arena, sizes);
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
