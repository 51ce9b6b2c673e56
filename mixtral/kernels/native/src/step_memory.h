// The step's scratch: what all threads share, and what each has for itself.
#pragma once

#include "pool.h"
#include "step_kernels.h"

namespace mx {

constexpr int kChunk = 16;  // blocks of outputs that one thread finishes before it begins others, while they are near

// Hands out one piece of memory after the other, each aligned to a cache line; with no memory it only counts.
struct Arena {
  uint8_t *memory;
  int64_t used = 0;

  template <class T>
  T *take(int64_t count) {
    T *piece = memory ? reinterpret_cast<T *>(memory + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

inline int64_t to_blocks(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// The sizes that a plan leads to.
struct Sizes {
  int64_t rows, assignments, most;  // T; T K; the most rows that one product has
  int64_t qkv, heads, hidden;       // floats of one row
  int64_t activations;              // bytes of the rows of one kind that a product reads

  explicit Sizes(const Plan &p) {
    const Model &m = *p.model;
    rows = p.rows;
    assignments = rows * p.k;
    most = assignments > p.n_wanted ? assignments : p.n_wanted;
    qkv = to_blocks(static_cast<int64_t>(m.n_heads + 2 * m.n_kv_heads) * m.head_dim);
    heads = static_cast<int64_t>(m.n_heads) * m.head_dim;
    hidden = to_blocks(m.ffn_dim);
    activations = 0;
    for (const int64_t d : {static_cast<int64_t>(m.dim), heads, static_cast<int64_t>(m.ffn_dim)})
      for (int kind = 0; kind < kRowKinds; ++kind) {
        const int64_t bytes = static_cast<int64_t>(rows_bytes(static_cast<RowKind>(kind), static_cast<int>(most), static_cast<int>(d)));
        activations = bytes > activations ? bytes : activations;
      }
  }
};

struct Shared {
  float *qkv;           // [T, qkv]
  float *heads;         // [T, H C] what attention brings
  float *hidden;        // [T K, hidden], rows grouped by expert
  uint8_t *activations;  // [most_kinds, activations]

  Shared(Arena &arena, const Plan &p, const Sizes &s)
      : qkv(arena.take<float>(s.rows * s.qkv)),
        heads(arena.take<float>(s.rows * s.heads)),
        hidden(arena.take<float>(s.assignments * s.hidden)),
        activations(arena.take<uint8_t>(s.activations * p.model->most_kinds)) {}
};

// The rows of each expert: its assignments (row * K + choice) in the rows' order, one expert after the other.
struct Groups {
  int32_t *begin;  // [E + 1]
  int32_t *row;    // [T K]
  int32_t *place;  // [T K] where assignment t K + j has come to lie; -1: unused
  int32_t *count;  // [T K] 0, 1, 2, ...: the places themselves

  Groups(Arena &arena, const Plan &p)
      : begin(arena.take<int32_t>(p.model->n_experts + 1)),
        row(arena.take<int32_t>(static_cast<int64_t>(p.rows) * p.k)),
        place(arena.take<int32_t>(static_cast<int64_t>(p.rows) * p.k)),
        count(arena.take<int32_t>(static_cast<int64_t>(p.rows) * p.k)) {}
};

struct Own {
  float *row;        // [D] one row, normed
  float *chunk;      // [most, kChunk * 16] outputs of a product
  float *attention;  // attend's
  float *router_logits;  // [E], [K], [K]: one row's routing, when every thread works it out for itself
  int64_t *experts;
  float *weights;
  uint8_t *activations;  // one product's rows, when every thread makes them for itself
  Groups groups;

  Own(Arena &arena, const Plan &p, const Sizes &s)
      : row(arena.take<float>(p.model->dim)),
        chunk(arena.take<float>(s.most * kChunk * kBlock)),
        attention(arena.take<float>(MX_PICK(attention_scratch)(p.model->n_heads / p.model->n_kv_heads, p.model->head_dim))),
        router_logits(arena.take<float>(p.model->n_experts)),
        experts(arena.take<int64_t>(p.k)),
        weights(arena.take<float>(p.k)),
        activations(arena.take<uint8_t>(s.rows == 1 ? s.activations * p.model->most_kinds : 0)),
        groups(arena, p) {}
};

}  // namespace mx
