// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <string>
#include <vector>

#include "csrc/cpu/calls.h"
#include "csrc/testing/cluster.h"
#include "csrc/testing/reference.h"

namespace jax_ep {
namespace {

size_t at(int64_t index) { return static_cast<size_t>(index); }

// Row `row` of a buffer.
template <typename T>
std::vector<T> row_of(const std::vector<T>& buffer, int64_t row, int64_t columns) {
  return {buffer.begin() + row * columns, buffer.begin() + (row + 1) * columns};
}

class DispatchOf : public testing::TestWithParam<ClusterOptions> {
 protected:
  // x as it arrives.
  static reference::PerRank<float> traveled(const Cluster& cluster) {
    const ClusterOptions& options = cluster.options();
    reference::PerRank<float> x = cluster.all(&RankBuffers::x);
    if (options.wire == Wire::kSame) return x;
    for (std::vector<float>& values : x) {
      for (int64_t token = 0; token < options.shape.num_tokens; ++token) {
        const std::vector<float> row =
            reference::fp8_wire(row_of(values, token, options.hidden), options.dtype);
        std::copy(row.begin(), row.end(), values.begin() + token * options.hidden);
      }
    }
    return x;
  }
};

TEST_P(DispatchOf, RowsArriveAtTheirSlots) {
  const ClusterOptions& options = GetParam();
  Cluster cluster(options);
  ASSERT_TRUE(cluster.plan().ok());
  const Status status = cluster.dispatch();
  ASSERT_TRUE(status.ok()) << status.message();
  const reference::PerRank<float> expected =
      reference::dispatch_rows(options.shape,
                               cluster.all(&RankBuffers::topk_idx),
                               cluster.planned(),
                               traveled(cluster),
                               options.hidden);
  const int64_t row_bytes = options.hidden * size_bytes(options.dtype);
  const std::vector<std::byte> empty(at(row_bytes),
                                     options.zero_fill ? std::byte{0} : kUntouchedByte);
  for (int32_t dest = 0; dest < options.shape.num_ranks; ++dest) {
    const RankBuffers& rank = cluster.rank(dest);
    const std::vector<std::byte> encoded = cluster.encode(expected[at(dest)]);
    for (int64_t row = 0; row < options.shape.recv_capacity; ++row) {
      const bool has_token = rank.row_source[at(row)] >= 0;
      EXPECT_EQ(row_of(rank.rows, row, row_bytes),
                has_token ? row_of(encoded, row, row_bytes) : empty)
          << "rank " << dest << ", row " << row;
    }
  }
}

TEST_P(DispatchOf, ScalarsArriveAtTheirSlots) {
  const ClusterOptions& options = GetParam();
  Cluster cluster(options);
  ASSERT_TRUE(cluster.plan().ok());
  ASSERT_TRUE(cluster.dispatch().ok());
  if (!options.scalars) return;
  EXPECT_EQ(cluster.all(&RankBuffers::row_scalars),
            reference::dispatch_scalars(options.shape,
                                        cluster.all(&RankBuffers::topk_idx),
                                        cluster.planned(),
                                        cluster.all(&RankBuffers::token_scalars)));
}

std::vector<ClusterOptions> problems() {
  std::vector<ClusterOptions> all;
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    EpShape shape{.num_ranks = 3,
                  .num_experts = 12,
                  .num_topk = 4,
                  .num_tokens = 9,
                  .expert_alignment = layout == Layout::kExpert ? 4 : 1,
                  .layout = layout};
    shape.recv_capacity = worst_case_capacity(shape);
    const ClusterOptions base{.shape = shape};
    const auto add = [&](auto... changes) {
      ClusterOptions options = base;
      (changes(options), ...);
      options.seed = static_cast<uint32_t>(all.size());
      all.push_back(options);
    };
    const auto ranks = [](int32_t num_ranks, int32_t num_experts, int32_t num_topk) {
      return [=](ClusterOptions& o) {
        o.shape.num_ranks = num_ranks;
        o.shape.num_experts = num_experts;
        o.shape.num_topk = num_topk;
        o.shape.recv_capacity = worst_case_capacity(o.shape);
      };
    };
    const auto capacity = [](int64_t rows) {
      return [=](ClusterOptions& o) { o.shape.recv_capacity = rows; };
    };
    const auto hidden = [](int64_t elements) {
      return [=](ClusterOptions& o) { o.hidden = elements; };
    };
    const auto dtype = [](DType type) { return [=](ClusterOptions& o) { o.dtype = type; }; };
    const auto no_fill = [](ClusterOptions& o) { o.zero_fill = false; };
    const auto no_scalars = [](ClusterOptions& o) { o.scalars = false; };
    const auto no_tokens = [](ClusterOptions& o) { o.shape.num_tokens = 0; };
    const auto fp8 = [](ClusterOptions& o) { o.wire = Wire::kFloat8E4M3; };

    add();
    for (const DType type : {DType::kBFloat16, DType::kFloat16}) add(dtype(type));
    for (const int64_t elements : {0, 1, 33, 128}) add(hidden(elements), dtype(DType::kBFloat16));
    add(hidden(5));
    add(ranks(1, 4, 2), hidden(7));
    add(ranks(1, 1, 1));
    add(ranks(6, 12, 12));  // K = E
    add(ranks(6, 6, 3));
    add(ranks(16, 32, 5));
    for (const int64_t rows : {0, 1, 7, 200}) add(capacity(rows));
    add(no_fill);
    add(no_fill, capacity(10), dtype(DType::kFloat16));
    add(no_scalars);
    add(no_scalars, no_fill);
    add(no_scalars, hidden(0));
    add(no_tokens);
    add(no_tokens, capacity(0));
    for (const DType type : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const int64_t elements : {1, 127, 128, 300}) {
        add(fp8, dtype(type), hidden(elements));
      }
    }
    add(fp8, capacity(6));
    add(fp8, hidden(0));
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Problems, DispatchOf, testing::ValuesIn(problems()), [](const auto& info) {
  return describe(info.param);
});

// Larger than one unit of work, so that workers take part in copying and in clearing; and larger
// than the caches, so that rows are streamed.
TEST(Dispatch, OfManyBytesIsAsDefined) {
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    for (const int64_t hidden : {1000, 2100}) {
      ClusterOptions options{.shape = {.num_ranks = 4,
                                       .num_experts = 8,
                                       .num_topk = 2,
                                       .num_tokens = 130,
                                       .layout = layout},
                             .hidden = hidden};
      options.shape.recv_capacity = worst_case_capacity(options.shape);
      Cluster cluster(options);
      ASSERT_TRUE(cluster.plan().ok());
      ASSERT_TRUE(cluster.dispatch().ok());
      reference::PerRank<float> expected =
          reference::dispatch_rows(options.shape,
                                   cluster.all(&RankBuffers::topk_idx),
                                   cluster.planned(),
                                   cluster.all(&RankBuffers::x),
                                   options.hidden);
      for (std::vector<float>& values : expected) {
        for (float& value : values) value = value == value ? value : 0;  // NaN: no token
      }
      // Not EXPECT_EQ, which would print them.
      EXPECT_TRUE(cluster.all(&RankBuffers::rows) == expected) << options;
    }
  }
}

