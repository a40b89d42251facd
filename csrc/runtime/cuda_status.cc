// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/cuda_status.h"

#include <string>
#include <string_view>

namespace jax_ep {

Status cuda_status(cudaError_t error, const char* expression, const char* file, int line) {
  if (error == cudaSuccess) return {};
  // Or the next unrelated call of this thread would report it again.
  static_cast<void>(cudaGetLastError());
  // From csrc/ or xla_ffi/ on: where the sources were when this was compiled is nobody's concern.
  std::string_view path(file);
  for (const std::string_view folder : {"csrc/", "xla_ffi/"}) {
    const size_t start = path.rfind(folder);
    if (start != std::string_view::npos) path.remove_prefix(start);
  }
  return {StatusCode::kInternal,
          std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ") from " +
              expression + " at " + std::string(path) + ":" + std::to_string(line)};
}

DeviceGuard::DeviceGuard(int32_t device) {
  int former = -1;
  status_ = JAX_EP_CUDA_STATUS(cudaGetDevice(&former));
  if (!status_.ok() || former == device) return;
  status_ = JAX_EP_CUDA_STATUS(cudaSetDevice(device));
  if (status_.ok()) former_ = former;
}

DeviceGuard::~DeviceGuard() {
  if (former_ >= 0) static_cast<void>(JAX_EP_CUDA_STATUS(cudaSetDevice(former_)));
}

}  // namespace jax_ep
