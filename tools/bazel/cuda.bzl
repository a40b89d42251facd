# SPDX-License-Identifier: Apache-2.0
"""Choices that depend on --//:cuda, on --//:rdma, and on what this machine has."""

load("@jax_ep_cuda//:defs.bzl", "HAVE_CUDA")
load("@jax_ep_nvshmem//:defs.bzl", "WHY_NO_NVSHMEM")

def if_cuda(value, otherwise = []):
    """Returns what holds when the CUDA parts are built, or else what holds when they are not."""
    return select({
        "//:cuda_false": otherwise,
        "//:cuda_true": value,
        "//conditions:default": value if HAVE_CUDA else otherwise,
    })

# For target_compatible_with: what needs CUDA is left out of `...` where there is none.
NEEDS_CUDA = if_cuda([], ["//tools/bazel:a_cuda_compiler_see_cuda_flag"])

def if_rdma(value, otherwise = []):
    """Returns what holds when the kernels for RDMA are built, or else what holds when they are not."""
    return select({
        "//:rdma_auto_cuda_false": otherwise,
        "//:rdma_false": otherwise,
        "//:rdma_true": value,
        "//conditions:default": value if HAVE_CUDA and not WHY_NO_NVSHMEM else otherwise,
    })

NEEDS_RDMA = if_rdma([], ["//tools/bazel:nvshmem_see_rdma_flag"])
