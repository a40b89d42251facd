// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
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
  // The rows of x at their slots.
  static reference::PerRank<float> arrived(const Cluster& cluster) {
    return reference::dispatch_rows(cluster.options().shape,
                                    cluster.all(&RankBuffers::topk_idx),
                                    cluster.planned(),
                                    traveled(cluster),
                                    cluster.options().hidden);
  }
};

TEST_P(DispatchOf, RowsArriveAtTheirSlots) {
  const ClusterOptions& options = GetParam();
  Cluster cluster(options);
  ASSERT_TRUE(cluster.plan().ok());
  const Status status = cluster.dispatch();
  ASSERT_TRUE(status.ok()) << status.message();
  reference::PerRank<float> expected = arrived(cluster);
  for (int32_t rank = 0; rank < options.shape.num_ranks && options.row_weights; ++rank) {
    std::vector<float>& rows = expected[at(rank)];
    rows =
        reference::scale_rows(rows, cluster.rank(rank).row_weights, options.hidden, options.dtype);
  }
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

TEST_P(DispatchOf, DotProductsAreOfTheRowsAsTheyArrive) {
  const ClusterOptions& options = GetParam();
  if (!options.row_dots) return;
  Cluster cluster(options);
  ASSERT_TRUE(cluster.plan().ok());
  // What rows without a token hold must not matter.
  for (RankBuffers& rank : cluster.ranks()) {
    std::vector<float> y = cluster.decode(rank.y);
    for (size_t row = 0; row < rank.row_source.size(); ++row) {
      if (rank.row_source[row] >= 0) continue;
      std::fill_n(y.begin() + static_cast<int64_t>(row) * options.hidden, options.hidden, NAN);
    }
    rank.y = cluster.encode(y);
  }
  ASSERT_TRUE(cluster.dispatch().ok());
  const reference::PerRank<float> rows = arrived(cluster);
  for (int32_t dest = 0; dest < options.shape.num_ranks; ++dest) {
    const RankBuffers& rank = cluster.rank(dest);
    EXPECT_EQ(rank.row_dots,
              reference::row_dots(
                  rows[at(dest)], cluster.decode(rank.y), rank.row_source, options.hidden))
        << "rank " << dest;
  }
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
    const auto row_weights = [](ClusterOptions& o) { o.row_weights = true; };
    const auto row_dots = [](ClusterOptions& o) { o.row_dots = true; };
    for (const DType type : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const int64_t elements : {0, 1, 33, 700, 1100}) {
        add(row_weights, row_dots, dtype(type), hidden(elements));
      }
    }
    add(row_weights);
    add(row_dots);
    add(row_weights, row_dots, no_fill, no_scalars);
    add(row_weights, row_dots, no_tokens);
    add(row_weights, row_dots, capacity(6));
    add(row_weights, row_dots, capacity(0));
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Problems, DispatchOf, testing::ValuesIn(problems()), [](const auto& info) {
  return describe(info.param);
});

// Rows that come in or go out in FP8, in every combination, with the rows in the dtype beside them.
class QuantizedDispatch : public testing::TestWithParam<ClusterOptions> {
 protected:
  struct Quantized {
    std::vector<std::byte> rows;
    std::vector<float> scales;
  };

  // All of a rank's tokens.
  static Quantized quantize(const std::vector<float>& values, int64_t hidden) {
    Quantized all;
    const int64_t num_rows = hidden == 0 ? 0 : static_cast<int64_t>(values.size()) / hidden;
    for (int64_t row = 0; row < num_rows; ++row) {
      const reference::QuantizedRow one = reference::fp8_quantize(row_of(values, row, hidden));
      for (const uint8_t value : one.values) all.rows.push_back(std::byte{value});
      all.scales.insert(all.scales.end(), one.scales.begin(), one.scales.end());
    }
    return all;
  }

