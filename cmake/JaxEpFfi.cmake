# SPDX-License-Identifier: Apache-2.0
# Target jax_ep_ffi: the XLA FFI headers, from JAX_EP_FFI_INCLUDE_DIR or else from the jaxlib of the
# Python that builds.

# The FFI minor version of the oldest supported jaxlib (0.10.2). A jaxlib refuses a binary that was
# built on headers newer than its own, and its whole CPU backend with it; Python compares the two
# versions before (jax_ep/_src/groups/native.py).
set(JAX_EP_FFI_MINOR 3)

set(JAX_EP_FFI_INCLUDE_DIR "" CACHE PATH "Folder that holds xla/ffi/api/ffi.h")
set(_ffi_include "${JAX_EP_FFI_INCLUDE_DIR}")
if(NOT _ffi_include)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u; print(u.find_spec('jaxlib').submodule_search_locations[0])"
    OUTPUT_VARIABLE _jaxlib OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_QUIET RESULT_VARIABLE _failed)
  if(_failed)
    message(FATAL_ERROR "jax_ep: ${Python_EXECUTABLE} has no jaxlib, whose XLA FFI headers this "
      "build needs. Install jaxlib==0.10.2, or set JAX_EP_FFI_INCLUDE_DIR to its include folder.")
  endif()
  set(_ffi_include "${_jaxlib}/include")
endif()
if(NOT EXISTS "${_ffi_include}/xla/ffi/api/c_api.h")
  message(FATAL_ERROR "jax_ep: no xla/ffi/api/c_api.h in ${_ffi_include}")
endif()

file(STRINGS "${_ffi_include}/xla/ffi/api/c_api.h" _ffi_minor
  REGEX "^#define XLA_FFI_API_MINOR [0-9]+")
string(REGEX MATCH "[0-9]+$" _ffi_minor "${_ffi_minor}")
message(STATUS "jax_ep: XLA FFI headers 0.${_ffi_minor} in ${_ffi_include}")
if(_ffi_minor GREATER JAX_EP_FFI_MINOR)
  set(_release "the jaxlib that these headers are of")
  file(GLOB _dist_info "${_ffi_include}/../../jaxlib-*.dist-info")
  if(_dist_info MATCHES "jaxlib-([0-9.]+)[.]dist-info$")
    set(_release "jaxlib ${CMAKE_MATCH_1}")
  endif()
  message(WARNING "jax_ep: built on XLA FFI 0.${_ffi_minor} of ${_release}, and not on "
    "0.${JAX_EP_FFI_MINOR} of jaxlib 0.10.2: what is built loads on ${_release} and newer ones only. "
    "Fine on this machine, and for a Python that has no older jaxlib (3.15: 0.11.1); else not for a "
    "wheel to hand out.")
endif()

add_library(jax_ep_ffi INTERFACE)
target_include_directories(jax_ep_ffi SYSTEM INTERFACE "${_ffi_include}")
