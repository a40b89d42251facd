// SPDX-License-Identifier: Apache-2.0
#include "csrc/testing/scenario.h"

#include <algorithm>
#include <random>

namespace jax_ep {
namespace {

constexpr uint32_t kMaxBlocks = 128;  // of all ranks; sim::Clock has room for so many threads

class Draw {
 public:
  explicit Draw(uint64_t seed) : random_(seed) {}
  int64_t below(int64_t limit) {
    return static_cast<int64_t>(random_() % static_cast<uint64_t>(limit));
  }
  bool one_in(int64_t n) { return below(n) == 0; }
  template <typename T>
  T one_of(const std::vector<T>& values) {
    return values[static_cast<size_t>(below(static_cast<int64_t>(values.size())))];
  }

 private:
  std::mt19937_64 random_;
};

GroupStory random_group(Draw& draw, int32_t num_ranks, const StoryLimits& limits) {
  ClusterOptions base;
  EpShape& shape = base.shape;
  shape.num_ranks = num_ranks;
  shape.num_experts = num_ranks * draw.one_of<int32_t>({1, 2, 3, 5});
  shape.num_topk = static_cast<int32_t>(1 + draw.below(std::min(shape.num_experts, 6)));
  shape.layout = draw.one_in(3) ? Layout::kRank : Layout::kExpert;
  if (shape.layout == Layout::kExpert) shape.expert_alignment = draw.one_of<int32_t>({1, 1, 4, 7});
  base.dtype = draw.one_of<DType>({DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  base.wire = draw.one_in(3) ? Wire::kFloat8E4M3 : Wire::kSame;
  base.hidden = draw.one_of<int64_t>({8, 64, 136, 400, 1104, 7, 1, 33, 0});
  if (base.wire == Wire::kFloat8E4M3) base.hidden = draw.one_of<int64_t>({128, 144, 1152, 130, 5});
  GroupStory story;
  story.chunk_target = draw.one_of<int32_t>({kChunkTarget, 3, 6});
  story.max_tokens = limits.max_tokens;
  // More tokens than a warp has lanes: several steps of a tile, and several tiles.
  if (draw.one_in(4) && num_ranks <= 4) story.max_tokens *= 4;
  for (int32_t i = 0; i < limits.episodes; ++i) {
    Episode episode{.options = base};
    ClusterOptions& options = episode.options;
    options.seed = static_cast<uint32_t>(draw.below(1'000'000));
    options.shape.num_tokens = draw.one_in(6) ? draw.one_of<int64_t>({0, 1, story.max_tokens})
                                              : 1 + draw.below(story.max_tokens);
    const int64_t worst = worst_case_capacity(options.shape);
    options.shape.recv_capacity =
        draw.one_in(3) ? 1 + draw.below(std::max<int64_t>(worst, 1)) : std::max<int64_t>(worst, 1);
    options.zero_fill = !draw.one_in(4);
    options.scalars = !draw.one_in(3);
    options.weighted = !draw.one_in(3);
    if (base.wire == Wire::kFloat8E4M3) {
      episode.x_format = draw.one_in(3) ? RowFormat::kFloat8E4M3 : RowFormat::kDType;
      episode.rows_format = draw.one_in(3) ? RowFormat::kFloat8E4M3 : RowFormat::kDType;
    }
    // Also without a combine, which would order what comes after it, and over a used handle.
    using enum OpKind;
    episode.ops = draw.one_of<std::vector<OpKind>>({{kPlan, kDispatch, kCombine},
                                                    {kPlan, kDispatch},
                                                    {kPlan, kDispatch, kDispatch, kDispatch},
                                                    {kPlan, kCombine, kDispatch, kCombine},
                                                    {kPlan, kPlan}});
    story.episodes.push_back(episode);
  }
  return story;
}

}  // namespace

const char* name(Mishap mishap) {
  constexpr const char* kNames[] = {"none",
                                    "a rank is missing",
                                    "a rank is missing, and one alone gives up",
                                    "a rank is late",
                                    "a rank runs another operation",
                                    "a rank runs another call",
                                    "a rank has other tokens",
                                    "two operations at once",
                                    "a handle that no plan made",
                                    "the group is closed",
                                    "the group is closed while a rank waits",
                                    "the program says another rank",
                                    "a rank stands still"};
  return kNames[static_cast<int>(mishap)];
}

int32_t said_rank(const Story& story) {
  return (story.rank + 1) % story.groups[0].episodes[0].options.shape.num_ranks;
}

HeapShape heap_shape(const GroupStory& story) {
  const ClusterOptions& options = story.episodes[0].options;
  return {.num_ranks = options.shape.num_ranks,
          .num_experts = options.shape.num_experts,
          .num_topk = options.shape.num_topk,
          .max_tokens = story.max_tokens,
          .hidden = options.hidden,
          .dtype = options.dtype,
          .wire = options.wire,
          .layout = options.shape.layout};
}

Story random_story(uint64_t seed, const StoryLimits& limits) {
  Draw draw(seed);
  Story story;
  const int32_t num_ranks = draw.one_of(limits.num_ranks);
  StoryLimits sizes = limits;
  if (num_ranks > 16) {  // each of their waits is many steps
    sizes.max_tokens = std::min<int64_t>(sizes.max_tokens, 3);
    sizes.episodes = 1;
  }
  for (int32_t i = 0; i < limits.groups; ++i) {
    story.groups.push_back(random_group(draw, num_ranks, sizes));
  }
  story.blocks = std::min(draw.one_of<uint32_t>({1, 2, 2, 3}), kMaxBlocks / num_ranks);
  if (draw.one_in(6))
    story.first_epoch = draw.one_of<uint32_t>({0x7FFF'FFFE, 0xFFFF'FFFE, 0xFFFF'FFFF});
  return story;
}

std::string describe(const Story& story) {
  std::string text = std::to_string(story.blocks) + " blocks";
  if (story.mishap != Mishap::kNone) text += std::string(", ") + name(story.mishap);
  for (const GroupStory& group : story.groups) {
    text += "\n  group, chunk target " + std::to_string(group.chunk_target) + ":";
    for (const Episode& episode : group.episodes) {
      text += "\n    " + describe(episode.options);
      if (episode.x_format == RowFormat::kFloat8E4M3) text += "_fp8in";
      if (episode.rows_format == RowFormat::kFloat8E4M3) text += "_fp8out";
      for (const OpKind op : episode.ops) text += " " + std::string(name(op));
    }
  }
  return text;
}

}  // namespace jax_ep
