// SPDX-License-Identifier: Apache-2.0
// The FFI handlers for platform CUDA, one per target. Each validates its buffers (op_arguments.h),
// fills the parameters of csrc/core/kernel_params.h and enqueues one kernel, or two of a plan with
// its dispatch that do not fit into one. None allocates, synchronizes or reads back, so that XLA
// may record them in CUDA graphs.
#ifndef JAX_EP_XLA_FFI_CUDA_HANDLERS_H_
#define JAX_EP_XLA_FFI_CUDA_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// Operands and results: see read_plan, read_dispatch, read_combine and
// read_plan_dispatch.
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_plan_cuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_dispatch_cuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_combine_cuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_plan_dispatch_cuda);

// The halves of a low-latency exchange. Operands and results: of a first half see
// read_dispatch_start and read_combine_start; a second one has the operands of the whole, the
// ticket, and arrays that it comes after, which nobody reads.
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_dispatch_start_cuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_dispatch_done_cuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_combine_start_cuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_combine_done_cuda);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CUDA_HANDLERS_H_
