# SPDX-License-Identifier: Apache-2.0
"""Tables of launches that were measured to be fast, and which of them a group uses.

Imports no JAX. What measures is `jax_ep._src.tuner`.
"""
