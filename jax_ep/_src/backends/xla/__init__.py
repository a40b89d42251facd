# SPDX-License-Identifier: Apache-2.0
"""Backend `xla`: the same operations from collectives of `jax.lax` alone."""
