// SPDX-License-Identifier: Apache-2.0
// The FFI handlers for platform cpu, one per target. Each validates its buffers, fills the
// call of csrc/cpu/calls.h and joins the site's rendezvous. An operand or result that an op can
// do without is passed with shape [0] (rows that do not travel: with H = 0).
#ifndef JAX_EP_XLA_FFI_HANDLERS_H_
#define JAX_EP_XLA_FFI_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// (group_rank [2], topk_idx [T, K]) -> (slot [T, K], row_source [C], row_topk_idx [C, K],
// group_sizes, tokens_per_expert [L], num_dropped []), all int32.
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_plan_cpu);

// (group_rank, x [T, H], token_scalars [T, K], topk_idx, slot, row_source)
// -> (rows [C, H], row_scalars).
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_dispatch_cpu);

// (group_rank, y [C, H], weights, row_scalars, topk_idx, slot)
// -> (out [T, H], token_scalars [T, K]).
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_ep_combine_cpu);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_HANDLERS_H_
