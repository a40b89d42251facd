# SPDX-License-Identifier: Apache-2.0
"""Groups: the ranks of a mesh, the compiled modules, and what each of these keeps for a group."""
