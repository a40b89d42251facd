// SPDX-License-Identifier: Apache-2.0
#include "csrc/testing/scenario.h"

#include <algorithm>
#include <random>

#include "csrc/core/low_latency_fit.h"

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

GroupScenario random_group(Draw& draw, int32_t num_ranks, const ScenarioLimits& limits) {
  ClusterOptions base;
  EpShape& shape = base.shape;
  shape.num_ranks = num_ranks;
  shape.num_experts = num_ranks * draw.one_of<int32_t>({1, 2, 3, 5});
  shape.num_topk = static_cast<int32_t>(1 + draw.below(std::min(shape.num_experts, 6)));
  shape.layout = draw.one_in(3) ? Layout::kRank : Layout::kExpert;
  if (shape.layout == Layout::kExpert) shape.expert_alignment = draw.one_of<int32_t>({1, 1, 4, 7});
  base.dtype = draw.one_of(limits.dtypes);
  base.wire = draw.one_in(3) ? Wire::kFloat8E4M3 : Wire::kSame;
  base.hidden = draw.one_of<int64_t>({8, 64, 136, 400, 1104, 7, 1, 33, 0});
  if (base.wire == Wire::kFloat8E4M3) base.hidden = draw.one_of<int64_t>({128, 144, 1152, 130, 5});
  GroupScenario scenario;
  scenario.chunk_target = draw.one_of<int32_t>({kChunkTarget, 3, 6});
  scenario.max_tokens = limits.max_tokens;
  // More tokens than a warp has lanes: several steps of a tile, and several tiles.
  if (draw.one_in(4) && num_ranks <= 4) scenario.max_tokens *= 4;
  for (int32_t i = 0; i < limits.steps; ++i) {
    ScenarioStep step{.options = base};
    ClusterOptions& options = step.options;
    options.seed = static_cast<uint32_t>(draw.below(1'000'000));
    options.shape.num_tokens = draw.one_in(6) ? draw.one_of<int64_t>({0, 1, scenario.max_tokens})
                                              : 1 + draw.below(scenario.max_tokens);
    const int64_t worst = worst_case_capacity(options.shape);
    options.shape.recv_capacity =
        draw.one_in(3) ? 1 + draw.below(std::max<int64_t>(worst, 1)) : std::max<int64_t>(worst, 1);
    options.zero_fill = !draw.one_in(4);
    options.scalars = !draw.one_in(3);
    options.weighted = !draw.one_in(3);
    if (base.wire == Wire::kFloat8E4M3) {
      step.x_format = draw.one_in(3) ? RowFormat::kFloat8E4M3 : RowFormat::kDType;
      step.rows_format = draw.one_in(3) ? RowFormat::kFloat8E4M3 : RowFormat::kDType;
    }
    // Also without a combine, which would order what comes after it, and over a used handle.
    using enum OpKind;
    step.ops = draw.one_of<std::vector<ScenarioOp>>({{kPlan, kDispatch, kCombine},
                                                     {kPlan, kDispatch},
                                                     {kPlan, kDispatch, kDispatch, kDispatch},
                                                     {kPlan, kCombine, kDispatch, kCombine},
                                                     {kPlan, kPlan}});
    scenario.steps.push_back(step);
  }
  return scenario;
}

// Some dispatches of rows that travel as they are become backwards of a weighted combine.
void draw_products(Draw& draw, GroupScenario& scenario) {
  for (ScenarioStep& step : scenario.steps) {
    if (step.options.wire != Wire::kSame || !draw.one_in(3)) continue;
    step.options.row_weights = !draw.one_in(4);
    step.options.row_dots = !step.options.row_weights || !draw.one_in(4);
  }
}

// Some combines sum over domains: few where it takes them from the low-latency kernels.
void draw_domains(Draw& draw, GroupScenario& scenario, bool low_latency) {
  for (ScenarioStep& step : scenario.steps) {
    std::vector<int32_t> sizes;
    for (int32_t size = 2; size < step.options.shape.num_ranks; ++size) {
      if (step.options.shape.num_ranks % size == 0) sizes.push_back(size);
    }
    if (!sizes.empty() && draw.one_in(low_latency ? 8 : 3)) {
      step.options.domain_size = sizes[draw.below(sizes.size())];
    }
  }
}

// Half of the plans are made in the dispatch that follows. Two plans become two of those.
void make_plans_in_dispatches(std::vector<ScenarioOp>& ops, Draw& draw) {
  using enum OpKind;
  if (draw.one_in(2)) return;
  if (ops == std::vector<ScenarioOp>{kPlan, kPlan}) ops = {kPlanDispatch, kPlanDispatch, kCombine};
  if (ops[1].kind != kDispatch) return;
  ops.erase(ops.begin());
  ops[0] = kPlanDispatch;
}

