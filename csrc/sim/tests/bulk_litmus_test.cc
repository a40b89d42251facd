// SPDX-License-Identifier: Apache-2.0
// Litmus programs of bulk copies: what a thread may rely on, and when.
#include <gtest/gtest.h>

#include "csrc/sim/tests/outcomes.h"

namespace jax_ep::sim {
namespace {

using namespace dev;  // NOLINT: litmus programs should read like kernels

constexpr Scope kSys = Scope::kSys;
constexpr Vec16 kSevens = {{7, 7, 7, 7}};

void set_source(u32 value) {
  for (u32 i = 0; i < 4; ++i) block_words().words[i] = value;
}
Ptr<u32> source() { return first_word(block_words()); }

// An mbarrier that the copy engine knows.
Mbar* make_mbar() {
  Mbar* mbar = &block_words().mbar;
  mbar_init(mbar, 1);
  mbar_init_fence();
  return mbar;
}
void load_to_shared(Mbar* mbar, Ptr<u32> from) {
  mbar_arrive_expect(mbar, 16);
  bulk_load(source(), from, 16, mbar);
}

TEST(BulkStore, WaitThenRelease) {
  const auto send = [] {
    set_source(7);
    fence_proxy_async_shared();
    bulk_store(word(1, 0), source(), 16);
    bulk_commit();
    bulk_wait<0>();
    st_release<kSys>(word(1, 1), 1);
  };
  expect_message(Outcome::kOrdered, send, receive);
}
TEST(BulkStore, WaitForReadsIsNotEnough) {
  const auto send = [] {
    set_source(7);
    fence_proxy_async_shared();
    bulk_store(word(1, 0), source(), 16);
    bulk_commit();
    bulk_wait_read<0>();
    st_release<kSys>(word(1, 1), 1);
    bulk_wait<0>();
  };
  expect_message(Outcome::kRacy, send, receive);
}
TEST(BulkStore, NoProxyFence) {
  const auto send = [] {
    set_source(9);
    set_source(7);
    bulk_store(word(1, 0), source(), 16);
    bulk_commit();
    bulk_wait<0>();
    st_release<kSys>(word(1, 1), 1);
  };
  expect_message(Outcome::kRacy, send, receive);
}
TEST(BulkStore, ProxyFenceOfTheOtherMemory) {
  const auto send = [] {
    set_source(9);
    set_source(7);
    fence_proxy_async_global();
    bulk_store(word(1, 0), source(), 16);
    bulk_commit();
    bulk_wait<0>();
    st_release<kSys>(word(1, 1), 1);
  };
  expect_message(Outcome::kRacy, send, receive);
}
TEST(BulkStore, ProxyFenceBySomeoneElseOnThePath) {
  expect(Outcome::kOrdered, [] { return seen.a != 7; }, {[](Who who) {
           if (who.rank == 0 && who.block == 0) {
             if (who.thread == 40) {
               set_source(7);
               fence_proxy_async_shared();
             }
             block_sync();
             if (who.thread == 0) {
               bulk_store(word(1, 0), source(), 16);
               bulk_commit();
               bulk_wait<0>();
               st_release<kSys>(word(1, 1), 1);
             }
           }
           if (who.is(1)) receive();
         }});
}
TEST(BulkStore, SourceReusedTooEarly) {
  const auto send = [] {
    set_source(7);
    fence_proxy_async_shared();
    bulk_store(word(1, 0), source(), 16);
    bulk_commit();
    set_source(9);
    bulk_wait<0>();
    st_release<kSys>(word(1, 1), 1);
  };
  expect_message(Outcome::kRacy, send, receive);
}
TEST(BulkStore, SourceReusedAfterItWasRead) {
  const auto send = [] {
    set_source(7);
    fence_proxy_async_shared();
    bulk_store(word(1, 0), source(), 16);
    bulk_commit();
    bulk_wait_read<0>();
    set_source(9);
    bulk_wait<0>();
    st_release<kSys>(word(1, 1), 1);
  };
  expect_message(Outcome::kOrdered, send, receive);
}
TEST(BulkStore, WaitForAllButTheLastGroup) {
  const auto send = [] {
    set_source(7);
    fence_proxy_async_shared();
    bulk_store(word(1, 0), source(), 16);
    bulk_commit();
    bulk_store(word(1, 2), source(), 16);
    bulk_commit();
    bulk_wait<1>();
    st_release<kSys>(word(1, 1), 1);
    bulk_wait<0>();
  };
  expect_message(Outcome::kOrdered, send, receive);
  expect_message(Outcome::kRacy, send, [] {
    wait_acquire(word(1, 1), 1);
    seen.a = ld(word(1, 2));
  });
}

TEST(BulkLoad, UsedAfterItsMbarrier) {
  expect(Outcome::kOrdered, [] { return seen.a != 7; }, {[](Who who) {
           if (!who.is(0)) return;
           Mbar* mbar = make_mbar();
           st(as<Vec16>(word(0, 0)), kSevens);
           fence_proxy_async_global();
           load_to_shared(mbar, word(0, 0));
           mbar_wait(mbar, 0);
           seen.a = ld(source());
         }});
}
TEST(BulkLoad, UsedBeforeItsMbarrier) {
  expect(Outcome::kRacy, [] { return seen.a != 7; }, {[](Who who) {
           if (!who.is(0)) return;
           Mbar* mbar = make_mbar();
           set_source(1);
           fence_proxy_async_shared();
           load_to_shared(mbar, word(0, 0));
           seen.a = ld(source()) == 1 ? 1 : 7;
           mbar_wait(mbar, 0);
         }});
}
TEST(BulkLoad, WhatAnAcquireMadeKnownNeedsAProxyFence) {
  const auto send = [] {
    st(as<Vec16>(word(1, 0)), kSevens);
    st_release<kSys>(word(1, 1), 1);
  };
  const auto receive_by_copy = [](bool fence) {
    Mbar* mbar = make_mbar();
    wait_acquire(word(1, 1), 1);
    if (fence) fence_proxy_async_global();
    load_to_shared(mbar, word(1, 0));
    mbar_wait(mbar, 0);
    seen.a = ld(source());
  };
  expect_message(Outcome::kRacy, send, [=] { receive_by_copy(false); });
  expect_message(Outcome::kOrdered, send, [=] { receive_by_copy(true); });
}
TEST(BulkLoad, AProxyFenceOfTheOtherMemoryIsNone) {
  const auto send = [] {
    st(as<Vec16>(word(1, 0)), kSevens);
    st_release<kSys>(word(1, 1), 1);
  };
  expect_message(Outcome::kRacy, send, [] {
    Mbar* mbar = make_mbar();
    wait_acquire(word(1, 1), 1);
    fence_proxy_async_shared();
    load_to_shared(mbar, word(1, 0));
    mbar_wait(mbar, 0);
    seen.a = ld(source());
  });
}
// Copies of two ranks: the acquire orders the threads, but the reader's copy needs its fence.
TEST(BulkLoad, WhatAnotherRanksCopyStoredNeedsAProxyFence) {
  const auto send = [] {
    set_source(7);
    fence_proxy_async_shared();
    bulk_store(word(1, 0), source(), 16);
    bulk_commit();
    bulk_wait<0>();
    st_release<kSys>(word(1, 1), 1);
  };
  const auto receive_by_copy = [](bool fence) {
    Mbar* mbar = make_mbar();
    wait_acquire(word(1, 1), 1);
    if (fence) fence_proxy_async_global();
    load_to_shared(mbar, word(1, 0));
    mbar_wait(mbar, 0);
    seen.a = ld(source());
  };
  expect_message(Outcome::kRacy, send, [=] { receive_by_copy(false); });
  expect_message(Outcome::kOrdered, send, [=] { receive_by_copy(true); });
}
TEST(BulkLoad, WhatACopyOfTheSameBlockStoredNeedsNone) {
  expect(Outcome::kOrdered, [] { return seen.a != 7; }, {[](Who who) {
           if (!who.is(0)) return;
           Mbar* mbar = make_mbar();
           set_source(7);
           fence_proxy_async_shared();
           bulk_store(word(0, 0), source(), 16);
           bulk_commit();
           bulk_wait<0>();
           load_to_shared(mbar, word(0, 0));
           mbar_wait(mbar, 0);
           seen.a = ld(source());
         }});
}
TEST(BulkLoad, TwoPhasesOfOneMbarrier) {
  expect(Outcome::kOrdered, [] { return seen.a != 7 || seen.b != 0; }, {[](Who who) {
           if (!who.is(0)) return;
           Mbar* mbar = make_mbar();
           st(as<Vec16>(word(0, 0)), kSevens);
           fence_proxy_async_global();
           load_to_shared(mbar, word(0, 0));
           mbar_wait(mbar, 0);
           seen.a = ld(source());
           load_to_shared(mbar, word(0, 3));
           mbar_wait(mbar, 1);
           seen.b = ld(source());
         }});
}
TEST(BulkLoad, WholeWarpWaits) {
  expect(Outcome::kOrdered, [] { return seen.a != 32 * 7; }, {[](Who who) {
           if (who.rank != 0 || who.block != 0 || who.thread >= 32) return;
           Mbar* mbar = &block_words().mbar;
           if (who.thread == 0) {
             make_mbar();
             st(as<Vec16>(word(0, 0)), kSevens);
             fence_proxy_async_global();
             load_to_shared(mbar, word(0, 0));
           }
           warp_sync();
           mbar_wait(mbar, 0);
           seen.a += ld(source());
         }});
}

Ptr<Vec16> source_vector() { return as<Vec16>(source()); }
void load_async(Ptr<u32> from) {
  async_load(source_vector(), {as<Vec16>(from).raw});
  async_commit();
}

// A program of thread 0 of rank 0, which sees 7 if all is in order.
void expect_alone(Outcome outcome, const std::function<void()>& program) {
  expect(outcome, [] { return seen.a != 7; }, {[=](Who who) {
           if (who.is(0)) program();
         }});
}

TEST(AsyncLoad, UsedAfterItsWait) {
  expect_alone(Outcome::kOrdered, [] {
    st(as<Vec16>(word(0, 0)), kSevens);
    load_async(word(0, 0));
    async_wait<0>();
    seen.a = ld(source());
  });
}
TEST(AsyncLoad, UsedBeforeItsWait) {
  expect_alone(Outcome::kRacy, [] {
    set_source(1);
    load_async(word(0, 0));
    seen.a = ld(source()) == 1 ? 1 : 7;
    async_wait<0>();
  });
}
TEST(AsyncLoad, WaitForAllButTheLastGroup) {
  const auto program = [](bool of_last) {
    return [of_last] {
      st(as<Vec16>(word(0, 0)), kSevens);
      st(as<Vec16>(word(0, 0)) + 1, kSevens);
      st(source_vector() + 1, Vec16{{1, 1, 1, 1}});
      async_load<0>(source_vector(), {as<Vec16>(word(0, 0)).raw});
      async_commit();
      async_load<1>(source_vector(), {as<Vec16>(word(0, 0)).raw});
      async_commit();
      async_wait<1>();
      seen.a = ld(source() + (of_last ? 4 : 0)) == 1 ? 1 : 7;
      async_wait<0>();
    };
  };
  expect_alone(Outcome::kOrdered, program(false));
  expect_alone(Outcome::kRacy, program(true));
}
TEST(AsyncLoad, PlaceLoadedAgainAfterItWasRead) {
  expect_alone(Outcome::kOrdered, [] {
    st(as<Vec16>(word(0, 0)), kSevens);
    load_async(word(0, 0));
    async_wait<0>();
    seen.a = ld(source());
    load_async(word(0, 4));
    async_wait<0>();
  });
}
TEST(AsyncLoad, PlaceReadAfterItIsLoadedAgain) {
  expect_alone(Outcome::kRacy, [] {
    st(as<Vec16>(word(0, 0)), kSevens);
    load_async(word(0, 0));
    async_wait<0>();
    load_async(word(0, 4));
    seen.a = ld(source());
    async_wait<0>();
  });
}
// It is no bulk copy.
TEST(AsyncLoad, WhatAnAcquireMadeKnownNeedsNoProxyFence) {
  const auto send = [] {
    st(as<Vec16>(word(1, 0)), kSevens);
    st_release<kSys>(word(1, 1), 1);
  };
  expect_message(Outcome::kOrdered, send, [] {
    wait_acquire(word(1, 1), 1);
    load_async(word(1, 0));
    async_wait<0>();
    seen.a = ld(source());
  });
  expect_message(Outcome::kRacy, send, [] {
    load_async(word(1, 0));
    wait_acquire(word(1, 1), 1);
    async_wait<0>();
    seen.a = ld(source());
  });
}
TEST(AsyncLoad, TheWaitIsTheThreadsOwn) {
  const auto program = [](bool synchronizes) {
    return [synchronizes](Who who) {
      if (who.rank != 0 || who.block != 0 || who.thread >= 32) return;
      if (who.thread == 0) {
        st(as<Vec16>(word(0, 0)), kSevens);
        load_async(word(0, 0));
        async_wait<0>();
      }
      synchronizes ? warp_sync() : (void)warp_shfl(0, 0);
      if (who.thread == 1) seen.a = ld(source());
    };
  };
  expect(Outcome::kOrdered, [] { return seen.a != 7; }, {program(true)});
  expect(Outcome::kRacy, [] { return seen.a != 7; }, {program(false)});
}

// The report of a program that thread 0 of rank 0 runs.
Report report_of(const std::function<void()>& program) {
  Litmus one(litmus_config());
  litmus = &one;
  return one.run(1, {[&](Who who) {
                   if (who.is(0)) program();
                 }});
}

TEST(Mbarriers, InitIsNotKnownToTheCopyEngine) {
  const Report report = report_of([] {
    Mbar* mbar = &block_words().mbar;
    mbar_init(mbar, 1);
    load_to_shared(mbar, word(0, 0));
    mbar_wait(mbar, 0);
  });
  EXPECT_EQ(report.kind, "race") << report.text();
  EXPECT_NE(report.what.find("mbarrier"), std::string::npos) << report.text();
}
TEST(Mbarriers, InitIsNotKnownToAnotherThread) {
  Litmus one(litmus_config());
  litmus = &one;
  const Report report = one.run(1, {[](Who who) {
                                  if (who.rank != 0 || who.block != 0) return;
                                  if (who.thread == 0) make_mbar();
                                  warp_shfl(1, 0);
                                  if (who.thread == 1)
                                    load_to_shared(&block_words().mbar, word(0, 0));
                                }});
  EXPECT_EQ(report.kind, "race") << report.text();
}
TEST(Mbarriers, TooManyArrivals) {
  const Report report = report_of([] {
    Mbar* mbar = make_mbar();
    mbar_arrive_expect(mbar, 16);
    mbar_arrive_expect(mbar, 16);
  });
  EXPECT_EQ(report.kind, "barrier") << report.text();
}
TEST(Mbarriers, TooFewBytesExpectedNeverComplete) {
  const Report report = report_of([] {
    Mbar* mbar = make_mbar();
    mbar_arrive_expect(mbar, 32);
    bulk_load(source(), word(0, 0), 16, mbar);
    mbar_wait(mbar, 0);
  });
  EXPECT_EQ(report.kind, "deadlock") << report.text();
  EXPECT_NE(report.what.find("mbarrier"), std::string::npos) << report.text();
}

TEST(BulkMisuse, StoreNeverWaitedFor) {
  const Report report = report_of([] {
    set_source(7);
    fence_proxy_async_shared();
    bulk_store(word(1, 0), source(), 16);
    bulk_commit();
  });
  EXPECT_EQ(report.kind, "exit") << report.text();
}
TEST(BulkMisuse, AsyncLoadNeverWaitedFor) {
  EXPECT_EQ(report_of([] { load_async(word(0, 0)); }).kind, "exit");
}
TEST(BulkMisuse, SizeAndAlignment) {
  EXPECT_EQ(report_of([] { bulk_store(word(1, 0), source(), 8); }).kind, "address");
  EXPECT_EQ(report_of([] { bulk_store(word(1, 0) + 1, source(), 16); }).kind, "address");
  EXPECT_EQ(report_of([] { bulk_store(source(), source(), 16); }).kind, "address");
  EXPECT_EQ(report_of([] { bulk_store(word(1, 0), word(0, 0), 16); }).kind, "address");
}

}  // namespace
}  // namespace jax_ep::sim
