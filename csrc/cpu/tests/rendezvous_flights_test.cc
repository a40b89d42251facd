// SPDX-License-Identifier: Apache-2.0
// Second halves of exchanges: a rendezvous ends the flights that its ranks bring.
#include <gtest/gtest.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "csrc/cpu/flights/flights.h"
#include "csrc/cpu/rendezvous/rendezvous.h"
#include "csrc/cpu/tests/shift_ranks.h"

namespace jax_ep {
namespace {

class RendezvousFlights : public RendezvousFixture {
 protected:
  static constexpr int32_t kRanks = 3;

  void TearDown() override {
    group->flights->close();
    RendezvousFixture::TearDown();
  }

  // A rank's first half.
  FlightNumber start(int32_t rank, int64_t site = 1, int64_t run_id = 1) {
    FlightNumber number = 0;
    group->flights->start({.kind = FlightKind::kDispatch,
                           .group = group,
                           .run_id = run_id,
                           .site = site,
                           .place = {0, rank},
                           .operands = {}},
                          [&](const Status& status, FlightNumber given) {
                            EXPECT_TRUE(status.ok()) << status.message();
                            number = given;
                          });
    return number;
  }
  FlightNumber start_all(int64_t site = 1) {
    FlightNumber number = 0;
    for (int32_t rank = 0; rank < kRanks; ++rank) number = start(rank, site);
    return number;
  }

  // A rank's second half.
  Completion& done(Rendezvous& site, ShiftRank& rank, FlightNumber number) {
    Rendezvous::Arrival arrival = rank.arrival();
    arrival.group = group;
    TakenFlight flight{.kind = FlightKind::kDispatch, .number = number};
    arrival.refusal = group->flights->take({flight.kind, number, arrival.place}, flight.operands);
    taken.push_back(flight.operands);
    arrival.flight = std::move(flight);
    Completion& completion = completions.emplace_back();
    site.join(std::move(arrival), completion.done());
    return completion;
  }

  static void expect_part(const Status& status, const std::string& part) {
    EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
  }

  GroupInfoPtr group = shift_group();
  std::deque<ShiftRank> all = ranks(kRanks);
  std::deque<Completion> completions;
  std::vector<std::weak_ptr<const StagedOperands>> taken;
};

TEST_F(RendezvousFlights, TheOperationEndsTheFlightAndFreesWhatWasBrought) {
  Rendezvous site;
  const FlightNumber number = start_all();
  for (ShiftRank& rank : all) done(site, rank, number);
  for (Completion& completion : completions) EXPECT_TRUE(completion.wait().ok());
  for (const ShiftRank& rank : all) EXPECT_TRUE(rank.is_right());
  EXPECT_EQ(group->flights->num_open(), 0);
  for (const auto& operands : taken) EXPECT_TRUE(operands.expired());
}

TEST_F(RendezvousFlights, WhatWasBroughtIsThereUntilAllRanksHaveCome) {
  Rendezvous site;
  const FlightNumber number = start_all();
  done(site, all[0], number);
  EXPECT_FALSE(taken[0].expired());
  done(site, all[1], number);
  done(site, all[2], number);
  for (Completion& completion : completions) EXPECT_TRUE(completion.wait().ok());
}

TEST_F(RendezvousFlights, RanksThatBringDifferentFlightsAreNamed) {
  Rendezvous site;
  const FlightNumber a = start_all(1);
  const FlightNumber b = start_all(2);
  done(site, all[0], a);
  done(site, all[1], b);
  done(site, all[2], a);
  for (Completion& completion : completions) {
    const Status status = completion.wait();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    expect_part(status, "group_index 0, dispatch_done: ranks disagree: flight is ");
    expect_part(status, " on ranks 0,2 and ");
    expect_part(status, " on rank 1");
  }
  EXPECT_EQ(group->flights->num_open(), 0);  // of a failed run
}

TEST_F(RendezvousFlights, AStaleTicketFailsAllRanksAndItsRun) {
  Rendezvous site;
  const FlightNumber number = start_all();
  start_all(2);
  done(site, all[0], number);
  done(site, all[1], number + 1000);
  done(site, all[2], number);
  for (Completion& completion : completions) {
    const Status status = completion.wait();
    expect_part(status, "dispatch_done: flight ");
    expect_part(status, " is not open: it was used before");
  }
  EXPECT_EQ(group->flights->num_open(), 0);
}

TEST_F(RendezvousFlights, AClosedGroupEndsThem) {
  Rendezvous site;
  const FlightNumber number = start_all();
  Completion& waits = done(site, all[0], number);
  Rendezvous::close_group(group->id);
  group->flights->close();
  expect_part(waits.wait(), "dispatch_done: the group was closed while rank(s) 0 waited");
  EXPECT_TRUE(taken[0].expired());
}

TEST_F(RendezvousFlights, AnAbandonedProgramEndsThem) {
  const FlightNumber number = start_all();
  Completion* waits = nullptr;
  {
    Rendezvous site;
    waits = &done(site, all[0], number);
  }
  expect_part(waits->wait(), "dispatch_done: the program was abandoned");
  EXPECT_EQ(group->flights->num_open(), 0);
}

}  // namespace
}  // namespace jax_ep
