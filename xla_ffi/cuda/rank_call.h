// SPDX-License-Identifier: Apache-2.0
// What the handlers for platform CUDA have in common.
#ifndef JAX_EP_XLA_FFI_CUDA_RANK_CALL_H_
#define JAX_EP_XLA_FFI_CUDA_RANK_CALL_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string_view>

#include "csrc/core/ep_shape.h"
#include "csrc/core/kernel_params.h"
#include "csrc/core/status.h"
#include "csrc/runtime/cuda_group.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {

namespace ffi = xla::ffi;

// The rank that a handler launches a kernel for. Its group lives as long.
struct CudaSite {
  std::shared_ptr<CudaGroup> group;
  const RankContext* rank = nullptr;

  [[nodiscard]] const HeapShape& heap() const { return group->config().heap; }
};

// Finds the rank of a call on a device. FailedPrecondition if the group has been closed or has no
// rank there, RankContext::error() if a kernel of the rank has given up, InvalidArgument if the
// call does not fit the group's heap.
Status find_site(const EpAttrs& attrs,
                 int32_t device,
                 std::string_view op,
                 const EpShape& shape,
                 CudaSite& site);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CUDA_RANK_CALL_H_
