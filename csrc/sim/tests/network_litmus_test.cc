// SPDX-License-Identifier: Apache-2.0
// Litmus programs of the contract of transports (csrc/device/transport/transport.h): what a kernel
// may rely on, on the simulator's network and over mapped memory, and what it may not.
#include <gtest/gtest.h>

#include "csrc/device/transport/loopback_transport.h"
#include "csrc/device/transport/simulated_transport.h"
#include "csrc/sim/tests/outcomes.h"

namespace jax_ep::sim {
namespace {

using namespace dev;  // NOLINT: litmus programs should read like kernels

constexpr Scope kSys = Scope::kSys;

// Each rank on a node of its own.
Config on_nodes(u32 ranks_per_node = 1) {
  Config config = litmus_config();
  config.ranks_per_node = ranks_per_node;
  return config;
}

struct OverNetwork {
  using Transport = SimulatedTransport;
  static Config config() { return on_nodes(); }
};
struct OverLoopback {
  using Transport = LoopbackTransport;
  static Config config() { return litmus_config(); }
};

template <typename T>
T transport() {
  T made{};
  for (u32 r = 0; r < litmus_config().num_ranks; ++r) made.heap[r] = litmus->machine().memory(r);
  made.rank = static_cast<i32>(self().rank);
  return made;
}

// Where word i lies in a heap, and its signals: 0, then 1.
constexpr i64 at(u32 i) { return 16 * i64{i}; }
constexpr NetworkSignal signal_in(u32 i) { return {at(i), 0, 1}; }
Ptr<u64> signal_word(u32 rank, u32 i) { return as<u64>(word(rank, i)); }

// One thread: until the signal in word i of this rank.
template <typename T>
void wait_signal(u32 i, u64 value = 1) {
  const Ptr<u64> word = signal_word(self().rank, i);
  while (ld_acquire<kSys>(word) != value) spin_pause("signal");
  transport<T>().acquired(word);
}

bool is_warp(Who who, u32 rank) { return who.rank == rank && who.block == 0 && who.thread < 32; }

// Rank 0 sends word 0 to rank 1, and signals in word 1.
template <typename T>
void send_seven() {
  if (lane_id() == 0) st(word(0, 0), 7U);
  warp_sync();
  transport<T>().put_and_signal(1, at(0), at(0), 16, signal_in(1));
}
// Rank 1, one thread.
template <typename T>
void receive_seven() {
  wait_signal<T>(1);
  seen.a = ld(word(1, 0));
}

template <typename Over>
class TransportContract : public testing::Test {
 protected:
  using T = typename Over::Transport;
  static void expect_seven(Outcome outcome, const std::vector<LitmusKernel>& kernels) {
    expect(outcome, [] { return seen.a != 7; }, kernels, Over::config());
  }
};
using Transports = testing::Types<OverNetwork, OverLoopback>;
TYPED_TEST_SUITE(TransportContract, Transports);

TYPED_TEST(TransportContract, WhoAcquiresTheSignalHasTheBytes) {
  using T = typename TestFixture::T;
  TestFixture::expect_seven(Outcome::kOrdered, {[](Who who) {
                              if (is_warp(who, 0)) send_seven<T>();
                              if (who.is(1)) receive_seven<T>();
                            }});
}

TYPED_TEST(TransportContract, ARelaxedLoadIsNotEnough) {
  using T = typename TestFixture::T;
  TestFixture::expect_seven(Outcome::kRacy, {[](Who who) {
                              if (is_warp(who, 0)) send_seven<T>();
                              if (!who.is(1)) return;
                              while (ld_relaxed<kSys>(signal_word(1, 1)) != 1) spin_pause("signal");
                              seen.a = ld(word(1, 0));
                            }});
}

TYPED_TEST(TransportContract, StoresOfOtherLanesNeedAWarpSync) {
  using T = typename TestFixture::T;
  TestFixture::expect_seven(Outcome::kRacy, {[](Who who) {
                              if (is_warp(who, 0)) {
                                if (lane_id() == 5) st(word(0, 0), 7U);
                                transport<T>().put_and_signal(1, at(0), at(0), 16, signal_in(1));
                              }
                              if (who.is(1)) receive_seven<T>();
                            }});
}

TYPED_TEST(TransportContract, ASignalAloneHandsOverWhatTheCallerKnew) {
  using T = typename TestFixture::T;
  // Rank 2 is told by rank 1 that rank 0's bytes came, and tells rank 0, which uses the source
  // again.
  TestFixture::expect_seven(Outcome::kOrdered, {[](Who who) {
                              if (is_warp(who, 0)) {
                                send_seven<T>();
                                if (lane_id() == 0) {
                                  wait_signal<T>(4);
                                  st(word(0, 0), 9U);
                                }
                              }
                              if (who.is(1)) {
                                receive_seven<T>();
                                transport<T>().signal(2, signal_in(3));
                              }
                              if (who.is(2)) {
                                wait_signal<T>(3);
                                transport<T>().signal(0, signal_in(4));
                              }
                            }});
}

TYPED_TEST(TransportContract, WithCreditsAllMayBeUsedAgain) {
  using T = typename TestFixture::T;
  // Words of more than 32 bits.
  constexpr u64 kRound = (u64{1} << 33) + 1;
  constexpr u32 kRounds = 4;
  const auto signal_of = [](u32 i, u32 round) {
    return NetworkSignal{at(i), round * kRound, (round + 1) * kRound};
  };
  TestFixture::expect_seven(Outcome::kOrdered, {[signal_of](Who who) {
                              for (u32 round = 0; round < kRounds; ++round) {
                                if (is_warp(who, 0)) {
                                  if (lane_id() == 0) {
                                    if (round > 0) wait_signal<T>(4, round * kRound);
                                    st(word(0, 0), round + 4);
                                  }
                                  warp_sync();
                                  transport<T>().put_and_signal(
                                      1, at(0), at(0), 16, signal_of(1, round));
                                }
                                if (who.is(1)) {
                                  wait_signal<T>(1, (round + 1) * kRound);
                                  seen.a = ld(word(1, 0));
                                  if (seen.a != round + 4) return;
                                  transport<T>().signal(0, signal_of(4, round));
                                }
                              }
                            }});
}

TYPED_TEST(TransportContract, BulkStoresToTheSourceNeedBulkWait) {
  using T = typename TestFixture::T;
  for (const bool reads_only : {false, true}) {
    TestFixture::expect_seven(reads_only ? Outcome::kRacy : Outcome::kOrdered,
                              {[reads_only](Who who) {
                                if (is_warp(who, 0)) {
                                  if (lane_id() == 0) {
                                    for (u32 i = 0; i < 4; ++i) block_words().words[i] = 7;
                                    fence_proxy_async_shared();
                                    bulk_store(word(0, 0), first_word(block_words()), 16);
                                    bulk_commit();
                                    reads_only ? bulk_wait_read<0>() : bulk_wait<0>();
                                  }
                                  warp_sync();
                                  transport<T>().put_and_signal(1, at(0), at(0), 16, signal_in(1));
                                  if (lane_id() == 0) bulk_wait<0>();
                                }
                                if (who.is(1)) receive_seven<T>();
                              }});
  }
}

TYPED_TEST(TransportContract, BulkLoadsOfTheTargetNeedAProxyFence) {
  using T = typename TestFixture::T;
  for (const bool fences : {true, false}) {
    TestFixture::expect_seven(fences ? Outcome::kOrdered : Outcome::kRacy, {[fences](Who who) {
                                if (is_warp(who, 0)) send_seven<T>();
                                if (!who.is(1)) return;
                                wait_signal<T>(1);
                                if (fences) fence_proxy_async_global();
                                Mbar* const mbar = &block_words().mbar;
                                mbar_init(mbar, 1);
                                mbar_init_fence();
                                mbar_arrive_expect(mbar, 16);
                                bulk_load(first_word(block_words()), word(1, 0), 16, mbar);
                                mbar_wait(mbar, 0);
                                seen.a = block_words().words[0];
                              }});
  }
}

// --- what mapped memory would forgive ------------------------------------------------------------

using T = SimulatedTransport;

void expect_seven(Outcome outcome, const LitmusKernel& kernel, u32 ranks_per_node = 1) {
  expect(outcome, [] { return seen.a != 7; }, {kernel}, on_nodes(ranks_per_node));
}

TEST(Network, ASignalSaysNothingOfAnotherCall) {
  expect_seven(Outcome::kRacy, [](Who who) {
    if (is_warp(who, 0)) {
      send_seven<T>();
      transport<T>().put_and_signal(1, at(2), at(2), 16, signal_in(3));
    }
    if (!who.is(1)) return;
    wait_signal<T>(3);
    seen.a = ld(word(1, 0));
  });
}

TEST(Network, AnAcquireAloneIsNotEnough) {
  expect_seven(Outcome::kRacy, [](Who who) {
    if (is_warp(who, 0)) send_seven<T>();
    if (!who.is(1)) return;
    while (ld_acquire<kSys>(signal_word(1, 1)) != 1) spin_pause("signal");
    seen.a = ld(word(1, 0));
  });
}

TEST(Network, TheSourceIsReadLater) {
  expect_seven(Outcome::kRacy, [](Who who) {
    if (is_warp(who, 0)) {
      send_seven<T>();
      if (lane_id() == 0) st(word(0, 0), 9U);
    }
    if (who.is(1)) receive_seven<T>();
  });
}

TEST(Network, TheCreditMayComeFromAnyCallOfTheReceiver) {
  expect_seven(Outcome::kOrdered, [](Who who) {
    if (is_warp(who, 0)) {
      send_seven<T>();
      if (lane_id() == 0) {
        wait_signal<T>(4);
        st(word(0, 0), 9U);
      }
    }
    if (is_warp(who, 1)) {
      if (lane_id() == 0) receive_seven<T>();
      warp_sync();
      transport<T>().put_and_signal(0, at(5), at(5), 16, signal_in(4));
    }
  });
}

TEST(Network, ARankPassesOnWhatCameToTheOthersOfItsNode) {
  // Ranks 0 and 1 are a node; rank 2 sends to rank 0, and rank 1 reads there.
  expect_seven(
      Outcome::kOrdered,
      [](Who who) {
        if (is_warp(who, 2)) {
          if (lane_id() == 0) st(word(2, 0), 7U);
          warp_sync();
          transport<T>().put_and_signal(0, at(0), at(0), 16, signal_in(1));
        }
        if (who.is(0)) {
          wait_signal<T>(1);
          st_release<kSys>(word(1, 6), 1U);
        }
        if (who.is(1)) {
          wait_acquire(word(1, 6), 1);
          seen.a = ld(word(0, 0));
        }
      },
      2);
}

TEST(Network, AKernelMayEndBeforeItsMessagesAppear) {
  expect(
      Outcome::kOrdered,
      [] { return seen.a != 7; },
      {[](Who who) {
         if (is_warp(who, 0)) send_seven<T>();
       },
       [](Who who) {
         if (who.is(1)) receive_seven<T>();
       }},
      on_nodes());
}

// --- misuse --------------------------------------------------------------------------------------

Report run(const LitmusKernel& kernel) {
  Litmus on(on_nodes());
  litmus = &on;
  return on.run(1, {kernel});
}
// By the first warp of rank 0.
Report run_call(const std::function<void()>& call) {
  return run([call](Who who) {
    if (is_warp(who, 0)) call();
  });
}

TEST(NetworkMisuse, IsReported) {
  const auto put = [](i64 to, i64 from, u32 bytes, NetworkSignal signal) {
    return run_call([=] { transport<T>().put_and_signal(1, to, from, bytes, signal); });
  };
  const i64 outside = kLitmusBytes;
  for (const Report& report : {put(outside, 0, 16, signal_in(1)),
                               put(0, outside, 16, signal_in(1)),
                               put(outside - 16, 0, 32, signal_in(1)),
                               put(0, 0, 16, {outside, 0, 1})}) {
    EXPECT_EQ(report.kind, "address");
    EXPECT_NE(report.what.find("not registered for the network"), std::string::npos) << report.what;
  }
  for (const Report& report :
       {put(0, 0, 24, signal_in(1)), put(8, 0, 16, signal_in(1)), put(0, 0, 16, {4, 0, 1})}) {
    EXPECT_EQ(report.kind, "address") << report.what;
  }
  const Report wrong = put(0, 0, 16, {at(1), 3, 4});
  EXPECT_EQ(wrong.kind, "misuse");
  EXPECT_NE(wrong.what.find("holds 0, and not 3"), std::string::npos) << wrong.what;
  EXPECT_TRUE(put(0, 0, 16, signal_in(1)).ok());
}

TEST(NetworkMisuse, AMessageWithoutCreditForTheLast) {
  // However long ago the last one was: the rank cannot know.
  for (const int pauses : {0, 2000}) {
    const Report report = run_call([pauses] {
      transport<T>().put_and_signal(1, at(0), at(0), 16, signal_in(1));
      for (int i = 0; i < pauses; ++i) warp_sync();
      transport<T>().put_and_signal(1, at(2), at(2), 16, {at(1), 1, 2});
    });
    EXPECT_EQ(report.kind, "misuse");
    EXPECT_NE(report.what.find("last message of this word may be in flight"), std::string::npos);
  }
}

TEST(NetworkMisuse, AWordOfAnotherRanksMessages) {
  const Report report = run([](Who who) {
    if (is_warp(who, 0)) send_seven<T>();
    if (who.is(1)) {
      receive_seven<T>();
      transport<T>().signal(2, signal_in(3));
    }
    if (who.is(2)) {
      wait_signal<T>(3);
      transport<T>().signal(1, {at(1), 1, 2});
    }
  });
  EXPECT_EQ(report.kind, "misuse");
  EXPECT_NE(report.what.find("is of rank 0's messages"), std::string::npos) << report.what;
}

TEST(NetworkMisuse, AWordThatItsRankStoresTo) {
  const Report report = run([](Who who) {
    if (is_warp(who, 0)) {
      send_seven<T>();
      if (lane_id() != 0) return;
      wait_signal<T>(4);
      transport<T>().signal(1, signal_in(1));
    }
    if (who.is(1)) {
      receive_seven<T>();
      st_relaxed<kSys>(signal_word(1, 1), 0);
      transport<T>().signal(0, signal_in(4));
    }
  });
  EXPECT_EQ(report.kind, "misuse");
  EXPECT_NE(report.what.find("is not the network's alone"), std::string::npos) << report.what;
}

TEST(NetworkMisuse, LanesThatCallAlone) {
  EXPECT_FALSE(run_call([] {
                 if (lane_id() == 0) {
                   transport<T>().put_and_signal(1, at(0), at(0), 16, signal_in(1));
                 }
               }).ok());
  EXPECT_EQ(run_call([] {
              const i64 to = lane_id() == 3 ? at(2) : at(0);
              transport<T>().put_and_signal(1, to, at(0), 16, signal_in(1));
            }).kind,
            "trap");
}

TEST(NetworkMisuse, ASourceOfAnotherRank) {
  const Report report = run_call([] {
    if (lane_id() != 0) return;
    network_put(
        as<std::byte>(word(1, 0)), as<const std::byte>(word(2, 0)), 16, signal_word(1, 1), 0, 1);
  });
  EXPECT_EQ(report.kind, "address");
  EXPECT_NE(report.what.find("another rank's"), std::string::npos) << report.what;
}

TEST(NetworkMisuse, NoLoadOrStoreReachesAnotherNode) {
  for (const bool stores : {false, true}) {
    const Report report = run([stores](Who who) {
      if (!who.is(0)) return;
      if (stores) {
        st_release<kSys>(word(1, 0), 1U);
      } else {
        seen.a = ld(word(1, 0));
      }
    });
    EXPECT_EQ(report.kind, "address");
    EXPECT_NE(report.what.find("on another node"), std::string::npos) << report.what;
  }
}

}  // namespace
}  // namespace jax_ep::sim
