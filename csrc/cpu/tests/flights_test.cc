// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/flights/flights.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <future>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/core/notices.h"
#include "csrc/cpu/rendezvous/deadlines.h"

namespace jax_ep {
namespace {

using std::chrono::milliseconds;

GroupInfoPtr make_group(int32_t num_ranks = 2,
                        milliseconds timeout = std::chrono::seconds(120),
                        milliseconds warn_after = std::chrono::seconds(60)) {
  GroupInfo info{.id = 3,
                 .name = "EpGroup 3",
                 .num_ranks = num_ranks,
                 .warn_after = warn_after,
                 .timeout = timeout,
                 .places = {}};
  for (int32_t rank = 0; rank < num_ranks; ++rank) info.places[10 + rank] = {0, rank};
  return std::make_shared<const GroupInfo>(std::move(info));
}

// What a rank is told of its first half.
class Begun {
 public:
  struct Told {
    Status status;
    FlightNumber number = 0;
  };

  Flights::Started started() {
    return [promise = promise_](const Status& status, FlightNumber number) {
      promise->set_value({status, number});
    };
  }
  [[nodiscard]] bool is_told() const {
    return future_.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  }
  // Fails the test, rather than hanging it, if the callback does not come.
  Told wait() {
    if (future_.wait_for(std::chrono::seconds(120)) != std::future_status::ready) {
      return {{StatusCode::kInternal, "the callback did not come"}};
    }
    return future_.get();
  }
  FlightNumber number() {
    const Told told = wait();
    EXPECT_TRUE(told.status.ok()) << told.status.message();
    return told.number;
  }

 private:
  std::shared_ptr<std::promise<Told>> promise_ = std::make_shared<std::promise<Told>>();
  std::shared_future<Told> future_ = promise_->get_future().share();
};

class FlightsTest : public testing::Test {
 protected:
  void TearDown() override {
    group->flights->close();
    EXPECT_EQ(group->flights->num_open(), 0);
    EXPECT_EQ(Deadlines::shared().num_pending(), 0);
  }

  struct Site {
    int64_t site = 1;
    int64_t run_id = 1;
    FlightKind kind = FlightKind::kDispatch;
    bool counts = true;
  };
  Begun& start(int32_t rank, const Site& at) {
    Begun& begun = begun_.emplace_back();
    group->flights->start({.kind = at.kind,
                           .group = group,
                           .run_id = at.run_id,
                           .site = at.site,
                           .place = {0, rank},
                           .counts = at.counts,
                           .operands = {}},
                          begun.started());
    return begun;
  }
  // On all ranks.
  FlightNumber start_all(const Site& at) {
    FlightNumber number = 0;
    for (int32_t rank = 0; rank < group->num_ranks; ++rank) number = start(rank, at).number();
    return number;
  }
  Status take(FlightNumber number, int32_t rank, FlightKind kind = FlightKind::kDispatch) {
    StagedOperandsPtr operands;
    Status status = group->flights->take({kind, number, {0, rank}}, operands);
    EXPECT_EQ(status.ok(), operands != nullptr);
    return status;
  }
  static void expect_part(const Status& status, const std::string& part) {
    EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
  }

  GroupInfoPtr group = make_group();
  std::deque<Begun> begun_;
};

TEST_F(FlightsTest, ARankGetsBackACopyOfWhatItBrought) {
  std::vector<float> rows = {1, 2, 3, 4, 5, 6};
  const std::vector<int64_t> dims = {2, 3};
  const std::vector<int64_t> no_rows = {0, 3};
  Begun begun;
  group->flights->start(
      {.kind = FlightKind::kDispatch,
       .group = group,
       .run_id = 1,
       .site = 1,
       .place = {0, 1},
       .operands = {{.dtype = 7, .dims = dims, .bytes = std::as_bytes(std::span(rows))},
                    {.dtype = 8, .dims = no_rows, .bytes = {}}}},
      begun.started());
  ASSERT_TRUE(begun.is_told());  // nobody was waited for
  std::fill(rows.begin(), rows.end(), 0.0F);
  StagedOperandsPtr operands;
  const Status status =
      group->flights->take({FlightKind::kDispatch, begun.number(), {0, 1}}, operands);
  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(operands->views().size(), 2U);
  const OperandView& copy = operands->views()[0];
  EXPECT_EQ(copy.dtype, 7);
  EXPECT_TRUE(std::equal(copy.dims.begin(), copy.dims.end(), dims.begin(), dims.end()));
  ASSERT_EQ(copy.bytes.size(), 6 * sizeof(float));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(copy.bytes.data()) % 64, 0U);
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(reinterpret_cast<const float*>(copy.bytes.data())[i], static_cast<float>(i + 1));
  }
  EXPECT_EQ(operands->views()[1].dims[1], 3);
  EXPECT_TRUE(operands->views()[1].bytes.empty());
}

