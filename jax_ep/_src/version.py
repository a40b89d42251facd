# SPDX-License-Identifier: Apache-2.0
"""Which jax_ep this is: its version, and the commit that it was built from."""

import importlib


def version() -> str:
    """`jax_ep.__version__`, which is what pip says too: it has no commit, as an index wants it."""
    return importlib.import_module("jax_ep").__version__  # the package that imported this module


def commit() -> str | None:
    """The commit that the compiled modules were built from, ".dirty" if files differed from it.

    None if that is not known: built from a source distribution, by Bazel, or not at all. It was
    written down by the build (cmake/JaxEpCommit.cmake); git is not asked now.
    """
    try:
        return importlib.import_module("jax_ep._commit").COMMIT
    except ModuleNotFoundError:
        return None


def full_version() -> str:
    """The version, with the commit as PEP 440's local part where it is known: "0.2.0+g1a2b3c"."""
    built_from = commit()
    return version() if built_from is None else f"{version()}+g{built_from}"
