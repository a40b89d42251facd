// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/cuda_registry.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/runtime/tests/runtime_fixture.h"

namespace jax_ep {
namespace {

class CudaRegistryTest : public RuntimeTest {
 protected:
  static std::shared_ptr<CudaGroup> make(const std::string& name = "EpGroup 0") {
    CudaGroupConfig config = group_config(1);
    config.group.name = name;
    std::unique_ptr<CudaGroup> group;
    EXPECT_TRUE(is_ok(CudaGroup::create(std::move(config), group)));
    EXPECT_TRUE(is_ok(connect_all(*group)));
    return group;
  }

  CudaGroupRegistry& registry_ = CudaGroupRegistry::instance();
};

TEST_F(CudaRegistryTest, KeepsAGroupUntilItIsClosed) {
  EXPECT_EQ(registry_.find(7), nullptr);
  EXPECT_TRUE(registry_.add(7, make("seven")));
  EXPECT_TRUE(registry_.add(-8, make("eight")));
  EXPECT_EQ(registry_.size(), 2);
  EXPECT_EQ(registry_.find(7)->config().group.name, "seven");
  EXPECT_EQ(registry_.find(-8)->config().group.name, "eight");
  EXPECT_TRUE(registry_.close(7));
  EXPECT_FALSE(registry_.close(7));
  EXPECT_EQ(registry_.find(7), nullptr);
  EXPECT_TRUE(registry_.close(-8));
  EXPECT_EQ(registry_.size(), 0);
}

TEST_F(CudaRegistryTest, AnIdIsOfOneGroup) {
  EXPECT_TRUE(registry_.add(7, make("first")));
  EXPECT_FALSE(registry_.add(7, make("second")));
  EXPECT_EQ(registry_.find(7)->config().group.name, "first");
  EXPECT_EQ(left_behind().size(), 1U) << "the second holds nothing";
  EXPECT_TRUE(registry_.close(7));
}

TEST_F(CudaRegistryTest, AGroupInUseIsFreedByItsLastUser) {
  EXPECT_TRUE(registry_.add(7, make()));
  std::shared_ptr<CudaGroup> handler = registry_.find(7);
  EXPECT_TRUE(registry_.close(7));
  const RankContext* rank = nullptr;
  EXPECT_TRUE(is_ok(handler->find(0, rank)));
  EXPECT_EQ(left_behind().size(), 1U);
  handler.reset();
  EXPECT_EQ(left_behind(), Texts{});
}

// Why a call finds no group: it was closed, or it never was.
TEST_F(CudaRegistryTest, ACallIsToldOfWhatGroupItIs) {
  EXPECT_TRUE(registry_.add(7, make("seven")));
  std::shared_ptr<CudaGroup> group;
  EXPECT_TRUE(is_ok(registry_.find_open(7, "plan", group)));
  EXPECT_EQ(group->config().group.name, "seven");
  group.reset();
  EXPECT_TRUE(registry_.close(7));
  const Status closed = registry_.find_open(7, "plan", group);
  EXPECT_EQ(closed.code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(contains(closed.message(), "seven"));
  EXPECT_TRUE(contains(closed.message(), "plan"));
  const Status unknown = registry_.find_open(12345, "plan", group);
  EXPECT_EQ(unknown.code(), StatusCode::kFailedPrecondition);
  EXPECT_FALSE(unknown.message() == closed.message());
  EXPECT_EQ(group, nullptr);
}

// To free a group takes as long as its kernels run; other groups' calls do not wait for that.
TEST_F(CudaRegistryTest, OtherGroupsAreFoundWhileOneIsFreed) {
  EXPECT_TRUE(registry_.add(1, make("one")));
  EXPECT_TRUE(registry_.add(2, make("two")));
  fake_cudart::run_kernels(0);
  std::thread closing([&] { EXPECT_TRUE(registry_.close(1)); });
  while (fake_cudart::num_waiting() == 0) std::this_thread::yield();
  EXPECT_EQ(registry_.find(1), nullptr);
  EXPECT_EQ(registry_.find(2)->config().group.name, "two");
  fake_cudart::finish_kernels();
  closing.join();
  EXPECT_TRUE(registry_.close(2));
}

TEST_F(CudaRegistryTest, HandlersRunWhileGroupsComeAndGo) {
  std::atomic<bool> stop = false;
  std::vector<std::thread> handlers;
  for (int i = 0; i < 2; ++i) {
    handlers.emplace_back([&] {
      while (!stop) {
        const std::shared_ptr<CudaGroup> group = registry_.find(7);
        const RankContext* rank = nullptr;
        if (group == nullptr || !group->find(0, rank).ok()) continue;
        EXPECT_EQ(rank->view().heap[0], rank->handle().base);
        EXPECT_TRUE(rank->error().ok());
      }
    });
  }
  for (int i = 0; i < 10; ++i) {
    EXPECT_TRUE(registry_.add(7, make()));
    std::this_thread::yield();
    EXPECT_TRUE(registry_.close(7));
  }
  stop = true;
  for (std::thread& handler : handlers) handler.join();
}

}  // namespace
}  // namespace jax_ep
