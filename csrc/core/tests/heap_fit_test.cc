// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/heap_fit.h"

#include <gtest/gtest.h>

#include <string>

namespace jax_ep {
namespace {

const HeapShape kHeap{.num_ranks = 2,
                      .num_experts = 8,
                      .num_topk = 2,
                      .max_tokens = 64,
                      .hidden = 100,
                      .dtype = DType::kBFloat16};

EpShape call_shape() {
  return {.num_ranks = 2, .num_experts = 8, .num_topk = 2, .num_tokens = 64, .recv_capacity = 999};
}

std::string refusal(const Status& status) {
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  return status.message();
}

TEST(HeapFit, AcceptsCallsOfTheGroup) {
  EpShape shape = call_shape();
  EXPECT_TRUE(check_fits(kHeap, shape).ok());
  shape.num_tokens = 0;
  EXPECT_TRUE(check_fits(kHeap, shape).ok());
}

TEST(HeapFit, NamesWhatIsNotTheGroups) {
  EpShape shape = call_shape();
  shape.num_ranks = 4;
  EXPECT_EQ(refusal(check_fits(kHeap, shape)), "num_ranks is 4, but the group has 2");
  shape = call_shape();
  shape.num_experts = 16;
  EXPECT_EQ(refusal(check_fits(kHeap, shape)), "num_experts is 16, but the group has 8");
  shape = call_shape();
  shape.num_topk = 1;
  EXPECT_EQ(refusal(check_fits(kHeap, shape)), "num_topk is 1, but the group has 2");
  shape = call_shape();
  shape.layout = Layout::kRank;
  EXPECT_EQ(refusal(check_fits(kHeap, shape)), "layout is rank, but the group has expert");
  shape = call_shape();
  shape.num_tokens = 65;
  EXPECT_EQ(refusal(check_fits(kHeap, shape)),
            "65 tokens do not fit; the group's max_tokens_per_rank is 64");
}

TEST(HeapFit, RowsMayBeOfAnyDTypeThatIsSmallEnough) {
  EXPECT_TRUE(check_rows_fit(kHeap, 100, DType::kFloat16, Wire::kSame).ok());
  EXPECT_TRUE(check_rows_fit(kHeap, 50, DType::kFloat32, Wire::kSame).ok());
  EXPECT_TRUE(check_rows_fit(kHeap, 0, DType::kFloat32, Wire::kSame).ok());
  EXPECT_EQ(refusal(check_rows_fit(kHeap, 51, DType::kFloat32, Wire::kSame)),
            "rows of 51 float32 do not fit; the group has room for 100 bfloat16");
  EXPECT_EQ(refusal(check_rows_fit(kHeap, 101, DType::kBFloat16, Wire::kSame)),
            "rows of 101 bfloat16 do not fit; the group has room for 100 bfloat16");
}

TEST(HeapFit, TheFp8WireNeedsItsScales) {
  EXPECT_EQ(refusal(check_rows_fit(kHeap, 100, DType::kBFloat16, Wire::kFloat8E4M3)),
            "wire is float8_e4m3fn, but the group's wire_dtype is not");
  HeapShape fp8 = kHeap;
  fp8.dtype = DType::kFloat32;
  fp8.wire = Wire::kFloat8E4M3;
  EXPECT_TRUE(check_rows_fit(fp8, 100, DType::kFloat32, Wire::kFloat8E4M3).ok());
  EXPECT_TRUE(check_rows_fit(fp8, 200, DType::kBFloat16, Wire::kSame).ok());
  EXPECT_EQ(refusal(check_rows_fit(fp8, 200, DType::kBFloat16, Wire::kFloat8E4M3)),
            "rows of 200 bfloat16 do not fit; the group has room for 100 float32");
}

}  // namespace
}  // namespace jax_ep
