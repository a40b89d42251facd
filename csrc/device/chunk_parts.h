// SPDX-License-Identifier: Apache-2.0
// How the work of an exchange is cut into what is signaled at once: the tokens into chunks, and the
// rows of a chunk into parts. Senders and receivers must agree on it; core/work_partition.h has the
// sizes.
#ifndef JAX_EP_CSRC_DEVICE_CHUNK_PARTS_H_
#define JAX_EP_CSRC_DEVICE_CHUNK_PARTS_H_

#include "csrc/core/work_partition.h"
#include "csrc/device/heap.h"

namespace jax_ep::dev {

// The chunks of a rank's tokens.
struct Chunks {
  i64 num_tokens;
  i32 tokens_per_chunk;
  i32 count;

  JAX_EP_DEVICE Chunks(OpKind op, i64 num_tokens, i32 chunk_target)
      : num_tokens(num_tokens),
        tokens_per_chunk(chunk_tokens(op, num_tokens, chunk_target)),
        count(num_chunks(op, num_tokens, chunk_target)) {}

  JAX_EP_DEVICE i64 first_token(i32 chunk) const { return i64{chunk} * tokens_per_chunk; }
  JAX_EP_DEVICE i64 last_token(i32 chunk) const {
    const i64 last = first_token(chunk) + tokens_per_chunk;
    return last < num_tokens ? last : num_tokens;
  }
  JAX_EP_DEVICE i32 chunk_of(i32 token) const { return token / tokens_per_chunk; }
};

// What one flag stands for: segments [first_segment, last_segment) of the rows of tokens
// [first_token, last_token).
struct ChunkPart {
  i64 first_token;
  i64 last_token;
  i32 first_segment;
  i32 last_segment;
  bool has_scalars;  // the first part of a chunk: what is not of rows goes with it
};

// The parts of all chunks, each with a flag: those of a chunk one after another.
struct ChunkParts {
  Chunks chunks;
  i32 num_segments;  // of a row
  i32 per_chunk;

  // Rows of which no piece can be taken have one part.
  JAX_EP_DEVICE ChunkParts(const Chunks& chunks, i32 num_segments, bool divisible, i32 chunk_target)
      : chunks(chunks),
        num_segments(num_segments),
        per_chunk(divisible ? num_parts(chunks.count, num_segments, chunk_target) : 1) {}

  JAX_EP_DEVICE i32 count() const { return chunks.count * per_chunk; }

  JAX_EP_DEVICE ChunkPart at(i32 flag_idx) const {
    const i32 chunk = flag_idx / per_chunk;
    const i32 part = flag_idx % per_chunk;
    return {.first_token = chunks.first_token(chunk),
            .last_token = chunks.last_token(chunk),
            .first_segment = first_segment(part),
            .last_segment = first_segment(part + 1),
            .has_scalars = part == 0};
  }

 private:
  JAX_EP_DEVICE i32 first_segment(i32 part) const { return part * num_segments / per_chunk; }
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_CHUNK_PARTS_H_