TEST_F(FlightsTest, AllRanksOfACallSiteAndARunHaveOneNumber) {
  const FlightNumber a = start(0, {.site = 1}).number();
  const FlightNumber b = start(0, {.site = 2}).number();
  EXPECT_NE(a, b);
  EXPECT_EQ(start(1, {.site = 2}).number(), b);
  EXPECT_EQ(start(1, {.site = 1}).number(), a);
  EXPECT_EQ(group->flights->num_open(), 2);
}

TEST_F(FlightsTest, InALoopEachRanksOrderCounts) {
  const FlightNumber first = start(0, {}).number();
  const FlightNumber second = start(0, {}).number();  // runs ahead
  EXPECT_NE(first, second);
  EXPECT_EQ(start(1, {}).number(), first);
  EXPECT_EQ(start(1, {}).number(), second);
}

TEST_F(FlightsTest, AFlightIsUsedOnce) {
  const FlightNumber number = start_all({});
  EXPECT_TRUE(take(number, 0).ok());
  expect_part(take(number, 0), "is used twice by rank 0; allowed: once");
  EXPECT_TRUE(take(number, 1).ok());
  group->flights->end(number, {});
  expect_part(take(number, 0), "was used before, by all ranks; allowed: once");
  EXPECT_EQ(group->flights->num_open(), 0);
}

TEST_F(FlightsTest, WhatIsNoFlightOfTheRankIsRefused) {
  const FlightNumber number = start(0, {}).number();
  expect_part(take(number, 1), "was not started by rank 1");
  expect_part(take(number, 0, FlightKind::kCombine),
              "is of dispatch_start; allowed: one of combine_start");
  StagedOperandsPtr operands;
  expect_part(group->flights->take({FlightKind::kDispatch, number, {1, 0}}, operands),
              "is of group_index 0; allowed: one of group_index 1");
  expect_part(take(0, 0), "flight 0 (a number that this process has not given) is not open");
  expect_part(take(number + 1000, 0), "is not open: it was used before, or is of another group");
  EXPECT_TRUE(take(number, 0).ok());  // none of it was counted
}

TEST_F(FlightsTest, AnErrorIsRemembered) {
  const FlightNumber number = start_all({});
  group->flights->end(number, Status::invalid_argument("bad rows"));
  expect_part(take(number, 0), "ended with an error: bad rows");
}

TEST_F(FlightsTest, AThirdFlightWaitsUntilOneEnds) {
  const FlightNumber a = start_all({.site = 1});
  const FlightNumber b = start_all({.site = 2});
  Begun& third = start(0, {.site = 3});
  EXPECT_FALSE(third.is_told());
  EXPECT_TRUE(take(a, 0).ok());
  EXPECT_FALSE(third.is_told());  // not for all ranks yet
  group->flights->end(a, {});
  const FlightNumber c = third.number();
  EXPECT_EQ(group->flights->num_open(), 2);
  EXPECT_TRUE(take(c, 0).ok());
  EXPECT_EQ(start(1, {.site = 3}).number(), c);
  EXPECT_TRUE(take(b, 0).ok());
}

// Each rank takes two of three independent flights first, and another two: whoever was first
// decides for all, so no rank holds what another one waits for.
TEST_F(FlightsTest, RanksInDifferentOrdersDoNotWaitForEachOther) {
  group = make_group(3);
  const int32_t orders[3][3] = {{1, 2, 3}, {2, 3, 1}, {3, 1, 2}};
  std::vector<std::vector<Begun*>> begun(4, std::vector<Begun*>(3));
  for (int32_t rank = 0; rank < 3; ++rank) {
    for (const int32_t site : orders[rank]) begun[site][rank] = &start(rank, {.site = site});
  }
  for (const int32_t site : {1, 2}) {
    for (Begun* rank : begun[site]) EXPECT_TRUE(rank->is_told());
  }
  for (const Begun* rank : begun[3]) EXPECT_FALSE(rank->is_told());
  group->flights->end(begun[2][0]->number(), {});
  const FlightNumber third = begun[3][0]->number();
  for (Begun* rank : begun[3]) EXPECT_EQ(rank->number(), third);
}

