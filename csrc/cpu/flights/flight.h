// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_FLIGHTS_FLIGHT_H_
#define JAX_EP_CSRC_CPU_FLIGHTS_FLIGHT_H_

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "csrc/core/status.h"
#include "csrc/cpu/flights/flights.h"
#include "csrc/cpu/float_env.h"
#include "csrc/cpu/rendezvous/deadlines.h"

namespace jax_ep {

// A number that no flight of this process has had.
FlightNumber next_flight_number();
// "flight 7", for messages.
std::string flight_name(FlightNumber number);

// One flight, open or waiting until it may be. Guarded by its group's Flights.
class Flight {
 public:
  using Clock = Deadlines::Clock;

  // A rank that waits until the flight is open.
  struct Waiter {
    Flights::Start start;
    FloatEnv float_env;
    Flights::Started started;
  };

  // Begun by its first rank.
  explicit Flight(const Flights::Start& first);

  [[nodiscard]] FlightNumber number() const { return number_; }
  [[nodiscard]] int64_t run_id() const { return run_id_; }
  [[nodiscard]] int32_t group_index() const { return group_index_; }
  [[nodiscard]] bool counts() const { return counts_; }
  [[nodiscard]] bool is_open() const { return is_open_; }
  // Whether it is the one of this first half, but for others of the same loop.
  [[nodiscard]] bool is_of(const Flights::Start& start) const;
  // Whether the rank has begun.
  [[nodiscard]] bool has(int32_t rank) const;

  void begin(int32_t rank) { parts_[static_cast<size_t>(rank)].state = State::kBegun; }
  void stage(int32_t rank, StagedOperandsPtr operands);
  // See Flights::take.
  Status take(const Flights::Done& done, StagedOperandsPtr& operands);

  // Ranks wait, from now on or again: what they wait for has moved.
  void wait(std::chrono::milliseconds warn_after, std::chrono::milliseconds timeout);
  void restart_wait() { wait(warn_after_, timeout_); }
  // The flight is open; returns the ranks that waited.
  std::vector<Waiter> open();
  std::vector<Waiter> take_waiters();

  [[nodiscard]] Clock::time_point next_alarm() const;
  [[nodiscard]] bool is_past_deadline() const { return Clock::now() >= since_ + timeout_; }
  [[nodiscard]] bool is_past_warning() const { return Clock::now() >= since_ + next_warning_; }
  // The log has been told; it will be again after twice the time.
  void warned() { next_warning_ *= 2; }

  // "flight 7 (dispatch_start, done by rank(s) 0,1 of 4)".
  [[nodiscard]] std::string description() const;
  // Ranks that have not taken what they brought.
  [[nodiscard]] std::vector<int32_t> ranks_not_done() const;
  // Of a flight that waits: who waits for whom, given the ranks that finish none of the open ones.
  [[nodiscard]] Wait wait_for(const std::vector<int32_t>& missing) const;
  // The warning, and the error at the deadline, given the descriptions of the open ones.
  [[nodiscard]] std::string warning(const std::string& open) const;
  [[nodiscard]] Status none_ended(const std::string& open) const;
  // Why others ended at that deadline.
  [[nodiscard]] std::string gave_up() const;

  std::vector<Waiter> waiters;
  Deadlines::Ticket alarm;  // set while it waits

 private:
  enum class State { kMissing, kBegun, kDone };
  struct Part {
    State state = State::kMissing;
    StagedOperandsPtr operands;
  };
  [[nodiscard]] std::vector<int32_t> ranks_that_wait() const;
  [[nodiscard]] std::string context() const;

  FlightNumber number_ = next_flight_number();
  FlightKind kind_;
  int64_t run_id_;
  int64_t site_;
  int32_t group_index_;
  std::string group_name_;
  RankSet ranks_;
  bool counts_;
  bool is_open_ = false;
  std::vector<Part> parts_;  // by rank
  Clock::time_point since_;
  std::chrono::milliseconds warn_after_{};
  std::chrono::milliseconds next_warning_{};
  std::chrono::milliseconds timeout_{};
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_FLIGHTS_FLIGHT_H_
