// SPDX-License-Identifier: Apache-2.0
#include "csrc/testing/run_scenario.h"

#include <algorithm>
#include <memory>
#include <span>
#include <string>

#include "csrc/device/heap.h"
#include "csrc/device/primitives.h"
#include "csrc/testing/simulated_group.h"

namespace jax_ep {
namespace {

constexpr uint64_t kNever = uint64_t{1} << 61;
// Time leaps by this when nobody can do anything but wait.
constexpr uint64_t kLeap = uint64_t{1} << 40;

template <typename Op>
std::vector<EpShape*> shapes_of(Op& op) {
  return {&op.shape};
}
std::vector<EpShape*> shapes_of(PlanDispatchOp& op) { return {&op.plan.shape, &op.dispatch.shape}; }

// One group's part of a run.
class GroupRun {
 public:
  GroupRun(sim::Machine& machine, const Scenario& scenario, size_t index, uint64_t offset)
      : machine_(machine),
        scenario_(scenario),
        mine_(scenario.groups[index]),
        stream_(static_cast<uint32_t>(index)),
        group_(machine,
               heap_shape(mine_),
               mine_.chunk_target,
               offset,
               "group" + std::to_string(index)),
        arrays_offset_(offset + group_bytes(mine_)) {
    if (mine_.num_domains > 1) {
      rails_ = std::make_unique<SimulatedRails>(machine,
                                                network_shape(mine_),
                                                offset + heap_bytes(mine_),
                                                "rails" + std::to_string(index));
      if (scenario.first_message != 0) {
        rails_->set_sequences(scenario.first_message, 3 * scenario.first_message + 1);
      }
    }
    if (scenario.first_epoch != 0) group_.set_epoch(scenario.first_epoch);
    if (scenario.stale_packets != 0) {
      group_.fill_packets(scenario.stale_packets);
      if (rails_) rails_->fill_far_words(scenario.stale_packets);
    }
    const bool reads_anything = scenario.mishap == Mishap::kHostileHandle ||
                                scenario.mishap == Mishap::kOverlap ||
                                scenario.mishap == Mishap::kOtherTokens;
    const int32_t num_ranks = mine_.steps[0].options.shape.num_ranks;
    for (int32_t rank = 0; rank < num_ranks && reads_anything; ++rank) group_.fill_staging(rank);
    for (const ScenarioStep& step : mine_.steps) {
      problems_.push_back(std::make_unique<Problem>(step.options, step.x_format, step.rows_format));
    }
  }

  SimulatedGroup& group() { return group_; }

  // What a rank's kernels told its host last.
  [[nodiscard]] ChannelPhases phases(int32_t rank) const {
    ChannelPhases phases{};
    if (!rails_) return phases;
    for (uint32_t i = 0; i < kNumChannels; ++i) {
      phases[i] = rails_->phase(rank, static_cast<Channel>(i));
    }
    return phases;
  }
  // After a run without mishap: that the last exchange has ended.
  std::string check_phases() {
    const int32_t num_ranks = rails_ ? mine_.steps[0].options.shape.num_ranks : 0;
    for (int32_t rank = 0; rank < num_ranks; ++rank) {
      for (uint32_t i = 0; i < kNumChannels; ++i) {
        const KernelPhase phase = phases(rank)[i];
        const uint32_t epoch = group_.epoch(rank, static_cast<Channel>(i));
        const uint32_t told = epoch == scenario_.first_epoch ? 0 : epoch;
        if (phase.epoch == told && !phase.running) continue;
        return "rank " + std::to_string(rank) + " told its host last that it " +
               (phase.running ? "runs" : "has run") + " exchange " + std::to_string(phase.epoch) +
               " of channel " + std::to_string(i) + ", not that it has run exchange " +
               std::to_string(told);
      }
    }
    return {};
  }

