# SPDX-License-Identifier: Apache-2.0
"""not_found: stands for what this machine lacks, and says so to whoever needs it."""

def _not_found_impl(ctx):
    fail("jax_ep: " + ctx.attr.message)

not_found = rule(
    implementation = _not_found_impl,
    attrs = {"message": attr.string(mandatory = True)},
)
