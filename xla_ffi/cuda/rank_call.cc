// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/cuda/rank_call.h"

#include "csrc/core/heap_fit.h"
#include "csrc/runtime/cuda_registry.h"

namespace jax_ep {

Status find_rank(const EpAttrs& attrs, OpKind op, const EpShape& shape, RankCall& call) {
  JAX_EP_RETURN_IF_ERROR(
      CudaGroupRegistry::instance().find_open(attrs.group_id, name(op), call.group));
  JAX_EP_RETURN_IF_ERROR(call.group->find(call.device, call.rank));
  JAX_EP_RETURN_IF_ERROR(call.rank->error());
  return check_fits(call.heap(), shape);
}

}  // namespace jax_ep
