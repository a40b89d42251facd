// SPDX-License-Identifier: Apache-2.0
// Handles are arrays of the user's program. Whatever is in them, dispatch and combine read and
// write nothing outside the buffers (the address sanitizer watches), and the message names the
// place.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>

#include "csrc/cpu/calls.h"
#include "csrc/testing/cluster.h"

namespace jax_ep {
namespace {

ClusterOptions options(Layout layout) {
  return {.shape = {.num_ranks = 2,
                    .num_experts = 4,
                    .num_topk = 2,
                    .num_tokens = 5,
                    .recv_capacity = 20,
                    .layout = layout}};
}

void expect_error(const Status& status, const std::string& message) {
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), message);
}

class HandleErrors : public testing::TestWithParam<std::tuple<OpKind, Layout>> {
 protected:
  HandleErrors() { EXPECT_TRUE(cluster_.plan().ok()); }

  Status call() {
    return std::get<0>(GetParam()) == OpKind::kDispatch ? cluster_.dispatch() : cluster_.combine();
  }

  Cluster cluster_{options(std::get<1>(GetParam()))};
};

INSTANTIATE_TEST_SUITE_P(Calls,
                         HandleErrors,
                         testing::Combine(testing::Values(OpKind::kDispatch, OpKind::kCombine),
                                          testing::Values(Layout::kExpert, Layout::kRank)),
                         [](const auto& info) {
                           const bool dispatches = std::get<0>(info.param) == OpKind::kDispatch;
                           return (dispatches ? "dispatch_" : "combine_") +
                                  std::string(name(std::get<1>(info.param)));
                         });

TEST_P(HandleErrors, Slot) {
  for (const int32_t bad :
       {20, -2, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    cluster_.rank(1).slot[7] = bad;
    expect_error(call(),
                 "rank 1: slot[3, 1] is " + std::to_string(bad) +
                     ", but must be -1 (no row) or a row in [0, 20)");
  }
}

TEST_P(HandleErrors, Expert) {
  for (const int32_t bad :
       {4, -2, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    cluster_.rank(0).topk_idx[8] = bad;
    expect_error(call(),
                 "rank 0: topk_idx[4, 0] is " + std::to_string(bad) +
                     ", but must be -1 (no selection) or an expert in [0, 4)");
  }
}

TEST_P(HandleErrors, SlotWithoutExpert) {
  cluster_.rank(0).topk_idx[8] = -1;
  cluster_.rank(0).slot[8] = 3;
  expect_error(
      call(),
      "rank 0: slot[4, 0] is 3, but topk_idx there is -1 (no selection): slot and topk_idx must "
      "come from the same plan");
}

TEST_P(HandleErrors, TheFirstOfSeveralIsNamed) {
  cluster_.rank(1).slot[9] = 99;
  cluster_.rank(1).slot[2] = 98;
  expect_error(call(), "rank 1: slot[1, 0] is 98, but must be -1 (no row) or a row in [0, 20)");
}

TEST_P(HandleErrors, AllGarbage) {
  for (RankBuffers& rank : cluster_.ranks()) {
    std::fill(rank.slot.begin(), rank.slot.end(), kUntouched);
    std::fill(rank.topk_idx.begin(), rank.topk_idx.end(), 0x7FFFFFFF);
    std::fill(rank.row_source.begin(), rank.row_source.end(), kUntouched);
  }
  expect_error(
      call(),
      "rank 0: topk_idx[0, 0] is 2147483647, but must be -1 (no selection) or an expert in "
      "[0, 4)");
}

// Zeros pass every check: any row may be read and written, but only inside the buffers.
TEST_P(HandleErrors, AHandleOfZerosStaysInside) {
  for (RankBuffers& rank : cluster_.ranks()) {
    std::fill(rank.slot.begin(), rank.slot.end(), 0);
    std::fill(rank.topk_idx.begin(), rank.topk_idx.end(), 0);
    std::fill(rank.row_source.begin(), rank.row_source.end(), 0);
  }
  EXPECT_TRUE(call().ok());
}

// Dispatch alone reads it.
TEST(DispatchErrors, RowSource) {
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    Cluster cluster{options(layout)};
    ASSERT_TRUE(cluster.plan().ok());
    for (const int32_t bad : {10, -2, std::numeric_limits<int32_t>::min()}) {
      cluster.rank(1).row_source[6] = bad;
      expect_error(cluster.dispatch(),
                   "rank 1: row_source[6] is " + std::to_string(bad) +
                       ", but must be -1 (no token) or a token of all ranks in [0, 10)");
    }
  }
}

}  // namespace
}  // namespace jax_ep
