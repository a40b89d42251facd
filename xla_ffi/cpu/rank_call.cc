// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/cpu/rank_call.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
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

int64_t CallSiteState::next_number() {
  static std::atomic<int64_t> count{0};
  return ++count;
}

ffi::Future refuse_call(const RankCall& call, const EpAttrs& attrs, const Status& status) {
  call.site->rendezvous.refuse_run(call.run_id.run_id, status);
  if (const GroupInfoPtr group = GroupRegistry::instance().find(attrs.group_id)) {
    group->flights->fail_run(call.run_id.run_id, std::nullopt, status);
  }
  return Failure{status};
}

Status find_rank(const RankCall& call, const EpAttrs& attrs, std::string_view op, GroupRank& rank) {
  JAX_EP_RETURN_IF_ERROR(GroupRegistry::instance().find_open(attrs.group_id, op, rank.group));
  const auto place = rank.group->places.find(call.device);
  if (place == rank.group->places.end()) {
    return {StatusCode::kFailedPrecondition,
            rank.group->name + " has no rank on CPU device " + std::to_string(call.device) +
                ", which runs its " + std::string(op) +
                "; run the program on the mesh that the group was made for"};
  }
  rank.place = place->second;
  return {};
}

ffi::Future join_rendezvous(const RankCall& call,
                            const GroupRank& rank,
                            const int32_t* program_rank,
                            Rendezvous::Arrival arrival) {
  arrival.run_id = call.run_id.run_id;
  arrival.group = rank.group;
  arrival.device = call.device;
  arrival.place = rank.place;
  const int32_t claimed = *program_rank;
  if (arrival.refusal.ok() && claimed != rank.place.rank) {
    arrival.refusal = {StatusCode::kFailedPrecondition,
                       wrong_rank_text(op_name(arrival), claimed, rank.place.rank)};
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
