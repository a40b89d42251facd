// SPDX-License-Identifier: Apache-2.0
// A Status as Python gets it.
#ifndef JAX_EP_XLA_FFI_CUDA_PYTHON_ERRORS_H_
#define JAX_EP_XLA_FFI_CUDA_PYTHON_ERRORS_H_

#include <nanobind/nanobind.h>

#include "csrc/core/status.h"

namespace jax_ep {

// ValueError for bad arguments, MemoryError for a heap that does not fit, TimeoutError, else
// RuntimeError.
inline void raise_if_error(const Status& status) {
  if (status.ok()) return;
  PyObject* type = PyExc_RuntimeError;
  if (status.code() == StatusCode::kInvalidArgument) type = PyExc_ValueError;
  if (status.code() == StatusCode::kResourceExhausted) type = PyExc_MemoryError;
  if (status.code() == StatusCode::kDeadlineExceeded) type = PyExc_TimeoutError;
  PyErr_SetString(type, status.message().c_str());
  throw nanobind::python_error();
}

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CUDA_PYTHON_ERRORS_H_
