# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep tune`: measures launches, and writes the best ones into a table."""
