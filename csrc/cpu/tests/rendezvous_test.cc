// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rendezvous/rendezvous.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cfenv>
#include <deque>
#include <future>
#include <latch>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "csrc/cpu/tests/shift_ranks.h"

namespace jax_ep {
namespace {

class RendezvousTest : public RendezvousFixture {};

TEST_F(RendezvousTest, OneRankMeetsItselfInsideJoin) {
  Rendezvous site;
  ShiftRank rank(0, 1, 0);
  bool called = false;
  site.join(rank.arrival(), [&](const Status& status) {
    EXPECT_TRUE(status.ok()) << status.message();
    called = true;
  });
  EXPECT_TRUE(called);
  EXPECT_TRUE(rank.is_right());
}

TEST_F(RendezvousTest, TheLastRankIsToldInsideJoinTheOthersElsewhere) {
  constexpr int32_t kRanks = 5;
  Rendezvous site;
  std::deque<ShiftRank> all = ranks(kRanks);
  std::array<std::thread::id, kRanks> told_on;
  std::latch others_told(kRanks - 1);
  std::latch others_done(kRanks - 1);
  for (int32_t rank = 0; rank + 1 < kRanks; ++rank) {
    site.join(all[rank].arrival(), [&, rank](const Status& status) {
      EXPECT_TRUE(status.ok()) << status.message();
      told_on[rank] = std::this_thread::get_id();
      others_told.count_down();
      others_told.wait();  // each on a thread of its own, or this hangs
      others_done.count_down();
    });
    EXPECT_EQ(Rendezvous::num_pending(), 1);
    EXPECT_FALSE(others_told.try_wait());
  }
  bool last_told = false;
  site.join(all[kRanks - 1].arrival(), [&](const Status& status) {
    EXPECT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(Rendezvous::num_pending(), 0);
    told_on[kRanks - 1] = std::this_thread::get_id();
    last_told = true;
  });
  EXPECT_TRUE(last_told);
  EXPECT_EQ(told_on[kRanks - 1], std::this_thread::get_id());
  others_done.wait();  // nobody looks at `others_told` any more
  EXPECT_EQ(std::set(told_on.begin(), told_on.end()).size(), told_on.size());
  for (const ShiftRank& rank : all) EXPECT_TRUE(rank.is_right());
}

// As XLA does: the program of each rank goes on inside the callback, where it may wait for any
// other rank's program.
TEST_F(RendezvousTest, CallbacksMayWaitForOneAnother) {
  constexpr int32_t kRanks = 4;
  for (int32_t last = 0; last < kRanks; ++last) {
    Rendezvous site;
    std::deque<ShiftRank> all = ranks(kRanks);
    std::latch told(kRanks);
    std::latch finished(kRanks);
    for (int32_t i = 0; i < kRanks; ++i) {
      site.join(all[(last + 1 + i) % kRanks].arrival(), [&](const Status&) {
        told.arrive_and_wait();
        finished.count_down();
      });
    }
    finished.wait();
  }
}

TEST_F(RendezvousTest, ACallbackMayJoinAgain) {
  constexpr int32_t kRanks = 3;
  constexpr int kRounds = 20;
  Rendezvous site;
  std::deque<std::deque<ShiftRank>> rounds;
  for (int round = 0; round < kRounds; ++round) rounds.push_back(ranks(kRanks, round));
  std::latch finished(kRanks);
  const std::function<void(int32_t, int)> step = [&](int32_t rank, int round) {
    if (round == kRounds) return finished.count_down();
    site.join(rounds[round][rank].arrival(), [&, rank, round](const Status& status) {
      EXPECT_TRUE(status.ok()) << status.message();
      EXPECT_TRUE(rounds[round][rank].is_right());
      step(rank, round + 1);
    });
  };
  for (int32_t rank = 0; rank < kRanks; ++rank) step(rank, 0);
  finished.wait();
}

// A rank may run ahead: its arrivals wait in program order.
TEST_F(RendezvousTest, ArrivalsMeetInEachRanksOrder) {
  constexpr int32_t kRanks = 3;
  constexpr int kRounds = 6;
  Rendezvous site;
  std::deque<std::deque<ShiftRank>> rounds;
  std::deque<Completion> completions;
  for (int round = 0; round < kRounds; ++round) rounds.push_back(ranks(kRanks, round));
  for (const int32_t rank : {2, 0, 1}) {
    for (int round = 0; round < kRounds; ++round) {
      site.join(rounds[round][rank].arrival(), completions.emplace_back().done());
    }
    EXPECT_EQ(Rendezvous::num_pending(), rank == 1 ? 0 : kRounds);
  }
  for (Completion& completion : completions) EXPECT_TRUE(completion.wait().ok());
  for (const auto& round : rounds) {
    for (const ShiftRank& rank : round) EXPECT_TRUE(rank.is_right());
  }
}

TEST_F(RendezvousTest, RunsGroupsAndSitesDoNotMix) {
  constexpr int32_t kRanks = 2;
  Rendezvous site;
  Rendezvous other_site;
  struct Case {
    Rendezvous& site;
    int64_t run_id;
    int32_t group_index;
  };
  const std::vector<Case> cases = {{site, 1, 0}, {site, 1, 1}, {site, 2, 0}, {other_site, 1, 0}};
  std::deque<std::deque<ShiftRank>> all;
  std::deque<Completion> completions;
  for (size_t i = 0; i < cases.size(); ++i) {
    all.push_back(ranks(kRanks, static_cast<int32_t>(i)));
  }
  // All of rank 0, then all of rank 1 the other way round.
  for (size_t i = 0; i < cases.size(); ++i) {
    const Case& c = cases[i];
    c.site.join(all[i][0].arrival(c.run_id, c.group_index), completions.emplace_back().done());
  }
  EXPECT_EQ(Rendezvous::num_pending(), 4);
  for (size_t i = cases.size(); i-- > 0;) {
    const Case& c = cases[i];
    c.site.join(all[i][1].arrival(c.run_id, c.group_index), completions.emplace_back().done());
  }
  for (Completion& completion : completions) EXPECT_TRUE(completion.wait().ok());
  for (const auto& group : all) {
    for (const ShiftRank& rank : group) EXPECT_TRUE(rank.is_right());
  }
}

TEST_F(RendezvousTest, ManyThreadsManyGroupsManyRuns) {
  constexpr int32_t kRanks = 4;
  constexpr int kSites = 2;
  constexpr int kRuns = 2;
  constexpr int kGroups = 2;
  constexpr int kRounds = 40;
  std::array<Rendezvous, kSites> sites;
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int run = 0; run < kRuns; ++run) {
    for (int32_t group = 0; group < kGroups; ++group) {
      for (int32_t rank = 0; rank < kRanks; ++rank) {
        threads.emplace_back([&, run, group, rank] {
          for (int round = 0; round < kRounds; ++round) {
            for (int site = 0; site < kSites; ++site) {
              ShiftRank part(rank, kRanks, run + 3 * group + 5 * round + 7 * site);
              Completion completion;
              sites[site].join(part.arrival(run, group), completion.done());
              if (!completion.wait().ok() || !part.is_right()) ++wrong;
            }
          }
        });
      }
    }
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST_F(RendezvousTest, ACallbackMayDestroyTheRendezvous) {
  auto site = std::make_unique<Rendezvous>();
  std::deque<ShiftRank> all = ranks(2);
  Completion other;
  site->join(all[0].arrival(), other.done());
  site->join(all[1].arrival(), [&](const Status& status) {
    EXPECT_TRUE(status.ok());
    EXPECT_TRUE(other.wait().ok());
    site.reset();
  });
  EXPECT_EQ(site, nullptr);
}

TEST_F(RendezvousTest, CallbacksReleaseWhatTheyHold) {
  Rendezvous site;
  std::deque<ShiftRank> all = ranks(2);
  auto held = std::make_shared<int>(0);
  const std::weak_ptr<int> watched = held;
  Completion first;
  Completion second;
  site.join(all[0].arrival(), [held, done = first.done()](const Status& s) { done(s); });
  site.join(all[1].arrival(), [held, done = second.done()](const Status& s) { done(s); });
  held.reset();
  EXPECT_TRUE(first.wait().ok());
  EXPECT_TRUE(second.wait().ok());
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!watched.expired() && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::yield();
  }
  EXPECT_TRUE(watched.expired());
}

// The rank's program goes on with the modes of its own thread, wherever it goes on.
TEST_F(RendezvousTest, CallbacksSeeTheirRanksFloatingPointModes) {
  Rendezvous site;
  std::deque<ShiftRank> all = ranks(2);
  std::promise<int> rounding;
  ASSERT_EQ(std::fesetround(FE_DOWNWARD), 0);
  site.join(all[0].arrival(), [&](const Status&) { rounding.set_value(std::fegetround()); });
  ASSERT_EQ(std::fesetround(FE_TONEAREST), 0);
  site.join(all[1].arrival(), [](const Status&) { EXPECT_EQ(std::fegetround(), FE_TONEAREST); });
  EXPECT_EQ(rounding.get_future().get(), FE_DOWNWARD);
}

}  // namespace
}  // namespace jax_ep
