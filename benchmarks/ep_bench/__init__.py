# SPDX-License-Identifier: Apache-2.0
"""What the benchmark programs of this folder are made of. Not part of the library."""

import pathlib
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[2]
# The launcher of ranks, and what writes parts of pages: a program has only its own folder there.
sys.path += [str(_ROOT / "testing"), str(_ROOT / "tools" / "docs")]
