# SPDX-License-Identifier: Apache-2.0
# Finds NVSHMEM for libjax_ep_rdma.so, the kernels that reach other hosts: in $NVSHMEM_HOME, or in the
# wheel nvidia-nvshmem-cu13 of the Python that builds. Sets JAX_EP_HAVE_NVSHMEM, JAX_EP_NVSHMEM_INCLUDE,
# JAX_EP_NVSHMEM_DEVICE and JAX_EP_NVSHMEM_HOST.

set(JAX_EP_NVSHMEM AUTO CACHE STRING
  "AUTO: build the kernels for RDMA if NVSHMEM is found; ON: fail if it is not; OFF: don't")
set(JAX_EP_HAVE_NVSHMEM FALSE)
if(NOT JAX_EP_NVSHMEM MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "jax_ep: JAX_EP_NVSHMEM is '${JAX_EP_NVSHMEM}'; allowed: AUTO, ON, OFF")
endif()
if(NOT JAX_EP_HAVE_CUDA OR JAX_EP_NVSHMEM STREQUAL "OFF")
  return()
endif()

set(_nvshmem "$ENV{NVSHMEM_HOME}")
if(NOT _nvshmem AND Python_EXECUTABLE)
  # pip may spread the namespace package over several folders.
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "import importlib.util as u, os; \
s = u.find_spec('nvidia'); \
print(next(p for d in s.submodule_search_locations if os.path.exists((p := d + '/nvshmem') \
+ '/lib/libnvshmem_device.a')))"
    OUTPUT_VARIABLE _wheel OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_QUIET RESULT_VARIABLE _failed)
  if(NOT _failed)
    set(_nvshmem "${_wheel}")
  endif()
endif()
set(JAX_EP_NVSHMEM_INCLUDE "${_nvshmem}/include")
set(JAX_EP_NVSHMEM_DEVICE "${_nvshmem}/lib/libnvshmem_device.a")
set(JAX_EP_NVSHMEM_HOST "${_nvshmem}/lib/libnvshmem_host.so.3")
foreach(_file "${JAX_EP_NVSHMEM_INCLUDE}/nvshmem.h" "${JAX_EP_NVSHMEM_DEVICE}" "${JAX_EP_NVSHMEM_HOST}")
  if(NOT _nvshmem OR NOT EXISTS "${_file}")
    if(JAX_EP_NVSHMEM STREQUAL "ON")
      message(FATAL_ERROR "jax_ep: JAX_EP_NVSHMEM=ON, but there is no ${_file}. Set NVSHMEM_HOME, or "
        "pip install nvidia-nvshmem-cu13 into the Python that builds.")
    endif()
    message(STATUS "jax_ep: without RDMA: no NVSHMEM is found (NVSHMEM_HOME, nvidia-nvshmem-cu13)")
    return()
  endif()
endforeach()
message(STATUS "jax_ep: RDMA by NVSHMEM, ${_nvshmem}")
set(JAX_EP_HAVE_NVSHMEM TRUE)
