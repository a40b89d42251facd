// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/heap_description.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "csrc/core/network_layout.h"

namespace jax_ep {
namespace {

std::vector<HeapShape> shapes() {
  const HeapShape training{.num_ranks = 8,
                           .num_experts = 256,
                           .num_topk = 8,
                           .max_tokens = 4096,
                           .hidden = 7168,
                           .dtype = DType::kBFloat16};
  HeapShape fp8 = training;
  fp8.wire = Wire::kFloat8E4M3;
  HeapShape rank_major = training;
  rank_major.layout = Layout::kRank;
  const HeapShape odd{.num_ranks = 3,
                      .num_experts = 9,
                      .num_topk = 5,
                      .max_tokens = 17,
                      .hidden = 333,
                      .dtype = DType::kFloat16};
  const HeapShape largest{.num_ranks = kMaxRanks,
                          .num_experts = kMaxExperts,
                          .num_topk = kMaxTopk,
                          .max_tokens = kMaxTokens,
                          .hidden = 16384,
                          .wire = Wire::kFloat8E4M3,
                          .layout = Layout::kRank};
  return {HeapShape{}, training, fp8, rank_major, odd, largest};
}

TEST(HeapRegions, LieInOrderApartAlignedAndInsideTheHeap) {
  for (const HeapShape& shape : shapes()) {
    const HeapLayout layout = make_heap_layout(shape);
    int64_t end = 0;
    for (const RegionInfo& region : heap_regions(shape)) {
      EXPECT_GE(region.offset, end) << region.name;
      EXPECT_EQ(region.offset % 256, 0) << region.name;
      EXPECT_GE(region.bytes, 0) << region.name;
      end = region.offset + region.bytes;
    }
    EXPECT_LE(end, layout.total_bytes);
    EXPECT_GT(layout.total_bytes, layout.peer_bytes);
  }
}

TEST(HeapRegions, PeersMapTheFirstPartOnly) {
  for (const HeapShape& shape : shapes()) {
    const HeapLayout layout = make_heap_layout(shape);
    const auto regions = heap_regions(shape);
    for (size_t i = 0; i < regions.size(); ++i) {
      if (i < static_cast<size_t>(kFirstOwnRegion)) {
        EXPECT_LE(regions[i].offset + regions[i].bytes, layout.peer_bytes) << regions[i].name;
      } else {
        EXPECT_GE(regions[i].offset, layout.peer_bytes) << regions[i].name;
      }
    }
    EXPECT_EQ(layout.at(Region::kCounts), layout.peer_bytes);
  }
}

TEST(HeapRegions, SayWhatTheLayoutSays) {
  for (const HeapShape& shape : shapes()) {
    const HeapLayout layout = make_heap_layout(shape);
    const auto regions = heap_regions(shape);
    for (size_t i = 0; i < regions.size(); ++i) {
      EXPECT_EQ(regions[i].offset, layout.offset[i]);
      EXPECT_EQ(regions[i].bytes, layout.bytes[i]);
      EXPECT_FALSE(std::string(regions[i].holds).empty());
    }
  }
}

TEST(HeapRegions, RowsAreAlignedForBulkCopies) {
  for (const HeapShape& shape : shapes()) {
    const HeapLayout layout = make_heap_layout(shape);
    EXPECT_EQ(layout.row_stride % 16, 0);
    EXPECT_GE(layout.row_stride, shape.hidden * size_bytes(shape.dtype));
  }
}

// In multiples of 16 channels, segments of 512 with four scales each; or all scales at the end.
TEST(HeapRegions, RowsHaveRoomForFp8AndScales) {
  for (int64_t hidden = 1; hidden <= 2000; ++hidden) {
    const HeapLayout layout =
        make_heap_layout({.hidden = hidden, .dtype = DType::kBFloat16, .wire = Wire::kFloat8E4M3});
    const int64_t scales = 4 * ceil_div(hidden, kScaleBlock);
    EXPECT_GE(layout.row_stride,
              hidden % 16 == 0 ? hidden + align_up(scales, 16) : align_up(hidden, 4) + scales)
        << hidden;
  }
}

TEST(HeapRegions, NeedsNameTheLargestRegionsAndWhatToLower) {
  EXPECT_EQ(heap_needs(shapes()[1]),
            "rows 448.0 MiB (bytes [R, max_tokens, row_stride]), routing 1.0 MiB (i32 [R, "
            "max_tokens, K]), scalars 1.0 MiB (f32 [R, max_tokens, K]); lower max_tokens_per_rank "
            "(4096) or hidden (7168)");
}

TEST(HeapRegions, BytesAreReadable) {
  EXPECT_EQ(bytes_text(0), "0 bytes");
  EXPECT_EQ(bytes_text(1023), "1023 bytes");
  EXPECT_EQ(bytes_text(1536), "1.5 KiB");
  EXPECT_EQ(bytes_text(int64_t{5} << 30), "5.0 GiB");
  EXPECT_EQ(bytes_text(int64_t{2048} << 40), "2048.0 TiB");
}

TEST(HeapShapes, AreWithinWhatTheKernelsAreWrittenFor) {
  for (const HeapShape& shape : shapes()) EXPECT_TRUE(check_heap_shape(shape).ok());
  const auto message = [](auto change) {
    HeapShape shape{.num_ranks = 2, .num_experts = 4};
    change(shape);
    const Status status = check_heap_shape(shape);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  EXPECT_EQ(message([](HeapShape& s) { s.num_ranks = s.num_experts = 65; }),
            "num_ranks is 65; allowed on CUDA: 1 to 64");
  EXPECT_EQ(message([](HeapShape& s) { s.num_experts = 4098; }),
            "num_experts is 4098; allowed on CUDA: 1 to 4096");
  EXPECT_EQ(message([](HeapShape& s) { s.num_experts = 5; }),
            "num_experts is 5; allowed: a positive multiple of num_ranks, 2");
  EXPECT_EQ(message([](HeapShape& s) { s.num_topk = 5; }),
            "num_topk is 5; allowed: 1 to num_experts, 4");
  EXPECT_EQ(message([](HeapShape& s) {
              s.num_topk = 33;
              s.num_experts = 64;
            }),
            "num_topk is 33; allowed on CUDA: 1 to 32");
  EXPECT_EQ(message([](HeapShape& s) { s.max_tokens = kMaxTokens + 1; }),
            "max_tokens_per_rank is 1048577; allowed on CUDA: 1 to 1048576");
  EXPECT_EQ(message([](HeapShape& s) { s.hidden = 0; }),
            "hidden is 0; allowed on CUDA: 1 to 2147483647");
}

TEST(HeapShapes, OfSeveralDomainsAreWithinWhatTheKernelsAreWrittenFor) {
  const auto message = [](auto change) {
    HeapShape shape{.num_ranks = 4, .num_experts = 4, .num_topk = 2, .max_tokens = 64};
    shape.num_neighbors = 2;
    EXPECT_TRUE(check_heap_shape(shape).ok());
    change(shape);
    return check_heap_shape(shape).message();
  };
  EXPECT_EQ(message([](HeapShape& s) { s.num_neighbors = 3; }),
            "num_neighbors is 3; allowed on CUDA: 0, or a divisor of the 4 ranks");
  EXPECT_EQ(message([](HeapShape& s) { s.num_neighbors = -2; }),
            "num_neighbors is -2; allowed on CUDA: 0, or a divisor of the 4 ranks");
  EXPECT_EQ(message([](HeapShape& s) { s.gathered_domains = -1; }),
            "gathered_domains is -1; allowed on CUDA: 0 or more");
  EXPECT_TRUE(message([](HeapShape& s) { s.low_latency_tokens = 64; }).empty());
  EXPECT_EQ(message([](HeapShape& s) { s.low_latency_tokens = 65; }),
            "low_latency_tokens is 65; allowed on CUDA: 0 to 64");
  EXPECT_EQ(message([](HeapShape& s) { s.hidden = 1 << 30; }),
            "hidden is 1073741824; allowed on CUDA: messages of less than 4 GiB");
}

TEST(HeapShapes, NeedRoomForTheNetworksRings) {
  HeapShape shape = shapes()[1];
  const int64_t alone = heap_bytes(shape);
  EXPECT_EQ(alone, make_heap_layout(shape).total_bytes);
  shape.num_neighbors = 4;
  EXPECT_EQ(heap_bytes(shape),
            make_heap_layout(shape).total_bytes + network_layout_of(shape).total_bytes);
  // Rows of the domain alone.
  EXPECT_EQ(2 * make_heap_layout(shape).bytes[static_cast<size_t>(Region::kRows)],
            make_heap_layout(shapes()[1]).bytes[static_cast<size_t>(Region::kRows)]);
  EXPECT_NE(heap_needs(shape).find("the network's rings and messages "), std::string::npos);
}

TEST(Chunks, CoverAllTokensWithFewEnoughFlags) {
  for (const int64_t tokens : {0, 1, 127, 128, 129, 1024, 4096, 8192, 8193, 1 << 20}) {
    for (const OpKind op : {OpKind::kPlan, OpKind::kDispatch, OpKind::kCombine}) {
      EXPECT_LE(num_chunks(op, tokens), kMaxChunks) << tokens;
      // Routing has the flags before those of the rows that travel in the same exchange.
      EXPECT_LE(num_chunks(OpKind::kPlan, tokens), kRowFlags) << tokens;
      EXPECT_LE(kRowFlags + num_chunks(op, tokens), kMaxFlags) << tokens;
      EXPECT_GE(int64_t{num_chunks(op, tokens)} * chunk_tokens(op, tokens), tokens);
    }
    for (const int32_t ranks : {1, 8, 64}) {
      EXPECT_LE(num_tiles(tokens, ranks), kMaxTiles) << tokens;
      EXPECT_GE(int64_t{num_tiles(tokens, ranks)} * tile_tokens(tokens, ranks), tokens);
    }
  }
}

// Fewer tokens can make more tiles: 512 have 64, of 8 tokens, and 513 have 33.
TEST(Tiles, OfSmallerBatchesFitToo) {
  for (const int32_t ranks : {1, 3, 8, 64}) {
    for (const int64_t max_tokens : {1, 8, 9, 513, 520, 1025, 4097}) {
      HeapShape shape;
      shape.num_ranks = ranks;
      shape.num_experts = ranks;
      shape.max_tokens = max_tokens;
      const auto counts = static_cast<size_t>(Region::kCounts);
      const int64_t words = make_heap_layout(shape).bytes[counts] / 4;
      for (int64_t tokens = 0; tokens <= max_tokens; ++tokens) {
        ASSERT_LE(int64_t{ranks} * num_tiles(tokens, ranks) * ranks, words)
            << tokens << " of at most " << max_tokens << " tokens, " << ranks << " ranks";
      }
    }
  }
}

}  // namespace
}  // namespace jax_ep
