// SPDX-License-Identifier: Apache-2.0
// Programs that must end in a particular report, and what the report says.
#include <gtest/gtest.h>

#include "csrc/sim/tests/litmus.h"

namespace jax_ep::sim {
namespace {

using namespace dev;  // NOLINT: litmus programs should read like kernels

Litmus* litmus;

Ptr<u32> word(u32 rank, u32 i) { return litmus->word(rank, i); }

Report report_of(const LitmusKernel& kernel, const Config& config = litmus_config()) {
  Litmus one(config);
  litmus = &one;
  return one.run(1, {kernel});
}

void expect_report(const Report& report,
                   const std::string& kind,
                   const std::vector<std::string>& parts = {}) {
  EXPECT_EQ(report.kind, kind) << report.text();
  for (const std::string& part : parts) {
    EXPECT_NE(report.what.find(part), std::string::npos) << part << " is not in: " << report.text();
  }
}

TEST(Deadlock, FlagNeverSet) {
  const Report report = report_of([](Who who) {
    if (who.is(0)) wait_acquire(word(0, 1), 1);
  });
  expect_report(report,
                "deadlock",
                {"rank 0, spinning for flag (last strong load: 0) at litmus.h:",
                 "1 threads",
                 "block 0 thread 0"});
}
TEST(Deadlock, OneWarpSkipsTheBarrier) {
  const Report report = report_of([](Who who) {
    if (who.rank == 1 && who.thread < 32) block_sync();
  });
  expect_report(report, "deadlock", {"rank 1, at a barrier at misuse_test.cc:", "64 threads"});
}
TEST(Deadlock, OneWarpSkipsTheNamedBarrier) {
  const Report report = report_of([](Who who) {
    if (who.rank == 1 && who.thread < 32) named_sync(1, 64);
  });
  expect_report(report, "deadlock", {"rank 1, at a barrier at misuse_test.cc:", "64 threads"});
}
TEST(Deadlock, TwoBarriersAreNotOne) {
  const Report report = report_of([](Who who) {
    if (who.rank == 1) named_sync(1 + who.thread / 32, 64);
  });
  expect_report(report, "deadlock", {"rank 1, at a barrier at misuse_test.cc:", "128 threads"});
}
TEST(Barriers, NamedForAnotherNumberOfThreads) {
  const Report report = report_of([](Who who) {
    if (who.is(0)) named_sync(1, 64);
    if (who.is(0, 32)) named_sync(1, 32);
  });
  expect_report(report, "barrier", {"barrier 1 for", "others came to it for"});
}
TEST(Barriers, NamedAsNoneIs) {
  expect_report(report_of([](Who who) {
                  if (who.is(0)) named_sync(16, 64);
                }),
                "barrier",
                {"no barrier 16 for 64 threads"});
}
TEST(Deadlock, ALaneSkipsTheWarpSync) {
  const Report report = report_of([](Who who) {
    if (who.thread != 3) warp_sync();
  });
  expect_report(report, "deadlock", {"at a warp collective"});
}
TEST(Deadlock, BlocksThatMustRunTogetherDoNot) {
  const LitmusKernel meet = [](Who who) {
    if (who.rank != 0 || who.thread != 0) return;
    fetch_add_acq_rel<Scope::kGpu>(word(0, 1), 1);
    wait_acquire<Scope::kGpu>(word(0, 1), 2);
  };
  EXPECT_TRUE(report_of(meet).ok());
  Config config = litmus_config();
  config.resident_blocks = 1;
  expect_report(report_of(meet, config), "deadlock", {"1 threads, first block 0"});
}
TEST(Livelock, EndlessLoop) {
  const Report report = report_of([](Who who) {
    while (who.rank == 0) block_sync();
  });
  expect_report(report, "livelock", {"limit"});
}

TEST(Collectives, TwoKindsMeet) {
  const Report report = report_of([](Who who) {
    if (who.thread % 32 == 3) {
      warp_ballot(true);
    } else {
      warp_shfl(1u, 0);
    }
  });
  expect_report(report, "collective", {"warp_ballot", "warp_shfl"});
}

TEST(Uninitialized, GlobalMemory) {
  const Report report = report_of([](Who who) {
    if (who.is(0)) ld(word(0, kWords));
  });
  expect_report(report, "uninitialized", {"rank 0 memory + 0x400", "misuse_test.cc:"});
}
TEST(Uninitialized, SharedMemoryOfAnEarlierKernel) {
  Litmus one(litmus_config());
  litmus = &one;
  const LitmusKernel write = [](Who who) {
    if (who.is(1)) dev::shared<LitmusShared>().words[2] = 5;
  };
  const LitmusKernel read = [](Who who) {
    if (who.is(1)) (void)static_cast<u32>(dev::shared<LitmusShared>().words[2]);
  };
  expect_report(one.run(1, {write, read}), "uninitialized", {"shared memory of rank 1 block 0"});
}
TEST(Uninitialized, PoisonedAgain) {
  Litmus one(litmus_config());
  one.prepare(1);
  Machine& machine = one.machine();
  const Ptr<u32> word = one.word(0, 0);
  machine.poison(0, as<std::byte>(word).raw + 1, 1);
  machine.launch(0, 0, {}, [&] {
    if (thread_id() == 0) ld(as<u8>(word));
    if (thread_id() == 0) ld(as<u8>(word) + 1);
  });
  expect_report(machine.run(), "uninitialized", {"rank 0 memory + 0x1"});
}

TEST(Addresses, OutOfBounds) {
  expect_report(report_of([](Who who) {
                  if (who.is(0)) st(word(0, 2 * kLitmusBytes / 16), 1);
                }),
                "address",
                {"out of bounds", "rank 0 memory + 0x2000"});
  expect_report(report_of([](Who who) {
                  if (who.is(0)) st(Ptr<u32>{}, 1);
                }),
                "address",
                {"no memory of the device"});
  expect_report(report_of([](Who who) {
                  if (who.is(0)) dev::shared<LitmusShared[9]>();
                }),
                "address",
                {"the launch gave 1024"});
}
TEST(Addresses, Misaligned) {
  const Report report = report_of([](Who who) {
    if (who.is(0)) st(as<Vec16>(word(0, 0) + 1), {});
  });
  expect_report(report, "address", {"misaligned"});
}
TEST(Addresses, NotMapped) {
  const Report report = report_of([](Who who) {
    if (who.is(0)) st(word(1, kLitmusBytes / 16), 1);
  });
  expect_report(report, "address", {"not mapped", "rank 1 memory + 0x1000", "rank 0 block 0"});
}
TEST(Addresses, SmallerThanTheGranule) {
  Config config = litmus_config();
  config.granule_bytes = 4;
  const Report report = report_of(
      [](Who who) {
        if (who.is(0)) st(as<u16>(word(0, 0)), 1);
      },
      config);
  expect_report(report, "misuse", {"2 bytes"});
}

TEST(Races, TheScenarioNamesBothSidesAndTheRegion) {
  Litmus one(litmus_config());
  litmus = &one;
  one.prepare(3);
  Machine& machine = one.machine();
  machine.name_region(1, machine.memory(1), 64, "arrived");
  machine.launch(0, 0, {}, [] {
    if (thread_id() == 7) st(word(1, 1), 1);
  });
  machine.launch(1, 0, {}, [] {
    if (thread_id() == 9) ld(word(1, 1));
  });
  const Report report = machine.run();
  expect_report(report,
                "race",
                {"arrived[+16] of rank 1",
                 "rank 0 block 0 thread 7 at misuse_test.cc:",
                 "rank 1 block 0 thread 9 at misuse_test.cc:"});
  EXPECT_NE(report.text().find("seed 3"), std::string::npos) << report.text();
}
TEST(Races, SharedMemoryWithoutBlockSync) {
  const Report report = report_of([](Who who) {
    if (who.rank != 2) return;
    LitmusShared& words = dev::shared<LitmusShared>();
    if (who.thread == 0) words.words[0] = 1;
    warp_sync();
    if (who.thread == 33) (void)static_cast<u32>(words.words[0]);
  });
  EXPECT_TRUE(report.kind == "race" || report.kind == "uninitialized") << report.text();
}

// What the kernels do when a wait takes too long.
void wait_or_give_up(Ptr<u32> flag, Ptr<u32> record) {
  const u64 start = now_ns();
  while (ld_acquire<Scope::kSys>(flag) != 1) {
    if (now_ns() - start > 60'000'000'000) {
      st(record, 42);
      trap();
    }
    spin_pause("flag");
  }
}

TEST(Deadlines, ExpireWhereOnlyTimeCanHelp) {
  const LitmusKernel kernel = [](Who who) {
    if (who.is(1)) wait_or_give_up(word(1, 1), word(1, 2));
    if (who.rank == 1) block_sync();
  };
  Litmus one(litmus_config());
  litmus = &one;
  expect_report(one.run(1, {kernel}), "trap", {"rank 1 block 0 thread 0 at misuse_test.cc:"});
  u32 record = 0;
  one.machine().read(1, word(1, 2).raw, &record, sizeof record);
  EXPECT_EQ(record, 42);

  Config config = litmus_config();
  config.expire_deadlines = false;
  expect_report(report_of(kernel, config), "deadlock", {"spinning for flag", "at a barrier"});
}
TEST(Deadlines, DoNotExpireWhileTheFlagMayCome) {
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    Litmus one(litmus_config());
    litmus = &one;
    const Report report = one.run(seed, {[](Who who) {
                                    if (who.is(0)) st_release<Scope::kSys>(word(1, 1), 1);
                                    if (who.is(1)) wait_or_give_up(word(1, 1), word(1, 2));
                                  }});
    ASSERT_TRUE(report.ok()) << report.text();
  }
}
TEST(Deadlines, AThreadThatOnlyWaitsIsADeadlock) {
  expect_report(report_of([](Who who) {
                  while (who.is(0)) spin_pause("nothing");
                }),
                "deadlock",
                {"spinning for nothing"});
}

}  // namespace
}  // namespace jax_ep::sim
