// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/cuda/rank_call.h"

#include "csrc/core/heap_fit.h"
#include "csrc/runtime/cuda_registry.h"

namespace jax_ep {

Status find_site(const EpAttrs& attrs,
                 int32_t device,
                 std::string_view op,
                 const EpShape& shape,
                 CudaSite& site) {
  JAX_EP_RETURN_IF_ERROR(CudaGroupRegistry::instance().find_open(attrs.group_id, op, site.group));
  JAX_EP_RETURN_IF_ERROR(site.group->find(device, site.rank));
  JAX_EP_RETURN_IF_ERROR(site.rank->error());
  return check_fits(site.heap(), shape);
}

}  // namespace jax_ep