// Two runs that hold one flight each, and need another before they end it.
TEST_F(FlightsTest, ARunThatHasAFlightMayHaveTwoWhateverOthersHave) {
  start_all({.site = 1, .run_id = 1});
  start_all({.site = 1, .run_id = 2});
  const FlightNumber second = start_all({.site = 2, .run_id = 1});
  start_all({.site = 2, .run_id = 2});
  Begun& other = start(0, {.site = 1, .run_id = 3});
  EXPECT_FALSE(other.is_told());
  group->flights->end(second, {});
  EXPECT_FALSE(other.is_told());  // three are open
  group->flights->fail_run(2, 0, Status::invalid_argument("gone"));
  EXPECT_TRUE(other.wait().status.ok());
}

TEST_F(FlightsTest, FlightsThatDoNotCountAreInNobodysWay) {
  for (int64_t site = 1; site < 10; ++site) start_all({.site = site, .counts = false});
  start_all({.site = 10});
  start_all({.site = 11});
  EXPECT_FALSE(start(0, {.site = 12}).is_told());
  start_all({.site = 13, .counts = false});
}

TEST_F(FlightsTest, WhatManyFailedProgramsLeftBehindIsGivenUp) {
  const FlightNumber first = start_all({.run_id = 1, .counts = false});
  for (int64_t run = 2; run < 100; ++run) start_all({.run_id = run, .counts = false});
  expect_part(take(first, 0), "was given up: no rank came for it while many programs ran");
  EXPECT_LE(group->flights->num_open(), 70);
  EXPECT_GE(group->flights->num_open(), 60);
}

TEST_F(FlightsTest, GroupIndexesAreApart) {
  start_all({.site = 1});
  start_all({.site = 2});
  Begun begun;
  group->flights->start({.kind = FlightKind::kDispatch,
                         .group = group,
                         .run_id = 1,
                         .site = 1,
                         .place = {1, 0},
                         .operands = {}},
                        begun.started());
  EXPECT_TRUE(begun.is_told());
}

TEST_F(FlightsTest, AfterTheDeadlineTheOpenOnesAreNamedAndEnd) {
  group = make_group(2, milliseconds(80), milliseconds(1000));
  const FlightNumber a = start_all({.site = 1});
  const FlightNumber b = start_all({.site = 2, .kind = FlightKind::kCombine});
  EXPECT_TRUE(take(b, 1, FlightKind::kCombine).ok());
  Begun& third = start(1, {.site = 3});
  const Status error = third.wait().status;
  EXPECT_EQ(error.code(), StatusCode::kDeadlineExceeded);
  expect_part(error,
              "EpGroup 3, group_index 0, dispatch_start: rank(s) 1 waited, and within 0.08 s no "
              "open flight ended: flight ");
  expect_part(error, "(dispatch_start, done by no rank of 2), flight ");
  expect_part(error, "(combine_start, done by rank(s) 1 of 2); at most 2 may be open");
  // The late rank of the run is told the same, at once; and the group is not lost.
  const Status late = start(0, {.site = 3}).wait().status;
  EXPECT_EQ(late.message(), error.message());
  expect_part(take(a, 0), "was given up: rank(s) 1 waited for it in dispatch_start for 0.08 s");
  EXPECT_EQ(group->flights->num_open(), 0);
  start_all({.site = 1, .run_id = 2});
}

TEST_F(FlightsTest, WhatEndsGivesOthersTheirTimeAnew) {
  group = make_group(1, milliseconds(2000), milliseconds(100000));
  std::vector<FlightNumber> open = {start_all({.run_id = 1}), start_all({.run_id = 2})};
  Begun& third = start(0, {.run_id = 3});
  Begun& fourth = start(0, {.run_id = 4});
  std::this_thread::sleep_for(milliseconds(1200));
  group->flights->end(open[0], {});
  EXPECT_TRUE(third.wait().status.ok());
  std::this_thread::sleep_for(milliseconds(1200));
  EXPECT_FALSE(fourth.is_told());  // 2.4 s since it came, 1.2 since the others moved
  group->flights->end(open[1], {});
  EXPECT_TRUE(fourth.wait().status.ok());
}

