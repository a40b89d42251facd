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
    add("first_neighbor", view.first_neighbor).add("num_neighbors", view.num_neighbors);
    add("rank_mask", view.rank_mask).add("given_up", view.given_up);
    add_list("heap", view.heap, view.num_ranks);
    return *this;
  }

  Fields& add(const LoopbackNetwork& network) {
    const Topology& topology = network.network.topology;
    add("num_domains", topology.num_scaleout_ranks);
    add("network_bytes", network.network.layout.total_bytes);
    add_list("network_heap", network.heaps.heap, topology.num_ranks());
    add_list("domain_heap", network.network.heap, topology.num_scaleup_ranks);
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
  void add_list(std::string_view name, std::byte* const* addresses, int32_t count) {
    text_.append(" ").append(name).append("=");
    for (int32_t i = 0; i < count; ++i) {
      text_.append(i > 0 ? "," : "").append(number(addresses[i]));
    }
  }

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

template <typename Op>
Fields fields_of_call(const KernelParams<Op>& params) {
  return Fields(name(Op::kKind))
      .add(params.view)
      .add(shape_of(params.op))
      .add("call_tag", params.call_tag)
      .add("half", static_cast<int32_t>(params.half))
      .add("ticket", params.ticket)
      .add("program_rank", params.program_rank);
}

void add_plan(Fields& fields, const PlanOp& op) {
  fields.add("topk_idx", op.topk_idx)
      .add("slot", op.slot)
      .add("row_source", op.row_source)
      .add("row_topk_idx", op.row_topk_idx)
      .add("source_slot", op.source_slot)
      .add("group_sizes", op.group_sizes)
      .add("tokens_per_expert", op.tokens_per_expert)
      .add("num_dropped", op.num_dropped);
}

void add_dispatch(Fields& fields, const DispatchOp& op) {
  fields.add("hidden", op.hidden)
      .add("num_scalars", op.num_scalars)
      .add("dtype", op.dtype)
      .add("wire", op.wire)
      .add("x_format", op.x_format)
      .add("rows_format", op.rows_format)
      .add("zero_fill", op.zero_fill)
      .add("weighted", op.weighted)
      .add("with_dots", op.with_dots)
      .add("x", op.x)
      .add("x_scales", op.x_scales)
      .add("token_scalars", op.token_scalars)
      .add("row_weights", op.row_weights)
      .add("y", op.y)
      .add("topk_idx", op.topk_idx)
      .add("slot", op.slot)
      .add("row_source", op.row_source)
      .add("source_slot", op.source_slot)
      .add("rows", op.rows)
      .add("rows_scales", op.rows_scales)
      .add("row_scalars", op.row_scalars)
      .add("row_dots", op.row_dots)
      .add("missing_ranks", op.missing_ranks);
}

Fields fields_of(const PlanParams& params) {
  Fields fields = fields_of_call(params);
  add_plan(fields, params.op);
  return fields;
}

Fields fields_of(const DispatchParams& params) {
  Fields fields = fields_of_call(params);
  add_dispatch(fields, params.op);
  return fields;
}

// What both have is as the dispatch has it.
Fields fields_of(const PlanDispatchParams& params) {
  Fields fields = fields_of_call(params);
  add_plan(fields, params.op.plan);
  add_dispatch(fields, params.op.dispatch);
  return fields;
}

Fields fields_of(const CombineParams& params) {
  return fields_of_call(params)
      .add("hidden", params.op.hidden)
      .add("weighted", params.op.weighted)
      .add("num_scalars", params.op.num_scalars)
      .add("dtype", params.op.dtype)
      .add("y", params.op.y)
      .add("weights", params.op.weights)
      .add("row_scalars", params.op.row_scalars)
      .add("topk_idx", params.op.topk_idx)
      .add("slot", params.op.slot)
      .add("row_topk_idx", params.op.row_topk_idx)
      .add("source_slot", params.op.source_slot)
      .add("out", params.op.out)
      .add("token_scalars", params.op.token_scalars)
      .add("missing_ranks", params.op.missing_ranks);
}

}  // namespace

std::string text_of(const Launch& launch) {
  Fields fields = std::visit([](const auto& params) { return fields_of(params); }, launch.params);
  fields.add("device", launch.device)
      .add("stream", launch.stream)
      .add("blocks", launch.shape.num_blocks)
      .add("warps", launch.shape.num_warps)
      .add("stages", launch.shape.num_stages)
      .add("senders", launch.shape.num_senders)
      .add("tail_blocks", launch.shape.num_tail_blocks);
  if (launch.network.has_value()) fields.add(*launch.network);
  return fields.text();
}

}  // namespace jax_ep::fake_cudart
