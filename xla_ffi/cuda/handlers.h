// SPDX-License-Identifier: Apache-2.0
// The FFI handlers for platform CUDA, one per target. Each validates its buffers (op_arguments.h),
// fills the parameters of csrc/core/kernel_params.h and enqueues one kernel. None allocates,
// synchronizes or reads back, so that XLA may record them in CUDA graphs.
#ifndef JAX_EP_XLA_FFI_CUDA_HANDLERS_H_
#define JAX_EP_XLA_FFI_CUDA_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// (program_rank [1], topk_idx [T, K]) -> (slot [T, K], row_source [C], row_topk_idx [C, K],
// source_slot [R * T, J], group_sizes, tokens_per_expert [L], num_dropped []), all int32.
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_plan_cuda);

// (program_rank, x [T, H], token_scalars [T, K], topk_idx, slot, row_source, source_slot)
// -> (rows [C, H], row_scalars).
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_dispatch_cuda);

// (program_rank, y [C, H], weights, row_scalars, topk_idx, slot, row_topk_idx, source_slot)
// -> (out [T, H], token_scalars [T, K]). row_topk_idx is read only in layout "rank" with weights.
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_combine_cuda);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CUDA_HANDLERS_H_
