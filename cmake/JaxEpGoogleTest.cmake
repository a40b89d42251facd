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

# Of the time in which a small test compiles, half goes to reading GoogleTest's headers: they are read
# once, with the options of all tests (another option is a warning, -Winvalid-pch, and so an error).
# A test that does not include them itself fails in Bazel, which knows nothing of this.
set(JAX_EP_TEST_OPTIONS ${JAX_EP_WARNINGS} -ffp-contract=off)
if(JAX_EP_SANITIZE)  # what a test does itself is little, and takes longest to compile
  list(APPEND JAX_EP_TEST_OPTIONS -O0)
endif()
file(CONFIGURE OUTPUT gtest_headers.cc CONTENT "")
add_library(jax_ep_gtest_headers OBJECT "${CMAKE_CURRENT_BINARY_DIR}/gtest_headers.cc")
target_precompile_headers(jax_ep_gtest_headers PRIVATE <gtest/gtest.h>)
target_link_libraries(jax_ep_gtest_headers PRIVATE jax_ep_core GTest::gtest_main)
target_compile_options(jax_ep_gtest_headers PRIVATE ${JAX_EP_TEST_OPTIONS})

# A thread-sanitized program cannot start where the kernel randomizes addresses over more bits
# than the sanitizer knows of, so run it without, where that is allowed.
set(JAX_EP_TEST_LAUNCHER "")
if(JAX_EP_SANITIZE MATCHES "thread")
  find_program(JAX_EP_SETARCH setarch)
  if(JAX_EP_SETARCH)
    execute_process(COMMAND ${JAX_EP_SETARCH} -R true
      RESULT_VARIABLE JAX_EP_SETARCH_RESULT OUTPUT_QUIET ERROR_QUIET)
    if(JAX_EP_SETARCH_RESULT EQUAL 0)
      set(JAX_EP_TEST_LAUNCHER ${JAX_EP_SETARCH} -R)
    endif()
  endif()
endif()

# A program NAME_test of each NAME_test.cc of this folder, linked with the library; ctest knows each
# of its tests by the prefix, csrc. or csrc.sim., and the test's name. With WHOLE before the names, sanitized programs
# run in one piece, which ctest knows by the prefix and NAME: to start one a thousand times takes
# longer than its tests. Not for programs whose tests leave the process larger than it was.
function(jax_ep_add_tests prefix library)
  cmake_parse_arguments(PARSE_ARGV 2 arg "WHOLE" "" "")
  set(group jax_ep_unit_tests)
  if(prefix MATCHES "^csrc[.]sim[.]")
    set(group jax_ep_sim_tests)
  endif()
  foreach(name IN LISTS arg_UNPARSED_ARGUMENTS)
    add_executable(${name}_test ${name}_test.cc)
    add_dependencies(${group} ${name}_test)
    target_link_libraries(${name}_test PRIVATE ${library} GTest::gtest_main)
    target_compile_options(${name}_test PRIVATE ${JAX_EP_TEST_OPTIONS})
    target_precompile_headers(${name}_test REUSE_FROM jax_ep_gtest_headers)
    # Far above what any test takes, also under a sanitizer on a busy machine: ends a deadlock.
    set(timeout 600)
    if(JAX_EP_SANITIZE AND arg_WHOLE)
      add_test(NAME ${prefix}${name} COMMAND ${JAX_EP_TEST_LAUNCHER} $<TARGET_FILE:${name}_test>)
      set_tests_properties(${prefix}${name} PROPERTIES TIMEOUT ${timeout})
    else()
      set_target_properties(${name}_test PROPERTIES
        CROSSCOMPILING_EMULATOR "${JAX_EP_TEST_LAUNCHER}")
      gtest_discover_tests(${name}_test
        TEST_PREFIX ${prefix} DISCOVERY_TIMEOUT 60 PROPERTIES TIMEOUT ${timeout})
    endif()
  endforeach()
endfunction()