  // After a run without mishap. The words are hints that nothing waits for, so no result tells.
  std::string check_sent() {
    // Some calls say nothing of it.
    if (mine_.low_latency_tokens > 0 || mine_.num_domains > 1) return {};
    uint32_t epoch = scenario_.first_epoch;
    uint32_t last_told = 0;
    for (const ScenarioStep& step : mine_.steps) {
      const bool tells = tells_all_sent(step.options.shape.num_tokens, mine_.chunk_target);
      for (const ScenarioOp& op : step.ops) {
        ++epoch;
        const bool dispatches = op.kind == OpKind::kDispatch || op.kind == OpKind::kPlanDispatch;
        if (dispatches && tells) last_told = epoch;
      }
    }
    for (const ScenarioStep& step : mine_.steps) {
      if (step.options.sitting_out != 0) return {};  // what was told differs from rank to rank
    }
    const int32_t absent = mine_.steps[0].options.absent_rank;
    const int32_t num_ranks = mine_.steps[0].options.shape.num_ranks;
    for (int32_t rank = 0; rank < num_ranks; ++rank) {
      for (int32_t source = 0; source < num_ranks; ++source) {
        if (rank == absent || source == absent || group_.sent(rank, source) == last_told) continue;
        return "rank " + std::to_string(rank) + " was told last that rank " +
               std::to_string(source) + " sent all of exchange " +
               std::to_string(group_.sent(rank, source)) + " instead of " +
               std::to_string(last_told);
      }
    }
    return {};
  }

  static uint64_t memory_bytes(const GroupScenario& scenario) {
    uint64_t arrays = 0;
    for (const ScenarioStep& step : scenario.steps) {
      Problem problem(step.options, step.x_format, step.rows_format);
      arrays = std::max<uint64_t>(arrays, RankArrays(problem, 0, nullptr).bytes());
    }
    const uint64_t bytes = group_bytes(scenario) + arrays;
    return (bytes + 4095) / 4096 * 4096;
  }

  void append() {
    const int32_t num_ranks = mine_.steps[0].options.shape.num_ranks;
    for (size_t step = 0; step < problems_.size(); ++step) {
      for (int32_t rank = 0; rank < num_ranks; ++rank) append(step, rank);
    }
  }

 private:
  static uint64_t heap_bytes(const GroupScenario& scenario) {
    return SimulatedGroup::memory_bytes(heap_shape(scenario));
  }
  static uint64_t group_bytes(const GroupScenario& scenario) {
    if (scenario.num_domains == 1) return heap_bytes(scenario);
    return heap_bytes(scenario) + SimulatedRails::memory_bytes(network_shape(scenario));
  }

  [[nodiscard]] SimulatedLaunch launch_on(uint32_t stream, uint32_t call_site) const {
    return {.stream = stream,
            .blocks = scenario_.blocks,
            .tail_blocks = scenario_.tail_blocks,
            .call_site = call_site};
  }

  void append(size_t step, int32_t rank) {
    const int32_t absent = mine_.steps[step].options.absent_rank;
    if (rank == absent) return;
    const auto r = static_cast<uint32_t>(rank);
    std::byte* const memory = machine_.memory(r) + arrays_offset_;
    arrays_.push_back(std::make_unique<RankArrays>(*problems_[step], rank, memory));
    const RankArrays* const arrays = arrays_.back().get();
    // All steps use the same memory, as programs do; what was there before is gone.
    machine_.host_call(r, stream_, [this, r, rank, memory, arrays] {
      machine_.poison(r, memory, arrays->bytes());
      SimulatedMemory device(machine_, rank);
      arrays->upload(device);
    });
    const std::vector<ScenarioOp>& ops = mine_.steps[step].ops;
    for (size_t i = 0; i < ops.size(); ++i) {
      const bool last = step + 1 == problems_.size() && i + 1 == ops.size();
      if (last && scenario_.mishap != Mishap::kNone) return append_mishap(ops[i], rank, *arrays);
      RankView view = group_.view(rank);
      leave_out(view, mine_.steps[step].options);
      append_forgetting(ops[i], rank, view, *arrays);
      // The halves of a call are two places of the program.
      append_op(ops[i], view, *arrays, launch_on(stream_, ops[i].half == Half::kSecond ? 1 : 0));
      if (ops[i].half == Half::kFirst) continue;
      append_check(
          rank, "step " + std::to_string(step), ops[i], [op = ops[i].kind, arrays](auto& device) {
            return check(op, *arrays, device);
          });
    }
  }

