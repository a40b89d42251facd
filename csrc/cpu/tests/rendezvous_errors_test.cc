// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <chrono>
#include <deque>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/cpu/rendezvous/rendezvous.h"
#include "csrc/cpu/tests/shift_ranks.h"

namespace jax_ep {
namespace {

using std::chrono::milliseconds;

class RendezvousErrors : public RendezvousFixture {
 protected:
  // Joins, with changes to the arrival.
  template <typename Change>
  Completion& join(ShiftRank& rank, const Change& change) {
    Rendezvous::Arrival arrival = rank.arrival();
    change(arrival);
    Completion& completion = completions_.emplace_back();
    site_->join(std::move(arrival), completion.done());
    return completion;
  }
  Completion& join(ShiftRank& rank) {
    return join(rank, [](Rendezvous::Arrival&) {});
  }
  Completion& join(ShiftRank& rank, milliseconds timeout) {
    return join(rank,
                [timeout](Rendezvous::Arrival& arrival) { arrival.group = shift_group(timeout); });
  }

  static void expect_error(Completion& completion, StatusCode code, const std::string& message) {
    const Status status = completion.wait();
    EXPECT_EQ(status.code(), code);
    EXPECT_EQ(status.message(), message);
  }

  void TearDown() override {
    site_.reset();
    RendezvousFixture::TearDown();
  }

