// SPDX-License-Identifier: Apache-2.0
// Exchanges in halves: what lies between them.
#ifndef JAX_EP_CSRC_CPU_FLIGHTS_FLIGHTS_H_
#define JAX_EP_CSRC_CPU_FLIGHTS_FLIGHTS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "csrc/core/status.h"
#include "csrc/cpu/flights/staged_operands.h"
#include "csrc/cpu/group_registry.h"
#include "csrc/cpu/rendezvous/rank_set.h"
#include "csrc/cpu/rendezvous/waits.h"

namespace jax_ep {

// Which operation is in halves.
enum class FlightKind { kDispatch, kCombine };
constexpr std::string_view start_name(FlightKind kind) {
  return kind == FlightKind::kDispatch ? "dispatch_start" : "combine_start";
}
constexpr std::string_view done_name(FlightKind kind) {
  return kind == FlightKind::kDispatch ? "dispatch_done" : "combine_done";
}

// Names a flight; never 0, and never given twice. Processes begin at random ones, so that one that
// came from another process names no flight of this one.
using FlightNumber = uint64_t;

// The flights of one EP group. A flight is one exchange of all ranks whose first half some rank has
// begun and whose second half has not ended: each rank's operands lie here meanwhile.
//
// The ranks' first halves belong to one flight as calls belong to one rendezvous: by call site, run
// and group index, and in a loop by each rank's order among those of its mask. So all ranks that
// take part get one number for it. A rank that takes no part has flights of its own.
//
// At most kMaxOpen flights of a run are open, of those that count. A flight is admitted for all
// ranks when its first rank comes, else it waits: if each rank took what is free, ranks that run
// independent exchanges in different orders could each hold what another one waits for. For the
// same reason a run that has an open flight may have another, whatever other runs have; one that
// has none waits until fewer than kMaxOpen of the group are. Flights that do not count are open at
// once, and in nobody's way: those of a layer, which may be begun before those of another layer
// end, as XLA likes.
class Flights {
 public:
  static constexpr int32_t kMaxOpen = 2;

  // A rank's first half.
  struct Start {
    FlightKind kind = FlightKind::kDispatch;
    GroupInfoPtr group;
    int64_t run_id = 0;
    int64_t site = 0;  // of the call; the same in all runs of a program, and no other call's
    RankPlace place;
    RankSet ranks = {};                 // that take part; this one does
    bool counts = true;                 // among the open flights; the same on all ranks
    std::vector<OperandView> operands;  // there until the rank is told
  };
  // Called once, with the flight's number: inside start() if the flight is open, else later on a
  // thread of the library that runs nothing else meanwhile.
  using Started = std::function<void(const Status&, FlightNumber)>;

  // A rank's second half.
  struct Done {
    FlightKind kind = FlightKind::kDispatch;
    FlightNumber number = 0;
    RankPlace place;
  };

  Flights();
  ~Flights();
  Flights(const Flights&) = delete;
  Flights& operator=(const Flights&) = delete;

  // Never blocks. Where the flight is not open before the group's timeout has passed without any
  // flight ending, its ranks get DeadlineExceeded that names the open ones, and those end too: who
  // should have finished them is lost. What takes longer than the group's warn_after is posted to
  // Notices.
  void start(Start start, Started started);

  // Hands out what the rank brought, once. FailedPrecondition that says why not: the flight has
  // ended, was never started, is another operation's, or another group's.
  Status take(const Done& done, StagedOperandsPtr& operands);

  // A flight's second half has ended for all ranks, well or not.
  void end(FlightNumber number, const Status& outcome);

  // The ranks' programs have failed, those of one group index or of all: what they have started
  // ends with the error, and what they start later is told the same.
  void fail_run(int64_t run_id, std::optional<int32_t> group_index, const Status& error);

  // The group has been closed.
  void close();

  // First halves that wait now are added.
  void add_waits(std::vector<Wait>& waits) const;

  // Open flights (for tests and leak checks).
  [[nodiscard]] int64_t num_open() const;

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_FLIGHTS_FLIGHTS_H_
