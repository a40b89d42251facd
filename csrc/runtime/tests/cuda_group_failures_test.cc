// SPDX-License-Identifier: Apache-2.0
// Each call of the CUDA runtime that a group's life makes fails once: the step that made it says
// so, nothing stays behind, and the next group is as good as the first.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "csrc/runtime/rank_words.h"
#include "csrc/runtime/tests/runtime_fixture.h"

namespace jax_ep {
namespace {

// By which name a status speaks of a function.
std::string name_in_status(const std::string& function) {
  return function == "cudaFuncSetAttribute" ? "load_kernels" : function;
}

// A part of a group's life; `group` stays null if it could not be made.
using Steps = std::function<Status(std::unique_ptr<CudaGroup>& group)>;

Status nothing(std::unique_ptr<CudaGroup>& /*group*/) { return {}; }

Status create_and_connect(std::unique_ptr<CudaGroup>& group) {
  JAX_EP_RETURN_IF_ERROR(CudaGroup::create(group_config(2), group));
  return connect_all(*group);
}

Status disconnect(std::unique_ptr<CudaGroup>& group) { return group->disconnect(kNoLimit); }

// As at a process's end: a thread waits.
Status disconnect_in_time(std::unique_ptr<CudaGroup>& group) { return group->disconnect(60); }

Status destroy(std::unique_ptr<CudaGroup>& group) {
  group.reset();
  return {};
}

struct Outcome {
  std::string function;  // that failed
  Status status;         // of the step that called it
};

class CudaGroupFailures : public RuntimeTest {
 protected:
  // Takes what words the pools have, so that the next group's are allocated, as the first's are.
  static std::vector<RankWords> drain_pools() {
    fake_cudart::reset(fake_cudart::make_machine(2));
    std::vector<RankWords> taken;
    for (int32_t device = 0; device < 2; ++device) {
      EXPECT_EQ(cudaSetDevice(device), cudaSuccess);
      fake_cudart::fail("cudaHostAlloc", 1);
      RankWords words;
      while (RankWords::allocate({.group_name = "taken", .device = device}, words).ok()) {
        taken.push_back(std::move(words));
      }
    }
    return taken;
  }

  // Runs `before` without failures, then `during` with a failure of its n-th call. Nothing if there
  // were fewer calls.
  static std::optional<Outcome> fail_one(const Steps& before, const Steps& during, int n) {
    const std::vector<RankWords> taken = drain_pools();
    fake_cudart::reset(fake_cudart::make_machine(2));
    EXPECT_EQ(cudaSetDevice(1), cudaSuccess);
    std::optional<Outcome> outcome;
    {
      std::unique_ptr<CudaGroup> group;
      EXPECT_TRUE(is_ok(before(group)));
      const size_t calls = fake_cudart::calls().size() + static_cast<size_t>(n) - 1;
      fake_cudart::fail("", n, cudaErrorUnknown);
      const Status status = during(group);
      EXPECT_EQ(fake_cudart::last_error(), cudaSuccess) << "after call " << n;
      if (fake_cudart::pending_failures() == 0) outcome = {fake_cudart::calls()[calls], status};
    }
    EXPECT_EQ(left_behind(), Texts{}) << "after call " << n;
    EXPECT_EQ(fake_cudart::violations(), Texts{}) << "after call " << n;
    EXPECT_EQ(fake_cudart::last_error(), cudaSuccess) << "after call " << n;
    return outcome;
  }

  // Lets each call of `during` fail in turn. Those that end the step must be named by its status.
  static std::vector<Outcome> fail_each(const Steps& before, const Steps& during) {
    std::vector<Outcome> outcomes;
    while (const auto outcome = fail_one(before, during, static_cast<int>(outcomes.size()) + 1)) {
      outcomes.push_back(*outcome);
      if (outcome->status.ok()) continue;
      EXPECT_EQ(outcome->status.code(), StatusCode::kInternal);
      EXPECT_TRUE(contains(outcome->status.message(), "cudaErrorUnknown"));
      EXPECT_TRUE(contains(outcome->status.message(), name_in_status(outcome->function)));
      EXPECT_TRUE(contains(outcome->status.message(), "at csrc/runtime/"));
    }
    fake_cudart::reset(fake_cudart::make_machine(2));
    return outcomes;
  }

