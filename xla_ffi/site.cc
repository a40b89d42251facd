// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/site.h"

#include <optional>
#include <string>
#include <utility>

#include "csrc/core/group_registry.h"
#include "xla_ffi/registration.h"
#include "xla_ffi/validate.h"

namespace jax_ep {

ffi::TypeId CpuSite::id = {};

namespace {

ffi::ErrorOr<std::unique_ptr<CpuSite>> instantiate() { return std::make_unique<CpuSite>(); }

XLA_FFI_DEFINE_HANDLER(kInstantiate, instantiate, ffi::Ffi::BindInstantiate());

Status bad_attribute(std::string_view name, int64_t value, std::string_view allowed) {
  return Status::invalid_argument("attribute ep." + std::string(name) + " is " +
                                  std::to_string(value) + "; allowed: " + std::string(allowed));
}

}  // namespace

XLA_FFI_Error* instantiate_cpu_site(XLA_FFI_CallFrame* frame) {
  return with_state<CpuSite, kInstantiate>(frame);
}

Status make_shape(const EpAttrs& attrs, int64_t num_tokens, int64_t capacity, EpShape& shape) {
  if (attrs.num_ranks < 1) return bad_attribute("num_ranks", attrs.num_ranks, "1 or more");
  if (attrs.num_experts < 1 || attrs.num_experts % attrs.num_ranks != 0) {
    return bad_attribute("num_experts", attrs.num_experts, "a positive multiple of num_ranks");
  }
  if (attrs.num_topk < 1) return bad_attribute("num_topk", attrs.num_topk, "1 or more");
  if (attrs.expert_alignment < 1) {
    return bad_attribute("expert_alignment", attrs.expert_alignment, "1 or more");
  }
  if (attrs.layout != static_cast<int32_t>(Layout::kExpert) &&
      attrs.layout != static_cast<int32_t>(Layout::kRank)) {
    return bad_attribute("layout", attrs.layout, "0 (expert), 1 (rank)");
  }
  // Rows and sources are int32 on the wire between plan and dispatch.
  constexpr int64_t kInt32Max = 2147483647;
  if (capacity > kInt32Max || num_tokens * attrs.num_ranks > kInt32Max) {
    return Status::invalid_argument(
        "a receive buffer of " + std::to_string(capacity) + " rows for " +
        std::to_string(attrs.num_ranks) + " ranks of " + std::to_string(num_tokens) +
        " tokens is too large; allowed: up to 2147483647 rows and tokens in all");
  }
  shape = EpShape{.num_ranks = attrs.num_ranks,
                  .num_experts = attrs.num_experts,
                  .num_topk = attrs.num_topk,
                  .num_tokens = num_tokens,
                  .recv_capacity = capacity,
                  .expert_alignment = attrs.expert_alignment,
                  .layout = static_cast<Layout>(attrs.layout)};
  return {};
}

Status check_row_scalars(const Buffer& buffer, const EpShape& shape) {
  if (shape.layout == Layout::kExpert) {
    return buffer.check(ffi::DataType::F32, {shape.recv_capacity});
  }
  return buffer.check(ffi::DataType::F32, {shape.recv_capacity, shape.num_topk});
}

ffi::Error to_error(const Status& status) {
  if (status.ok()) return ffi::Error::Success();
  return ffi::Error(static_cast<ffi::ErrorCode>(status.code()), status.message());
}

ffi::Future failed(const Status& status) {
  ffi::Promise promise;
  promise.SetError(to_error(status));
  return ffi::Future(promise);
}

ffi::Future join_site(
    CpuSite* site, ffi::RunId run_id, const EpAttrs& attrs, ffi::AnyBuffer group_rank, Call call) {
  Status status = Buffer("group_rank", group_rank).check(ffi::DataType::S32, {2});
  if (!status.ok()) return failed(status);
  const std::optional<GroupInfo> group = GroupRegistry::instance().find(attrs.group_id);
  if (!group.has_value()) {
    return failed({StatusCode::kFailedPrecondition,
                   "the EpGroup of this " + std::string(op_name(call)) +
                       " has been closed; a compiled function may be called only while the "
                       "group that it was traced with is open"});
  }
  const auto* where = static_cast<const int32_t*>(group_rank.untyped_data());
  Rendezvous::Arrival arrival{.run_id = run_id.run_id,
                              .group_index = where[0],
                              .rank = where[1],
                              .num_ranks = attrs.num_ranks,
                              .timeout = group->timeout,
                              .group_name = group->name,
                              .call = std::move(call)};
  ffi::Promise promise;
  ffi::Future future(promise);
  site->rendezvous.join(std::move(arrival), [promise](const Status& outcome) mutable {
    if (outcome.ok()) {
      promise.SetAvailable();
    } else {
      promise.SetError(to_error(outcome));
    }
  });
  return future;
}

}  // namespace jax_ep
