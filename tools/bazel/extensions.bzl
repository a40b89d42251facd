# SPDX-License-Identifier: Apache-2.0
"""The same repositories, for MODULE.bazel."""

load(":repositories.bzl", "jax_ep_repositories")

def _local_packages_impl(_module_ctx):
    jax_ep_repositories()

local_packages = module_extension(implementation = _local_packages_impl)
