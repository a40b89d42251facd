// SPDX-License-Identifier: Apache-2.0
// Scenarios: what the ranks of one or two groups do back to back on the same heaps, drawn from a
// seed.
#ifndef JAX_EP_CSRC_TESTING_SCENARIO_H_
#define JAX_EP_CSRC_TESTING_SCENARIO_H_

#include <cstdint>
#include <string>
#include <vector>

#include "csrc/core/kernel_params.h"
#include "csrc/testing/cluster.h"

namespace jax_ep {

// An operation of a step, or half of one: of halves with the same number, the second receives what
// the first one sent. Calls that are no low-latency ones are in one piece: the first half is all.
struct ScenarioOp {
  // Not explicit: most operations are in one piece.
  ScenarioOp(OpKind kind, Half half = Half::kBoth, int32_t flight = 0)  // NOLINT
      : kind(kind), half(half), flight(flight) {}
  bool operator==(const ScenarioOp&) const = default;

  OpKind kind;
  Half half;
  int32_t flight;  // below KernelArrays::kMaxFlights
};
std::string describe(const ScenarioOp& op);

// One problem, and the operations that are run on it, the plan first.
struct ScenarioStep {
  ClusterOptions options;
  RowFormat x_format = RowFormat::kDType;
  RowFormat rows_format = RowFormat::kDType;
  std::vector<ScenarioOp> ops = {OpKind::kPlan, OpKind::kDispatch, OpKind::kCombine};
};

// What the ranks of a group do, one step after the other.
struct GroupScenario {
  int64_t max_tokens = 1;
  int32_t chunk_target = kChunkTarget;  // few: chunks of several tokens, though batches are small
  int64_t low_latency_tokens = 0;       // calls of at most so many tokens are low-latency ones
  int32_t num_domains = 1;              // more: there is a network between them
  int32_t rail_chunk_tokens = 32;       // and the following: as in NetworkShape
  int32_t window = 3;
  int32_t gather_units = 32;
  int32_t low_latency_chunk = 1;
  bool plans_by_counts = false;     // of several domains
  std::vector<ScenarioStep> steps;  // all with the same rank absent, if one is
};

// What goes wrong in a scenario, with its last operation.
enum class Mishap {
  kNone,
  kMissing,          // `rank` never runs it: the others must give up and name the rank
  kOneImpatient,     // likewise, and no rank but one gives up by itself: it must tell the others
  kLate,             // `rank` runs it after the others have waited for long: they must report it
  kOtherOp,          // it is `other_op` on `rank`
  kOtherCallSite,    // on `rank` it stands at another place of the program
  kOtherTokens,      // on `rank` it has one token less
  kOverlap,          // it runs twice at the same time, on two streams
  kHostileHandle,    // it gets a handle that no plan made: it may do anything but leave its buffers
  kClosed,           // the group has been closed: it must not touch the heap, and leave no results
  kClosedMeanwhile,  // `rank` never runs it, and the group is closed while rank 0 waits for it
  kWrongRank,        // on `rank` the program says another one: it must send nothing as either
  kWrongFlight,      // it is a second half, and the flight of its ticket is not open
  kStoodStill,       // instead, rank 0 waits for `rank`, which comes while it stands still
};

struct Scenario {
  std::vector<GroupScenario> groups;  // each on a stream of its own, of the same ranks
  uint32_t blocks = 2;                // of every kernel
  uint32_t tail_blocks = 0;           // of dispatch, more
  bool check_races = true;
  uint32_t first_epoch = 0;  // exchanges that the groups have behind them, all without tokens
  // All packets, and words of messages to far ranks, are from the exchange that had this one's flag
  // before; 0: there are none.
  uint32_t stale_packets = 0;
  // Messages to each other domain that the groups have behind them.
  uint64_t first_message = 0;
  Mishap mishap = Mishap::kNone;
  int32_t rank = 1;  // of the mishap
  OpKind other_op = OpKind::kPlan;
};

// Sizes to draw from.
struct ScenarioLimits {
  std::vector<int32_t> num_ranks = {1, 2, 3, 4, 8};
  int64_t max_tokens = 20;
  int32_t steps = 3;
  int32_t groups = 1;
  bool low_latency = false;      // most calls by the low-latency kernels
  bool masks = false;            // most steps without some ranks, each without others
  bool internode = false;        // several domains; num_ranks is not looked at. Both may be
  bool plans_by_counts = false;  // where there are several domains
  std::vector<DType> dtypes = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
};
Scenario random_scenario(uint64_t seed, const ScenarioLimits& limits);

const char* name(Mishap mishap);
std::string describe(const Scenario& scenario);

// The rank that the program says where Mishap::kWrongRank is: one that there is.
int32_t said_rank(const Scenario& scenario);

// The heaps that a group's steps need; the second, where there are several domains.
HeapShape heap_shape(const GroupScenario& scenario);
NetworkShape network_shape(const GroupScenario& scenario);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_TESTING_SCENARIO_H_
