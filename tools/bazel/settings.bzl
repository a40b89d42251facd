# SPDX-License-Identifier: Apache-2.0
"""choice: a flag of the command line that takes one of a few words."""

def _choice_impl(ctx):
    if ctx.build_setting_value not in ctx.attr.values:
        fail("jax_ep: --{} is '{}'; allowed: {}".format(
            ctx.label,
            ctx.build_setting_value,
            ", ".join(ctx.attr.values),
        ))
    return []

choice = rule(
    implementation = _choice_impl,
    attrs = {"values": attr.string_list(mandatory = True)},
    build_setting = config.string(flag = True),
)
