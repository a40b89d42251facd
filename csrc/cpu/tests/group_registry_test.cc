// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/group_registry.h"

#include <gtest/gtest.h>

#include <chrono>
#include <limits>
#include <string>
#include <thread>
#include <vector>

namespace jax_ep {
namespace {

TEST(GroupRegistry, HoldsAGroupUntilItIsClosed) {
  GroupRegistry& registry = GroupRegistry::instance();
  const int64_t before = registry.size();
  ASSERT_TRUE(registry.add({.id = 77,
                            .name = "EpGroup 3 (axis 'expert')",
                            .num_ranks = 2,
                            .timeout = std::chrono::seconds(5),
                            .places = {{9, {1, 0}}, {4, {1, 1}}}}));
  EXPECT_EQ(registry.size(), before + 1);

  const GroupInfoPtr info = registry.find(77);
  ASSERT_NE(info, nullptr);
  EXPECT_EQ(info->name, "EpGroup 3 (axis 'expert')");
  EXPECT_EQ(info->num_ranks, 2);
  EXPECT_EQ(info->timeout, std::chrono::seconds(5));
  EXPECT_EQ(info->device_of({.group_index = 1, .rank = 1}), 4);
  EXPECT_EQ(info->device_of({.group_index = 0, .rank = 1}), -1);

  EXPECT_TRUE(registry.close(77));
  EXPECT_EQ(registry.find(77), nullptr);
  EXPECT_FALSE(registry.close(77)) << "closing twice is harmless";
  EXPECT_EQ(registry.size(), before);
}

TEST(GroupRegistry, SaysWhyAGroupIsNotOpen) {
  GroupRegistry& registry = GroupRegistry::instance();
  ASSERT_TRUE(registry.add({.id = 78, .name = "EpGroup 4 (axis 'expert')"}));
  GroupInfoPtr info;
  EXPECT_TRUE(registry.find_open(78, "plan", info).ok());
  EXPECT_EQ(info->id, 78);
  registry.close(78);
  const Status closed = registry.find_open(78, "plan", info);
  EXPECT_EQ(info, nullptr);
  EXPECT_EQ(closed.code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(closed.message(),
            "EpGroup 4 (axis 'expert') of this plan has been closed; a compiled function may be "
            "called only while the group that it was traced with is open");
  const Status unknown = registry.find_open(79, "combine", info);
  EXPECT_EQ(unknown.code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(unknown.message().find("this combine was compiled for an EpGroup that this process "
                                   "has not made (id 79)"),
            std::string::npos)
      << unknown.message();
}

TEST(GroupRegistry, NeverUsesAnIdTwice) {
  GroupRegistry& registry = GroupRegistry::instance();
  ASSERT_TRUE(registry.add({.id = 80}));
  EXPECT_FALSE(registry.add({.id = 80}));
  registry.close(80);
  EXPECT_FALSE(registry.add({.id = 80}));
}

TEST(GroupRegistry, ForgetsTheNamesOfGroupsThatWereClosedLongAgo) {
  GroupRegistry& registry = GroupRegistry::instance();
  for (int64_t id = 100'000; id < 105'000; ++id) {
    ASSERT_TRUE(registry.add({.id = id, .name = "EpGroup"}));
    registry.close(id);
  }
  GroupInfoPtr info;
  const auto text = [&](int64_t id) { return registry.find_open(id, "plan", info).message(); };
  EXPECT_NE(text(104'999).find("has been closed"), std::string::npos);
  EXPECT_NE(text(100'000).find("has not made"), std::string::npos);
}

TEST(GroupRegistry, IsThreadSafe) {
  GroupRegistry& registry = GroupRegistry::instance();
  const int64_t before = registry.size();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&registry, t] {
      for (int i = 0; i < 500; ++i) {
        const int64_t id = 1000 * (t + 1) + i;
        ASSERT_TRUE(registry.add({.id = id, .num_ranks = t + 1}));
        const GroupInfoPtr info = registry.find(id);
        ASSERT_NE(info, nullptr);
        EXPECT_EQ(info->num_ranks, t + 1);
        EXPECT_TRUE(registry.close(id));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(registry.size(), before);
}

TEST(ToMilliseconds, RoundsUpAndNeverOverflows) {
  using std::chrono::milliseconds;
  EXPECT_EQ(to_milliseconds(1.0), milliseconds(1000));
  EXPECT_EQ(to_milliseconds(1e-9), milliseconds(1));
  const milliseconds century = to_milliseconds(std::numeric_limits<double>::infinity());
  for (const double seconds : {1e10, 1e12, 1e18, 1e300}) {
    EXPECT_EQ(to_milliseconds(seconds), century) << seconds;
  }
  // Twice that, from now on, is still a time.
  EXPECT_GT(std::chrono::steady_clock::now() + 2 * century, std::chrono::steady_clock::now());
}

}  // namespace
}  // namespace jax_ep