// Heaps with room for low-latency calls of some sizes, and operations that may be such calls; those
// with more tokens, with rows of odd sizes or with scalars to combine are none, and come between.
void make_low_latency(Draw& draw, GroupScenario& scenario) {
  using enum OpKind;
  const int64_t max_low_latency = std::min<int64_t>(scenario.max_tokens, kMaxLowLatencyTokens);
  scenario.low_latency_tokens =
      draw.one_of<int64_t>({max_low_latency, max_low_latency, max_low_latency / 2 + 1});
  for (ScenarioStep& step : scenario.steps) {
    if (step.options.row_weights || step.options.row_dots) continue;
    step.ops = draw.one_of<std::vector<ScenarioOp>>({{kPlanDispatch, kCombine},
                                                     {kPlanDispatch},
                                                     {kPlanDispatch, kCombine, kCombine},
                                                     {kPlanDispatch, kPlanDispatch, kCombine},
                                                     {kPlanDispatch, kDispatch, kCombine},
                                                     {kPlan, kDispatch, kCombine}});
  }
}

// Some steps in halves: one after the other, with others between, and two flights at a time that
// end in either order. In two of them as much is between the halves as may be.
void make_halves(Draw& draw, GroupScenario& scenario) {
  using enum OpKind;
  using enum Half;
  const ScenarioOp start(kPlanDispatch, kFirst);
  const ScenarioOp done(kPlanDispatch, kSecond);
  const ScenarioOp start1(kPlanDispatch, kFirst, 1);
  const ScenarioOp done1(kPlanDispatch, kSecond, 1);
  const ScenarioOp back(kCombine, kFirst);
  const ScenarioOp end(kCombine, kSecond);
  const ScenarioOp back1(kCombine, kFirst, 1);
  const ScenarioOp end1(kCombine, kSecond, 1);
  for (ScenarioStep& step : scenario.steps) {
    if (step.options.row_weights || step.options.row_dots || draw.one_in(2)) continue;
    step.ops = draw.one_of<std::vector<ScenarioOp>>(
        {{start, done, back, end},
         {start, done, back, start1, end, done1},
         {start, done, back, start1, done1, end},
         {start, done, back, kPlanDispatch, kCombine, kPlanDispatch, end},
         {kPlanDispatch, back, back1, end1, end},
         {kPlanDispatch, back, back1, kCombine, kCombine, end, end1, kCombine},
         // Nobody comes for a flight.
         {kPlanDispatch, back, kCombine, start, kCombine, kPlanDispatch, kCombine}});
  }
}

// Who takes part differs from step to step: most ranks, few, one or none. Some steps have no mask,
// and some a mask of all.
void draw_masks(Draw& draw, GroupScenario& scenario) {
  for (ScenarioStep& step : scenario.steps) {
    ClusterOptions& options = step.options;
    if (options.absent_rank >= 0) continue;
    const int64_t one_in = draw.one_of<int64_t>({2, 3, 4});
    options.masked = draw.one_in(2);
    if (draw.one_in(4)) continue;
    for (int32_t rank = 0; rank < options.shape.num_ranks; ++rank) {
      if (draw.one_in(one_in)) options.sitting_out |= uint64_t{1} << rank;
    }
  }
}

// The next exchanges clear the banks, one each.
void clear_banks(Draw& draw, Scenario& scenario) {
  scenario.first_epoch = kClearBankEvery - 1;
  scenario.stale_packets =
      kClearBankEvery + uint32_t{kLowLatencyBanks} + draw.one_of<uint32_t>({0, 1});
}

// Several domains: few and many, of one rank and of several; rings from one buffer on.
void make_internode(Draw& draw, GroupScenario& scenario, const Topology& topology, bool by_counts) {
  using enum OpKind;
  scenario.num_domains = topology.num_scaleout_ranks;
  scenario.rail_chunk_tokens = draw.one_of<int32_t>({1, 2, 3, 5, 8, 32, 50});
  scenario.window = draw.one_of<int32_t>({1, 2, 3, 3});
  scenario.gather_units = draw.one_of<int32_t>({1, 2, 3, 5, 8});
  scenario.plans_by_counts = by_counts;
  for (ScenarioStep& step : scenario.steps) {
    step.options.domain_size = topology.num_scaleup_ranks;
    step.ops = draw.one_of<std::vector<ScenarioOp>>({{kPlan, kDispatch, kCombine},
                                                     {kPlan, kDispatch},
                                                     {kPlan, kDispatch, kDispatch},
                                                     {kPlan, kCombine, kDispatch, kCombine},
                                                     {kPlan, kPlan}});
  }
}

