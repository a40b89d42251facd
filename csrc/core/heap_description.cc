// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/heap_description.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <string_view>

#include "csrc/core/network_layout.h"
#include "csrc/core/shape_check.h"

namespace jax_ep {
namespace {

struct Words {
  const char* name;
  const char* shape;
  const char* holds;
};

// In the order of enum Region.
constexpr Words kWords[kNumRegions] = {
    {"acknowledged", "u32 [channels, R]", "by peer, the last epoch whose rows of ours it has read"},
    {"aborted", "u32 [1]", "who has given up, and waiting for whom, once a peer has"},
    {"sent", "u32 [channels, R]", "by source, the last epoch of which it has sent all"},
    {"arrived",
     "u64 [channels, R, flags]",
     "by source and chunk, arrival_flag of what has arrived"},
    {"routing", "i32 [R, max_tokens, K]", "topk_idx of every rank, unless plans are by counts"},
    {"scalars", "f32 [R, max_tokens, K]", "scalars that travel with rows"},
    {"rows", "bytes [R, max_tokens, row_stride]", "rows on their way, FP8 rows with their scales"},
    {"expert_packets", "packets [banks, R, expert_packets]", "topk_idx, of low-latency exchanges"},
    {"scalar_packets",
     "packets [banks, R, scalar_packets]",
     "scalars that travel with rows, likewise"},
    {"row_packets", "packets [banks, R, ll_tokens, row_packets]", "rows on their way, likewise"},
    {"counts", "u32 [bins, R, tiles]", "selections per bin and tile, then first positions"},
    {"totals", "u32 [bins]", "selections per bin"},
};
static_assert(kWords[static_cast<int32_t>(Region::kRows)].name == std::string_view("rows"));
static_assert(kWords[static_cast<int32_t>(Region::kTotals)].name == std::string_view("totals"));

Status not_on_cuda(std::string_view name, int64_t value, const std::string& allowed) {
  return Status::invalid_argument(std::string(name) + " is " + std::to_string(value) +
                                  "; allowed on CUDA: " + allowed);
}

Status check_range(std::string_view name, int64_t value, int64_t largest) {
  if (value >= 1 && value <= largest) return {};
  return not_on_cuda(name, value, "1 to " + std::to_string(largest));
}

// Between domains: ranks of a domain have a bit each, and a buffer of a ring an offset of 32 bits.
Status check_domains(const HeapShape& shape) {
  const int32_t num_neighbors = shape.num_neighbors;
  if (num_neighbors < 0 || (num_neighbors > 0 && shape.num_ranks % num_neighbors != 0)) {
    return not_on_cuda("num_neighbors",
                       num_neighbors,
                       "0, or a divisor of the " + std::to_string(shape.num_ranks) + " ranks");
  }
  if (shape.gathered_domains < 0) {
    return not_on_cuda("gathered_domains", shape.gathered_domains, "0 or more");
  }
  if (!shape.spans_domains()) return {};
  JAX_EP_RETURN_IF_ERROR(check_range("num_neighbors", num_neighbors, kMaxDomainRanks));
  const NetworkLayout network = network_layout_of(shape);
  if (std::max(network.buffer_bytes, network.far_chunk_bytes) >
      std::numeric_limits<uint32_t>::max()) {
    return not_on_cuda("hidden", shape.hidden, "messages of less than 4 GiB");
  }
  return {};
}

}  // namespace

std::array<RegionInfo, kNumRegions> heap_regions(const HeapShape& shape) {
  const HeapLayout layout = make_heap_layout(shape);
  std::array<RegionInfo, kNumRegions> regions{};
  for (size_t i = 0; i < regions.size(); ++i) {
    regions[i] = {.name = kWords[i].name,
                  .shape = kWords[i].shape,
                  .holds = kWords[i].holds,
                  .offset = layout.offset[i],
                  .bytes = layout.bytes[i]};
  }
  return regions;
}

Status check_heap_shape(const HeapShape& shape) {
  JAX_EP_RETURN_IF_ERROR(check_shape({.num_ranks = shape.num_ranks,
                                      .num_experts = shape.num_experts,
                                      .num_topk = shape.num_topk,
                                      .layout = shape.layout}));
  JAX_EP_RETURN_IF_ERROR(check_range("num_ranks", shape.num_ranks, kMaxRanks));
  JAX_EP_RETURN_IF_ERROR(check_range("num_experts", shape.num_experts, kMaxExperts));
  JAX_EP_RETURN_IF_ERROR(check_range("num_topk", shape.num_topk, kMaxTopk));
  JAX_EP_RETURN_IF_ERROR(check_range("max_tokens_per_rank", shape.max_tokens, kMaxTokens));
  const int64_t max_low_latency = std::min(kMaxLowLatencyTokens, shape.max_tokens);
  if (shape.low_latency_tokens < 0 || shape.low_latency_tokens > max_low_latency) {
    return not_on_cuda(
        "low_latency_tokens", shape.low_latency_tokens, "0 to " + std::to_string(max_low_latency));
  }
  JAX_EP_RETURN_IF_ERROR(check_range("hidden", shape.hidden, std::numeric_limits<int32_t>::max()));
  return check_domains(shape);
}

int64_t heap_bytes(const HeapShape& shape) {
  return make_heap_layout(shape).total_bytes + network_layout_of(shape).total_bytes;
}

std::string bytes_text(int64_t bytes) {
  constexpr std::string_view kUnits[] = {"KiB", "MiB", "GiB", "TiB"};
  if (bytes < 1024) return std::to_string(bytes) + " bytes";
  double value = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f ", value);
  return text + std::string(kUnits[unit]);
}

std::string heap_needs(const HeapShape& shape) {
  constexpr size_t kNamed = 3;
  auto regions = heap_regions(shape);
  std::stable_sort(regions.begin(), regions.end(), [](const RegionInfo& a, const RegionInfo& b) {
    return a.bytes > b.bytes;
  });
  std::string text;
  for (size_t i = 0; i < kNamed; ++i) {
    if (i > 0) text += ", ";
    text += std::string(regions[i].name) + " " + bytes_text(regions[i].bytes) + " (" +
            regions[i].shape + ")";
  }
  if (shape.spans_domains()) {
    text +=
        ", the network's rings and messages " + bytes_text(network_layout_of(shape).total_bytes);
  }
  text += "; lower max_tokens_per_rank (" + std::to_string(shape.max_tokens) + ")";
  if (shape.low_latency_tokens > 0) {
    text += ", low_latency_tokens (" + std::to_string(shape.low_latency_tokens) + ")";
  }
  return text + " or hidden (" + std::to_string(shape.hidden) + ")";
}

}  // namespace jax_ep
