// SPDX-License-Identifier: Apache-2.0
// Streams, host accesses, seeds, and what lanes of a warp tell each other.
#include "csrc/sim/machine.h"

#include <gtest/gtest.h>

#include <numeric>
#include <set>

#include "csrc/sim/tests/litmus.h"

namespace jax_ep::sim {
namespace {

using namespace dev;  // NOLINT: litmus programs should read like kernels

Ptr<u32> words_of(const Machine& machine, u32 rank) {
  return {reinterpret_cast<u32*>(machine.memory(rank))};
}

TEST(Machine, HostAccessesOfAnySizeAndAlignment) {
  Machine machine(litmus_config());
  std::vector<uint8_t> data(200);
  std::iota(data.begin(), data.end(), uint8_t{1});
  for (const uint64_t offset : {0, 1, 3, 4, 8, 13, 16, 31}) {
    for (const uint64_t bytes : {1, 2, 4, 7, 15, 16, 17, 64, 200}) {
      machine.reset(1);
      machine.write(1, machine.memory(1) + offset, data.data(), bytes);
      std::vector<uint8_t> back(bytes);
      machine.read(1, machine.memory(1) + offset, back.data(), bytes);
      EXPECT_TRUE(std::equal(back.begin(), back.end(), data.begin())) << offset << " " << bytes;
    }
  }
  EXPECT_TRUE(machine.run().ok());
}

TEST(Machine, AccessesOfAllSizesMix) {
  Machine machine(litmus_config());
  const Ptr<u32> words = words_of(machine, 0);
  const std::vector<u32> data = {0x03020100, 0x07060504, 0x0b0a0908, 0x0f0e0d0c};
  machine.write(0, words.raw, data.data(), 16);
  u32 bad = 0;
  machine.launch(0, 0, {}, [&] {
    if (thread_id() != 0) return;
    bad += ld(as<Vec16>(words)).word[3] != 0x0f0e0d0c;
    bad += ld(as<u64>(words)) != 0x0706050403020100;
    bad += ld(words + 2) != 0x0b0a0908;
    bad += ld(as<u16>(words) + 1) != 0x0302;
    bad += ld(as<u8>(words) + 13) != 0x0d;
    st(as<u8>(words) + 13, 0xaa);
    st(as<u16>(words), 0xbbcc);
    bad += ld(words) != 0x0302bbcc;
    bad += ld(as<Vec16>(words)).word[3] != 0x0f0eaa0c;
    st(as<Vec16>(words), {{1, 2, 3, 4}});
    bad += ld(words + 3) != 4;
  });
  const Report report = machine.run();
  EXPECT_TRUE(report.ok()) << report.text();
  EXPECT_EQ(bad, 0);
}

TEST(Machine, ChecksAndCallsRunInTheOrderOfTheirStream) {
  Machine machine(litmus_config());
  const Ptr<u32> words = words_of(machine, 0);
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    machine.reset(seed);
    machine.fill(0, words.raw, 0, 64);
    const LaunchShape shape{2, 64, 0};
    const auto add_one = [&] {
      if (thread_id() == 33) fetch_add_acq_rel<Scope::kGpu>(words, 1);
    };
    const auto expect_value = [&](u32 expected) {
      machine.check(0, 0, [&machine, words, expected] {
        u32 value = 0;
        machine.read(0, words.raw, &value, 4);
        return value == expected ? "" : std::to_string(value);
      });
    };
    machine.launch(0, 0, shape, add_one);
    expect_value(2);
    machine.host_call(0, 0, [&] { machine.fill(0, words.raw, 0, 4); });
    machine.launch(0, 0, shape, add_one);
    expect_value(2);
    Report report = machine.run();
    ASSERT_TRUE(report.ok()) << report.text();

    // After a run that went well, more work may follow.
    machine.launch(0, 0, shape, add_one);
    expect_value(4);
    report = machine.run();
    ASSERT_TRUE(report.ok()) << report.text();
    expect_value(5);
    report = machine.run();
    EXPECT_EQ(report.kind, "wrong result");
    EXPECT_EQ(report.what, "rank 0 stream 0: 4");
  }
}

TEST(Machine, AHostCallMustNotTouchAnotherRank) {
  Machine machine(litmus_config());
  machine.host_call(0, 0, [&] { machine.fill(1, machine.memory(1), 0, 4); });
  EXPECT_EQ(machine.run().kind, "misuse");
}

TEST(Machine, AHostCallRacesWithAPeerThatStillWrites) {
  Machine machine(litmus_config());
  machine.share(1, machine.memory(1), 64);
  const Ptr<u32> words = words_of(machine, 1);
  machine.fill(1, words.raw, 0, 64);
  machine.launch(0, 0, {}, [&] {
    if (thread_id() == 0) st(words, 1);
  });
  machine.check(1, 0, [&] {
    u32 value = 0;
    machine.read(1, words.raw, &value, 4);
    return std::string();
  });
  const Report report = machine.run();
  EXPECT_EQ(report.kind, "race") << report.text();
  EXPECT_NE(report.what.find("the host in stream 0 of rank 1"), std::string::npos) << report.text();
}

TEST(Machine, LaunchesThatDoNotFitAreRefused) {
  for (const LaunchShape shape : {LaunchShape{3, 32, 0},
                                  LaunchShape{1, 96, 0},
                                  LaunchShape{1, 33, 0},
                                  LaunchShape{1, 32, 2048}}) {
    Machine machine(litmus_config());
    machine.launch(0, 0, shape, [] {});
    EXPECT_EQ(machine.run().kind, "misuse");
  }
}

// Two kernels that each store a word that the other reads, in streams as told.
Report write_and_read(uint64_t seed, u32 second_stream) {
  Config config = litmus_config();
  config.streams = 2;
  Machine machine(config);
  machine.reset(seed);
  const Ptr<u32> words = words_of(machine, 0);
  machine.fill(0, words.raw, 0, 64);
  machine.launch(0, 0, {}, [=] {
    if (thread_id() == 3) st(words, 1);
  });
  machine.launch(0, second_stream, {}, [=] {
    if (thread_id() == 4) ld(words);
  });
  return machine.run();
}

TEST(TwoStreams, AreNotOrdered) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const Report ordered = write_and_read(seed, 0);
    EXPECT_TRUE(ordered.ok()) << ordered.text();
    EXPECT_EQ(write_and_read(seed, 1).kind, "race");
  }
}
TEST(TwoStreams, RunAtTheSameTime) {
  Config config = litmus_config();
  config.streams = 2;
  Machine machine(config);
  const Ptr<u32> words = words_of(machine, 0);
  machine.fill(0, words.raw, 0, 64);
  // Each waits for the other.
  for (u32 s = 0; s < 2; ++s) {
    machine.launch(0, s, {}, [=] {
      if (thread_id() != 0) return;
      st_release<Scope::kGpu>(words + s, 1);
      wait_acquire<Scope::kGpu>(words + (1 - s), 1);
    });
  }
  const Report report = machine.run();
  EXPECT_TRUE(report.ok()) << report.text();
}

