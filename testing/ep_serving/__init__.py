# SPDX-License-Identifier: Apache-2.0
"""What tests of the example server share. No part of jax_ep."""
