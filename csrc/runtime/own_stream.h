// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_RUNTIME_OWN_STREAM_H_
#define JAX_EP_CSRC_RUNTIME_OWN_STREAM_H_

#include <cuda_runtime_api.h>

#include "csrc/core/status.h"
#include "csrc/runtime/cuda_status.h"

namespace jax_ep {

// Runs what `enqueue(stream)` enqueues, and waits for it, on a stream of its own on the current
// device: the default stream would wait for whatever else the process runs, which may be a kernel
// that waits for a peer.
template <typename Enqueue>
Status on_own_stream(const Enqueue& enqueue) {
  cudaStream_t stream = nullptr;
  JAX_EP_RETURN_IF_ERROR(
      JAX_EP_CUDA_STATUS(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)));
  Status status = enqueue(stream);
  if (status.ok()) status = JAX_EP_CUDA_STATUS(cudaStreamSynchronize(stream));
  static_cast<void>(JAX_EP_CUDA_STATUS(cudaStreamDestroy(stream)));
  return status;
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_RUNTIME_OWN_STREAM_H_
