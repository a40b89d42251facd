# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the repositories of rules, for Bazel 4 without a network."""

# buildifier: disable=unnamed-macro
def offline_rules(root = ""):
    """Declares repositories of a few lines, which forward to the rules built into Bazel.

    A local_repository that WORKSPACE declares comes before Bazel's own of the same name, which
    would be downloaded.

    Args:
      root: path from the workspace to jax_ep's folder, with a final slash; empty in jax_ep itself.
    """
    for name in ["remote_coverage_tools", "rules_cc", "rules_java", "rules_python"]:
        native.local_repository(
            name = name,
            path = root + "tools/bazel/offline/" + name,
        )
