// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_RENDEZVOUS_PENDING_RENDEZVOUS_H_
#define JAX_EP_CSRC_CPU_RENDEZVOUS_PENDING_RENDEZVOUS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/core/status.h"
#include "csrc/cpu/calls.h"
#include "csrc/cpu/float_env.h"
#include "csrc/cpu/rendezvous/deadlines.h"
#include "csrc/cpu/rendezvous/rank_set.h"
#include "csrc/cpu/rendezvous/rendezvous.h"
#include "csrc/cpu/rendezvous/waits.h"

namespace jax_ep {

// A rank that has come, and how to tell it how the rendezvous ended.
struct Waiter {
  int32_t rank;
  FloatEnv float_env;
  Rendezvous::Done done;
};

// One rendezvous of a group's ranks at one call site: those that have come and, once it has
// failed, the error for those that have not. Guarded by its rendezvous.
class PendingRendezvous {
 public:
  using Clock = Deadlines::Clock;

  // Opened by its first arrival, whose word on the group counts.
  explicit PendingRendezvous(const Rendezvous::Arrival& first);

  [[nodiscard]] bool has(int32_t rank) const;
  // Whether it is for an arrival, which has not come: of its mask, or one of those have failed.
  [[nodiscard]] bool lacks(const Rendezvous::Arrival& arrival) const;
  // Whether each waits for a rank that is here in the other one.
  [[nodiscard]] bool waits_with(const PendingRendezvous& other) const;
  [[nodiscard]] bool is_complete() const { return num_arrived_ >= num_expected_; }
  // Whether those that have come go on without the others at the deadline; else all fail.
  [[nodiscard]] bool masks_missing() const { return masks_missing_; }
  // Whether it goes on without all that have not come, because they are given up.
  [[nodiscard]] bool awaits_nobody() const;
  [[nodiscard]] bool has_gone_on() const { return has_gone_on_; }
  [[nodiscard]] int32_t num_ranks() const { return num_ranks_; }
  [[nodiscard]] const GroupInfo& group() const { return *group_; }

  // The rank has come, and waits.
  void add(Rendezvous::Arrival arrival, Rendezvous::Done done);
  // The rank has come, and was told of the failure. It may know of more ranks than the first
  // arrival did: ranks that disagree about their number are such a failure.
  void add_late(const Rendezvous::Arrival& arrival);

  // "EpGroup 3 (axis 'expert'), group_index 0, dispatch: ", for messages.
  [[nodiscard]] std::string context() const;
  // Who waits for whom now.
  [[nodiscard]] Wait wait() const;

  // When somebody is to be told next that ranks are missing: first the log, then the ranks.
  [[nodiscard]] Clock::time_point next_alarm() const;
  [[nodiscard]] bool is_past_deadline() const { return Clock::now() >= deadline_; }
  // The log has been told; it will be again after twice the time.
  void warned();
  // The warning, given the root cause.
  [[nodiscard]] std::string warning(const std::string& root_cause) const;
  // What the log is told of an end that came after a warning; nothing if there was none.
  [[nodiscard]] std::optional<std::string> came_after_warning() const;

  [[nodiscard]] const RankSet& mask() const { return mask_; }
  // Of those that take part, who has not come.
  [[nodiscard]] std::vector<int32_t> missing() const { return ranks_where(false); }
  // It ends without them: the ranks that wait, to be told how.
  std::vector<Waiter> go_on();
  // What the log is told of an end without them at the deadline.
  [[nodiscard]] std::string gone_on() const;

  // The error if ranks are missing at the deadline.
  [[nodiscard]] Status missing_ranks() const;
  // The error if `arrival` says another number of ranks.
  [[nodiscard]] Status other_num_ranks(const Rendezvous::Arrival& arrival) const;
  // The error if this one `waits_with` the other.
  [[nodiscard]] Status other_mask(const PendingRendezvous& other) const;
  // The error if `arrival` cannot take part.
  [[nodiscard]] Status refused(const Rendezvous::Arrival& arrival) const;
  // The error if the rendezvous goes away first, or the group is closed.
  [[nodiscard]] Status abandoned(std::string_view what) const;

  // From now on late ranks get `error`. Returns the ranks that wait; forgets their calls, and ends
  // their flights.
  std::vector<Waiter> fail(Status error);
  [[nodiscard]] const std::optional<Status>& failure() const { return failure_; }

  // Of a complete rendezvous: `calls` of all ranks, in order.
  [[nodiscard]] const std::vector<Call>& calls() const { return calls_; }
  std::vector<Waiter> take_waiters();

  // OK if this is no second half, or that of one flight on all ranks that are here.
  [[nodiscard]] Status check_flights() const;
  // The flights of the ranks that are here, if any, have ended.
  void end_flights(const Status& outcome) const;

  Deadlines::Ticket alarm;  // set while it is open

 private:
  // Of those that take part: who has arrived, or who has not.
  [[nodiscard]] std::vector<int32_t> ranks_where(bool arrived) const;
  [[nodiscard]] bool expects(int32_t rank) const { return mask_.has(rank); }
  [[nodiscard]] std::string seconds_waited() const;

  GroupInfoPtr group_;
  int32_t group_index_;
  std::string_view op_name_;
  Clock::time_point opened_ = Clock::now();
  Clock::time_point deadline_;
  std::chrono::milliseconds next_warning_;  // since it was opened
  std::vector<int32_t> missing_at_warning_;
  int32_t num_ranks_;
  int32_t num_arrived_ = 0;
  bool masks_missing_;
  bool has_gone_on_ = false;
  RankSet mask_;
  int32_t num_expected_;
  std::vector<bool> arrived_;
  std::vector<int32_t> devices_;  // of the ranks that are here
  std::vector<Call> calls_;
  std::vector<std::optional<TakenFlight>> flights_;
  std::vector<Waiter> waiters_;
  std::optional<Status> failure_;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_RENDEZVOUS_PENDING_RENDEZVOUS_H_
