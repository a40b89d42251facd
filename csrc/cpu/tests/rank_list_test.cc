// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rendezvous/rank_list.h"

#include <gtest/gtest.h>

#include <vector>

namespace jax_ep {
namespace {

std::string format(const std::vector<int32_t>& ranks) { return format_ranks(ranks); }

TEST(RankList, JoinsThreeOrMoreNeighbors) {
  EXPECT_EQ(format({}), "");
  EXPECT_EQ(format({5}), "5");
  EXPECT_EQ(format({0, 1}), "0,1");
  EXPECT_EQ(format({0, 1, 3}), "0,1,3");
  EXPECT_EQ(format({0, 1, 2}), "0-2");
  EXPECT_EQ(format({0, 2, 3, 4, 5, 9, 10, 62, 63}), "0,2-5,9,10,62,63");
}

}  // namespace
}  // namespace jax_ep
