// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/rank_context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/runtime/tests/runtime_fixture.h"

namespace jax_ep {
namespace {

class RankContextTest : public RuntimeTest {
 protected:
  static RankContext create(const RankConfig& config) {
    RankContext context;
    EXPECT_TRUE(is_ok(RankContext::create(config, context)));
    return context;
  }
};

TEST_F(RankContextTest, ShowsKernelsWhatTheyNeed) {
  RankConfig config = rank_config(1, 2, 3);
  config.group.timeout_s = 0.5;
  const RankContext rank = create(config);
  const RankView& view = rank.view();
  EXPECT_EQ(view.rank, 1);
  EXPECT_EQ(view.num_ranks, 2);
  EXPECT_EQ(view.timeout_ns, 500'000'000U);
  EXPECT_EQ(view.chunk_target, kChunkTarget);
  EXPECT_EQ(view.layout.total_bytes, make_heap_layout(config.group.heap).total_bytes);
  ASSERT_NE(view.error, nullptr);
  EXPECT_EQ(view.error->written, 0U);
  EXPECT_EQ(view.long_waits[1], 0U);
  EXPECT_EQ(view.control[control_index(Control::kClosed)], 0U);
  EXPECT_EQ(view.control[control_index(Channel::kHighThroughput, ChannelControl::kEpoch)], 0U);
  EXPECT_FALSE(rank.connected());
  EXPECT_EQ(rank.handle().owner.nonce, kNonce);
  EXPECT_EQ(rank.handle().owner.rank, 1);
  // Kernels are loaded now: later, while others wait for them, it would be a deadlock.
  const Texts calls = fake_cudart::calls();
  EXPECT_EQ(std::count(calls.begin(), calls.end(), "cudaFuncSetAttribute"), 52);
}

TEST_F(RankContextTest, TimesOutNoEarlierThanAsked) {
  RankConfig config = rank_config(0, 1, 0);
  config.group.timeout_s = 1e-9 * 0.25;
  EXPECT_EQ(create(config).view().timeout_ns, 1U);
}

TEST_F(RankContextTest, ReportsAWaitSoonAndExactlyWhenItIsToBeWarnedOf) {
  RankConfig config = rank_config(0, 1, 0);
  config.group.warn_after_s = 10;
  EXPECT_EQ(create(config).view().report_ns, 625'000'000U) << "10 s after four doublings";
  config.group.warn_after_s = kNoLimit;
  config.group.timeout_s = kNoLimit;
  const RankContext rank = create(config);
  EXPECT_EQ(rank.view().report_ns, 1'000'000'000U);
  EXPECT_EQ(rank.view().timeout_ns, uint64_t{1} << 61);
}

TEST_F(RankContextTest, MapsTheHeapsInTheOrderOfTheRanks) {
  std::vector<RankContext> ranks(3);
  std::vector<HeapHandle> handles;
  for (int32_t rank = 0; rank < 3; ++rank) {
    const auto index = static_cast<size_t>(rank);
    ASSERT_TRUE(is_ok(RankContext::create(rank_config(rank, 3, 2 - rank), ranks[index])));
    handles.push_back(ranks[index].handle());
  }
  for (RankContext& rank : ranks) {
    ASSERT_TRUE(is_ok(rank.connect(handles, 1)));
    EXPECT_TRUE(rank.connected());
    for (size_t peer = 0; peer < 3; ++peer) {
      EXPECT_EQ(rank.view().heap[peer], handles[peer].base);
    }
  }
}

// Kernels get heaps of their own domain, and a transport over mapped memory those of all.
TEST_F(RankContextTest, MapsTheHeapsOfItsDomainAndTheNetworkHeapsOfAll) {
  constexpr int32_t kRanks = 4;
  std::vector<RankContext> ranks(kRanks);
  std::vector<HeapHandle> handles;
  for (int32_t rank = 0; rank < kRanks; ++rank) {
    RankConfig config = rank_config(rank, kRanks, rank);
    config.group.heap.num_neighbors = 2;
    RankContext& context = ranks[static_cast<size_t>(rank)];
    ASSERT_TRUE(is_ok(RankContext::create(config, context)));
    EXPECT_EQ(context.internode_kernels(), nullptr);
    handles.push_back(context.handle());
  }
  const HeapLayout layout = make_heap_layout(ranks[0].config().group.heap);
  for (RankContext& rank : ranks) {
    ASSERT_TRUE(is_ok(rank.connect(handles, 1)));
    const RankView& view = rank.view();
    EXPECT_EQ(view.first_neighbor, view.rank / 2 * 2);
    EXPECT_EQ(view.num_neighbors, 2);
    for (int32_t peer = 0; peer < kRanks; ++peer) {
      std::byte* const expected =
          peer / 2 == view.rank / 2 ? handles[static_cast<size_t>(peer)].base : nullptr;
      EXPECT_EQ(view.heap[peer], expected);
    }
    ASSERT_NE(rank.internode_kernels(), nullptr);
    PlanParams params{};
    params.view = view;
    const LaunchShape shape{.num_blocks = 1, .num_warps = 1, .num_stages = 0};
    ASSERT_EQ(rank.internode_kernels()->launch(params, shape, nullptr), cudaSuccess);
    const LoopbackNetwork network = fake_cudart::launches().back().network.value();
    EXPECT_EQ(network.heaps.rank, view.rank);
    EXPECT_EQ(network.network.layout.window, 16);
    EXPECT_NE(fake_cudart::on_host(network.network.phases), nullptr);
    for (int32_t peer = 0; peer < kRanks; ++peer) {
      std::byte* const heap = handles[static_cast<size_t>(peer)].base + network_offset(layout);
      EXPECT_EQ(network.heaps.heap[peer], heap);
      if (peer / 2 == view.rank / 2) {
        EXPECT_EQ(network.network.heap[peer % 2], heap);
      }
    }
  }
}

TEST_F(RankContextTest, SharesTheSmsOfADevice) {
  fake_cudart::Machine machine = fake_cudart::make_machine(2);
  machine.devices[0].num_sms = 5;
  fake_cudart::reset(machine);
  RankConfig config = rank_config(0, 3, 0);
  config.group.max_num_sms = 20;
  config.group.tail_num_sms = 0;
  RankContext rank = create(config);
  const RankContext here = create(rank_config(1, 3, 0));
  const RankContext elsewhere = create(rank_config(2, 3, 1));
  ASSERT_TRUE(is_ok(
      rank.connect(std::vector<HeapHandle>{rank.handle(), here.handle(), elsewhere.handle()}, 2)));
  EXPECT_EQ(rank.sm_budget().available, 2);
  EXPECT_EQ(rank.sm_budget().requested, 20);
  EXPECT_EQ(rank.sm_budget().tail, 0);
}

TEST_F(RankContextTest, HasOneSmAtLeast) {
  fake_cudart::Machine machine = fake_cudart::make_machine(1);
  machine.devices[0].num_sms = 1;
  fake_cudart::reset(machine);
  RankContext rank = create(rank_config(0, 2, 0));
  const RankContext other = create(rank_config(1, 2, 0));
  ASSERT_TRUE(is_ok(rank.connect(std::vector<HeapHandle>{rank.handle(), other.handle()}, 2)));
  EXPECT_EQ(rank.sm_budget().available, 1);
}

// Each of these handles must not be mapped; what was mapped before it must not stay so.
TEST_F(RankContextTest, RefusesHandlesOfOthers) {
  RankContext rank = create(rank_config(0, 2, 0));
  const RankContext peer = create(rank_config(1, 2, 1));
  RankConfig other = rank_config(1, 2, 2);
  other.group.heap.max_tokens = 8;
  const RankContext larger = create(other);
  other = rank_config(1, 2, 2);
  other.local.group_index = 1;
  const RankContext of_other_group = create(other);
  other = rank_config(1, 2, 2);
  other.group.nonce = kNonce + 1;
  const RankContext stranger = create(other);

  const auto refusal = [&](std::vector<HeapHandle> handles, StatusCode code) {
    const Status status = rank.connect(handles, 1);
    EXPECT_EQ(status.code(), code);
    EXPECT_FALSE(rank.connected());
    EXPECT_EQ(rank.view().heap[0], nullptr);
    EXPECT_EQ(rank.view().heap[1], nullptr);
    return status.message();
  };
  EXPECT_EQ(refusal({rank.handle()}, StatusCode::kInvalidArgument),
            "connect: 1 handles for 2 ranks");
  EXPECT_EQ(refusal({rank.handle(), stranger.handle()}, StatusCode::kFailedPrecondition),
            "the handle of rank 1 is of another EpGroup");
  EXPECT_EQ(refusal({rank.handle(), of_other_group.handle()}, StatusCode::kFailedPrecondition),
            "the handle of rank 1 of group 0 is that of rank 1 of group 1");
  EXPECT_EQ(refusal({peer.handle(), rank.handle()}, StatusCode::kFailedPrecondition),
            "the handle of rank 0 of group 0 is that of rank 1 of group 0");
  EXPECT_TRUE(contains(refusal({rank.handle(), larger.handle()}, StatusCode::kFailedPrecondition),
                       "laid out otherwise than"));
  other = rank_config(1, 2, 2);
  other.group.heap.num_neighbors = 1;
  EXPECT_TRUE(
      contains(refusal({rank.handle(), create(other).handle()}, StatusCode::kFailedPrecondition),
               "laid out otherwise than"));
  ASSERT_TRUE(is_ok(rank.connect(std::vector<HeapHandle>{rank.handle(), peer.handle()}, 1)));
}

TEST_F(RankContextTest, SaysWhyAKernelGaveUp) {
  const std::pair<WaitTag, StatusCode> cases[] = {
      {WaitTag::kAcknowledged, StatusCode::kDeadlineExceeded},
      {WaitTag::kArrived, StatusCode::kDeadlineExceeded},
      {WaitTag::kGridBarrier, StatusCode::kDeadlineExceeded},
      {WaitTag::kWrongRank, StatusCode::kFailedPrecondition},
      {WaitTag::kWrongOp, StatusCode::kInvalidArgument},
      {WaitTag::kWrongCall, StatusCode::kInvalidArgument},
      {WaitTag::kOverlap, StatusCode::kFailedPrecondition},
      {WaitTag::kStaleFlight, StatusCode::kFailedPrecondition},
      {WaitTag::kPacket, StatusCode::kDeadlineExceeded},
      {WaitTag::kClosed, StatusCode::kFailedPrecondition},
      {WaitTag::kPeerGaveUp, StatusCode::kDeadlineExceeded},
  };
  for (const auto& [tag, code] : cases) {
    const RankContext rank = create(rank_config(0, 2, 0));
    EXPECT_TRUE(is_ok(rank.error()));
    give_up(rank, tag);
    EXPECT_EQ(rank.error().code(), code);
    EXPECT_TRUE(contains(rank.error().message(), "rank 0"));
  }
}

TEST_F(RankContextTest, TellsItsKernelsThatAnotherRankGaveUp) {
  RankContext ranks[2] = {create(rank_config(0, 2, 0)), create(rank_config(0, 2, 1))};
  const Aborted aborted{.by = 1,
                        .blamed = 0,
                        .tag = static_cast<uint32_t>(WaitTag::kDelivered),
                        .op = static_cast<uint32_t>(OpKind::kDispatch)};
  const auto word_of = [](const RankContext& rank) {
    uint32_t word = 0;
    const int64_t offset = rank.view().layout.at(Region::kAborted);
    std::memcpy(&word, rank.handle().base + offset, sizeof word);
    return word;
  };
  EXPECT_TRUE(is_ok(ranks[0].tell(aborted)));
  EXPECT_EQ(word_of(ranks[0]), pack(aborted));
  EXPECT_EQ(word_of(ranks[1]), 0U);
  fake_cudart::trap();
  EXPECT_FALSE(ranks[0].tell(aborted).ok());
}

// Rank 1 of domains {0, 1}, {2, 3} and {4, 5}: its rail is ranks 1, 3 and 5.
TEST_F(RankContextTest, FindsWhoHasNotReadWhatItHasSent) {
  RankConfig config = rank_config(1, 6, 1);
  config.group.heap.num_neighbors = 2;
  const RankContext rank = create(config);
  const NetworkLayout network = network_layout_of(config.group.heap);
  std::byte* const heap = rank.handle().base + network_offset(rank.view().layout);
  const auto put = [&](NetworkRegion region, int32_t domain, int32_t buffer, uint32_t message) {
    const uint64_t word = arrival_flag(message, OpKind::kDispatch, 0);
    const int64_t at = network.at(region) + 8 * (domain * network.window + buffer);
    std::memcpy(heap + at, &word, sizeof word);
  };
  const auto unread = [&] {
    std::vector<int32_t> ranks = {99};
    EXPECT_TRUE(is_ok(rank.find_unread(ranks)));
    return ranks;
  };
  EXPECT_EQ(unread(), std::vector<int32_t>{}) << "nothing has been sent";
  put(NetworkRegion::kDeliveredSent, 1, 0, 0);
  EXPECT_EQ(unread(), std::vector<int32_t>{3}) << "the very first message";
  put(NetworkRegion::kDeliveredSent, 2, 0, 0);
  put(NetworkRegion::kDeliveredSent, 2, 1, 1);
  EXPECT_EQ(unread(), (std::vector<int32_t>{3, 5}));
  put(NetworkRegion::kCredits, 1, 0, 0);
  put(NetworkRegion::kCredits, 2, 0, 0);
  EXPECT_EQ(unread(), std::vector<int32_t>{5});
  put(NetworkRegion::kCredits, 2, 1, 1);
  EXPECT_EQ(unread(), std::vector<int32_t>{});
  put(NetworkRegion::kDeliveredSent, 1, 0, static_cast<uint32_t>(network.window));
  EXPECT_EQ(unread(), std::vector<int32_t>{3}) << "the credit is of the message before";
  fake_cudart::trap();
  std::vector<int32_t> ranks;
  EXPECT_FALSE(rank.find_unread(ranks).ok());
}

TEST_F(RankContextTest, ARankOfOneDomainHasNoNetworkHeap) {
  std::vector<int32_t> ranks = {99};
  EXPECT_EQ(create(rank_config(0, 2, 0)).find_unread(ranks).code(),
            StatusCode::kFailedPrecondition);
  EXPECT_EQ(ranks, std::vector<int32_t>{});
}

TEST_F(RankContextTest, TheRecordOutlivesTheTrap) {
  const RankContext rank = create(rank_config(0, 2, 0));
  give_up(rank, WaitTag::kArrived);
  fake_cudart::trap();
  EXPECT_TRUE(contains(rank.error().message(), "rank 0 waited 60 s"));
}

TEST_F(RankContextTest, ARecordIsReadWhileAKernelWritesIt) {
  const RankContext rank = create(rank_config(0, 2, 0));
  std::thread kernel([&] { give_up(rank, WaitTag::kArrived); });
  while (rank.error().ok() && !HasFailure()) std::this_thread::yield();
  EXPECT_TRUE(contains(rank.error().message(), "rank 1"));
  kernel.join();
}

TEST_F(RankContextTest, WaitsForKernelsOfItsDevice) {
  const RankContext rank = create(rank_config(0, 1, 2));
  fake_cudart::run_kernels(1);
  EXPECT_TRUE(is_ok(rank.wait_for_kernels(kNoLimit)));  // not for another device's
  fake_cudart::run_kernels(2);
  std::atomic<bool> waited = false;
  std::thread thread([&] {
    EXPECT_TRUE(is_ok(rank.wait_for_kernels(kNoLimit)));
    waited = true;
  });
  while (fake_cudart::num_waiting() == 0) std::this_thread::yield();
  EXPECT_FALSE(waited);
  fake_cudart::finish_kernels();
  thread.join();
}

TEST_F(RankContextTest, WaitingForKernelsTellsOfATrap) {
  const RankContext rank = create(rank_config(0, 1, 2));
  fake_cudart::trap();
  for (const double limit_s : {kNoLimit, 60.0}) {
    const Status status = rank.wait_for_kernels(limit_s);
    EXPECT_EQ(status.code(), StatusCode::kInternal);
    EXPECT_TRUE(contains(status.message(), "cudaErrorLaunchFailure"));
    EXPECT_TRUE(contains(status.message(), "cudaDeviceSynchronize"));
    // Or the next launch of this thread would report it as its own.
    EXPECT_EQ(fake_cudart::last_error(), cudaSuccess);
  }
}

TEST_F(RankContextTest, AWaitForKernelsHasALimit) {
  const RankContext rank = create(rank_config(0, 1, 2));
  fake_cudart::run_kernels(2);
  const Status status = rank.wait_for_kernels(0.05);
  EXPECT_EQ(status.code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(status.message(), "kernels still run on CUDA device 2");
  fake_cudart::finish_kernels();
  while (fake_cudart::num_waiting() > 0) std::this_thread::yield();
  EXPECT_TRUE(is_ok(rank.wait_for_kernels(60)));
}

TEST_F(RankContextTest, IsFreedAfterATrap) {
  {
    RankContext rank = create(rank_config(0, 2, 1));
    const RankContext peer = create(rank_config(1, 2, 2));
    ASSERT_TRUE(is_ok(rank.connect(std::vector<HeapHandle>{rank.handle(), peer.handle()}, 1)));
    fake_cudart::trap();
    EXPECT_FALSE(rank.wait_for_kernels(kNoLimit).ok());
    EXPECT_FALSE(rank.close().ok());
    rank.disconnect();
  }
  EXPECT_EQ(left_behind(), Texts{});
  EXPECT_EQ(fake_cudart::last_error(), cudaSuccess);
}

TEST_F(RankContextTest, HasOneOwner) {
  RankContext one = create(rank_config(0, 1, 0));
  ErrorRecord* const record = one.view().error;
  const RankContext other = std::move(one);
  EXPECT_EQ(other.view().error, record);
  EXPECT_EQ(left_behind().size(), 1U);
  give_up(other, WaitTag::kWrongOp);
  EXPECT_FALSE(other.error().ok());
}

}  // namespace
}  // namespace jax_ep
