// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_RUNTIME_CUDA_STATUS_H_
#define JAX_EP_CSRC_RUNTIME_CUDA_STATUS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/core/status.h"

namespace jax_ep {

// OK, or Internal with CUDA's error, the expression and where it is. The thread's last error is
// cleared then, also where nobody is interested in the status: its next launch would report it.
Status cuda_status(cudaError_t error, const char* expression, const char* file, int line);

// Makes a device the calling thread's current one, and restores the former at the end.
class [[nodiscard]] DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  // Whether the device could be made current.
  [[nodiscard]] const Status& status() const { return status_; }

 private:
  int former_ = -1;
  Status status_;
};

}  // namespace jax_ep

// The outcome of a call of the CUDA runtime as a Status.
#define JAX_EP_CUDA_STATUS(expression) \
  ::jax_ep::cuda_status((expression), #expression, __FILE__, __LINE__)

#endif  // JAX_EP_CSRC_RUNTIME_CUDA_STATUS_H_
