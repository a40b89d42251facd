// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/calls.h"

#include <algorithm>
#include <array>
#include <type_traits>

#include "csrc/core/shape_check.h"
#include "csrc/cpu/float_env.h"
#include "csrc/cpu/rendezvous/rank_list.h"

namespace jax_ep {
namespace {

// A static parameter before it becomes text: ranks are compared at every call, messages are rare.
struct Field {
  std::string_view name;
  int64_t value = 0;
  std::string_view text;  // how to print the value, if not as a number
};

struct Fields {
  std::array<Field, 20> items;
  size_t size = 0;

  void add(std::string_view name, int64_t value, std::string_view text = {}) {
    items.at(size++) = {name, value, text};
  }
  void add_flag(std::string_view name, bool value) { add(name, value, value ? "true" : "false"); }
  template <typename Enum>
  void add_enum(std::string_view field, Enum value) {
    add(field, static_cast<int64_t>(value), name(value));
  }
  [[nodiscard]] const Field* begin() const { return items.data(); }
  [[nodiscard]] const Field* end() const { return items.data() + size; }
};

void add_shape(Fields& fields, const EpShape& shape) {
  fields.add("num_ranks", shape.num_ranks);
  fields.add("num_experts", shape.num_experts);
  fields.add("num_topk", shape.num_topk);
  fields.add("num_tokens", shape.num_tokens);
  fields.add("recv_capacity", shape.recv_capacity);
  fields.add("expert_alignment", shape.expert_alignment);
  fields.add_enum("layout", shape.layout);
}

template <typename Op>
void add_on_timeout(Fields& fields, const Op& call) {
  const bool masks = missing_ranks_of(call) != nullptr;
  fields.add("on_timeout", masks, masks ? "mask" : "error");
}

Fields fields_of(const PlanOp& call) {
  Fields fields;
  add_shape(fields, call.shape);
  return fields;
}

Fields fields_of(const DispatchOp& call) {
  Fields fields;
  add_shape(fields, call.shape);
  fields.add("hidden", call.hidden);
  fields.add("num_scalars", call.num_scalars);
  fields.add_enum("dtype", call.dtype);
  fields.add_enum("wire", call.wire);
  fields.add_enum("x_format", call.x_format);
  fields.add_enum("rows_format", call.rows_format);
  fields.add_flag("zero_fill", call.zero_fill);
  fields.add_flag("weighted", call.weighted);
  fields.add_flag("with_dots", call.with_dots);
  add_on_timeout(fields, call);
  return fields;
}

Fields fields_of(const CombineOp& call) {
  Fields fields;
  add_shape(fields, call.shape);
  fields.add("hidden", call.hidden);
  fields.add_flag("weighted", call.weighted);
  fields.add("num_scalars", call.num_scalars);
  fields.add("domain_size", call.domain_size);
  fields.add_enum("dtype", call.dtype);
  add_on_timeout(fields, call);
  return fields;
}

Fields fields_of(const PlanDispatchOp& call) { return fields_of(call.dispatch); }

Fields fields_of(const Call& call) {
  return std::visit([](const auto& typed) { return fields_of(typed); }, call);
}

std::string text_of(const Field& field) {
  return field.text.empty() ? std::to_string(field.value) : std::string(field.text);
}

// What the operation relies on: no division by zero, and rows and tokens that int32 can count.
Status check_sizes(const EpShape& shape, size_t num_calls) {
  if (static_cast<size_t>(shape.num_ranks) != num_calls) {
    return out_of_range("num_ranks",
                        shape.num_ranks,
                        "the number of ranks that meet, " + std::to_string(num_calls));
  }
  return check_shape(shape);
}

Status check_rows(const EpShape& shape, int64_t hidden, int32_t num_scalars) {
  if (hidden < 0) return out_of_range("hidden", hidden, "0 or more");
  if (num_scalars != 0 && num_scalars != shape.num_topk) {
    return out_of_range(
        "num_scalars", num_scalars, "0 or num_topk, " + std::to_string(shape.num_topk));
  }
  return {};
}

Status check_parameters(const PlanOp& call, size_t num_calls) {
  return check_sizes(call.shape, num_calls);
}

Status check_parameters(const DispatchOp& call, size_t num_calls) {
  JAX_EP_RETURN_IF_ERROR(check_sizes(call.shape, num_calls));
  JAX_EP_RETURN_IF_ERROR(check_rows(call.shape, call.hidden, call.num_scalars));
  JAX_EP_RETURN_IF_ERROR(check_row_formats(call));
  return check_products(call);
}

Status check_parameters(const CombineOp& call, size_t num_calls) {
  JAX_EP_RETURN_IF_ERROR(check_sizes(call.shape, num_calls));
  return check_rows(call.shape, call.hidden, call.num_scalars);
}

Status check_parameters(const PlanDispatchOp& call, size_t num_calls) {
  return check_parameters(call.dispatch, num_calls);
}

Status run(std::span<const PlanOp> ops, WorkerPool& workers) { return run_plan(ops, workers); }
Status run(std::span<const DispatchOp> ops, WorkerPool& workers) {
  return run_dispatch(ops, workers);
}
Status run(std::span<const CombineOp> ops, WorkerPool& workers) {
  return run_combine(ops, workers);
}
Status run(std::span<const PlanDispatchOp> ops, WorkerPool& workers) {
  return run_plan_dispatch(ops, workers);
}

// Tells each rank that is there which of those that it waits for are not.
template <typename Op>
void set_missing_ranks(std::span<const Op> ops) {
  for (const Op& op : ops) {
    uint8_t* const missing = is_absent(op) ? nullptr : missing_ranks_of(op);
    if (missing == nullptr) continue;
    const uint8_t* const mask = rank_mask_of(op);
    for (size_t rank = 0; rank < ops.size(); ++rank) {
      missing[rank] = is_absent(ops[rank]) && (mask == nullptr || mask[rank] != 0) ? 1 : 0;
    }
  }
}

const EpShape& shape_of_call(const Call& call) {
  return std::visit([](const auto& op) -> const EpShape& { return shape_of(op); }, call);
}

// The calls of all ranks, of which one alone is there.
Status only_call(int32_t rank, const Call& call, std::vector<Call>& calls) {
  const EpShape& shape = shape_of_call(call);
  JAX_EP_RETURN_IF_ERROR(check_shape(shape));
  if (rank >= shape.num_ranks) return out_of_range("rank", rank, "a rank of the group");
  calls.assign(static_cast<size_t>(shape.num_ranks), absent_op<PlanOp>());
  calls[static_cast<size_t>(rank)] = call;
  return {};
}

}  // namespace

std::string_view op_name(const Call& call) {
  return std::visit([](const auto& op) { return name(op.kKind); }, call);
}

bool is_absent(const Call& call) {
  return std::visit([](const auto& op) { return is_absent(op); }, call);
}

Status disagreement(std::string_view name, std::span<const std::string> text_of_rank) {
  std::vector<std::string> values;
  std::vector<std::vector<int32_t>> ranks;  // of each value
  for (size_t rank = 0; rank < text_of_rank.size(); ++rank) {
    if (text_of_rank[rank].empty()) continue;
    const auto it = std::find(values.begin(), values.end(), text_of_rank[rank]);
    if (it == values.end()) {
      values.push_back(text_of_rank[rank]);
      ranks.push_back({static_cast<int32_t>(rank)});
    } else {
      ranks[static_cast<size_t>(it - values.begin())].push_back(static_cast<int32_t>(rank));
    }
  }
  std::string message = "ranks disagree: " + std::string(name) + " is ";
  for (size_t i = 0; i < values.size(); ++i) {
    if (i > 0) message += i + 1 == values.size() ? " and " : ", ";
    message += values[i] + (ranks[i].size() == 1 ? " on rank " : " on ranks ");
    message += format_ranks(ranks[i]);
  }
  return Status::invalid_argument(std::move(message));
}

std::vector<Property> properties(const Call& call) {
  std::vector<Property> result;
  for (const Field& field : fields_of(call)) result.push_back({field.name, text_of(field)});
  return result;
}

Status check_agreement(std::span<const Call> calls) {
  if (calls.empty()) return {};
  const auto disagree = [&](std::string_view name, const auto& text_of_call) {
    std::vector<std::string> texts;
    for (const Call& call : calls) {
      texts.push_back(is_absent(call) ? std::string() : text_of_call(call));
    }
    return disagreement(name, texts);
  };
  const Call& first_call = first_present(calls);
  for (const Call& call : calls) {
    if (is_absent(call) || call.index() == first_call.index()) continue;
    return disagree("op", [](const Call& other) { return std::string(op_name(other)); });
  }
  const Fields expected = fields_of(first_call);
  size_t first = expected.size;  // the first field in which some rank differs
  for (const Call& call : calls) {
    if (is_absent(call)) continue;
    const Fields fields = fields_of(call);
    for (size_t i = 0; i < first; ++i) {
      if (fields.items[i].value != expected.items[i].value) first = i;
    }
  }
  if (first == expected.size) return {};
  return disagree(expected.items[first].name,
                  [&](const Call& call) { return text_of(fields_of(call).items[first]); });
}

Status execute(std::span<const Call> calls, WorkerPool& workers) {
  if (calls.empty()) return {};
  // Results must not depend on which rank's thread runs this; the workers' modes are default.
  const ScopedDefaultFloatEnv float_env;
  return std::visit(
      [&](const auto& first) -> Status {
        using Op = std::decay_t<decltype(first)>;
        if (Status status = check_parameters(first, calls.size()); !status.ok()) return status;
        std::vector<Op> ops;
        ops.reserve(calls.size());
        for (const Call& call : calls) {
          ops.push_back(is_absent(call) ? absent_op<Op>() : std::get<Op>(call));
        }
        if (Status status = run(ops, workers); !status.ok()) return status;
        set_missing_ranks<Op>(ops);
        return {};
      },
      first_present(calls));
}

Status execute_alone(int32_t rank, const Call& call, WorkerPool& workers) {
  // Whatever its routing says: a rank that takes no part selects nothing.
  std::vector<Call> calls;
  JAX_EP_RETURN_IF_ERROR(only_call(rank, call, calls));
  const EpShape& shape = shape_of_call(call);
  const std::vector<int32_t> none(static_cast<size_t>(shape.num_tokens * shape.num_topk), -1);
  const std::vector<int32_t> no_rows(static_cast<size_t>(shape.recv_capacity), -1);
  // It waits for nobody, so it misses nobody.
  const std::vector<uint8_t> nobody(static_cast<size_t>(shape.num_ranks), 0);
  std::visit(
      [&](auto& op) {
        using Op = std::decay_t<decltype(op)>;
        if constexpr (std::is_same_v<Op, PlanDispatchOp>) {
          op.plan.topk_idx = op.dispatch.topk_idx = none.data();
          op.plan.rank_mask = nobody.data();
        } else {
          op.topk_idx = none.data();
          op.rank_mask = nobody.data();
        }
        if constexpr (std::is_same_v<Op, CombineOp>) op.slot = none.data();
        if constexpr (std::is_same_v<Op, DispatchOp>) {
          op.slot = none.data();
          op.row_source = no_rows.data();
        }
      },
      calls[static_cast<size_t>(rank)]);
  return execute(calls, workers);
}

Status execute_late(int32_t rank, const Call& call, WorkerPool& workers) {
  std::vector<Call> calls;
  JAX_EP_RETURN_IF_ERROR(only_call(rank, call, calls));
  return execute(calls, workers);
}

Status run_plan_dispatch(std::span<const PlanDispatchOp> ops, WorkerPool& workers) {
  std::vector<PlanOp> plans;
  std::vector<DispatchOp> dispatches;
  for (const PlanDispatchOp& op : ops) {
    plans.push_back(op.plan);
    dispatches.push_back(op.dispatch);
  }
  JAX_EP_RETURN_IF_ERROR(run_plan(plans, workers));
  return run_dispatch(dispatches, workers);
}

}  // namespace jax_ep