// A program with a race on the order of two relaxed stores: its result depends on the schedule.
std::string trace(Litmus& litmus, uint64_t seed) {
  std::string order;
  const Report report = litmus.run(seed, {[&](Who who) {
                                     block_sync();
                                     st_relaxed<Scope::kSys>(litmus.word(0, 0), who.rank);
                                     order += static_cast<char>('a' + who.rank);
                                     warp_sync();
                                     order +=
                                         std::to_string(ld_relaxed<Scope::kSys>(litmus.word(0, 0)));
                                   }});
  EXPECT_TRUE(report.ok()) << report.text();
  return order + " " + std::to_string(report.steps) + " " + std::to_string(report.switches);
}

TEST(Seeds, ReproduceExactly) {
  Litmus first(litmus_config());
  Litmus second(litmus_config());
  std::set<std::string> different;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const std::string once = trace(first, seed);
    EXPECT_EQ(once, trace(second, seed));
    EXPECT_EQ(once, trace(first, seed));
    different.insert(once);
  }
  EXPECT_EQ(different.size(), 20);
}

TEST(Warps, CollectivesGiveEveryLaneItsResult) {
  Litmus litmus(litmus_config());
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    u32 bad = 0;
    const Report report = litmus.run(seed, {[&](Who) {
                                       const u32 lane = lane_id();
                                       bad += warp_shfl(lane * 2, 7) != 14;
                                       bad += warp_shfl(lane * 2, lane ^ 1) != (lane ^ 1) * 2;
                                       bad += warp_shfl(1.5f, 3) != 1.5f;
                                       bad += warp_ballot(lane < 4) != 15;
                                       bad += warp_match(lane / 8) != 0xffu << lane / 8 * 8;
                                     }});
    ASSERT_TRUE(report.ok()) << report.text();
    EXPECT_EQ(bad, 0);
  }
}