// Most calls by the low-latency kernels, also of sums over other domains than those of the network,
// which no other kernels have there. Halves are in one piece.
void make_internode_low_latency(Draw& draw, GroupScenario& scenario, const Topology& topology) {
  const int32_t domain_size = topology.num_scaleup_ranks;
  make_low_latency(draw, scenario);
  make_halves(draw, scenario);
  scenario.low_latency_chunk = draw.one_of<int32_t>({1, 2, 3, 7, 64});
  for (ScenarioStep& step : scenario.steps) {
    const int32_t other = draw.one_of<int32_t>({0, 1, topology.num_ranks(), domain_size});
    CombineOp combine{.shape = step.options.shape,
                      .hidden = step.options.hidden,
                      .num_scalars = step.options.scalars ? step.options.shape.num_topk : 0,
                      .dtype = step.options.dtype};
    const HeapLayout heap = make_heap_layout(heap_shape(scenario));
    if (fits_low_latency(heap, combine)) step.options.domain_size = other;
  }
}

// As many exchanges of one token as there are banks, and then the first of many.
void take_few_tokens_and_then_many(GroupScenario& scenario) {
  using enum OpKind;
  for (size_t i = 0; i < 2; ++i) {
    ClusterOptions& options = scenario.steps[i].options;
    options.shape.num_tokens = i == 0 ? 1 : scenario.low_latency_tokens;
    options.row_weights = options.row_dots = options.scalars = false;
    scenario.steps[i].ops = {kPlanDispatch, kCombine};
  }
  std::vector<ScenarioOp>& few = scenario.steps[0].ops;
  few.insert(few.end(), {kPlanDispatch, kCombine});
}

