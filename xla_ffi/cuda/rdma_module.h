// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_XLA_FFI_CUDA_RDMA_MODULE_H_
#define JAX_EP_XLA_FFI_CUDA_RDMA_MODULE_H_

#include <nanobind/nanobind.h>

namespace jax_ep {

// What of jax_ep._cuda is about RDMA: the library for it, and the job of the processes.
void define_rdma(nanobind::module_& m);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CUDA_RDMA_MODULE_H_