  static auto count(const std::vector<Outcome>& outcomes, const std::string& function, bool ok) {
    return std::count_if(outcomes.begin(), outcomes.end(), [&](const Outcome& outcome) {
      return outcome.function == function && outcome.status.ok() == ok;
    });
  }
};

TEST_F(CudaGroupFailures, OfEachCallThatMakesAGroup) {
  const std::vector<Outcome> outcomes = fail_each(nothing, create_and_connect);
  for (const char* function : {"cudaGetDevice",
                               "cudaMalloc",
                               "cudaStreamCreateWithFlags",
                               "cudaMemsetAsync",
                               "cudaStreamSynchronize",
                               "cudaHostAlloc",
                               "cudaHostGetDevicePointer",
                               "cudaFuncSetAttribute",
                               "cudaDeviceGetAttribute",
                               "cudaGetDeviceProperties",
                               "cudaIpcGetMemHandle",
                               "cudaDeviceCanAccessPeer",
                               "cudaDeviceEnablePeerAccess"}) {
    EXPECT_GE(count(outcomes, function, false), 2) << function << " is called for both ranks";
    EXPECT_EQ(count(outcomes, function, true), 0) << function << " failed, and nobody was told";
  }
  // A guard that puts the former device back has nobody to tell, and may be as often as one that
  // makes a device the current one.
  EXPECT_LE(count(outcomes, "cudaSetDevice", true), count(outcomes, "cudaSetDevice", false));
  EXPECT_EQ(count(outcomes, "cudaStreamDestroy", true), 4) << "nothing hangs on it";
}

TEST_F(CudaGroupFailures, OfEachCallThatDisconnectsAGroup) {
  for (const Steps& steps : {Steps(disconnect), Steps(disconnect_in_time)}) {
    const std::vector<Outcome> outcomes = fail_each(create_and_connect, steps);
    EXPECT_EQ(count(outcomes, "cudaDeviceSynchronize", false), 4);
    for (const char* function :
         {"cudaStreamCreateWithFlags", "cudaMemsetAsync", "cudaStreamSynchronize"}) {
      EXPECT_EQ(count(outcomes, function, false), 2) << function;
    }
    EXPECT_EQ(count(outcomes, "cudaGetDevice", true), 0);
    EXPECT_EQ(count(outcomes, "cudaStreamDestroy", true), 2);
  }
}

// What gives back has nobody to tell, and does it all the same.
TEST_F(CudaGroupFailures, OfEachCallThatFreesAGroup) {
  const std::vector<Outcome> outcomes = fail_each(create_and_connect, destroy);
  EXPECT_EQ(count(outcomes, "cudaFree", true), 2);
}

// What undoes a failed step fails too, and gives back nevertheless.
TEST_F(CudaGroupFailures, OfTwoCallsInTurn) {
  for (int n = 1;; ++n) {
    const std::vector<RankWords> taken = drain_pools();
    fake_cudart::reset(fake_cudart::make_machine(2));
    fake_cudart::fail("", n, cudaErrorUnknown);
    fake_cudart::fail("", n + 1, cudaErrorUnknown);
    {
      std::unique_ptr<CudaGroup> group;
      const Status status = create_and_connect(group);
      if (fake_cudart::pending_failures() == 2) break;
      EXPECT_EQ(fake_cudart::last_error(), cudaSuccess) << "after call " << n;
      if (!status.ok()) {
        EXPECT_TRUE(contains(status.message(), "cudaErrorUnknown"));
      }
    }
    EXPECT_EQ(left_behind(), Texts{}) << "after call " << n;
    EXPECT_EQ(fake_cudart::violations(), Texts{}) << "after call " << n;
  }
  fake_cudart::reset(fake_cudart::make_machine(2));
}

TEST_F(CudaGroupFailures, OfEverythingAfterATrap) {
  fake_cudart::trap();
  std::unique_ptr<CudaGroup> group;
  const Status status = CudaGroup::create(group_config(2), group);
  EXPECT_EQ(status.code(), StatusCode::kInternal);
  EXPECT_TRUE(contains(status.message(), "cudaErrorLaunchFailure"));
  EXPECT_EQ(group, nullptr);
}

TEST_F(CudaGroupFailures, OfAnArchitectureThatHasNoKernels) {
  fake_cudart::fail("cudaFuncSetAttribute", 1, cudaErrorNoKernelImageForDevice);
  std::unique_ptr<CudaGroup> group;
  const Status status = CudaGroup::create(group_config(2), group);
  EXPECT_TRUE(contains(status.message(), "cudaErrorNoKernelImageForDevice"));
  const Texts calls = fake_cudart::calls();
  EXPECT_EQ(std::count(calls.begin(), calls.end(), "cudaMalloc"), 0) << "nothing was allocated";
}

}  // namespace
}  // namespace jax_ep
