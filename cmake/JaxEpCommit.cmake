# SPDX-License-Identifier: Apache-2.0
# The commit that is built, for `python -m jax_ep --version` and bug reports: JAX_EP_COMMIT of the
# environment, or what git says. Empty where neither is known, as in a source distribution.

function(jax_ep_find_commit out source_dir)
  set(${out} "" PARENT_SCOPE)
  if(NOT "$ENV{JAX_EP_COMMIT}" STREQUAL "")
    if(NOT "$ENV{JAX_EP_COMMIT}" MATCHES "^[0-9a-f]+$")
      message(FATAL_ERROR "jax_ep: JAX_EP_COMMIT is '$ENV{JAX_EP_COMMIT}'; allowed: a commit, in "
        "hexadecimal digits")
    endif()
    string(SUBSTRING "$ENV{JAX_EP_COMMIT}" 0 12 commit)
    set(${out} "${commit}" PARENT_SCOPE)
    return()
  endif()
  find_program(JAX_EP_GIT git)
  mark_as_advanced(JAX_EP_GIT)
  if(NOT JAX_EP_GIT)
    return()
  endif()
  set(git "${JAX_EP_GIT}" -C "${source_dir}")
  # Prefix: where in its repository the folder is. Nothing for the root; else the commit is that of a
  # repository into which jax_ep's sources were copied.
  execute_process(COMMAND ${git} rev-parse --show-prefix --short=12 HEAD
    OUTPUT_VARIABLE found ERROR_QUIET RESULT_VARIABLE failed)
  if(failed OR NOT found MATCHES "^\n([0-9a-f]+)\n$")
    return()
  endif()
  set(commit "${CMAKE_MATCH_1}")
  execute_process(COMMAND ${git} --no-optional-locks status --porcelain --untracked-files=no
    OUTPUT_VARIABLE changes ERROR_QUIET RESULT_VARIABLE failed)
  if(failed OR NOT changes STREQUAL "")
    string(APPEND commit ".dirty")
  endif()
  set(${out} "${commit}" PARENT_SCOPE)
endfunction()