// Handles are arrays of the user's program. Whatever is in them, nothing outside the buffers is
// written (the address sanitizer watches), and the message names the place.
class DispatchErrors : public testing::TestWithParam<Layout> {
 protected:
  DispatchErrors() { EXPECT_TRUE(cluster_.plan().ok()); }

  void expect_error(const std::string& message) {
    const Status status = cluster_.dispatch();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), message);
  }

  Cluster cluster_{{.shape = {.num_ranks = 2,
                              .num_experts = 4,
                              .num_topk = 2,
                              .num_tokens = 5,
                              .recv_capacity = 20,
                              .layout = GetParam()}}};
};

INSTANTIATE_TEST_SUITE_P(Layouts,
                         DispatchErrors,
                         testing::Values(Layout::kExpert, Layout::kRank),
                         [](const auto& info) { return std::string(name(info.param)); });

TEST_P(DispatchErrors, Slot) {
  for (const int32_t bad :
       {20, -2, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    cluster_.rank(1).slot[7] = bad;
    expect_error("rank 1: slot[3, 1] is " + std::to_string(bad) +
                 ", but must be -1 (no row) or a row in [0, 20)");
  }
}

TEST_P(DispatchErrors, Expert) {
  for (const int32_t bad :
       {4, -2, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    cluster_.rank(0).topk_idx[8] = bad;
    expect_error("rank 0: topk_idx[4, 0] is " + std::to_string(bad) +
                 ", but must be -1 (no selection) or an expert in [0, 4)");
  }
}

TEST_P(DispatchErrors, SlotWithoutExpert) {
  cluster_.rank(0).topk_idx[8] = -1;
  cluster_.rank(0).slot[8] = 3;
  expect_error(
      "rank 0: slot[4, 0] is 3, but topk_idx there is -1 (no selection): slot and topk_idx must "
      "come from the same plan");
}

TEST_P(DispatchErrors, RowSource) {
  for (const int32_t bad : {10, -2, std::numeric_limits<int32_t>::min()}) {
    cluster_.rank(1).row_source[6] = bad;
    expect_error("rank 1: row_source[6] is " + std::to_string(bad) +
                 ", but must be -1 (no token) or a token of all ranks in [0, 10)");
  }
}

TEST_P(DispatchErrors, AllGarbage) {
  for (RankBuffers& rank : cluster_.ranks()) {
    std::fill(rank.slot.begin(), rank.slot.end(), kUntouched);
    std::fill(rank.topk_idx.begin(), rank.topk_idx.end(), 0x7FFFFFFF);
    std::fill(rank.row_source.begin(), rank.row_source.end(), kUntouched);
  }
  expect_error(
      "rank 0: topk_idx[0, 0] is 2147483647, but must be -1 (no selection) or an expert in "
      "[0, 4)");
}

// Zeros pass every check: any row may be written, but only inside the buffers.
TEST_P(DispatchErrors, AHandleOfZerosStaysInside) {
  for (RankBuffers& rank : cluster_.ranks()) {
    std::fill(rank.slot.begin(), rank.slot.end(), 0);
    std::fill(rank.topk_idx.begin(), rank.topk_idx.end(), 0);
    std::fill(rank.row_source.begin(), rank.row_source.end(), 0);
  }
  EXPECT_TRUE(cluster_.dispatch().ok());
}

}  // namespace
}  // namespace jax_ep
