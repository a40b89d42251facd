// SPDX-License-Identifier: Apache-2.0
// The FFI handlers for platform cpu, one per target. Each validates its buffers (op_arguments.h)
// and joins its call site's rendezvous.
#ifndef JAX_EP_XLA_FFI_CPU_HANDLERS_H_
#define JAX_EP_XLA_FFI_CPU_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// Operands and results: see read_plan, read_dispatch, read_combine and
// read_plan_dispatch.
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_plan_cpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_dispatch_cpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_combine_cpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_plan_dispatch_cpu);

// The halves of a plan_dispatch and of a combine. A first half has the operands of the whole, one
// result: ticket, uint32[2], and the attribute "counts" (see csrc/cpu/flights/flights.h). A second
// half has the results of the whole; its operands are program_rank, ticket, and any that it is to
// come after.
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_dispatch_start_cpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_dispatch_done_cpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_combine_start_cpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_combine_done_cpu);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CPU_HANDLERS_H_
