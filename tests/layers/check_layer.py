# SPDX-License-Identifier: Apache-2.0
"""Checks what a target brings: `check_layer.py --works MODULE... --absent MODULE...`.

A layer works without the ones above it, which are not in the runfiles of the target that runs this.
"""

import argparse
import importlib
import importlib.util


def main() -> None:
    """Raises an error if a module does not work, or is there though it should not be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--works", nargs="+", required=True)
    parser.add_argument("--absent", nargs="+", required=True)
    args = parser.parse_args()
    for name in args.works:
        module = importlib.import_module(name)
        assert ".runfiles/" in module.__file__, f"{name} is not of the runfiles: {module.__file__}"
    for name in args.absent:
        assert importlib.util.find_spec(name) is None, f"{name} is there"


if __name__ == "__main__":
    main()