  // What a kernel is about to write is gone: results of an earlier one are none of it.
  void append_forgetting(const ScenarioOp& op,
                         int32_t rank,
                         const RankView& view,
                         const RankArrays& arrays) {
    if (!arrays.writes_results(op.kind, op.half, view)) return;
    const auto r = static_cast<uint32_t>(rank);
    machine_.host_call(r, stream_, [this, r, rank, kind = op.kind, &arrays] {
      for (const std::span<std::byte> result : arrays.results_of(kind)) {
        machine_.poison(r, result.data(), result.size());
      }
      SimulatedMemory device(machine_, rank);
      if (kind == OpKind::kDispatch || kind == OpKind::kPlanDispatch) arrays.mark_rows(device);
    });
  }

  // Some ranks take no part: whoever reaches for their heaps finds none, nor do they find others'.
  static void leave_out(RankView& view, const ClusterOptions& options) {
    const bool takes_part = options.takes_part(view.rank);
    for (int32_t rank = 0; rank < view.num_ranks; ++rank) {
      const bool own = rank == view.rank;  // a low-latency bank of its own is cleared all the same
      if (!own && (!takes_part || !options.takes_part(rank))) view.heap[rank] = nullptr;
    }
  }

  template <typename Check>
  void append_check(int32_t rank,
                    const std::string& what,
                    const ScenarioOp& op,
                    const Check& check) {
    const std::string where = what + " rank " + std::to_string(rank) + " " + describe(op) + ": ";
    machine_.check(static_cast<uint32_t>(rank), stream_, [this, rank, check, where] {
      SimulatedMemory device(machine_, rank);
      const std::string error = check(device);
      return error.empty() ? error : where + error;
    });
  }

  // The last operation, with what goes wrong.
  void append_mishap(ScenarioOp op, int32_t rank, const RankArrays& arrays) {
    const bool is_it = rank == scenario_.rank;
    const SimulatedLaunch launch = launch_on(stream_, 1);
    RankView view = group_.view(rank);
    const auto host_call = [this, rank](const auto& call) {
      machine_.host_call(static_cast<uint32_t>(rank), stream_, call);
    };
    switch (scenario_.mishap) {
      case Mishap::kNone:
      case Mishap::kWrongFlight: break;
      case Mishap::kOneImpatient:
        if (rank != 0) view.timeout_ns = kNever;
        [[fallthrough]];
      case Mishap::kMissing:
        if (is_it) return;
        break;
      case Mishap::kLate:
        view.timeout_ns = kNever;
        if (is_it) return append_late(op, rank, arrays, launch);
        break;
      case Mishap::kOtherOp:
        if (is_it) op.kind = scenario_.other_op;
        break;
      case Mishap::kOtherCallSite:
        return append_op(op, view, arrays, launch_on(stream_, is_it ? 2 : 1));
      case Mishap::kOtherTokens: return append_op(op, view, arrays, launch, is_it ? 1 : 0);
      case Mishap::kOverlap:
        host_call([this, op, view, &arrays, launch] {
          append_op(op, view, arrays, launch_on(stream_ + 1, launch.call_site));
        });
        break;
      case Mishap::kHostileHandle:
        host_call([this, rank, &arrays] {
          SimulatedMemory device(machine_, rank);
          arrays.replace_handle(device, static_cast<uint32_t>(rank));
        });
        break;
      case Mishap::kClosed:
        host_call([this, rank] { group_.close(rank); });
        for (std::byte*& heap : view.heap) heap = nullptr;
        append_op(op, view, arrays, launch);
        return append_check(rank, "closed", op, [op, &arrays](auto& device) {
          return op.half == Half::kFirst ? arrays.check_poisoned_ticket(op.flight, device)
                                         : arrays.check_poisoned(op.kind, device);
        });
      case Mishap::kClosedMeanwhile:
        view.timeout_ns = kNever;
        if (is_it) return;
        if (rank == 0) append_close();
        break;
      case Mishap::kWrongRank:
        if (!is_it) break;
        host_call([this, rank, &arrays] {
          SimulatedMemory device(machine_, rank);
          arrays.replace_rank(device, said_rank(scenario_));
        });
        leave_only_aborted(view.layout);
        break;
      case Mishap::kStoodStill:
        if (rank == 0) group_.launch_wait(rank, scenario_.rank, stream_);
        return;
    }
    append_op(op, view, arrays, launch);
  }

