// SPDX-License-Identifier: Apache-2.0
// The kernels on the simulator with a C interface: plain arrays of all ranks in and out, so that
// Python can compare them with the oracle.
#ifndef JAX_EP_CSRC_TESTING_SIMULATED_EXCHANGE_H_
#define JAX_EP_CSRC_TESTING_SIMULATED_EXCHANGE_H_

#include <stdint.h>

// One problem. Arrays are dense, with all ranks' parts one after the other; those of results also
// have a leading axis of `calls`. tests/sim has the same in Python.
struct SimulatedExchange {
  int32_t num_ranks;         // R
  int32_t num_experts;       // E
  int32_t num_topk;          // K
  int32_t expert_alignment;  // rows
  int32_t layout;            // enums Layout, DType, Wire
  int32_t dtype;
  int32_t wire;
  int32_t x_format;  // enum RowFormat: x and rows are of the dtype, or quantized with scales
  int32_t rows_format;
  int32_t zero_fill;           // 0 or 1
  int32_t calls;               // how often all is run, back to back on the same heaps
  int32_t blocks;              // of every kernel
  int32_t tail_blocks;         // of dispatch, more
  int32_t domain_size;         // of combine, as in CombineOp
  int64_t num_tokens;          // T
  int64_t max_tokens;          // that the heaps are for
  int64_t capacity;            // C
  int64_t hidden;              // H, in B = ceil(H / 128) blocks
  uint64_t seed;               // of the schedule
  const int32_t* topk_idx;     // [R, T, K]
  const float* topk_weights;   // [R, T, K]
  const uint8_t* x;            // [R, T, H]
  const float* x_scales;       // [R, T, B], x quantized only
  const uint8_t* y;            // [R, C, H] of the dtype
  int32_t* slot;               // [calls, R, T, K] out
  int32_t* row_source;         // [calls, R, C] out
  int32_t* row_topk_idx;       // [calls, R, C, K] out, layout "rank" only
  int32_t* group_sizes;        // [calls, R, L or R] out
  int32_t* tokens_per_expert;  // [calls, R, L] out
  int32_t* num_dropped;        // [calls, R] out
  uint8_t* rows;               // [calls, R, C, H] out; where left alone, all bits set
  float* rows_scales;          // [calls, R, C, B] out, rows quantized only
  float* row_weights;          // [calls, R, C] (by rank [calls, R, C, K]) out
  uint8_t* weighted;           // [calls, R, T, H] out: combined with row_weights
  uint8_t* unweighted;         // [calls, R, T, H] out
  float* returned_weights;     // [calls, R, T, K] out: row_weights, back at their selections
};

// Runs plan, dispatch and both combines, `calls` times, every rank at its own pace; every second
// time the plan is made in the dispatch. Returns an empty text, or the simulator's report, which
// lives until the next call of this thread.
extern "C" __attribute__((visibility("default"))) const char* jax_ep_simulate(
    const SimulatedExchange* exchange);

#endif  // JAX_EP_CSRC_TESTING_SIMULATED_EXCHANGE_H_
