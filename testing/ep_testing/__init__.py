# SPDX-License-Identifier: Apache-2.0
"""What tests share: problems, programs that run them, comparisons, stand-ins. No part of jax_ep."""
