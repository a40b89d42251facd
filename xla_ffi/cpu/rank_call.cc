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

ffi::TypeId CallSiteState::id = {};

namespace {

ffi::ErrorOr<std::unique_ptr<CallSiteState>> instantiate() {
  return std::make_unique<CallSiteState>();
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, instantiate, ffi::Ffi::BindInstantiate());

}  // namespace

XLA_FFI_Error* instantiate_call_site(XLA_FFI_CallFrame* frame) {
  return with_state<CallSiteState, kInstantiate>(frame);
}

ffi::Future refuse_call(const RankCall& call, const Status& status) {
  call.site->rendezvous.refuse_run(call.run_id.run_id, status);
  return Failure{status};
}

ffi::Future join_rendezvous(const RankCall& call,
                            const EpAttrs& attrs,
                            const int32_t* program_rank,
                            Call op) {
  const std::string_view name = op_name(op);
  GroupInfoPtr group;
  if (Status status = GroupRegistry::instance().find_open(attrs.group_id, name, group);
      !status.ok()) {
    return refuse_call(call, status);
  }
  const auto place = group->places.find(call.device);
  if (place == group->places.end()) {
    return refuse_call(call,
                       {StatusCode::kFailedPrecondition,
                        group->name + " has no rank on CPU device " + std::to_string(call.device) +
                            ", which runs its " + std::string(name) +
                            "; run the program on the mesh that the group was made for"});
  }
  Rendezvous::Arrival arrival{.run_id = call.run_id.run_id,
                              .group = group,
                              .device = call.device,
                              .place = place->second,
                              .num_ranks = attrs.num_ranks,
                              .call = std::move(op),
                              .refusal = {}};
  const int32_t claimed = *program_rank;
  if (claimed != place->second.rank) {
    arrival.refusal = {StatusCode::kFailedPrecondition,
                       wrong_rank_text(name, claimed, place->second.rank)};
  }
  ffi::Promise promise;
  ffi::Future future(promise);
  call.site->rendezvous.join(std::move(arrival), [promise](const Status& outcome) mutable {
    if (outcome.ok()) {
      promise.SetAvailable();
    } else {
      promise.SetError(to_error(outcome));
    }
  });
  return future;
}

}  // namespace jax_ep
