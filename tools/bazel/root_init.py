# SPDX-License-Identifier: Apache-2.0
"""Makes the folder of the repository in Bazel's runfiles stand for the package in it.

Under a WORKSPACE that folder is called jax_ep, and comes before its subfolder jax_ep on sys.path.
Bazel would put an empty __init__.py there (legacy_create_init), which would hide the package: so
//:jax_ep puts a copy of this there. No wheel holds it.
"""

import pathlib

_package = pathlib.Path(__file__).parent / "jax_ep"
__spec__.submodule_search_locations[:] = [str(_package)]
__file__ = __spec__.origin = str(_package / "__init__.py")
exec(compile(pathlib.Path(__file__).read_text(), __file__, "exec"))