TEST_F(FlightsTest, ALongWaitIsLoggedWithWhatIsOpen) {
  group = make_group(2, std::chrono::seconds(120), milliseconds(30));
  start_all({.site = 1});
  start_all({.site = 2});
  start(0, {.site = 3});
  start(1, {.site = 3});
  for (int i = 0; i < 2; ++i) {
    Notice notice = *Notices::shared().next();
    while (notice.level != NoticeLevel::kWarning) notice = *Notices::shared().next();  // of others
    expect_part({StatusCode::kInternal, notice.text},
                "EpGroup 3, group_index 0, dispatch_start: rank(s) 0");
    expect_part({StatusCode::kInternal, notice.text}, " for an open flight to end: flight ");
    expect_part({StatusCode::kInternal, notice.text}, "Giving up after 120 s");
  }
}

TEST_F(FlightsTest, AWaitSaysWhoHasNotFinished) {
  const FlightNumber a = start_all({.site = 1});
  start_all({.site = 2});
  EXPECT_TRUE(take(a, 0).ok());
  std::vector<Wait> waits;
  group->flights->add_waits(waits);
  EXPECT_TRUE(waits.empty());
  start(1, {.site = 3});
  group->flights->add_waits(waits);
  ASSERT_EQ(waits.size(), 1U);
  EXPECT_EQ(waits[0].op, "dispatch_start");
  ASSERT_EQ(waits[0].waiting.size(), 1U);
  EXPECT_EQ(waits[0].waiting[0].rank, 1);
  EXPECT_EQ(waits[0].waiting[0].device, 11);
  ASSERT_EQ(waits[0].missing.size(), 2U);  // of the second flight, both
  EXPECT_EQ(waits[0].missing[0].device, 10);
}

TEST_F(FlightsTest, WhatAFailedRunHasStartedEndsWithItsError) {
  const FlightNumber of_run = start_all({.site = 1, .run_id = 1});
  const FlightNumber of_other = start_all({.site = 1, .run_id = 2});
  Begun& waits = start(0, {.site = 1, .run_id = 3});
  group->flights->fail_run(1, 0, Status::invalid_argument("bad routing"));
  EXPECT_EQ(start(1, {.site = 5, .run_id = 1}).wait().status.message(), "bad routing");
  expect_part(take(of_run, 0), "ended with an error of its program: bad routing");
  EXPECT_TRUE(take(of_other, 0).ok());
  EXPECT_TRUE(waits.wait().status.ok());
}

TEST_F(FlightsTest, ClosingTheGroupEndsWhatIsOpenAndWhatWaits) {
  const FlightNumber a = start_all({.site = 1});
  start_all({.site = 2});
  Begun& third = start(0, {.site = 3});
  group->flights->close();
  expect_part(third.wait().status, "EpGroup 3 of this dispatch_start has been closed");
  EXPECT_EQ(start(1, {.site = 3}).wait().status.code(), StatusCode::kFailedPrecondition);
  expect_part(take(a, 0), "is not open");
  EXPECT_EQ(group->flights->num_open(), 0);
}

TEST_F(FlightsTest, ManyThreadsAndRuns) {
  constexpr int32_t kRanks = 4;
  constexpr int64_t kRuns = 200;
  group = make_group(kRanks);
  std::vector<std::vector<FlightNumber>> numbers(kRanks, std::vector<FlightNumber>(kRuns));
  std::vector<std::atomic<int32_t>> num_taken(kRuns);
  std::vector<std::thread> threads;
  for (int32_t rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {
      for (int64_t run = 0; run < kRuns; ++run) {
        Begun begun;
        group->flights->start({.kind = FlightKind::kDispatch,
                               .group = group,
                               .run_id = run,
                               .site = 1,
                               .place = {0, rank},
                               .operands = {}},
                              begun.started());
        numbers[rank][run] = begun.number();
        StagedOperandsPtr operands;
        EXPECT_TRUE(
            group->flights->take({FlightKind::kDispatch, numbers[rank][run], {0, rank}}, operands)
                .ok());
        if (++num_taken[run] == kRanks) group->flights->end(numbers[rank][run], {});
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int32_t rank = 1; rank < kRanks; ++rank) EXPECT_EQ(numbers[rank], numbers[0]);
  EXPECT_EQ(group->flights->num_open(), 0);
}

}  // namespace
}  // namespace jax_ep
