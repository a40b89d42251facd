// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_RENDEZVOUS_RENDEZVOUS_H_
#define JAX_EP_CSRC_CPU_RENDEZVOUS_RENDEZVOUS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "csrc/core/status.h"
#include "csrc/cpu/calls.h"
#include "csrc/cpu/flights/flights.h"
#include "csrc/cpu/group_registry.h"
#include "csrc/cpu/rendezvous/rank_set.h"
#include "csrc/cpu/rendezvous/waits.h"

namespace jax_ep {

// What a rank's second half of an exchange has taken (see csrc/cpu/flights/flights.h). Its call
// points to the operands.
struct TakenFlight {
  FlightKind kind = FlightKind::kDispatch;
  FlightNumber number = 0;
  StagedOperandsPtr operands = {};
};

// Where the ranks of one call site meet. One object per custom call of a compiled program,
// shared by all devices that run the program; so calls of different sites can never be
// mistaken for each other, in whatever order each device's scheduler runs them.
//
// Ranks of one execution (`run_id`) and one EP group (`group_index`: the position along the mesh's
// other axes) meet; a site inside a loop is met repeatedly by each rank, in program order, so an
// arrival joins the oldest open rendezvous that lacks its rank. Ranks that are to meet have one
// mask of ranks, and those of that mask come to every visit that has it: so it is the oldest one of
// its mask, and a rank that its own mask leaves out meets nobody. Ranks that wait for each other
// under different masks are told so. That pairs arrivals of one visit only because (group_index,
// rank) is one device's alone: it comes from the group's table of devices, and not from what a
// program computes, which may say the same on devices that run apart.
class Rendezvous {
 public:
  struct Arrival {
    int64_t run_id = 0;
    GroupInfoPtr group = nullptr;
    int32_t device = 0;    // its ordinal
    RankPlace place = {};  // of the device
    int32_t num_ranks = 1;
    Call call = {};
    std::optional<TakenFlight> flight = {};  // of a second half
    Status refusal = {};  // not OK: the rank cannot take part, and no rank of the rendezvous will
  };
  // Called exactly once. Where the rendezvous completes inside join(), the last arriver's callback
  // runs on its own thread before join() returns; every other callback runs on a thread of the
  // library that runs nothing else meanwhile, because XLA continues the waiting device's program
  // inside it, and that may block.
  using Done = std::function<void(const Status&)>;

  Rendezvous();
  // No rank is waiting when it is destroyed, unless the program was abandoned: then each waiting
  // rank gets an error.
  ~Rendezvous();
  Rendezvous(const Rendezvous&) = delete;
  Rendezvous& operator=(const Rendezvous&) = delete;

  // Never blocks for another rank. The last rank to arrive checks that all agree and executes
  // the operation for all (on its thread and the workers'). If a rank has not come when the
  // rendezvous's deadline (its first arrival + timeout) passes, those that did get DeadlineExceeded
  // naming the missing ranks, and so does a rank that comes later, at once. What fails, and what
  // takes longer than the group's warn_after, is also posted to Notices.
  //
  // Where the ops say which ranks are missing, those that came go on without the others instead, at
  // the deadline or when all of these are given up; a rank that comes later runs alone, at once.
  void join(Arrival arrival, Done done);

  // A rank of this run cannot take part, nor say which rank it is: fails the run's rendezvous here,
  // those that are open and those to come. Posted to Notices, once for each run.
  void refuse_run(int64_t run_id, const Status& error);

  // Fails the open rendezvous of a group that has been closed, in all rendezvous of the process:
  // those of its ranks that have not come will be refused.
  static void close_group(int64_t group_id);
  // Ranks of a group have been given up (see GroupInfo): ends the waits, in all rendezvous of the
  // process, that are for them alone.
  static void end_waits(int64_t group_id);
  // Those that wait now, over all rendezvous of the process, and ranks that wait to begin a flight.
  static std::vector<Wait> waits();

  // Rendezvous that lack a rank now, over all rendezvous of the process (for tests and leak
  // checks).
  static int64_t num_pending();
  // Rendezvous alive in the process (for tests and leak checks).
  static int64_t num_alive();

 private:
  struct Impl;
  struct Everywhere;
  std::shared_ptr<Impl> impl_;
};

// The ranks that take part in an arrival's call.
RankSet ranks_of(const Rendezvous::Arrival& arrival);

// Whether its op says which ranks were missing, where others fail.
bool masks_missing_ranks(const Rendezvous::Arrival& arrival);

// The operation's name in messages: of a second half its own.
std::string_view op_name(const Rendezvous::Arrival& arrival);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_RENDEZVOUS_RENDEZVOUS_H_