  // What the rank's rows must be, those without a token cleared or left alone.
  static Quantized expected(Cluster& cluster, int32_t dest) {
    const ClusterOptions& options = cluster.options();
    const int64_t hidden = options.hidden;
    const int64_t blocks = (hidden + 127) / 128;
    const std::byte fill = options.zero_fill ? std::byte{0} : kUntouchedByte;
    const float scale_fill = options.zero_fill ? 0.0F : static_cast<float>(kUntouched);
    Quantized all{std::vector<std::byte>(at(options.shape.recv_capacity * hidden), fill),
                  std::vector<float>(at(options.shape.recv_capacity * blocks), scale_fill)};
    for (int64_t row = 0; row < options.shape.recv_capacity; ++row) {
      const int32_t source = cluster.rank(dest).row_source[at(row)];
      if (source < 0) continue;
      const auto owner = static_cast<int32_t>(source / options.shape.num_tokens);
      const int64_t token = source % options.shape.num_tokens;
      const std::vector<float> x = cluster.decode(cluster.rank(owner).x);
      const Quantized sent = quantize(row_of(x, token, hidden), hidden);
      std::copy(sent.rows.begin(), sent.rows.end(), all.rows.begin() + row * hidden);
      std::copy(sent.scales.begin(), sent.scales.end(), all.scales.begin() + row * blocks);
    }
    return all;
  }
};

TEST_P(QuantizedDispatch, GivesWhatTheWireCarries) {
  const ClusterOptions& options = GetParam();
  Cluster cluster(options);
  ASSERT_TRUE(cluster.plan().ok());
  ASSERT_TRUE(cluster.dispatch().ok());
  const reference::PerRank<float> plain = cluster.all(&RankBuffers::rows);
  const reference::PerRank<float> scalars = cluster.all(&RankBuffers::row_scalars);
  for (RankBuffers& rank : cluster.ranks()) {
    std::fill(rank.rows.begin(), rank.rows.end(), kUntouchedByte);
  }
  const reference::PerRank<float> untouched = cluster.all(&RankBuffers::rows);
  WorkerPool workers(2);
  for (const bool in : {false, true}) {
    for (const bool out : {false, true}) {
      SCOPED_TRACE(std::string(in ? "quantized in" : "") + (out ? " quantized out" : ""));
      std::vector<Quantized> sent, got;
      for (RankBuffers& rank : cluster.ranks()) {
        sent.push_back(quantize(cluster.decode(rank.x), options.hidden));
        const Quantized sizes = expected(cluster, static_cast<int32_t>(got.size()));
        got.push_back({std::vector<std::byte>(sizes.rows.size(), kUntouchedByte),
                       std::vector<float>(sizes.scales.size(), kUntouched)});
        std::fill(rank.rows.begin(), rank.rows.end(), kUntouchedByte);
        std::fill(rank.row_scalars.begin(), rank.row_scalars.end(), kUntouched);
      }
      std::vector<Call> calls = cluster.dispatch_calls();
      for (size_t rank = 0; rank < calls.size(); ++rank) {
        auto& op = std::get<DispatchOp>(calls[rank]);
        if (in) {
          op.x_format = RowFormat::kFloat8E4M3;
          op.x = sent[rank].rows.data();
          op.x_scales = sent[rank].scales.data();
        }
        if (out) {
          op.rows_format = RowFormat::kFloat8E4M3;
          op.rows = got[rank].rows.data();
          op.rows_scales = got[rank].scales.data();
        }
      }
      const Status status = execute(calls, workers);
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_EQ(cluster.all(&RankBuffers::row_scalars), scalars);
      // Not written where the rows go elsewhere.
      EXPECT_EQ(cluster.all(&RankBuffers::rows), out ? untouched : plain);
      for (size_t rank = 0; rank < (out ? got.size() : 0); ++rank) {
        const Quantized want = expected(cluster, static_cast<int32_t>(rank));
        EXPECT_EQ(got[rank].rows, want.rows) << "rank " << rank;
        EXPECT_EQ(got[rank].scales, want.scales) << "rank " << rank;
      }
    }
  }
}

std::vector<ClusterOptions> quantized_problems() {
  std::vector<ClusterOptions> all;
  for (const ClusterOptions& options : problems()) {
    if (options.wire == Wire::kFloat8E4M3) all.push_back(options);
  }
  const std::vector<ClusterOptions> filled = all;
  for (ClusterOptions options : filled) {
    if (options.hidden != 300) continue;
    options.zero_fill = false;
    options.scalars = false;
    all.push_back(options);
    options.shape.num_tokens = 0;
    all.push_back(options);
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Problems,
                         QuantizedDispatch,
                         testing::ValuesIn(quantized_problems()),
                         [](const auto& info) { return describe(info.param); });

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

}  // namespace
}  // namespace jax_ep
