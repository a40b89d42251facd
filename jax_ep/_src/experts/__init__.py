# SPDX-License-Identifier: Apache-2.0
"""What experts compute: kinds, formats of their matrices, and the two with weights."""
