// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/cpu/rank_call.h"

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "csrc/core/error_record.h"
#include "csrc/cpu/group_registry.h"
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

ffi::Future refuse_call(const CpuCaller& caller, const Status& status) {
  caller.site->rendezvous.refuse_run(caller.run_id.run_id, status);
  return Failure{status};
}

ffi::Future join_site(const CpuCaller& caller,
                      const EpAttrs& attrs,
                      const Buffer& program_rank,
                      Call call) {
  const std::string_view op = op_name(call);
  GroupInfoPtr group;
  if (Status status = GroupRegistry::instance().find_open(attrs.group_id, op, group);
      !status.ok()) {
    return refuse_call(caller, status);
  }
  const auto place = group->places.find(caller.device);
  if (place == group->places.end()) {
    return refuse_call(caller,
                       {StatusCode::kFailedPrecondition,
                        group->name + " has no rank on CPU device " +
                            std::to_string(caller.device) + ", which runs its " + std::string(op) +
                            "; run the program on the mesh that the group was made for"});
  }
  Rendezvous::Arrival arrival{.run_id = caller.run_id.run_id,
                              .group = group,
                              .device = caller.device,
                              .place = place->second,
                              .num_ranks = attrs.num_ranks,
                              .call = std::move(call),
                              .refusal = {}};
  const int32_t claimed = *program_rank.data<const int32_t>();
  if (claimed != place->second.rank) {
    arrival.refusal = {StatusCode::kFailedPrecondition,
                       wrong_rank_text(op, claimed, place->second.rank)};
  }
  ffi::Promise promise;
  ffi::Future future(promise);
  caller.site->rendezvous.join(std::move(arrival), [promise](const Status& outcome) mutable {
    if (outcome.ok()) {
      promise.SetAvailable();
    } else {
      promise.SetError(to_error(outcome));
    }
  });
  return future;
}

}  // namespace jax_ep
