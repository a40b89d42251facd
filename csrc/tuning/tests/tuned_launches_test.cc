// SPDX-License-Identifier: Apache-2.0
#include "csrc/tuning/tuned_launches.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "csrc/tuning/heuristics.h"

namespace jax_ep {
namespace {

constexpr int64_t kRowBytes = 14336;
constexpr SmBudget kH200{.available = 132, .requested = 0};

EpShape shape_of_two(int64_t num_tokens) {
  return {.num_ranks = 2, .num_experts = 256, .num_topk = 8, .num_tokens = num_tokens};
}

LaunchShape launched(OpKind op, int64_t num_tokens, SmBudget budget, LaunchChoice choice) {
  return launch_shape(op, shape_of_two(num_tokens), kRowBytes, budget, Wire::kSame, choice);
}

TEST(TunedLaunches, ACallFindsThoseOfTheNextPowerOfTwo) {
  const std::vector<TunedLaunch> tuned{
      {.op = OpKind::kCombine, .low_latency = false, .num_tokens = 64, .choice = {.num_sms = 8}},
      {.op = OpKind::kCombine, .low_latency = true, .num_tokens = 64, .choice = {.num_sms = 9}},
      {.op = OpKind::kPlanDispatch,
       .low_latency = false,
       .num_tokens = 1,
       .choice = {.num_sms = 7}},
      // The first counts.
      {.op = OpKind::kCombine, .low_latency = false, .num_tokens = 64, .choice = {.num_sms = 5}},
  };
  const auto sms = [&](OpKind op, bool low_latency, int64_t num_tokens) {
    return find_choice(tuned, op, low_latency, num_tokens).num_sms;
  };
  EXPECT_EQ(sms(OpKind::kCombine, false, 64), 8);
  EXPECT_EQ(sms(OpKind::kCombine, false, 33), 8);
  EXPECT_EQ(sms(OpKind::kCombine, false, 32), 0);
  EXPECT_EQ(sms(OpKind::kCombine, false, 65), 0);
  EXPECT_EQ(sms(OpKind::kCombine, true, 50), 9);
  EXPECT_EQ(sms(OpKind::kPlanDispatch, false, 1), 7);
  EXPECT_EQ(sms(OpKind::kPlanDispatch, false, 0), 0);
  EXPECT_EQ(sms(OpKind::kDispatch, false, 1), 0);
  EXPECT_EQ(sms(OpKind::kPlan, false, 1), 0);
  EXPECT_EQ(sms(OpKind::kCombine, false, int64_t{1} << 40), 0);
}

TEST(TunedLaunches, WhatNoKernelCanDoIsRefused) {
  const TunedLaunch good{.op = OpKind::kPlanDispatch,
                         .low_latency = false,
                         .num_tokens = 64,
                         .choice = {.num_sms = 8, .num_senders = 13, .tail = Tail::kOn}};
  const auto refusal = [&](const auto& change) {
    TunedLaunch bad = good;
    change(bad);
    return check_tuned({good, bad}).message();
  };
  EXPECT_EQ(check_tuned({good}).message(), "");
  EXPECT_EQ(refusal([](TunedLaunch& t) { t.op = OpKind::kDispatch; }),
            "op is dispatch; allowed: plan_dispatch, combine");
  EXPECT_EQ(refusal([](TunedLaunch& t) { t.num_tokens = 48; }),
            "num_tokens is 48; allowed: powers of two");
  EXPECT_EQ(refusal([](TunedLaunch& t) { t.num_tokens = 0; }),
            "num_tokens is 0; allowed: powers of two");
  EXPECT_EQ(refusal([](TunedLaunch& t) { t.choice.num_sms = -1; }),
            "num_sms is -1; allowed: 0 or more");
  EXPECT_EQ(refusal([](TunedLaunch& t) { t.choice.num_senders = -1; }),
            "num_senders is -1; allowed: 0 or more");
  EXPECT_EQ(refusal([](TunedLaunch& t) { t.choice.tail = static_cast<Tail>(2); }),
            "tail is 2; allowed: -1, 0 and 1");
  EXPECT_EQ(refusal([](TunedLaunch& t) { t.op = OpKind::kCombine; }), "tail is 1; allowed: -1");
  EXPECT_EQ(refusal([](TunedLaunch& t) { t.low_latency = true; }), "num_senders is 13; allowed: 0");
  EXPECT_EQ(refusal([](TunedLaunch& t) {
              t.low_latency = true;
              t.choice.num_senders = 0;
            }),
            "tail is 1; allowed: -1");
}

TEST(TunedLaunches, AChoiceCountsWithinTheBudgetAndTheWork) {
  const auto blocks = [](OpKind op, int64_t num_tokens, SmBudget budget, int32_t num_sms) {
    return launched(op, num_tokens, budget, {.num_sms = num_sms}).num_blocks;
  };
  for (const OpKind op : {OpKind::kPlanDispatch, OpKind::kCombine}) {
    EXPECT_EQ(blocks(op, 4096, kH200, 48), 48);
    EXPECT_EQ(blocks(op, 4096, kH200, 8), 8);
    EXPECT_EQ(blocks(op, 4096, kH200, 1000), 132);
    EXPECT_EQ(blocks(op, 4096, {.available = 132, .requested = 16}, 48), 16);
    EXPECT_EQ(blocks(op, 4096, {.available = 132, .requested = 16}, 8), 8);
    EXPECT_EQ(blocks(op, 4096, {.available = 132, .requested = 64}, 0), 64);
    EXPECT_EQ(blocks(op, 4096, kH200, 0), default_num_sms(false));
    EXPECT_LT(blocks(op, 1, kH200, 132), 132);  // there is no work for so many
  }
}

TEST(TunedLaunches, SomebodyIsLeftToReceive) {
  for (const OpKind op : {OpKind::kPlanDispatch, OpKind::kCombine}) {
    const LaunchShape launch = launched(op, 4096, kH200, {.num_senders = 1000});
    EXPECT_EQ(launch.num_senders, launch.num_warps - 1);
    EXPECT_EQ(launched(op, 4096, kH200, {.num_senders = 3}).num_senders, 3);
  }
}

TEST(TunedLaunches, ATailIsOnOrOffWhereThereCanBeOne) {
  const auto tail = [](int64_t num_tokens, Tail choice, SmBudget budget = kH200) {
    const int64_t row_bytes = num_tokens < 4096 ? 2048 : kRowBytes;  // little is left of few
    const EpShape shape = shape_of_two(num_tokens);
    return launch_shape(
               OpKind::kPlanDispatch, shape, row_bytes, budget, Wire::kSame, {.tail = choice})
        .num_tail_blocks;
  };
  EXPECT_EQ(tail(4096, Tail::kModel), 132 - 24);
  EXPECT_EQ(tail(4096, Tail::kOff), 0);
  EXPECT_EQ(tail(512, Tail::kModel), 0);
  EXPECT_EQ(tail(512, Tail::kOn), 132 - 24);
  EXPECT_EQ(tail(512, Tail::kOn, {.available = 132, .requested = 0, .tail = 10}), 10);
  EXPECT_EQ(tail(512, Tail::kOn, {.available = 132, .requested = 0, .tail = 0}), 0);
  EXPECT_EQ(tail(64, Tail::kOn), 0);  // nobody tells when all has been sent
}

TEST(TunedLaunches, ALowLatencyKernelTakesItsSms) {
  const auto blocks = [](SmBudget budget, int32_t num_sms) {
    return low_latency_launch_shape(
               OpKind::kCombine, shape_of_two(128), kRowBytes, budget, false, {.num_sms = num_sms})
        .num_blocks;
  };
  EXPECT_EQ(blocks(kH200, 0), default_num_sms(true));
  EXPECT_EQ(blocks(kH200, 16), 16);
  EXPECT_EQ(blocks(kH200, 132), 132);
  EXPECT_EQ(blocks({.available = 132, .requested = 32}, 132), 32);
  EXPECT_EQ(blocks({.available = 20, .requested = 0}, 132), 20);
}

}  // namespace
}  // namespace jax_ep
