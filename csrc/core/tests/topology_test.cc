// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/topology.h"

#include <gtest/gtest.h>

#include <set>
#include <utility>

namespace jax_ep {
namespace {

TEST(Topology, EveryRankHasAPlaceOfItsOwn) {
  const Topology topology{.num_scaleup_ranks = 8, .num_scaleout_ranks = 3};
  ASSERT_EQ(topology.num_ranks(), 24);
  std::set<std::pair<int32_t, int32_t>> places;
  for (int32_t rank = 0; rank < topology.num_ranks(); ++rank) {
    const int32_t domain = topology.domain_of(rank);
    const int32_t index = topology.index_in_domain(rank);
    EXPECT_LT(domain, 3);
    EXPECT_LT(index, 8);
    EXPECT_EQ(topology.rank_at(domain, index), rank);
    places.emplace(domain, index);
  }
  EXPECT_EQ(places.size(), 24U);
  EXPECT_EQ(topology.domain_of(7), 0);
  EXPECT_EQ(topology.domain_of(8), 1);
}

TEST(Topology, RanksHostExpertsInTheirOrder) {
  EXPECT_EQ(owner_of(0, 4), 0);
  EXPECT_EQ(owner_of(3, 4), 0);
  EXPECT_EQ(owner_of(4, 4), 1);
}

}  // namespace
}  // namespace jax_ep
