// SPDX-License-Identifier: Apache-2.0
// A group, as Python names it.
#ifndef JAX_EP_XLA_FFI_CUDA_PYTHON_GROUP_H_
#define JAX_EP_XLA_FFI_CUDA_PYTHON_GROUP_H_

#include <cstdint>
#include <memory>
#include <string>

#include "csrc/runtime/cuda_registry.h"
#include "xla_ffi/cuda/python_errors.h"

namespace jax_ep {

// ValueError if there is none of this id.
inline std::shared_ptr<CudaGroup> find_group(int64_t id) {
  std::shared_ptr<CudaGroup> group = CudaGroupRegistry::instance().find(id);
  if (group == nullptr) {
    raise_if_error(Status::invalid_argument("there is no group " + std::to_string(id)));
  }
  return group;
}

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CUDA_PYTHON_GROUP_H_