  // Closes rank 0, from another stream, once nobody can do anything but wait.
  void append_close() {
    machine_.launch(0, stream_ + 1, {}, [view = group_.view(0)] {
      while (dev::now_ns() < kLeap / 2) dev::spin_pause("the others to wait");
      dev::st_relaxed<dev::Scope::kSys>(dev::control(view, Control::kClosed), 1);
    });
  }

  // What a kernel does with the heaps leads out of them, unless it tells the peers that it gave up.
  static void leave_only_aborted(HeapLayout& layout) {
    constexpr int64_t kNowhere = int64_t{1} << 56;
    for (int32_t region = 0; region < kNumRegions; ++region) {
      if (region != static_cast<int32_t>(Region::kAborted)) layout.offset[region] = kNowhere;
    }
  }

  // Once all others have reported that they wait for the rank.
  void append_late(const ScenarioOp& op,
                   int32_t rank,
                   const RankArrays& arrays,
                   SimulatedLaunch launch) {
    machine_.launch(static_cast<uint32_t>(rank), stream_, {}, [] {
      // After the first leap the others report, and after the second one they have.
      while (dev::now_ns() < kLeap + kLeap / 2) dev::spin_pause("the others to lose patience");
    });
    append_op(op, group_.view(rank), arrays, launch);
    append_check(
        rank, "late", op, [op, &arrays](auto& device) { return check(op.kind, arrays, device); });
  }

  void append_op(const ScenarioOp& op,
                 const RankView& view,
                 const RankArrays& arrays,
                 const SimulatedLaunch& launch,
                 int64_t fewer_tokens = 0) {
    const auto run = [&](auto params) {
      for (EpShape* shape : shapes_of(params.op)) shape->num_tokens -= fewer_tokens;
      const bool is_low_latency = SimulatedGroup::is_low_latency(params);
      if (is_low_latency && !rails_) {
        params.half = op.half;
        params.ticket = arrays.ticket(op.flight);
      } else if (op.half == Half::kSecond) {
        return;
      }
      if (!rails_) return group_.launch(params, launch);
      if constexpr (requires { group_.launch(rails_->low_latency_params(params), launch); }) {
        if (is_low_latency) return group_.launch(rails_->low_latency_params(params), launch);
      }
      // Between domains there is no kernel of a plan with its dispatch but the low-latency one.
      if constexpr (requires { params.op.dispatch; }) {
        append_op({OpKind::kPlan}, view, arrays, launch, fewer_tokens);
        append_op({OpKind::kDispatch}, view, arrays, launch, fewer_tokens);
      } else {
        group_.launch(rails_->params(params), launch);
      }
    };
    switch (op.kind) {
      case OpKind::kPlan: return run(arrays.plan(view));
      case OpKind::kDispatch: return run(arrays.dispatch(view));
      case OpKind::kCombine: return run(arrays.combine(view));
      case OpKind::kPlanDispatch: return run(arrays.plan_dispatch(view));
    }
  }

