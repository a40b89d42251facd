// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/calls.h"

#include <gtest/gtest.h>

#include <cfenv>
#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "csrc/testing/cluster.h"

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

namespace jax_ep {
namespace {

constexpr EpShape kShape{
    .num_ranks = 4, .num_experts = 8, .num_topk = 2, .num_tokens = 16, .recv_capacity = 64};

PlanOp plan_call() { return {.shape = kShape}; }
DispatchOp dispatch_call() { return {.shape = kShape, .hidden = 512, .num_scalars = 2}; }
CombineOp combine_call() { return {.shape = kShape, .hidden = 512}; }
PlanDispatchOp plan_dispatch_call() { return plan_dispatch_op(plan_call(), dispatch_call()); }

std::vector<Call> copies(const Call& call) { return std::vector<Call>(4, call); }

TEST(Calls, HaveNames) {
  EXPECT_EQ(op_name(plan_call()), "plan");
  EXPECT_EQ(op_name(dispatch_call()), "dispatch");
  EXPECT_EQ(op_name(combine_call()), "combine");
  EXPECT_EQ(op_name(plan_dispatch_call()), "plan_dispatch");
}

TEST(Calls, HaveProperties) {
  const auto texts = [](const Call& call) {
    std::string text;
    for (const Property& p : properties(call)) text += std::string(p.name) + "=" + p.value + " ";
    return text;
  };
  EXPECT_EQ(texts(plan_call()),
            "num_ranks=4 num_experts=8 num_topk=2 num_tokens=16 recv_capacity=64 "
            "expert_alignment=1 layout=expert ");
  EXPECT_EQ(texts(dispatch_call()),
            "num_ranks=4 num_experts=8 num_topk=2 num_tokens=16 recv_capacity=64 "
            "expert_alignment=1 layout=expert hidden=512 num_scalars=2 dtype=float32 wire=same "
            "x_format=dtype rows_format=dtype zero_fill=true weighted=false with_dots=false "
            "on_timeout=error ");
  EXPECT_EQ(texts(plan_dispatch_call()), texts(dispatch_call()));
  EXPECT_EQ(
      texts(combine_call()),
      "num_ranks=4 num_experts=8 num_topk=2 num_tokens=16 recv_capacity=64 "
      "expert_alignment=1 layout=expert hidden=512 weighted=false num_scalars=0 domain_size=0 "
      "dtype=float32 on_timeout=error ");
}

TEST(Calls, MakeProductsOfRowsThatTravelAsTheyAre) {
  DispatchOp call = dispatch_call();
  call.weighted = true;
  call.wire = Wire::kFloat8E4M3;
  WorkerPool workers(0);
  EXPECT_EQ(execute(copies(call), workers).message(),
            "row_weights is given, and wire is float8_e4m3fn; allowed: wire same");
  call.weighted = false;
  call.with_dots = true;
  EXPECT_EQ(execute(copies(call), workers).message(),
            "y is given, and wire is float8_e4m3fn; allowed: wire same");
}

TEST(Agreement, OfEqualCalls) {
  for (const Call& call : {Call(plan_call()),
                           Call(dispatch_call()),
                           Call(combine_call()),
                           Call(plan_dispatch_call())}) {
    EXPECT_TRUE(check_agreement(copies(call)).ok());
  }
  EXPECT_TRUE(check_agreement({}).ok());
}

TEST(Agreement, NamesRanksAndValues) {
  std::vector<Call> calls = copies(dispatch_call());
  std::get<DispatchOp>(calls[2]).hidden = 256;
  const Status status = check_agreement(calls);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "ranks disagree: hidden is 512 on ranks 0,1,3 and 256 on rank 2");
}

TEST(Agreement, NamesEveryValueOfTheFirstDifference) {
  std::vector<Call> calls = copies(dispatch_call());
  std::get<DispatchOp>(calls[1]).hidden = 256;
  std::get<DispatchOp>(calls[2]).shape.num_tokens = 8;
  std::get<DispatchOp>(calls[3]).shape.num_tokens = 4;
  EXPECT_EQ(check_agreement(calls).message(),
            "ranks disagree: num_tokens is 16 on ranks 0,1, 8 on rank 2 and 4 on rank 3");
}

TEST(Agreement, NamesDifferentOps) {
  std::vector<Call> calls = copies(dispatch_call());
  calls[0] = combine_call();
  EXPECT_EQ(check_agreement(calls).message(),
            "ranks disagree: op is combine on rank 0 and dispatch on ranks 1-3");
}

// Each static parameter is compared; buffers, which differ by nature, are not.
TEST(Agreement, CoversEveryParameter) {
  const std::vector<std::pair<std::string, std::function<void(DispatchOp&)>>> changes = {
      {"num_ranks is 4 on ranks 0-2 and 5 on rank 3", [](auto& c) { c.shape.num_ranks = 5; }},
      {"num_experts is 8 on ranks 0-2 and 9 on rank 3", [](auto& c) { c.shape.num_experts = 9; }},
      {"num_topk is 2 on ranks 0-2 and 1 on rank 3", [](auto& c) { c.shape.num_topk = 1; }},
      {"recv_capacity is 64 on ranks 0-2 and 63 on rank 3",
       [](auto& c) { c.shape.recv_capacity = 63; }},
      {"expert_alignment is 1 on ranks 0-2 and 8 on rank 3",
       [](auto& c) { c.shape.expert_alignment = 8; }},
      {"layout is expert on ranks 0-2 and rank on rank 3",
       [](auto& c) { c.shape.layout = Layout::kRank; }},
      {"num_scalars is 2 on ranks 0-2 and 0 on rank 3", [](auto& c) { c.num_scalars = 0; }},
      {"dtype is float32 on ranks 0-2 and bfloat16 on rank 3",
       [](auto& c) { c.dtype = DType::kBFloat16; }},
      {"wire is same on ranks 0-2 and float8_e4m3fn on rank 3",
       [](auto& c) { c.wire = Wire::kFloat8E4M3; }},
      {"x_format is dtype on ranks 0-2 and float8_e4m3fn on rank 3",
       [](auto& c) { c.x_format = RowFormat::kFloat8E4M3; }},
      {"rows_format is dtype on ranks 0-2 and float8_e4m3fn on rank 3",
       [](auto& c) { c.rows_format = RowFormat::kFloat8E4M3; }},
      {"zero_fill is true on ranks 0-2 and false on rank 3", [](auto& c) { c.zero_fill = false; }},
      {"weighted is false on ranks 0-2 and true on rank 3", [](auto& c) { c.weighted = true; }},
      {"with_dots is false on ranks 0-2 and true on rank 3", [](auto& c) { c.with_dots = true; }}};
  for (const auto& [message, change] : changes) {
    std::vector<Call> calls = copies(dispatch_call());
    change(std::get<DispatchOp>(calls[3]));
    EXPECT_EQ(check_agreement(calls).message(), "ranks disagree: " + message);
  }
  std::vector<Call> calls = copies(combine_call());
  std::get<CombineOp>(calls[3]).weighted = true;
  EXPECT_EQ(check_agreement(calls).message(),
            "ranks disagree: weighted is false on ranks 0-2 and true on rank 3");
  float scalar = 0;
  std::vector<Call> with_buffers = copies(dispatch_call());
  std::get<DispatchOp>(with_buffers[3]).token_scalars = &scalar;
  EXPECT_TRUE(check_agreement(with_buffers).ok());
}

TEST(Execute, RefusesParametersItCannotCountWith) {
  const std::vector<std::pair<std::string, std::function<void(DispatchOp&)>>> changes = {
      {"num_ranks is 3; allowed: the number of ranks that meet, 4",
       [](auto& c) { c.shape.num_ranks = 3; }},
      {"num_ranks is 0; allowed: the number of ranks that meet, 4",
       [](auto& c) { c.shape.num_ranks = 0; }},
      {"num_experts is 6; allowed: a positive multiple of num_ranks, 4",
       [](auto& c) { c.shape.num_experts = 6; }},
      {"num_experts is 0; allowed: a positive multiple of num_ranks, 4",
       [](auto& c) { c.shape.num_experts = 0; }},
      {"num_topk is 9; allowed: 1 to num_experts, 8", [](auto& c) { c.shape.num_topk = 9; }},
      {"num_topk is 0; allowed: 1 to num_experts, 8", [](auto& c) { c.shape.num_topk = 0; }},
      {"num_tokens is -1; allowed: 0 to (2^31 - 1) / num_ranks, with num_ranks = 4",
       [](auto& c) { c.shape.num_tokens = -1; }},
      {"num_tokens is 536870912; allowed: 0 to (2^31 - 1) / num_ranks, with num_ranks = 4",
       [](auto& c) { c.shape.num_tokens = 536'870'912; }},
      {"recv_capacity is 2147483648; allowed: 0 to 2^31 - 1",
       [](auto& c) { c.shape.recv_capacity = 2'147'483'648; }},
      {"recv_capacity is -1; allowed: 0 to 2^31 - 1", [](auto& c) { c.shape.recv_capacity = -1; }},
      {"expert_alignment is 0; allowed: 1 or more", [](auto& c) { c.shape.expert_alignment = 0; }},
      {"expert_alignment is 2; allowed: 1 where layout is rank",
       [](auto& c) {
         c.shape.expert_alignment = 2;
         c.shape.layout = Layout::kRank;
       }},
      {"hidden is -8; allowed: 0 or more", [](auto& c) { c.hidden = -8; }},
      {"num_scalars is 1; allowed: 0 or num_topk, 2", [](auto& c) { c.num_scalars = 1; }},
      {"x is float8_e4m3fn, but wire is same; allowed: wire float8_e4m3fn",
       [](auto& c) { c.x_format = RowFormat::kFloat8E4M3; }},
      {"rows is float8_e4m3fn, but wire is same; allowed: wire float8_e4m3fn",
       [](auto& c) { c.rows_format = RowFormat::kFloat8E4M3; }}};
  WorkerPool workers(0);
  for (const auto& [message, change] : changes) {
    DispatchOp call = dispatch_call();
    change(call);
    const Status status = execute(copies(call), workers);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), message);
  }
}

TEST(Execute, RefusesAPlanWithADispatchAsItRefusesTheDispatch) {
  WorkerPool workers(0);
  PlanDispatchOp call = plan_dispatch_call();
  call.dispatch.num_scalars = 1;
  EXPECT_EQ(execute(copies(call), workers).message(),
            "num_scalars is 1; allowed: 0 or num_topk, 2");
}

// A plan and its dispatch in one are the two, one after the other.
TEST(Execute, PlansAndDispatchesInOne) {
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    ClusterOptions options{.shape = {.num_ranks = 3,
                                     .num_experts = 6,
                                     .num_topk = 3,
                                     .num_tokens = 7,
                                     .recv_capacity = 4,  // some rows are dropped
                                     .layout = layout},
                           .hidden = 40};
    Cluster two(options);
    ASSERT_TRUE(two.plan().ok());
    ASSERT_TRUE(two.dispatch().ok());
    Cluster one(options);
    std::vector<Call> calls;
    const std::vector<Call> plans = one.plan_calls();
    const std::vector<Call> dispatches = one.dispatch_calls();
    for (size_t rank = 0; rank < plans.size(); ++rank) {
      calls.emplace_back(
          plan_dispatch_op(std::get<PlanOp>(plans[rank]), std::get<DispatchOp>(dispatches[rank])));
    }
    WorkerPool workers(2);
    ASSERT_TRUE(execute(calls, workers).ok());
    for (int32_t rank = 0; rank < 3; ++rank) {
      EXPECT_GT(one.rank(rank).num_dropped, 0);
      EXPECT_EQ(one.rank(rank).num_dropped, two.rank(rank).num_dropped);
      EXPECT_EQ(one.rank(rank).slot, two.rank(rank).slot);
      EXPECT_EQ(one.rank(rank).row_source, two.rank(rank).row_source);
      EXPECT_EQ(one.rank(rank).group_sizes, two.rank(rank).group_sizes);
      EXPECT_EQ(one.rank(rank).rows, two.rank(rank).rows);
      EXPECT_EQ(one.rank(rank).row_scalars, two.rank(rank).row_scalars);
    }
  }
}

