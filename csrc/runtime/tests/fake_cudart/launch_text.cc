// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/tests/fake_cudart/launch_text.h"

#include <cstdint>
#include <string_view>
#include <type_traits>

namespace jax_ep::fake_cudart {
namespace {

class Fields {
 public:
  explicit Fields(std::string_view operation) : text_(operation) {}

  template <typename T>
  Fields& add(std::string_view name, T value) {
    text_.append(" ").append(name).append("=").append(number(value));
    return *this;
  }

  Fields& add(const RankView& view) {
    add("rank", view.rank).add("num_ranks", view.num_ranks).add("timeout_ns", view.timeout_ns);
    add("report_ns", view.report_ns).add("chunk_target", view.chunk_target);
    add("control", view.control).add("error", view.error).add("long_waits", view.long_waits);
    add("heap_bytes", view.layout.total_bytes);
    text_ += " heap=";
    for (int32_t rank = 0; rank < view.num_ranks; ++rank) {
      text_.append(rank > 0 ? "," : "").append(number(view.heap[rank]));
    }
    return *this;
  }

  Fields& add(const EpShape& shape) {
    return add("shape_num_ranks", shape.num_ranks)
        .add("num_experts", shape.num_experts)
        .add("num_topk", shape.num_topk)
        .add("num_tokens", shape.num_tokens)
        .add("recv_capacity", shape.recv_capacity)
        .add("expert_alignment", shape.expert_alignment)
        .add("layout", shape.layout);
  }

  [[nodiscard]] const std::string& text() const { return text_; }

 private:
  template <typename T>
  static std::string number(T value) {
    if constexpr (std::is_pointer_v<T>) {
      return std::to_string(reinterpret_cast<uintptr_t>(value));
    } else if constexpr (std::is_enum_v<T>) {
      return std::to_string(static_cast<int64_t>(value));
    } else {
      return std::to_string(value);
    }
  }

  std::string text_;
};

Fields fields_of(const PlanParams& params) {
  return Fields("plan")
      .add(params.view)
      .add(params.op.shape)
      .add("call_tag", params.call_tag)
      .add("program_rank", params.program_rank)
      .add("topk_idx", params.op.topk_idx)
      .add("slot", params.op.slot)
      .add("row_source", params.op.row_source)
      .add("row_topk_idx", params.op.row_topk_idx)
      .add("source_slot", params.op.source_slot)
      .add("group_sizes", params.op.group_sizes)
      .add("tokens_per_expert", params.op.tokens_per_expert)
      .add("num_dropped", params.op.num_dropped);
}

Fields fields_of(const DispatchParams& params) {
  return Fields("dispatch")
      .add(params.view)
      .add(params.op.shape)
      .add("call_tag", params.call_tag)
      .add("hidden", params.op.hidden)
      .add("num_scalars", params.op.num_scalars)
      .add("dtype", params.op.dtype)
      .add("wire", params.op.wire)
      .add("x_format", params.op.x_format)
      .add("rows_format", params.op.rows_format)
      .add("zero_fill", params.op.zero_fill)
      .add("weighted", params.op.weighted)
      .add("with_dots", params.op.with_dots)
      .add("program_rank", params.program_rank)
      .add("x", params.op.x)
      .add("x_scales", params.op.x_scales)
      .add("token_scalars", params.op.token_scalars)
      .add("row_weights", params.op.row_weights)
      .add("y", params.op.y)
      .add("topk_idx", params.op.topk_idx)
      .add("slot", params.op.slot)
      .add("row_source", params.op.row_source)
      .add("source_slot", params.op.source_slot)
      .add("rows", params.op.rows)
      .add("rows_scales", params.op.rows_scales)
      .add("row_scalars", params.op.row_scalars)
      .add("row_dots", params.op.row_dots);
}

Fields fields_of(const CombineParams& params) {
  return Fields("combine")
      .add(params.view)
      .add(params.op.shape)
      .add("call_tag", params.call_tag)
      .add("hidden", params.op.hidden)
      .add("weighted", params.op.weighted)
      .add("num_scalars", params.op.num_scalars)
      .add("dtype", params.op.dtype)
      .add("program_rank", params.program_rank)
      .add("y", params.op.y)
      .add("weights", params.op.weights)
      .add("row_scalars", params.op.row_scalars)
      .add("topk_idx", params.op.topk_idx)
      .add("slot", params.op.slot)
      .add("row_topk_idx", params.op.row_topk_idx)
      .add("source_slot", params.op.source_slot)
      .add("out", params.op.out)
      .add("token_scalars", params.op.token_scalars);
}

}  // namespace

std::string text_of(const Launch& launch) {
  Fields fields = std::visit([](const auto& params) { return fields_of(params); }, launch.params);
  fields.add("device", launch.device)
      .add("stream", launch.stream)
      .add("blocks", launch.shape.num_blocks)
      .add("warps", launch.shape.num_warps)
      .add("stages", launch.shape.num_stages);
  return fields.text();
}

}  // namespace jax_ep::fake_cudart
