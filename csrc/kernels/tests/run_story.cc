// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/tests/run_story.h"

#include <algorithm>
#include <memory>
#include <string>

#include "csrc/kernels/tests/simulated_group.h"

namespace jax_ep {
namespace {

// One group's part of a run.
class GroupRun {
 public:
  GroupRun(sim::Machine& machine, const Story& story, size_t index, uint64_t offset)
      : machine_(machine),
        story_(story),
        mine_(story.groups[index]),
        stream_(static_cast<uint32_t>(index)),
        group_(machine,
               heap_shape(mine_),
               mine_.chunk_target,
               offset,
               "group" + std::to_string(index)),
        arrays_offset_(offset + SimulatedGroup::memory_bytes(heap_shape(mine_))) {
    if (story.first_epoch != 0) group_.set_epoch(story.first_epoch);
    for (const Episode& episode : mine_.episodes) {
      problems_.push_back(
          std::make_unique<Problem>(episode.options, episode.x_format, episode.rows_format));
    }
  }

  SimulatedGroup& group() { return group_; }

  static uint64_t memory_bytes(const GroupStory& story) {
    uint64_t arrays = 0;
    for (const Episode& episode : story.episodes) {
      Problem problem(episode.options, episode.x_format, episode.rows_format);
      arrays = std::max<uint64_t>(arrays, RankArrays(problem, 0, nullptr).bytes());
    }
    const uint64_t bytes = SimulatedGroup::memory_bytes(heap_shape(story)) + arrays;
    return (bytes + 4095) / 4096 * 4096;
  }

  void append() {
    const int32_t num_ranks = mine_.episodes[0].options.shape.num_ranks;
    for (size_t episode = 0; episode < problems_.size(); ++episode) {
      for (int32_t rank = 0; rank < num_ranks; ++rank) append(episode, rank);
    }
  }

 private:
  void append(size_t episode, int32_t rank) {
    const auto r = static_cast<uint32_t>(rank);
    std::byte* const memory = machine_.memory(r) + arrays_offset_;
    arrays_.push_back(std::make_unique<RankArrays>(*problems_[episode], rank, memory));
    const RankArrays* const arrays = arrays_.back().get();
    // All episodes use the same memory, as programs do; what was there before is gone.
    machine_.host_call(r, stream_, [this, r, rank, memory, arrays] {
      machine_.poison(r, memory, arrays->bytes());
      SimulatedMemory device(machine_, rank);
      arrays->upload(device);
    });
    const std::vector<OpKind>& ops = mine_.episodes[episode].ops;
    for (size_t i = 0; i < ops.size(); ++i) {
      const bool last = episode + 1 == problems_.size() && i + 1 == ops.size();
      if (last && rank == story_.missing_rank) return;
      append_op(last && rank == story_.odd_rank ? OpKind::kPlan : ops[i], rank, *arrays);
      const std::string where = "episode " + std::to_string(episode) + " rank " +
                                std::to_string(rank) + " " + name(ops[i]) + ": ";
      machine_.check(r, stream_, [this, op = ops[i], rank, arrays, where] {
        SimulatedMemory device(machine_, rank);
        const std::string error = check(op, *arrays, device);
        return error.empty() ? error : where + error;
      });
    }
  }

  void append_op(OpKind op, int32_t rank, const RankArrays& arrays) {
    const RankView view = group_.view(rank);
    switch (op) {
      case OpKind::kPlan: return group_.launch(arrays.plan(view), stream_, story_.blocks);
      case OpKind::kDispatch: return group_.launch(arrays.dispatch(view), stream_, story_.blocks);
      case OpKind::kCombine: return group_.launch(arrays.combine(view), stream_, story_.blocks);
    }
  }

  static std::string check(OpKind op, const RankArrays& arrays, DeviceMemory& device) {
    switch (op) {
      case OpKind::kPlan: return arrays.check_plan(device);
      case OpKind::kDispatch: return arrays.check_dispatch(device);
      case OpKind::kCombine: return arrays.check_combine(device);
    }
    return "unknown operation";
  }

  sim::Machine& machine_;
  const Story& story_;
  const GroupStory& mine_;
  const uint32_t stream_;
  SimulatedGroup group_;
  const uint64_t arrays_offset_;
  std::vector<std::unique_ptr<Problem>> problems_;
  std::vector<std::unique_ptr<RankArrays>> arrays_;
};

}  // namespace

Outcome run_story(const Story& story, uint64_t seed) {
  sim::Config config;
  config.num_ranks = static_cast<uint32_t>(story.groups[0].episodes[0].options.shape.num_ranks);
  config.streams = static_cast<uint32_t>(story.groups.size());
  config.max_blocks = story.blocks;
  config.max_threads = SimulatedGroup::kMaxThreads;
  config.shared_bytes = SimulatedGroup::max_shared_bytes();
  config.check_races = story.check_races;
  config.memory_bytes = 0;
  std::vector<uint64_t> offsets;
  for (const GroupStory& group : story.groups) {
    offsets.push_back(config.memory_bytes);
    config.memory_bytes += GroupRun::memory_bytes(group);
    for (const Episode& episode : group.episodes) {
      const ClusterOptions& options = episode.options;
      config.granule_bytes = std::min(config.granule_bytes,
                                      granule_bytes(options.hidden, options.dtype, options.wire));
    }
  }
  sim::Machine machine(config);
  machine.reset(seed);
  std::vector<std::unique_ptr<GroupRun>> runs;
  for (size_t i = 0; i < story.groups.size(); ++i) {
    runs.push_back(std::make_unique<GroupRun>(machine, story, i, offsets[i]));
    runs.back()->append();
  }
  Outcome outcome{machine.run(), {}};
  for (uint32_t rank = 0; rank < config.num_ranks; ++rank) {
    outcome.errors.push_back(runs[0]->group().error(static_cast<int32_t>(rank)));
  }
  return outcome;
}

}  // namespace jax_ep