  std::unique_ptr<Rendezvous> site_ = std::make_unique<Rendezvous>();
  std::deque<Completion> completions_;
};

TEST_F(RendezvousErrors, ARefusedRunFailsWhoWaitsAndWhoComes) {
  const Status error{StatusCode::kFailedPrecondition, "no rank on device 7"};
  std::deque<ShiftRank> all = ranks(3);
  Completion& first = join(all[0]);
  const int64_t run = all[0].arrival().run_id;
  site_->refuse_run(run, error);
  expect_error(first, error.code(), error.message());
  site_->refuse_run(run, {StatusCode::kInternal, "another one"});
  Completion& second = join(all[1]);
  EXPECT_TRUE(second.is_ready()) << "inside join";
  expect_error(second, error.code(), error.message());
  EXPECT_EQ(Rendezvous::num_pending(), 0);
  // Other runs of the site go on.
  join(all[2], [run](auto& a) { a.run_id = run + 1; });
  EXPECT_EQ(Rendezvous::num_pending(), 1);
}

TEST_F(RendezvousErrors, WhoseGroupWasClosedSinceItWasFoundOpensNoMeeting) {
  std::deque<ShiftRank> all = ranks(3);
  Completion& late = join(all[0], [](auto& a) { a.group->closed->store(true); });
  EXPECT_TRUE(late.is_ready()) << "inside join";
  EXPECT_EQ(late.wait().code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(Rendezvous::num_pending(), 0);
}

TEST_F(RendezvousErrors, ABadArrivalFailsAlone) {
  const auto expect_alone = [this](auto change, const std::string& message) {
    ShiftRank bad(0, 3, 1);
    Completion& completion = join(bad, change);
    EXPECT_TRUE(completion.is_ready()) << "inside join";
    expect_error(
        completion, StatusCode::kInvalidArgument, "EpGroup 3 (axis 'expert'), plan: " + message);
  };
  std::deque<ShiftRank> all = ranks(3);
  Completion& first = join(all[0]);
  expect_alone([](auto& a) { a.place.rank = 3; }, "rank is 3, but must be in [0, 3)");
  expect_alone([](auto& a) { a.place.rank = -1; }, "rank is -1, but must be in [0, 3)");
  expect_alone([](auto& a) { a.num_ranks = 0; }, "num_ranks is 0, but must be at least 1");
  EXPECT_EQ(Rendezvous::num_pending(), 1);
  Completion& second = join(all[1]);
  EXPECT_FALSE(second.is_ready());
  EXPECT_TRUE(join(all[2]).wait().ok());
  EXPECT_TRUE(first.wait().ok());
  EXPECT_TRUE(second.wait().ok());
}

TEST_F(RendezvousErrors, DifferentParametersFailAll) {
  std::deque<ShiftRank> all = ranks(4);
  for (int32_t rank = 0; rank < 4; ++rank) {
    join(all[rank], [rank](auto& arrival) {
      if (rank == 2) std::get<PlanOp>(arrival.call).shape.num_tokens = 5;
    });
  }
  for (Completion& completion : completions_) {
    expect_error(completion,
                 StatusCode::kInvalidArgument,
                 "EpGroup 3 (axis 'expert'), group_index 0, plan: ranks disagree: num_tokens is "
                 "1 on ranks 0,1,3 and 5 on rank 2");
  }
}

TEST_F(RendezvousErrors, DifferentOpsFailAll) {
  std::deque<ShiftRank> all = ranks(3);
  join(all[0]);
  join(all[1], [](auto& arrival) { arrival.call = CombineOp{}; });
  join(all[2]);
  for (Completion& completion : completions_) {
    expect_error(completion,
                 StatusCode::kInvalidArgument,
                 "EpGroup 3 (axis 'expert'), group_index 0, plan: ranks disagree: op is plan on "
                 "ranks 0,2 and combine on rank 1");
  }
}

TEST_F(RendezvousErrors, DifferentNumbersOfRanksFailAllAtOnceAndLater) {
  std::deque<ShiftRank> four = ranks(4);
  ShiftRank of_eight(6, 8, 1);
  join(four[0]);
  join(four[1]);
  join(of_eight);
  join(four[3]);  // late: the rendezvous has failed already
  ShiftRank other_of_eight(7, 8, 1);
  join(other_of_eight);
  for (Completion& completion : completions_) {
    expect_error(completion,
                 StatusCode::kInvalidArgument,
                 "EpGroup 3 (axis 'expert'), group_index 0, plan: ranks disagree: num_ranks is 4 "
                 "on ranks 0,1 and 8 on rank 6");
  }
  EXPECT_EQ(Rendezvous::num_pending(), 0);
}

TEST_F(RendezvousErrors, TheOperationsErrorReachesAll) {
  std::deque<ShiftRank> all = ranks(3);
  const int32_t bad = 17;
  for (int32_t rank = 0; rank < 3; ++rank) {
    join(all[rank], [&](auto& arrival) {
      arrival.place.group_index = 5;
      if (rank == 1) std::get<PlanOp>(arrival.call).topk_idx = &bad;
    });
  }
  for (Completion& completion : completions_) {
    expect_error(completion,
                 StatusCode::kInvalidArgument,
                 "EpGroup 3 (axis 'expert'), group_index 5, plan: rank 1: topk_idx[0, 0] is 17, "
                 "but must be -1 (no selection) or an expert in [0, 3)");
  }
}

const char* const kRank3Missing =
    "EpGroup 3 (axis 'expert'), group_index 0, plan: rank(s) 3 of 8 did not reach this plan "
    "within 0.15 s: their program failed, or runs a different program; look for an earlier error "
    "of theirs (rank(s) 0-2,4-7 came)";

TEST_F(RendezvousErrors, AMissingRankFailsTheOthersAtTheDeadlineAndItselfLater) {
  std::deque<ShiftRank> all = ranks(8);
  const auto start = std::chrono::steady_clock::now();
  for (const int32_t rank : {4, 0, 1, 2, 5, 6, 7}) join(all[rank], milliseconds(150));
  EXPECT_EQ(Rendezvous::num_pending(), 1);
  for (Completion& completion : completions_) {
    expect_error(completion, StatusCode::kDeadlineExceeded, kRank3Missing);
  }
  EXPECT_GE(std::chrono::steady_clock::now() - start, milliseconds(150));
  EXPECT_EQ(Rendezvous::num_pending(), 0);

  Completion& late = join(all[3]);
  EXPECT_TRUE(late.is_ready()) << "at once";
  expect_error(late, StatusCode::kDeadlineExceeded, kRank3Missing);

  // All have been told: the same run may meet here again.
  std::deque<ShiftRank> again = ranks(8);
  std::vector<Completion*> next;
  for (ShiftRank& rank : again) next.push_back(&join(rank));
  for (Completion* completion : next) EXPECT_TRUE(completion->wait().ok());
}

TEST_F(RendezvousErrors, ALateRankSkipsEveryMeetingItMissed) {
  std::deque<ShiftRank> all = ranks(2);
  std::deque<ShiftRank> more = ranks(2, 0);
  EXPECT_EQ(join(all[0], milliseconds(5)).wait().code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(join(all[0], milliseconds(5)).wait().code(), StatusCode::kDeadlineExceeded);
  Completion& open = join(more[0]);
  EXPECT_EQ(join(all[1]).wait().code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(join(all[1]).wait().code(), StatusCode::kDeadlineExceeded);
  EXPECT_FALSE(open.is_ready());
  EXPECT_TRUE(join(more[1]).wait().ok());
  EXPECT_TRUE(open.wait().ok());
  EXPECT_TRUE(more[0].is_right() && more[1].is_right());
}

TEST_F(RendezvousErrors, AFailureDoesNotTouchOtherRunsAndGroups) {
  std::deque<ShiftRank> all = ranks(2);
  std::deque<ShiftRank> other = ranks(2);
  const auto other_run = [](auto& arrival) { arrival.run_id = 2; };
  const auto other_group = [](auto& arrival) { arrival.place.group_index = 1; };
  EXPECT_EQ(join(all[0], milliseconds(5)).wait().code(), StatusCode::kDeadlineExceeded);
  for (ShiftRank& rank : other) join(rank, other_run);
  EXPECT_TRUE(completions_[1].wait().ok());
  EXPECT_TRUE(completions_[2].wait().ok());
  for (ShiftRank& rank : other) join(rank, other_group);
  EXPECT_TRUE(completions_[3].wait().ok());
  EXPECT_TRUE(completions_[4].wait().ok());
}

TEST_F(RendezvousErrors, ARankInTimeIsNotDisturbedByTheDeadline) {
  for (int round = 0; round < 20; ++round) {
    std::deque<ShiftRank> all = ranks(2, round);
    Completion& first = join(all[0], milliseconds(20));
    Completion& second = join(all[1], milliseconds(20));
    EXPECT_TRUE(first.wait().ok());
    EXPECT_TRUE(second.wait().ok());
  }
  std::this_thread::sleep_for(milliseconds(30));
}

// Arrivals and deadlines at the same moment: each rendezvous ends once, one way or the other.
TEST_F(RendezvousErrors, ArrivalsRaceWithTheDeadline) {
  int met = 0;
  for (int round = 0; round < 60; ++round) {
    std::deque<ShiftRank> all = ranks(2, round);
    Completion& first = join(all[0], milliseconds(2));
    std::this_thread::sleep_for(std::chrono::microseconds(1900 + 10 * (round % 30)));
    Completion& second = join(all[1], milliseconds(2));
    const Status status = first.wait();
    const Status other = second.wait();
    EXPECT_EQ(status.code(), other.code());
    EXPECT_EQ(status.message(), other.message());
    met += status.ok();
    EXPECT_TRUE(!status.ok() || all[0].is_right());
  }
  RecordProperty("met_in_time", met);
}

TEST_F(RendezvousErrors, ATimeoutOfAYearOrForeverIsFine) {
  std::deque<ShiftRank> all = ranks(2);
  join(all[0], to_milliseconds(365 * 86400.0));
  const double forever = std::numeric_limits<double>::infinity();
  EXPECT_TRUE(join(all[1], to_milliseconds(forever)).wait().ok());
  EXPECT_TRUE(completions_[0].wait().ok());
}

// What is kept for late ranks is bounded: of more failed rendezvous the oldest are forgotten, and a
// rank that late is taken for an early one.
TEST_F(RendezvousErrors, FailedMeetingsAreForgottenPastALimit) {
  constexpr int64_t kFailed = 70;
  ShiftRank first(0, 2, 1);
  ShiftRank second(1, 2, 1);
  const auto run = [](int64_t run_id) {
    return [run_id](auto& arrival) {
      arrival.run_id = run_id;
      arrival.group = shift_group(milliseconds(1));
    };
  };
  for (int64_t run_id = 0; run_id < kFailed; ++run_id) {
    ASSERT_EQ(join(first, run(run_id)).wait().code(), StatusCode::kDeadlineExceeded);
  }
  EXPECT_TRUE(join(second, run(kFailed - 1)).is_ready());
  EXPECT_TRUE(join(second, run(kFailed - 64)).is_ready());
  const Status forgotten = join(second, [](auto& arrival) {
                             arrival.run_id = 0;
                             arrival.group = shift_group(milliseconds(50));
                           }).wait();
  EXPECT_NE(forgotten.message().find("rank(s) 0 of 2 did not reach"), std::string::npos)
      << forgotten.message();
}

TEST_F(RendezvousErrors, AbandonedRanksGetAnError) {
  std::deque<ShiftRank> all = ranks(4);
  join(all[1]);
  join(all[3]);
  join(all[0], [](auto& arrival) { arrival.run_id = 9; });
  ShiftRank timed_out(0, 2, 1);
  Completion& told_before = join(timed_out, [](auto& arrival) {
    arrival.run_id = 10;
    arrival.group = shift_group(milliseconds(1));
  });
  EXPECT_EQ(told_before.wait().code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(Rendezvous::num_pending(), 2);
  site_.reset();
  EXPECT_EQ(Rendezvous::num_pending(), 0);
  const std::string abandoned =
      "EpGroup 3 (axis 'expert'), group_index 0, plan: the program was abandoned while rank(s) ";
  for (const size_t i : {0, 1}) {
    expect_error(completions_[i],
                 StatusCode::kFailedPrecondition,
                 abandoned + "1,3 waited for rank(s) 0,2 of 4");
  }
  expect_error(completions_[2],
               StatusCode::kFailedPrecondition,
               abandoned + "0 waited for rank(s) 1-3 of 4");
}

}  // namespace
}  // namespace jax_ep
