# SPDX-License-Identifier: Apache-2.0
# Target GTest::gtest_main, compiled from the sources that tools/googletest.py finds or brings, and
# the functions of CMake's module GoogleTest. A GoogleTest that is installed is not looked for: all
# run the same, with the flags and sanitizers of the tests.
include(GoogleTest)

find_package(Python 3.11 REQUIRED COMPONENTS Interpreter)
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH _root)
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${_root}/tools/googletest.py" "${_root}/build/googletest"
  OUTPUT_VARIABLE _googletest OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE _failed)
if(_failed)
  message(FATAL_ERROR "jax_ep: the C++ tests need GoogleTest; what is missing stands above")
endif()

add_library(jax_ep_gtest_main STATIC
  "${_googletest}/src/gtest-all.cc"
  "${_googletest}/src/gtest_main.cc")
add_library(GTest::gtest_main ALIAS jax_ep_gtest_main)
target_include_directories(jax_ep_gtest_main SYSTEM PUBLIC "${_googletest}/include")
target_include_directories(jax_ep_gtest_main PRIVATE "${_googletest}")
target_compile_features(jax_ep_gtest_main PUBLIC cxx_std_20)
target_link_libraries(jax_ep_gtest_main PUBLIC Threads::Threads)
# Not ours to warn about; and half of the time to build it would go into making it fast.
target_compile_options(jax_ep_gtest_main PRIVATE -w -O0 -g0)
if(JAX_EP_SANITIZE)
  target_compile_options(jax_ep_gtest_main PRIVATE
    -fsanitize=${JAX_EP_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
endif()