TEST(Atomics, AddReturnsWhatWasThere) {
  Litmus litmus(litmus_config());
  std::set<u32> sums;
  const Report report = litmus.run(
      5, {[&](Who) { sums.insert(fetch_add_acq_rel<Scope::kSys>(litmus.word(1, 0), 2)); }});
  ASSERT_TRUE(report.ok()) << report.text();
  EXPECT_EQ(sums.size(), 3 * 2 * 64);
  EXPECT_EQ(*sums.rbegin(), 2 * (3 * 2 * 64 - 1));
}

// One thread of each block wins, and who loses can read what the winner had stored before.
TEST(Atomics, CompareAndExchangeHasOneWinner) {
  Litmus litmus(litmus_config());
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    litmus.prepare(seed);
    u32 wins = 0;
    u32 losses = 0;
    for (u32 r = 0; r < 2; ++r) {
      litmus.machine().launch(r, 0, {.blocks = 2, .threads = 32}, [&] {
        if (lane_id() != 0) return;
        const u32 own = 1 + 2 * Who().rank + block_id();
        st(litmus.word(0, own), own);
        const u32 old = compare_exchange_acq_rel<Scope::kSys>(litmus.word(0, 8), 0, own);
        if (old == 0) {
          ++wins;
        } else {
          losses += ld(litmus.word(0, old)) == old ? 1 : 0;
        }
      });
    }
    const Report report = litmus.machine().run();
    ASSERT_TRUE(report.ok()) << report.text();
    EXPECT_EQ(wins, 1U);
    EXPECT_EQ(losses, 3U);
  }
}

// What it stored before can be seen, and the others go on.
TEST(Killed, BeforeAStoreToAnotherRank) {
  Litmus litmus(litmus_config());
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    for (u32 stores = 0; stores <= 5; ++stores) {
      litmus.prepare(seed);
      Machine& machine = litmus.machine();
      machine.kill_before(1, stores);
      bool ended = false;
      machine.launch(1, 0, {.blocks = 1, .threads = 32}, [&] {
        if (lane_id() != 0) return;
        for (u32 i = 1; i <= 4; ++i) {
          st_relaxed<Scope::kSys>(litmus.word(1, i), i);  // its own memory does not count
          st_relaxed<Scope::kSys>(litmus.word(0, i), i);
        }
        ended = true;
      });
      machine.host_call(1, 0, [&] { ended = ended && !machine.was_killed(1); });
      machine.launch(0, 0, {.blocks = 1, .threads = 32}, [&] {
        if (lane_id() != 0 || stores == 0) return;
        const Ptr<u32> last = litmus.word(0, stores < 4 ? stores : 4);
        while (ld_relaxed<Scope::kSys>(last) == 0) spin_pause("the last store");
      });
      const Report report = machine.run();
      ASSERT_TRUE(report.ok()) << report.text();
      EXPECT_EQ(machine.was_killed(1), stores < 4);
      EXPECT_EQ(ended, stores >= 4);
      for (u32 i = 1; i <= 4; ++i) {
        u32 seen = 0;
        machine.read(0, litmus.word(0, i).raw, &seen, sizeof seen);
        EXPECT_EQ(seen, i <= stores ? i : 0U);
      }
    }
  }
}

}  // namespace
}  // namespace jax_ep::sim
