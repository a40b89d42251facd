# SPDX-License-Identifier: Apache-2.0
"""pytest_test: one file of tests, run by the pytest of the surrounding interpreter."""

load("@rules_python//python:py_test.bzl", "py_test")

def pytest_test(name, args = [], data = [], deps = [], **kwargs):
    """Declares a py_test.

    Args:
      name: that of the file, without .py.
      args: further ones for pytest.
      data: what the tests read.
      deps: further ones, beside jax_ep.
      **kwargs: as for py_test.
    """
    py_test(
        name = name,
        srcs = [
            name + ".py",
            "//tools/bazel:run_pytest.py",
        ],
        args = ["{}/{}.py".format(native.package_name(), name)] + args,
        data = data + ["//:pyproject.toml"],
        legacy_create_init = 0,
        main = "//tools/bazel:run_pytest.py",
        deps = deps + ["//:jax_ep"],
        **kwargs
    )
