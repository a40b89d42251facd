// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_TUNING_LAUNCH_SHAPE_H_
#define JAX_EP_CSRC_TUNING_LAUNCH_SHAPE_H_

#include <cstdint>

namespace jax_ep {

// How a kernel is launched; csrc/tuning/heuristics.h chooses it. Warps and stages are compiled in:
// a kernel exists for the combinations that tuning names, and no others.
struct LaunchShape {
  int32_t num_blocks;           // one per SM, all resident at once
  int32_t num_warps;            // of a block
  int32_t num_stages;           // of each warp's pipeline through shared memory; 0: it has none
  int32_t num_senders = 0;      // warps of a block that send rows first; a plan has none
  int32_t num_tail_blocks = 0;  // see CallBlocks; dispatch alone has them, also with its plan
  // Between domains, likewise of a block: those that send by the rail (combine: push), and those
  // that reduce (combine alone).
  int32_t num_rail_senders = 0;
  int32_t num_reducers = 0;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_TUNING_LAUNCH_SHAPE_H_
