// SPDX-License-Identifier: Apache-2.0
// The FFI handlers for platform cpu, one per target. Each validates its buffers (op_arguments.h)
// and joins its call site's rendezvous.
#ifndef JAX_EP_XLA_FFI_CPU_HANDLERS_H_
#define JAX_EP_XLA_FFI_CPU_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// (program_rank [1], topk_idx [T, K]) -> (slot [T, K], row_source [C], row_topk_idx [C, K],
// source_slot [0], group_sizes, tokens_per_expert [L], num_dropped []), all int32. source_slot is
// there because it is in the plan on CUDA.
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_plan_cpu);

// (program_rank, x [T, H], token_scalars [T, K], topk_idx, slot, row_source)
// -> (rows [C, H], row_scalars).
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_dispatch_cpu);

// (program_rank, y [C, H], weights, row_scalars, topk_idx, slot)
// -> (out [T, H], token_scalars [T, K]).
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_combine_cpu);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CPU_HANDLERS_H_
