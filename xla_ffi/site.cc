// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/site.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "csrc/core/group_registry.h"
#include "xla_ffi/registration.h"

namespace jax_ep {

ffi::TypeId CpuSite::id = {};

namespace {

ffi::ErrorOr<std::unique_ptr<CpuSite>> instantiate() { return std::make_unique<CpuSite>(); }

XLA_FFI_DEFINE_HANDLER(kInstantiate, instantiate, ffi::Ffi::BindInstantiate());

}  // namespace

XLA_FFI_Error* instantiate_cpu_site(XLA_FFI_CallFrame* frame) {
  return with_state<CpuSite, kInstantiate>(frame);
}

ffi::Future join_site(
    CpuSite* site, ffi::RunId run_id, const EpAttrs& attrs, const Buffer& group_rank, Call call) {
  const std::optional<GroupInfo> group = GroupRegistry::instance().find(attrs.group_id);
  if (!group.has_value()) return Failure{closed_group(op_name(call))};
  const auto* where = group_rank.data<const int32_t>();
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
