// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_XLA_FFI_SITE_H_
#define JAX_EP_XLA_FFI_SITE_H_

#include <cstdint>
#include <memory>
#include <string_view>

#include "csrc/core/ep_shape.h"
#include "csrc/core/status.h"
#include "csrc/cpu/rendezvous.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/validate.h"

namespace jax_ep {

namespace ffi = xla::ffi;

// The attributes that every target has; one dictionary attribute named "ep".
struct EpAttrs {
  int64_t group_id;
  int32_t num_ranks;
  int32_t num_experts;
  int32_t num_topk;
  int32_t expert_alignment;
  int32_t layout;  // Layout
};

// State of one custom call of one compiled program, made in the FFI instantiate stage and shared
// by all devices of the process that run the program: the place where its ranks meet.
struct CpuSite {
  static constexpr std::string_view kName = "jax_ep_cpu_site";
  static ffi::TypeId id;
  Rendezvous rendezvous;
};

// Handler of the instantiate stage, the same for every target.
XLA_FFI_Error* instantiate_cpu_site(XLA_FFI_CallFrame* frame);

// Sizes that all buffers of a call agree with, from its attributes; InvalidArgument names a bad
// attribute.
Status make_shape(const EpAttrs& attrs, int64_t num_tokens, int64_t capacity, EpShape& shape);

// Brings one rank's call to the site's rendezvous. `group_rank` is int32[2]: the index of the
// group among the mesh's other axes, and the rank in it. The future completes when all ranks of
// the group have met and the operation is done, or with the error of any of them.
ffi::Future join_site(
    CpuSite* site, ffi::RunId run_id, const EpAttrs& attrs, ffi::AnyBuffer group_rank, Call call);

// InvalidArgument unless the buffer is float32 with a received row's scalars: [C], or [C, K] in
// layout "rank".
Status check_row_scalars(const Buffer& buffer, const EpShape& shape);

// A future that carries an error from the start.
ffi::Future failed(const Status& status);

ffi::Error to_error(const Status& status);

}  // namespace jax_ep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_ep::EpAttrs,
                                      xla::ffi::StructMember<int64_t>("group_id"),
                                      xla::ffi::StructMember<int32_t>("num_ranks"),
                                      xla::ffi::StructMember<int32_t>("num_experts"),
                                      xla::ffi::StructMember<int32_t>("num_topk"),
                                      xla::ffi::StructMember<int32_t>("expert_alignment"),
                                      xla::ffi::StructMember<int32_t>("layout"));

#endif  // JAX_EP_XLA_FFI_SITE_H_
