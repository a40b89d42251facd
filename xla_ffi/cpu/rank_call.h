// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_XLA_FFI_CPU_RANK_CALL_H_
#define JAX_EP_XLA_FFI_CPU_RANK_CALL_H_

#include <cstdint>
#include <string_view>

#include "csrc/cpu/flights/flights.h"
#include "csrc/cpu/group_registry.h"
#include "csrc/cpu/rendezvous/rendezvous.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {

// State of one custom call of one compiled program, made in the FFI instantiate stage and shared
// by all devices of the process that run the program.
struct CallSiteState {
  static constexpr std::string_view kName = "jax_ep_cpu_call_site";
  static ffi::TypeId id;
  const int64_t number = next_number();  // no other call site's, of all that the process has had
  Rendezvous rendezvous;

 private:
  static int64_t next_number();
};

// Handler of the instantiate stage, the same for every target.
XLA_FFI_Error* instantiate_call_site(XLA_FFI_CallFrame* frame);

// One rank's execution of a custom call.
struct RankCall {
  CallSiteState* site;
  ffi::RunId run_id;
  int32_t device;  // its ordinal
};

// What every handler is bound to, in this order, before attributes of its own.
inline auto bind_call() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::State<CallSiteState>>()
      .Ctx<ffi::RunId>()
      .Ctx<ffi::DeviceOrdinal>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<EpAttrs>("ep");
}

// The call cannot take part: tells the log and the other ranks of this run, and returns `status`.
ffi::Future refuse_call(const RankCall& call, const EpAttrs& attrs, const Status& status);

// The group of a call of `op`, and which rank of it the call's device is.
struct GroupRank {
  GroupInfoPtr group;
  RankPlace place;
};
Status find_rank(const RankCall& call, const EpAttrs& attrs, std::string_view op, GroupRank& rank);

// Brings a rank's op to the call site's rendezvous: `arrival` without what `call` and `rank` say.
// The device says which rank it is; `program_rank`, int32[1], must be the same. The future
// completes when all ranks of the group have met and the operation is done, or with the error of
// any of them.
ffi::Future join_rendezvous(const RankCall& call,
                            const GroupRank& rank,
                            const int32_t* program_rank,
                            Rendezvous::Arrival arrival);

// What a handler does: `read(arguments)` decodes its call, which joins the rendezvous or is
// refused.
template <typename Op, typename Read>
ffi::Future take_part(const RankCall& call, const EpAttrs& attrs, const Read& read) {
  OpArguments<Op> arguments;
  if (Status status = read(arguments); !status.ok()) return refuse_call(call, attrs, status);
  GroupRank rank;
  if (Status status = find_rank(call, attrs, name(Op::kKind), rank); !status.ok()) {
    return refuse_call(call, attrs, status);
  }
  return join_rendezvous(call,
                         rank,
                         arguments.program_rank,
                         {.num_ranks = attrs.num_ranks, .call = arguments.op, .refusal = {}});
}

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CPU_RANK_CALL_H_
