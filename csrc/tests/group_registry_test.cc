// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/group_registry.h"

#include <gtest/gtest.h>

#include <chrono>
#include <set>
#include <thread>
#include <vector>

namespace jax_ep {
namespace {

TEST(GroupRegistry, HoldsAGroupUntilItIsClosed) {
  GroupRegistry& registry = GroupRegistry::instance();
  const int64_t before = registry.size();
  const int64_t id = registry.create(
      {.name = "EpGroup 3 (axis 'expert')", .num_ranks = 8, .timeout = std::chrono::seconds(5)});
  EXPECT_EQ(registry.size(), before + 1);

  const auto info = registry.find(id);
  ASSERT_TRUE(info.has_value());
  EXPECT_EQ(info->name, "EpGroup 3 (axis 'expert')");
  EXPECT_EQ(info->num_ranks, 8);
  EXPECT_EQ(info->timeout, std::chrono::seconds(5));

  EXPECT_TRUE(registry.close(id));
  EXPECT_FALSE(registry.find(id).has_value());
  EXPECT_FALSE(registry.close(id)) << "closing twice is harmless";
  EXPECT_EQ(registry.size(), before);
}

TEST(GroupRegistry, NeverUsesAnIdTwice) {
  GroupRegistry& registry = GroupRegistry::instance();
  std::set<int64_t> ids;
  for (int i = 0; i < 100; ++i) {
    const int64_t id = registry.create({});
    EXPECT_TRUE(ids.insert(id).second);
    EXPECT_TRUE(registry.close(id));
  }
}

TEST(GroupRegistry, IsThreadSafe) {
  GroupRegistry& registry = GroupRegistry::instance();
  const int64_t before = registry.size();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&registry, t] {
      for (int i = 0; i < 500; ++i) {
        const int64_t id = registry.create({.name = std::to_string(t), .num_ranks = t + 1});
        const auto info = registry.find(id);
        ASSERT_TRUE(info.has_value());
        EXPECT_EQ(info->num_ranks, t + 1);
        EXPECT_TRUE(registry.close(id));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(registry.size(), before);
}

}  // namespace
}  // namespace jax_ep