Scenario random_internode_scenario(uint64_t seed, const ScenarioLimits& limits) {
  Draw draw(seed ^ 0xa0761d6478bd642f);
  const Topology topology = draw.one_of<Topology>(
      {{1, 2}, {2, 2}, {2, 2}, {3, 2}, {1, 3}, {2, 3}, {1, 4}, {2, 4}, {1, 5}, {4, 2}, {1, 8}});
  ScenarioLimits sizes = limits;
  if (topology.num_ranks() > 4) {
    sizes.max_tokens = std::min<int64_t>(sizes.max_tokens, 8);
    sizes.steps = 2;
  }
  Scenario scenario;
  for (int32_t i = 0; i < limits.groups; ++i) {
    scenario.groups.push_back(random_group(draw, topology.num_ranks(), sizes));
    draw_products(draw, scenario.groups.back());
    make_internode(draw, scenario.groups.back(), topology, limits.plans_by_counts);
  }
  // Drawn apart, as below.
  Draw others(seed ^ 0x94d049bb133111eb);
  for (GroupScenario& group : scenario.groups) {
    if (limits.low_latency) make_internode_low_latency(others, group, topology);
  }
  scenario.blocks = draw.one_of<uint32_t>({1, 2, 2});
  if (draw.one_in(6)) {
    scenario.first_epoch = draw.one_of<uint32_t>({0x7FFF'FFFE, 0xFFFF'FFFE, 0xFFFF'FFFF});
    scenario.first_message = draw.one_of<uint64_t>({0xFFFF'FFFE, 0xFFFF'FFF0, 0x1'0000'0001});
  }
  if (limits.low_latency && others.one_in(4)) {
    clear_banks(others, scenario);
    for (GroupScenario& group : scenario.groups) take_few_tokens_and_then_many(group);
  }
  return scenario;
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
                                    "a flight is not open",
                                    "a rank stands still"};
  return kNames[static_cast<int>(mishap)];
}

std::string describe(const ScenarioOp& op) {
  if (op.half == Half::kBoth) return std::string(name(op.kind));
  return std::string(name(op.kind)) + (op.half == Half::kFirst ? "_start" : "_done") +
         std::to_string(op.flight);
}

int32_t said_rank(const Scenario& scenario) {
  return (scenario.rank + 1) % scenario.groups[0].steps[0].options.shape.num_ranks;
}

HeapShape heap_shape(const GroupScenario& scenario) {
  const ClusterOptions& options = scenario.steps[0].options;
  return {.num_ranks = options.shape.num_ranks,
          .num_experts = options.shape.num_experts,
          .num_topk = options.shape.num_topk,
          .max_tokens = scenario.max_tokens,
          .hidden = options.hidden,
          .dtype = options.dtype,
          .wire = options.wire,
          .layout = options.shape.layout,
          .low_latency_tokens = scenario.low_latency_tokens,
          .num_neighbors = options.shape.num_ranks / scenario.num_domains,
          .gathered_domains = scenario.plans_by_counts ? 1 : kMaxRanks};
}

NetworkShape network_shape(const GroupScenario& scenario) {
  const EpShape& shape = scenario.steps[0].options.shape;
  return {.topology = {.num_scaleup_ranks = shape.num_ranks / scenario.num_domains,
                       .num_scaleout_ranks = scenario.num_domains},
          .max_tokens = scenario.max_tokens,
          .row_stride = make_heap_layout(heap_shape(scenario)).row_stride,
          .num_topk = shape.num_topk,
          .chunk_tokens = scenario.rail_chunk_tokens,
          .window = scenario.window,
          .gather_units = scenario.gather_units,
          .low_latency_tokens = scenario.low_latency_tokens,
          .low_latency_chunk = scenario.low_latency_chunk,
          .plans_by_counts = scenario.plans_by_counts,
          .num_experts = shape.num_experts,
          .layout = shape.layout};
}

Scenario random_scenario(uint64_t seed, const ScenarioLimits& limits) {
  if (limits.internode) return random_internode_scenario(seed, limits);
  Draw draw(seed);
  Scenario scenario;
  const int32_t num_ranks = draw.one_of(limits.num_ranks);
  ScenarioLimits sizes = limits;
  if (num_ranks > 16) {  // each of their waits is many steps
    sizes.max_tokens = std::min<int64_t>(sizes.max_tokens, 3);
    sizes.steps = 1;
  }
  for (int32_t i = 0; i < limits.groups; ++i) {
    scenario.groups.push_back(random_group(draw, num_ranks, sizes));
  }
  scenario.blocks = std::min(draw.one_of<uint32_t>({1, 2, 2, 3}), kMaxBlocks / num_ranks);
  // Drawn apart, so that the rest of a seed's scenario stays as it is.
  Draw others(seed ^ 0x9e3779b97f4a7c15);
  if (num_ranks > 1 && others.one_in(5)) {
    const auto absent = static_cast<int32_t>(others.below(num_ranks));
    for (GroupScenario& group : scenario.groups) {
      for (ScenarioStep& step : group.steps) step.options.absent_rank = absent;
    }
  }
  scenario.tail_blocks = std::min(others.one_of<uint32_t>({0, 1, 2}),
                                  kMaxBlocks / static_cast<uint32_t>(num_ranks) - scenario.blocks);
  Draw products(seed ^ 0xbf58476d1ce4e5b9);
  for (GroupScenario& group : scenario.groups) draw_products(products, group);
  for (GroupScenario& group : scenario.groups) {
    for (ScenarioStep& step : group.steps) {
      const bool products = step.options.row_weights || step.options.row_dots;
      if (!products) make_plans_in_dispatches(step.ops, others);
    }
  }
  Draw domains(seed ^ 0xd6e8feb86659fd93);
  for (GroupScenario& group : scenario.groups) draw_domains(domains, group, limits.low_latency);
  if (draw.one_in(6))
    scenario.first_epoch = draw.one_of<uint32_t>({0x7FFF'FFFE, 0xFFFF'FFFE, 0xFFFF'FFFF});
  Draw masks(seed ^ 0x2545f4914f6cdd1d);
  for (GroupScenario& group : scenario.groups) {
    if (limits.masks) draw_masks(masks, group);
  }
  if (!limits.low_latency) return scenario;
  for (GroupScenario& group : scenario.groups) make_low_latency(others, group);
  Draw halves(seed ^ 0x94d049bb133111eb);
  for (GroupScenario& group : scenario.groups) make_halves(halves, group);
  if (others.one_in(4)) clear_banks(others, scenario);
  return scenario;
}

std::string describe(const Scenario& scenario) {
  std::string text =
      std::to_string(scenario.blocks) + "+" + std::to_string(scenario.tail_blocks) + " blocks";
  if (scenario.mishap != Mishap::kNone) text += std::string(", ") + name(scenario.mishap);
  for (const GroupScenario& group : scenario.groups) {
    text += "\n  group, chunk target " + std::to_string(group.chunk_target);
    if (group.low_latency_tokens > 0) {
      text += ", low latency up to " + std::to_string(group.low_latency_tokens) + " tokens";
    }
    if (group.num_domains > 1) {
      text += ", " + std::to_string(group.num_domains) + " domains, rail chunks of " +
              std::to_string(group.rail_chunk_tokens) + " tokens, rings of " +
              std::to_string(group.window) + " and " + std::to_string(group.gather_units) +
              ", low-latency chunks of " + std::to_string(group.low_latency_chunk);
    }
    if (group.plans_by_counts) text += ", plans by counts";
    text += ":";
    for (const ScenarioStep& step : group.steps) {
      text += "\n    " + describe(step.options);
      if (step.x_format == RowFormat::kFloat8E4M3) text += "_fp8in";
      if (step.rows_format == RowFormat::kFloat8E4M3) text += "_fp8out";
      for (const ScenarioOp& op : step.ops) text += " " + describe(op);
    }
  }
  return text;
}

}  // namespace jax_ep