  static std::string check(OpKind op, const RankArrays& arrays, DeviceMemory& device) {
    switch (op) {
      case OpKind::kPlan: return arrays.check_plan(device);
      case OpKind::kDispatch: return arrays.check_dispatch(device);
      case OpKind::kCombine: return arrays.check_combine(device);
      case OpKind::kPlanDispatch: {
        const std::string error = arrays.check_plan(device);
        return error.empty() ? arrays.check_dispatch(device) : error;
      }
    }
    return "unknown operation";
  }

  sim::Machine& machine_;
  const Scenario& scenario_;
  const GroupScenario& mine_;
  const uint32_t stream_;
  SimulatedGroup group_;
  std::unique_ptr<SimulatedRails> rails_;  // where there are several domains
  const uint64_t arrays_offset_;
  std::vector<std::unique_ptr<Problem>> problems_;
  std::vector<std::unique_ptr<RankArrays>> arrays_;
};

}  // namespace

Outcome run_scenario(const Scenario& scenario, uint64_t seed) {
  sim::Config config;
  config.num_ranks = static_cast<uint32_t>(scenario.groups[0].steps[0].options.shape.num_ranks);
  config.streams = static_cast<uint32_t>(scenario.groups.size());
  if (scenario.mishap == Mishap::kOverlap || scenario.mishap == Mishap::kClosedMeanwhile)
    ++config.streams;
  config.clock_skew_ns = 16;
  config.survive_traps = scenario.mishap != Mishap::kNone;  // see what each rank says
  config.max_blocks = scenario.blocks + scenario.tail_blocks;
  config.max_threads = SimulatedGroup::kMaxThreads;
  config.shared_bytes = SimulatedGroup::max_shared_bytes();
  const int32_t num_domains = scenario.groups[0].num_domains;
  if (num_domains > 1) {
    config.ranks_per_node = config.num_ranks / static_cast<uint32_t>(num_domains);
    config.max_threads = SimulatedRails::kMaxThreads;
    config.shared_bytes = SimulatedRails::max_shared_bytes();
  }
  config.check_races = scenario.check_races;
  config.memory_bytes = 0;
  std::vector<uint64_t> offsets;
  for (const GroupScenario& group : scenario.groups) {
    offsets.push_back(config.memory_bytes);
    config.memory_bytes += GroupRun::memory_bytes(group);
    for (const ScenarioStep& step : group.steps) {
      const ClusterOptions& options = step.options;
      config.granule_bytes = std::min(config.granule_bytes,
                                      granule_bytes(options.hidden, options.dtype, options.wire));
    }
  }
  sim::Machine machine(config);
  machine.reset(seed);
  std::vector<std::unique_ptr<GroupRun>> runs;
  for (size_t i = 0; i < scenario.groups.size(); ++i) {
    runs.push_back(std::make_unique<GroupRun>(machine, scenario, i, offsets[i]));
    runs.back()->append();
  }
  Outcome outcome{machine.run(), {}, {}, {}};
  if (outcome.report.ok() && scenario.mishap == Mishap::kNone) {
    for (const std::unique_ptr<GroupRun>& run : runs) {
      std::string error = run->check_sent();
      if (error.empty()) error = run->check_phases();
      if (error.empty()) continue;
      outcome.report.kind = "wrong result";
      outcome.report.what = error;
    }
  }
  for (uint32_t rank = 0; rank < config.num_ranks; ++rank) {
    SimulatedGroup& group = runs[0]->group();
    outcome.errors.push_back(group.error(static_cast<int32_t>(rank)));
    outcome.long_waits.push_back(group.long_wait(static_cast<int32_t>(rank), scenario.rank));
    outcome.phases.push_back(runs[0]->phases(static_cast<int32_t>(rank)));
  }
  return outcome;
}

}  // namespace jax_ep
