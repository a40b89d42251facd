// SPDX-License-Identifier: Apache-2.0
// What tests of the CUDA backend's host side begin with, and what must hold when they end.
#ifndef JAX_EP_CSRC_RUNTIME_TESTS_RUNTIME_FIXTURE_H_
#define JAX_EP_CSRC_RUNTIME_TESTS_RUNTIME_FIXTURE_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "csrc/runtime/cuda_group.h"
#include "csrc/runtime/tests/fake_cudart/fake_cudart.h"

namespace jax_ep {

using Texts = std::vector<std::string>;

inline constexpr double kNoLimit = std::numeric_limits<double>::infinity();
inline constexpr GroupNonce kNonce = 0x1234'5678'9ABC'DEF0;

// The smallest heap that has all regions.
inline HeapShape small_shape(int32_t num_ranks) {
  return {.num_ranks = num_ranks,
          .num_experts = 2 * num_ranks,
          .num_topk = 2,
          .max_tokens = 4,
          .hidden = 16,
          .dtype = DType::kBFloat16,
          .wire = Wire::kSame,
          .layout = Layout::kExpert};
}

inline GroupSettings group_settings(int32_t num_ranks) {
  return {.name = "EpGroup 0",
          .nonce = kNonce,
          .warn_after_s = 10,
          .timeout_s = 60,
          .max_num_sms = 0,
          .tail_num_sms = -1,
          .heap = small_shape(num_ranks)};
}

inline RankConfig rank_config(int32_t rank, int32_t num_ranks, int32_t device) {
  return {.group = group_settings(num_ranks),
          .local = {.device = device, .group_index = 0, .rank = rank}};
}

// A group of which this process has all ranks, rank r on device r.
inline CudaGroupConfig group_config(int32_t num_ranks) {
  CudaGroupConfig config{.group = group_settings(num_ranks), .ranks = {}};
  for (int32_t rank = 0; rank < num_ranks; ++rank) {
    config.ranks.push_back({.device = rank, .group_index = 0, .rank = rank});
  }
  return config;
}

// Of all EP groups.
inline std::vector<HeapHandle> handles_of(const CudaGroup& group) {
  std::vector<HeapHandle> handles;
  for (const RankContext& rank : group.ranks()) handles.push_back(rank.handle());
  return handles;
}

// Connects all ranks of a group that is of this process alone; the first error.
inline Status connect_all(CudaGroup& group) {
  for (const LocalRank& local : group.config().ranks) {
    JAX_EP_RETURN_IF_ERROR(group.connect(local.group_index, local.rank, handles_of(group)));
  }
  return {};
}

// What a kernel of a rank writes before it traps.
inline void give_up(const RankContext& rank, WaitTag tag) {
  void* const memory = fake_cudart::on_host(rank.view().error);
  ASSERT_NE(memory, nullptr) << "the record has to be where devices reach it";
  ErrorRecord& record = *static_cast<ErrorRecord*>(memory);
  record.tag = static_cast<uint32_t>(tag);
  record.rank = static_cast<uint32_t>(rank.config().local.rank);
  record.peer = 1;
  // RELEASE(error): read by RankWords::error.
  std::atomic_ref<uint32_t>(record.written).store(1, std::memory_order_release);
}

inline ::testing::AssertionResult is_ok(const Status& status) {
  if (status.ok()) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << status.message();
}

inline ::testing::AssertionResult contains(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "'" << part << "' is not in: " << text;
}

// What leaks() says, but for the pools of RankWords, which only grow: a part on the device and one
// on the host each. Half a pool is a leak.
inline Texts without_pools(Texts leaks) {
  const auto take = [&leaks](const std::string& begin) {
    const auto it = std::find_if(leaks.begin(), leaks.end(), [&](const std::string& leak) {
      return leak.starts_with(begin);
    });
    if (it == leaks.end()) return false;
    leaks.erase(it);
    return true;
  };
  const std::string part = "cudaMalloc: " + std::to_string(kWordsAtOnce * kControlBytes) + " bytes";
  while (std::any_of(leaks.begin(), leaks.end(), [](const std::string& leak) {
    return leak.starts_with("cudaHostAlloc: ");
  })) {
    if (!take(part)) break;
    take("cudaHostAlloc: ");
  }
  return leaks;
}

inline Texts left_behind() { return without_pools(fake_cudart::leaks()); }

// Starts each test on a machine of four devices. At its end nothing may be left open, nothing may
// have been misused, and the thread may hold no error that the next launch would report.
class RuntimeTest : public ::testing::Test {
 protected:
  RuntimeTest() { fake_cudart::reset(fake_cudart::make_machine(4)); }

  void TearDown() override {
    EXPECT_EQ(left_behind(), Texts{});
    EXPECT_EQ(fake_cudart::violations(), allowed_violations_);
    EXPECT_EQ(fake_cudart::last_error(), cudaSuccess);
    EXPECT_EQ(fake_cudart::pending_failures(), 0);
  }

  // By tests that do what no program should.
  void allow_violations(Texts violations) { allowed_violations_ = std::move(violations); }

 private:
  Texts allowed_violations_;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_RUNTIME_TESTS_RUNTIME_FIXTURE_H_
