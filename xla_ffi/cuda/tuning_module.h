// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_XLA_FFI_CUDA_TUNING_MODULE_H_
#define JAX_EP_XLA_FFI_CUDA_TUNING_MODULE_H_

#include <nanobind/nanobind.h>

namespace jax_ep {

// What of jax_ep._cuda is about launches that were measured (csrc/tuning/tuned_launches.h).
void define_tuning(nanobind::module_& m);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CUDA_TUNING_MODULE_H_
