// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_XLA_FFI_CPU_RANK_CALL_H_
#define JAX_EP_XLA_FFI_CPU_RANK_CALL_H_

#include <string_view>

#include "csrc/cpu/rendezvous/rendezvous.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/buffer.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {

namespace ffi = xla::ffi;

// State of one custom call of one compiled program, made in the FFI instantiate stage and shared
// by all devices of the process that run the program: the place where its ranks meet.
struct CpuSite {
  static constexpr std::string_view kName = "jax_ep_cpu_site";
  static ffi::TypeId id;
  Rendezvous rendezvous;
};

// Handler of the instantiate stage, the same for every target.
XLA_FFI_Error* instantiate_cpu_site(XLA_FFI_CallFrame* frame);

// Where a call of a handler runs.
struct CpuCaller {
  CpuSite* site;
  ffi::RunId run_id;
  int32_t device;  // its ordinal
};

// The call cannot take part: tells the log and the other ranks of this run, and returns `status`.
ffi::Future refuse_call(const CpuCaller& caller, const Status& status);

// Brings one rank's call to the site's rendezvous. The device says which rank it is;
// `program_rank`, int32[1], checked, must be the same. The future completes when all ranks of the
// group have met and the operation is done, or with the error of any of them.
ffi::Future join_site(const CpuCaller& caller,
                      const EpAttrs& attrs,
                      const Buffer& program_rank,
                      Call call);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CPU_RANK_CALL_H_
