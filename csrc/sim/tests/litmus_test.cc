// SPDX-License-Identifier: Apache-2.0
// Small programs whose outcomes PTX's memory model decides: which outcomes the simulator shows,
// which it never shows, and which programs it calls racy.
#include <gtest/gtest.h>

#include "csrc/sim/tests/outcomes.h"

namespace jax_ep::sim {
namespace {

using namespace dev;  // NOLINT: litmus programs should read like kernels

constexpr Scope kSys = Scope::kSys;
constexpr Scope kGpu = Scope::kGpu;

TEST(MessagePassing, ReleaseAcquire) {
  const auto send = [] {
    st(word(1, 0), 7);
    st_release<kSys>(word(1, 1), 1);
  };
  expect_message(Outcome::kOrdered, send, receive);
}
TEST(MessagePassing, RelaxedStore) {
  const auto send = [] {
    st(word(1, 0), 7);
    st_relaxed<kSys>(word(1, 1), 1);
  };
  expect_message(Outcome::kRacy, send, receive);
}
TEST(MessagePassing, RelaxedLoad) {
  const auto send = [] {
    st(word(1, 0), 7);
    st_release<kSys>(word(1, 1), 1);
  };
  expect_message(Outcome::kRacy, send, [] {
    wait_relaxed(word(1, 1), 1);
    seen.a = ld(word(1, 0));
  });
}
TEST(MessagePassing, WeakFlag) {
  const auto send = [] {
    st(word(1, 0), 7);
    st(word(1, 1), 1);
  };
  expect_message(Outcome::kRacy, send, receive);
}
TEST(MessagePassing, GpuScopeOfTheReleaseAcrossRanks) {
  const auto send = [] {
    st(word(1, 0), 7);
    st_release<kGpu>(word(1, 1), 1);
  };
  expect_message(Outcome::kRacy, send, receive);
}
TEST(MessagePassing, GpuScopeOfTheAcquireAcrossRanks) {
  const auto send = [] {
    st(word(1, 0), 7);
    st_release<kSys>(word(1, 1), 1);
  };
  expect_message(Outcome::kRacy, send, [] {
    wait_acquire<kGpu>(word(1, 1), 1);
    seen.a = ld(word(1, 0));
  });
}
TEST(MessagePassing, GpuScopeInsideARank) {
  expect(Outcome::kOrdered, [] { return seen.a != 7; }, {[](Who who) {
           if (who.is(0)) {
             st(word(0, 0), 7);
             st_release<kGpu>(word(0, 1), 1);
           }
           if (who.is(0, 0, 1)) {
             wait_acquire<kGpu>(word(0, 1), 1);
             seen.a = ld(word(0, 0));
           }
         }});
}
TEST(MessagePassing, CumulativeThroughAThirdRank) {
  expect(Outcome::kOrdered, [] { return seen.a != 7; }, {[](Who who) {
           if (who.is(0)) {
             st(word(2, 0), 7);
             st_release<kSys>(word(1, 1), 1);
           }
           if (who.is(1)) {
             wait_acquire(word(1, 1), 1);
             st_release<kSys>(word(2, 1), 1);
           }
           if (who.is(2)) {
             wait_acquire(word(2, 1), 1);
             seen.a = ld(word(2, 0));
           }
         }});
}

TEST(Fences, AroundARelaxedFlag) {
  const auto send = [] {
    st(word(1, 0), 7);
    fence_acq_rel<kSys>();
    st_relaxed<kSys>(word(1, 1), 1);
  };
  expect_message(Outcome::kOrdered, send, [] {
    wait_relaxed(word(1, 1), 1);
    fence_acq_rel<kSys>();
    seen.a = ld(word(1, 0));
  });
}
TEST(Fences, OnlyTheSenders) {
  const auto send = [] {
    st(word(1, 0), 7);
    fence_acq_rel<kSys>();
    st_relaxed<kSys>(word(1, 1), 1);
  };
  expect_message(Outcome::kRacy, send, [] {
    wait_relaxed(word(1, 1), 1);
    seen.a = ld(word(1, 0));
  });
}
TEST(Fences, GpuScopeAcrossRanks) {
  const auto send = [] {
    st(word(1, 0), 7);
    fence_acq_rel<kGpu>();
    st_relaxed<kSys>(word(1, 1), 1);
  };
  expect_message(Outcome::kRacy, send, receive);
}

TEST(ReleaseSequence, ThroughAnAtomicOfAnotherRank) {
  expect(Outcome::kOrdered, [] { return seen.a != 7; }, {[](Who who) {
           if (who.is(0)) {
             st(word(2, 0), 7);
             st_release<kSys>(word(2, 1), 1);
           }
           if (who.is(1)) {
             wait_relaxed(word(2, 1), 1);
             fetch_add_acq_rel<kSys>(word(2, 1), 1);
           }
           if (who.is(2)) {
             wait_acquire(word(2, 1), 2);
             seen.a = ld(word(2, 0));
           }
         }});
}
TEST(ReleaseSequence, TheLastOfABlocksThreadsKnowsWhatAllDid) {
  expect(Outcome::kOrdered, [] { return seen.a != 0; }, {[](Who who) {
           if (who.rank != 0 || who.thread >= 4) return;
           st(word(0, 8 + who.block * 4 + who.thread), 7);
           if (fetch_add_acq_rel<kGpu>(word(0, 1), 1) != 7) return;
           for (u32 i = 0; i < 8; ++i) seen.a += ld(word(0, 8 + i)) != 7;
         }});
}

TEST(Barriers, BlockSyncThenAnotherThreadReleases) {
  expect(Outcome::kOrdered, [] { return seen.a != 7; }, {[](Who who) {
           if (who.is(0, 33)) st(word(1, 0), 7);
           if (who.rank == 0) block_sync();
           if (who.is(0)) st_release<kSys>(word(1, 1), 1);
           if (who.is(1)) receive();
         }});
}
TEST(Barriers, AnotherThreadReleasesWithoutBlockSync) {
  expect(Outcome::kRacy, [] { return seen.a != 7; }, {[](Who who) {
           if (who.is(0, 33)) st(word(1, 0), 7);
           if (who.is(0)) st_release<kSys>(word(1, 1), 1);
           if (who.is(1)) receive();
         }});
}
// A warp meets itself at a barrier of its own.
TEST(Barriers, NamedSyncThenAnotherThreadReleases) {
  expect(Outcome::kOrdered, [] { return seen.a != 7; }, {[](Who who) {
           if (who.is(0, 33)) st(word(1, 0), 7);
           if (who.rank == 0 && who.thread >= 32) named_sync(1, 32);
           if (who.is(0, 32)) st_release<kSys>(word(1, 1), 1);
           if (who.is(1)) receive();
         }});
}
TEST(Barriers, NamedSyncOfOthersThenAnotherThreadReleases) {
  expect(Outcome::kRacy, [] { return seen.a != 7; }, {[](Who who) {
           if (who.is(0, 33)) st(word(1, 0), 7);
           if (who.rank == 0 && who.thread < 32) named_sync(1, 32);
           if (who.is(0)) st_release<kSys>(word(1, 1), 1);
           if (who.is(1)) receive();
         }});
}
TEST(Barriers, WarpSyncThenLane0Releases) {
  expect(Outcome::kOrdered, [] { return seen.a != 7; }, {[](Who who) {
           if (who.is(0, 5)) st(word(1, 0), 7);
           if (who.rank == 0 && who.thread < 32) warp_sync();
           if (who.is(0)) st_release<kSys>(word(1, 1), 1);
           if (who.is(1)) receive();
         }});
}
TEST(Barriers, AShuffleOrdersNoMemory) {
  expect(Outcome::kRacy, [] { return seen.a != 7; }, {[](Who who) {
           if (who.is(0, 5)) st(word(1, 0), 7);
           if (who.rank == 0 && who.thread < 32) warp_shfl(1u, 0);
           if (who.is(0)) st_release<kSys>(word(1, 1), 1);
           if (who.is(1)) receive();
         }});
}

TEST(Words, EightByteRelaxedWordCarriesDataAndFlag) {
  const auto send = [] { st_relaxed<kSys>(as<u64>(word(1, 0)), (u64{7} << 32) | 1); };
  expect_message(Outcome::kOrdered, send, [] {
    u64 value = 0;
    while (static_cast<u32>(value = ld_relaxed<kSys>(as<u64>(word(1, 0)))) != 1) {
      spin_pause("data");
    }
    seen.a = static_cast<u32>(value >> 32);
  });
}
TEST(Words, SixteenByteWeakStoreTears) {
  expect(Outcome::kRacy, [] { return seen.a != seen.b; }, {[](Who who) {
           if (who.is(0)) st(as<Vec16>(word(1, 0)), {{7, 7, 7, 7}});
           if (who.is(1)) {
             const Vec16 value = ld(as<const Vec16>(word(1, 0)));
             seen.a = value.word[0];
             seen.b = value.word[3];
           }
         }});
}
TEST(Words, StoreBufferingIsSeen) {
  expect(Outcome::kWeak, [] { return !seen.a && !seen.b; }, {[](Who who) {
           if (who.is(0)) {
             st_relaxed<kSys>(word(0, 0), 1);
             seen.a = ld_relaxed<kSys>(word(0, 1));
           }
           if (who.is(1)) {
             st_relaxed<kSys>(word(0, 1), 1);
             seen.b = ld_relaxed<kSys>(word(0, 0));
           }
         }});
}
TEST(Words, ReadsOfOneWordNeverGoBack) {
  expect(Outcome::kOrdered, [] { return seen.b < seen.a; }, {[](Who who) {
           if (who.is(0)) {
             st_relaxed<kSys>(word(0, 0), 1);
             st_relaxed<kSys>(word(0, 0), 2);
           }
           if (who.is(1)) {
             seen.a = ld_relaxed<kSys>(word(0, 0));
             seen.b = ld_relaxed<kSys>(word(0, 0));
           }
         }});
}
TEST(Words, ALoadThatSinksBelowARelaxedAcknowledgment) {
  expect(Outcome::kHidden, [] { return seen.a == 7; }, {[](Who who) {
           if (who.is(0)) {
             seen.a = ld(word(0, 0));
             st_relaxed<kSys>(word(0, 1), 1);
           }
           if (who.is(1)) {
             wait_acquire(word(0, 1), 1);
             st(word(0, 0), 7);
           }
         }});
}
TEST(Words, BytesOfAWordAreApart) {
  expect(Outcome::kOrdered, [] { return seen.a != 0x04030201; }, {[](Who who) {
           if (who.rank != 0 || who.block != 0 || who.thread >= 32) return;
           const Ptr<u32> bytes = word(0, 2);
           if (who.thread < 2) {
             st(as<u16>(bytes) + who.thread, who.thread ? 0x0403 : 0x0201);
           }
           warp_sync();
           if (who.is(0, 3)) seen.a = ld(bytes);
         }});
}

TEST(Streams, TheNextKernelSeesEverything) {
  expect(Outcome::kOrdered,
         [] { return seen.a != 7; },
         {[](Who who) {
            if (who.is(0, 40, 1)) st(word(0, 0), 7);
          },
          [](Who who) {
            if (who.is(0)) seen.a = ld(word(0, 0));
          }});
}
TEST(Streams, TheNextKernelOfAnotherRankDoesNot) {
  expect(Outcome::kRacy,
         [] { return seen.a != 7; },
         {[](Who who) {
            if (who.is(0, 40, 1)) st(word(1, 0), 7);
          },
          [](Who who) {
            if (who.is(1)) seen.a = ld(word(1, 0));
          }});
}

}  // namespace
}  // namespace jax_ep::sim