// A selection that the plan refuses leaves no rows.
TEST(Execute, SendsNothingWithoutAPlan) {
  Cluster cluster(
      {.shape =
           {.num_ranks = 1, .num_experts = 2, .num_topk = 1, .num_tokens = 3, .recv_capacity = 3},
       .hidden = 4});
  cluster.rank(0).topk_idx[1] = 2;
  const std::vector<std::byte> before = cluster.rank(0).rows;
  const PlanDispatchOp op = plan_dispatch_op(std::get<PlanOp>(cluster.plan_calls()[0]),
                                             std::get<DispatchOp>(cluster.dispatch_calls()[0]));
  WorkerPool workers(0);
  EXPECT_EQ(execute(std::vector<Call>{op}, workers).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(cluster.rank(0).rows, before);
}

// A rank's thread may round otherwise, or flush subnormals as XLA's do. The result must not show
// it, and the thread must have its modes again afterwards.
TEST(Execute, DoesNotDependOnTheThreadsFloatingPointModes) {
  ClusterOptions options{.shape = {.num_ranks = 1,
                                   .num_experts = 2,
                                   .num_topk = 2,
                                   .num_tokens = 50,
                                   .recv_capacity = 100},
                         .hidden = 40};
  Cluster cluster(options);
  ASSERT_TRUE(cluster.plan().ok());
  for (float& weight : cluster.rank(0).weights) weight = std::ldexp(weight, -130);
  ASSERT_TRUE(cluster.combine().ok());
  const auto expected = cluster.rank(0).out;

  ASSERT_EQ(std::fesetround(FE_UPWARD), 0);
#ifdef __SSE2__
  const unsigned flushing = _mm_getcsr() | 0x8040;  // flush to zero, denormals are zero
  _mm_setcsr(flushing);
#endif
  const Status status = cluster.combine();
#ifdef __SSE2__
  const unsigned after = _mm_getcsr();
  _mm_setcsr(after & ~0x8040U);
  EXPECT_EQ(after & 0xFFC0U, flushing & 0xFFC0U);
#endif
  EXPECT_EQ(std::fegetround(), FE_UPWARD);
  std::fesetround(FE_TONEAREST);
  EXPECT_TRUE(status.ok());
  EXPECT_EQ(cluster.rank(0).out, expected);
}

}  // namespace
}  // namespace jax_ep
