# SPDX-License-Identifier: Apache-2.0
# Enables the CUDA language, with the first compiler found of
#   1. -DCMAKE_CUDA_COMPILER or $CUDACXX,
#   2. $CUDA_HOME, $CUDA_PATH, $PATH, /usr/local/cuda,
#   3. the nvidia-cuda-nvcc wheel of the Python that builds
# (JAX_EP_CUDA=PYPI: only the last). Sets JAX_EP_HAVE_CUDA and JAX_EP_CUDART_STATIC.

set(JAX_EP_CUDA AUTO CACHE STRING
  "AUTO: build the CUDA kernels if nvcc is found; ON, PYPI: fail if it is not; OFF: don't")
# Machine code for 9.0, and for 10.0 and 10.3, which share it; PTX for what comes. No `a` or `f`: the
# kernels use no feature of one architecture or family, so their machine code would be the same, and
# PTX with such features runs on nothing newer.
option(JAX_EP_CUDA_LINE_INFO "Let profilers and sanitizers name lines of the CUDA kernels" ON)
set(JAX_EP_CUDA_ARCHS "90-real;100-real;90-virtual" CACHE STRING
  "What the kernels are compiled for, as CMAKE_CUDA_ARCHITECTURES takes it")
option(JAX_EP_PTXAS_VERBOSE "Print the registers, memory and spills of each kernel" OFF)

set(JAX_EP_HAVE_CUDA FALSE)
if(NOT JAX_EP_CUDA MATCHES "^(AUTO|ON|OFF|PYPI)$")
  message(FATAL_ERROR "jax_ep: JAX_EP_CUDA is '${JAX_EP_CUDA}'; allowed: AUTO, ON, PYPI, OFF")
endif()
if(JAX_EP_CUDA STREQUAL "OFF")
  message(STATUS "jax_ep: without CUDA kernels, as asked (JAX_EP_CUDA=OFF)")
  return()
endif()

set(_nvcc "")
if(NOT JAX_EP_CUDA STREQUAL "PYPI")
  if(CMAKE_CUDA_COMPILER)
    set(_nvcc "${CMAKE_CUDA_COMPILER}")
  elseif(NOT "$ENV{CUDACXX}" STREQUAL "")
    set(_nvcc "$ENV{CUDACXX}")
  else()
    find_program(JAX_EP_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
    find_program(JAX_EP_NVCC nvcc PATHS /usr/local/cuda/bin)
    if(JAX_EP_NVCC)
      set(_nvcc "${JAX_EP_NVCC}")
    endif()
  endif()
endif()
if(NOT _nvcc AND Python_EXECUTABLE)
  # pip may spread the namespace package over several folders.
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "import importlib.util as u, os; \
s = u.find_spec('nvidia'); \
print(next(p for d in s.submodule_search_locations if os.path.exists(p := d + '/cu13/bin/nvcc')))"
    OUTPUT_VARIABLE _wheel OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_QUIET RESULT_VARIABLE _failed)
  if(NOT _failed)
    set(_nvcc "${_wheel}")
  endif()
endif()

if(NOT _nvcc)
  string(CONCAT _how "Install a CUDA 13 toolkit, or set the environment variable JAX_EP_CUDA=PYPI "
    "to build with NVIDIA's compiler from PyPI (100 MB)")
  if(JAX_EP_CUDA STREQUAL "PYPI")
    message(FATAL_ERROR "jax_ep: JAX_EP_CUDA=PYPI, but this Python has no nvcc. Set it as an "
      "environment variable, and pip brings one; but with --no-build-isolation, install the wheels "
      "yourself that pyproject.toml names for it.")
  elseif(NOT JAX_EP_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "jax_ep: JAX_EP_CUDA=${JAX_EP_CUDA}, but no nvcc is found. ${_how}.")
  endif()
  # pip shows this with -v only: jax_ep/_src/groups/native.py says it again at the first use.
  message(WARNING "jax_ep: no nvcc is found, so this build is for CPU only. ${_how}. "
    "JAX_EP_CUDA=OFF silences this.")
  return()
endif()

# The wheels have lib, but nvcc looks for its libraries in lib64.
cmake_path(GET _nvcc PARENT_PATH _toolkit)
cmake_path(GET _toolkit PARENT_PATH _toolkit)
if(EXISTS "${_toolkit}/lib/libcudart_static.a" AND NOT EXISTS "${_toolkit}/lib64")
  string(APPEND CMAKE_CUDA_FLAGS_INIT " -L${_toolkit}/lib")
endif()

set(CMAKE_CUDA_COMPILER "${_nvcc}")
set(CMAKE_CUDA_ARCHITECTURES "${JAX_EP_CUDA_ARCHS}")
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 13.0)
  message(FATAL_ERROR "jax_ep: ${_nvcc} is of CUDA ${CMAKE_CUDA_COMPILER_VERSION}; 13.0 or newer "
    "is needed. JAX_EP_CUDA=PYPI brings one, JAX_EP_CUDA=OFF builds for CPU only.")
endif()
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that nvcc has C++20
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
find_library(JAX_EP_CUDART_STATIC cudart_static REQUIRED NO_CACHE
  HINTS ${CMAKE_CUDA_HOST_IMPLICIT_LINK_DIRECTORIES} "${_toolkit}/lib64" "${_toolkit}/lib")
message(STATUS
  "jax_ep: CUDA ${CMAKE_CUDA_COMPILER_VERSION}, ${_nvcc}, for ${CMAKE_CUDA_ARCHITECTURES}")
set(JAX_EP_HAVE_CUDA TRUE)
