// The decode step's plan: which weights, which rows, where each row's keys and values lie, where the results go.
// Made outside (mixtral/kernels/native/step.py mirrors these structures for ctypes, field by field) and only read here.
//
// T rows, D model width, F a layer's expert hidden width, E its experts, K the most experts a row takes, H query heads, G
// key/value heads, C head width, V vocabulary, M sparse layers of this call, R rows whose logits are wanted, S sequences.
#pragma once

#include <cstdint>

#include "packed.h"

namespace mx {

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };  // the last of an embedding alone

inline int64_t bytes_of(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// Each matrix has a format of its own; one without data belongs to somebody else (another rank) and adds nothing here.
struct Expert {
  Matrix gate, up;  // [F, D]
  Matrix down;      // [D, F]
};

struct Layer {
  const float *attention_norm;  // [D]
  const float *ffn_norm;        // [D]
  Matrix wqkv;                  // [(H + 2 G) C, D]: for each key/value head its H / G queries, its key, its value
  Matrix wo;                    // [D, H C]
  const float *router;          // [E, D]; null: dense, one expert that every row takes
  const Expert *experts;
  int32_t n_experts, ffn_dim;   // 1 expert when dense
  int32_t in_kinds, out_kinds;  // bit 1 << RowKind for each kind of rows that gate and up read, and down
};

struct Model {
  int32_t dim, n_heads, n_kv_heads, head_dim;
  int32_t ffn_dim, n_experts;  // the most of any layer
  int32_t most_kinds;          // the most kinds of rows that the experts of one layer read
  int32_t window;              // positions that a row sees, itself included; 0: all
  int32_t embedding_dtype;
  float norm_eps;
  const Layer *layers;
  const void *embedding;    // [V, D]; null: packed_embedding
  Matrix packed_embedding;  // [V, D] in a format without scales
  const float *norm;        // [D]
  Matrix output;            // [V, D]
};

// The rows begin .. begin + n - 1, in ascending positions. Position p lies in slot p % block_size of the block number
// blocks[p / block_size]; the number of a block that no row sees any more is not read.
struct Sequence {
  int32_t begin, n;
  int64_t first;  // position of row `begin`
  const int64_t *blocks;
};

// The pool of keys and values. The C numbers of one slot and head lie in one piece.
struct Pages {
  uint8_t *pool;
  int64_t block_size;    // slots
  int64_t layer_stride;  // bytes from one layer's keys to the next one's
  int64_t value_stride;  // bytes from a layer's keys to its values
  int64_t slot_stride;   // bytes from one slot's keys to the next one's
  int64_t head_stride;   // bytes from one key/value head's keys to the next one's

  // The first key/value head's key of a sequence's position, in layer 0.
  uint8_t *at(const Sequence &s, int64_t position) const {
    return pool + (s.blocks[position / block_size] * block_size + position % block_size) * slot_stride;
  }
};

struct Plan {
  const Model *model;
  int32_t rows, n_sequences, n_wanted, k;
  int32_t first_layer, last_layer;  // layers first .. last - 1
  int32_t from_experts;             // begin behind the first layer's router, with the experts and weights given here
  int32_t to_router;                // end behind the last layer's router
  int32_t cache_dtype;
  Pages pages;
  const Sequence *sequences;  // of disjoint rows; a row of none is inactive: it has no keys and takes no experts
  const int32_t *row_k;       // [T] how many experts each row takes, at most k; null: k
  const float *row_share;     // [T] where above 0, only the fewest of them whose softmax over all experts reaches it; or null
  const uint8_t *active;      // [T] whether it is a sequence's; null: all
  const int64_t *tokens;      // [T]; null: x holds the rows as the layer before left them
  const float *cosines;       // [positions, C / 2], of every position up to the last
  const float *sines;
  const int64_t *wanted;  // [R] rows
  float *x;               // [T, D] the residual stream, left as the last layer made it
  float *logits;          // [R, V]; null: no output product
  float *router_logits;   // [M, T, most E], null when dense, like the next two
  int64_t *experts;       // [M, T, K], sorted by logit, ties to the lower index; -1: unused
  float *weights;         // [M, T, K], the softmax over the chosen logits; 0: unused
  uint8_t *scratch;       // mx_step_scratch(plan) bytes, aligned to 64
};

}  // namespace mx

extern "C" {
// How much scratch a plan needs with the present number of threads.
int64_t mx_step_scratch(const mx::Plan *plan);
// -> 0, or 1 when nothing was done because there are more threads now than the scratch was made for.
int32_t mx_step(const mx::Plan *plan, int64_t scratch_bytes);
// Bytes of Matrix, Expert, Layer, Model, Sequence and Plan, for those who mirror them.
void mx_step_sizes(int64_t *sizes);
}
