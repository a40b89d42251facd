// SPDX-License-Identifier: Apache-2.0
// Stories: what the ranks of one or two groups do back to back on the same heaps, drawn from a
// seed.
#ifndef JAX_EP_CSRC_KERNELS_TESTS_STORY_H_
#define JAX_EP_CSRC_KERNELS_TESTS_STORY_H_

#include <cstdint>
#include <string>
#include <vector>

#include "csrc/kernels/params.h"
#include "csrc/tests/cluster.h"

namespace jax_ep {

// One problem, and the operations that are run on it, the plan first.
struct Episode {
  ClusterOptions options;
  RowFormat x_format = RowFormat::kDType;
  RowFormat rows_format = RowFormat::kDType;
  std::vector<OpKind> ops = {OpKind::kPlan, OpKind::kDispatch, OpKind::kCombine};
};

// What the ranks of a group do, one episode after the other.
struct GroupStory {
  int64_t max_tokens = 1;
  int32_t chunk_target = kChunkTarget;  // few: chunks of several tokens, though batches are small
  std::vector<Episode> episodes;
};

struct Story {
  std::vector<GroupStory> groups;  // each on a stream of its own, of the same ranks
  uint32_t blocks = 2;             // of every kernel
  bool check_races = true;
  uint32_t first_epoch = 0;  // exchanges that the groups have behind them, all without tokens
  // A rank that never runs its last operation; -1: none. The others must give up and name it.
  int32_t missing_rank = -1;
  // A rank whose last operation is a plan instead; -1: none. It and the others must notice.
  int32_t odd_rank = -1;
};

// Sizes to draw from.
struct StoryLimits {
  std::vector<int32_t> num_ranks = {1, 2, 3, 4, 8};
  int64_t max_tokens = 20;
  int32_t episodes = 3;
  int32_t groups = 1;
};
Story random_story(uint64_t seed, const StoryLimits& limits);

std::string describe(const Story& story);

const char* name(OpKind op);

// The heap that a group's episodes need.
HeapShape heap_shape(const GroupStory& story);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_KERNELS_TESTS_STORY_H_
