# SPDX-License-Identifier: Apache-2.0
"""The repositories that jax_ep needs besides rules_cc and rules_python."""

load(":local_cuda.bzl", "local_cuda", "local_nvshmem")
load(":local_googletest.bzl", "local_googletest")
load(":local_python.bzl", "local_python")

# buildifier: disable=unnamed-macro
def jax_ep_repositories():
    """Declares them; each looks at what is installed. Only GoogleTest may be downloaded."""
    local_cuda(name = "jax_ep_cuda")
    local_googletest(name = "jax_ep_googletest")
    local_nvshmem(name = "jax_ep_nvshmem")
    local_python(name = "jax_ep_python")
